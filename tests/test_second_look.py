"""The second look at the peak LR: when a run takes one, what it does to the run, and that it leaves no trace."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import ranks
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from autowu import AutoWU
from autowu.anytime import AnytimeAverage
from autowu.events import back_at
from autowu.phases import RampPlan
from autowu.ramp import MOST_RAMPS, SPAN, Ramp, next_ramp
from autowu.reader import Reader
from autowu.report import Report
from autowu.watch import BLOCK

STEPS = 3000
LOW = 0.01
"""As peak_factor: a fortieth of what it is."""


# When there is one


def config_and_state(**arguments):
    run = Run(**arguments)
    run.until(lambda: run.scheduler.switch is not None)
    return run.scheduler.config, run.scheduler._state


def test_ramps_come_after_quarters_of_a_warm_up_and_begin_before_the_cooldown():
    config, state = config_and_state()
    first = next(step for step in range(STEPS) if next_ramp(config, state, step))
    assert first == state.switch.step + config.warmup_steps // 4
    assert next_ramp(config, replace(state, ramps=1), first) is None
    for ramps in range(MOST_RAMPS):
        for step in range(STEPS):
            if plan := next_ramp(config, replace(state, ramps=ramps), step):
                assert plan.begin == step
                assert step < config.cooldown_start
                assert plan.span * state.switch.lr <= config.max_lr * (1 + 1e-9)
    assert not any(next_ramp(config, replace(state, ramps=MOST_RAMPS), step) for step in range(STEPS))


def test_after_a_short_warm_up_it_comes_no_sooner_than_a_whole_ramp_is_long():
    config, state = config_and_state(total_steps=None, max_warmup_steps=160)
    first = next(step for step in range(STEPS) if next_ramp(config, state, step))
    assert first - state.switch.step == 64 > config.warmup_steps // 4


@pytest.mark.parametrize(
    "changed", [{"setbacks": 1}, {"plateau_factor": 0.5}, {"switch": None}], ids=["set back", "overfitted", "warm-up"]
)
def test_a_peak_that_was_too_high_is_not_looked_at_again(changed):
    config, state = config_and_state()
    assert not any(next_ramp(config, replace(state, **changed), step) for step in range(STEPS))


@pytest.mark.parametrize(
    "arguments",
    [
        {"total_steps": 890},
        {"immediate_cooldown": True},
        {"steps_per_epoch": 60, "total_epochs": 50, "total_steps": None, "decay_phase_stat": "loss", "decay_phase_factor": 0.5},
        {"steps_per_epoch": 60, "total_epochs": 50, "total_steps": None, "decay_phase_factor": 0.9},
        pytest.param({"min_rise": 0.0}, marks=pytest.mark.slow),
        pytest.param({"rollback": False}, marks=pytest.mark.slow),
        pytest.param({"watch": False}, marks=pytest.mark.slow),
        {"max_lr": 0.02},
    ],
    ids=lambda arguments: list(arguments)[-1],
)
def test_runs_that_are_short_or_cannot_go_back_make_none(arguments):
    run = Run(peak_factor=0.3 if "max_lr" in arguments else LOW, **arguments)
    run.until(lambda: run.scheduler.phase in ("cooldown", "done"))
    assert "ramp" not in run.kinds()


# What it does to a run


class Run:
    """A perceptron that learns the digits."""

    def __init__(self, batch=32, **arguments):
        torch.manual_seed(0)
        self.batch, digits = batch, load_digits()
        self.inputs, self.labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        if batch < 32:
            self.model[1] = nn.LayerNorm(32)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = AutoWU(self.optimizer, **({"total_steps": STEPS, "model": self.model} | arguments))
        self.lrs, self.losses = [], []

    def step(self, change=None):
        """Take a step, its loss being passed through `change`."""
        k = self.scheduler.last_epoch
        rows = torch.randint(len(self.inputs), (self.batch,), generator=torch.Generator().manual_seed(k))
        loss = F.cross_entropy(self.model(self.inputs[rows]), self.labels[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        said = loss.item() if change is None else change(loss.item())
        self.losses.append(said)
        self.scheduler.step(said)

    def until(self, reached, change=None):
        while not reached():
            self.step(change)

    @torch.no_grad()
    def loss_in_evaluation(self, *, renewed=False):
        """Loss of all digits by the statistics that training left, or by `renewed` ones."""
        model = copy.deepcopy(self.model)
        if renewed:
            for _ in range(100):
                model(self.inputs)
        return F.cross_entropy(model.eval()(self.inputs), self.labels).item()

    def into_ramp(self, steps=20):
        self.until(lambda: self.plan is not None)
        for _ in range(steps):
            self.step()
        assert self.plan is not None

    @property
    def plan(self):
        return self.scheduler._state.ramp

    def kinds(self):
        return [event.kind for event in self.scheduler.events]

    def held(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()["state"]])

    def saved(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()])

    def resumed(self, **arguments):
        again = Run(**arguments)
        for part, state in zip((again.model, again.optimizer, again.scheduler), self.saved(), strict=True):
            part.load_state_dict(state)
        return again


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def in_blocks(monkeypatch):
    """Losses travel as those on a GPU do; a CPU tensor is a float by the time that it is read."""
    monkeypatch.setattr(Reader, "follows_at_once", lambda *_: False)


@pytest.fixture(scope="module")
def low():
    """A run whose peak LR is a fortieth of what it would be, up to its cooldown."""
    run = Run(peak_factor=LOW)
    run.until(lambda: run.scheduler.phase == "cooldown")
    return run


def test_a_peak_that_is_far_too_low_is_found_out_and_raised(low):
    ramps = [event for event in low.scheduler.events if event.kind == "ramp"]
    assert len(ramps) >= 2
    assert 8 <= low.scheduler._state.raised <= 4 ** len(ramps)
    assert low.scheduler.lr_at(low.scheduler.last_epoch) > 7 * low.scheduler.switch.lr
    assert "it is now" in ramps[0].message
    assert low.scheduler._state.setbacks == 0


@pytest.mark.parametrize("steps", [900, 1000, 2000])
def test_in_a_short_run_too(steps):
    run = Run(total_steps=steps, peak_factor=LOW)
    run.until(lambda: run.scheduler.phase == "cooldown")
    assert run.scheduler._state.raised >= 2
    spent = sum(run.lrs[k] > run.lrs[k - 1] for k in range(run.scheduler.switch.step + 1, len(run.lrs)))
    assert spent < steps / 8


def test_a_peak_that_is_right_stays_and_costs_a_hundredth_of_the_steps():
    run = Run()
    run.until(lambda: run.scheduler.phase == "cooldown")
    (ramp,) = (event for event in run.scheduler.events if event.kind == "ramp")
    assert run.lrs[ramp.step] == run.lrs[back_at(ramp) - 1] == run.scheduler.switch.lr
    assert ramp.step - back_at(ramp) <= STEPS / 50
    assert max(run.lrs[back_at(ramp) : ramp.step]) > 1.2 * run.scheduler.switch.lr


def test_a_ramp_leaves_weights_statistics_and_optimizer_as_they_were():
    run = Run()
    run.until(lambda: run.plan is not None)
    before = run.held()
    run.until(lambda: run.plan is None)
    assert_same(run.held(), before)


@pytest.mark.parametrize("given", [True, False])
def test_a_ramp_is_careful_where_a_copy_knows_no_statistics(given):
    run = Run(peak_factor=LOW, **({} if given else {"model": None}))
    run.into_ramp(3)
    assert run.scheduler._rooms.reader.ramp.careful is not given
    state = run.scheduler.state_dict()
    del state["reader"]["ramp"]["careful"]  # of an earlier version, which had none without the model
    run.scheduler.load_state_dict(state)
    assert run.scheduler._rooms.reader.ramp.careful is False


def test_losses_on_a_device_are_waited_for_after_each_part_of_a_ramp(in_blocks):
    run = Run(total_steps=1000, model=None)
    run.until(lambda: run.plan is not None)
    plan, ramp = run.plan, run.scheduler._rooms.reader.ramp
    run.until(lambda: run.plan is None)
    spent = run.scheduler.last_epoch - plan.begin
    assert ramp.risen
    assert spent < plan.steps
    assert spent % ramp.part == 0
    assert plan.factor(run.scheduler.last_epoch - 1) < ramp.edge * SPAN ** (ramp.part / 64)


@pytest.mark.parametrize(("batch", "most"), [(1, 0), (3, 1)])
def test_where_noise_would_hide_a_rise_no_look_is_taken_or_one(batch, most):
    run = Run(batch=batch)
    wrong = torch.rand(len(run.labels)) < 0.5
    run.labels[wrong] = torch.randint(10, (int(wrong.sum()),))
    run.until(lambda: run.scheduler.phase == "cooldown")
    assert run.kinds().count("ramp") <= most


@pytest.mark.parametrize("path", ["host", "blocks", "folded just before", "merged just before"])
def test_of_a_running_mean_no_look_is_taken_and_that_is_said_once(path, request, monkeypatch):
    if path == "blocks":
        request.getfixturevalue("in_blocks")
    if path == "merged just before":
        monkeypatch.setattr("autowu.after_switch._POINTS", 64)
    run, means = Run(total_steps=2800 if "before" in path else STEPS), [0.0]

    def mean(loss):
        means.append(0.98 * means[-1] + 0.02 * loss if len(means) > 1 else loss)
        return means[-1]

    run.until(lambda: run.scheduler.phase == "cooldown", mean)
    (told,) = (event.message for event in run.scheduler.events if event.kind == "ramp")
    assert "the losses are smooth" in told
    assert run.scheduler._state.raised == 1
    assert max(run.lrs[run.scheduler.switch.step :]) == run.scheduler.switch.lr


def test_whether_losses_are_smooth_is_asked_before_the_first_look_only(monkeypatch):
    asked = []
    monkeypatch.setattr("autowu.second_look.is_smooth", lambda losses: asked.append(len(losses)))
    run = Run(peak_factor=LOW)
    run.until(lambda: run.scheduler.phase == "cooldown")
    assert run.kinds().count("ramp") > 1
    assert asked == [128]


def test_losses_of_a_ramp_that_are_not_finite_are_told_of_where_no_copy_has_the_statistics():
    for with_model, told in ((True, False), (False, True)):
        run = Run(peak_factor=LOW, **({} if with_model else {"model": None}))
        run.into_ramp(8)
        run.until(lambda run=run: run.plan is None, lambda _: math.nan)
        assert any("statistics of the model" in event.message for event in run.scheduler.events) is told


def test_without_its_model_a_run_looks_at_its_peak_too_and_statistics_recover():
    run = Run(peak_factor=LOW, model=None)
    run.until(lambda: run.plan is not None)
    before, statistics = (copy.deepcopy([*kept]) for kept in (run.model.parameters(), run.model.buffers()))
    run.until(lambda: run.plan is None)
    assert_same([*run.model.parameters()], before)
    assert any((was != now).any() for was, now in zip(statistics, run.model.buffers(), strict=True))  # which no copy holds
    for _ in range(60):
        run.step()
    assert run.loss_in_evaluation() < 1.1 * run.loss_in_evaluation(renewed=True)
    run.until(lambda: run.scheduler.phase == "done")
    assert run.scheduler._state.raised > 4


def test_losses_on_a_device_lead_to_the_same_ramps(low, in_blocks):
    run = Run(peak_factor=LOW)
    run.until(lambda: "ramp" in run.kinds())
    first = next(event for event in low.scheduler.events if event.kind == "ramp")
    (ramp,) = (event for event in run.scheduler.events if event.kind == "ramp")
    assert abs(back_at(ramp) - back_at(first)) < BLOCK  # blocks begin at the switch
    assert ramp.message.split(", model")[0] == first.message.split(", model")[0]


def test_the_figure_knows_the_lrs_of_ramps(low):
    report = Report.of(low.scheduler.state_dict())
    first = low.scheduler.switch.step
    assert [report.lr(step) for step in range(first, len(low.lrs))] == pytest.approx(low.lrs[first:])
    assert [step for step, _ in report.returns][1:] == [e.step for e in low.scheduler.events if e.kind == "ramp"]


@pytest.mark.parametrize("path", ["host", "blocks"])
@pytest.mark.parametrize("into", [pytest.param(0, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 25])
def test_a_run_that_is_cut_in_a_ramp_goes_on_bit_for_bit(into, path, request):
    if path == "blocks":
        request.getfixturevalue("in_blocks")
    run = Run(peak_factor=LOW)
    run.into_ramp(into)
    again = run.resumed(peak_factor=LOW)
    for one in (run, again):
        one.lrs.clear()
        for _ in range(250):
            one.step()
    assert again.lrs == run.lrs
    assert_same(again.saved()[:2], run.saved()[:2])
    assert again.scheduler.events == run.scheduler.events


def test_a_state_of_before_there_were_ramps_goes_on_with_them():
    run = Run(peak_factor=LOW)
    run.until(lambda: run.scheduler.last_epoch == 500)
    state = run.scheduler.state_dict()
    for name in ("ramp", "ramps", "raised"):
        del state["state"][name]
    run.scheduler.load_state_dict(state)
    run.until(lambda: "ramp" in run.kinds())
    assert run.scheduler._state.raised > 1


def ended_by_cooldown(run):
    run.scheduler.start_cooldown(50)


def ended_by_rewarm(run):
    run.scheduler.rewarm()


@pytest.mark.parametrize("end", [ended_by_cooldown, ended_by_rewarm])
def test_what_ends_the_stable_phase_ends_the_ramp(end):
    run = Run(peak_factor=LOW)
    run.until(lambda: run.plan is not None)
    before, lr = run.held(), run.lrs[-1]
    run.into_ramp()
    end(run)
    if end is ended_by_cooldown:
        run.step()  # takes effect with this one
        run.step()
    assert run.plan is None
    assert_same(run.held(), before)
    assert run.optimizer.param_groups[0]["lr"] <= lr
    assert not run.scheduler.in_ramp
    assert "was cut short" in next(e for e in run.scheduler.events if e.kind == "ramp").message
    for _ in range(60):
        run.step()
    assert run.scheduler.phase == ("done" if end is ended_by_cooldown else "warmup")


def test_a_branch_that_is_forked_in_a_ramp_begins_where_that_did():
    run = Run(peak_factor=LOW)
    run.until(lambda: run.plan is not None)
    before = run.held()
    run.into_ramp()
    branch = run.resumed(peak_factor=LOW)
    branch.scheduler.load_state_dict(run.scheduler.fork_cooldown(steps=50))
    assert branch.optimizer.param_groups[0]["lr"] <= branch.scheduler.switch.lr
    branch.step()
    assert_same(branch.held(), before)


def test_a_branch_that_is_forked_in_a_ramp_is_the_full_run_bit_for_bit():
    trunk = Run(peak_factor=LOW, cooldown_fraction=0.1)
    trunk.into_ramp()
    fork = trunk.scheduler.last_epoch + 1
    trunk.step()
    fraction = 1 - fork / STEPS
    branch = trunk.resumed(peak_factor=LOW)
    branch.scheduler.load_state_dict(trunk.scheduler.fork_cooldown(fraction))
    full = Run(peak_factor=LOW, cooldown_fraction=fraction)
    full.until(lambda: full.scheduler.last_epoch == fork)
    for _ in range(20):
        full.step()
        branch.step()
    assert full.scheduler.phase == "cooldown"
    assert full.plan is branch.plan is None
    assert full.lrs[-20:] == branch.lrs[-20:]
    assert_same(full.held(), branch.held())


def test_a_run_that_is_extended_in_a_ramp_goes_on_with_it():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    run.scheduler.extend(total_steps=2 * STEPS)
    run.until(lambda: run.plan is None)
    assert run.scheduler._state.raised > 1


def test_losses_that_are_not_finite_end_a_ramp_and_are_no_setback():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    run.until(lambda: run.plan is None, change=lambda _: math.nan)
    assert len(run.losses) - run.scheduler.events[-1].step <= 0
    assert run.kinds()[-1] == "ramp"
    for _ in range(100):
        run.step()
    assert run.scheduler._state.setbacks == 0


def test_held_out_losses_of_a_ramp_are_left_out():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    for _ in range(10):
        run.scheduler.observe_validation(1e9)
        run.step()
    run.until(lambda: run.plan is None)
    assert "overfitting" not in run.kinds()
    assert math.isnan(run.scheduler._rooms.held_out.start)


def test_steps_that_overflow_again_and_again_end_a_ramp_and_calls_that_do_nothing_do_not():
    run = Run(peak_factor=LOW)
    run.until(lambda: run.plan is not None)
    before = run.held()
    run.into_ramp()
    for _ in range(40):
        run.scheduler.step(1.0)  # the optimizer is not called
    assert run.plan is not None
    for _ in range(40):
        run.scheduler.step()  # nor is there a loss
    assert run.plan is not None
    for _ in range(40):
        run.scheduler.step(math.nan)
    assert run.plan is None
    assert run.scheduler._state.setbacks == 0
    assert_same(run.held(), before)


def test_a_ramp_may_end_where_losses_are_folded(in_blocks):
    run = Run(peak_factor=LOW)
    run.until(lambda: run.scheduler.last_epoch == 510)
    plan = RampPlan(510, 30, SPAN)
    stage = run.scheduler._stage
    run.scheduler._rooms.rollback.renew(510, 1.0)
    run.scheduler._rooms.reader.catch_up()
    run.scheduler._rooms.reader.begin_ramp(Ramp(30, SPAN, 1e6, 0.01))
    run.scheduler._state = replace(run.scheduler._state, ramp=plan, ramps=1)
    assert stage.busy_at <= 510
    run.until(lambda: run.plan is None)
    assert "saw no rise up to 64 times" in run.scheduler.events[-1].message


def test_a_state_of_mid_ramp_without_its_copy_says_so_and_raises_nothing():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    again = run.resumed(peak_factor=LOW)
    again.scheduler.load_state_dict({**run.scheduler.state_dict(), "snapshot": None})
    again.step()
    assert not again.scheduler.in_ramp
    assert again.scheduler._state.raised == 1
    assert again.kinds()[-1] == "snapshot"
    assert again.optimizer.param_groups[0]["lr"] == again.scheduler.switch.lr


def test_a_ramp_whose_copy_is_lost_raises_nothing_whatever_it_found():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    ramp = run.scheduler._rooms.reader.ramp
    ramp.follow(np.linspace(1e-6, 2e-6, 96))  # far below the level before
    assert ramp.factor == 4
    run.scheduler._rooms.rollback.free()
    run.step()
    assert not run.scheduler.in_ramp
    assert run.scheduler._state.raised == 1


def test_a_state_with_half_of_a_ramp_is_refused():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    whole = run.scheduler.state_dict()
    for state in (
        {**whole, "state": {**whole["state"], "ramp": None}},
        {**whole, "reader": {name: value for name, value in whole["reader"].items() if name != "ramp"}},
    ):
        with pytest.raises(ValueError, match='"ramp"'):
            run.scheduler.load_state_dict(state)


def test_a_new_search_with_a_wrong_fraction_changes_nothing_in_a_ramp():
    run = Run(peak_factor=LOW)
    run.into_ramp()
    before = run.saved()
    with pytest.raises(ValueError, match="fraction"):
        run.scheduler.rewarm(7.0)
    assert run.scheduler.in_ramp
    assert_same(run.saved()[:2], before[:2])


def test_a_run_that_goes_back_by_held_out_losses_begins_no_ramp_in_that_step():
    run = Run(peak_factor=LOW)
    run.until(lambda: run.plan is not None)
    begun = run.plan.begin
    again = Run(peak_factor=LOW)
    again.until(lambda: again.scheduler.last_epoch == begun - 1)
    again.scheduler.observe_validation(1.0)
    again.step()
    assert not again.scheduler.in_ramp
    again.until(lambda: again.plan is not None)


def test_a_copy_that_fails_makes_no_ramp(monkeypatch):
    run = Run(peak_factor=LOW)
    run.until(lambda: run.scheduler.switch is not None)
    held = run.held()
    monkeypatch.setattr("autowu.snapshot.free_memory", lambda _: 0.0)
    run.scheduler._rooms.rollback._newer.free()
    run.until(lambda: run.scheduler.phase == "cooldown")
    assert "ramp" not in run.kinds()
    assert "snapshot" in run.kinds()
    assert held


def test_an_open_run_looks_again_after_a_quarter_of_a_warm_up():
    run = Run(total_steps=None, max_warmup_steps=700, peak_factor=LOW)
    run.until(lambda: "ramp" in run.kinds())
    begun = back_at(run.scheduler.events[-1])
    assert 0 <= begun - run.scheduler.switch.step - 175 < 10
    assert run.scheduler._state.raised > 1


def test_a_run_with_other_epochs_gives_its_ramp_up_and_goes_on():
    run = Run(total_steps=None, steps_per_epoch=60, total_epochs=50, peak_factor=LOW)
    run.until(lambda: run.plan is not None)
    before = run.held()
    run.into_ramp()
    again = run.resumed(total_steps=None, steps_per_epoch=30, total_epochs=50, peak_factor=LOW)
    again.step()
    assert again.plan is None
    assert_same(again.held(), before)


def test_an_average_leaves_the_weights_of_a_ramp_out():
    run = Run(total_steps=None, max_warmup_steps=400, peak_factor=LOW)
    average = AnytimeAverage(run.model)
    while not run.scheduler.in_ramp:
        run.step()
        average.update(run.model, run.scheduler)
    before = copy.deepcopy(average.state_dict())
    while run.scheduler.in_ramp:
        run.step()
        if run.scheduler.in_ramp:
            average.update(run.model, run.scheduler)
    assert_same(average.state_dict(), before)


def test_of_several_optimizers_all_peaks_are_raised():
    torch.manual_seed(0)
    run = Run(peak_factor=LOW)
    first, *_, last = run.model
    parts = [torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(last.parameters(), lr=0.1)]
    run.scheduler = AutoWU(parts, total_steps=STEPS, model=run.model, peak_factor=LOW)
    run.optimizer = run.scheduler.optimizer
    run.until(lambda: "ramp" in run.kinds())
    raised = run.scheduler._state.raised
    assert raised > 1
    lrs = [part.param_groups[0]["lr"] for part in parts]
    assert lrs == pytest.approx([raised * lr for lr in run.scheduler.switch.lrs])


def test_two_ranks_ramp_alike(tmp_path):
    ranks(tmp_path, 2, "tests/ramp_ranks.py", str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    kinds = first.pop("kinds")
    assert kinds == second.pop("kinds")
    assert kinds.count("ramp") == len(kinds) - 1 >= 2
    assert_same(first, second)
    assert first["raised"] > 1
