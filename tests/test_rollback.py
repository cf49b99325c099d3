"""The copies that a run can go back to: which is kept, which is put back, and what happens where copying fails."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from autowu import AutoWU, rollback
from autowu.events import EventLog
from autowu.live import LiveRun
from autowu.ranks import Ranks
from autowu.rollback import NoRollback, Restored, Rollback


class Run:
    """A model whose weights say at which step they were set."""

    def __init__(self):
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.log = EventLog(Ranks())
        self.told = []
        self.rollback = Rollback(LiveRun(self.optimizer, self.model), Ranks(), self.log, on_rollback=self.told.append)

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


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("lr", "expected"), [(7.9, 2), (8.0, 3), (9.0, 3)])
def test_a_copy_that_was_due_and_not_worth_it_leaves_the_newer_the_better(lr, expected, saved):
    run = Run().take(1, 1.0).take(2, 2.0).take(3, 4.0)
    run.rollback.pass_by(4, lr, 0.4, 0.5)
    if saved:
        state = copy.deepcopy(run.rollback.state_dict())
        assert ("passed_by" in state) == (lr >= 8)
        run = Run()
        run.rollback.load_state_dict(state)
    run.at(9).rollback.keep_one(3.0)
    assert run.rollback.put_back(9).step == run.weight == expected


def test_a_copy_that_is_taken_after_all_counts_as_the_newer():
    run = Run()
    run.rollback.pass_by(1, 1.0, 0.1, 0.5)  # there is none that was better
    assert run.rollback.held == 1
    run.take(2, 2.0)
    run.rollback.pass_by(3, 4.0, 0.3, 0.5)
    run.take(3, 8.0)
    run.rollback.keep_one(4.0)
    assert run.rollback.held == 2


@pytest.mark.parametrize(("lr", "held"), [(59.0, 2), (60.0, 3)])
def test_a_run_is_copied_after_all_where_the_lr_has_grown_thirtyfold(lr, held):
    run = Run().take(1, 1.0).take(2, 2.0)
    run.at(3).rollback.pass_by(3, lr, 0.3, 0.5)
    assert run.rollback.held == held
    run.rollback.keep_one(10.0)
    assert run.rollback.held == 2, "it has been better then"


@pytest.mark.parametrize(("peak", "expected"), [(0.1, 2), (10.0, 2), (12.0, 3), (59.0, 3), (60.0, 3)])
def test_of_two_copies_far_apart_the_nearer_to_the_peak_is_put_back(peak, expected):
    run = Run().take(1, 1.0).take(2, 2.0)
    run.at(3).rollback.pass_by(3, 60.0, 0.3, 0.5)
    run.at(4).rollback.pass_by(4, 120.0, 0.3, 0.5)  # it has not come back since
    run.at(9).rollback.keep_one(peak)
    assert run.rollback.put_back(9).step == run.weight == expected


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


def test_who_wants_to_know_of_it_is_told():
    run = Run().take(1, 1.0).take(2, 2.0)
    run.rollback.put_back(9)
    assert run.told == [2]
    run.rollback.keep_one(1.0)
    run.rollback.put_back(9)
    assert run.told == [2, 1]


def test_a_hook_that_fails_is_survived_and_told_once():
    run = Run()
    run.rollback._on_rollback = lambda step: 1 / 0
    run.take(1, 1.0)
    for _ in range(2):
        assert run.rollback.put_back(9).step == 1
    assert [event.kind for event in run.log.events] == ["on_rollback"]
    assert "on_rollback(1) has failed (ZeroDivisionError" in run.log.events[0].message


def test_a_copy_that_does_not_fit_is_not_put_back_and_that_is_told():
    run, other = Run().take(1, 1.0), Run()
    other.model = nn.Linear(3, 1)
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1, momentum=0.9)
    other.rollback = Rollback(LiveRun(other.optimizer, other.model), Ranks(), other.log)
    other.rollback.load_state_dict(run.rollback.state_dict())
    other.rollback.go_on(5, True)
    assert other.rollback.put_back(9) is None
    (event,) = other.log.events
    assert event.step == 5
    assert "does not fit the run" in event.message
    assert "'weight'" in event.message


def test_what_the_copy_does_not_know_is_named():
    run = Run().take(1, 1.0)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    run.rollback.put_back(9)
    (event,) = run.log.events
    assert "the copy of step 1 does not know 2: they stay as they are" in event.message


@pytest.mark.parametrize("rollback", [True, False])
def test_weights_that_no_copy_mends_are_an_error_that_names_the_cure(rollback, caplog):
    run = Run()
    if not rollback:
        run.rollback = NoRollback(LiveRun(run.optimizer), Ranks(), run.log)
    assert not run.rollback.lost(1)
    assert run.at(float("nan")).rollback.put_back(2) is None
    assert run.rollback.lost(2)
    assert run.rollback.lost(3)  # said once
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert ("without rollback=False" in record.getMessage()) != rollback
    assert "checkpoint" in record.getMessage()


def test_a_late_group_that_is_not_finite_is_told_after_going_back(caplog):
    run = Run().take(1, 1.0)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.full((2,), float("nan")))]})
    assert run.rollback.put_back(9).step == 1
    assert [event.kind for event in run.log.events] == ["snapshot", "lost"]


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def gan():
    return nn.ModuleDict({"generator": nn.Linear(2, 2), "discriminator": nn.Linear(2, 1)})


@pytest.mark.parametrize("given", ["all of it", "a part", "nothing"])
def test_two_runs_that_would_put_parts_of_one_model_back_to_different_steps_are_refused(given):
    model = gan()
    first = AutoWU(sgd(model["generator"]), total_steps=100, model=model)
    arguments = {"all of it": {"model": model}, "a part": {"model": model["discriminator"]}, "nothing": {}}[given]
    with pytest.raises(ValueError, match=r"an AutoWU of another optimizer goes back with parts of .*; give each as model="):
        AutoWU(sgd(model["discriminator"]), total_steps=100, **arguments)
    AutoWU(sgd(model["discriminator"]), total_steps=100, rollback=False)
    assert first._rooms.rollback.able


def test_two_runs_that_each_go_back_with_their_own_part_are_not():
    model = gan()
    first = AutoWU(sgd(model["generator"]), total_steps=100)
    other = AutoWU(sgd(model["discriminator"]), total_steps=100, model=model["discriminator"])
    assert first._rooms.rollback.able
    assert other._rooms.rollback.able


def test_a_run_that_is_begun_anew_or_comes_after_another_is_not():
    model = gan()
    first = AutoWU(sgd(model), total_steps=100, model=model)
    AutoWU(sgd(model), total_steps=100, model=model)
    head = AutoWU(sgd(model["discriminator"]), total_steps=20, model=model)
    for _ in range(20):
        head.optimizer.step()
        head.step(1.0)
    assert head.phase == "done"
    AutoWU(sgd(model["generator"]), total_steps=100, model=model)
    assert first.phase == "warmup"


def test_a_run_that_searches_again_keeps_its_claim():
    model = gan()
    first = AutoWU(sgd(model["generator"]), max_warmup_steps=20, model=model)
    for step in range(60):
        first.optimizer.step()
        first.step(1 + abs(min(step, 20) - 10.0))
    first.rewarm()
    with pytest.raises(ValueError, match="an AutoWU of another optimizer goes back"):
        AutoWU(sgd(model["discriminator"]), total_steps=100, model=model)


def test_a_run_that_copies_again_has_its_claim_again():
    run = Run().take(1, 0.1)
    run.rollback.free_newer()  # its watch is over
    assert run.rollback not in rollback._CLAIMED
    run.at(2).rollback.renew(2, 0.0)  # it was made longer
    assert run.rollback in rollback._CLAIMED
    run.rollback.give_up()
    assert run.rollback not in rollback._CLAIMED


def test_without_a_model_every_verb_is_there_and_does_nothing():
    nothing = NoRollback(LiveRun(Run().optimizer), Ranks(), EventLog(Ranks()))
    for act in (lambda: nothing.take(1, 1.0, 0.0, 0.5), lambda: nothing.renew(1, 0.0), nothing.keep_one, nothing.free):
        act()
    nothing.load_state_dict({"newer": None, "older": None})
    assert (nothing.able, nothing.failed, nothing.held, nothing.sound(1), nothing.put_back(1), nothing.state_dict()) == (
        (False, False) + (None,) * 4
    )
    assert {name for name in vars(NoRollback) if name[0] != "_"} == {name for name in dir(Rollback) if name[0] != "_"}


def back_at(losses, steps=1200):
    """The step that a run with these losses goes back to at its switch, and the switch."""
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler = AutoWU(torch.optim.SGD([weight], lr=0.1), total_steps=steps, model=torch.nn.ParameterList([weight]))
    for step, loss in enumerate(losses, 1):
        with torch.no_grad():
            weight.fill_(step)
        scheduler.optimizer.step()
        scheduler.step(float(loss))
        if scheduler.switch is not None:
            break
    return weight.item(), scheduler.switch


LEAPS = [(0.01, 0.2, 170, 5, 0.02), (0.01, 0.2, 172, 5, 0.02), (0.01, 0.2, 175, 5, 0.02), (0.02, 0.15, 200, 4, 0.025)]


ONE_TEST_AGO = (0.01, 0.08, 174, 5, 0.015)  # it leaps just before a test, in a block that is on its way by then


@pytest.mark.parametrize("path", ["host", "blocks"])
@pytest.mark.parametrize(
    ("lowest", "leap", "falls_for", "leaps_in", "end", "seed"),
    [*((*leap, seed) for leap in LEAPS for seed in (0, 1)), (*ONE_TEST_AGO, 726473)],
)
def test_a_loss_that_leaps_up_and_falls_again_is_no_reason_to_copy(lowest, leap, falls_for, leaps_in, end, seed, path, monkeypatch):
    """What the warm-up has spoilt may learn again, at LRs that are too high by then: the copies of before are worth more."""
    if path == "blocks":  # as losses on a GPU
        monkeypatch.setattr("autowu.reader.Reader.follows_at_once", lambda *_: False)
    half = falls_for // 2
    falling = [*np.linspace(1, 0.3, half), *np.geomspace(0.3, lowest, falls_for - half)]
    again = [*np.geomspace(lowest, leap, leaps_in)[1:], *np.geomspace(leap, end, 60), *np.geomspace(end, 50, 40)]
    noise = np.exp(0.2 * np.random.default_rng(seed).normal(size=len(falling + again)))
    step, switch = back_at(np.array(falling + again) * noise)
    assert switch.minimum > falls_for + leaps_in  # where the fit sees it
    assert falls_for / 2 < step <= falls_for


RISES_FIRST = [*np.linspace(1, 2, 40), *np.linspace(2, 1.5, 245), *np.geomspace(1.5, 50, 100)]
A_TERM_JOINS = [*np.linspace(3, 2.5, 99), *np.linspace(3.44, 2.38, 186), *np.geomspace(2.4, 50, 100)]


@pytest.mark.parametrize("losses", [RISES_FIRST, A_TERM_JOINS], ids=["rises first", "a term joins"])
def test_a_run_that_learns_at_a_higher_loss_does_not_go_back_to_its_start(losses):
    step, switch = back_at(np.array(losses) + 0.03 * np.random.default_rng(0).normal(size=len(losses)), steps=2000)
    assert 200 < step <= switch.step
