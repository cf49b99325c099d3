"""Whole runs of a real model whose end moves, by several optimizers: cut anywhere, they go on to the bit."""

import copy

import pytest
import torch
from torch import nn

from autowu import AutoWU
from autowu.optim import LARS, Muon

MAKE = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "Muon": lambda parameters: Muon(parameters, lr=1e-2),
    "LARS": lambda parameters: LARS(torch.optim.SGD(parameters, lr=1.0, momentum=0.9)),
}
LENGTHS = {
    "open": {"cooldown": "auto", "max_warmup_steps": 60},
    "tokens": {"total_tokens": 16 * 600, "max_warmup_steps": 60},
    "steps": {"total_steps": 500, "max_warmup_steps": 60},
}
X = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :2].prod(1, keepdim=True) + X[:, 2:3]


def built(make, arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = make(model.parameters())
    return model, optimizer, AutoWU(optimizer, model=model, **arguments)


def asked(scheduler, step):
    """What is asked of a run before this step."""
    if step in (0, 100):
        scheduler.batch_size(16 if step == 0 else 24)
    if step == 130 and scheduler.phase == "stable":
        scheduler.rewarm()
    if step == 200:
        scheduler.extend(**({"total_tokens": 16 * 900} if scheduler.config.total_tokens else {"total_steps": 700}))
    if step == 300:
        scheduler.start_cooldown(40)


def train(model, optimizer, scheduler, until):
    lrs = []
    while scheduler.last_epoch < until and not scheduler.should_stop:
        step = scheduler.last_epoch
        asked(scheduler, step)
        lrs.append(optimizer.param_groups[0]["lr"])
        batch = torch.randint(512, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(X[batch]), Y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss, tokens=16)
    return lrs


QUICK = [("Muon", "tokens")]
SLOW = [(name, length) for name in MAKE for length in LENGTHS if (name, length) not in QUICK]


@pytest.mark.parametrize(("name", "kind"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_run_that_is_asked_for_all_of_it_goes_on_from_any_step_to_the_bit(name, kind):
    make = MAKE[name]
    whole = built(make, LENGTHS[kind])
    expected, kept = [], {}
    for cut in (131, 201, 320):
        expected += train(*whole, cut)
        kept[cut] = copy.deepcopy([part.state_dict() for part in whole])
    expected += train(*whole, 400)
    assert whole[2].should_stop
    assert len(expected) == 341
    assert expected[-1] == min(expected[-40:]) > 0
    for cut, states in kept.items():
        again = built(make, {})
        for part, state in zip(again, states, strict=True):
            part.load_state_dict(state)
        assert train(*again, 400) == expected[cut:]
        assert all(torch.equal(value, again[0].state_dict()[name]) for name, value in whole[0].state_dict().items())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "LARS" else pytest.mark.slow) for name in MAKE])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind == "tokens" else pytest.mark.slow) for kind in LENGTHS])
def test_a_branch_leaves_a_trunk_of_any_kind_as_it_is(name, kind):
    make, length = MAKE[name], LENGTHS[kind]
    trunk, alone = built(make, length), built(make, length)
    train(*trunk, 125)
    train(*alone, 125)
    assert trunk[2].phase == "stable"
    state = trunk[2].fork_cooldown(steps=10)
    branch = built(make, {})
    for part, saved in zip(branch, [*(part.state_dict() for part in trunk[:2]), state], strict=True):
        part.load_state_dict(copy.deepcopy(saved))
    lrs = train(*branch, 400)
    peak = trunk[2].lr_at(125)
    assert lrs == pytest.approx([peak * (1 - k / 10) for k in range(10)])
    assert train(*trunk, 129) == train(*alone, 129)
