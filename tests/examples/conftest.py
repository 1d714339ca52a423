"""mlflow, once imported, would take over the loggers of Alembic and others: it is asked not to."""

from __future__ import annotations

import os

os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
