"""The GPyTorch engine: the closed form's fit by another road, a kernel of the user's own, draws and state that can be repeated."""

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from curves import curve_of, valley

from autowu.gp import ClosedFormGP, LossCurveGP
from autowu.gpytorch_engine import GPyTorchGP, PublishedGP
from autowu.switching import probability_past_minimum

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # gpytorch's dependencies still use TorchScript
    import gpytorch

ARRAYS = ("grid", "mean", "variance", "difference_variance")


def assert_same(posterior, other):
    """Bit for bit."""
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(posterior, name), getattr(other, name))
    assert (posterior.end, posterior.num_losses) == (other.end, other.num_losses)


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CURVES = list(itertools.product([0.05, 0.1, 0.2, 0.5], [30, 100], [0.03, 0.3]))
QUICK = [(0.05, 30, 0.03), (0.2, 100, 0.03), (0.5, 100, 0.3)]


@pytest.mark.parametrize(
    ("lengthscale", "n", "noise"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CURVES]
)
def test_the_fit_is_that_of_the_closed_form(lengthscale, n, noise):
    curve = curve_of(valley(n, noise), warmup_steps=120)
    ours = ClosedFormGP(lengthscale).posterior(curve)
    theirs = GPyTorchGP(lengthscale=lengthscale).posterior(curve)
    assert theirs.mean.shape == theirs.variance.shape == theirs.difference_variance.shape == (5, 500)
    np.testing.assert_allclose(theirs.grid, ours.grid)
    deviation = np.sqrt(ours.variance[0])
    for s in range(5):  # with so few losses the five subsamples are the same set
        assert (np.abs(theirs.mean[s] - ours.mean[0]) < 0.01 * deviation).all()
        np.testing.assert_allclose(np.sqrt(theirs.variance[s]), deviation, rtol=0.01)
        spread = ours.difference_variance[0]
        np.testing.assert_allclose(theirs.difference_variance[s], spread, rtol=0.02, atol=1e-4 * spread.max())
    np.testing.assert_allclose(probability_past_minimum(theirs), probability_past_minimum(ours)[0], atol=1e-3)
    assert theirs.end == pytest.approx(n / 120)
    assert theirs.num_losses == n


def test_subsamples_of_a_long_curve_differ_and_agree_with_all_losses():
    curve = curve_of(valley(3000, noise=0.5), max_points=None)
    ours = ClosedFormGP(0.2).posterior(curve)
    theirs = GPyTorchGP(lengthscale=0.2, num_subsamples=4, posterior_size=300).posterior(curve)
    assert theirs.mean.shape == (4, 500)
    assert len(np.unique(theirs.mean[:, 100])) == 4
    assert (np.abs(theirs.mean - ours.mean) < 5 * np.sqrt(theirs.variance)).all()
    assert theirs.variance.mean() > 2 * ours.variance.mean()


@pytest.mark.parametrize("change", [lambda y: 1e-6 * y, lambda y: 1e6 * y, lambda y: y + 1e6, lambda y: y - 1e6])
def test_scale_and_shift_of_the_loss_do_not_matter(change):
    losses = valley(120, noise=0.3)[:83]
    plain = GPyTorchGP().posterior(curve_of(losses, 120))
    changed = GPyTorchGP().posterior(curve_of(change(losses), 120))
    np.testing.assert_allclose(probability_past_minimum(changed), probability_past_minimum(plain), atol=1e-4)
    np.testing.assert_allclose(changed.grid[changed.mean.argmin(1)], plain.grid[plain.mean.argmin(1)], atol=0.002)


def test_a_kernel_with_a_prior():
    def kernel(concentration):
        prior = gpytorch.priors.GammaPrior(concentration, 1000.0)
        return gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5, lengthscale_prior=prior))

    curve = curve_of(valley(80, noise=0.03))
    # The priors hold the length-scale at a few hundredths and at about 0.5.
    rough, smooth = (GPyTorchGP(kernel(c)).posterior(curve) for c in (20.0, 500.0))
    assert np.abs(np.diff(rough.mean[0], 2)).mean() > 5 * np.abs(np.diff(smooth.mean[0], 2)).mean()
    assert smooth.grid[smooth.mean[0].argmin()] == pytest.approx(0.6, abs=0.05)


