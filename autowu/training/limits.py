"""The ranges of the options that are numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from autowu.training.errors import UsageError
from autowu.training.options import option_of

__all__ = ["check_numbers"]

_LARGEST_FLOAT = torch.finfo(torch.float32).max
_LARGEST_COUNT = 2**31 - 1
_MANY = 1024
_LARGEST_SEED = 2**63 - 1

_SHARE = (0, 1)
_RANGES: Final[dict[str, tuple[float, float]]] = {
    **dict.fromkeys(
        ("epochs", "batch_size", "global_batch_size", "grad_accum", "img_size", "log_layers", "recount", "num_classes"),
        (1, _LARGEST_COUNT),
    ),
    **dict.fromkeys(("checkpoint_steps", "checkpoint_hist", "cooldown_on_interrupt"), (1, _LARGEST_COUNT)),
    **dict.fromkeys(("workers", "aug_repeats"), (0, _MANY)),
    **dict.fromkeys(
        ("label_smoothing", "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "drop_path", "model_ema_decay"), _SHARE
    ),
    **dict.fromkeys(
        ("weight_decay", "color_jitter", "lighting", "mixup", "cutmix", "warmup_epochs", "clip_grad"), (0, _LARGEST_FLOAT)
    ),
}
"""Both ends belong to a range."""


def check_numbers(fields: Mapping[str, Any]) -> None:
    """See that every number that is given is within its range.

    Raises:
        UsageError: naming the option, its value and the range.
    """
    for name, (least, most) in _RANGES.items():
        value = fields[name]
        if value is None:
            continue
        option = f"{option_of(name)} {value}"
        if most == _LARGEST_FLOAT and (value == math.inf or value > most):
            raise UsageError(f"{option}: must be finite in float32")
        if not value >= least:
            raise UsageError(f"{option}: must be at least {least}")
        if value > most:
            raise UsageError(f"{option}: must be at most {most}")
    if not 0 <= fields["seed"] <= _LARGEST_SEED:
        raise UsageError(f"--seed {fields['seed']}: must be at least 0 and at most {_LARGEST_SEED}")
    if not 0 <= (momentum := fields["momentum"]) < 1:
        raise UsageError(f"--momentum {momentum}: must be {'below 1' if momentum >= 1 else 'at least 0'}")
    if fields["layer_decay"] is not None and not 0 < fields["layer_decay"] <= 1:
        raise UsageError(f"--layer-decay {fields['layer_decay']}: must be above 0 and at most 1")
    for name in ("lr", "checkpoint_minutes", "max_time"):
        if fields[name] is not None and not 0 < fields[name] <= _LARGEST_FLOAT:
            raise UsageError(f"{option_of(name)} {fields[name]}: must be above 0 and finite in float32")
