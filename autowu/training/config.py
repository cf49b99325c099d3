"""The command line of train.py and its checks."""

from __future__ import annotations

import argparse
import difflib
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

__all__ = ["RunError", "TrainConfig", "UsageError", "parse_args", "unknown_name"]

_LARGEST_FLOAT = torch.finfo(torch.float32).max
_LARGEST_COUNT = 2**31 - 1
_MOST_WORKERS = 1024
_LARGEST_SEED = 2**63 - 1


class UsageError(Exception):
    """Something the user asked for cannot be: said in one line, with exit code 2, before anything was trained."""

    code = 2


class RunError(Exception):
    """A run cannot go on for what the machine or the data did: said in one line, with exit code 1."""

    code = 1

    def __init__(self, message: str) -> None:
        # A loader process hands on its traceback, of which this error's own line is the last.
        super().__init__(message.rsplit("RunError: ", 1)[-1].strip())


@dataclass(frozen=True)
class TrainConfig:
    """The options of train.py, as parsed; see ``python train.py --help`` for each.

    Several values of `cooldown_fraction` are a list in ascending order.
    """

    dataset: str
    data_dir: Path | None
    img_size: int | None
    model: str
    opt: str
    weight_decay: float
    momentum: float
    sched: str
    lr: float | None
    min_lr: float | None
    max_lr: float | None
    max_warmup_fraction: float | None
    cooldown_type: str | None
    cooldown_fraction: float | list[float] | None
    epochs: int
    batch_size: int
    label_smoothing: float
    amp: bool
    sync_bn: bool
    workers: int
    device: str | None
    seed: int
    run_dir: Path
    resume: bool | str
    checkpoint_steps: int | None
    checkpoint_minutes: float | None
    checkpoint_hist: int
    log_tensorboard: bool
    eval: Path | None
    dry_run: bool
    log_layers: int | None
    skip_corrupt: bool
    small_checkpoints: bool


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for.

    Raises:
        UsageError: where it cannot be parsed, and for a number out of its range.
    """
    args = vars(_parser().parse_args(argv))
    del args["local_rank"]
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
    config = TrainConfig(**args)
    _check(config)
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see train.py --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default to a help text that does not name one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0 or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    """The table of the options."""
    parser = _Parser(
        prog="train.py",
        description="Train a timm model with a layer-wise adaptive optimizer and a learning rate that finds itself. "
        "Without arguments: a small ResNet on scikit-learn's bundled digits, in under a minute on two CPU cores. "
        "Runs as it is under torchrun and python -m torch.distributed.launch.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data and model")
    data.add_argument("--dataset", help="'digits' or 'folder' (default: digits, or folder where --data-dir is given)")
    data.add_argument("--data-dir", type=Path, help="image folder in ImageNet's layout: train/CLASS/IMAGE and val/CLASS/IMAGE")
    data.add_argument(
        "--skip-corrupt", action="store_true", help="take the next image in the place of one that cannot be read, and name it"
    )
    data.add_argument("--img-size", type=int, help="side of the input in pixels (default: 32 for the digits, else the model's own)")
    data.add_argument("--model", default="test_resnet", help="any model of timm")
    optim = parser.add_argument_group("optimizer")
    optim.add_argument(
        "--opt",
        default="lars",
        help="'lars' (around SGD), 'lamb' or 'tvlars', or any other optimizer of timm, such as adamw, adamp, sgd",
    )
    optim.add_argument("--weight-decay", type=float, default=5e-4, help="weight decay; norms and biases have none")
    optim.add_argument("--momentum", type=float, default=0.9, help="momentum, where the optimizer has one")
    sched = parser.add_argument_group("learning rate")
    sched.add_argument("--sched", default="autowu", help="'autowu', 'paper' (AutoWU as published) or 'cosine' (5%% linear warm-up)")
    sched.add_argument(
        "--lr", type=float, help="peak LR of --sched cosine (default: by optimizer); AutoWU needs it only if no loss was finite"
    )
    sched.add_argument("--min-lr", type=float, help="LR of the first step (default: by optimizer)")
    sched.add_argument("--max-lr", type=float, help="LR at which a full warm-up ends (default: by optimizer)")
    sched.add_argument(
        "--max-warmup-fraction", type=float, help="share of the run that the warm-up may take (default: 0.32; paper 0.5)"
    )
    sched.add_argument("--cooldown-type", help="'cosine', 'half_cosine', 'linear' or 'sqrt' (default: linear; paper: cosine)")
    sched.add_argument(
        "--cooldown-fraction",
        type=float,
        nargs="+",
        help="hold the peak, then cool down over this last share (default: 0.6; paper: cool down at once); of several shares each "
        "is tried, for one run to the shortest cooldown and the steps of the other cooldowns",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--epochs", type=int, default=30, help="epochs")
    run.add_argument("--batch-size", type=int, default=64, help="images per step and process")
    run.add_argument("--label-smoothing", type=float, default=0.0, help="label smoothing")
    run.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    run.add_argument("--sync-bn", action="store_true", help="batch-norm statistics over all processes, on GPUs")
    run.add_argument("--workers", type=int, default=4, help="loader processes for an image folder")
    run.add_argument("--device", help="'cpu' or 'cuda' (default: cuda if there is one)")
    run.add_argument("--seed", type=int, default=0, help="of the initialisation and of the order of the data")
    run.add_argument("--run-dir", type=Path, help="folder for the results (default: runs/TIME-MODEL-OPT-SCHED-ID)")
    run.add_argument(
        "--log-layers",
        type=int,
        metavar="N",
        help="every N steps, log norms and trust ratio of every layer to TensorBoard and to layers.parquet (default: never)",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="auto",
        help="go on in --run-dir, under the same options or more --epochs; with 'auto' begin there if there is no run yet "
        "(default: begin anew)",
    )
    look = parser.add_argument_group("instead of training, and beside it")
    look.add_argument("--eval", type=Path, metavar="CHECKPOINT", help="test the model in a checkpoint, and train nothing")
    look.add_argument("--dry-run", action="store_true", help="print what the run would be, and train nothing")
    look.add_argument("--log-tensorboard", action="store_true", help="write the metrics to TensorBoard too, in tensorboard/")
    keep = parser.add_argument_group("checkpoints")
    keep.add_argument(
        "--checkpoint-steps",
        "--recovery-interval",
        type=int,
        metavar="N",
        help="save one every N steps too (default: after every epoch)",
    )
    keep.add_argument("--checkpoint-minutes", type=float, metavar="M", help="save one too where the last is M minutes old")
    keep.add_argument("--checkpoint-hist", type=int, metavar="K", default=2, help="keep the last K, beside the best epoch's")
    keep.add_argument(
        "--small-checkpoints",
        action="store_true",
        help="leave AutoWU's copies of model and optimizer out of checkpoints; a resumed run has none until it takes the next",
    )
    # torch.distributed.launch passes it; the environment has it too.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _check_numbers(config: TrainConfig) -> None:
    for name in ("epochs", "batch_size", "img_size", "log_layers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("epochs", "batch_size", "img_size", "log_layers", "workers"):
        largest = _MOST_WORKERS if name == "workers" else _LARGEST_COUNT
        if (getattr(config, name) or 0) > largest:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at most {largest}")
    if not 0 <= config.seed <= _LARGEST_SEED:
        raise UsageError(f"--seed {config.seed}: must be at least 0 and at most {_LARGEST_SEED}")
    for name in ("weight_decay", "momentum", "label_smoothing", "workers"):
        if not (value := getattr(config, name)) >= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 0")
    if config.weight_decay > _LARGEST_FLOAT:
        raise UsageError(f"--weight-decay {config.weight_decay}: must be finite in float32")
    if config.momentum >= 1:
        raise UsageError(f"--momentum {config.momentum}: must be below 1")
    if config.label_smoothing > 1:
        raise UsageError(f"--label-smoothing {config.label_smoothing}: must be at most 1")
    if config.lr is not None and not 0 < config.lr <= _LARGEST_FLOAT:
        raise UsageError(f"--lr {config.lr}: must be above 0 and finite in float32")


def _check_checkpoints(config: TrainConfig) -> None:
    if config.resume not in (False, True, "auto"):
        raise UsageError(f"--resume {config.resume}: must be 'auto', or stand alone; --run-dir names the folder")
    for name in ("checkpoint_steps", "checkpoint_hist"):
        if (value := getattr(config, name)) is not None and not 1 <= value <= _LARGEST_COUNT:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1 and at most {_LARGEST_COUNT}")
    if (minutes := config.checkpoint_minutes) is not None and not 0 < minutes <= _LARGEST_FLOAT:
        raise UsageError(f"--checkpoint-minutes {minutes}: must be above 0 and finite")


def _check(config: TrainConfig) -> None:
    _check_numbers(config)
    _check_checkpoints(config)
    if config.sched == "cosine":
        for name in ("min_lr", "max_lr", "max_warmup_fraction", "cooldown_type", "cooldown_fraction"):
            if getattr(config, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: goes with AutoWU, not with --sched cosine")
    if isinstance(config.cooldown_fraction, list):
        for value in config.cooldown_fraction:
            if not 0 < value < 1:
                raise UsageError(f"--cooldown-fraction {value}: must be above 0 and below 1")
            if config.cooldown_fraction.count(value) > 1:
                raise UsageError(f"--cooldown-fraction {value}: is there twice")
    if config.device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {config.device}: must be cpu or cuda")
    if config.sched not in (schedulers := ("autowu", "paper", "cosine")):
        raise unknown_name("--sched", config.sched, schedulers)
    if config.dataset not in (datasets := ("digits", "folder")):
        raise unknown_name("--dataset", config.dataset, datasets)
    if config.dataset == "folder" and config.data_dir is None:
        raise UsageError("--dataset folder: needs --data-dir")
    if config.dataset == "digits" and config.data_dir is not None:
        raise UsageError(f"--data-dir {config.data_dir}: goes with --dataset folder")


def unknown_name(option: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of `known`, with the nearest ones suggested."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"{option} {name}: not known{hint}")
