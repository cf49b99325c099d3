"""History to curve to posterior to decision to verdict, with no model and no optimizer."""

import math

import numpy as np
import pytest
import torch

from autowu.config import ARGUMENTS, checked, configure
from autowu.events import EventLog
from autowu.gp import ClosedFormGP
from autowu.history import MISSING
from autowu.judge import Judge, engine
from autowu.phases import State
from autowu.ranks import Ranks
from autowu.switching import decide

OPTIMIZER = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
GIVEN = dict.fromkeys(ARGUMENTS) | {
    "optimizer": OPTIMIZER,
    "total_steps": 400,
    "immediate_cooldown": True,
    "cooldown_type": "linear",
    "cooldown_fraction": 0.5,
    "max_warmup_fraction": 0.5,
    "warmup_type": "exp",
    "warmup_unit": "step",
    "stable_type": "constant",
    "decay_phase_factor": 1.0,
    "patience": 2,
    "confidence": 0.95,
    "min_contrast": 6.0,
    "min_rise": 0.2,
    "peak_factor": 1.0,
    "gp": "closed-form",
    "seed": 0,
    "watch": True,
    "rollback": True,
}


def config_of(**arguments):
    return configure(checked(GIVEN | arguments))


def judge_of(losses, gp=None, **arguments):
    config, ranks = config_of(**arguments), Ranks()
    judge = Judge(config, gp or ClosedFormGP(0.1), None, ranks, EventLog(ranks))
    for loss in losses:
        judge.history.append(loss)
    return config, judge


def judged(judge, config, state, step, sound=None, flag=False):
    return judge.test(config, state, step, sound=sound, flag=flag)


def valley(steps, lowest=60, noise=0.01):
    return (1 + np.abs(np.arange(steps) / lowest - 1) + noise * np.random.default_rng(0).normal(size=steps)).tolist()


def test_a_verdict_is_what_the_pure_parts_make_of_the_losses():
    losses = valley(120)
    config, judge = judge_of(losses)
    found, heard = judged(judge, config, State(votes=1), 120)
    rule = {"confidence": 0.95, "patience": 2, "min_contrast": 6.0, "min_rise": 0.2, "reach": 0.2}  # a fifth of five decades
    expected = decide(ClosedFormGP(0.1).posterior(judge.history.curve(200)), 1, **rule)
    assert judge.decision == expected
    assert (found.switch, found.votes, found.probability) == (True, 2, expected.probability)
    assert found.minimum == pytest.approx(60, abs=3)
    assert found.lr == pytest.approx(config.min_lr * (config.max_lr / config.min_lr) ** expected.edges[0])
    assert (judge.last, heard.sound, heard.flagged) == (found, True, False)


def test_the_four_verdicts_before_the_last_are_kept_and_saved():
    config, judge = judge_of(valley(60))
    found = [judged(judge, config, State(), 60)[0]]
    for step in range(61, 67):
        judge.history.append(1.0 + step / 100)
        found.append(judged(judge, config, State(), step)[0])
    assert (judge.before, judge.last) == (tuple(found[-5:-1]), found[-1])
    _, other = judge_of([])
    other.load_state_dict(judge.state_dict())
    assert other.before == judge.before


def test_a_fit_that_fails_is_no_verdict_and_the_last_one_stays():
    config, judge = judge_of(valley(80))
    last, _ = judged(judge, config, State(), 80)
    judge.gp = None  # raises in the fit, as any engine may
    assert [judged(judge, config, State(), 80)[0] for _ in range(3)] == [None] * 3
    assert judge.last == last
    assert [event.kind for event in judge._log.events] == ["fit"]


@pytest.mark.parametrize(
    ("interval", "votes"),
    [([MISSING] * 3, 2), ([math.nan] * 3, 3), ([MISSING, math.nan, MISSING], 3), ([math.inf] * 3, 3), ([0.1] * 3, 0)],
)
def test_an_interval_without_any_loss_is_no_evidence_and_one_without_a_finite_one_is_a_vote(interval, votes):
    config, judge = judge_of(np.linspace(2, 1, 60), patience=9)  # falls: no test would vote
    judged(judge, config, State(), 60)
    for loss in interval:
        judge.history.append(loss)
    found, _ = judged(judge, config, State(votes=2), 63)
    assert (found.switch, found.votes) == (False, votes)


