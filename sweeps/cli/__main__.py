"""`python -m sweeps.cli` is the command `scaling`."""

import sys

from sweeps.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
