"""What promises the same as AutoWU: schedules that are given no LR or a default one, and optimizers that need none.

- ``onecycle``, ``plateau``: torch's OneCycleLR and ReduceLROnPlateau (fed the mean training loss of each thirtieth of the run) at
  the LR that torch-lr-finder suggests after 100 steps of a range test, over AutoWU's own LR range.
- ``schedule-free``, ``d-adaptation``, ``prodigy``: at the LRs their authors recommend, for SGD and AdamW, Prodigy for AdamW; the
  first under 5 % warm-up alone, the second under the grid's schedule, the third under cosine.
- ``greedy``: GreedyLR of transformers, from the optimizer's default LR, fed the training loss of every step, which it smooths.
- ``adalrs``: after the idea of AdaLRS (2025), of which there is no public code; from the optimizer's default LR.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from tasks import Task, make_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from autowu.families import lr_range
from autowu.schedules import cooldown_factor

__all__ = ["DEFAULT_LRS", "EPOCHS", "PEERS", "AdaLRS", "Recipe", "cosine", "peer"]

EPOCHS = 30
RANGE_TEST_STEPS = 100
PEERS = ("onecycle", "plateau", "schedule-free", "d-adaptation", "prodigy", "greedy", "adalrs")
DEFAULT_LRS = {
    **dict.fromkeys(("sgd", "adamw", "adamp", "lamb", "madgrad", "adan", "adopt"), 1e-3),
    **dict.fromkeys(("lars", "rmsprop", "adagrad", "adafactor"), 1e-2),
    "muon": 2e-2,
    "lion": 1e-4,
    "nadam": 2e-3,
    "mars": 3e-3,
    "laprop": 4e-4,
    "SOAP": 3e-3,
    "schedulefree": 2.5e-3,
}
"""That of the class, or of its authors."""


class Recipe:
    """An optimizer and what is to be done after each of its steps."""

    def __init__(
        self, optimizer: Optimizer, after_step: Callable[[Tensor], None], facts: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self.optimizer, self.after_step, self.facts = optimizer, after_step, facts


def cosine(optimizer: Optimizer, total: float, warmup: int) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return cooldown_factor(min(1.0, (step - warmup) / (total - warmup)))

    return LambdaLR(optimizer, factor)


def range_test(opt: str, batch_size: int, task: Task, seed: int) -> float:
    """The LR at which the loss falls most steeply, as torch-lr-finder suggests it, on a model of its own."""
    import matplotlib.pyplot as plt
    from torch_lr_finder import LRFinder

    torch.manual_seed(seed)
    model = task.new_model()
    low, high = lr_range(make_optimizer(opt, model, 1.0))
    optimizer = make_optimizer(opt, model, low)
    finder = LRFinder(_Flat(model), optimizer, task.criterion, task.train[0].device)
    loader = torch.utils.data.DataLoader(_Batches(task, batch_size, seed), batch_size=None)
    finder.range_test(loader, end_lr=high, num_iter=RANGE_TEST_STEPS)
    figure, axes = plt.subplots()
    try:
        found = finder.plot(ax=axes, suggest_lr=True)
    finally:
        plt.close(figure)
    return float(found[1]) if isinstance(found, tuple) else math.sqrt(low * high)


class _Flat(nn.Module):
    """A model whose outputs are a matrix, as the range test wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x).flatten(0, -2)


class _Batches(torch.utils.data.IterableDataset[Any]):
    def __init__(self, task: Task, batch_size: int, seed: int) -> None:
        self.task, self.batch_size, self.seed = task, batch_size, seed

    def __iter__(self) -> Any:
        return ((x, y if y.is_floating_point() else y.flatten()) for x, y in self.task.batches(self.batch_size, self.seed))


