"""Batch sizes that change: the LR follows, in all groups alike and on a cut run as on a whole one."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from test_open_ended import assert_decays, resumed, scheduler_of, train

from autowu import AutoWU
from autowu.optim import LAMB, LARS, Muon
from autowu.report import Report

pytestmark = pytest.mark.usefixtures("no_ramps")


def lr_of(scheduler):
    return scheduler.optimizer.param_groups[0]["lr"]


def told(scheduler, until, sizes, rule="sqrt"):
    """Train until step `until`, telling at each step the size that `sizes` gives; the LR of every step."""
    lrs = []
    while scheduler.last_epoch < until and not scheduler.should_stop:
        scheduler.batch_size(sizes(scheduler.last_epoch), rule)
        lrs += train(scheduler, scheduler.last_epoch + 1)
    return lrs


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
@pytest.mark.parametrize("arguments", [{}, {"total_steps": 400}], ids=["open", "length"])
def test_the_lr_follows_from_the_first_call_on_and_decays_from_where_it_is(rule, factor, arguments):
    scheduler = scheduler_of(**arguments)
    scheduler.batch_size(32)
    train(scheduler, 140)
    peak = lr_of(scheduler)
    assert peak == scheduler.switch.lr
    scheduler.batch_size(128, rule=rule)
    assert lr_of(scheduler) == scheduler.get_last_lr()[0] == pytest.approx(factor * peak)
    train(scheduler, 160)
    assert lr_of(scheduler) == pytest.approx(factor * peak)
    if arguments:
        scheduler.batch_size(32, rule=rule)
        assert lr_of(scheduler) == pytest.approx(peak)
        scheduler.batch_size(128, rule=rule)
        assert_decays(train(scheduler, 400), factor * peak)
    else:
        scheduler.start_cooldown(40)
        assert_decays(train(scheduler, 201)[1:], factor * peak)


def test_in_the_cooldown_it_follows_too_and_the_last_lr_stays_the_smallest():
    scheduler = scheduler_of(total_steps=300)
    scheduler.batch_size(10)
    train(scheduler, 200)
    before = lr_of(scheduler)
    scheduler.batch_size(40)
    assert lr_of(scheduler) == pytest.approx(2 * before)
    lrs = train(scheduler, 300)
    assert all(a > b > 0 for a, b in pairwise(lrs))


def test_a_warmup_searches_the_lr_at_whatever_size():
    plain, grown = scheduler_of(), scheduler_of()
    assert told(grown, 40, lambda step: 8 + step) == train(plain, 40)
    assert (grown._state.batch, grown._state.batch_factor) == (47, 1.0)


def test_a_ramp_ends_where_a_jump_does():
    ramp, jump = scheduler_of(), scheduler_of()
    told(ramp, 240, lambda step: min(128, 32 + max(0, step - 130)), "linear")
    told(jump, 240, lambda step: 32 if step < 200 else 128, "linear")
    assert lr_of(ramp) == pytest.approx(lr_of(jump), rel=1e-12) == pytest.approx(4 * jump.switch.lr)


@pytest.mark.parametrize("cut", [20, 120, 150, 230])
def test_a_cut_run_goes_on_to_the_bit(cut):
    def sizes(step):
        return 32 + max(0, step - 110) // 7

    whole, first = scheduler_of(total_steps=300), scheduler_of(total_steps=300)
    expected = told(whole, 300, sizes)
    lrs = told(first, cut, sizes)
    again = resumed(first)
    assert lr_of(again) == lr_of(first)
    assert lrs + told(again, 300, sizes) == expected


def test_a_branch_and_an_extension_keep_it_and_a_new_search_begins_at_the_size_that_is():
    scheduler = scheduler_of()
    scheduler.batch_size(16)
    train(scheduler, 140)
    scheduler.batch_size(64)
    peak = 2 * scheduler.switch.lr
    branch = scheduler_of()
    branch.load_state_dict(scheduler.fork_cooldown(steps=20))
    assert_decays(train(branch, 160), peak)
    scheduler.extend(total_steps=1000)
    assert lr_of(scheduler) == pytest.approx(peak)
    scheduler.rewarm()
    assert lr_of(scheduler) == pytest.approx(peak / 10)
    scheduler.batch_size(128)
    train(scheduler, 300)
    assert lr_of(scheduler) == scheduler.switch.lr
    scheduler.batch_size(256)
    assert lr_of(scheduler) == pytest.approx(math.sqrt(2) * scheduler.switch.lr)


@pytest.mark.parametrize("make", [torch.optim.AdamW, Muon, LAMB, lambda groups: LARS(torch.optim.SGD(groups, momentum=0.9))])
def test_the_ratios_of_the_groups_are_kept(make):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    groups = [{"params": first.parameters(), "lr": 0.2}, {"params": second.parameters(), "lr": 0.05}]
    optimizer = make(groups)
    scheduler = AutoWU(optimizer, max_warmup_steps=20, watch=False)
    scheduler.batch_size(4)
    for _ in range(25):
        second(first(torch.randn(4, 3))).square().mean().backward()
        optimizer.step()
        scheduler.step(1.0)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler.batch_size(36)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3 * lr for lr in before])
    assert max(before) == pytest.approx(4 * min(before))


def test_the_figure_shows_the_lrs_that_were():
    scheduler = scheduler_of(total_steps=300)
    lrs = told(scheduler, 300, lambda step: 32 if step < 140 else 64 if step < 250 else 48)
    report = Report.of(copy.deepcopy(scheduler.state_dict()))
    assert [report.lr(step) for step in range(300)] == pytest.approx(lrs)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((0,), ValueError, "size=0: must be at least 1"),
        ((-4,), ValueError, "size=-4: must be at least 1"),
        ((2.5,), TypeError, "size=2.5: must be an integer"),
        ((True,), TypeError, "size=True: must be an integer"),
        ((None,), TypeError, "size=None: must be an integer"),
        ((32, "cubic"), ValueError, "rule='cubic': must be one of"),
        ((32, None), ValueError, "rule=None: must be one of"),
    ],
)
def test_what_is_no_size_or_rule_is_refused_and_changes_nothing(arguments, error, said):
    scheduler = scheduler_of()
    train(scheduler, 140)
    before = scheduler._state
    with pytest.raises(error, match=said):
        scheduler.batch_size(*arguments)
    assert scheduler._state is before
