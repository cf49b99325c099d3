"""What an optimizer is, by the names of its class and of the classes that it derives from, written small and without "_".

So optimizers of any package are known without importing it.
"""

from __future__ import annotations

from typing import Final

from torch.optim import Optimizer

__all__ = ["FAMILIES", "chain", "everyone", "family_of", "parts", "scale_free", "several", "wrapped_optimizer"]

FAMILIES: Final[dict[str, tuple[str, ...]]] = {
    "lars": ("lars", "larc", "tvlars", "wars"),
    # All of ours that scale an update by the trust ratio derive from TrustScaled: LAMB, LANS, and a Muon.
    "lamb": ("lamb", "lambc", "nvlamb", "fusedlamb", "lans", "trustscaled"),
    "adam": (
        *("adam", "adamw", "adamax", "adamp", "nadam", "nadamw", "radam", "adabelief", "adafactor", "adan", "adopt"),
        *("sparseadam", "fusedadam", "adam8bit", "adamw8bit", "nadamlegacy", "radamlegacy", "adamwlegacy"),
        *("rmsprop", "rmsproptf", "yogi", "lion", "novograd", "nvnovograd"),
    ),
    "sgd": ("sgd", "sgdw", "sgdp", "asgd", "nesterov", "fusedsgd"),
}
"""Names of classes by what their optimizers have in common: what an LR means to them."""

_FAMILY_OF: Final = {name: family for family, names in FAMILIES.items() for name in names}
_MUONS: Final = ("muon", "muonwithauxadam", "singledevicemuon", "singledevicemuonwithauxadam", "adamuon", "distributedmuon")
_OTHERS: Final = (
    *("adadelta", "rprop", "signsgd", "lionw", "laprop", "mars", "ademamix", "soap"),
    *("adagrad", "adafactorbigvision", "adahessian"),
)
_WRAPPED: Final = (
    *("optim", "_base_optimizer", "optimizer"),  # torchlars and ours, timm, Accelerate
    *("base_optimizer", "inner_optimizer", "_optimizer"),  # SAM and its kin
)


def names_of(cls: type) -> list[str]:
    """Names of a class and of its bases, nearest first."""
    return [base.__name__.lower().replace("_", "") for base in cls.__mro__]


def family_of(cls: type) -> str | None:
    """Key of :data:`FAMILIES` for a class of optimizers; None if no name is known.

    Example:
        >>> import torch
        >>> family_of(torch.optim.NAdam)
        'adam'
    """
    return next((_FAMILY_OF[name] for name in names_of(cls) if name in _FAMILY_OF), None)


def scale_free(cls: type) -> str | None:
    """For optimizers to which a scale of the gradient means nothing, the class of ours that scales their update instead, else None.

    They divide by the gradient's own size, or take its sign, or make it orthogonal.

    Example:
        >>> import torch
        >>> scale_free(torch.optim.AdamW), scale_free(torch.optim.SGD)
        ('LAMB', None)
    """
    names = names_of(cls)
    if any(name in _MUONS for name in names):
        return "Muon"
    return "LAMB" if family_of(cls) in ("adam", "lamb") or any(name in _OTHERS for name in names) else None


def wrapped_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer inside a wrapper such as LARS, SAM, timm's Lookahead or Accelerate's; None for one that wraps nothing.

    Under an attribute of a usual name, else under any from where it steps all that the wrapper has.
    """
    if several(optimizer):
        return None
    usual = [getattr(optimizer, name, None) for name in _WRAPPED]
    inside = [*usual, *(other for other in _held(optimizer) if _parameters(optimizer) <= _parameters(other))]
    return next((inner for inner in inside if isinstance(inner, Optimizer) and inner is not optimizer), None)


def chain(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, what it wraps, what that wraps, and so on; each once."""
    found: list[Optimizer] = []
    inner: Optimizer | None = optimizer
    while inner is not None and all(inner is not outer for outer in found):
        found.append(inner)
        inner = wrapped_optimizer(inner)
    return found


def several(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers among which one has divided all of its parameters, to step them together; none for any other."""
    if len(held := _held(optimizer)) < 2:
        return []
    own, shares = _parameters(optimizer), [_parameters(one) for one in held]
    return held if all(shares) and sum(map(len, shares)) == len(own) and set.union(*shares) == own else []


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers of one that steps several, however deep they lie; of any other itself alone."""
    for each in chain(optimizer):
        if inside := several(each):
            return [part for one in inside for part in parts(one)]
    return [optimizer]


def everyone(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and all that it steps, as :func:`chain` has them; those of one that steps several stand before it."""
    found: list[Optimizer] = []
    for each in chain(optimizer):
        found += [*(one for inside in several(each) for one in everyone(inside)), each]
    return found


def _held(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one has, under an attribute or in a list, tuple or dictionary there."""
    held: dict[int, Optimizer] = {}
    for value in vars(optimizer).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        held.update((id(one), one) for one in inside if isinstance(one, Optimizer) and one is not optimizer)
    return list(held.values())


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}
