"""What tests/test_first_step.py runs on each of two ranks: a first step that is far too large, with batches of the rank's own."""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autowu import AutoWU, snapshot


def main(folder, *fault):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    given = {"min_lr": 1e-4} if "given" in fault and rank else {}
    scheduler = AutoWU(optimizer, total_steps=300, model=model, **given)
    before = copy.deepcopy(model.state_dict())
    if "no room" in fault and rank:
        snapshot.free_memory = lambda _: 0
    loss = 1e6 * model(torch.randn(16, 4, generator=torch.Generator().manual_seed(rank))).square().mean()
    loss.backward()
    optimizer.step()
    try:
        scheduler.step(loss if rank else loss.item())
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    kinds, config = [event.kind for event in scheduler.events], scheduler.config
    found = {"kinds": kinds, "min_lr": config.min_lr, "max_lr": config.max_lr, "before": before, "weights": model.state_dict()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # DDP frees its group of gloo with the GIL held, and may wait for a thread that wants it: torch's own fault


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
