"""AutoWU: automated learning-rate warm-up for PyTorch (Kim et al. 2021, arXiv 2107.05855)."""

from autowu.gp import ClosedFormGP
from autowu.gpytorch_engine import GPyTorchGP
from autowu.multi_optimizer import MultiOptimizer
from autowu.range_test import FoundLR, find_lr
from autowu.scheduler import AutoWU
from autowu.version import __version__

__all__ = ["AutoWU", "ClosedFormGP", "FoundLR", "GPyTorchGP", "MultiOptimizer", "__version__", "find_lr"]