class AdaLRS:
    """The LR by the speed of the fall of the loss, in one run; start it with the LR of the optimizer's groups.

    Until 40 % of the run the slope of the loss, by least squares over `interval` steps, is taken at the LR and then at a higher
    one. Where the loss falls faster at that, it is kept. Otherwise the weights go back and the LR is lowered. The factors shrink
    with every try. Then the LR falls evenly to zero.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, total: int, up: float = 3.0, down: float = 2.0) -> None:
        self.optimizer, self.model, self.total, self.up, self.down = optimizer, model, total, up, down
        self.lr = float(optimizer.param_groups[0]["lr"])
        self.warmup, self.search_end, self.interval = round(0.05 * total), round(0.4 * total), max(8, total // 60)
        self.losses: list[float] = []
        self.slope = math.nan  # at the LR before the present one; none where no higher one is on trial
        self.kept = self._copy()
        self.taken = 0
        self._set_lr()

    def _copy(self) -> tuple[float, Any, Any]:
        return self.lr, copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())

    def _set_lr(self) -> None:
        rising = min(1.0, (self.taken + 1) / (self.warmup + 1))
        falling = min(1.0, (self.total - self.taken) / (self.total - self.search_end))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rising * falling

    def step(self, loss: Tensor) -> None:
        self.taken += 1
        if self.warmup < self.taken <= self.search_end:
            self.losses.append(float(loss))
            if len(self.losses) == self.interval:
                self._compare(_slope(self.losses))
                self.losses.clear()
        self._set_lr()

    def _compare(self, slope: float) -> None:
        on_trial = math.isfinite(self.slope)
        if not on_trial and math.isfinite(slope):
            self.slope, self.kept = slope, self._copy()
            self.lr *= self.up
            return
        if not slope < self.slope:
            lr, weights, state = self.kept
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state)
            self.lr = min(lr, self.lr) / self.down
        self.slope = math.nan
        self.up, self.down = 1 + 0.9 * (self.up - 1), 1 + 0.9 * (self.down - 1)


def _slope(losses: list[float]) -> float:
    """Of the straight line through the losses, a step."""
    x = torch.arange(len(losses), dtype=torch.float64) - (len(losses) - 1) / 2
    return float(x @ torch.tensor(losses, dtype=torch.float64) / (x @ x))


def peer(method: str, opt: str, batch_size: int, total: int, task: Task, model: nn.Module, seed: int) -> Recipe:
    """What `method` does to train `model` in `total` steps with the optimizer of that name."""
    if method in ("onecycle", "plateau"):
        found = range_test(opt, batch_size, task, seed)
        torch.manual_seed(seed)
        optimizer = make_optimizer(opt, model, found)
        extra = {"found_lr": found, "extra_steps": RANGE_TEST_STEPS}
        if method == "onecycle":
            momentum = any(name in optimizer.defaults for name in ("momentum", "betas"))
            cycle = OneCycleLR(optimizer, max_lr=found, total_steps=total, cycle_momentum=momentum)
            return Recipe(optimizer, lambda loss: cycle.step(), lambda: extra)
        plateau, losses = ReduceLROnPlateau(optimizer), []

        def after_step(loss: Tensor) -> None:
            losses.append(loss)
            if len(losses) == total // EPOCHS:
                plateau.step(torch.stack(losses).mean())
                losses.clear()

        return Recipe(optimizer, after_step, lambda: extra)
    if method in ("adalrs", "greedy"):
        optimizer = make_optimizer(opt, model, DEFAULT_LRS[opt])
        if method == "adalrs":
            search = AdaLRS(optimizer, model, total)
            return Recipe(optimizer, search.step, lambda: {"found_lr": search.lr})
        from transformers import GreedyLR

        low, high = lr_range(optimizer)
        greedy = GreedyLR(optimizer, smooth=True, min_lr=low, max_lr=high)
        return Recipe(optimizer, lambda loss: greedy.step(float(loss)))
    return _parameter_free(method, opt, model, total)


def _parameter_free(method: str, opt: str, model: nn.Module, total: int) -> Recipe:
    warmup = round(0.05 * total)
    groups = make_optimizer(opt, model, 1.0).param_groups
    plain: list[dict[str, Any]] = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    if method == "schedule-free":
        from schedulefree import AdamWScheduleFree, SGDScheduleFree

        make = {"sgd": SGDScheduleFree, "adamw": AdamWScheduleFree}[opt]
        optimizer: Any = make(plain, warmup_steps=warmup)
        optimizer.train()
        return Recipe(optimizer, lambda loss: None)
    if method == "d-adaptation":
        from dadaptation import DAdaptAdam, DAdaptSGD

        adam = opt == "adamw"
        optimizer = DAdaptAdam(plain, lr=1.0, decouple=True) if adam else DAdaptSGD(plain, lr=1.0, momentum=0.9)
    else:
        from prodigyopt import Prodigy

        optimizer, warmup = Prodigy(plain, lr=1.0), 0
    schedule = cosine(optimizer, total, warmup)
    return Recipe(optimizer, lambda loss: schedule.step())
