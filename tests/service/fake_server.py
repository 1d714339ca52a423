"""Serves the application with the fake worker: `fake_server.py DATA_DIRECTORY PORT`; settings as usual."""

from __future__ import annotations

import sys
from pathlib import Path

from service.server import serve
from service.settings import Settings
from service.worker import process

if __name__ == "__main__":
    process.COMMAND = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
    serve(Settings(data_dir=Path(sys.argv[1])), port=int(sys.argv[2]))
