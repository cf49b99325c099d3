"""The configuration of a run, from the command line, a recipe and a file, and its checks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autowu.training.batches import processes_of_run, split_batch
from autowu.training.errors import RunError, UsageError, unknown_name
from autowu.training.limits import check_numbers
from autowu.training.options import RECIPES, defaults, given, option_of
from autowu.training.recipes import read_config, read_recipe

__all__ = ["RunError", "TrainConfig", "UsageError", "parse_args", "unknown_name"]

_OF_AUTOWU = ("min_lr", "max_lr", "max_warmup_fraction", "cooldown_type", "cooldown_fraction")
_ENDS = ("max_time", "stop_at_plateau", "cooldown_on_interrupt")
_BELONGS_TO = {"opt_kwargs": "opt", "model_kwargs": "model", "drop_path": "model"} | dict.fromkeys(_OF_AUTOWU, "sched")
"""Fields that mean something beside the value of another one only: where that is overridden, they go."""

_CHOICES = {
    "sched": ("autowu", "paper", "cosine", "poly"),
    "remode": ("const", "rand", "pixel"),
    "mixup_mode": ("batch", "pair", "elem"),
    "clip_mode": ("norm", "value", "agc"),
    "amp_dtype": ("bfloat16", "float16"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The options of train.py, as resolved; see ``python train.py --help`` for each.

    Several values of `cooldown_fraction` are a list in ascending order. `batch_size` and `grad_accum` are derived where
    `global_batch_size` is given.
    """

    recipe: str | None
    dataset: str
    data_dir: Path | None
    dataset_download: bool
    train_split: str
    val_split: str
    num_classes: int | None
    skip_corrupt: bool
    img_size: int | None
    workers: int
    no_aug: bool
    scale: list[float] | None
    ratio: list[float] | None
    hflip: float
    vflip: float
    color_jitter: float
    auto_augment: str | None
    reprob: float
    remode: str
    recount: int
    lighting: float
    aug_repeats: int
    mixup: float
    cutmix: float
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    model: str
    drop_path: float | None
    model_kwargs: dict[str, Any] | None
    pretrained: bool
    initial_checkpoint: Path | None
    freeze: list[str] | None
    layer_decay: float | None
    opt: str
    opt_kwargs: dict[str, Any] | None
    weight_decay: float
    momentum: float
    clip_grad: float | None
    clip_mode: str
    label_smoothing: float
    sched: str
    lr: float | None
    warmup_epochs: float | None
    min_lr: float | None
    max_lr: float | None
    max_warmup_fraction: float | None
    cooldown_type: str | None
    cooldown_fraction: float | list[float] | None
    epochs: int
    max_time: float | None
    stop_at_plateau: bool
    cooldown_on_interrupt: int | None
    batch_size: int
    global_batch_size: int | None
    grad_accum: int
    amp: bool
    amp_dtype: str
    channels_last: bool | None
    compile: bool
    fsdp: bool
    tf32: bool
    grad_checkpointing: bool
    model_ema: bool
    model_ema_decay: float
    model_ema_warmup: bool
    sync_bn: bool
    device: str | None
    seed: int
    run_dir: Path
    resume: bool | str
    checkpoint_steps: int | None
    checkpoint_minutes: float | None
    checkpoint_hist: int
    small_checkpoints: bool
    log_tensorboard: bool
    log_wandb: bool
    log_trackio: bool
    wandb_project: str
    log_layers: int | None
    eval: Path | None
    dry_run: bool

    @property
    def ends_early(self) -> bool:
        """Whether AutoWU may end the run within an epoch."""
        return self.max_time is not None or self.stop_at_plateau or self.cooldown_on_interrupt is not None

    @property
    def step_size(self) -> int:
        """Images of this process per optimizer step."""
        return self.batch_size * self.grad_accum


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for, for as many processes as the environment's WORLD_SIZE says.

    An option overrides the file of ``--config``, which overrides the recipe, which overrides the default.

    Raises:
        UsageError: where it cannot be parsed, and for a number out of its range.
    """
    args = _merged(given(argv))
    if (fractions := args["cooldown_fraction"]) is not None:
        args["cooldown_fraction"] = fractions[0] if len(fractions) == 1 else sorted(fractions)
    if args["dataset"] is None:
        args["dataset"] = "digits" if args["data_dir"] is None else "folder"
    if args["run_dir"] is None:
        if args["resume"]:
            raise UsageError("--resume: needs --run-dir, the folder of the run to go on with")
        # The last part tells two runs apart that are started in the same second.
        stamp, own = time.strftime("%Y%m%d-%H%M%S"), secrets.token_hex(3)
        args["run_dir"] = Path("runs", f"{stamp}-{args['model'].replace('/', '_')}-{args['opt']}-{args['sched']}-{own}")
    check_numbers(args)
    split_batch(args, processes_of_run())
    config = TrainConfig(**args)
    _check(config)
    return config


def _merged(own: dict[str, Any]) -> dict[str, Any]:
    """What is given on the command line, over the file, the recipe and the defaults."""
    own.pop("local_rank", None)
    path, root = own.pop("config", None), own.pop("data_root", None)
    file = {} if path is None else read_config(path)
    named = file | own
    if root is not None:
        if "data_dir" in own:
            raise UsageError(f"--data-root {root}: is the same as --data-dir; give one of them")
        own["data_dir"] = root
        if "recipe" not in named:
            published = f"{named.get('model')}-imagenet"
            own["recipe"] = published if published in RECIPES else "resnet50-imagenet"
    recipe = (file | own).get("recipe")
    args = {name: value for name, value in defaults().items() if name not in ("config", "data_root", "local_rank")}
    for layer in ({} if recipe is None else read_recipe(recipe), file, own):
        args = _over(args, layer)
    return args


def _over(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`layer` over `base`, without what no longer means anything."""
    gone = {field for field, of in _BELONGS_TO.items() if of in layer and layer[of] != base[of]}
    batch = {"batch_size", "grad_accum"}
    if layer.get("global_batch_size") is not None or (batch & layer.keys() and base["global_batch_size"] is not None):
        gone |= batch
    if batch <= layer.keys() and "global_batch_size" not in layer:
        gone.add("global_batch_size")
    return {**base, **dict.fromkeys(gone, None), **layer}


