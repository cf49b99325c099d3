"""Recipes: named sets of options, each a YAML file beside this module. A user's own configuration is read by the same rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autowu.training.errors import UsageError, unknown_name
from autowu.training.options import RECIPES, as_arguments, defaults, given

__all__ = ["read_config", "read_recipe"]

_FOLDER = Path(__file__).parent
_OF_ONE_RUN = {"run_dir", "resume", "world_size"}
"""What the config.json of a run says of that run alone."""


def read_recipe(name: str) -> dict[str, Any]:
    """The fields that a recipe sets.

    Raises:
        UsageError: if there is no such recipe.

    Example:
        >>> read_recipe("resnet50-imagenet")["opt_kwargs"]["wd_ratio"]
        0.1
    """
    if name not in RECIPES:
        raise unknown_name("--recipe", name, RECIPES)
    return read_config(_FOLDER / f"{name}.yaml")


def read_config(path: Path) -> dict[str, Any]:
    """The fields that a YAML file sets, or the config.json of a run; numbers and names are checked as those of an option.

    Raises:
        UsageError: if the file cannot be read, names no option, or has a value that its option does not take.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"--config {path}: cannot be read: {reason}") from None
    if not isinstance(fields, Mapping):
        raise UsageError(f"--config {path}: must be options and their values, not a {type(fields).__name__}")
    fields = {str(name).replace("-", "_"): value for name, value in fields.items()}
    if "world_size" in fields and fields.get("global_batch_size") is not None:
        fields.pop("batch_size", None)  # was derived for that many processes
    known = defaults().keys() - {"config", "local_rank", "data_root"}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _OF_ONE_RUN:
            continue
        if name not in known:
            raise unknown_name(f"--config {path}:", name, known)
        try:
            values |= {name: None} if value is None else given(as_arguments({name: value}))
        except UsageError as error:
            raise UsageError(f"--config {path}: {str(error).removesuffix('; see train.py --help')}") from None
    return values
