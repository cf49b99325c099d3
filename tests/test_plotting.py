"""What a run keeps for its figure, what the figure shows, and that no run is too odd for one."""

import io
import logging
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from autowu import AutoWU
from autowu.phases import Event, Verdict
from autowu.plotting import draw_report, draw_run, draw_state
from autowu.record import MOST, Record
from autowu.report import Report
from autowu.schema import check_state

STEPS = 400


def made(steps=STEPS, **arguments):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return AutoWU(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **({"total_steps": steps} | arguments), model=model)


def advanced(scheduler, losses):
    """The LRs of the steps that were taken."""
    lrs = []
    for loss in losses:
        for parameter in scheduler.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 0.01)
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss)
    return lrs


def valley(steps, start=0):
    """Falls to step 60, rises, and from step 90 on falls to a thousandth."""
    noise = 1 + 0.02 * np.random.default_rng(0).normal(size=steps)
    step = np.arange(steps)
    losses = noise * np.where(step < 90, 1 + np.abs(step / 60 - 1), np.maximum(np.exp((90 - step) / 25), 1e-3))
    return losses[start:].tolist()


def saved(scheduler):
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_alike(one, other):
    for name, value in vars(one).items():
        if name == "band":
            assert (value is None) == (other.band is None)
            assert value is None or all(
                np.array_equal(a, b) for a, b in zip(asdict(value).values(), asdict(other.band).values(), strict=True)
            )
        else:
            assert np.array_equal(value, getattr(other, name)), name


def shown(figure):
    """A figure's labels, panel by panel, once it was drawn."""
    figure.savefig(io.BytesIO(), dpi=60, format="png")
    return [panel.get_legend_handles_labels()[1] for panel in figure.axes]


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("as_loss", [float, torch.tensor, lambda loss: torch.tensor(loss) if loss > 0.5 else loss])
def test_every_loss_is_kept_at_its_step_to_the_end_of_the_run(as_loss):
    scheduler = made()
    advanced(scheduler, [as_loss(loss) for loss in valley(STEPS)])
    report = scheduler._report()
    assert not scheduler._state.watched  # the cooldown is no longer watched, and kept all the same
    np.testing.assert_array_equal(report.loss_steps, np.arange(STEPS))
    np.testing.assert_allclose(report.losses, np.float32(valley(STEPS)), rtol=1e-6)


def test_losses_that_are_missing_or_not_finite_leave_a_gap():
    scheduler = made()
    advanced(scheduler, [None if step % 3 == 1 else math.nan if step % 3 == 2 else loss for step, loss in enumerate(valley(50))])
    assert scheduler._report().loss_steps.tolist() == list(range(0, 50, 3))


