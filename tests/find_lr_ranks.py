"""What tests/test_find_lr.py runs on two ranks: `python tests/find_lr_ranks.py FOLDER` in each."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from autowu import find_lr


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + rank)
    batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(10 + rank, 16, 4)]  # not as many on both
    before = [p.tolist() for p in model.parameters()]
    found = find_lr(model, optimizer, torch.nn.functional.mse_loss, batches, steps=60, accumulate=2)
    arrays = {name: getattr(found, name).tolist() for name in ("lrs", "losses", "fitted_lrs", "mean", "std")}
    told = arrays | {"lr": found.lr, "interval": found.interval, "sure": found.sure, "steps": found.steps}
    told["same"] = before == [p.tolist() for p in model.parameters()]
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes itself down


if __name__ == "__main__":
    main(sys.argv[1])
