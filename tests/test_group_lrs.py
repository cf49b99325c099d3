"""The LRs of parameter groups: their ratios, groups that join late, tensor LRs."""

import pytest
import torch
from torch import nn

from autowu.group_lrs import GroupLRs


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
    assert lrs.join(optimizer) == [0.001, 0.1]
    assert lrs.join(optimizer) == []
    assert lrs.of(1.0) == pytest.approx([0.5, 1.0, 0.1, 0.5])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.001, "lr_scale": 0.5})
    lrs.join(optimizer)
    assert lrs.of(1.0)[-1] == pytest.approx(0.05)


def test_a_late_group_beside_a_first_one_at_nothing_is_as_that():
    optimizer = groups({"lr": 0.0})
    lrs = GroupLRs(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    lrs.join(optimizer)
    assert lrs.of(1.0) == [1.0, 1.0]


def test_a_state_of_fewer_groups_keeps_the_ratio_of_the_others_to_the_first():
    saved = GroupLRs(groups({"lr": 0.1}, {"lr": 0.2})).state_dict()
    lrs = GroupLRs(groups({"lr": 0.4}, {"lr": 0.1}, {"lr": 0.2}))
    lrs.load_state_dict(saved)
    assert lrs.of(1.0) == pytest.approx([0.5, 1.0, 0.25])
    assert lrs.largest == 0.2