def _check(config: TrainConfig) -> None:
    if config.resume not in (False, True, "auto"):
        raise UsageError(f"--resume {config.resume}: must be 'auto', or stand alone; --run-dir names the folder")
    if config.sched in ("cosine", "poly"):
        for name in _OF_AUTOWU:
            if getattr(config, name) is not None:
                raise UsageError(f"{option_of(name)}: goes with AutoWU, not with --sched {config.sched}")
    for name in _ENDS if config.ends_early else ():
        other = f"--sched {config.sched}" if config.sched in ("cosine", "poly") else "several values of --cooldown-fraction"
        if getattr(config, name) and (config.sched in ("cosine", "poly") or isinstance(config.cooldown_fraction, list)):
            raise UsageError(f"{option_of(name)}: does not go with {other}")
    if isinstance(config.cooldown_fraction, list):
        for value in config.cooldown_fraction:
            if not 0 < value < 1:
                raise UsageError(f"--cooldown-fraction {value}: must be above 0 and below 1")
            if config.cooldown_fraction.count(value) > 1:
                raise UsageError(f"--cooldown-fraction {value}: is there twice")
    if config.device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {config.device}: must be cpu or cuda")
    for name, known in _CHOICES.items():
        if getattr(config, name) not in known:
            raise unknown_name(option_of(name), getattr(config, name), known)
    if config.pretrained and config.initial_checkpoint is not None:
        raise UsageError(f"--initial-checkpoint {config.initial_checkpoint}: does not go with --pretrained; give one of them")
    for name, most in (("scale", 1.0), ("ratio", float("inf"))):
        least, largest = getattr(config, name) or (0.5, 0.5)
        if not 0 < least <= largest <= most:
            raise UsageError(f"{option_of(name)} {least} {largest}: must be above 0, in ascending order, and at most {most}")
    _check_dataset(config)


def _check_dataset(config: TrainConfig) -> None:
    own, sources = ("digits", "folder", "synthetic"), ("torch/", "hfds/", "hfids/", "wds/", "tfds/")
    if config.dataset not in own and not config.dataset.lower().startswith(sources):
        raise unknown_name("--dataset", config.dataset, own)
    if config.dataset == "folder" and config.data_dir is None:
        raise UsageError("--dataset folder: needs --data-dir")
    if config.dataset in ("digits", "synthetic") and config.data_dir is not None:
        raise UsageError(f"--data-dir {config.data_dir}: goes with --dataset folder")
    if config.dataset in own and config.dataset_download:
        raise UsageError(f"--dataset-download: goes with a dataset of timm's, not with --dataset {config.dataset}")
