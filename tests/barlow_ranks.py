"""What tests/test_experiments.py runs on two ranks: loss and gradients of Barlow Twins, each rank with a share of the batch."""

import sys
from pathlib import Path

import torch
from processes import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
from barlow_twins import BarlowTwins
from loop import parallel
from networks import small_encoder

from autowu.training.process import join

SHARES = (slice(0, 10), slice(10, 24))  # of different sizes


def make_twins():
    torch.manual_seed(0)
    return BarlowTwins(*small_encoder(), projector=[24, 24, 16], lmbda=0.01).double()


def make_views():
    torch.manual_seed(1)
    return torch.randn(2, 24, 1, 8, 8, dtype=torch.float64)


def gradients(twins, forward, views):
    loss = forward(*views)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in twins.named_parameters()}}


if __name__ == "__main__":
    with join("cpu") as process:
        twins = make_twins()
        found = gradients(twins, parallel(twins, process), make_views()[:, SHARES[process.rank]])
        torch.save(found, Path(sys.argv[1]) / f"{process.rank}.pt")
