"""The table of train.py's options, in groups, and what an option is made of."""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autowu.training.errors import UsageError

__all__ = ["RECIPES", "as_arguments", "defaults", "given", "option_of"]

_UNSET = object()
RECIPES = sorted(path.stem for path in Path(__file__).with_name("recipes").glob("*.yaml"))
"""The names of the recipes, each a file."""
_Group = argparse._ArgumentGroup


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see train.py --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default to a help text that does not name one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0 or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _KeyValues(argparse.Action):
    """``KEY=VALUE ...`` to a dict; a value is a Python literal, or else a string."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        found: dict[str, Any] = {}
        for pair in values:
            key, sign, text = pair.partition("=")
            if not sign or not key.isidentifier():
                raise UsageError(f"{option_string} {pair}: must be KEY=VALUE")
            try:
                found[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                found[key] = text
        setattr(namespace, self.dest, found)


def _flag(group: _Group, name: str, help: str, default: bool | None = False) -> None:
    """A switch ``--name``; ``--no-name`` turns it off where a recipe turns it on."""
    dest = name.replace("-", "_")
    group.add_argument(f"--{name}", action="store_true", default=default, help=help)
    group.add_argument(f"--no-{name}", action="store_false", dest=dest, default=default, help=argparse.SUPPRESS)


def option_of(field: str) -> str:
    """The option that sets a field of the configuration."""
    return f"--{field.replace('_', '-')}"


def given(argv: Sequence[str] | None) -> dict[str, Any]:
    """The fields that a command line sets, without those that are left to their defaults.

    Raises:
        UsageError: if it cannot be parsed.
    """
    parser = _parser()
    namespace = argparse.Namespace(**dict.fromkeys(defaults(), _UNSET))
    return {name: value for name, value in vars(parser.parse_args(argv, namespace)).items() if value is not _UNSET}


def defaults() -> dict[str, Any]:
    """The default of every field."""
    return {action.dest: action.default for action in _parser()._actions if action.dest != "help"}


def as_arguments(fields: Mapping[str, Any]) -> list[str]:
    """The command line that sets these fields. None is left out, for no option sets it."""
    arguments = []
    for field, value in fields.items():
        option = option_of(field)
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1).replace("--no-no-", "--"))
        elif isinstance(value, Mapping):
            arguments += [option, *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, list):
            arguments += [option, *map(str, value)]
        elif value is not None:
            arguments.append(f"{option}={value}")
    return arguments


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a timm model with a layer-wise adaptive optimizer and a learning rate that finds itself. "
        "Without arguments: a small ResNet on scikit-learn's bundled digits, in under a minute on two CPU cores. "
        "Runs as it is under torchrun and python -m torch.distributed.launch.",
        epilog="An option overrides what a recipe or a configuration says; --no-NAME turns a switch off.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _recipe(parser.add_argument_group("recipe"))
    _data(parser.add_argument_group("data"))
    _augmentation(parser.add_argument_group("augmentation of an image folder, by timm's names"))
    _model(parser.add_argument_group("model"))
    _fine_tuning(parser.add_argument_group("fine-tuning"))
    _optimizer(parser.add_argument_group("optimizer"))
    _learning_rate(parser.add_argument_group("learning rate"))
    _batch(parser.add_argument_group("length and batch"))
    _precision(parser.add_argument_group("precision and device"))
    _run(parser.add_argument_group("run"))
    _checkpoints(parser.add_argument_group("checkpoints"))
    # torch.distributed.launch passes it; the environment has it too.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _recipe(group: _Group) -> None:
    group.add_argument("--recipe", help=f"a named set of options: {', '.join(RECIPES[:-1])} or {RECIPES[-1]}")
    group.add_argument("--config", type=Path, help="options from a YAML file, or from the config.json of a run; over the recipe's")


def _data(group: _Group) -> None:
    group.add_argument(
        "--dataset",
        help="'digits', 'folder', 'synthetic' (noise, to measure throughput), or one of timm's, such as torch/cifar10, hfds/NAME "
        "or wds/NAME (default: digits, or folder where --data-dir is given)",
    )
    group.add_argument(
        "--data-dir",
        type=Path,
        help="image folder in ImageNet's layout, train/CLASS/IMAGE and val/CLASS/IMAGE, or in Tiny ImageNet's; for timm's datasets "
        "the folder that they lie in",
    )
    group.add_argument(
        "--data-root",
        type=Path,
        help="the same, and the published recipe: efficientnet_b0-imagenet for that model, else resnet50-imagenet",
    )
    _flag(group, "dataset-download", "fetch a dataset of timm's that is not there")
    group.add_argument("--train-split", default="train", help="split of timm's dataset to train on")
    group.add_argument("--val-split", default="validation", help="split of timm's dataset to test on")
    group.add_argument("--num-classes", type=int, help="classes of the model (default: those of the data)")
    _flag(group, "skip-corrupt", "take the next image in the place of one that cannot be read, and name it")
    group.add_argument(
        "--img-size", type=int, help="side of the input in pixels (default: 32 for small images, else the model's own)"
    )
    group.add_argument("--workers", "-j", type=int, default=4, help="loader processes, but for digits and noise")


def _augmentation(group: _Group) -> None:
    group.add_argument("--no-aug", action="store_true", help="none of these: images are resized and cropped at their centre")
    group.add_argument("--aug", action="store_false", dest="no_aug", default=False, help=argparse.SUPPRESS)
    group.add_argument("--scale", type=float, nargs=2, metavar="PART", help="share of the area that a crop takes (default: 0.08 1)")
    group.add_argument("--ratio", type=float, nargs=2, metavar="RATIO", help="width over height of a crop (default: 3/4 4/3)")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength of random brightness, contrast and saturation")
    group.add_argument(
        "--auto-augment", "--aa", help="a policy of timm, such as rand-m9-mstd0.5-inc1, in place of the jitter; 'none' for none"
    )
    group.add_argument("--reprob", type=float, default=0.0, help="probability that a part of an image is erased")
    group.add_argument("--remode", default="pixel", help="what is put there: 'const', 'rand' (a colour) or 'pixel' (noise)")
    group.add_argument("--recount", type=int, default=1, help="how many parts")
    group.add_argument(
        "--lighting", type=float, default=0.0, help="standard deviation of noise along the principal colours of ImageNet"
    )
    group.add_argument(
        "--aug-repeats", type=int, default=0, help="how often an image is drawn in a row; an epoch is as long as ever"
    )
    group.add_argument("--mixup", type=float, default=0.0, help="alpha of mixup")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha of cutmix")
    group.add_argument("--mixup-prob", type=float, default=1.0, help="probability of either")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix where both are on")
    group.add_argument("--mixup-mode", default="batch", help="one strength per 'batch', 'pair' or 'elem'")


def _model(group: _Group) -> None:
    group.add_argument("--model", default="test_resnet", help="any model of timm")
    group.add_argument("--drop-path", type=float, help="rate of stochastic depth")
    group.add_argument("--model-kwargs", nargs="*", action=_KeyValues, metavar="KEY=VALUE", help="more arguments of the model")


def _fine_tuning(group: _Group) -> None:
    _flag(group, "pretrained", "begin with timm's weights of the model, which are fetched if they are not there")
    group.add_argument(
        "--initial-checkpoint",
        type=Path,
        help="begin with the weights of this file, safetensors or torch's; a head that fits not is new",
    )
    group.add_argument(
        "--freeze", nargs="*", metavar="MODULE", help="modules that are not trained; 'backbone' is all but the classifier"
    )
    group.add_argument(
        "--layer-decay", type=float, help="LR of a layer over that of the next one up, in timm's groups; AutoWU keeps the ratios"
    )


def _optimizer(group: _Group) -> None:
    group.add_argument(
        "--opt",
        default="lars",
        help="'lars' (around SGD), 'lamb' or 'tvlars', or any other optimizer of timm, such as adamw, adamp, sgd",
    )
    group.add_argument("--opt-kwargs", nargs="*", action=_KeyValues, metavar="KEY=VALUE", help="more arguments of the optimizer")
    group.add_argument("--weight-decay", type=float, default=5e-4, help="weight decay; norms and biases have none")
    group.add_argument("--momentum", type=float, default=0.9, help="momentum, where the optimizer has one")
    group.add_argument("--clip-grad", type=float, help="clip gradients at this norm, value or factor, by --clip-mode")
    group.add_argument("--clip-mode", default="norm", help="'norm', 'value', or 'agc' (adaptive, but for the classifier)")
    group.add_argument("--label-smoothing", "--smoothing", type=float, default=0.0, help="label smoothing")


def _learning_rate(group: _Group) -> None:
    group.add_argument(
        "--sched",
        default="autowu",
        help="'autowu', 'paper' (AutoWU as published), or after a linear warm-up 'cosine' or 'poly' (a polynomial of power 2)",
    )
    group.add_argument(
        "--lr", type=float, help="peak LR of cosine and poly (default: by optimizer); AutoWU needs it only if no loss was finite"
    )
    group.add_argument("--warmup-epochs", type=float, help="warm-up of cosine and poly (default: 5%% of the run)")
    group.add_argument("--min-lr", type=float, help="LR of the first step (default: by optimizer)")
    group.add_argument("--max-lr", type=float, help="LR at which a full warm-up ends (default: by optimizer)")
    group.add_argument(
        "--max-warmup-fraction", type=float, help="share of the run that the warm-up may take (default: 0.32; paper 0.5)"
    )
    group.add_argument("--cooldown-type", help="'cosine', 'half_cosine', 'linear' or 'sqrt' (default: linear; paper: cosine)")
    group.add_argument(
        "--cooldown-fraction",
        type=float,
        nargs="+",
        help="hold the peak, then cool down over this last share (default: 0.6; paper: cool down at once); of several shares each "
        "is tried, for one run to the shortest cooldown and the steps of the other cooldowns",
    )


def _batch(group: _Group) -> None:
    group.add_argument("--epochs", type=int, default=30, help="epochs")
    group.add_argument(
        "--max-time",
        type=float,
        metavar="M",
        help="train for M minutes, tests included, in place of --epochs; the LR decays by then",
    )
    _flag(group, "stop-at-plateau", "cool down, and end, as soon as the training loss has stopped improving")
    group.add_argument(
        "--cooldown-on-interrupt",
        type=int,
        metavar="N",
        help="let a first Ctrl-C cool down for N steps, and end the run; a second saves and stops (default: the first does)",
    )
    group.add_argument(
        "--batch-size", "-b", type=int, help="images per process and forward pass (default: 64, or by --global-batch-size)"
    )
    group.add_argument("--global-batch-size", type=int, help="images per optimizer step, over all processes and --grad-accum")
    group.add_argument(
        "--grad-accum",
        type=int,
        help="batches per optimizer step (default: 1, or what --global-batch-size and --batch-size leave)",
    )


def _precision(group: _Group) -> None:
    _flag(group, "amp", "autocast to --amp-dtype")
    group.add_argument("--amp-dtype", default="bfloat16", help="'bfloat16', or 'float16' with a GradScaler")
    _flag(group, "channels-last", "memory format of the model (default: on GPUs)", default=None)
    _flag(group, "compile", "torch.compile")
    _flag(group, "fsdp", "split parameters and optimizer over the processes (fully_shard), in the place of a copy on each")
    _flag(group, "tf32", "multiply float32 matrices in TensorFloat32, on GPUs")
    _flag(group, "grad-checkpointing", "compute activations again in the backward pass, for less memory")
    _flag(group, "model-ema", "average the weights; the average is what is tested")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="of the average, a step")
    _flag(group, "model-ema-warmup", "let the decay grow from 0")
    _flag(group, "sync-bn", "batch-norm statistics over all processes, on GPUs")
    group.add_argument("--device", help="'cpu' or 'cuda' (default: cuda if there is one)")


def _run(group: _Group) -> None:
    group.add_argument("--seed", type=int, default=0, help="of the initialisation and of the order of the data")
    group.add_argument("--run-dir", type=Path, help="folder for the results (default: runs/TIME-MODEL-OPT-SCHED-ID)")
    group.add_argument(
        "--log-layers",
        type=int,
        metavar="N",
        help="every N steps, log norms and trust ratio of every layer to TensorBoard and to layers.parquet (default: never)",
    )
    _flag(group, "log-tensorboard", "write the metrics to TensorBoard too, in tensorboard/")
    _flag(group, "log-wandb", "send the metrics to Weights & Biases too; WANDB_MODE=offline keeps them in the run's folder")
    _flag(group, "log-trackio", "log the metrics to trackio too")
    group.add_argument("--wandb-project", default="autowu", help="name of the project there")
    group.add_argument("--eval", type=Path, metavar="CHECKPOINT", help="test the model in a checkpoint, and train nothing")
    _flag(group, "dry-run", "print what the run would be, and train nothing")


def _checkpoints(group: _Group) -> None:
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="auto",
        help="go on in --run-dir, under the same options or more --epochs; with 'auto' begin there if there is no run yet "
        "(default: begin anew)",
    )
    group.add_argument(
        "--checkpoint-steps",
        "--recovery-interval",
        type=int,
        metavar="N",
        help="save one every N steps too (default: after every epoch)",
    )
    group.add_argument("--checkpoint-minutes", type=float, metavar="M", help="save one too where the last is M minutes old")
    group.add_argument("--checkpoint-hist", type=int, metavar="K", default=2, help="keep the last K, beside the best epoch's")
    _flag(
        group,
        "small-checkpoints",
        "leave AutoWU's copies of model and optimizer out of checkpoints; a resumed run has none until it takes the next",
    )
