"""Where files are: local working directories, and the store of uploads and results."""
