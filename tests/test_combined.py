"""Features that were made apart, together: each must know what the others may have done to a run."""

import math

import numpy as np
import pytest
import torch
from test_held_out import Overfitting
from test_open_ended import scheduler_of, train
from torch import nn

from autowu import AutoWU, MultiOptimizer, find_lr
from autowu.anytime import AnytimeAverage
from autowu.phases import peak_lrs

pytestmark = pytest.mark.usefixtures("no_ramps")

NOISE = 0.05 * np.random.default_rng(0).normal(size=5000)


def valley(step):
    """A loss with a minimum at step 60, that then rests."""
    return 1 + abs(min(step, 120) - 60) / 60 + float(NOISE[step])


def stepped(scheduler, until, before=lambda step: None):
    """Train on the valley."""
    for step in range(scheduler.last_epoch, until):
        if scheduler.should_stop:
            break
        before(step)
        scheduler.optimizer.step()
        scheduler.step(valley(step) if scheduler.switch is None else 1.0 + float(NOISE[step]))
    return scheduler


def two(model):
    first, second = model[0], model[1]
    return torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(second.parameters(), lr=0.02)


@pytest.mark.parametrize(
    ("by_itself", "as_one"),
    [
        pytest.param(by_itself, as_one, marks=[] if by_itself == as_one else [pytest.mark.slow])
        for by_itself in (False, True)
        for as_one in (False, True)
    ],
)
def test_a_range_test_of_several_optimizers_leaves_them_as_they_were(as_one, by_itself):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizers = two(model)
    batches = [(x, x.sum(1, keepdim=True) + torch.randn(16, 1)) for x in torch.randn(8, 16, 4)]

    def state():
        groups = [{k: v for k, v in group.items() if k != "params"} for each in optimizers for group in each.param_groups]
        hooks = [len(each._optimizer_step_post_hooks) for each in optimizers]
        return groups, hooks, ["step" in vars(each) for each in optimizers], [p.tolist() for p in model.parameters()]

    def step(batch):
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in optimizers:
            each.step()
        return loss.detach()

    before, given = state(), MultiOptimizer(optimizers) if as_one else list(optimizers)
    how = {"step_fn": step} if by_itself else {"loss_fn": nn.functional.mse_loss}
    found = find_lr(model, given, loader=batches, **how)
    assert found.interval[0] <= found.lr <= found.interval[1]
    assert state() == before


def test_the_curve_of_a_run_with_a_budget_is_as_smooth_as_that_of_as_many_steps():
    fixed = scheduler_of(total_steps=2000, max_warmup_steps=None)
    for total in (2000, 20_000):
        scheduler = scheduler_of(total_samples=total * 8, max_warmup_steps=None)
        train(scheduler, 40, samples=8)
        assert scheduler.config.warmup_origin > 0
        assert scheduler.gp.lengthscale == fixed.gp.lengthscale


@pytest.mark.parametrize("lengths", [{"total_steps": 600}, {"total_samples": 600}])
def test_a_wave_at_the_start_is_no_valley_however_long_the_run_is_said_to_be(lengths):
    scheduler = scheduler_of(**lengths, max_warmup_steps=None)
    for step in range(100):
        scheduler.optimizer.step()
        scheduler.step(2 + 0.3 * math.cos(step / 192 * 4 * 2 * math.pi) + 0.2 * float(NOISE[step]), samples=1)
    assert scheduler.switch is None


def test_the_peak_is_what_the_lr_is_held_at_whatever_has_lowered_it():
    run = Overfitting(cooldown_fraction=0.1).train(200)
    scheduler = run.scheduler
    assert "overfitting" in run.kinds()
    assert scheduler.phase == "stable"
    assert peak_lrs(scheduler._state) == (scheduler.lr_at(scheduler.last_epoch),)


@pytest.mark.parametrize(
    "size",
    [pytest.param(lambda step: 1000 + step % 2, marks=pytest.mark.slow), lambda step: 1000 if step // 50 % 2 else 1500],
)
def test_a_cooldown_begins_by_itself_though_batch_sizes_change(size):
    options = {"cooldown": "auto", "total_steps": 4000}
    plain = stepped(scheduler_of(**options), 4000)
    scheduler = scheduler_of(**options)
    stepped(scheduler, 4000, lambda step: scheduler.batch_size(size(step)))
    begins = [next(e.step for e in s.events if e.kind == "cooldown") for s in (plain, scheduler)]
    assert begins[0] == begins[1]


@pytest.mark.parametrize("level", [1e149, 1e200, math.inf])
def test_what_is_saved_after_huge_losses_can_be_loaded(level):
    scheduler = scheduler_of(cooldown="auto", watch=False, max_warmup_steps=30)
    for step in range(60):
        scheduler.optimizer.step()
        scheduler.step(level if step < 12 else 1.0 + float(NOISE[step]))
    scheduler_of(cooldown="auto", watch=False, max_warmup_steps=30).load_state_dict(scheduler.state_dict())


@pytest.mark.parametrize("cut", [1012, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (1006, 1022))])
def test_the_best_weights_of_a_run_that_was_cut_are_those_of_the_uncut_one(cut):
    def run(cuts):
        scheduler = scheduler_of(total_steps=3000, max_warmup_steps=120)
        for step in range(1040):
            if step in cuts:
                fresh = scheduler_of(total_steps=3000, max_warmup_steps=120)
                fresh.load_state_dict(scheduler.state_dict())
                fresh.optimizer.load_state_dict(scheduler.optimizer.state_dict())
                scheduler = fresh
            if step in (1003, 1008, 1014, 1024):
                scheduler.observe_validation(2 - step / 2000)
            scheduler.optimizer.step()
            scheduler.step(valley(step) if scheduler.switch is None else 1.0 + float(NOISE[step]))
        return scheduler.state_dict()["snapshot"]["older"]["level"]

    assert run((cut,)) == run(())


def test_an_average_begins_anew_where_the_run_has_gone_back():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler, average = AutoWU(optimizer, model=model, max_warmup_steps=60), AnytimeAverage(model)
    for step in range(400):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean() + 1
        if 360 <= step < 363:  # no ramp is under way
            assert not scheduler.in_ramp
            loss = loss * math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        average.update(model, scheduler)
    assert [event.kind for event in scheduler.events if event.kind == "divergence"]
    assert all(p.isfinite().all() for p in average.parameters())


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
def test_a_new_search_after_a_jump_of_the_batch_size_has_a_range_and_can_be_saved(rule):
    scheduler = stepped(scheduler_of(max_warmup_steps=120), 300)
    scheduler.batch_size(32)
    scheduler.batch_size(32 * 4096, rule=rule)
    lr = scheduler.get_last_lr()[0]
    scheduler.rewarm()
    config = scheduler.config
    assert config.min_lr == pytest.approx(0.1 * lr)
    assert config.max_lr > lr
    scheduler_of(max_warmup_steps=120).load_state_dict(scheduler.state_dict())


def test_an_optimizer_without_parameters_is_refused_among_several():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    first, _ = two(model)
    with pytest.raises(ValueError, match=r"optimizer\[1\]: has no parameters"):
        AutoWU([first, torch.optim.AdamW([{"params": []}])], total_steps=100)
