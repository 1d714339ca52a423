"""`python -m service.worker SCRATCH_DIRECTORY`: the process of one job."""

import faulthandler
import sys
from pathlib import Path

from service.worker import confinement

if __name__ == "__main__":
    faulthandler.enable()  # says in the log where native code crashed
    scratch = Path(sys.argv[1])
    confinement.enter(scratch)
    # Only now: it starts threads and opens files.
    from service.worker.child import main

    sys.exit(main(scratch))
