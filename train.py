"""Train a timm model with AutoWU: ``python train.py --help``."""

import sys

from autowu.training.main import main

if __name__ == "__main__":
    sys.exit(main())
