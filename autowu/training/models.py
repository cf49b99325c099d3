"""A timm model by name, for the data that it is to be trained on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autowu.training.config import TrainConfig, UsageError, unknown_name
from autowu.training.data import Data
from autowu.training.pretrained import freeze, load_weights

__all__ = ["Model", "build_model"]

_SMALL_SIZE = 32


@dataclass(frozen=True)
class Model:
    """A model on the CPU, the side of the images that it takes, and how timm says they are to be prepared."""

    module: nn.Module
    size: int
    data_config: dict[str, Any]


def build_model(config: TrainConfig, data: Data) -> Model:
    """The timm model `config.model` for `data`.

    Small images, such as the digits, are enlarged to 32 pixels, or to the model's own size where it does not take those.

    Raises:
        UsageError: if timm does not know the model, the model does not take images of the size asked for, or the weights or modules
            that are named are not its own.
    """
    import timm

    if not timm.is_model(config.model):
        raise unknown_name("--model", config.model, timm.list_models())
    if config.pretrained and not timm.models.is_model_pretrained(config.model):
        raise UsageError(f"--pretrained: timm has no weights of {config.model}")
    sizes = [config.img_size]
    if config.img_size is None:
        sizes = [_SMALL_SIZE, None] if data.small else [None]
    for size in sizes:
        try:
            model = _build_for(config, data, size)
            break
        except Exception as error:  # whatever a model raises on images that it cannot take
            reason = error
    else:
        said = " ".join(str(reason).split())[:400]
        raise UsageError(f"--model {config.model}: cannot be built for {sizes[-1] or 'its own'} pixels: {said}")
    if config.initial_checkpoint is not None:
        load_weights(model.module, config.initial_checkpoint)
    if config.freeze:
        freeze(model.module, config.freeze)
    return model


def _build_for(config: TrainConfig, data: Data, size: int | None) -> Model:
    import timm

    arguments: dict[str, Any] = {"num_classes": data.num_classes, "in_chans": data.channels, "pretrained": config.pretrained}
    if config.drop_path is not None:
        arguments["drop_path_rate"] = config.drop_path
    arguments |= config.model_kwargs or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's notices on deprecated model names
        module = timm.create_model(config.model, **arguments)
        if size is not None and module.pretrained_cfg.get("fixed_input_size", False):
            module = timm.create_model(config.model, **arguments | {"img_size": size})
    if config.grad_checkpointing:
        module.set_grad_checkpointing(True)
    data_config = timm.data.resolve_model_data_config(module)
    size = size or data_config["input_size"][-1]
    with torch.no_grad():
        module.eval()(torch.zeros(1, data.channels, size, size))
    return Model(module.train(), size, data_config)
