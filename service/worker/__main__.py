"""`python -m service.worker SCRATCH_DIRECTORY`: the process of one job."""

import sys
from pathlib import Path

from service.worker.child import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
