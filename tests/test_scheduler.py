"""AutoWU on real optimizers: the LR of every step, what a loss may be, what a run survives, and how it is saved."""

import copy
import functools
import gc
import logging
import math
import pickle
import re
import weakref
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autowu import AutoWU, ClosedFormGP, GPyTorchGP
from autowu.gp import CurvePosterior
from autowu.gpytorch_engine import PublishedGP
from autowu.schedules import COOLDOWN_TYPES, WARMUP_TYPES, cooldown_factor, warmup_lr

# The losses here are made up and do not mind the LR; what watches over them is tested in test_watch.py, and what their rise
# has to be in test_switching.py.
RANGE = {"min_lr": 1e-5, "max_lr": 1.0, "max_warmup_fraction": 0.5, "peak_factor": 1.0, "min_rise": 0.0, "watch": False}
RANGE |= {"warmup_type": "exp", "patience": 3, "immediate_cooldown": True, "cooldown_type": "cosine"}
STABLE = RANGE | {"immediate_cooldown": False, "cooldown_fraction": 0.2}


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def sgd(lr=0.1, groups=None):
    return torch.optim.SGD(groups or [parameter()], lr=lr)


def advance(scheduler, losses):
    """Take one optimizer step for each loss; the LRs, of the first group, that they ran at."""
    lrs = []
    for loss in losses:
        lrs.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step(loss)
    return lrs


def v_curve(total, lowest, seed=0, noise=0.03):
    """Noisy losses of a run: they fall from 2 to a minimum of 1 at step `lowest` and rise again as fast."""
    steps = np.arange(total)
    return 1 + np.abs(steps / lowest - 1) + noise * np.random.default_rng(seed).normal(size=total)


class Oracle:
    """An engine of a user's own, sure of where the minimum is: at a fraction of the planned warm-up."""

    max_points = None

    def __init__(self, minimum):
        self.minimum = minimum
        self.asked_at = []

    def posterior(self, curve):
        self.asked_at.append(len(curve.counts))
        grid = np.unique([0.0, min(self.minimum, curve.end), curve.end])
        mean = np.abs(grid - self.minimum)[None]
        tiny = np.full_like(mean, 1e-12)
        return CurvePosterior(grid, curve.end, mean, tiny, tiny, num_losses=int(curve.counts.sum()))


class Broken:
    """An engine that cannot fit anything."""

    max_points = None

    def posterior(self, curve):
        raise RuntimeError("the covariance is not positive definite")


class BrokenOnce(Oracle):
    """An engine whose first fit fails."""

    def posterior(self, curve):
        if not self.asked_at:
            self.asked_at.append(len(curve.counts))
            raise RuntimeError("the covariance is not positive definite")
        return super().posterior(curve)


# ---------------------------------------------------------------- the LR of every step


@st.composite
def runs(draw):
    """Arguments of a run of random length, and where on the planned warm-up its loss is lowest (beyond 1: nowhere)."""
    steps_per_epoch, total_epochs = draw(st.integers(1, 25)), draw(st.integers(2, 12))
    arguments = {
        "steps_per_epoch": steps_per_epoch,
        "total_epochs": total_epochs,
        "immediate_cooldown": draw(st.booleans()),
        "cooldown_type": draw(st.sampled_from(COOLDOWN_TYPES)),
        "cooldown_fraction": draw(st.sampled_from([0.1, 0.2, 0.5])),
        "warmup_type": draw(st.sampled_from(WARMUP_TYPES)),
        "warmup_unit": draw(st.sampled_from(["step", "epoch"])),
        "test_interval": draw(st.sampled_from([None, 1, 3, "epoch"])),
        "max_warmup_fraction": draw(st.sampled_from([0.25, 0.5, 0.75])),
    }
    assume(steps_per_epoch * total_epochs * arguments["max_warmup_fraction"] >= 2)
    return arguments, draw(st.floats(0.1, 1.5))


@given(runs())
@settings(max_examples=40)
def test_every_step_runs_at_the_lr_of_the_definitions(run):
    arguments, minimum = run
    engine = Oracle(minimum)
    scheduler = AutoWU(sgd(), **(RANGE | arguments), gp=engine)
    epoch, total = arguments["steps_per_epoch"], arguments["steps_per_epoch"] * arguments["total_epochs"]
    phases, lrs = [], []
    for _ in range(total + 5):
        phases.append(scheduler.phase)
        lrs += advance(scheduler, [1.0])

    def warmup(position):
        held = position // epoch * epoch if arguments["warmup_unit"] == "epoch" else position
        axis = int(arguments["max_warmup_fraction"] * total)
        return warmup_lr(held, axis, 1e-5, 1.0, arguments["warmup_type"])

    switch = scheduler.switch
    start = switch.step if arguments["immediate_cooldown"] else phases.index("cooldown")
    assert lrs[: switch.step] == pytest.approx([warmup(k) for k in range(switch.step)], rel=1e-12)
    assert switch.lr == lrs[switch.step] == warmup(switch.minimum)
    assert lrs[switch.step : start + 1] == [switch.lr] * (start + 1 - switch.step)
    factors = [cooldown_factor((k - start) / (total - start), arguments["cooldown_type"]) for k in range(start, total)]
    assert lrs[start:total] == pytest.approx([switch.lr * f for f in factors], rel=1e-12)
    assert lrs[total:] == [lrs[total - 1]] * 5
    assert lrs[total - 1] > 0
    assert all(a >= b for a, b in pairwise(lrs[switch.step :]))

    assert phases == [
        *["warmup"] * switch.step,
        *["stable"] * (start - switch.step),
        *["cooldown"] * (total - start),
        *["done"] * 5,
    ]
    assert arguments["immediate_cooldown"] or abs(start - max(switch.step, (1 - arguments["cooldown_fraction"]) * total)) < 1
    assert engine.asked_at[-1] == switch.step


