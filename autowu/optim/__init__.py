"""Layer-wise adaptive optimizers."""

from autowu.optim.lars import LARS, split_by_dimension

__all__ = ["LARS", "split_by_dimension"]
