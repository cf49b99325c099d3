"""Layer-wise adaptive optimizers."""

from autowu.optim.lamb import LAMB
from autowu.optim.lars import LARS
from autowu.optim.layerwise import LayerStats
from autowu.optim.param_groups import linear_scaled_lr, param_groups, sqrt_scaled_lr
from autowu.optim.tvlars import TVLARS

__all__ = ["LAMB", "LARS", "TVLARS", "LayerStats", "linear_scaled_lr", "param_groups", "sqrt_scaled_lr"]
