"""States of versions before, 4 being that of autowu 0.1.0: the runs go on with the LRs, weights and events that they went on with.

``data/states_version_*.pt`` hold them, each with what that version did from there on, fed the losses of :func:`losses`.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autowu import AutoWU
from autowu.gpytorch_engine import PublishedGP
from autowu.report import Report
from autowu.states import VERSION, readable

DATA = Path(__file__).parent / "data"
SET_BACK = DATA / "states_version_5_set_back.pt"
STEPS = 200
OTHER = {"total_steps": STEPS, "min_lr": 1e-2, "max_lr": 0.5, "test_interval": 9}  # none of it matters
MAKE = {
    "in the warm-up": lambda model, optimizer: AutoWU(optimizer, model=model, **OTHER),
    "voting": lambda model, optimizer: AutoWU(optimizer, model=model, **OTHER),
    "after the switch": lambda model, optimizer: AutoWU(optimizer, model=model, **OTHER),
    "without a model": lambda model, optimizer: AutoWU(optimizer, steps_per_epoch=10, total_epochs=20),
    "paper": lambda model, optimizer: AutoWU(optimizer, steps_per_epoch=10, total_epochs=20),
}


SAVED = [(4, name) for name in MAKE] + [(5, name) for name in ("in the warm-up", "voting", "after the switch", "without a model")]


def states_of(version):
    return torch.load(DATA / f"states_version_{version}.pt", weights_only=True)


@pytest.fixture
def saved():
    return states_of(4)


def losses():
    noise = 0.02 * np.random.default_rng(0).normal(size=STEPS)
    return (1 + np.abs(np.arange(STEPS) / 40 - 1) + noise).tolist()


def loaded(case, make):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(model, optimizer)
    model.load_state_dict(case["model"])
    optimizer.load_state_dict(case["optimizer"])
    scheduler.load_state_dict(case["scheduler"])
    return model, optimizer, scheduler


def go_on(model, optimizer, scheduler):
    lrs, curve = [], losses()
    for loss in curve[scheduler.last_epoch :]:
        lrs.append(optimizer.param_groups[0]["lr"])
        if scheduler.switch is not None:
            loss = 1 + 0.02 * loss / 10
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
        scheduler.step(loss)
    return [*lrs, optimizer.param_groups[0]["lr"]]


def leaves(value):
    """All numbers and words of a nested state, NaN as a word."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in (str(key), *leaves(inner))]
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [str(number) for number in value.flatten().tolist()] if isinstance(value, torch.Tensor) else [str(value)]


@pytest.mark.parametrize(("version", "name"), SAVED)
def test_a_run_goes_on_as_it_did(version, name):
    case = states_of(version)[name]
    assert case["scheduler"]["version"] == version
    before = copy.deepcopy(case["scheduler"])
    model, optimizer, scheduler = loaded(case, MAKE[name])
    assert go_on(model, optimizer, scheduler) == pytest.approx(case["lrs"], rel=1e-9)
    assert [event.kind for event in scheduler.events] == [kind for kind, _, _ in case["events"]]
    assert scheduler.events[-1].message == case["events"][-1][2]
    for key, weight in case["weights"].items():
        torch.testing.assert_close(model.state_dict()[key], weight)
    assert leaves(case["scheduler"]) == leaves(before)  # it is left as it was


@pytest.mark.parametrize("name", ["in the warm-up", "after the switch", "set back"])
def test_a_run_of_version_5_goes_on_as_it_did(name):
    case = torch.load(SET_BACK, weights_only=True)[name]
    assert case["scheduler"]["version"] == 5
    model, optimizer, scheduler = loaded(case, lambda model, optimizer: AutoWU(optimizer, model=model, **OTHER))
    assert go_on(model, optimizer, scheduler) == pytest.approx(case["lrs"], rel=1e-9)
    assert [(event.kind, event.step, event.message) for event in scheduler.events] == case["events"]
    for key, weight in case["weights"].items():
        torch.testing.assert_close(model.state_dict()[key], weight)


def test_of_version_5_the_last_test_is_known_and_the_lr_before_a_setback():
    state = torch.load(SET_BACK, weights_only=True)["set back"]["scheduler"]
    report = Report.of(state)
    assert [(test.step, test.votes, test.probability) for test in report.tests] == [(60, 4, 1.0)]
    assert report.lr(60) == state["state"]["switch"]["lr"]
    assert report.lr(88) / report.lr(87) == pytest.approx(0.5, rel=0.02)  # the cooldown has begun


