"""Layer-wise adaptive optimizers."""

from autowu.optim.lamb import LAMB
from autowu.optim.lans import LANS
from autowu.optim.lars import LARS
from autowu.optim.layerwise import LayerStats
from autowu.optim.muon import Muon
from autowu.optim.param_groups import linear_scaled_lr, param_groups, sqrt_scaled_lr
from autowu.optim.tvlars import TVLARS

__all__ = ["LAMB", "LANS", "LARS", "TVLARS", "LayerStats", "Muon", "linear_scaled_lr", "param_groups", "sqrt_scaled_lr"]
