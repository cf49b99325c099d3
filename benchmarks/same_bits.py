"""Whether a change of the code leaves every bit of a run as it was.

    python benchmarks/same_bits.py record before.json     # before the change
    python benchmarks/same_bits.py compare before.json    # after it, on the same machine

Some fifty short runs of real models on scikit-learn's digits pass through every part of the scheduler: types of warm-up and
cooldown, both engines and the paper's preset, copies put back, explosions, divergences, micro-batches, skipped steps, two ranks,
runs that are cut and resumed. Of each the LRs of all groups at every step, the events, the lines of the log, the switch and the
last fit are kept, with a digest of weights and optimizer state. One thread; another machine or torch has other bits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import math
import os
import pickle
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.optim import SGD, AdamW, Optimizer

from autowu import AutoWU
from autowu.optim import LARS

NAN = float("nan")


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def network(normalised: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(32) if normalised else nn.Identity()
    return nn.Sequential(nn.Linear(64, 32), norm, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


class Run:
    """A model in training, and what is recorded of it."""

    def __init__(self, optimizer: Callable[[nn.Module], Optimizer] = sgd, normalised: bool = True, rank: int = 0, size: int = 1):
        self.inputs, self.targets = digits()
        self.model = network(normalised)
        self.trained = nn.parallel.DistributedDataParallel(self.model) if size > 1 else self.model
        self.optimizer = optimizer(self.model)
        self.rank, self.size = rank, size
        self.lrs: list[list[str]] = []
        self.scheduler: AutoWU

    def schedule(self, make: Callable[..., AutoWU] = AutoWU, with_model: bool = True, **arguments: Any) -> Run:
        if with_model:
            arguments["model"] = self.model
        else:
            arguments["rollback"] = False
        self.scheduler = make(self.optimizer, **arguments)
        return self

    def loss(self, step: int) -> Tensor:
        batch = torch.randint(len(self.targets), (64,), generator=torch.Generator().manual_seed(step))[self.rank :: self.size]
        loss: Tensor = nn.functional.cross_entropy(self.trained(self.inputs[batch]), self.targets[batch])
        return loss

    def backward(self, step: int, factor: float = 1.0) -> Tensor:
        loss = self.loss(step)
        self.optimizer.zero_grad()
        (factor * loss).backward()  # type: ignore[no-untyped-call]
        return loss

    def note(self) -> None:
        self.lrs.append([float(group["lr"]).hex() for group in self.optimizer.param_groups])

    def train(self, start: int, end: int, factor: Callable[[int], float] = lambda step: 1.0) -> Run:
        """Plain steps; `factor` on the gradients of each."""
        for step in range(start, end):
            self.note()
            loss = self.backward(step, factor(step))
            self.optimizer.step()
            self.scheduler.step(loss)
        return self

    def feed(self, losses: Any) -> Run:
        """Steps that train nothing, with losses that are made up."""
        for loss in losses:
            self.note()
            self.optimizer.step()
            self.scheduler.step(loss)
        return self

    def since_switch(self) -> int:
        """Steps since the switch, -1 before it."""
        return -1 if self.scheduler.switch is None else self.scheduler.last_epoch - self.scheduler.switch.step

    def resumed(self, **arguments: Any) -> Run:
        """Another run that goes on from a file of this one's state."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()], file)
        file.seek(0)
        model, optimizer, scheduler = torch.load(file, weights_only=True)
        other = type(self)(normalised=isinstance(self.model[1], nn.BatchNorm1d)).schedule(**arguments)  # type: ignore[index]
        other.lrs = self.lrs
        other.model.load_state_dict(model)
        other.optimizer.load_state_dict(optimizer)
        other.scheduler.load_state_dict(scheduler)
        return other

    def result(self) -> dict[str, Any]:
        scheduler = self.scheduler
        self.note()
        found = scheduler.posterior
        return {
            "lrs": self.lrs,
            "last": [float(lr).hex() for lr in scheduler.get_last_lr()],
            "events": [[event.kind, event.step, event.message] for event in scheduler.events],
            "switch": repr(scheduler.switch),
            "phase": scheduler.phase,
            "steps": scheduler.last_epoch,
            "decision": repr(scheduler.decision),
            "posterior": None if found is None else digest([found.grid, found.mean, found.variance, found.difference_variance]),
            "config": repr(scheduler.config),
            "weights": digest([*self.model.state_dict().values(), self.optimizer.state_dict()]),
        }