def test_a_run_of_any_length_keeps_a_bounded_number_of_losses_and_tests():
    scheduler = made(8000, watch=False, rollback=False)
    advanced(scheduler, (1 + math.exp(-step / 500) for step in range(8000)))
    record = Record()
    for step in range(8000):
        record.test(step, Verdict(False, 0, 0.5, 0.1, 1.0))
    state = scheduler.state_dict() | {"record": record.state_dict()}
    check_state("state", state)
    report = Report.of(state)
    assert len(report.losses) <= 2048 + 1024
    assert report.loss_steps[-1] > 7900
    kept = [test.step for test in report.tests]
    assert len(kept) <= MOST
    assert kept[0] == 0
    assert kept[-MOST // 2 :] == list(range(8000 - MOST // 2, 8000))
    file = io.BytesIO()
    torch.save({name: state[name] for name in ("judge", "stage", "record")}, file)
    assert file.tell() < 200_000


def test_the_tests_are_those_that_were_made():
    scheduler, seen = made(), []
    for loss in valley(90):
        before = scheduler.decision
        advanced(scheduler, [loss])
        if scheduler.decision is not before:
            seen.append((scheduler.last_epoch, scheduler.decision.votes, scheduler.decision.probability))
    assert [(test.step, test.votes, test.probability) for test in scheduler._report().tests] == seen
    assert seen[-1][1] == scheduler.config.patience


@pytest.mark.parametrize(
    ("arguments", "losses", "befell"),
    [
        ({}, valley(STEPS), []),
        ({"immediate_cooldown": True, "cooldown_type": "cosine"}, valley(STEPS), []),
        ({}, [*valley(100), *[1e3, 1001.0, 1002.0, 1003.0], *valley(STEPS, 104)], ["divergence"]),
        ({}, [*valley(100), *[5.0] * (STEPS - 100)], ["divergence", "loss_changed"]),
        (
            {"total_steps": None, "steps_per_epoch": 5, "total_epochs": 80, "decay_phase_stat": "loss", "decay_phase_factor": 0.5},
            [*valley(90), *[0.9, 0.91] * 155],
            [],
        ),
        ({"warmup_unit": "epoch", "total_steps": None, "steps_per_epoch": 5, "total_epochs": 80}, valley(STEPS), []),
        ({"stable_type": "inverse_sqrt", "max_warmup_steps": 90, "cooldown_fraction": 0.1}, valley(STEPS), []),
    ],
    ids=["plain", "immediate", "setback", "undone", "plateau", "epochs", "falling"],
)
def test_the_lr_of_every_step_is_what_it_was(arguments, losses, befell):
    scheduler = made(**({"cooldown_fraction": 0.3} | arguments))
    lrs = advanced(scheduler, losses)
    report = Report.of(saved(scheduler))
    assert [report.lr(step) for step in range(STEPS)] == lrs
    kinds = [event.kind for event in scheduler.events if event.kind in ("divergence", "loss_changed")]
    assert kinds == befell
    assert len(report.courses) == len(kinds) + round(-math.log2(scheduler._state.plateau_factor))


def test_the_lr_before_an_extension_is_what_it_was():
    short, long = made(200), made(300)
    lrs = advanced(short, valley(150))
    long.load_state_dict(saved(short))
    lrs += advanced(long, valley(300, 150))
    assert [long._report().lr(step) for step in range(300)] == lrs
    assert lrs[150] > lrs[149]


@pytest.mark.parametrize("at", [80, 150, 300])
def test_the_lr_before_an_immediate_cooldown_was_shortened_is_what_it_was(at):
    scheduler = made(immediate_cooldown=True)
    losses = valley(STEPS)
    lrs = advanced(scheduler, losses[:at])
    scheduler.start_cooldown(steps=100)
    lrs += advanced(scheduler, losses[at : at + 101])
    report = Report.of(saved(scheduler))
    assert [report.lr(step) for step in range(len(lrs))] == lrs


def test_a_course_that_does_not_say_whether_its_cooldown_was_immediate_is_as_the_run():
    scheduler = made(immediate_cooldown=True)
    lrs = advanced(scheduler, [*valley(100), *[1e3, 1001.0, 1002.0, 1003.0], *valley(200, 104)])
    state = saved(scheduler)
    for course in state["record"]["courses"]:
        del course["immediate"]
    assert state["record"]["courses"]
    report = Report.of(state)
    assert [report.lr(step) for step in range(200)] == lrs


@pytest.fixture(scope="module")
def uncut():
    scheduler = made()
    advanced(scheduler, valley(STEPS))
    return scheduler


@pytest.mark.parametrize("cut", [pytest.param(0, marks=pytest.mark.slow), 47, pytest.param(90, marks=pytest.mark.slow), 300])
def test_a_resumed_run_draws_what_the_uncut_one_does(uncut, cut):
    first, second = made(), made(max_lr=3.0)
    advanced(first, valley(cut))
    second.load_state_dict(saved(first))
    advanced(second, valley(STEPS, cut))
    assert_alike(second._report(), uncut._report())


@pytest.mark.parametrize("steps", [0, 47, 90, 300])
def test_the_state_alone_tells_what_the_run_does(steps):
    scheduler = made()
    advanced(scheduler, valley(steps))
    assert_alike(Report.of(saved(scheduler)), scheduler._report())
    assert_alike(Report.of(saved(scheduler) | {"snapshot": None}), scheduler._report())


# ---------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def run():
    scheduler = made()
    advanced(scheduler, [*valley(100), *[1e3, 1001.0, 1002.0, 1003.0], *valley(STEPS, 104)])
    return scheduler


def test_the_figure_shows_what_was_seen_and_decided(run):
    figure = run.plot()
    losses, tests, lr = figure.axes
    assert shown(figure) == [
        ["running mean", "95 % band", "Gaussian process", "back to a copy"],
        ["confidence 0.95", "test", "test that votes"],
        [f"minimum, at LR {run._report().lr_at_minimum:.3g}", f"switch, to LR {run.switch.lr:.3g}", "setback, half the peak"],
    ]
    assert [text.get_text() for text in losses.texts if text.get_text()] == ["warm-up", "stable", "cooldown"]
    assert [panel.get_yscale() for panel in figure.axes] == ["log", "linear", "log"]
    assert len(losses.texts) == 3 + 2  # an arrow for each return
    votes = next(line for line in tests.lines if line.get_label() == "test that votes")
    assert len(votes.get_xdata()) == run.config.patience
    bottom, top = losses.get_ylim()
    assert bottom < 1e-3
    assert 2 < top < 1e3  # three losses of a thousand hide nothing
    steps, lrs = lr.lines[0].get_data()
    assert [run._report().lr(int(step)) for step in steps] == list(lrs)
    place = losses.transData.transform
    warmup, whole = place((run.switch.step, 1))[0] - place((0, 1))[0], place((STEPS, 1))[0] - place((0, 1))[0]
    assert warmup / whole == pytest.approx(0.45)
    assert "drawn wider" in lr.get_xlabel()


def test_a_warm_up_shows_how_far_it_is():
    scheduler = made()
    advanced(scheduler, valley(50))
    figure = scheduler.plot()
    assert shown(figure) == [["95 % band", "Gaussian process"], ["confidence 0.95", "test"], []]
    assert [text.get_text() for text in figure.axes[0].texts] == ["warm-up"]
    assert figure.axes[0].get_xlim() == (0, 50)


ODD = {
    "no step": [],
    "one": [1.0],
    "all alike": [2.0] * 150,
    "none finite": [math.nan] * 60,
    "below 0": [-10 - loss for loss in valley(150)],
    "about 0": [loss - 1.2 for loss in valley(150)],
    "0": [0.0] * 60,
    "explosion": [*valley(40), *[1e300] * 4, *valley(100)],
    "only rising": [1.0 + step for step in range(150)],
    "tiny": [loss * 1e-300 for loss in valley(150)],
}


ODDEST = ("none finite", "below 0", "explosion", "tiny")


@pytest.mark.parametrize(
    "losses", [pytest.param(ODD[name], id=name, marks=[] if name in ODDEST else pytest.mark.slow) for name in ODD]
)
def test_no_run_is_too_odd_for_a_figure(losses):
    scheduler = made()
    advanced(scheduler, losses)
    figure = draw_state(saved(scheduler))
    shown(figure)
    low, high = figure.axes[0].get_ylim()
    finite = [loss for loss in losses if math.isfinite(loss) and loss < 1e290]
    assert low < high < math.inf
    if finite:
        assert low <= min(finite)
        assert np.mean(np.asarray(finite) <= high) > 0.45


def test_other_ranks_have_no_band_and_draw_all_the_same(run):
    figure = draw_report(replace(run._report(), band=None))
    assert [panel.get_legend_handles_labels()[1][0] for panel in figure.axes[:2]] == ["running mean", "confidence 0.95"]


def test_it_draws_into_axes_that_are_given(run):
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    for part in (left, right):
        assert run.plot(part.subplots(3)) is figure
    assert len(figure.axes) == 6
    with pytest.raises(ValueError, match=r"axes, 2 of them: must be three"):
        run.plot(figure.axes[:2])
    with pytest.raises(TypeError, match=r"axes=3: must be three matplotlib Axes or None"):
        run.plot(3)


def test_all_losses_and_lrs_of_a_run_may_be_drawn_in_place_of_those_kept(run):
    figure = draw_run([3.0, 2.0, 1.0], [0.1, 0.2, 0.3], run)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert list(figure.axes[2].lines[0].get_ydata()) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "state", [None, 3, {}, {"class": 3}, {"class": "AutoWU", "version": 6}, {"class": "AutoWU", "version": 99}]
)
def test_what_is_no_state_is_refused_in_a_line(state):
    with pytest.raises((TypeError, ValueError), match=r"^(state_dict|class|version)[^\n]*$"):
        draw_state(state)


