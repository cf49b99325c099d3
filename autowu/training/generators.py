"""The generators of random numbers that a run draws from: torch's, Python's and the device's."""

from __future__ import annotations

import random
from typing import Any

import torch

from autowu.training.process import Process

__all__ = ["random_state", "seed_epoch", "set_random_state"]


def seed_epoch(seed: int, epoch: int, process: Process) -> None:
    """Seed anew, apart for every epoch and process, so that a resumed run draws what the uncut one would have."""
    seed += (epoch + 1) * process.world_size + process.rank
    torch.manual_seed(seed)
    random.seed(seed)  # timm's transforms


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators, for a checkpoint within an epoch."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": cuda}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