@pytest.mark.parametrize(  # quick are all values of each; the LR of every step is that of the definitions in any combination, above
    ("warmup_type", "cooldown_type", "immediate"),
    [
        pytest.param(*combination, marks=[] if k % 5 == 0 else [pytest.mark.slow])
        for k, combination in enumerate(product(WARMUP_TYPES, COOLDOWN_TYPES, [True, False]))
    ],
)
def test_a_whole_run_on_a_curve_with_a_minimum(warmup_type, cooldown_type, immediate):
    arguments = RANGE | {"warmup_type": warmup_type, "cooldown_type": cooldown_type, "immediate_cooldown": immediate}
    scheduler = AutoWU(sgd(), 20, 30, **arguments)
    lrs = advance(scheduler, v_curve(600, lowest=150))
    switch = scheduler.switch
    assert switch.by_test
    assert switch.minimum == pytest.approx(150, abs=15)
    assert 150 < switch.step < 250
    assert 0.95 < switch.probability <= 1
    assert lrs[switch.step] == max(lrs[switch.step :]) == switch.lr
    assert lrs[switch.step] < lrs[switch.step - 1]
    assert 0 < lrs[-1] < 0.06 * switch.lr


def test_the_switch_comes_with_the_third_test_past_the_minimum():
    engine = Oracle(0.52)
    scheduler = AutoWU(sgd(), total_steps=200, **RANGE, test_interval=10, gp=engine)
    advance(scheduler, [1.0] * 200)
    assert engine.asked_at == [10, 20, 30, 40, 50, 60, 70, 80]
    assert (scheduler.switch.step, scheduler.switch.by_test) == (80, True)
    assert scheduler.switch.minimum == pytest.approx(52)
    assert scheduler.switch.lr == pytest.approx(1e-5 * 1e5**0.52)


@pytest.mark.parametrize(("patience", "step"), [(1, 60), (2, 70), (4, 90)])
def test_patience_is_the_number_of_tests_in_a_row(patience, step):
    scheduler = AutoWU(sgd(), total_steps=200, **(RANGE | {"patience": patience}), test_interval=10, gp=Oracle(0.52))
    advance(scheduler, [1.0] * 200)
    assert scheduler.switch.step == step


def test_a_higher_confidence_switches_later():
    def switch_step(confidence):
        scheduler = AutoWU(sgd(), total_steps=600, **RANGE, confidence=confidence)
        advance(scheduler, v_curve(600, lowest=150, noise=0.3))
        return scheduler.switch.step

    assert switch_step(0.6) < switch_step(0.9999999)


@pytest.mark.parametrize("immediate", [True, False])
def test_a_warmup_at_its_limit_goes_back_to_the_lr_of_the_fitted_minimum(immediate):
    # Three votes cannot be had: two tests, at 100 and at the limit.
    scheduler = AutoWU(
        sgd(),
        total_steps=400,
        **RANGE | {"immediate_cooldown": immediate},
        cooldown_fraction=0.6,
        test_interval=100,
        gp=Oracle(0.3),
    )
    lrs = advance(scheduler, [1.0] * 400)
    limit = 200 if immediate else 160
    assert (scheduler.switch.step, scheduler.switch.by_test) == (limit, False)
    assert lrs[limit - 1] == pytest.approx(1e-5 * 1e5 ** ((limit - 1) / 200))
    assert lrs[limit] == pytest.approx(1e-5 * 1e5**0.3)


def test_a_loss_that_only_falls_ends_the_warmup_at_its_limit_near_the_top():
    scheduler = AutoWU(sgd(), total_steps=400, **RANGE)
    lrs = advance(scheduler, np.linspace(2, 1, 400) + 0.01 * np.random.default_rng(0).normal(size=400))
    assert (scheduler.switch.step, scheduler.switch.by_test) == (200, False)
    assert lrs[200] == pytest.approx(1.0, rel=0.1)


def test_total_steps_is_the_same_run_as_its_counts():
    curve = v_curve(300, lowest=80)
    lrs = [advance(AutoWU(sgd(), *counts, **kw), curve) for counts, kw in (((10, 30), {}), ((), {"total_steps": 300}))]
    assert lrs[0] == lrs[1]


@pytest.mark.parametrize("total", [150, 178, 182, 400, 2000])
def test_about_sixty_tests_by_default(total):
    engine = Oracle(2.0)
    advance(AutoWU(sgd(), total_steps=total, gp=engine), [1.0] * total)
    assert 35 <= len(engine.asked_at) <= 90


def test_a_test_an_epoch_and_at_the_limit():
    engine = Oracle(2.0)
    advance(AutoWU(sgd(), 15, 7, test_interval="epoch", gp=engine), [1.0] * 105)
    assert engine.asked_at == [15, 30, 33]


def test_lr_at_tells_the_future():
    curve = v_curve(300, lowest=80)
    scheduler = AutoWU(sgd(), 10, 30, **STABLE)
    lrs = advance(scheduler, curve[:140])
    assert scheduler.phase == "stable"
    foretold = [scheduler.lr_at(k) for k in range(140, 310)]
    assert advance(scheduler, [*curve[140:], *[1.0] * 10]) == foretold
    assert lrs == [scheduler.lr_at(k) if k >= scheduler.switch.step else lrs[k] for k in range(140)]


@pytest.mark.parametrize("immediate", [True, False])
def test_lr_at_remembers_the_past(immediate):
    scheduler = AutoWU(sgd(), total_steps=400, **RANGE | {"immediate_cooldown": immediate})
    lrs = advance(scheduler, v_curve(400, lowest=110))
    assert scheduler.switch.by_test
    assert [scheduler.lr_at(k) for k in range(400)] == lrs


def test_get_last_lr_is_what_the_optimizer_has():
    scheduler = AutoWU(sgd(groups=[{"params": [parameter()]}, {"params": [parameter()], "lr": 0.02}]), total_steps=100)
    for loss in v_curve(110, lowest=25):
        assert scheduler.get_last_lr() == [g["lr"] for g in scheduler.optimizer.param_groups]
        advance(scheduler, [loss])


# ---------------------------------------------------------------- the stable phase


