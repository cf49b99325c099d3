"""The loss-curve GP on GPyTorch: the model of the paper, open to another kernel or a prior. Loads gpytorch where it is used."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autowu.gp import GRID_SIZE, CurvePosterior, LossCurve

if TYPE_CHECKING:
    import gpytorch

__all__ = ["GPyTorchGP"]

_ADAM_LR = 0.01
_SETTINGS = ("lengthscale", "num_subsamples", "fit_size", "posterior_size", "published")


class GPyTorchGP:
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
        published: fit as the published code does, for those who reproduce the paper: positions run over [0, 1] up to now, losses
            are not standardised, the fit is 100 Adam steps with LR 0.01, which end short of the
            maximum, parameters and Adam's moments carry over to the next test, and 1e-4 is added to the variance of a difference.
        seed: of the draws.

    Raises:
        ValueError: if a number is out of its range.
    """

    max_points: int | None = None

    def __init__(
        self,
        kernel: gpytorch.kernels.Kernel | None = None,
        *,
        lengthscale: float = 0.1,
        num_subsamples: int = 5,
        fit_size: int = 100,
        posterior_size: int = 500,
        published: bool = False,
        seed: int = 0,
    ) -> None:
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
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.num_subsamples = num_subsamples
        self.fit_size = fit_size
        self.posterior_size = posterior_size
        self.published = published
        self._generator = torch.Generator().manual_seed(seed)
        self._model: Any = None
        self._adam: torch.optim.Adam | None = None

    def posterior(self, curve: LossCurve) -> CurvePosterior:
        """Fit `curve`; the fit synchronises with the device as often as GPyTorch does.

        Raises:
            ValueError: if there are fewer than 2 finite losses, or all are equal.
            RuntimeError: where GPyTorch cannot factor a covariance.
        """
        gpytorch = _gpytorch()
        positions, losses = (curve if self.published else curve.clipped()).finite()
        n = len(losses)
        if n < 2 or not losses.var() > 0:
            raise ValueError(f"{n} finite losses, or all equal: nothing to fit")
        end = min(curve.end, float(positions[-1]) + curve.resolution)
        center, scale = losses.mean(), losses.std()
        grid = torch.linspace(0.0, end, GRID_SIZE, dtype=losses.dtype, device=losses.device)
        grid_positions = grid
        if self.published:
            center, scale = torch.zeros_like(center), torch.ones_like(scale)
            positions, grid, end = positions / curve.end, grid / end, curve.end
            # The published code reads the LR off the axis of the steps taken, which ends with the last one.
            grid_positions = grid * (end - curve.resolution)
        x, y = positions, (losses - center) / scale

        draw = self._draw(n, self.fit_size).to(x.device)
        model = self._fit(x[draw], y[draw])

        draws = torch.stack([self._draw(n, self.posterior_size) for _ in range(self.num_subsamples)])
        draws = draws.to(x.device)
        model.eval()
        model.likelihood.eval()
        model.set_train_data(x[draws][..., None], y[draws], strict=False)
        with torch.no_grad(), gpytorch.settings.debug(False):
            f = model(grid.expand(self.num_subsamples, -1)[..., None])
            covariance = f.covariance_matrix
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        difference = variance + variance[:, -1:] - 2 * covariance[:, -1, :]
        if self.published:
            difference = difference + 1e-4
        return CurvePosterior(
            grid=grid_positions.cpu().numpy(),
            end=end,
            mean=(f.mean * scale + center).cpu().numpy(),
            variance=(variance * scale**2).cpu().numpy(),
            difference_variance=(difference.clamp(min=0) * scale**2).cpu().numpy(),
            num_losses=n,
        )

    def _draw(self, n: int, size: int) -> Tensor:
        """Indices of at most `size` of n losses, in order of time."""
        return torch.randperm(n, generator=self._generator)[:size].sort().values

    def _fit(self, x: Tensor, y: Tensor) -> Any:
        """The model at hyperparameters fitted to (k,) positions and losses."""
        if self._model is None or not self.published:
            self._model, self._adam = self._build(x, y), None
        model = self._model
        if next(model.parameters()).device != x.device:  # a state from another device
            model.to(x.device)
            if self._adam is not None:
                self._adam.load_state_dict(self._adam.state_dict())
        model.train()
        model.likelihood.train()
        model.set_train_data(x[:, None], y, strict=False)
        free = _free(model)
        if not self.published:
            self._maximize(free, _negative_log_likelihood(model, x, y))
            return model
        if self._adam is None:
            self._adam = torch.optim.Adam(free, lr=_ADAM_LR)
        negative = _negative_log_likelihood(model, x, y)
        for _ in range(100):
            self._adam.zero_grad()
            negative().backward()
            self._adam.step()
        return model

    @staticmethod
    def _maximize(free: list[torch.nn.Parameter], negative: Any) -> None:
        optimizer = torch.optim.LBFGS(free, max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value: Tensor = negative()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    def _build(self, x: Tensor, y: Tensor) -> Any:
        model = _model(copy.deepcopy(self.kernel), self.lengthscale, x, y)
        model.likelihood.noise = 1e-3 if self.published else 0.1
        return model

    def state_dict(self) -> dict[str, Any]:
        """Settings, generator, and with `published` the parameters and Adam's moments that carry over to the next fit."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS}
        state["custom_kernel"] = self.kernel is not None
        state["generator"] = self._generator.get_state()
        state["carried"] = None
        if self.published and self._adam is not None:
            carried = {"model": dict(self._model.state_dict()), "adam": self._adam.state_dict()}
            state["carried"] = copy.deepcopy(carried)
        return state

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
        for name in _SETTINGS:
            setattr(self, name, state[name])
        self._generator.set_state(state["generator"].cpu())
        self._model = self._adam = None
        if (carried := state["carried"]) is not None:
            placeholder = torch.zeros(1, dtype=torch.float64)
            self._model = self._build(placeholder, placeholder)
            self._model.load_state_dict(carried["model"])
            self._adam = torch.optim.Adam(_free(self._model), lr=_ADAM_LR)
            self._adam.load_state_dict(copy.deepcopy(carried["adam"]))

    def __getstate__(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["kernel"])  # type: ignore[misc]
        self.load_state_dict(state["state"])

    def __repr__(self) -> str:
        settings = (f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"{type(self).__name__}({', '.join(settings)})"


def _gpytorch() -> Any:
    """The package, imported where it is used, without the deprecation warnings that its own import raises on recent torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import gpytorch
    return gpytorch


def _free(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _model(kernel: gpytorch.kernels.Kernel | None, lengthscale: float, x: Tensor, y: Tensor) -> Any:
    """An ExactGP on (k,) positions and losses."""
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
    return model


def _negative_log_likelihood(model: Any, x: Tensor, y: Tensor) -> Any:
    gpytorch = _gpytorch()
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    return lambda: -likelihood(model(x[:, None]), y)