def test_the_users_kernel_is_not_changed():
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
    before = copy.deepcopy(kernel.state_dict())
    engine = GPyTorchGP(kernel)
    first = engine.posterior(curve_of(valley(60)))
    assert before.keys() == kernel.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in kernel.state_dict().items())
    assert_same(engine.posterior(curve_of(valley(60))), first)


@pytest.mark.parametrize("engine_of", [GPyTorchGP, pytest.param(PublishedGP, marks=pytest.mark.slow)])  # both draw alike
def test_a_seed_fixes_the_draws(engine_of):
    curve, sizes = curve_of(valley(400)), {"num_subsamples": 2, "fit_size": 80, "posterior_size": 120}
    torch.manual_seed(1)
    first = engine_of(seed=4, **sizes).posterior(curve)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert_same(engine_of(seed=4, **sizes).posterior(curve), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = engine_of(seed=5, **sizes).posterior(curve)
    assert not np.array_equal(other.mean, first.mean)


@pytest.mark.parametrize("engine_of", [GPyTorchGP, pytest.param(PublishedGP, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("way", "tests_before"), [("state_dict", 0), ("state_dict", 2), ("pickle", 2), ("deepcopy", 2)])
def test_a_restored_engine_goes_on_bit_for_bit(engine_of, way, tests_before):
    losses = valley(700)
    curves = [curve_of(losses[:n], 700) for n in (150, 300, 600, 650)]
    engine = engine_of(lengthscale=0.2, num_subsamples=3, fit_size=80, posterior_size=120, seed=9)
    for curve in curves[:tests_before]:
        engine.posterior(curve)
    if way == "state_dict":
        restored = engine_of(seed=1)
        restored.load_state_dict(saved_and_loaded(engine.state_dict()))
    elif way == "pickle":
        restored = pickle.loads(pickle.dumps(engine))
    else:
        restored = copy.deepcopy(engine)
    assert repr(restored) == repr(engine)
    expected = [engine.posterior(curve) for curve in curves[2:]]
    for curve, posterior in zip(curves[2:], expected, strict=True):
        assert_same(restored.posterior(curve), posterior)


def test_a_saved_state_does_not_change_with_the_engine():
    curves = [curve_of(valley(n), 90) for n in (30, 60, 90)]
    engine = PublishedGP(num_subsamples=2)
    engine.posterior(curves[0])
    state = engine.state_dict()
    expected = engine.posterior(curves[1])
    engine.posterior(curves[2])
    restored = PublishedGP()
    restored.load_state_dict(state)
    assert_same(restored.posterior(curves[1]), expected)


def test_the_published_fit_carries_over_and_the_default_one_does_not():
    early, late = curve_of(valley(90)[:50], 90), curve_of(valley(90), 90)
    for engine_of in (GPyTorchGP, PublishedGP):
        engine = engine_of(num_subsamples=2)
        engine.posterior(early)
        after, fresh = engine.posterior(late), engine_of(num_subsamples=2).posterior(late)
        assert np.allclose(after.mean, fresh.mean, rtol=1e-6) == (engine_of is GPyTorchGP)


def test_the_published_fit_starts_short_of_the_maximum_on_losses_as_they_are():
    losses = valley(90)
    small, large = (PublishedGP(lengthscale=0.2).posterior(curve_of(s * losses)) for s in (0.01, 1.0))
    assert probability_past_minimum(small)[0] < 0.95 < probability_past_minimum(large)[0]
    assert (large.difference_variance >= 1e-4 * (1 - 1e-9)).all()


def test_a_kernel_survives_pickle_and_state_dict_asks_for_it():
    curve = curve_of(valley(60))
    engine = GPyTorchGP(gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel()))
    copied = pickle.loads(pickle.dumps(engine))
    assert_same(copied.posterior(curve), engine.posterior(curve))
    with pytest.raises(ValueError, match="kernel"):
        GPyTorchGP().load_state_dict(engine.state_dict())
    with pytest.raises(ValueError, match="kernel"):
        engine.load_state_dict(GPyTorchGP().state_dict())


def test_losses_that_are_not_finite_are_missing_at_their_positions():
    losses = valley(100)
    losses[[0, 20, 21, 50]] = [math.nan, math.inf, -math.inf, math.nan]
    losses = np.append(losses, [math.nan] * 5)
    curve = curve_of(losses, 120)
    ours, theirs = ClosedFormGP(0.2).posterior(curve), GPyTorchGP(lengthscale=0.2).posterior(curve)
    assert theirs.num_losses == ours.num_losses == 96
    assert theirs.end == pytest.approx(ours.end)
    assert theirs.end == pytest.approx(100 / 120)
    assert (np.abs(theirs.mean - ours.mean) < 0.01 * np.sqrt(ours.variance)).all()


def test_published_positions_run_over_all_steps_so_far():
    losses = [*valley(90, noise=0.01), *[math.nan] * 10]
    posterior = PublishedGP(lengthscale=0.2).posterior(curve_of(losses, 200))
    assert posterior.num_losses == 90
    assert posterior.grid[-1] == pytest.approx(99 / 200)  # the last step taken
    lowest = posterior.grid[posterior.mean.argmin(1)]
    np.testing.assert_allclose(lowest, 0.6 * 90 / 200, atol=0.02)


def test_exploding_losses_do_not_hide_the_minimum():
    curve = curve_of([*valley(90)[:85], 50.0, 1e4, 1e10, 1e30])
    ours, theirs = ClosedFormGP(0.2).posterior(curve), GPyTorchGP(lengthscale=0.2).posterior(curve)
    assert (np.abs(theirs.mean - ours.mean) < 0.01 * np.sqrt(ours.variance)).all()
    assert probability_past_minimum(theirs)[0] > 0.999


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("engine_of", [GPyTorchGP, PublishedGP])
def test_losses_without_noise_can_be_fitted(noise, engine_of):
    curve = curve_of(valley(300, noise))
    posterior = engine_of(lengthscale=0.2, num_subsamples=2).posterior(curve)
    assert posterior.grid[posterior.mean[0].argmin()] == pytest.approx(0.6, abs=0.01)
    assert probability_past_minimum(posterior)[0] > 0.99


@pytest.mark.parametrize("losses", [[math.nan, math.inf], [1.0], [2.5] * 50], ids=str)
@pytest.mark.parametrize("engine_of", [GPyTorchGP, PublishedGP])
def test_nothing_to_fit(losses, engine_of):
    with pytest.raises(ValueError, match="nothing to fit"):
        engine_of().posterior(curve_of(losses, 100))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_subsamples": 0},
        {"fit_size": 1},
        {"posterior_size": 1},
        {"lengthscale": 0.0},
        {"lengthscale": -1.0},
        {"lengthscale": math.nan},
    ],
    ids=str,
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        GPyTorchGP(**arguments)


def test_it_is_an_engine_that_wants_every_loss():
    assert isinstance(GPyTorchGP(), LossCurveGP)
    assert GPyTorchGP.max_points is None


@pytest.mark.slow  # warnings are errors in the quick tests, too, but those of a first import
def test_no_warning_escapes():
    program = """
from autowu.gpytorch_engine import GPyTorchGP, PublishedGP
from autowu.history import LossHistory
history = LossHistory(max_points=None)
for k in range(50):
    history.append(abs(k - 30) / 50)
for engine in (GPyTorchGP(num_subsamples=1), PublishedGP(num_subsamples=1)):
    engine.posterior(history.curve(60))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
