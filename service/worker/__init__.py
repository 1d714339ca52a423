"""Running jobs: the supervisor in the service's process, and a child process for each job."""
