"""Was the optimizer called since the last step? Whole runs are in test_step_accounting.py."""

import copy

import torch
from torch import nn

from autowu.events import EventLog
from autowu.optimizer_calls import OptimizerCalls
from autowu.ranks import Ranks


def parts():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    log = EventLog(Ranks())
    calls = OptimizerCalls(optimizer, log)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # torch's own wraps optimizer.step
    return parameter, optimizer, calls, log


def trained():
    parameter, optimizer, calls, log = parts()
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert calls.took_step(optimizer, 1)
    return parameter, optimizer, calls, log


def test_before_anything_was_trained_every_call_counts():
    _, optimizer, calls, _ = parts()
    assert [calls.took_step(optimizer, step) for step in (1, 2)] == [True, True]


def test_steps_that_are_skipped_are_counted_until_the_optimizer_is_called_again():
    _, optimizer, calls, _ = trained()
    seen = []
    for called in (False, False, True, False):
        if called:
            optimizer.step()
        seen.append((calls.took_step(optimizer, 2), calls.skipped))
    assert seen == [(False, 1), (False, 2), (True, 0), (False, 1)]


def test_before_it_is_seen_gradients_tell_what_a_scaler_skips():
    parameter, optimizer, calls, _ = parts()
    parameter.grad = torch.tensor([1.0, float("inf")])
    assert not calls.took_step(optimizer, 1)
    parameter.grad = torch.ones(2)
    assert calls.took_step(optimizer, 1)


def test_a_method_that_was_held_from_before_is_seen_by_the_hook():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    held = optimizer.step
    calls = OptimizerCalls(optimizer, EventLog(Ranks()))
    parameter.grad = torch.ones(2)
    held()
    assert calls.took_step(optimizer, 1)
    assert not calls.took_step(optimizer, 2)


def test_a_step_that_was_replaced_is_told_once_and_every_call_counts():
    _, optimizer, calls, log = trained()
    optimizer.step = lambda: None
    assert [calls.took_step(optimizer, step) for step in (2, 3)] == [True, True]
    assert [(event.kind, event.step) for event in log.events] == [("optimizer", 2)]


def test_a_copy_sees_the_calls_of_its_own_optimizer():
    _, optimizer, calls, _ = trained()
    other_optimizer, other = copy.deepcopy((optimizer, calls))
    optimizer.step()
    assert (calls.took_step(optimizer, 2), other.took_step(other_optimizer, 2)) == (True, False)
    other_optimizer.step()
    assert (calls.took_step(optimizer, 3), other.took_step(other_optimizer, 2)) == (False, True)


def test_what_is_saved_is_how_many_were_skipped():
    _, optimizer, calls, _ = trained()
    calls.took_step(optimizer, 2)
    other = parts()[2]
    other.load_state_dict(calls.state_dict())
    assert other.skipped == 1
