"""What tests/test_distributed.py runs on every rank of two and of four: `python tests/rank_runs.py FOLDER [--slow]`."""

import io
import json
import logging
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from forked import run_ranks
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from autowu import AutoWU, ClosedFormGP, budget

FIXED = {"max_warmup_fraction": 0.5, "peak_factor": 1.0, "warmup_type": "exp", "patience": 3, "immediate_cooldown": True}
STEPS = 600
LOWEST = 150


def curve(rank=0):
    """Losses of one rank: a common valley, and an offset and noise of the rank's own."""
    steps = np.arange(STEPS)
    noise = 0.02 * np.random.default_rng(100 + rank).normal(size=STEPS)
    return 1 + np.abs(steps / LOWEST - 1) + 0.5 * rank + noise


def scheduler_of(**arguments):
    # The losses are made up and rise whatever the LR, which the watch would take for a divergence.
    defaults = {"total_steps": STEPS, "min_lr": 1e-5, "max_lr": 1.0, "watch": False, "rollback": False} | FIXED
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    return AutoWU(optimizer, **(defaults | arguments))


class Collectives(TorchDispatchMode):
    """How many were made. Torch's own CommDebugMode takes longer than all that it looks at."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def run(scheduler, losses):
    """One step for each loss, None for no loss at all: the LRs."""
    lrs = []
    for loss in losses:
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss)
    return lrs


def counted(scheduler, losses):
    """As `run`, and the collectives that each step made."""
    lrs, collectives = [], []
    for loss in losses:
        with Collectives() as mode:
            lrs += run(scheduler, [loss])
        collectives.append(mode.made)
    return lrs, collectives


def result(scheduler, lrs, **more):
    switch = scheduler.switch
    history = scheduler.history.state_dict()["losses"].nan_to_num(-1).tolist()
    return {"lrs": lrs, "switch": vars(switch) if switch else None, "history": history, "phase": scheduler.phase, **more}


def different_losses(rank, size):
    scheduler = scheduler_of()
    lrs, collectives = counted(scheduler, curve(rank).tolist())
    return result(scheduler, lrs, collectives=collectives, interval=scheduler.config.test_interval)


def watched(rank, size):
    """As before, but for the watch; from the switch on the loss is low."""
    scheduler = scheduler_of(watch=True, test_interval=7)
    noise = curve(rank) - curve(rank).mean()
    losses = (loss if scheduler.switch is None else 1 + 0.01 * float(noise[k]) for k, loss in enumerate(curve(rank).tolist()))
    lrs, collectives = counted(scheduler, losses)
    return result(scheduler, lrs, collectives=collectives, interval=scheduler.config.test_interval, events=told(scheduler))


def told(scheduler):
    return [(event.kind, event.step, "back at step" in event.message) for event in scheduler.events]


def a_rank_of_nans_and_a_silent_one(rank, size):
    losses = curve(0).tolist()
    if rank == 1:
        losses[40:] = [float("nan")] * (STEPS - 40)
    if rank == size - 1 and size > 2:
        losses = [None] * STEPS
    if rank == 0:
        losses[20] = float("inf")
    reports = _Reports()
    logging.getLogger("autowu").addHandler(reports)
    scheduler = scheduler_of()
    lrs = run(scheduler, losses)
    logging.getLogger("autowu").removeHandler(reports)
    return result(scheduler, lrs, reports=reports.lines)


class _Reports(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class OtherArithmetic(ClosedFormGP):
    """An engine that rounds otherwise: it finds the curve shifted by a share of itself that differs by rank."""

    def posterior(self, curve):
        posterior = super().posterior(curve)
        posterior.mean[:, -1] += 1e-3 * dist.get_rank() * abs(posterior.mean[:, -1])
        return posterior


def two_optimizers(rank, size):
    """Each with a peak of its own, on ranks whose arithmetic differs."""
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), torch.optim.AdamW([nn.Parameter(torch.ones(2))])]
    own = {"min_lr": [1e-5, 1e-6], "max_lr": [1.0, 0.01], "peak_factor": [0.5, 0.25]}
    scheduler = AutoWU(optimizers, total_steps=STEPS, gp=OtherArithmetic(0.1), watch=False, rollback=False, **own)
    lrs = []
    for loss in curve(rank).tolist():
        lrs.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step(loss)
    other = AutoWU(optimizers, total_steps=STEPS, rollback=False, min_lr=[1e-5, 1e-6 * (1 + rank)])
    try:
        other.optimizer.step()
        other.step(1.0)
    except ValueError as error:
        return result(scheduler, lrs, refused=str(error))
    return result(scheduler, lrs, refused="")


def ranks_that_round_otherwise(rank, size):
    scheduler = scheduler_of(gp=OtherArithmetic(0.1))
    lrs = run(scheduler, curve(rank).tolist())
    return result(scheduler, lrs)


def no_switch_by_test(rank, size):
    scheduler = scheduler_of(patience=1000)
    lrs = run(scheduler, curve(rank).tolist())
    return result(scheduler, lrs)


def groups_of_one(rank, size):
    groups = [dist.new_group([r]) for r in range(size)]
    scheduler = scheduler_of(process_group=groups[rank])
    lrs, collectives = counted(scheduler, curve(rank).tolist())
    return result(scheduler, lrs, collectives=collectives)


def groups_of_two(rank, size):
    groups = [dist.new_group([r, r + 1]) for r in range(0, size, 2)]
    scheduler = scheduler_of(process_group=groups[rank // 2])
    lrs = run(scheduler, curve(rank).tolist())
    other = groups[1 - rank // 2] if size > 2 else None
    try:
        scheduler_of(process_group=other)
    except (TypeError, ValueError) as error:
        return result(scheduler, lrs, refused=str(error))
    return result(scheduler, lrs, refused="")


def plateau(rank, size):
    scheduler = scheduler_of(
        total_steps=None,
        steps_per_epoch=10,
        total_epochs=60,
        immediate_cooldown=False,
        decay_phase_stat="loss",
        decay_phase_factor=0.5,
        cooldown_fraction=0.1,
    )
    losses = curve(rank)
    losses[250:] = 1.2 + rank  # no progress
    lrs, collectives = counted(scheduler, losses.tolist())
    return result(scheduler, lrs, collectives=collectives)


def held_out_losses(rank, size):
    """Each rank has losses of its own, one of them now and then none; the weight says at which step it was."""
    scheduler = scheduler_of(immediate_cooldown=False, rollback=True)
    weight = scheduler.optimizer.param_groups[0]["params"][0]
    lrs, weights = [], []
    for step, loss in enumerate(curve(rank).tolist()):
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        weight.data.fill_(step)
        scheduler.optimizer.step()
        if step % 10 == 0:
            held_out = 1 + abs(step - 400) / 100 + rank
            scheduler.observe_validation(float("nan") if rank and step == 390 else held_out)
        scheduler.step(loss)
        weights.append(float(weight[0]))
    return result(scheduler, lrs, weights=weights, events=[vars(event) for event in scheduler.events])


def resumed(rank, size, own):
    """Cut within an interval: each rank goes on from its own state, or all from the first rank's."""
    losses, cut = curve(rank).tolist(), 103
    whole, first = scheduler_of(), scheduler_of()
    expected = run(whole, losses)
    before = run(first, losses[:cut])
    state = [first.state_dict()]
    if not own:
        dist.broadcast_object_list(state)
    file = io.BytesIO()
    torch.save(state[0], file)
    file.seek(0)
    again = scheduler_of(min_lr=1e-3, patience=7)
    again.load_state_dict(torch.load(file, weights_only=True))
    after = run(again, losses[cut:])
    return result(again, before + after, expected=expected)


