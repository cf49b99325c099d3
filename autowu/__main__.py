"""``python -m autowu``: the command line."""

import sys

from autowu.cli import main

if __name__ == "__main__":
    sys.exit(main())
