"""The service from other programs: curl, the Python client, MLflow, GitHub Actions."""
