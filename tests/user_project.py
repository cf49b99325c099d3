# pyright: basic
"""What a project of a user's may write: pyright checks it against the installed package, and it runs."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import assert_type

from autowu import AutoWU, ClosedFormGP, FoundLR, GPyTorchGP, MultiOptimizer, __version__, find_lr
from autowu.anytime import AnytimeAverage
from autowu.config import Config
from autowu.families import LR_RANGES, lr_range
from autowu.integrations.trackers import values
from autowu.optim import LAMB, LANS, LARS, TVLARS, LayerStats, Muon, linear_scaled_lr, param_groups, sqrt_scaled_lr
from autowu.phases import Event, Phase, Switch
from autowu.plotting import draw_state


def of_any(scheduler: LRScheduler) -> LRScheduler:
    return scheduler


model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
groups = param_groups(model, weight_decay=1e-4)
optimizers: list[torch.optim.Optimizer] = [
    LAMB(groups, lr=1e-3),
    LANS(groups, lr=1e-3),
    TVLARS(groups, lr=1.0),
    Muon(groups, lr=1e-2),
]
optimizer = LARS(torch.optim.SGD(groups, lr=linear_scaled_lr(0.1, batch_size=512), momentum=0.9))
scheduler = AutoWU(optimizer, total_steps=100, model=model, gp=ClosedFormGP())
average = AnytimeAverage(model)
for _ in range(100):
    loss = model(torch.randn(16, 4)).square().mean()
    scheduler.optimizer.zero_grad()
    loss.backward()
    scheduler.optimizer.step()
    scheduler.observe(loss)
    scheduler.step()
    average.update(model, scheduler)

assert_type(of_any(scheduler), LRScheduler)
assert_type(scheduler.phase, Phase)
assert_type(scheduler.switch, Switch | None)
assert_type(scheduler.events, list[Event])
assert_type(scheduler.last_epoch, int)
assert_type(scheduler.should_stop, bool)
assert_type(values(scheduler), dict[str, float])
assert_type(scheduler.config, Config)
assert_type(scheduler.lr_at(50), float)
assert_type(optimizer.layer_stats(), list[LayerStats])
assert_type(lr_range(optimizer), tuple[float, float])
assert_type(LR_RANGES["sgd"], tuple[float, float])
assert_type(sqrt_scaled_lr(0.1, batch_size=512), float)
version: str = __version__
state = scheduler.state_dict()
AutoWU(optimizer, total_steps=100, model=model).load_state_dict(state)
figures = (scheduler.plot(), draw_state(state))
first, *last = model.parameters()
pair = [Muon([first], lr=1e-2), torch.optim.AdamW(last, lr=1e-3)]
AutoWU(pair, 25, 4, model=model)
AutoWU(MultiOptimizer(pair), total_steps=100)
loader = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(8)]
found = find_lr(model, torch.optim.SGD(last, lr=0.1), torch.nn.functional.mse_loss, loader, steps=40)
assert_type(found, FoundLR)
assert_type(found.lr, float)
engine: type[GPyTorchGP] = GPyTorchGP
print(scheduler.phase)
