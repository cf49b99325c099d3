"""The LRs of parameter groups: their ratios, groups that join late, tensor LRs."""

import copy
import math

import pytest
import torch
from torch import nn

from autowu import AutoWU
from autowu.group_lrs import GroupLRs, GroupLRsOfSeveral


def groups(*options, lr=0.1):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], **own} for own in options], lr=lr)


def test_ratios_are_to_the_largest_lr_with_the_scale_that_timm_sets():
    lrs = GroupLRs(groups({"lr": 0.02}, {"lr": 0.1}, {"lr": 0.1, "lr_scale": 0.5}))
    assert lrs.of(1.0) == pytest.approx([0.2, 1.0, 0.5])
    assert lrs.largest == 0.1


def test_what_a_scheduler_before_has_left_counts_by_the_initial_lr():
    assert GroupLRs(groups({"lr": 1e-9, "initial_lr": 0.4}, {"lr": 1e-9, "initial_lr": 0.1})).of(1.0) == [1.0, 0.25]


def test_groups_that_all_begin_at_nothing_get_all_of_the_lr():
    assert GroupLRs(groups({"lr": 0.0}, {"lr": 0.0})).of(0.3) == [0.3, 0.3]


def test_writing_fills_tensors_in_place_and_hands_out_copies():
    optimizer = groups({"lr": torch.tensor(0.1)}, {"lr": 0.05})
    live = optimizer.param_groups[0]["lr"]
    lrs = GroupLRs(optimizer)
    written = lrs.write(optimizer, 2.0)
    assert optimizer.param_groups[0]["lr"] is live
    assert [float(lr) for lr in written] == pytest.approx([2.0, 1.0])
    written[0].fill_(7.0)
    assert float(live) == 2.0


def test_renewing_is_writing_where_nothing_was_touched_and_else_sets_nothing():
    options = {"lr": 0.1}, {"lr": 0.07}, {"lr": 0.02}
    (one, renewed), (other, written) = ((optimizer, GroupLRs(optimizer)) for optimizer in (groups(*options), groups(*options)))
    assert renewed.renew(one, 0.5) is None  # nothing was set yet
    for lrs, optimizer in ((renewed, one), (written, other)):
        lrs.write(optimizer, 0.3)
    assert renewed.renew(one, 0.5) == written.write(other, 0.5) == [group["lr"] for group in one.param_groups]
    for touched in (0.001, torch.tensor(0.35)):
        one.param_groups[1]["lr"] = touched
        before = [group["lr"] for group in one.param_groups]
        assert renewed.renew(one, 0.4) is None
        assert all(group["lr"] is lr for group, lr in zip(one.param_groups, before, strict=True))
    one.param_groups[1]["lr"] = 0.001
    assert "group 1 was set from outside" in renewed.adopt(one)
    one.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert renewed.renew(one, 0.4) is None


def test_a_tensor_lr_that_groups_share_is_parted():
    optimizer = groups({}, {}, lr=torch.tensor(0.1))
    optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"]
    GroupLRs(optimizer)
    assert optimizer.param_groups[1]["lr"] is not optimizer.param_groups[0]["lr"]


def test_a_late_group_joins_once_in_the_ratio_of_its_lr_to_the_first_groups_now():
    optimizer = groups({"lr": 0.1}, {"lr": 0.2})
    lrs = GroupLRs(optimizer)
    lrs.write(optimizer, 0.01)  # the first is now at 0.005
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.001})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})  # at the optimizer's own LR: as the first
    base_lrs = [0.1, 0.2]
    lrs.join(optimizer, base_lrs)
    lrs.join(optimizer, base_lrs)
    assert base_lrs == [0.1, 0.2, 0.001, 0.1]
    assert lrs.of(1.0) == pytest.approx([0.5, 1.0, 0.1, 0.5])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.001, "lr_scale": 0.5})
    lrs.join(optimizer, [])
    assert lrs.of(1.0)[-1] == pytest.approx(0.05)