# Slow is the published fit, whose run goes on above, and of whose state of today are tests in test_resume.py.
@pytest.mark.parametrize(
    ("version", "name"), [pytest.param(*case, marks=[pytest.mark.slow] if case[1] == "paper" else []) for case in SAVED]
)
def test_it_is_saved_in_the_present_version_and_loads_again(version, name):
    model, optimizer, scheduler = loaded(states_of(version)[name], MAKE[name])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    assert state["scheduler"]["version"] == VERSION == 6
    again = loaded(copy.deepcopy(state), MAKE[name])
    assert go_on(*again) == go_on(model, optimizer, scheduler)


def test_the_states_bring_what_they_are_there_for(saved):
    states = {name: case["scheduler"] for name, case in saved.items()}
    assert all(copies["other"] for copies in (states["in the warm-up"]["snapshot"], states["voting"]["snapshot"]))
    assert states["voting"]["state"]["votes"] > 0
    assert states["after the switch"]["snapshot"]["other"] is None
    assert states["without a model"]["epoch_losses"] is None or states["without a model"]["config"]["decay_phase_stat"] == "loss"
    assert states["paper"]["gp"]["state"]["carried"] is not None
    voting = states_of(5)["voting"]["scheduler"]
    assert (voting["state"]["votes"], voting["judge"]["decision"]["votes"]) == (3, 3)


def test_the_published_fit_is_an_engine_of_its_own(saved):
    _, _, scheduler = loaded(saved["paper"], MAKE["paper"])
    assert repr(scheduler.gp) == repr(PublishedGP())


@pytest.mark.parametrize("key", ["verdict", "watch", "gp", "snapshot", "ratios", "history", "state"])
def test_an_incomplete_state_is_refused_by_the_name_of_what_is_missing(key, saved):
    case = saved["in the warm-up"]
    del case["scheduler"][key]
    with pytest.raises(ValueError, match=f"'{key}': the state is incomplete"):
        loaded(case, MAKE["in the warm-up"])


@pytest.mark.parametrize(
    ("block", "flag"),
    [
        ([1.5] * 5, None),  # a test every 5 steps ends a block: 5 losses of one rank
        ([1.5] * 5, 0.0),  # of several
        ([1.5] * 4 + [0.0], None),  # a loss of 0 that looks like a flag
        ([1.5] * 5, 2.0),
    ],
)
def test_the_block_of_a_run_of_one_rank_or_several_is_read_for_what_it_is(block, flag, saved):
    case = saved["in the warm-up"]["scheduler"]
    pending = block if flag is None else [*block, flag]
    case["watch"] |= {"looked_at": 30, "pending": pending}
    read = readable(case, "AutoWU", 1)
    assert read["reader"]["pending"] == [*block, flag or 0.0]


def test_a_block_of_several_ranks_adds_its_losses_and_no_other_on_one(saved):
    case = saved["in the warm-up"]
    before = case["scheduler"]["watch"]["state"]["count"]
    case["scheduler"]["watch"] |= {"looked_at": 30, "pending": [1.21, 1.22, 1.23, 1.24, 1.25, 0.0]}
    _, _, scheduler = loaded(case, MAKE["in the warm-up"])
    scheduler.optimizer.step()
    scheduler.step(1.2)
    watch = scheduler._rooms.reader.watch
    assert (watch.count, watch.last) == (before + 6, 1.2)
    assert scheduler._rooms.rollback.held is not None


def test_a_version_that_is_not_read_is_refused(saved):
    case = saved["voting"]
    case["scheduler"]["version"] = 3
    with pytest.raises(ValueError, match="version=3: this autowu reads versions 4 to 6"):
        loaded(case, MAKE["voting"])


def test_a_published_fit_with_a_kernel_of_its_own_is_refused(saved):
    case = saved["paper"]
    case["scheduler"]["gp"]["state"]["custom_kernel"] = True
    with pytest.raises(ValueError, match="kernel"):
        loaded(case, MAKE["paper"])


# ---------------------------------------------------------------- version 5


def as_version_5(state):
    """A state of the present version without what it has more."""
    new = ("previous", "again", "longest", "doubt", "halved", "pace", "before", "fell")
    watch = {name: value for name, value in state["reader"]["watch"].items() if name not in new}
    return state | {"version": 5, "reader": state["reader"] | {"watch": watch}}


def test_an_incomplete_state_of_version_5_is_refused():
    state = as_version_5(AutoWU(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), total_steps=100).state_dict())
    del state["reader"]["watch"]
    with pytest.raises(ValueError, match="'watch': the state is incomplete"):
        AutoWU(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), total_steps=100).load_state_dict(state)