def test_decay_phase_factor_acts_after_every_epoch():
    scheduler = AutoWU(sgd(), 10, 40, **STABLE, decay_phase_factor=0.9, test_interval="epoch", gp=Oracle(0.25))
    lrs = advance(scheduler, [1.0] * 400)
    step, peak = scheduler.switch.step, scheduler.switch.lr
    assert lrs[step:320] == pytest.approx([peak * 0.9 ** (j // 10) for j in range(320 - step)], rel=1e-12)
    assert all(a >= b for a, b in pairwise(lrs[step:]))
    assert lrs[320:] == pytest.approx([lrs[320] * cooldown_factor(j / 80, "cosine") for j in range(80)], rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_that_of_torch_on_the_same_epoch_means(seed):
    epoch, rng = 10, np.random.default_rng(seed)
    scheduler = AutoWU(
        sgd(),
        epoch,
        100,
        **STABLE,
        decay_phase_stat="loss",
        decay_phase_factor=0.5,
        test_interval="epoch",
        gp=Oracle(0.1),
    )
    advance(scheduler, [1.0] * 500)
    assert scheduler.switch.step == 80  # tests at 60, 70 and 80 are past step 50
    twin = sgd(lr=scheduler.switch.lr)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(twin, factor=0.5, patience=5, threshold=1e-4)
    for _ in range(42):  # the losses that the run has seen since the switch
        twin.step()
        plateau.step(1.0)
    lrs, expected = [], []
    for level in np.concatenate([np.linspace(1, 0.8, 10), np.full(19, 0.8)]):
        losses = level + 0.02 * rng.normal(size=epoch)
        lrs += advance(scheduler, losses)
        expected += [twin.param_groups[0]["lr"]] * epoch
        twin.step()
        plateau.step(losses.mean())
    assert lrs == pytest.approx(expected, rel=1e-12)
    assert lrs[-1] < lrs[0] < scheduler.switch.lr


# ---------------------------------------------------------------- what a loss may be


AS_LOSS = {
    "float": float,
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "numpy array": np.array,
    "numpy array of one element": lambda v: np.array([v], dtype=np.float32),
    "float64": lambda v: torch.tensor(v, dtype=torch.float64),
    "float32": lambda v: torch.tensor(v, dtype=torch.float32),
    "float16": lambda v: torch.tensor(v, dtype=torch.float16),
    "bfloat16": lambda v: torch.tensor(v, dtype=torch.bfloat16),
    "one element": lambda v: torch.tensor([v]),
    "one element, two dimensions": lambda v: torch.tensor([[v]]),
    "with graph": lambda v: torch.tensor(v, requires_grad=True) * 1.0,
    "one element with graph": lambda v: torch.tensor([v], requires_grad=True) * 1.0,
}


# Values that every one of the types holds exactly, to some steps after the switch.
EXACT = torch.from_numpy(v_curve(300, lowest=60)).bfloat16().tolist()[:150]


@functools.cache
def run_on_floats():
    scheduler = AutoWU(sgd(), total_steps=300)
    lrs = advance(scheduler, EXACT)
    assert scheduler.switch.by_test
    assert scheduler.switch.step < 140
    return scheduler.switch, lrs


@pytest.mark.parametrize("convert", AS_LOSS.values(), ids=AS_LOSS)
def test_decisions_do_not_depend_on_how_a_loss_is_passed(convert):
    scheduler = AutoWU(sgd(), total_steps=300)
    lrs = advance(scheduler, [convert(v) for v in EXACT])
    assert (scheduler.switch, lrs) == run_on_floats()


def test_the_graph_of_a_loss_is_not_kept():
    weight = parameter()
    scheduler = AutoWU(sgd(groups=[weight]), total_steps=100)
    hidden = weight * 2.0
    loss = hidden.square().sum()  # the graph keeps `hidden` for its backward pass
    alive = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert alive() is not None
    advance(scheduler, [loss])
    del loss
    gc.collect()
    assert alive() is None


def test_a_loss_changed_in_place_after_the_step_does_not_count():
    curve = v_curve(300, lowest=80)
    plain, scheduler = (AutoWU(sgd(), total_steps=300) for _ in range(2))
    buffer = torch.empty((), dtype=torch.float64)
    for value in curve:
        buffer.fill_(value)
        advance(scheduler, [buffer])
        buffer.fill_(math.nan)
    advance(plain, curve)
    assert scheduler.switch == plain.switch


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.tensor([1.0, 2.0]), ValueError, r"\(2,\): pass the mean loss"),
        (torch.tensor([]), ValueError, r"\(0,\): pass the mean loss"),
        (torch.tensor(3), TypeError, "int64: pass the training loss"),
        (torch.tensor(True), TypeError, "bool: pass the training loss"),
        (torch.tensor(1j), TypeError, "complex64: pass the training loss"),
        (3, TypeError, "loss=3: pass the training loss"),
        (True, TypeError, "loss=True: pass the training loss"),
        ("0.3", TypeError, "loss='0.3': pass the training loss"),
        ([0.3], TypeError, r"loss=\[0.3\]: pass the training loss"),
        (np.array([0.3, 0.2]), TypeError, "pass the training loss"),
    ],
)
def test_a_bad_loss_says_what_to_pass_and_changes_nothing(loss, error, message):
    scheduler = AutoWU(sgd(), total_steps=100)
    advance(scheduler, [1.0, 2.0])
    before = (scheduler.last_epoch, scheduler.history.steps, scheduler.get_last_lr())
    with pytest.raises(error, match=message):
        scheduler.step(loss)
    assert (scheduler.last_epoch, scheduler.history.steps, scheduler.get_last_lr()) == before


# ---------------------------------------------------------------- decisions


SCALES = [(1e4, -1e6), (1e-6, 0.0), (1e6, 0.0), (1.0, 1e6), (1.0, -1e6), (1e-3, 7.0)]


@pytest.mark.parametrize(
    ("engine", "factor", "shift"),
    [
        pytest.param(engine, *scale, marks=pytest.mark.slow if engine == "gpytorch" and scale != SCALES[0] else ())
        for engine in ("closed-form", "gpytorch")
        for scale in SCALES
    ],
)
def test_decisions_do_not_depend_on_scale_and_shift(factor, shift, engine):
    assert switch_of(engine, factor, shift) == switch_of(engine)


@functools.cache
def switch_of(engine, factor=1.0, shift=0.0):
    scheduler = AutoWU(sgd(), total_steps=400, gp=engine, test_interval=None if engine == "closed-form" else 15)
    advance(scheduler, factor * v_curve(400, lowest=60)[:200] + shift)
    assert scheduler.switch.by_test
    return scheduler.switch.step, scheduler.switch.lr


ANY_SCALE = given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.floats(-1e6, 1e6))


def assert_decisions_are_alike(seed, factor, shift):
    curve = v_curve(200, lowest=50, seed=seed, noise=0.1)[:120]
    plain, scheduler, shifted = (AutoWU(sgd(), total_steps=200, rollback=False) for _ in range(3))
    expected = advance(plain, curve)
    assert plain.switch is not None
    assert advance(scheduler, factor * curve) == expected
    assert advance(shifted, curve + shift) == expected