def test_a_late_group_beside_a_first_one_at_nothing_is_as_that():
    optimizer = groups({"lr": 0.0})
    lrs = GroupLRs(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    lrs.join(optimizer, [])
    assert lrs.of(1.0) == [1.0, 1.0]


def test_a_state_of_fewer_groups_keeps_the_ratio_of_the_others_to_the_first():
    saved = GroupLRs(groups({"lr": 0.1}, {"lr": 0.2})).state_dict()
    lrs = GroupLRs(groups({"lr": 0.4}, {"lr": 0.1}, {"lr": 0.2}))
    lrs.load_state_dict(saved)
    assert lrs.of(1.0) == pytest.approx([0.5, 1.0, 0.25])
    assert lrs.largest == 0.2


# ---------------------------------------------------------------- LRs that are edited


def written(*options, lr=1.0):
    optimizer = groups(*options)
    lrs = GroupLRs(optimizer)
    assert lrs.adopt(optimizer) is None  # nothing was set yet
    lrs.write(optimizer, lr)
    return optimizer, lrs


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("now", [0.0, 1e-3, 0.25, 0.75])
def test_a_group_that_is_edited_keeps_its_new_share_of_the_schedules_lr(now, tensor):
    optimizer, lrs = written({"lr": torch.tensor(0.1) if tensor else 0.1}, {"lr": 0.05})
    if tensor:
        optimizer.param_groups[0]["lr"].fill_(now)
    else:
        optimizer.param_groups[0]["lr"] = now
    assert "parameter group 0 was set from outside; it is kept" in lrs.adopt(optimizer)
    lrs.write(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5 * now, 0.25])
    assert lrs.adopt(optimizer) is None


def test_a_group_that_begins_at_nothing_rests_until_it_is_set():
    optimizer, lrs = written({"lr": 0.1}, {"lr": 0.0}, lr=0.4)
    assert lrs.resting == [1]
    assert optimizer.param_groups[1]["lr"] == 0.0
    optimizer.param_groups[1]["lr"] = 0.1
    assert "kept" in lrs.adopt(optimizer)
    assert lrs.of(1.0) == pytest.approx([1.0, 0.25])
    assert lrs.resting == []


def test_a_frozen_group_can_be_thawed_up_to_the_schedules_lr():
    optimizer, lrs = written({"lr": 0.1}, {"lr": 0.01})
    for now, ratio in ((0.0, 0.0), (1.0, 1.0)):
        optimizer.param_groups[0]["lr"] = now
        lrs.adopt(optimizer)
        assert lrs.of(1.0) == pytest.approx([ratio, 0.1])


def test_groups_that_are_all_edited_are_set_apart_anew_below_the_schedules_lr():
    optimizer, lrs = written({"lr": 0.1}, {"lr": 0.01})
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02, 0.01
    assert "kept" in lrs.adopt(optimizer)
    assert lrs.of(1.0) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("options", "edit"),
    [
        ([{"lr": 0.1}], [0.5]),  # the schedule's own
        ([{"lr": 0.1}], [0.0]),
        ([{"lr": 0.1}, {"lr": 0.01}], [0.5, 0.05]),  # both by half
        ([{"lr": 0.1}, {"lr": 0.01}], [0.0, 0.0]),
        ([{"lr": 0.1}, {"lr": 0.01}], [1.0, 7.0]),  # above the schedule's
        ([{"lr": 0.1}, {"lr": 0.01}], [1.0, -1.0]),
        ([{"lr": 0.1}, {"lr": 0.01}], [float("nan"), 0.1]),
    ],
)
def test_what_is_not_clear_is_said_and_not_kept(options, edit):
    optimizer, lrs = written(*options)
    before = lrs.of(1.0)
    for group, now in zip(optimizer.param_groups, edit, strict=True):
        group["lr"] = now
    assert "which is not kept: the LR is the schedule's" in lrs.adopt(optimizer)
    assert lrs.of(1.0) == before


