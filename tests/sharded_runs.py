"""What tests/test_optim_sharded.py runs on every rank of four: `python tests/sharded_runs.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_ranks
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from autowu.optim import LAMB, LANS, LARS, TVLARS, Muon, param_groups

STEPS = 3
OPTIMIZERS = {
    "lars": lambda groups: LARS(torch.optim.SGD(groups, lr=2.0, momentum=0.9), trust_coef=0.02),
    "lars_adamw": lambda groups: LARS(torch.optim.AdamW(groups, lr=0.01)),
    "tvlars": lambda groups: TVLARS(groups, lr=2.0, eta=0.02, lmbda=0.2),
    "lamb": lambda groups: LAMB(groups, lr=0.02),
    "lamb_one_by_one": lambda groups: LAMB(groups, lr=0.02, foreach=False),
    "lans": lambda groups: LANS(groups, lr=0.02),
    "muon": lambda groups: Muon(groups, lr=0.02),
}


def tensor_parallel(make, mesh):
    """Weight norms of a first step where tensor parallelism and FSDP2 both shard."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    if mesh is not None:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh["dp"])
    optimizer = make([{"params": list(model.parameters())}])
    model(torch.randn(16, 64, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    optimizer.step()
    return [tuple(layer) for layer in optimizer.layer_stats()]


def network():
    torch.manual_seed(0)
    # 33 rows: uneven shards on two and on four ranks; 3 rows: an empty shard on one of four.
    return nn.Sequential(nn.Linear(64, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 3), nn.Tanh(), nn.Linear(3, 10))


def train(make, rank, size, mesh=None, resume_at=None):
    """Weights, layer stats and losses of a short run; on `size` ranks, each with its part of every batch."""
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = network()
    if mesh is not None:
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
    optimizer = make(param_groups(model, weight_decay=0.05))
    for step in range(STEPS):
        if step == resume_at:
            options = StateDictOptions(full_state_dict=True)
            saved = get_optimizer_state_dict(model, optimizer, options=options)
            model.zero_grad()
            optimizer = make(param_groups(model, weight_decay=0.3))
            set_optimizer_state_dict(model, optimizer, saved, options=options)
        batch = torch.randperm(1797, generator=torch.Generator().manual_seed(step))[: 32 * 4]
        part = batch.chunk(size)[rank] if mesh is not None else batch
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    weights = {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
        for name, weight in model.named_parameters()
    }
    return {"weights": weights, "layers": [tuple(layer) for layer in optimizer.layer_stats()]}


def main(folder):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    meshes = {
        "fsdp": dist.init_device_mesh("cpu", (size,)),
        "hsdp": dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    }
    results = {(name, kind): train(make, rank, size, mesh) for name, make in OPTIMIZERS.items() for kind, mesh in meshes.items()}
    for name in ("lamb", "tvlars", "muon"):
        results[name, "resumed"] = train(OPTIMIZERS[name], rank, size, meshes["fsdp"], resume_at=2)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name in ("lars", "lamb", "lans", "muon"):
        results[name, "tensor parallel"] = {"layers": tensor_parallel(OPTIMIZERS[name], mesh)}
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(4, main, sys.argv[1])