def digest(value: Any) -> str:
    """SHA-256 of tensors, arrays and numbers, nested as they may be."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                sha.update(str(key).encode())
                feed(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                feed(inner)
        elif isinstance(value, (Tensor, np.ndarray)):
            sha.update(np.ascontiguousarray(value.detach().numpy() if isinstance(value, Tensor) else value).tobytes())
        else:
            sha.update(repr(value).encode())

    feed(value)
    return sha.hexdigest()


def valley(steps: int, lowest: int, noise: float = 0.02) -> list[float]:
    """Losses that fall to a minimum and rise from it."""
    values = 1 + np.abs(np.arange(steps) / lowest - 1) + noise * np.random.default_rng(0).normal(size=steps)
    return values.tolist()  # type: ignore[no-any-return]


class Broken:
    """An engine whose every second fit fails."""

    max_points = 512

    def __init__(self) -> None:
        from autowu import ClosedFormGP

        self.inner, self.calls = ClosedFormGP(0.1), 0

    def posterior(self, curve: Any) -> Any:
        self.calls += 1
        if self.calls % 2:
            raise RuntimeError("this fit fails")
        return self.inner.posterior(curve)

    def __repr__(self) -> str:
        return "Broken()"


def groups(model: nn.Module) -> Optimizer:
    """Three groups: a tensor LR, an LR of its own, a scale as timm sets it."""
    layers = list(model.children())
    return AdamW(
        [
            {"params": layers[0].parameters(), "lr": torch.tensor(0.01)},
            {"params": layers[3].parameters(), "lr": 0.002},
            {"params": layers[5].parameters(), "lr_scale": 0.5},
        ],
        lr=0.01,
    )


def micro_batches() -> Run:
    run = Run().schedule(total_steps=200)
    for step in range(200):
        run.note()
        run.optimizer.zero_grad()
        for part in range(3):
            loss = run.loss(3 * step + part)
            (loss / 3).backward()  # type: ignore[no-untyped-call]
            run.scheduler.observe(loss)
        run.optimizer.step()
        run.scheduler.step(run.loss(9999) if step % 50 == 7 else None)
    return run


def skipped_steps(broken: bool) -> Run:
    """Every fifth step is skipped; or all from the 40th on, with losses that are not finite."""
    run = Run().schedule(total_steps=200)
    for step in range(230):
        run.note()
        loss = run.backward(step)
        gone = broken and 40 <= step < 110
        if not gone and (broken or step % 5 != 2):
            run.optimizer.step()
        run.scheduler.step(loss * NAN if gone else loss)
    return run


def some_missing() -> Run:
    run = Run(normalised=False).schedule(total_steps=240)
    for step in range(240):
        run.note()
        loss = run.backward(step)
        run.optimizer.step()
        run.scheduler.step(None if step % 7 == 3 else loss * (math.inf if step == 30 else 1))
    return run


def late_group(**arguments: Any) -> Run:
    run = Run(lambda model: SGD(list(model.parameters())[:-2], lr=0.1, momentum=0.9)).schedule(total_steps=200, **arguments)
    run.train(0, 90)
    run.optimizer.add_param_group({"params": list(run.model.parameters())[-2:], "lr": 0.3 * run.optimizer.param_groups[0]["lr"]})
    return run.train(90, 200)


def replaced_step() -> Run:
    run = Run().schedule(total_steps=120).train(0, 20)
    plain = type(run.optimizer).step
    run.optimizer.step = lambda: plain(run.optimizer)  # type: ignore[method-assign, assignment]
    run.optimizer._optimizer_step_post_hooks.clear()
    return run.train(20, 120)


def wrong(run: Run, factor: float, times: int) -> Run:
    """Gradients times `factor` from 15 steps after the switch until the run was set back so often."""

    def now(step: int) -> float:
        setbacks = sum(event.kind == "divergence" for event in run.scheduler.events)
        return factor if run.since_switch() >= 15 and setbacks < times else 1.0

    return run.train(0, int(run.scheduler.config.end), now)


def cannot_copy() -> Run:
    run = Run().schedule(total_steps=200).train(0, 30)
    run.optimizer.param_groups[0]["lock"] = threading.Lock()
    run.train(30, 200)
    del run.optimizer.param_groups[0]["lock"]
    return run


def cut(step: int, **arguments: Any) -> Run:
    more = {"total_steps": 240, "test_interval": 7} | arguments
    return Run(normalised=False).schedule(**more).train(0, step).resumed(**more).train(step, 240)


def extended() -> Run:
    run = Run().schedule(steps_per_epoch=10, total_epochs=20).train(0, 150)
    return run.resumed(steps_per_epoch=10, total_epochs=30).train(150, 300)


def forked() -> Run:
    run = Run().schedule(total_steps=240, cooldown_fraction=0.2).train(0, 144)
    state = run.scheduler.fork_cooldown(0.4)
    run.scheduler.load_state_dict(state)
    return run.train(144, 240)


def copied() -> Run:
    run = Run().schedule(total_steps=200).train(0, 40)
    run.model, run.optimizer, run.scheduler = copy.deepcopy((run.model, run.optimizer, run.scheduler))
    run.trained = run.model
    run.train(40, 80)
    run.model, run.optimizer, run.scheduler = pickle.loads(pickle.dumps((run.model, run.optimizer, run.scheduler)))
    run.trained = run.model
    return run.train(80, 200)


def plain(total: int, *, optimizer: Callable[[nn.Module], Optimizer] = sgd, normalised: bool = True, **arguments: Any) -> Run:
    return Run(optimizer, normalised).schedule(total_steps=total, **arguments).train(0, total)


def epochs(optimizer: Callable[[nn.Module], Optimizer] = sgd, **arguments: Any) -> Run:
    return Run(optimizer).schedule(steps_per_epoch=8, total_epochs=30, **arguments).train(0, 240)


def made_up(losses: list[float]) -> Run:
    run = Run().schedule(
        with_model=False, total_steps=len(losses), max_warmup_fraction=0.5, peak_factor=1.0, warmup_type="exp", patience=3
    )
    return run.feed(losses)


def on_ranks(kind: str, rank: int, size: int) -> Run:
    run = Run(normalised=False, rank=rank, size=size)
    if kind == "plateau":
        run.schedule(steps_per_epoch=8, total_epochs=30, decay_phase_stat="loss", decay_phase_factor=0.5, cooldown_fraction=0.1)
        return run.train(0, 240)
    run.schedule(total_steps=240, min_lr=1e-5, max_lr=10.0, cooldown_fraction=0.3)
    return wrong(run, NAN if kind == "nan" else -0.3, 1)


CASES: dict[str, Callable[[], Run]] = {
    "default": lambda: plain(240),
    "no model": lambda: plain(240, with_model=False),
    "adamw": lambda: plain(240, optimizer=lambda model: AdamW(model.parameters(), lr=1e-3)),
    "lars": lambda: plain(240, optimizer=lambda model: LARS(SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4))),
    "exp, cosine at once": lambda: plain(240, warmup_type="exp", immediate_cooldown=True, cooldown_type="cosine"),
    "linear, half a cosine": lambda: plain(240, warmup_type="linear", cooldown_type="half_cosine", max_lr=1.0),
    "epochs, sqrt": lambda: epochs(warmup_unit="epoch", test_interval="epoch", cooldown_type="sqrt", patience=1),
    "paper": lambda: epochs(make=AutoWU.paper, with_model=False),
    "paper, constant then cosine": lambda: epochs(make=AutoWU.paper, immediate_cooldown=False, decay_phase_factor=0.99),
    "gpytorch": lambda: plain(150, gp="gpytorch", test_interval=6),
    "no watch": lambda: plain(240, watch=False, normalised=False),
    "never a verdict": lambda: plain(200, patience=1000),
    "12 steps": lambda: plain(12),
    "63 steps": lambda: plain(63, normalised=False),
    "explodes": lambda: plain(240, normalised=False, patience=1000, max_lr=1e4),
    "explodes, no model": lambda: plain(240, normalised=False, patience=1000, max_lr=1e4, with_model=False),
    "nothing but nan": lambda: made_up([NAN] * 100),
    "nan from a step on": lambda: made_up(valley(60, 150) + [NAN] * 140),
    "valley": lambda: made_up(valley(300, 75)),
    "valley, long": lambda: made_up(valley(6000, 1500)),
    "huge losses": lambda: made_up(valley(150, 120) + [1e30, 1e38] * 75),
    "diverges": lambda: wrong(Run(normalised=False).schedule(total_steps=300), -0.5, 2),
    "diverges to nan": lambda: wrong(Run(normalised=False).schedule(total_steps=300), NAN, 1),
    "diverges for good": lambda: wrong(Run(normalised=False).schedule(total_steps=300, with_model=False), -1.0, 9),
    "diverges, copies on the host": lambda: wrong(Run().schedule(total_steps=300, snapshot_device="cpu"), -0.5, 1),
    "plateau": lambda: epochs(decay_phase_stat="loss", decay_phase_factor=0.5, cooldown_fraction=0.1),
    "plateau, made up": lambda: (
        Run()
        .schedule(
            steps_per_epoch=8,
            total_epochs=30,
            decay_phase_stat="loss",
            decay_phase_factor=0.5,
            cooldown_fraction=0.1,
            with_model=False,
        )
        .feed(valley(60, 40) + [1.0 + 1e-4 * k for k in range(180)])
    ),
    "decay by epoch": lambda: epochs(decay_phase_factor=0.97, cooldown_fraction=0.2),
    "micro-batches": micro_batches,
    "skipped steps": lambda: skipped_steps(False),
    "skipped for good": lambda: skipped_steps(True),
    "losses missing": some_missing,
    "groups": lambda: plain(200, optimizer=groups),
    "late group": late_group,
    "step replaced": replaced_step,
    "fits that fail": lambda: plain(200, gp=Broken()),
    "cannot copy": cannot_copy,
    "cut in the warm-up": lambda: cut(25),
    "cut between tests": lambda: cut(45),
    "cut after the switch": lambda: cut(90),
    "cut, gpytorch": lambda: cut(25, gp="gpytorch"),
    "extended": extended,
    "forked": forked,
    "copied": copied,
}
RANKS = ("nan", "uphill", "plateau")


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("autowu")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def recorded(make: Callable[[], Run]) -> dict[str, Any]:
    with log_lines() as lines, warnings.catch_warnings(record=True):
        result = make().result()
    return result | {"log": lines}


def rank_main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    results = {f"two ranks: {kind}": recorded(partial(on_ranks, kind, rank, size)) for kind in RANKS}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes itself down


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, make in CASES.items():
        results[name] = recorded(make)
        kinds = [event[0] for event in results[name]["events"]]
        print(f"{name:32s} {results[name]['steps']:5d} steps  {results[name]['phase']:9s} {' '.join(kinds)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(rank_main, args=(2, folder), nprocs=2)  # type: ignore[no-untyped-call]
        for rank in range(2):
            for name, result in json.loads(Path(folder, f"{rank}.json").read_text()).items():
                results[f"{name}, rank {rank}"] = result
    if args.action == "record":
        args.file.write_text(json.dumps(results))
        print(f"{len(results)} runs in {args.file}")
        return 0
    before = json.loads(args.file.read_text())
    after = json.loads(json.dumps(results))
    differ = [
        f"{name}: {key}" for name in before for key in before[name] if after.get(name, {}).get(key, "missing") != before[name][key]
    ]
    print(f"{len(before)} runs compared; " + ("every bit is the same" if not differ else "these differ:\n  " + "\n  ".join(differ)))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
