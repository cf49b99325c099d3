"""The loss-curve GP on GPyTorch: open to another kernel or a prior, and the fit of the paper. Needs the extra ``gpytorch``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autowu.gp import GRID_SIZE, CurvePosterior, LossCurve

if TYPE_CHECKING:
    import gpytorch

__all__ = ["GPyTorchGP", "PublishedGP"]

_ADAM_LR = 0.01
_ADAM_STEPS = 100
_SETTINGS = ("lengthscale", "num_subsamples", "fit_size", "posterior_size")


class _SubsampledGP:
    """What both engines share: the fit and every posterior see some of the losses only, drawn without replacement."""

    max_points: int | None = None
    kernel: gpytorch.kernels.Kernel | None = None

    def __init__(self, lengthscale: float, num_subsamples: int, fit_size: int, posterior_size: int, seed: int) -> None:
        for name, value, least in (
            ("num_subsamples", num_subsamples, 1),
            ("fit_size", fit_size, 2),
            ("posterior_size", posterior_size, 2),
        ):
            if value < least:
                raise ValueError(f"{name}={value!r}: must be at least {least}")
        if not lengthscale > 0:
            raise ValueError(f"lengthscale={lengthscale!r}: must be above 0")
        _gpytorch()  # an installation without it fails here, not in the middle of a run
        self.lengthscale = lengthscale
        self.num_subsamples = num_subsamples
        self.fit_size = fit_size
        self.posterior_size = posterior_size
        self._generator = torch.Generator().manual_seed(seed)

    def _draw(self, n: int, size: int) -> Tensor:
        """Indices of at most `size` of n losses, in order of time."""
        return torch.randperm(n, generator=self._generator)[:size].sort().values

    def _predict(self, model: Any, x: Tensor, y: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means, variances and variances of the difference to the last point, all (S, G), each of a draw of (n,) losses."""
        draws = torch.stack([self._draw(len(x), self.posterior_size) for _ in range(self.num_subsamples)]).to(x.device)
        model.eval()
        model.likelihood.eval()
        model.set_train_data(x[draws][..., None], y[draws], strict=False)
        with torch.no_grad(), _gpytorch().settings.debug(False):
            f = model(grid.expand(self.num_subsamples, -1)[..., None])
            covariance = f.covariance_matrix
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        return f.mean, variance, variance + variance[:, -1:] - 2 * covariance[:, -1, :]

    def state_dict(self) -> dict[str, Any]:
        """Settings and generator."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS}
        return state | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        for name in _SETTINGS:
            setattr(self, name, state[name])
        self._generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.kernel = state["kernel"]
        self.load_state_dict(state["state"])

    def __repr__(self) -> str:
        settings = (f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"{type(self).__name__}({', '.join(settings)})"


class GPyTorchGP(_SubsampledGP):
    """A GPyTorch ExactGP on subsamples of the losses: constant mean, scaled RBF kernel, Gaussian likelihood.

    The constant, the outputscale and the noise (and whatever else the kernel leaves free) are fitted by marginal likelihood, plus
    the kernel's priors, on at most `fit_size` losses drawn without replacement. Then `num_subsamples` draws of at most
    `posterior_size` losses are conditioned on in one batch.

    Args:
        kernel: a GPyTorch kernel of one input, the position as a fraction of the planned warm-up. Losses are standardised before
            the fit, so priors are for data of mean 0 and variance 1. None for a scaled RBF kernel of fixed `lengthscale`.
        lengthscale: of the default kernel, in the unit of the positions, above 0.
        num_subsamples: draws, each of which has a vote, 1 or more.
        fit_size: losses at most behind the fit of the hyperparameters, 2 or more.
        posterior_size: losses at most behind each posterior, 2 or more.
        seed: of the draws.

    Raises:
        ImportError: if GPyTorch is not installed.
        ValueError: if a number is out of its range.

    Example:
        >>> GPyTorchGP(num_subsamples=3)
        GPyTorchGP(lengthscale=0.1, num_subsamples=3, fit_size=100, posterior_size=500)
    """

    def __init__(
        self,
        kernel: gpytorch.kernels.Kernel | None = None,
        *,
        lengthscale: float = 0.1,
        num_subsamples: int = 5,
        fit_size: int = 100,
        posterior_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(lengthscale, num_subsamples, fit_size, posterior_size, seed)
        self.kernel = kernel

    def posterior(self, curve: LossCurve) -> CurvePosterior:
        """Fit `curve`; the fit synchronises with the device as often as GPyTorch does.

        Raises:
            ValueError: if there are fewer than 2 finite losses, or all are equal.
            RuntimeError: where GPyTorch cannot factor a covariance.
        """
        positions, losses = _checked(*curve.clipped().finite())
        end = min(curve.end, float(positions[-1]) + curve.resolution)
        center, scale = losses.mean(), losses.std()
        grid = torch.linspace(0.0, end, GRID_SIZE, dtype=losses.dtype, device=losses.device)
        x, y = positions, (losses - center) / scale
        draw = self._draw(len(x), self.fit_size).to(x.device)
        model = self._fit(x[draw], y[draw])
        mean, variance, difference = self._predict(model, x, y, grid)
        return CurvePosterior(
            grid=grid.cpu().numpy(),
            end=end,
            mean=(mean * scale + center).cpu().numpy(),
            variance=(variance * scale**2).cpu().numpy(),
            difference_variance=(difference.clamp(min=0) * scale**2).cpu().numpy(),
            num_losses=len(losses),
        )

    def _fit(self, x: Tensor, y: Tensor) -> Any:
        """The model at the maximum of the likelihood of (k,) positions and losses."""
        model = _model(copy.deepcopy(self.kernel), self.lengthscale, x, y, noise=0.1)
        negative = _negative_log_likelihood(model, x, y)
        optimizer = torch.optim.LBFGS(_free(model), max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = negative()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return model

    def state_dict(self) -> dict[str, Any]:
        """Settings, generator, and whether there is a kernel of the user's own."""
        return super().state_dict() | {"custom_kernel": self.kernel is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`.

        Raises:
            ValueError: if it was taken with a kernel of the user's own and this engine has none, or the other way round.
        """
        if state["custom_kernel"] != (self.kernel is not None):
            raise ValueError(
                f"kernel={self.kernel!r}: the state was taken "
                + ("with a kernel of its own; pass the same" if state["custom_kernel"] else "without one")
            )
        super().load_state_dict(state)


class PublishedGP(_SubsampledGP):
    """The fit of the published code, for those who reproduce the paper (Kim et al. 2021 and its code).

    Positions run over [0, 1] up to now and losses are not standardised. The fit is 100 Adam steps at an LR of 0.01, which end
    short of the maximum; parameters and Adam's moments carry over to the next test. 1e-4 is added to the variance of a difference.

    Args:
        lengthscale: of the RBF kernel, as a share of the time so far, above 0.
        num_subsamples, fit_size, posterior_size, seed: as of :class:`GPyTorchGP`.

    Raises:
        ImportError: if GPyTorch is not installed.
        ValueError: if a number is out of its range.

    Example:
        >>> PublishedGP()
        PublishedGP(lengthscale=0.2, num_subsamples=5, fit_size=100, posterior_size=500)
    """

    def __init__(
        self,
        *,
        lengthscale: float = 0.2,
        num_subsamples: int = 5,
        fit_size: int = 100,
        posterior_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(lengthscale, num_subsamples, fit_size, posterior_size, seed)
        self._model: Any = None
        self._adam: torch.optim.Adam | None = None

    def posterior(self, curve: LossCurve) -> CurvePosterior:
        """Fit `curve`; see :meth:`GPyTorchGP.posterior`."""
        positions, losses = _checked(*curve.finite())
        last = min(curve.end, float(positions[-1]) + curve.resolution)
        grid = torch.linspace(0.0, last, GRID_SIZE, dtype=losses.dtype, device=losses.device) / last
        x = positions / curve.end
        draw = self._draw(len(x), self.fit_size).to(x.device)
        model = self._fit(x[draw], losses[draw])
        mean, variance, difference = self._predict(model, x, losses, grid)
        return CurvePosterior(
            # The published code reads the LR off the axis of the steps taken, which ends with the last one.
            grid=(grid * (curve.end - curve.resolution)).cpu().numpy(),
            end=curve.end,
            mean=mean.cpu().numpy(),
            variance=variance.cpu().numpy(),
            difference_variance=(difference + 1e-4).clamp(min=0).cpu().numpy(),
            num_losses=len(losses),
        )

    def _fit(self, x: Tensor, y: Tensor) -> Any:
        """The model some steps on from the last test's, on (k,) positions and losses."""
        if self._model is None:
            self._model = _model(None, self.lengthscale, x, y, noise=1e-3)
        model = self._model
        if next(model.parameters()).device != x.device:  # a state from another device
            model.to(x.device)
            if self._adam is not None:
                self._adam.load_state_dict(self._adam.state_dict())
        model.train()
        model.likelihood.train()
        model.set_train_data(x[:, None], y, strict=False)
        if self._adam is None:
            self._adam = torch.optim.Adam(_free(model), lr=_ADAM_LR)
        negative = _negative_log_likelihood(model, x, y)
        for _ in range(_ADAM_STEPS):
            self._adam.zero_grad()
            negative().backward()  # type: ignore[no-untyped-call]
            self._adam.step()
        return model

    def state_dict(self) -> dict[str, Any]:
        """Settings, generator, and the parameters and Adam's moments that carry over to the next fit."""
        carried = None
        if self._adam is not None:
            carried = copy.deepcopy({"model": dict(self._model.state_dict()), "adam": self._adam.state_dict()})
        return super().state_dict() | {"carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        super().load_state_dict(state)
        self._model = self._adam = None
        if (carried := state["carried"]) is not None:
            placeholder = torch.zeros(1, dtype=torch.float64)
            self._model = _model(None, self.lengthscale, placeholder, placeholder, noise=1e-3)
            self._model.load_state_dict(carried["model"])
            self._adam = torch.optim.Adam(_free(self._model), lr=_ADAM_LR)
            self._adam.load_state_dict(copy.deepcopy(carried["adam"]))


def _gpytorch() -> Any:
    """The package, imported where it is used, without the deprecation warnings that its own import raises on recent torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import gpytorch
        except ModuleNotFoundError as error:
            raise ImportError("this engine needs GPyTorch, the extra 'gpytorch': pip install autowu[gpytorch]") from error
    return gpytorch


def _checked(positions: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and losses, (n,) each, if there is something to fit."""
    n = len(losses)
    if n < 2 or not losses.var() > 0:
        raise ValueError(f"{n} finite losses, or all equal: nothing to fit")
    return positions, losses


def _free(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _model(kernel: gpytorch.kernels.Kernel | None, lengthscale: float, x: Tensor, y: Tensor, noise: float) -> Any:
    """An ExactGP on (k,) positions and losses, in training."""
    gpytorch = _gpytorch()
    covariance: Any = kernel
    if covariance is None:
        rbf = gpytorch.kernels.RBFKernel()
        rbf.lengthscale = lengthscale
        rbf.raw_lengthscale.requires_grad_(False)
        covariance = gpytorch.kernels.ScaleKernel(rbf)
    mean = gpytorch.means.ConstantMean()

    class Model(gpytorch.models.ExactGP):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__(x[:, None], y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean, self.kernel = mean, covariance

        def forward(self, inputs: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(inputs), self.kernel(inputs))

    model = Model().to(x)
    mean.constant.data.fill_(y.mean())
    model.likelihood.noise = noise
    return model


def _negative_log_likelihood(model: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    gpytorch = _gpytorch()
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    return lambda: -likelihood(model(x[:, None]), y)