test_decisions_do_not_depend_on_some_scale_and_shift = settings(max_examples=6)(ANY_SCALE(assert_decisions_are_alike))
test_decisions_do_not_depend_on_any_scale_and_shift = pytest.mark.slow(
    settings(max_examples=25)(ANY_SCALE(assert_decisions_are_alike))
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_single_losses_that_are_not_finite_are_left_out(bad, caplog):
    curve = v_curve(400, lowest=110)
    curve[5:200:7] = bad
    scheduler = AutoWU(sgd(), total_steps=400, **RANGE)
    with caplog.at_level(logging.WARNING, logger="autowu"):
        advance(scheduler, curve)
    assert scheduler.switch.by_test
    assert scheduler.switch.minimum == pytest.approx(110, abs=15)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "not finite" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 1e300])
def test_a_run_that_blows_up_switches_to_the_minimum_before(bad):
    curve = v_curve(400, lowest=110)
    curve[120:] = bad
    scheduler = AutoWU(sgd(), total_steps=400, **RANGE)
    lrs = advance(scheduler, curve)
    assert scheduler.switch.by_test
    assert 120 < scheduler.switch.step <= 140
    assert scheduler.switch.minimum == pytest.approx(110, abs=15)
    assert 0 < lrs[-1] < lrs[scheduler.switch.step]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_that_blows_up_while_its_loss_falls_stops_the_warmup(bad):
    curve = v_curve(400, lowest=150)
    curve[100:] = bad
    scheduler = AutoWU(sgd(), total_steps=400, **RANGE, test_interval=5)
    advance(scheduler, curve)
    assert (scheduler.switch.step, scheduler.switch.by_test) == (115, True)
    assert scheduler.switch.minimum == pytest.approx(100, abs=5)


@pytest.mark.parametrize(
    ("lr", "expected", "losses"),
    [
        pytest.param(lr, expected, losses, id=f"{name}-{lr}", marks=[] if name == "nan" or lr == 0.1 else [pytest.mark.slow])
        for name, losses in {"nan": [math.nan], "inf": [math.inf, -math.inf], "constant": [0.5]}.items()
        for lr, expected in ((0.1, 0.1), (50.0, 1.0), (0.0, 1e-5))
    ],
)
def test_a_run_without_a_curve_falls_back_to_the_lr_of_the_optimizer(losses, lr, expected, caplog):
    scheduler = AutoWU(sgd(lr), total_steps=200, **RANGE)
    with caplog.at_level(logging.WARNING, logger="autowu"):
        lrs = advance(scheduler, losses * (200 // len(losses)))
    switch = scheduler.switch
    assert (switch.step, switch.lr, switch.probability, switch.minimum, switch.by_test) == (100, expected, None, None, False)
    assert lrs[100] == expected
    assert scheduler.phase == "done"
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2  # of the fit, and of the LR that nothing has tested
    assert "could not be fitted" in caplog.text


def test_a_fit_that_fails_is_survived_and_reported_once(caplog):
    scheduler = AutoWU(sgd(), total_steps=200, **RANGE, gp=Broken())
    with caplog.at_level(logging.WARNING, logger="autowu"):
        lrs = advance(scheduler, v_curve(200, lowest=40))
    assert [event.kind for event in scheduler.events] == ["fit", "switch", "peak"]
    assert "the covariance is not positive definite" in caplog.text
    assert lrs[100] == 0.1
    assert scheduler.phase == "done"


def test_a_fit_that_fails_once_costs_one_test():
    engine = BrokenOnce(0.05)
    scheduler = AutoWU(sgd(), total_steps=200, **RANGE, test_interval=10, gp=engine)
    advance(scheduler, [1.0] * 200)
    assert (scheduler.switch.step, scheduler.switch.by_test) == (40, True)


@pytest.mark.parametrize("engine", [ClosedFormGP(lengthscale=0.15), GPyTorchGP(lengthscale=0.15, num_subsamples=1)])
def test_an_engine_object_is_used_as_it_is(engine):
    scheduler = AutoWU(sgd(), total_steps=400, **RANGE, test_interval=30, gp=engine)
    advance(scheduler, v_curve(400, lowest=110))
    assert scheduler.gp is engine
    assert scheduler.switch.minimum == pytest.approx(110, abs=20)


def test_the_seed_is_that_of_the_draws():
    def last_probability(seed):
        scheduler = AutoWU(sgd(), total_steps=500, **RANGE, gp="gpytorch", seed=seed, test_interval=125)
        advance(scheduler, v_curve(130, lowest=110, noise=0.3))
        return scheduler.decision.probability

    assert last_probability(1) == last_probability(1)
    assert last_probability(1) != last_probability(2)


def test_the_published_preset():
    scheduler = AutoWU.paper(sgd(), 20, 15)
    assert [scheduler.lr_at(k) for k in (0, 75)] == pytest.approx([1e-5, 1e-5 * 1e5**0.5])
    assert isinstance(scheduler.gp, PublishedGP)
    advance(scheduler, v_curve(300, lowest=75))
    start = scheduler.switch.step
    assert start % 20 == 0
    assert scheduler.switch.minimum == pytest.approx(75, abs=15)
    assert len(scheduler.decision.minima) == 5
    cosine = [scheduler.switch.lr * cooldown_factor((k - start) / (300 - start), "cosine") for k in range(start, 300)]
    assert [scheduler.lr_at(k) for k in range(start, 300)] == pytest.approx(cosine, rel=1e-12)


def test_the_published_preset_takes_overrides():
    scheduler = AutoWU.paper(sgd(), 20, 30, max_lr=4.0, gp="closed-form", immediate_cooldown=False, seed=3)
    assert isinstance(scheduler.gp, ClosedFormGP)
    assert (scheduler.config.min_lr, scheduler.config.max_lr, scheduler.config.immediate_cooldown) == (1e-5, 4.0, False)


# ---------------------------------------------------------------- what can be read, and what is logged


def test_one_line_at_the_switch(caplog):
    scheduler = AutoWU(sgd(), total_steps=300, **RANGE)
    with caplog.at_level(logging.INFO, logger="autowu"):
        advance(scheduler, v_curve(310, lowest=80))
    assert [(r.name, r.levelname) for r in caplog.records] == [("autowu", "INFO")]
    assert f"step {scheduler.switch.step} of 300" in caplog.text
    assert f"{scheduler.switch.lr:.4g}" in caplog.text


def test_repr_tells_where_the_run_is():
    scheduler = AutoWU(sgd(), total_steps=200, **RANGE, test_interval=10, gp=Oracle(0.52))
    advance(scheduler, [1.0] * 7)
    assert all(part in repr(scheduler) for part in ("AutoWU(", "'warmup'", "7/200", "1e-05", "'cosine'"))
    advance(scheduler, [1.0] * 100)
    assert all(part in repr(scheduler) for part in ("'cooldown'", "107/200", "step=80", f"{scheduler.switch.lr:.4g}"))


def test_switch_is_none_during_the_warmup():
    scheduler = AutoWU(sgd(), total_steps=100)
    assert (scheduler.switch, scheduler.phase) == (None, "warmup")


def test_is_a_scheduler_of_torch():
    assert issubclass(AutoWU, torch.optim.lr_scheduler.LRScheduler)


def test_the_order_of_the_two_steps_is_checked_by_torch():
    scheduler = AutoWU(sgd(), total_steps=100)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step(1.0)


# ---------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("immediate", [True, False])
def test_the_ratios_of_the_groups_are_kept(immediate):
    groups = [
        {"params": [parameter()], "lr": 0.02},
        {"params": [parameter()]},
        {"params": [parameter()], "lr": 0.2, "lr_scale": 0.25},
    ]
    scheduler = AutoWU(sgd(lr=0.1, groups=groups), total_steps=300, **RANGE | {"immediate_cooldown": immediate})
    seen = set()
    for loss in v_curve(310, lowest=80):
        seen.add(scheduler.phase)
        largest = scheduler.lr_at(scheduler.last_epoch)
        lrs = [g["lr"] for g in scheduler.optimizer.param_groups]
        assert lrs == pytest.approx([0.2 * largest, largest, 0.5 * largest], rel=1e-12)
        advance(scheduler, [loss])
    assert seen == {"warmup", "cooldown", "done"} | (set() if immediate else {"stable"})


def test_layer_decay_of_timm_is_kept():
    import timm
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(timm.create_model("test_vit", num_classes=2), opt="sgd", lr=0.1, layer_decay=0.5)
    scales = [g["lr_scale"] for g in optimizer.param_groups]
    assert min(scales) < 0.3
    assert max(scales) == 1.0
    scheduler = AutoWU(optimizer, total_steps=100, **RANGE)
    for loss in v_curve(100, lowest=25):
        largest = scheduler.lr_at(scheduler.last_epoch)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([s * largest for s in scales], rel=1e-12)
        advance(scheduler, [loss])


def test_a_tensor_lr_is_updated_in_place():
    lr = torch.tensor(0.1)
    groups = [{"params": [parameter()]}, {"params": [parameter()], "lr": torch.tensor(0.05)}]
    scheduler = AutoWU(torch.optim.SGD(groups, lr=lr), total_steps=200, **RANGE)
    held = [g["lr"] for g in scheduler.optimizer.param_groups]
    curve = v_curve(210, lowest=50)
    lrs = advance(scheduler, curve)
    assert all(g["lr"] is h for g, h in zip(scheduler.optimizer.param_groups, held, strict=True))
    assert lrs == pytest.approx(advance(AutoWU(sgd(), total_steps=200, **RANGE), curve), rel=1e-6)
    assert float(held[1]) == pytest.approx(0.5 * float(held[0]))


def test_a_group_added_later_follows_the_schedule():
    scheduler = AutoWU(sgd(lr=0.1), total_steps=300, **RANGE)
    curve = v_curve(310, lowest=80)
    advance(scheduler, curve[:50])
    optimizer = scheduler.optimizer
    optimizer.add_param_group({"params": [parameter()]})
    optimizer.add_param_group({"params": [parameter()], "lr": optimizer.param_groups[0]["lr"] / 10})
    for loss in curve[50:]:
        advance(scheduler, [loss])
        first = optimizer.param_groups[0]["lr"]
        assert [g["lr"] for g in optimizer.param_groups[1:]] == pytest.approx([first, first / 10])
        assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])