def test_votes_that_the_patience_is_reached_by_are_not_counted_again_without_a_loss():
    config, judge = judge_of([*valley(120), *[MISSING] * 5])
    found, _ = judged(judge, config, State(votes=2), 125)
    assert (found.switch, found.votes) == (False, 2)


@pytest.mark.parametrize("every", [3, 20])
def test_a_loss_that_repeats_is_one_loss(every):
    losses = valley(120)
    passed = [losses[k // every * every] for k in range(120)]
    once = [loss if k % every == 0 else MISSING for k, loss in enumerate(passed)]
    curves = []
    for given in (passed, once):
        config, judge = judge_of([])
        for start, stop in ((0, 50), (50, 90), (90, 120)):  # tests in the middle of the repeats
            for loss in given[start:stop]:
                judge.history.append(loss)
            judged(judge, config, State(), stop)
            _, other = judge_of([])
            other.load_state_dict(judge.state_dict())
            judge = other
        curves.append(judge.history.curve(200))
    for name in ("counts", "sums", "squares"):
        assert torch.equal(getattr(curves[0], name), getattr(curves[1], name))


def test_losses_that_repeat_are_not_told_as_missing():
    config, judge = judge_of(np.repeat(valley(60), 2))
    judged(judge, config, State(), 120)
    assert judge._log.events == []


def test_too_few_losses_are_no_trouble_of_the_fit():
    config, judge = judge_of([MISSING] * 9 + [1.0])
    assert judged(judge, config, State(), 10)[0] is None
    assert judge._log.events == []
    config, judge = judge_of([math.nan] * 10)
    assert judged(judge, config, State(), 10)[0] is None
    assert [event.kind for event in judge._log.events] == ["fit"]


def test_losses_that_are_not_finite_are_told_once():
    config, judge = judge_of([*valley(60), math.nan, math.inf])
    for _ in range(2):
        judged(judge, config, State(), 62)
    assert [event.message for event in judge._log.events] == [
        "2 of 62 losses were missing or not finite; they are left out of the fit"
    ]


def test_what_a_rank_says_of_its_weights_comes_back():
    config, judge = judge_of(valley(60))
    heard = [
        judged(judge, config, State(), 60, sound=torch.tensor([sound]), flag=flag)[1] for sound, flag in ((1.0, True), (0.0, False))
    ]
    assert [(each.sound, each.flagged) for each in heard] == [(True, True), (False, False)]


def test_a_loaded_judge_comes_to_the_same_verdict():
    config, judge = judge_of(valley(100))
    judged(judge, config, State(), 100)
    _, other = judge_of([], gp=ClosedFormGP(0.3))
    other.load_state_dict(judge.state_dict())
    assert (other.last, other.decision, repr(other.gp)) == (judge.last, judge.decision, repr(judge.gp))
    np.testing.assert_array_equal(other.posterior.mean, judge.posterior.mean)
    for which in (judge, other):
        which.history.append(1.7)
    assert judged(other, config, State(), 101) == judged(judge, config, State(), 101)


def test_the_length_scale_of_an_engine_that_is_named_is_half_a_decade_of_lr():
    config = config_of(min_lr=1e-4, max_lr=1.0)
    assert engine("closed-form", config, 0).lengthscale == pytest.approx(0.5 / 4)
    assert engine("gpytorch", config, 0).lengthscale == pytest.approx(0.5 / 4)
    assert engine("closed-form", config_of(warmup_type="linear"), 0).lengthscale == 0.2
    assert engine("closed-form", config_of(min_lr=1e-30, max_lr=1e10), 0).lengthscale == 0.02
    own = ClosedFormGP(0.07)
    assert engine(own, config, 0) is own
