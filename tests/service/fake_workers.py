"""Runs workers without the API, with the fake worker: `fake_workers.py DATA_DIRECTORY`; settings as usual."""

from __future__ import annotations

import sys
from pathlib import Path

from service.settings import Settings
from service.worker import process
from service.worker.command import run_workers

if __name__ == "__main__":
    process.COMMAND = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
    sys.exit(run_workers(Settings(data_dir=Path(sys.argv[1]))))
