"""The closed form against a dense GP written out in NumPy, against GPyTorch, and under changes that must not matter."""

import math
import warnings

import numpy as np
import pytest
import torch
from curves import curve_of, valley
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from autowu.gp import MIN_LENGTHSCALE, ClosedFormGP, features, fit_closed_form, summarize
from autowu.history import LossHistory
from autowu.switching import probability_past_minimum

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # gpytorch's dependencies still use TorchScript
    import gpytorch

LENGTHSCALES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def rbf(x, x2, lengthscale):
    return np.exp(-0.5 * ((x[:, None] - x2[None, :]) / lengthscale) ** 2)


def dense_log_likelihood(x, y, lengthscale, constant, outputscale, noise):
    covariance = outputscale * rbf(x, x, lengthscale) + noise * np.eye(len(x))
    factor = cho_factor(covariance, lower=True)
    residual = y - constant
    log_det = 2 * np.log(np.diag(factor[0])).sum()
    return -0.5 * (residual @ cho_solve(factor, residual) + log_det + len(x) * math.log(2 * math.pi))


def dense_posterior(curve, grid, lengthscale):
    """Mean and variance of the noise-free curve f on the grid, and variance of f(K) - f(grid), at the fitted hyperparameters."""
    constant, outputscale, noise = fitted(curve, lengthscale)
    x, y = (t.numpy() for t in curve.finite())
    covariance = outputscale * rbf(x, x, lengthscale) + noise * np.eye(len(x))
    cross = outputscale * rbf(grid, x, lengthscale)
    mean = constant + cross @ np.linalg.solve(covariance, y - constant)
    posterior = outputscale * rbf(grid, grid, lengthscale) - cross @ np.linalg.solve(covariance, cross.T)
    variance = posterior.diagonal()
    return mean, variance, variance + variance[-1] - 2 * posterior[-1]


def fitted(curve, lengthscale):
    """Constant, outputscale and noise of the maximum."""
    fit = fit_closed_form(summarize(curve, lengthscale))
    return fit.constant, fit.outputscale, fit.noise


@pytest.mark.parametrize("lengthscale", LENGTHSCALES)
@pytest.mark.parametrize("n", [2, 20, 300])
def test_log_likelihood_is_that_of_the_dense_gp(lengthscale, n):
    curve = curve_of(valley(n))
    fit = fit_closed_form(summarize(curve, lengthscale))
    x, y = (t.numpy() for t in curve.finite())
    expected = dense_log_likelihood(x, y, lengthscale, fit.constant, fit.outputscale, fit.noise)
    assert fit.log_likelihood == pytest.approx(expected, rel=1e-7, abs=1e-6)