def asked_on_one_rank(rank, size):
    """The end is open until rank 1 is asked for it; all go on from a state of their own, saved before the others have heard."""
    scheduler = scheduler_of(total_steps=None, immediate_cooldown=False, max_warmup_steps=300)
    losses = curve(rank).tolist()
    lrs = run(scheduler, losses[:400])
    if rank == 1:
        scheduler.start_cooldown(50)
    last = run(scheduler, losses[400:401])
    again = scheduler_of(total_steps=None, immediate_cooldown=False)
    again.load_state_dict(scheduler.state_dict())
    after, collectives = counted(again, losses[401:])
    return result(again, lrs + last + after, collectives=collectives, events=told(again))


def budget_of_tokens(rank, size):
    """Of 500 steps, each rank with a count of its own that varies."""
    scheduler = scheduler_of(total_steps=None, immediate_cooldown=False, total_tokens=500 * 30 * size)
    lrs = []
    for step, loss in enumerate(curve(rank).tolist()):
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss, tokens=30 + (step % 3 - 1) * (5 + 3 * rank))
    used = scheduler._horizon.budget.used
    return result(scheduler, lrs, used=used, steps=scheduler.config.total_steps, warmup=scheduler.config.warmup_steps)


def budget_of_seconds(rank, size):
    """By clocks that differ; in mid-run a step begins to take thrice as long."""
    clock = [1000.0 * rank]
    budget.monotonic = lambda: clock[0]
    scheduler = scheduler_of(total_steps=None, immediate_cooldown=False, total_seconds=400.0, max_warmup_fraction=0.3)
    lrs, ended = [], None
    for step, loss in enumerate(curve(rank).tolist()):
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        clock[0] += (0.7 if step < 300 else 2.1) * (1 + 0.1 * rank)
        scheduler.optimizer.step()
        scheduler.step(loss)
        if scheduler.should_stop and ended is None:
            ended = clock[0] - 1000.0 * rank - 0.7 * (1 + 0.1 * rank)
    budget.monotonic = time.monotonic
    return result(scheduler, lrs, seconds=ended, steps=scheduler.config.total_steps)


