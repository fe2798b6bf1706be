"""`python -m trueweight`: the same as the console script."""

import sys

from trueweight.cli import main

if __name__ == "__main__":
    sys.exit(main())