@pytest.mark.parametrize("lengthscale", LENGTHSCALES)
@pytest.mark.parametrize("n", [20, 300])
def test_posterior_is_that_of_the_dense_gp(lengthscale, n):
    curve = curve_of(valley(n), warmup_steps=n + n // 2)
    posterior = ClosedFormGP(lengthscale).posterior(curve)
    mean, variance, difference = dense_posterior(curve.clipped(), posterior.grid, lengthscale)
    assert (posterior.grid[0], posterior.grid[-1], posterior.end) == (0.0, pytest.approx(2 / 3), pytest.approx(2 / 3))
    np.testing.assert_allclose(posterior.mean[0], mean, rtol=1e-7)
    np.testing.assert_allclose(posterior.variance[0], variance, rtol=2e-6)
    np.testing.assert_allclose(posterior.difference_variance[0], difference, atol=2e-6 * difference.max())
    assert posterior.difference_variance[0, -1] == 0
    assert posterior.num_losses == n


@pytest.mark.parametrize("lengthscale", [0.02, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("noise", [0.03, 0.1, 1.0])
def test_no_other_hyperparameters_are_more_likely(lengthscale, noise):
    curve = curve_of(valley(60, noise))
    fit = fit_closed_form(summarize(curve, lengthscale))
    x, y = (t.numpy() for t in curve.finite())

    def negative(theta):
        return -dense_log_likelihood(x, y, lengthscale, theta[0], *np.exp(theta[1:]))

    starts = [(y.mean(), math.log(s2), math.log(v)) for s2, v in ((0.01, 0.3), (0.3, 0.003), (0.3, 0.3), (10.0, 0.003))]
    bounds = [(None, None), (-9, 7), (-9, 3)]
    best = max(-minimize(negative, start, method="L-BFGS-B", bounds=bounds).fun for start in starts)
    assert fit.log_likelihood > best - 2e-4


def test_fitted_noise_and_curve_are_those_that_the_losses_were_drawn_with():
    rng = np.random.default_rng(3)
    x = np.arange(800) / 800
    draw = 2.0 * np.linalg.cholesky(rbf(x, x, 0.05) + 1e-9 * np.eye(800)) @ rng.normal(size=800)
    constant, outputscale, noise = fitted(curve_of(7 + draw + 0.3 * rng.normal(size=800)), 0.05)
    assert math.sqrt(noise) == pytest.approx(0.3, rel=0.1)
    assert math.sqrt(outputscale) == pytest.approx(2.0, rel=0.5)
    assert constant == pytest.approx(7, abs=3)


@pytest.mark.parametrize("lengthscale", [0.05, 0.2, 1.0])
def test_gpytorch_agrees_at_the_same_hyperparameters(lengthscale):
    n = 120
    curve = curve_of(valley(n))
    fit = fit_closed_form(summarize(curve, lengthscale))
    posterior = ClosedFormGP(lengthscale).posterior(curve)
    x, y = curve.finite()

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, inputs):
            return gpytorch.distributions.MultivariateNormal(self.mean(inputs), self.kernel(inputs))

    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive())
    model = Model(likelihood).double()
    model.mean.constant.data.fill_(fit.constant)
    model.kernel.outputscale = fit.outputscale
    model.kernel.base_kernel.lengthscale = lengthscale
    likelihood.noise = fit.noise

    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    with torch.no_grad():
        per_loss = marginal(model(x), y).item()
        model.eval()
        f = model(torch.from_numpy(posterior.grid))
        mean, covariance = f.mean.numpy(), f.covariance_matrix.numpy()
    assert fit.log_likelihood == pytest.approx(per_loss * n, rel=1e-8)
    variance = covariance.diagonal()
    difference = variance + variance[-1] - 2 * covariance[-1]
    np.testing.assert_allclose(posterior.mean[0], mean, rtol=1e-7)
    np.testing.assert_allclose(posterior.variance[0], variance, rtol=1e-6)
    np.testing.assert_allclose(posterior.difference_variance[0, :-1], difference[:-1], rtol=1e-5, atol=1e-7 * difference.max())


@given(lengthscale=st.floats(MIN_LENGTHSCALE, 100.0), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_features_reproduce_the_rbf_kernel(lengthscale, seed):
    x = np.concatenate([[0.0, 1.0], np.random.default_rng(seed).random(198)])
    phi = features(x, lengthscale)
    np.testing.assert_allclose(phi @ phi.T, rbf(x, x, lengthscale), atol=1e-9)


@given(log_scale=st.floats(-6, 6), shift=st.floats(-1e6, 1e6))
@settings(deadline=None, max_examples=40)
def test_scale_and_shift_of_the_loss_do_not_matter(log_scale, shift):
    losses = valley(120, noise=0.3)[:83]
    plain = ClosedFormGP().posterior(curve_of(losses, 120))
    probability = probability_past_minimum(plain)[0]
    assert 0.6 < probability < 0.9  # open, so that it could move either way
    scale = 10**log_scale
    for changed in (scale * losses, losses + shift, scale * (losses + shift)):
        posterior = ClosedFormGP().posterior(curve_of(changed, 120))
        assert probability_past_minimum(posterior)[0] == pytest.approx(probability, rel=1e-6)
        assert posterior.mean.argmin() == plain.mean.argmin()


@given(missing=st.sets(st.integers(0, 79), max_size=77), value=st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(deadline=None, max_examples=50)
def test_losses_that_are_not_finite_are_missing_at_their_positions(missing, value):
    losses = valley(80)
    finite = np.array([i for i in range(80) if i not in missing])
    x, y = finite / 100, losses[finite]
    losses[sorted(missing)] = value
    curve = curve_of(losses, warmup_steps=100)
    fit = fit_closed_form(summarize(curve, 0.2))
    hyperparameters = (fit.constant, fit.outputscale, fit.noise)
    assert fit.log_likelihood == pytest.approx(dense_log_likelihood(x, y, 0.2, *hyperparameters), rel=1e-6, abs=1e-5)
    posterior = ClosedFormGP(0.2).posterior(curve)
    assert posterior.num_losses == len(finite)
    assert posterior.end == pytest.approx((finite[-1] + 1) / 100)


def test_posterior_with_missing_losses_is_that_of_the_dense_gp_on_the_others():
    losses = valley(80)
    losses[[0, 7, 8, 9, 30, 77, 78, 79]] = [math.inf, math.nan, math.nan, -math.inf, math.nan, math.inf, math.inf, math.nan]
    curve = curve_of(losses, warmup_steps=100)
    posterior = ClosedFormGP(0.2).posterior(curve)
    finite = np.isfinite(losses)
    x, y = (t.numpy() for t in curve.finite())
    np.testing.assert_allclose(x, np.flatnonzero(finite) / 100)
    np.testing.assert_allclose(y, losses[finite])
    mean, variance, _ = dense_posterior(curve.clipped(), posterior.grid, 0.2)
    np.testing.assert_allclose(posterior.mean[0], mean, rtol=1e-7)
    np.testing.assert_allclose(posterior.variance[0], variance, rtol=1e-6)
    assert posterior.end == 0.77


@pytest.mark.parametrize("lengthscale", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("n", [2050, 3001, 20_000])
def test_binned_losses_give_the_posterior_of_the_single_ones(n, lengthscale):
    losses = valley(n, noise=0.5)
    single = ClosedFormGP(lengthscale).posterior(curve_of(losses, max_points=None))
    binned = ClosedFormGP(lengthscale).posterior(curve_of(losses, max_points=2048))
    deviation = np.sqrt(single.variance)
    assert (np.abs(binned.mean - single.mean) < 0.03 * deviation).all()
    np.testing.assert_allclose(np.sqrt(binned.variance), deviation, rtol=0.01)
    assert probability_past_minimum(binned)[0] == pytest.approx(probability_past_minimum(single)[0], abs=1e-3)
    assert binned.grid[binned.mean.argmin()] == pytest.approx(single.grid[single.mean.argmin()], abs=0.004)
    assert binned.num_losses == single.num_losses == n


def test_binned_losses_are_summarized_as_the_single_ones():
    losses = valley(20_000, noise=0.5)
    single, binned = (summarize(curve_of(losses, max_points=m), 0.1) for m in (None, 2048))
    assert (binned.count, binned.anchor) == (single.count, single.anchor)
    assert binned.loss_sum == pytest.approx(single.loss_sum, rel=1e-12)
    assert binned.loss_squares == pytest.approx(single.loss_squares, rel=1e-12)


def test_exploding_losses_do_not_hide_the_minimum():
    losses = valley(100)
    exploded = np.concatenate([losses[:90], [1e3, 1e10, 1e20, 1e30]])
    plain = ClosedFormGP().posterior(curve_of(losses[:94], 120))
    posterior = ClosedFormGP().posterior(curve_of(exploded, 120))
    assert posterior.grid[posterior.mean.argmin()] == pytest.approx(plain.grid[plain.mean.argmin()], abs=0.02)
    assert probability_past_minimum(posterior)[0] > 0.999


def test_clipped_points_lie_as_far_above_the_start_as_the_lowest_lies_below():
    losses = [2.0] * 10 + [1.5, 0.5, math.nan, 3.4, 3.6, 1e30]
    positions, clipped = curve_of(losses).clipped().finite()
    np.testing.assert_allclose(clipped, [2.0] * 10 + [1.5, 0.5, 3.4, 3.5, 3.5])
    np.testing.assert_allclose(positions, [i / 16 for i in range(16) if i != 12])


def test_clipped_bins_count_and_square_as_if_every_loss_in_them_were_clipped():
    losses = [2.0] * 30 + [1.0, 1.0] + [1e8] * 4
    clipped = curve_of(losses, max_points=18).clipped()  # bins of two
    by_hand = curve_of([*losses[:32], 3.0, 3.0, 3.0, 3.0], max_points=18)
    for name in ("sums", "squares", "counts"):
        torch.testing.assert_close(getattr(clipped, name), getattr(by_hand, name))


def test_a_curve_without_outliers_is_not_clipped():
    curve = curve_of(valley(300))
    clipped = curve.clipped()
    for name in ("positions", "sums", "squares", "counts"):
        assert torch.equal(getattr(clipped, name), getattr(curve, name))


def test_clipping_never_raises_and_never_moves_the_lowest_point():
    for losses in ([math.nan], [1.0], [math.inf, 2.0, 1.0], [math.nan] * 12 + [3.0, 1.0, 9.0]):
        curve = curve_of(losses)
        before, after = curve.finite()[1], curve.clipped().finite()[1]
        assert len(before) == len(after)
        assert torch.equal(before.sort().values[:1], after.sort().values[:1])


@pytest.mark.parametrize(
    "losses", [[math.nan], [1.0], [1.0, math.nan], [2.5] * 50, [1e6] * 50, [math.inf, 0.1, 0.1, math.nan]], ids=str
)
def test_nothing_to_fit(losses):
    with pytest.raises(ValueError, match=r"a fit needs 2|nothing to fit"):
        ClosedFormGP().posterior(curve_of(losses, warmup_steps=100))


@pytest.mark.parametrize("losses", [[2.0, 1.0], [1.0, 2.0], [1.0] * 20 + [2.0] * 20], ids=["fall", "rise", "step"])
def test_any_two_losses_that_differ_can_be_fitted(losses):
    posterior = ClosedFormGP().posterior(curve_of(losses, warmup_steps=100))
    assert posterior.num_losses == len(losses)
    assert np.isfinite(posterior.mean).all()
    assert np.isfinite(posterior.variance).all()


@pytest.mark.parametrize("lengthscale", [0.0, -0.1, 0.0199, math.inf, math.nan])
def test_lengthscale_out_of_range(lengthscale):
    with pytest.raises(ValueError, match="lengthscale"):
        ClosedFormGP(lengthscale)


def test_state_dict_carries_the_lengthscale():
    engine = ClosedFormGP(0.3)
    engine.load_state_dict(ClosedFormGP(0.15).state_dict())
    assert repr(engine) == "ClosedFormGP(lengthscale=0.15)"


def test_the_fit_draws_nothing_at_random():
    curve = curve_of(valley(3000))
    first, state = ClosedFormGP().posterior(curve), torch.random.get_rng_state()
    second = ClosedFormGP().posterior(curve)
    assert np.array_equal(first.mean, second.mean)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_device_to_host_read_per_posterior():
    history = LossHistory()
    for loss in torch.tensor(valley(200), device="cuda"):
        history.append(loss)
    engine = ClosedFormGP()
    engine.posterior(history.curve(300))  # libraries that load at their first use synchronise
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            posterior = engine.posterior(history.curve(300))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    reads = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(reads) == 1
    on_cpu = engine.posterior(curve_of(valley(200), 300))
    np.testing.assert_allclose(posterior.mean, on_cpu.mean, rtol=1e-9)


@pytest.mark.parametrize("size", [1e6, 1e12, 1e30])
@pytest.mark.parametrize("place", [0, 1, 40, 99])
def test_one_huge_loss_anywhere_leaves_the_minimum_where_it_is(place, size):
    losses = [1 + abs(k - 60) / 60 + 0.01 * math.sin(37 * k) for k in range(100)]
    losses[place] = size
    posterior = ClosedFormGP(0.1).posterior(curve_of(losses))
    assert posterior.grid[posterior.mean[0].argmin()] == pytest.approx(0.6, abs=0.03)
