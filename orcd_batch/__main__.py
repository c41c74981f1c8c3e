"""`python -m orcd_batch`: the same program as the console script `orcd-batch`."""

import sys

from orcd_batch.cli import main

if __name__ == "__main__":
    sys.exit(main())
