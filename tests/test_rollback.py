"""The copies that a run can go back to: which is kept, which is put back, and what happens where copying fails."""

import copy
import threading

import pytest
import torch
from torch import nn

from autowu.events import EventLog
from autowu.ranks import Ranks
from autowu.rollback import NoRollback, Restored, Rollback


class Run:
    """A model whose weights say at which step they were set."""

    def __init__(self):
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.log = EventLog(Ranks())
        self.rollback = Rollback(self.model, self.optimizer, None, Ranks(), self.log)

    def at(self, step):
        with torch.no_grad():
            self.model.weight.fill_(step)
        return self

    @property
    def weight(self):
        return self.model.weight[0, 0].item()

    def take(self, step, lr, share=0.5):
        self.at(step).rollback.take(step, lr, level=step / 10, share=share)
        return self


def test_a_copy_is_taken_when_a_share_of_the_lr_has_come_up_to_that_of_the_last():
    run = Run()
    assert run.rollback.held is None
    held = [run.take(step, lr).rollback.held for step, lr in enumerate([1.0, 1.9, 2.0, 3.9, 4.1])]
    assert held == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(("peak", "expected"), [(8.0, 3), (4.0, 3), (3.9, 2), (0.1, 2)])
def test_the_newer_of_two_copies_at_no_more_than_the_peak_is_put_back(peak, expected):
    run = Run().take(1, 1.0).take(2, 2.0).take(3, 4.0).at(9)
    run.rollback.keep_one(peak)
    assert run.rollback.put_back(9) == Restored(expected, expected / 10)
    assert run.weight == expected
    assert run.rollback.state_dict()["older"] is None


def test_the_only_copy_is_put_back_whatever_its_lr():
    run = Run().take(1, 1.0).at(9)
    run.rollback.keep_one(0.01)
    assert run.rollback.put_back(9).step == 1


def test_nothing_is_put_back_where_nothing_was_taken():
    run = Run().at(9)
    run.rollback.keep_one(1.0)
    assert run.rollback.put_back(9) is None
    assert run.weight == 9


def test_after_the_switch_the_copy_is_renewed_where_all_is_finite():
    run = Run().take(1, 1.0)
    run.at(2).rollback.renew(2, 0.0)
    assert run.rollback.held == 2
    run.at(float("nan")).rollback.renew(3, 0.0)
    assert run.rollback.held == 2
    assert run.rollback.sound(3).item() == 0.0


def test_a_copy_that_fails_is_told_once_and_given_up():
    run = Run().take(1, 1.0)
    run.optimizer.param_groups[0]["lock"] = threading.Lock()  # no copy of it can be made
    for step in range(2, 5):
        run.take(step, 2.0**step)
    assert [(event.kind, event.step) for event in run.log.events] == [("snapshot", 2)]
    assert (run.rollback.able, run.rollback.held, run.rollback.put_back(9)) == (False, None, None)
    assert run.rollback.state_dict() is None


def test_copies_are_saved_and_loaded_both():
    run, other = Run().take(1, 1.0).take(2, 2.0), Run()
    other.rollback.load_state_dict(copy.deepcopy(run.rollback.state_dict()))
    assert other.rollback.held == 2
    other.rollback.keep_one(1.5)
    assert (other.rollback.put_back(9).step, other.weight) == (1, 1)
    other.rollback.load_state_dict(None)
    assert other.rollback.held is None


def test_without_a_model_every_verb_is_there_and_does_nothing():
    nothing = NoRollback(Ranks())
    for act in (lambda: nothing.take(1, 1.0, 0.0, 0.5), lambda: nothing.renew(1, 0.0), nothing.keep_one, nothing.free):
        act()
    nothing.load_state_dict({"newer": None, "older": None})
    assert (nothing.able, nothing.failed, nothing.held, nothing.sound(1), nothing.put_back(1), nothing.state_dict()) == (
        (False, False) + (None,) * 4
    )
    assert {name for name in vars(NoRollback) if name[0] != "_"} == {name for name in dir(Rollback) if name[0] != "_"}
