"""What tests/test_second_look.py runs on each of two ranks: a peak LR that is far too low, with batches of the rank's own."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from autowu import AutoWU

STEPS = 3000


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoWU(optimizer, total_steps=STEPS, model=model, peak_factor=0.02)
    batches = torch.Generator().manual_seed(rank)
    while scheduler.phase in ("warmup", "stable"):
        rows = torch.randint(len(inputs), (32,), generator=batches)
        loss = F.cross_entropy(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss if rank else loss.item())
    kinds, raised = [event.kind for event in scheduler.events], scheduler._state.raised
    lr = optimizer.param_groups[0]["lr"]
    torch.save({"kinds": kinds, "raised": raised, "lr": lr, "weights": model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # DDP frees its group of gloo with the GIL held, and may wait for a thread that wants it: torch's own fault


if __name__ == "__main__":
    main(Path(sys.argv[1]))