def settles(rank, size):
    """The end is open until the mean of the losses rests, each of which drifts; from a state that was saved in between."""
    losses, steps = curve(rank), np.arange(STEPS)
    rests = 1.5 + 0.5 * rank + (0.002 if rank else -0.002) * (steps - 200) + losses
    losses = np.where(steps < 200, losses, rests - np.abs(steps / LOWEST - 1) - 1 - 0.5 * rank)
    arguments = {"total_steps": None, "immediate_cooldown": False, "cooldown": "auto", "cooldown_fraction": 0.2}
    scheduler = scheduler_of(**arguments, max_warmup_steps=200)
    lrs = run(scheduler, losses[:350].tolist())
    again = scheduler_of(**arguments)
    again.load_state_dict(scheduler.state_dict())
    after = run(again, losses[350:].tolist())
    return result(again, lrs + after, events=told(again), start=again.config.cooldown_start)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 10))


def train(model, rank, size, sharded):
    """15 epochs on the digits, each rank on its own part of every batch, with its own loss."""
    digits = load_digits()
    inputs = torch.tensor(digits.data[:1280], dtype=torch.float32) / 16
    targets = torch.tensor(digits.target[:1280])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoWU(optimizer, steps_per_epoch=10, total_epochs=15, model=model)
    lrs, losses = [], []
    for step in range(150):
        batch = slice(step % 10 * 128, (step % 10 + 1) * 128)
        x, y = inputs[batch][rank::size], targets[batch][rank::size]
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lrs.append(optimizer.param_groups[0]["lr"])
        losses.append(loss.item())
        scheduler.step(loss)
    weights = [(p.full_tensor() if sharded else p).flatten().tolist() for p in model.parameters()]
    return result(scheduler, lrs, losses=losses, weights=[w for weight in weights for w in weight])


def ddp(rank, size):
    return train(nn.parallel.DistributedDataParallel(network()), rank, size, sharded=False)


def fsdp2(rank, size):
    model = network()
    mesh = dist.init_device_mesh("cpu", (size,))
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    return train(model, rank, size, sharded=True)


