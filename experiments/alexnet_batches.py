"""AlexNet with SGD, momentum, Adam and LARS over batch sizes: top-1, top-5, and the time of an epoch.

    python experiments/alexnet_batches.py [--figure experiments/figures/alexnet_batches.png]
    python experiments/alexnet_batches.py --data-root /data/tiny-imagenet-200 --batch-size 256 1024 4096 --epochs 90

All runs have the same number of epochs, so a larger batch means fewer steps. The LR is the one of ``HAND_SET`` for a batch of 64,
carried to the others by the linear rule, for Adam by the square-root rule, after a linear warm-up of a tenth of the run and along
a cosine; or AutoWU finds it. A run is a line of JSON in the results file, written when it ends; those that are there already are
not run again. ``--report`` makes the tables, and with ``--figure`` the figure, from the file alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from images import name_of, open_images
from loop import evaluate, found_by, make_schedule, parallel, train
from networks import alexnet
from results import HERE, Experiment, Row, median, spread, table
from results import main as run_experiment
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from autowu.optim import LARS, linear_scaled_lr, param_groups, sqrt_scaled_lr
from autowu.training.optimizers import HAND_SET_LR
from autowu.training.process import Process

WEIGHT_DECAY = 5e-4
HAND_SET = {"sgd": 0.1, "momentum": 0.01, "adam": 1e-3, "lars": HAND_SET_LR["lars"]}
"""LRs at a batch of 64, conventions that are not tuned here: AlexNet's own for momentum, ten times that for SGD without it, Adam's
default, and for LARS that of train.py."""
TITLES = {"sgd": "SGD", "momentum": "SGD, momentum", "adam": "Adam", "lars": "LARS"}
SCHEDULES = {"hand-set": "lars-warm", "autowu": "autowu"}


class Job(NamedTuple):
    """What names a run in the results file."""

    data: str
    optimizer: str
    schedule: str
    lr: float | None
    batch_size: int
    epochs: int
    img_size: int | None
    seed: int


def jobs(args: argparse.Namespace) -> list[Job]:
    """All runs that are asked for."""
    data = name_of(args.data_root)
    found: dict[Job, None] = {}
    for seed, size, name, schedule in itertools.product(args.seed, args.batch_size, args.optimizers, args.schedules):
        scaled = sqrt_scaled_lr if name == "adam" else linear_scaled_lr
        lr = None if schedule == "autowu" else float(f"{scaled((args.lr or HAND_SET)[name], size, 64):.6g}")
        found[Job(data, name, schedule, lr, size, args.epochs, None if data == "digits" else args.img_size, seed)] = None
    return list(found)


def make_optimizer(name: str, model: torch.nn.Module, lr: float) -> Optimizer:
    groups = param_groups(model, 0.0 if name == "adam" else WEIGHT_DECAY)
    if name == "adam":
        return Adam(groups, lr)
    sgd = SGD(groups, lr, momentum=0.0 if name == "sgd" else 0.9)
    return LARS(sgd) if name == "lars" else sgd


def run(job: Job, args: argparse.Namespace, process: Process) -> Row:
    """One run, on all processes; the line of the results file."""
    options = ["--scale", "0.5", "1"]
    images = open_images(args.data_root, process, job.batch_size, job.seed, args.img_size, args.workers, options)
    torch.manual_seed(job.seed)
    model = alexnet(images).to(process.device)
    forward, loaders = parallel(model, process), images.loaders()
    steps = job.epochs * len(loaders.train)
    optimizer = make_optimizer(job.optimizer, model, 1.0 if job.lr is None else job.lr)
    scheduler = make_schedule(SCHEDULES[job.schedule], optimizer, model, steps)
    device, epochs = process.device, job.epochs
    seconds = train(forward, lambda x, y: F.cross_entropy(forward(x), y), optimizer, scheduler, loaders, epochs, device)
    facts = {"steps": steps, **found_by(scheduler, job.lr), "seconds_per_epoch": float(f"{statistics.median(seconds):.4g}")}
    return {**job._asdict(), **facts, **evaluate(model, loaders, process), "torch": torch.__version__}


def report(rows: Sequence[Row]) -> str:
    """The two tables, as Markdown: accuracies, then peak LRs and the time of an epoch over that of SGD."""
    sizes = sorted({row["batch_size"] for row in rows})
    steps = {row["batch_size"]: row["steps"] for row in rows}
    accuracies, facts = [], []
    for name, schedule in itertools.product(TITLES, SCHEDULES):
        own = {size: _of(rows, name, schedule, size) for size in sizes}
        if not any(own.values()):
            continue
        title = [TITLES[name], schedule]
        top = [f"{spread(found, 'top1')}; {100 * median(found, 'top5'):.1f}" if found else "" for found in own.values()]
        accuracies.append([*title, *top])
        facts.append([*title, *map(_peak, own.values()), ", ".join(_times(rows, own, schedule))])
    head = ["optimizer", "LR"]
    first = table([*head, *(f"batch {size}, {steps[size]} steps" for size in sizes)], accuracies)
    return f"{first}\n\n{table([*head, *(f'peak LR, batch {size}' for size in sizes), 'time'], facts)}"


def _of(rows: Sequence[Row], name: str, schedule: str, size: int) -> list[Row]:
    return [row for row in rows if (row["optimizer"], row["schedule"], row["batch_size"]) == (name, schedule, size)]


def _peak(rows: Sequence[Row]) -> str:
    peaks = [row["peak_lr"] for row in rows if row["peak_lr"] is not None]
    return f"{statistics.median(peaks):.2g}" if peaks else ""


def _times(rows: Sequence[Row], own: dict[int, list[Row]], schedule: str) -> list[str]:
    ratios = []
    for size, found in own.items():
        sgd = _of(rows, "sgd", "hand-set", size)
        if found and sgd:
            ratios.append(f"{median(found, 'seconds_per_epoch') / median(sgd, 'seconds_per_epoch'):.2f}")
    return ratios


STYLES = {"sgd": ("#000000", "o"), "momentum": ("#999999", "s"), "adam": ("#E69F00", "D"), "lars": ("#0072B2", "^")}
"""Colour and mark of each optimizer; the colours are those of Okabe and Ito."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel a schedule: what is wrong on the test images over the batch size, medians with the span of the seeds."""
    import matplotlib.pyplot as plt

    sizes = sorted({row["batch_size"] for row in rows})
    figure, axes = plt.subplots(1, len(SCHEDULES), figsize=(8, 3.6), sharey=True, layout="constrained")
    for panel, schedule in zip(axes, SCHEDULES, strict=True):
        for number, (name, (color, mark)) in enumerate(STYLES.items()):
            wrong = {size: sorted(100 * (1 - row["top1"]) for row in _of(rows, name, schedule, size)) for size in sizes}
            x = [index + 0.08 * (number - 1.5) for index, size in enumerate(sizes) if wrong[size]]
            values = [own for own in wrong.values() if own]
            middle = [statistics.median(own) for own in values]
            spans = [[m - own[0] for m, own in zip(middle, values, strict=True)]]
            spans += [[own[-1] - m for m, own in zip(middle, values, strict=True)]]
            panel.errorbar(x, middle, spans, color=color, marker=mark, linewidth=1, markersize=5, label=TITLES[name])
        panel.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        panel.set_xlim(-0.5, len(sizes) - 0.5)
        panel.set(xlabel="batch size", title="LR set by hand" if schedule == "hand-set" else "AutoWU, no LR given", yscale="log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        panel.grid(axis="y", alpha=0.3, which="both")
    axes[0].set_ylabel("wrong on the test images, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, help="CIFAR-10, CIFAR-100, Tiny ImageNet or an image folder (default: the digits)"
    )
    parser.add_argument("--img-size", type=int, default=64, help="side of the images of a root, 63 or more (default: 64)")
    parser.add_argument("--optimizers", nargs="+", default=[*TITLES], choices=[*TITLES])
    parser.add_argument("--schedules", nargs="+", default=[*SCHEDULES], choices=[*SCHEDULES])
    parser.add_argument("--lr", type=float, help="at a batch of 64, in place of those of HAND_SET")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256, 1024], help="of a step (default: 64 256 1024)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="of weights and order (default: 0 1 2)")
    parser.add_argument("--workers", type=int, default=4, help="loader processes, but for the digits")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "alexnet_batches.jsonl", help="results file")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args(argv)
    args.lr = None if args.lr is None else dict.fromkeys(TITLES, args.lr)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_experiment(Experiment(jobs, run, report, draw), parse(argv))


if __name__ == "__main__":
    sys.exit(main())
