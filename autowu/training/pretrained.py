"""Fine-tuning: weights from a file, and what of a model is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autowu.training.errors import UsageError, unknown_name

__all__ = ["classifier_names", "freeze", "load_weights"]

_INSIDE = ("ema", "state_dict_ema", "model_ema", "state_dict", "model")
"""Where checkpoints hold the weights, averages first."""


def classifier_names(model: nn.Module) -> list[str]:
    """The modules that map features to classes, by timm's word; a change of their number makes them anew."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def load_weights(model: nn.Module, path: Path) -> None:
    """Set `model` to the weights of a file, safetensors or torch's with weights only; a classifier of other classes stays as it is.

    Raises:
        UsageError: if the file cannot be read, holds more than weights, or does not have those of such a model.
    """
    option = f"--initial-checkpoint {path}"
    weights, own = _read(path, option), model.state_dict()
    kept = [name for name in own if any(name.startswith(f"{head}.") for head in classifier_names(model))]
    if all(weights[name].shape == own[name].shape for name in kept if name in weights):
        kept = [name for name in kept if name not in weights]
    weights = {name: value for name, value in weights.items() if name not in kept}
    wrong = [name for name in own if name not in kept and (name not in weights or weights[name].shape != own[name].shape)]
    if wrong or (more := weights.keys() - own.keys()):
        first = f"{wrong[0]} is missing or of another shape" if wrong else f"{min(more)} is none of it"
        raise UsageError(f"{option}: has not the weights of this model: {first}")
    model.load_state_dict(weights, strict=False)


def _read(path: Path, option: str) -> dict[str, Tensor]:
    from timm.models import clean_state_dict

    found: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is raised on bytes of any kind
        reason = "it holds more than weights" if "weights_only" in str(error).lower() else " ".join(str(error).split())[:200]
        raise UsageError(f"{option}: cannot be read: {reason or type(error).__name__}") from None
    for name in _INSIDE:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(f"{option}: holds no weights by their names")
    cleaned: dict[str, Tensor] = clean_state_dict(found)
    return cleaned


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Train neither these modules of `model` nor their batch-norm statistics; "backbone" is all but the classifier.

    Raises:
        UsageError: if `model` has no such module, or nothing would be left to train.
    """
    from timm.utils import freeze

    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name == "backbone":
            if not (heads := classifier_names(model)):
                raise UsageError("--freeze backbone: this model does not say which of its modules is the classifier")
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad &= any(parameter_name.startswith(f"{head}.") for head in heads)
            above = [head.split(".")[0] for head in heads]
            freeze(model, [child for child, _ in model.named_children() if child not in above] or ["backbone"])
        elif name in modules:
            freeze(model, [name])
        else:
            raise unknown_name("--freeze", name, ["backbone", *modules])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--freeze {' '.join(names)}: leaves nothing to train")