def go_wrong(rank, size, nan_at=(), breaks=None, slope=-0.3):
    """A perceptron without normalisation: NaN gradients at some steps, `slope` times them later.

    The latter from 25 steps after the switch to a set-back.

    From the moment that `breaks` finds, told the scheduler, rank 1 cannot copy its model.
    """
    steps = 300
    digits = load_digits()
    inputs, targets = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    more = FIXED | {"immediate_cooldown": False, "cooldown_fraction": 0.3}
    lrs, weights, restored, backs = [], [], [], []
    lr_range = {"min_lr": 1e-5, "max_lr": 10.0}
    scheduler = AutoWU(optimizer, total_steps=steps, model=model, on_rollback=backs.append, **lr_range, **more)
    for step in range(steps):
        if breaks is not None and rank == 1 and breaks(scheduler):
            optimizer.param_groups[0]["lock"] = threading.Lock()  # no copy of it can be made
        batch = torch.randint(1797, (128,), generator=torch.Generator().manual_seed(step))[rank::size]
        loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        wrong = scheduler.switch is not None and step >= scheduler.switch.step + 25 and scheduler._state.setbacks == 0
        optimizer.zero_grad()
        (loss * (float("nan") if step in nan_at else slope if wrong else 1.0)).backward()
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(loss)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        restored += [(step + 1, back) for back in backs if torch.equal(weights[-1], weights[back - 1])]
        backs.clear()
    return result(
        scheduler,
        lrs,
        events=told(scheduler),
        restored=restored,
        weights=[float(w.double().sum()) for w in weights],
        last=weights[-1].tolist(),
        gave_up_copying=not scheduler._rooms.rollback.able,
    )


def a_rank_that_stops_copying_after_three_setbacks(rank, size):
    """Copies are 20 steps apart, so that the watch looks twice before the others learn of it."""
    scheduler = scheduler_of(total_steps=4000, watch=True, rollback=True, max_warmup_fraction=0.02, cooldown_fraction=0.1)
    losses, lrs = [*np.linspace(3, 1, 80), *[1.0, 1.01, 0.99] * 40], []
    for step, loss in enumerate(losses):
        if step == 120:
            scheduler._state = replace(scheduler._state, setbacks=3)
            scheduler._stage._back_at = 70
        if step == 125 and rank == 1:
            scheduler.optimizer.param_groups[0]["lock"] = threading.Lock()
        lrs.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step(float(loss))
    gave_up = not scheduler._rooms.rollback.able
    return result(scheduler, lrs, watched=scheduler._state.watched, setbacks=scheduler._state.setbacks, gave_up=gave_up)


CASES = {
    "a_rank_that_stops_copying_after_three_setbacks": a_rank_that_stops_copying_after_three_setbacks,
    "watched": watched,
    "explodes_and_diverges": lambda rank, size: go_wrong(rank, size, nan_at=(70, 90), slope=float("nan")),
    "goes_uphill": go_wrong,
    "a_rank_that_never_copies": lambda rank, size: go_wrong(rank, size, breaks=lambda scheduler: scheduler.last_epoch == 0),
    "a_rank_that_stops_copying": lambda rank, size: go_wrong(
        rank, size, breaks=lambda scheduler: scheduler.switch is not None and scheduler.last_epoch == scheduler.switch.step + 3
    ),
    "different_losses": different_losses,
    "a_rank_of_nans_and_a_silent_one": a_rank_of_nans_and_a_silent_one,
    "ranks_that_round_otherwise": ranks_that_round_otherwise,
    "two_optimizers": two_optimizers,
    "no_switch_by_test": no_switch_by_test,
    "groups_of_one": groups_of_one,
    "groups_of_two": groups_of_two,
    "plateau": plateau,
    "held_out_losses": held_out_losses,
    "resumed_from_own": lambda rank, size: resumed(rank, size, own=True),
    "resumed_from_first": lambda rank, size: resumed(rank, size, own=False),
    "asked_on_one_rank": asked_on_one_rank,
    "budget_of_tokens": budget_of_tokens,
    "budget_of_seconds": budget_of_seconds,
    "settles": settles,
    "ddp": ddp,
    "fsdp2": fsdp2,
}
# What depends on how many ranks there are; the rest is run by two.
OF_FOUR = ("different_losses", "a_rank_of_nans_and_a_silent_one", "groups_of_two")
SLOW = ("a_rank_that_never_copies",)  # as one that stops copying, from the first step on


def main(folder, *slow):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    names = OF_FOUR if size == 4 else [name for name in CASES if slow or name not in SLOW]
    results = {name: CASES[name](rank, size) for name in names}
    Path(folder, f"{rank}_of_{size}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    for size in (2, 4):
        run_ranks(size, main, *sys.argv[1:])