def test_a_late_group_of_the_default_lr_runs_at_the_first_groups(number):
    groups = [{"params": [parameter()], "lr": number(0.01)}, {"params": [parameter()]}]
    scheduler = AutoWU(sgd(lr=number(0.1), groups=groups), total_steps=300, **RANGE)
    advance(scheduler, [1.0] * 5)
    scheduler.optimizer.add_param_group({"params": [parameter()]})
    advance(scheduler, [1.0])
    first, early, late = (float(g["lr"]) for g in scheduler.optimizer.param_groups)
    assert early == pytest.approx(10 * first)
    assert late == first


# ---------------------------------------------------------------- flat starts


def switches_on_noise(seed, **arguments):
    """Whether a run whose loss is flat, with noise, over more than half of its warm-up ends it there."""
    scheduler = AutoWU(sgd(), total_steps=400, rollback=False, **RANGE, **arguments)
    advance(scheduler, (2.3 + 0.05 * np.random.default_rng(seed).standard_normal(110)).tolist())
    return scheduler.switch is not None


@pytest.mark.parametrize("seeds", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_noise_on_a_flat_start_is_no_minimum(seeds):
    assert any(switches_on_noise(seed, min_contrast=0.0) for seed in range(60))
    assert not any(switches_on_noise(seed) for seed in range(seeds))


# ---------------------------------------------------------------- saving and loading


def saved_and_loaded(scheduler, other, path):
    torch.save({"optimizer": scheduler.optimizer.state_dict(), "scheduler": scheduler.state_dict()}, path)
    state = torch.load(path, weights_only=True)
    other.optimizer.load_state_dict(state["optimizer"])
    other.load_state_dict(state["scheduler"])
    return other


OTHER = {"total_steps": 77, "min_lr": 1e-3, "max_lr": 3.0, "cooldown_type": "sqrt", "warmup_type": "linear", "patience": 1}


def two_groups():
    return sgd(groups=[{"params": [parameter()]}, {"params": [parameter()], "lr": 0.03}])


def assert_go_on_alike(scheduler, other, losses):
    assert other.phase == scheduler.phase
    assert other.get_last_lr() == scheduler.get_last_lr()
    for loss in losses:
        advance(scheduler, [loss])
        advance(other, [loss])
        assert [g["lr"] for g in other.optimizer.param_groups] == [g["lr"] for g in scheduler.optimizer.param_groups]
        assert other.phase == scheduler.phase
    assert other.switch == scheduler.switch
    assert repr(other) == repr(scheduler)


# Before any test, within votes, just before and after the switch, in the stable phase, in the cooldown, at the end.
CUTS = [0, 1, 9, 50, 77, 80, 81, 82, 83, 109, 142, 170, 250, 299, 305]


@pytest.mark.parametrize(
    ("stat", "cut"),
    [
        pytest.param(stat, cut, marks=[] if stat or cut in (50, 109, 250) else [pytest.mark.slow])
        for stat in (None, "loss")
        for cut in CUTS
    ],
)
def test_a_saved_run_goes_on_as_if_never_stopped(cut, stat, tmp_path):
    arguments = {**STABLE, "decay_phase_stat": stat, "decay_phase_factor": 0.7}
    scheduler = AutoWU(two_groups(), 6, 50, **arguments)
    # The switch comes at step 82, then epochs of one mean. The end of an epoch has a lower one: no part may get lost.
    curve = np.concatenate([v_curve(82, lowest=70), np.tile([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], 80)])
    advance(scheduler, curve[:cut])
    other = saved_and_loaded(scheduler, AutoWU(two_groups(), **OTHER, gp="gpytorch"), tmp_path / "state.pt")
    assert_go_on_alike(scheduler, other, curve[cut : cut + 100])
    assert scheduler.switch.step == 82


def test_a_run_saved_twice_on_the_way_is_the_run_in_one_piece(tmp_path):
    curve = v_curve(4000, lowest=900)
    whole, scheduler = (AutoWU(sgd(), total_steps=4000, **RANGE) for _ in range(2))
    expected = advance(whole, curve)
    lrs = advance(scheduler, curve[:1030])
    for start, stop in ((1030, 1500), (1500, 4000)):
        scheduler = saved_and_loaded(scheduler, AutoWU(sgd(lr=0.7), **OTHER), tmp_path / "state.pt")
        lrs += advance(scheduler, curve[start:stop])
    assert lrs == expected
    assert scheduler.switch.by_test


@pytest.mark.parametrize(
    ("make", "cut", "more"),
    [
        pytest.param(
            lambda: AutoWU(two_groups(), 20, 20, **RANGE, gp="gpytorch", seed=4, test_interval=20),
            *(130, 100),
            id="gpytorch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: AutoWU.paper(two_groups(), 20, 20, seed=4), 10, 100, id="paper, before a test", marks=pytest.mark.slow
        ),
        pytest.param(lambda: AutoWU.paper(two_groups(), 20, 20, seed=4), 50, 32, id="paper, between tests"),
        pytest.param(
            lambda: AutoWU.paper(two_groups(), 20, 20, seed=4), 130, 100, id="paper, over a switch", marks=pytest.mark.slow
        ),
    ],
)
def test_a_saved_run_goes_on_with_gpytorch(make, cut, more, tmp_path):
    curve = v_curve(400, lowest=110, noise=0.2)
    scheduler = make()
    advance(scheduler, curve[:cut])
    other = saved_and_loaded(scheduler, AutoWU(two_groups(), **OTHER), tmp_path / "state.pt")
    assert_go_on_alike(scheduler, other, curve[cut : cut + more])
    np.testing.assert_array_equal(other.posterior.mean, scheduler.posterior.mean)


@pytest.mark.parametrize("cut", [30, 96, 250])
def test_a_group_added_later_is_saved_too(cut, tmp_path):
    scheduler, other = AutoWU(sgd(), total_steps=300, **RANGE), AutoWU(two_groups(), **OTHER)
    curve = v_curve(400, lowest=80)
    advance(scheduler, curve[:20])
    scheduler.optimizer.add_param_group({"params": [parameter()], "lr": scheduler.optimizer.param_groups[0]["lr"] / 4})
    advance(scheduler, curve[20:cut])
    assert_go_on_alike(scheduler, saved_and_loaded(scheduler, other, tmp_path / "state.pt"), curve[cut : cut + 100])


def test_the_order_of_loading_does_not_matter():
    scheduler = AutoWU(sgd(), total_steps=300, **RANGE)
    advance(scheduler, v_curve(150, lowest=80))
    other = AutoWU(sgd(), **OTHER)
    other.load_state_dict(scheduler.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]
    other.optimizer.load_state_dict(scheduler.optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]


def test_loading_does_not_tie_the_two_runs():
    scheduler, other = AutoWU(sgd(), total_steps=300, **RANGE), AutoWU(sgd(), **OTHER)
    curve = v_curve(400, lowest=80)
    advance(scheduler, curve[:50])
    state = scheduler.state_dict()
    advance(scheduler, [9.0] * 100)
    other.load_state_dict(state)
    lrs = advance(other, curve[50:300])
    assert lrs == advance(AutoWU(sgd(), total_steps=300, **RANGE), curve[:300])[50:]


def test_the_state_of_another_scheduler_is_refused():
    optimizer = sgd()
    step_lr = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(ValueError, match="AutoWU"):
        AutoWU(sgd(), total_steps=100).load_state_dict(step_lr.state_dict())


@pytest.mark.parametrize(("key", "value", "named"), [("class", "StepLR", "class='StepLR'"), ("version", 99, "version=99")])
def test_a_state_of_another_class_or_version_is_refused(key, value, named):
    scheduler = AutoWU(sgd(), total_steps=100)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=named):
        scheduler.load_state_dict(AutoWU(sgd(), total_steps=50).state_dict() | {key: value})
    assert scheduler.state_dict()["config"] == before["config"]