# ---------------------------------------------------------------- notebooks


def test_a_notebook_shows_table_and_figure(run):
    shown = run._repr_html_()
    assert "<th>switch</th><td>step 7" in shown
    assert f"<th>peak LR</th><td>{run.switch.lr:.4g}</td>" in shown
    assert "<th>setbacks</th><td>1 of 3</td>" in shown
    assert 'src="data:image/png;base64,' in shown


def test_a_notebook_shows_a_figure_though_pyplot_was_never_imported(run):
    for figure in (run.plot(), draw_run([3.0, 2.0], [0.1, 0.2])):
        png = figure._repr_png_()  # which notebooks ask for
        assert png.startswith(b"\x89PNG")
        assert len(png) > 5000


def test_without_matplotlib_a_notebook_shows_the_table_and_a_plot_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run._repr_html_().endswith("</table>")
    with pytest.raises(ImportError, match=r"pip install autowu\[plot\]"):
        run.plot()


def test_what_an_error_said_is_no_markup(run, monkeypatch):
    monkeypatch.setattr(run._rooms.log, "events", [Event("fit", 3, "<b>&")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "<th>fit</th><td>step 3: &lt;b&gt;&amp;</td>" in run._repr_html_()


def test_the_table_tells_of_a_warm_up_under_way():
    scheduler = made()
    advanced(scheduler, valley(50))
    told = dict(scheduler._report().decided())
    assert told["phase"] == "warm-up, step 50 of 400"
    assert told["switch"] == "not yet; by step 128 at the latest"
    assert told["last test"].endswith("0 of 4 votes")


def test_the_page_draws_and_saves_as_shown(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "figures.md").read_text()
    level = logging.getLogger("autowu").level
    names = {"scheduler": run}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    logging.getLogger("autowu").setLevel(level)
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert len(names["figure"].axes) == 3