def test_tensor_lrs_that_torch_sets_or_that_are_set_to_what_they_are_are_no_edits():
    optimizer, lrs = written({"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.05)}, lr=0.3)
    optimizer.load_state_dict(optimizer.state_dict())  # other tensors of the same value
    assert lrs.adopt(optimizer) is None
    for group, lr in zip(optimizer.param_groups, lrs.of(0.7), strict=True):
        group["lr"].fill_(lr)
    assert lrs.adopt(optimizer) is None


class OnADevice(torch.Tensor):
    """Stands for a tensor on a device: to read it fails."""

    is_cpu = False

    def __float__(self):
        raise AssertionError("read")


def test_a_tensor_lr_on_a_device_is_not_read():
    optimizer, lrs = written({"lr": 0.1}, {"lr": 0.1})
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(OnADevice)
    lrs.write(optimizer, 0.5)
    assert lrs.adopt(optimizer) is None
    optimizer.param_groups[0]["lr"].fill_(0.01)
    assert "a tensor on a device is not read" in lrs.adopt(optimizer)


def test_after_a_load_the_optimizers_own_state_may_follow():
    optimizer, lrs = written({"lr": 0.1}, {"lr": 0.01})
    lrs.load_state_dict(lrs.state_dict())
    lrs.write(optimizer, 0.5)
    optimizer.param_groups[0]["lr"] = 0.2
    assert lrs.adopt(optimizer) is None
    lrs.write(optimizer, 0.4)
    optimizer.param_groups[0]["lr"] = 0.2
    assert "kept" in lrs.adopt(optimizer)


def go_on(scheduler, steps):
    """The LRs of the groups after each step."""
    lrs = []
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step(1 / (1 + scheduler.last_epoch))
        lrs.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
    return lrs


@pytest.mark.parametrize("tensor", [False, True])
def test_an_edit_just_before_a_save_outlives_the_resume(tensor):
    def made():
        return groups(*({"lr": torch.tensor(0.1) if tensor else 0.1} for _ in range(2)))

    whole = AutoWU(made(), total_steps=100)
    go_on(whole, 20)
    whole.optimizer.param_groups[1]["lr"] = torch.tensor(0.0) if tensor else 0.0
    optimizer_state, own = copy.deepcopy((whole.optimizer.state_dict(), whole.state_dict()))
    expected = go_on(whole, 20)
    assert all(lrs[1] == 0 < lrs[0] for lrs in expected)
    for first in (0, 1):
        again = AutoWU(made(), total_steps=100)
        parts = [(again, own), (again.optimizer, optimizer_state)]
        for part, of_part in (parts[first], parts[1 - first]):
            part.load_state_dict(copy.deepcopy(of_part))
        assert go_on(again, 20) == expected


@pytest.mark.parametrize("first", [0, 1])
def test_a_longer_run_takes_no_lr_of_the_shorter_ones_plan_for_an_edit(first):
    short = AutoWU(groups({"lr": 0.1}, {"lr": 0.0}), total_steps=100)
    go_on(short, 90)
    states = copy.deepcopy([short.state_dict(), short.optimizer.state_dict()])
    longer = AutoWU(groups({"lr": 0.1}, {"lr": 0.0}), total_steps=200)
    parts = [longer, longer.optimizer]
    for index in (first, 1 - first):
        parts[index].load_state_dict(states[index])
    assert go_on(longer, 3)[-1] == [pytest.approx(longer.lr_at(93)), 0.0]
    assert longer.lr_at(93) > 4 * short.lr_at(93)
    assert "lr" not in [event.kind for event in longer.events]


def test_saving_takes_no_edit_over():
    optimizer, lrs = written({"lr": 0.1}, {"lr": 0.1})
    optimizer.param_groups[1]["lr"] = 0.5
    assert lrs.as_edited(optimizer)["ratios"] == [1.0, 0.5]
    assert lrs.state_dict()["ratios"] == [1.0, 1.0]
    assert "kept as a share" in lrs.adopt(optimizer)


def test_a_tensor_lr_that_an_optimizers_state_brings_for_all_groups_is_parted():
    optimizer = groups({"lr_scale": 0.1}, {"lr_scale": 1.0}, lr=torch.tensor(0.1))
    scheduler = AutoWU(optimizer, total_steps=100)
    expected, given = [float(lr) for lr in scheduler.get_last_lr()], scheduler.state_dict()["groups"]
    assert expected[0] == pytest.approx(expected[1] / 10)
    shared = torch.tensor(0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = shared
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(scheduler.state_dict() | {"groups": given})
    assert [float(group["lr"]) for group in optimizer.param_groups] == expected


def test_a_run_takes_an_edit_over_says_so_once_and_saves_it(caplog):
    optimizer = groups({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.0})
    scheduler = AutoWU(optimizer, total_steps=100)
    assert "parameter groups [2] have an LR of 0" in caplog.text

    def go_on(steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step(1 / (1 + scheduler.last_epoch))

    optimizer.param_groups[1]["lr"] *= 0.5  # before the first step
    go_on(5)
    optimizer.param_groups[2]["lr"] = 0.25 * optimizer.param_groups[0]["lr"]
    go_on(5)
    first, second, third = (group["lr"] for group in optimizer.param_groups)
    assert (second, third) == pytest.approx((first / 2, first / 4))
    assert [event.kind for event in scheduler.events] == ["frozen", "lr"]
    again = AutoWU(groups({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1}), total_steps=100)
    again.load_state_dict(scheduler.state_dict())
    assert again.get_last_lr() == [first, second, third]


def test_an_lr_set_at_every_step_is_said_once(caplog):
    optimizer = groups({"lr": 0.1})
    scheduler = AutoWU(optimizer, total_steps=100)
    for _ in range(10):
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        scheduler.step(1 / (1 + scheduler.last_epoch))
    assert [event.kind for event in scheduler.events] == ["lr"]
    assert caplog.text.count("was set from outside") == 1


@pytest.mark.parametrize("lr", [None, "fast", math.nan, math.inf, -1.0])
def test_a_group_that_joins_with_no_lr_that_can_be_set_trains_at_that_of_the_first(lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = AutoWU(optimizer, total_steps=100)
    for k in range(5):
        optimizer.step()
        scheduler.step(3.0 - k / 10)
    optimizer.param_groups.append(optimizer.param_groups[0] | {"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr})
    optimizer.step()
    scheduler.step(2.0)
    first, late = scheduler.get_last_lr()
    assert late == first


# ---------------------------------------------------------------- several optimizers


def test_of_several_optimizers_each_has_its_lr_and_ratios_and_groups_that_join_stay_with_their_optimizer():
    first, second = groups({"lr": 0.1}, {"lr": 0.2}), groups({"lr": 0.01}, {"lr": 0.0})
    lrs = GroupLRsOfSeveral([first, second])
    assert (lrs.largest, lrs.resting) == ((0.2, 0.01), [3])
    assert lrs.write(None, (1.0, 0.5)) == [0.5, 1.0, 0.5, 0.0]
    first.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.25})
    assert lrs.renew(None, (2.0, 1.0)) is None
    base_lrs = [0.1, 0.2, 0.01, 0.0]
    lrs.join(None, base_lrs)
    assert base_lrs == [0.1, 0.2, 0.25, 0.01, 0.0]
    written = lrs.write(None, (2.0, 1.0))
    assert written == [group["lr"] for one in (first, second) for group in one.param_groups]
    assert lrs.renew(None, (2.0, 1.0)) == written
    second.param_groups[0]["lr"] = 0.5
    assert lrs.adopt(None).startswith("optimizer 1: the LR of parameter group 0 was set from outside; it is kept")


def test_a_state_of_several_optimizers_with_fewer_groups_leaves_each_its_own_later_ones():
    def fresh(*late):
        return GroupLRsOfSeveral([groups({"lr": 0.1}, *({"lr": lr} for lr in late)), groups({"lr": 0.01}, {"lr": 0.02})])

    lrs = fresh(0.4)
    lrs.load_state_dict(fresh().state_dict())
    assert lrs.base_lrs(["a", "c", "d"], ["A", "B", "C", "D"]) == ["a", "B", "c", "d"]
    assert lrs.of((1.0, 1.0)) == pytest.approx([1.0, 4.0, 0.5, 1.0])


def test_a_tensor_lr_that_optimizers_share_is_parted():
    lr = torch.tensor(0.1)
    first, second = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr) for _ in range(2))
    lrs = GroupLRsOfSeveral([first, second])
    lrs.write(None, (1.0, 0.5))
    assert [float(one.param_groups[0]["lr"]) for one in (first, second)] == [1.0, 0.5]


def test_a_list_of_the_last_lrs_that_a_user_changes_changes_no_lr(caplog):
    def run(spoil):
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.05)])
        scheduler = AutoWU(optimizer, total_steps=100)
        lrs = []
        for step in range(40):
            optimizer.step()
            scheduler.step(2 - 0.01 * step)
            lrs.append([group["lr"] for group in optimizer.param_groups])
            spoil(scheduler.get_last_lr())
        return lrs

    untouched = run(len)
    for spoil in (list.clear, list.reverse, list.pop, lambda lrs: lrs.append(1.0)):
        assert run(spoil) == untouched
    assert "set from outside" not in caplog.text