def test_the_state_of_a_users_engine_needs_one_like_it():
    state = AutoWU(sgd(), total_steps=100, gp=Oracle(0.5)).state_dict()
    scheduler = AutoWU(sgd(), **OTHER)
    with pytest.raises(ValueError, match=r"gp=.*Oracle"):
        scheduler.load_state_dict(state)
    assert scheduler.config.total_steps == 77
    other = AutoWU(sgd(), **OTHER, gp=Oracle(0.5))
    other.load_state_dict(state)
    assert other.config.total_steps == 100


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda s: pickle.loads(pickle.dumps(s))}


@pytest.mark.parametrize(  # that an engine is copied either way is a quick test in test_gpytorch_engine.py
    ("arguments", "cut", "copied"),
    [
        *(pytest.param({}, cut, copied, id=f"{cut}-{name}") for cut in (1, 60, 130, 290) for name, copied in COPIES.items()),
        pytest.param({"gp": "gpytorch", "test_interval": 30}, 100, COPIES["pickle"], id="gpytorch-pickle"),
        pytest.param(
            {"gp": "gpytorch", "test_interval": 30}, 100, COPIES["deepcopy"], id="gpytorch-deepcopy", marks=pytest.mark.slow
        ),
    ],
)
def test_copies_go_on_alike_and_apart(arguments, cut, copied):
    scheduler = AutoWU(sgd(), total_steps=300, **RANGE, **arguments)
    curve = v_curve(400, lowest=80)
    advance(scheduler, curve[:cut])
    other = copied(scheduler)
    assert other.optimizer is not scheduler.optimizer
    lr = scheduler.optimizer.param_groups[0]["lr"]
    lrs = advance(other, curve[cut : cut + 100])
    assert scheduler.optimizer.param_groups[0]["lr"] == lr
    assert advance(scheduler, curve[cut : cut + 100]) == lrs


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"steps_per_epoch": -3}, "steps_per_epoch=-3"),
        ({"steps_per_epoch": 2.5}, r"steps_per_epoch=2\.5"),
        ({"steps_per_epoch": True}, "steps_per_epoch=True"),
        ({"steps_per_epoch": None}, "steps_per_epoch=None"),
        ({"total_epochs": 0}, "total_epochs=0"),
        ({"total_epochs": "20"}, "total_epochs='20'"),
        ({"total_epochs": None}, "total_epochs=None"),
        ({"total_steps": 100}, "total_steps=100"),
        ({"steps_per_epoch": None, "total_epochs": None, "total_steps": 0}, "total_steps=0"),
        ({"steps_per_epoch": None, "total_epochs": None, "total_steps": 1e3}, r"total_steps=1000\.0"),
        ({"min_lr": 0.0}, r"min_lr=0\.0"),
        ({"min_lr": -1e-3}, r"min_lr=-0\.001"),
        ({"min_lr": math.nan}, "min_lr=nan"),
        ({"min_lr": "1e-5"}, "min_lr='1e-5'"),
        ({"max_lr": 0.0}, r"max_lr=0\.0"),
        ({"max_lr": math.inf}, "max_lr=inf"),
        ({"min_lr": 0.5, "max_lr": 0.5}, r"min_lr=0\.5.*max_lr=0\.5"),
        ({"min_lr": 0.5, "max_lr": 0.1}, r"min_lr=0\.5.*max_lr=0\.1"),
        ({"max_warmup_fraction": 0.0}, r"max_warmup_fraction=0\.0"),
        ({"max_warmup_fraction": 1.5}, r"max_warmup_fraction=1\.5"),
        ({"max_warmup_fraction": math.nan}, "max_warmup_fraction=nan"),
        ({"max_warmup_fraction": 1.0, "immediate_cooldown": True}, r"max_warmup_fraction=1\.0"),
        ({"max_warmup_fraction": 0.001}, r"max_warmup_fraction=0\.001"),
        ({"cooldown_fraction": 0.0}, r"cooldown_fraction=0\.0"),
        ({"cooldown_fraction": 1.0}, r"cooldown_fraction=1\.0"),
        ({"cooldown_fraction": "0.2"}, r"cooldown_fraction='0\.2'"),
        ({"cooldown_type": "cos"}, "cooldown_type='cos'.*'cosine'.*'half_cosine'.*'linear'.*'sqrt'"),
        ({"cooldown_type": None}, "cooldown_type=None"),
        ({"warmup_type": "exponential"}, "warmup_type='exponential'.*'exp'.*'linear'"),
        ({"warmup_unit": "batch"}, "warmup_unit='batch'.*'step'.*'epoch'"),
        ({"decay_phase_stat": "accuracy", "immediate_cooldown": False}, "decay_phase_stat='accuracy'.*'loss'"),
        ({"decay_phase_factor": 0.0, "immediate_cooldown": False}, r"decay_phase_factor=0\.0"),
        ({"decay_phase_factor": 1.1, "immediate_cooldown": False}, r"decay_phase_factor=1\.1"),
        ({"decay_phase_stat": "loss", "immediate_cooldown": False}, r"decay_phase_factor=1\.0"),
        ({"decay_phase_factor": 0.5, "immediate_cooldown": True}, r"decay_phase_factor=0\.5.*immediate_cooldown"),
        ({"stable_type": "sqrt", "immediate_cooldown": False}, "stable_type='sqrt'.*'constant'.*'inverse_sqrt'"),
        ({"stable_type": "inverse_sqrt", "immediate_cooldown": True}, "stable_type='inverse_sqrt'.*immediate_cooldown"),
        ({"test_interval": 0}, "test_interval=0"),
        ({"test_interval": 2.0}, r"test_interval=2\.0"),
        ({"test_interval": "day"}, "test_interval='day'.*'epoch'"),
        ({"patience": 0}, "patience=0"),
        ({"patience": 1.0}, r"patience=1\.0"),
        ({"confidence": 0.5}, r"confidence=0\.5"),
        ({"confidence": 1.0}, r"confidence=1\.0"),
        ({"confidence": None}, "confidence=None"),
        ({"immediate_cooldown": "no"}, "immediate_cooldown='no'"),
        ({"gp": "exact"}, "gp='exact'.*'closed-form'.*'gpytorch'"),
        ({"gp": 3}, "gp=3"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"seed": 0.5}, r"seed=0\.5"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"optimizer": [parameter()]}, r"optimizer\[0\]="),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named_with_its_value(arguments, named):
    good = {"optimizer": sgd(), "steps_per_epoch": 10, "total_epochs": 20}
    with pytest.raises((ValueError, TypeError), match=named):
        AutoWU(**(good | arguments))


