"""Runs whose LR falls with the root of the steps between the switch and the cooldown: whole, cut, branched, extended."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from test_open_ended import WARMUP, assert_decays, loss_of, resumed, scheduler_of, train

from autowu import AutoWU
from autowu.config import OPEN_WARMUP
from autowu.report import Report

pytestmark = pytest.mark.usefixtures("no_ramps")

TAU = WARMUP / 0.32


def falling_run(**arguments):
    return scheduler_of(stable_type="inverse_sqrt", **arguments)


def fallen(scheduler, step):
    """The LR of a step of the stable phase by the plain formula."""
    config = scheduler.config
    return scheduler.switch.lr * min(1.0, math.sqrt(config.warmup_steps / 0.32 / (step - config.warmup_origin)))


def assert_falls(scheduler, first, lrs):
    """These LRs, from step `first` on, are those of the formula."""
    assert lrs == pytest.approx([fallen(scheduler, first + k) for k in range(len(lrs))], rel=1e-12)
    assert all(a > b for a, b in pairwise(lrs[max(0, math.ceil(TAU + scheduler.config.warmup_origin - first)) :]))


def test_an_open_run_falls_with_the_root_of_its_steps_until_it_is_asked_and_decays_from_there():
    scheduler, held = falling_run(), scheduler_of()
    lrs = train(scheduler, 600)
    assert lrs[: int(TAU) + 1] == train(held, 600)[: int(TAU) + 1]
    assert scheduler.switch == held.switch
    assert_falls(scheduler, scheduler.switch.step, lrs[scheduler.switch.step :])
    assert lrs[-1] < 0.8 * scheduler.switch.lr
    assert scheduler.lr_at(10**6) == pytest.approx(fallen(scheduler, 10**6))
    scheduler.start_cooldown(40)
    lrs += train(scheduler, 641)
    assert scheduler.phase == "done"
    assert_decays(lrs[601:], fallen(scheduler, 601))
    assert train(scheduler, 650) == [lrs[-1]] * 9
    assert [scheduler.lr_at(step) for step in range(641)] == lrs
    report = Report.of(scheduler.state_dict())
    assert [report.lr(step) for step in range(641)] == lrs
    planned = falling_run(total_steps=641, cooldown_fraction=40 / 641)
    assert train(planned, 641) == lrs


def test_a_cooldown_that_is_cut_short_goes_on_from_where_it_was():
    scheduler = falling_run()
    train(scheduler, 600)
    scheduler.start_cooldown(100)
    train(scheduler, 641)
    scheduler.start_cooldown(10)
    lrs = train(scheduler, 652)
    assert scheduler.phase == "done"
    assert lrs[1:] == pytest.approx([fallen(scheduler, 601) * 0.59 * (1 - k / 10) for k in range(10)])


@pytest.mark.parametrize("cut", [0, 23, 90, 374, 375, 376, 480, 500, 530, 551])
def test_a_cut_run_goes_on_to_the_bit(cut):
    def go(scheduler, until):
        lrs = train(scheduler, min(until, 500))
        if scheduler.last_epoch == 500:
            scheduler.start_cooldown(50)
        return lrs + train(scheduler, until)

    expected = go(falling_run(), 560)
    first = falling_run()
    lrs = go(first, cut)
    again = resumed(first, stable_type="constant")
    assert again.config.stable_type == "inverse_sqrt"
    lrs += go(again, 560) if cut < 500 else train(again, 560)
    assert lrs == expected


def test_a_state_that_knows_nothing_of_it_goes_on_at_a_constant_lr():
    scheduler = scheduler_of()
    train(scheduler, 500)
    state = scheduler.state_dict()
    del state["config"]["stable_type"]
    again = falling_run()
    again.load_state_dict(state)
    assert again.config == scheduler.config
    assert train(again, 520) == train(scheduler, 520) == [scheduler.switch.lr] * 20


def test_a_state_in_which_it_has_no_constant_phase_to_act_on_is_refused():
    scheduler = scheduler_of(total_steps=400, immediate_cooldown=True)
    state = scheduler.state_dict()
    state["config"]["stable_type"] = "inverse_sqrt"
    with pytest.raises(ValueError, match=r"stable_type='inverse_sqrt': acts on the constant phase"):
        scheduler.load_state_dict(state)


def test_branches_cool_down_from_the_lr_of_the_trunk_while_it_falls_on():
    trunk = falling_run()
    lrs = train(trunk, 600)
    branch = scheduler_of(None, total_steps=5000)
    branch.load_state_dict(trunk.fork_cooldown(steps=40))
    assert_decays(train(branch, 640), fallen(trunk, 600))
    assert branch.should_stop
    assert_falls(trunk, 600, train(trunk, 700))
    known, other = (falling_run(total_steps=1000, cooldown_fraction=part) for part in (0.1, 0.4))
    assert train(known, 600) == lrs
    forked = scheduler_of()
    forked.load_state_dict(known.fork_cooldown(0.4))
    assert lrs + train(forked, 1000) == train(other, 1000)


def test_a_longer_run_goes_up_to_where_the_lr_has_fallen_by_then():
    scheduler = falling_run(total_steps=600, cooldown_fraction=0.2)
    lrs = train(scheduler, 550)
    assert lrs[480:] == pytest.approx([fallen(scheduler, 480) * (1 - k / 120) for k in range(70)])
    loaded = scheduler_of(total_steps=1000)
    loaded.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    scheduler.extend(total_steps=1000)
    later = train(scheduler, 1000)
    assert later == train(loaded, 1000)
    assert_falls(scheduler, 550, later[:250])
    assert_decays(later[250:], fallen(scheduler, 800))
    report = Report.of(scheduler.state_dict())
    assert [report.lr(step) for step in range(1000)] == lrs + later
    scheduler.extend()
    assert_falls(scheduler, 1000, train(scheduler, 1100))


def test_a_warmup_that_is_begun_anew_begins_the_count_anew():
    scheduler = falling_run()
    train(scheduler, 1000)
    before = scheduler.optimizer.param_groups[0]["lr"]
    assert before == pytest.approx(fallen(scheduler, 1000))
    scheduler.rewarm()
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(before / 10)
    lrs = train(scheduler, 2200)
    config, switch = scheduler.config, scheduler.switch
    assert (config.warmup_origin, scheduler.phase) == (1000, "stable")
    begun = 1000 + math.floor(config.warmup_steps / 0.32)
    assert set(lrs[switch.step - 1000 : begun + 1 - 1000]) == {switch.lr}
    assert_falls(scheduler, switch.step, lrs[switch.step - 1000 :])
    assert lrs[-1] < 0.8 * switch.lr


def test_setbacks_and_batches_that_grow_scale_the_lr_that_has_fallen():
    scheduler = falling_run()
    scheduler.batch_size(32)
    train(scheduler, 600)
    scheduler.batch_size(128)
    assert scheduler.lr_at(600) == pytest.approx(2 * fallen(scheduler, 600))
    while scheduler._state.setbacks == 0:
        scheduler.optimizer.step()
        scheduler.step(1e4)
    train(scheduler, 630)
    assert scheduler._state.setbacks == 1
    assert scheduler.lr_at(700) == pytest.approx(fallen(scheduler, 700))
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(fallen(scheduler, 630))


def test_of_several_optimizers_all_fall_alike():
    optimizers = [kind([torch.nn.Parameter(torch.ones(2))], lr=0.1) for kind in (torch.optim.SGD, torch.optim.Adam)]
    scheduler = AutoWU(optimizers, max_warmup_steps=WARMUP, stable_type="inverse_sqrt")
    shares = []
    while scheduler.last_epoch < 600:
        if scheduler.switch is not None:
            lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
            shares.append([lr / peak for lr, peak in zip(lrs, scheduler.switch.lrs, strict=True)])
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step(loss_of(scheduler))
    first, second = zip(*shares, strict=True)
    assert second == pytest.approx(first)
    assert_falls(scheduler, scheduler.switch.step, [share * scheduler.switch.lr for share in first])
    assert len(set(scheduler.switch.lrs)) == 2


def test_a_loss_that_rests_begins_the_cooldown_at_the_lr_that_has_fallen():
    scheduler = falling_run(cooldown="auto", cooldown_fraction=0.25)
    lrs = train(scheduler, 3000)
    held = scheduler_of(cooldown="auto", cooldown_fraction=0.25)
    train(held, 3000)
    start = scheduler.config.cooldown_start
    assert start == held.config.cooldown_start  # the losses are the same, and the peak is
    assert_decays(lrs[start : scheduler.config.total_steps], fallen(scheduler, start))


@pytest.mark.parametrize("budget", ["samples", "tokens"])
def test_with_a_budget_the_warmup_that_its_first_steps_let_expect_tells_when_the_lr_falls(budget):
    arguments = {f"total_{budget}": 29_000, "cooldown_fraction": 0.1, "max_warmup_steps": None}
    scheduler, lrs = falling_run(**arguments), []
    while scheduler.progress < 0.9:
        lrs += train(scheduler, scheduler.last_epoch + 1, **{budget: 10})
    assert 0 < scheduler.config.warmup_origin < 20
    assert 400 < scheduler.config.warmup_steps < 600
    assert lrs[scheduler.switch.step :] == pytest.approx([fallen(scheduler, k) for k in range(scheduler.switch.step, len(lrs))])
    assert lrs[-1] < 0.8 * scheduler.switch.lr


def test_a_loss_that_ends_the_warmup_before_its_length_is_known_lets_the_lr_fall_from_there():
    scheduler = falling_run(max_warmup_steps=None, total_samples=10**7)
    for step in range(5):
        scheduler.optimizer.step()
        scheduler.step(math.nan if step > 1 else 1.0, samples=10)
    switch, tau = scheduler.switch, OPEN_WARMUP / 0.32
    assert switch.step == 5
    for step in (switch.step, switch.step + int(tau)):
        assert scheduler.lr_at(step) == switch.lr
    assert scheduler.lr_at(switch.step + int(4 * tau)) == pytest.approx(switch.lr / 2)
