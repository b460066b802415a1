"""The process that executes one notebook; see :mod:`samlib.sweeps.executing`."""

import sys

from .executing import main

if __name__ == "__main__":
    sys.exit(main())