@pytest.mark.parametrize("argument", ["warmup_unit", "test_interval"])
def test_epochs_need_their_length(argument):
    with pytest.raises(ValueError, match=f"{argument}='epoch'.*steps_per_epoch"):
        AutoWU(sgd(), total_steps=100, **{argument: "epoch"})


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        AutoWU(sgd(), 10, 20, True)


def test_a_bad_argument_leaves_the_optimizer_as_it_was():
    optimizer = sgd(lr=0.1)
    with pytest.raises(ValueError, match="patience"):
        AutoWU(optimizer, 10, 20, patience=0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"immediate_cooldown": True, "cooldown_type": "cosine", "device": torch.device("cpu")},
        {"immediate_cooldown": False, "cooldown_type": "cosine", "cooldown_fraction": 0.2, "device": "cpu"},
    ],
)
def test_the_published_calls(arguments):
    train_loader, total_epochs = range(20), 15
    scheduler = AutoWU(sgd(), len(train_loader), total_epochs, **arguments)
    advance(scheduler, [torch.tensor(v, dtype=torch.float32) for v in v_curve(300, lowest=60)])
    assert scheduler.switch.by_test
    assert scheduler.phase == "done"


@pytest.mark.parametrize("total", [2, 3, 5, 12, 25])
def test_the_shortest_runs_go_through(total):
    scheduler = AutoWU(sgd(), total_steps=total, **RANGE)
    lrs = advance(scheduler, v_curve(total, lowest=max(1, total // 4)))
    assert scheduler.phase == "done"
    assert all(1e-5 * 1e-3 < lr <= 1.0 for lr in lrs)


# ---------------------------------------------------------------- training, and accelerators


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_trains_a_network_on_digits(seed):
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoWU(optimizer, total_steps=300)
    for _ in range(300):
        batch = torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.phase == "done"
    assert scheduler.switch.by_test
    assert (model(images).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_steps_without_a_test_never_wait_for_the_device():
    losses = torch.from_numpy(np.geomspace(2, 0.5, 3000)).float().cuda()
    scheduler = AutoWU(sgd(), total_steps=3000, test_interval=1250, rollback=False)
    limit = scheduler.config.warmup_limit
    advance(scheduler, losses[:1])
    assert scheduler.history.device.type == "cuda"
    for start, end in ((1, limit - 1), (limit + 20, 2999)):  # the first block after the switch is read in its own time
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(scheduler, losses[start:end])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        advance(scheduler, losses[end : end + 21] if end < limit else losses[end:])
    assert scheduler.phase == "done"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_decisions_are_the_same_on_the_device():
    curve = v_curve(600, lowest=90)
    on_host, on_device, moved = (AutoWU(sgd(), total_steps=600, device=d) for d in (None, None, "cuda"))
    expected = advance(on_host, curve)
    lrs = advance(on_device, torch.from_numpy(curve).cuda()), advance(moved, curve)
    assert on_host.switch.by_test
    for scheduler, ours in zip((on_device, moved), lrs, strict=True):  # after the switch the watch of a GPU's losses is in blocks
        assert scheduler.switch == pytest.approx(on_host.switch, rel=1e-9)
        assert ours[: on_host.switch.step] == expected[: on_host.switch.step]


@pytest.mark.parametrize("read", [False, True])
def test_a_warm_up_of_a_dozen_steps_goes_back_too(read):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = AutoWU(optimizer, total_steps=30, model=torch.nn.ParameterList([weight]), peak_factor=1.0)
    for step, loss in enumerate([2.0, 1.9, 1.6, 1.1, 0.7, 0.9, 3.0, 20.0, 60.0], 1):  # the limit, before a test has 10 losses
        with torch.no_grad():
            weight.fill_(step)
        optimizer.step()
        scheduler.step(loss)
        if read:
            scheduler.history.total()  # folds it
    assert scheduler.switch is not None
    # Copies are held of steps 5 and 6, the last with a loss no higher than the mean so far; the LR of step 6 is above the peak.
    assert weight.item() == 5
    assert f"model and optimizer are back at step {weight.item():.0f}" in scheduler.events[-1].message


def test_the_papers_preset_goes_back_only_with_a_model():
    model = torch.nn.Linear(2, 1)
    for options, goes_back in (({}, False), ({"model": None}, False), ({"model": model}, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert AutoWU.paper(optimizer, 10, 10, gp="closed-form", **options).config.rollback is goes_back


def test_a_short_run_is_told_the_least_number_of_steps_of_which_nothing_more_is_said(caplog):
    def said(steps):
        caplog.clear()
        AutoWU(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]), total_steps=steps)
        return re.findall(r"train for (\d+) steps or more", caplog.text)

    least = {said(steps)[0] for steps in (3, 10, 30, 60, 78)}
    assert len(least) == 1
    assert said(int(*least)) == []
    assert said(int(*least) - 1) == [*least]


def test_a_warm_up_that_an_explosion_ends_with_a_vote_was_not_ended_by_test():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = AutoWU(optimizer, total_steps=300, patience=1, test_interval=3, rollback=False)
    losses = [2 - step / 60 for step in range(60)]
    for loss in [*losses, math.nan, math.nan, math.nan]:
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.events[0].kind == "explosion"
    assert not scheduler.switch.by_test


def test_a_model_of_which_the_optimizer_trains_nothing_is_told_of(caplog):
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*other.parameters()], lr=0.1)
    assert AutoWU(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=300, model=model).events == []
    assert AutoWU(torch.optim.SGD([model.weight], lr=0.1), total_steps=300, model=model).events == []
    assert AutoWU(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=300, model=torch.nn.ReLU()).events == []
    (event,) = AutoWU(optimizer, total_steps=300, model=model).events
    assert (event.kind, event.step) == ("model", 0)
    assert "model=Linear: the optimizer has none of its parameters" in event.message
    assert event.message in caplog.text


@pytest.mark.parametrize(("given", "reason"), [("without", "takes the model="), ("another", "has none of that shape")])
def test_a_state_whose_copy_does_not_fit_is_told_of_as_it_is_loaded(given, reason):
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 3)
    scheduler = AutoWU(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=300, model=model)
    advance(scheduler, np.linspace(2, 1, 40))
    state = scheduler.state_dict()
    assert state["snapshot"] is not None
    fits = AutoWU(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=300, model=model)
    fits.load_state_dict(state)
    assert fits.events == []
    trained = model if given == "without" else other
    loaded = AutoWU(torch.optim.SGD(trained.parameters(), lr=0.1), total_steps=300, model=None if given == "without" else other)
    loaded.load_state_dict(state)
    (event,) = loaded.events
    assert (event.kind, event.step) == ("snapshot", 40)
    assert reason in event.message
    advance(loaded, np.linspace(1, 0.5, 40))  # it goes on, and is copied again
    assert loaded.state_dict()["snapshot"]["newer"]["step"] > 40
