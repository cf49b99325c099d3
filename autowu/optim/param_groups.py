"""Parameter groups for layer-wise adaptive optimizers, and learning rates by batch size."""

from __future__ import annotations

import fnmatch
import logging
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from autowu.optim import checks

__all__ = ["linear_scaled_lr", "param_groups", "sqrt_scaled_lr"]

_logger = logging.getLogger("autowu")

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r"Norm(Act)?([123]d)?$")
# DistributedDataParallel and DataParallel are known by type: a module of one's own may be called "module" too.
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile, activation checkpointing


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The parameters of a model in two groups: matrices and kernels, and norms and biases.

    The first group has the weight decay and is adapted layer by layer. The second has neither, as in the recipes tuned by hand for
    ImageNet (He et al. 2019, arXiv 1812.01187, section 3.1; MLPerf's ResNet-50 with LARS). To the second belong

    - parameters of one dimension or none;
    - all parameters of a normalisation layer: those of torch, and modules with a class name that ends in "Norm", as in "RMSNorm" or
      "ScaleNorm2d";
    - biases of any dimension: parameters with a name of their own that has the word "bias" or "biases", as in "bias_k" or
      "relative_position_bias_table";
    - what the model names in a method ``no_weight_decay()``, names or patterns, as timm's models do.

    A parameter that is shared is listed once, by its first name; it is in the second group if it belongs there under any of its
    names. Parameters that need no gradient are left out, and so is a group that would be empty. Names are those of the model
    itself, whether it comes as it is or wrapped, as a whole or in parts, in DistributedDataParallel, DataParallel or
    ``torch.compile``.

    The logger ``autowu`` says at level INFO how many parameters each group has, and names them at level DEBUG. From torch 2.6 on an
    optimizer takes groups with names only, or without names only: a group that is added later then needs ``"param_names"`` as well.

    Args:
        model: the model.
        weight_decay: of the first group, 0 or more.

    Returns:
        Groups with ``"params"``, ``"param_names"``, ``"weight_decay"`` and ``"adapt"``, for any torch optimizer.

    Raises:
        TypeError: if `model` is no module, or `weight_decay` no number.
        ValueError: if `weight_decay` is out of its range, or a lazy module has not seen its first input yet.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2))
        >>> for group in param_groups(model, weight_decay=1e-4):
        ...     print(group["param_names"], group["weight_decay"], group["adapt"])
        ['0.weight'] 0.0001 True
        ['0.bias', '1.weight', '1.bias'] 0.0 False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: must be a torch.nn.Module")
    checks.check({"weight_decay": checks.AT_LEAST_0}, {"weight_decay": weight_decay})
    model = _unwrapped(model)
    left_out = getattr(model, "no_weight_decay", ())
    patterns = list(left_out() if callable(left_out) else left_out)
    names: dict[nn.Parameter, str] = {}
    plain: set[nn.Parameter] = set()  # neither decay nor adaptation
    frozen: set[nn.Parameter] = set()
    for prefix, module in _modules(model):
        is_norm = isinstance(module, _NORMS) or any(_NORM_NAME.search(cls.__name__) for cls in type(module).__mro__)
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = prefix + own_name
            if is_lazy(parameter):
                raise ValueError(f"model: parameter {name} has no shape yet; pass the model an input first")
            if not parameter.requires_grad:
                frozen.add(parameter)
                continue
            names.setdefault(parameter, name)
            is_bias = not {"bias", "biases"}.isdisjoint(own_name.split("_"))
            if is_norm or is_bias or parameter.ndim <= 1 or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                plain.add(parameter)
    groups = []
    for adapt in (True, False):
        chosen = [parameter for parameter in names if (parameter in plain) != adapt]
        if chosen:
            decay = weight_decay if adapt else 0.0
            group = {"params": chosen, "param_names": [names[p] for p in chosen], "weight_decay": decay, "adapt": adapt}
            groups.append(group)
    _report(groups, len(frozen))
    return groups


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        inside = [module.module] if isinstance(module, _PARALLEL) else [module._modules.get(name) for name in _WRAPPED]
        inner = next((one for one in inside if one is not None), None)
        if inner is None:
            return module
        module = inner


def _modules(module: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """All modules with the prefix of their parameters' names, a shared one with each; wrappers at any depth are skipped."""
    module = _unwrapped(module)
    if module in above:
        return
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", (*above, module))


def _report(groups: list[dict[str, Any]], frozen: int) -> None:
    parts = []
    for group in groups:
        what = f"weight decay {group['weight_decay']:g} and adaptation" if group["adapt"] else "neither"
        elements = sum(parameter.numel() for parameter in group["params"])
        parts.append(f"{len(group['params'])} tensors ({elements:,} elements) with {what}")
        _logger.debug("param_groups: with %s: %s", what, ", ".join(group["param_names"]))
    if frozen:
        parts.append(f"{frozen} that need no gradient left out")
    _logger.info("param_groups: %s", "; ".join(parts) or "no parameters")


def linear_scaled_lr(base_lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """A learning rate in proportion to the batch size, as for SGD (Goyal et al. 2017, arXiv 1706.02677).

    Args:
        base_lr: LR that suits `base_batch_size`, above 0.
        batch_size: samples of an optimizer step, all processes and accumulated micro-batches together, 1 or more.
        base_batch_size: 1 or more.

    Raises:
        TypeError: if the LR is no number, or a batch size no integer.
        ValueError: if a number is out of its range.

    Example:
        >>> linear_scaled_lr(0.1, batch_size=8192)
        3.2
    """
    return base_lr * _batch_ratio(base_lr, batch_size, base_batch_size)


def sqrt_scaled_lr(base_lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """A learning rate in proportion to the square root of the batch size.

    It keeps the variance of a step's noise (Krizhevsky 2014, arXiv 1404.5997), and is used with LAMB (You et al. 2020,
    arXiv 1904.00962).

    Args:
        base_lr: LR that suits `base_batch_size`, above 0.
        batch_size: samples of an optimizer step, all processes and accumulated micro-batches together, 1 or more.
        base_batch_size: 1 or more.

    Raises:
        TypeError: if the LR is no number, or a batch size no integer.
        ValueError: if a number is out of its range.

    Example:
        >>> sqrt_scaled_lr(0.001, batch_size=4096)
        0.004
    """
    return base_lr * math.sqrt(_batch_ratio(base_lr, batch_size, base_batch_size))


def _batch_ratio(base_lr: float, batch_size: int, base_batch_size: int) -> float:
    checks.check({"base_lr": checks.ABOVE_0}, {"base_lr": base_lr})
    for name, size in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
        try:
            operator.index(size)
        except TypeError:
            raise TypeError(f"{name}={size!r}: must be an integer, 1 or more") from None
        if size < 1:
            raise ValueError(f"{name}={size!r}: must be at least 1")
    return batch_size / base_batch_size
