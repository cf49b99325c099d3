"""The experiments of TVLARS (Do et al. 2023, arXiv 2309.14053) in small: classification, and Barlow Twins with a linear probe.

    python experiments/tvlars.py --opt lars tvlars --sd None lars-warm autowu --lr 1 2 3 --lmbda 1e-6 1e-4 1e-2
    python experiments/tvlars.py --mode bt --opt lars tvlars --sd autowu --batch-size 256
    torchrun --nproc-per-node 8 experiments/tvlars.py --data-root /data/cifar10 --batch-size 16384

Of every option that takes several values all combinations are run. A run is a line of JSON in the results file, written when it
ends; those that are there already are not run again. ``--report`` makes the table, and with ``--figure`` the figure, from the file
alone. Every run has a folder in ``--runs``, with norms and trust ratios of the layers in ``layers.parquet``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from barlow_twins import DIGITS, PHOTOS, BarlowTwins, linear_probe, view
from images import Images, name_of, open_images
from loop import SCHEDULES, evaluate, found_by, make_schedule, parallel, train
from networks import classifier, encoder
from results import HERE, Experiment, Row, spread, table
from results import main as run_experiment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from autowu.optim import LAMB, LARS, TVLARS, param_groups
from autowu.training.evaluation import average_batch_norm
from autowu.training.layers import LayerLog
from autowu.training.process import Process

WEIGHT_DECAY = 5e-4
FEW = 10
"""Labels a class of the second probe."""
OPTIMIZERS = ("lars", "tvlars", "tvlars-reference", "lamb")


class Job(NamedTuple):
    """What names a run in the results file; None where it means nothing to the run.

    Attributes:
        data: name of the images.
        mode: "clf" or "bt".
        sd: the schedule.
        projector: the widths of its layers.
    """

    data: str
    mode: str
    model: str
    opt: str
    sd: str
    lr: float | None
    lmbda: float | None
    batch_size: int
    epochs: int
    img_size: int | None
    bt_lmbda: float | None
    projector: str | None
    seed: int


def jobs(args: argparse.Namespace) -> list[Job]:
    """All runs that are asked for: AutoWU takes no LR, and only TVLARS has a lmbda."""
    data = name_of(args.data_root)
    model = args.model or ("small" if data == "digits" else "resnet18")
    weight = args.bt_lmbda if args.mode == "bt" else None
    widths = "-".join(map(str, args.projector)) if args.mode == "bt" else None
    found: dict[Job, None] = {}
    for seed, size, opt, sd, lr, lmbda in itertools.product(args.seed, args.batch_size, args.opt, args.sd, args.lr, args.lmbda):
        rate, decay = None if sd == "autowu" else lr, lmbda if opt.startswith("tvlars") else None
        found[Job(data, args.mode, model, opt, sd, rate, decay, size, args.epochs, args.img_size, weight, widths, seed)] = None
    return list(found)


def make_optimizer(job: Job, model: nn.Module) -> LARS | LAMB:
    """The optimizer of a run; norms and biases have no decay and no trust ratio."""
    groups, lr = param_groups(model, WEIGHT_DECAY), 1.0 if job.lr is None else job.lr
    if job.opt == "lamb":
        return LAMB(groups, lr)
    if job.lmbda is None:
        return LARS(SGD(groups, lr, momentum=0.9))
    make = TVLARS.reference if job.opt == "tvlars-reference" else TVLARS
    return make(groups, lr, lmbda=job.lmbda)


class _Ratios:
    """Logs the layers, and has the median of their trust ratios for the results file."""

    def __init__(self, folder: Path, optimizer: LARS | LAMB, every: int) -> None:
        self._optimizer, self._every = optimizer, every
        self._log = LayerLog(folder, 0)
        self.medians: list[tuple[int, float]] = []

    def after_step(self, step: int) -> None:
        if step % self._every == 0:
            self._log.add(step, self._optimizer)
            ratios = [layer.trust_ratio for layer in self._optimizer.layer_stats()]
            self.medians.append((step, float(f"{statistics.median(ratios):.4g}")))

    def finish(self) -> None:
        self._log.finish()
        self._log.close()


def run(job: Job, args: argparse.Namespace, process: Process) -> Row:
    """One run, on all processes; the line of the results file."""
    plain = ["--no-aug"] if job.mode == "bt" else ["--scale", "0.5", "1"]  # the views are random enough
    options = ["--seed", str(job.seed), *(["--model", job.model] if job.model != "small" else []), *plain]
    images = open_images(args.data_root, process, job.batch_size, job.seed, args.img_size, args.workers, options)
    torch.manual_seed(job.seed)
    return _classify(job, args, images) if job.mode == "clf" else _pretrain(job, args, images)


def _train(job: Job, args: argparse.Namespace, images: Images, module: nn.Module, loss_of: Any) -> Row:
    """Train a module by its loss; what the optimizer did. Logs go to a folder on the main process."""
    process, loaders = images.process, images.loaders()
    steps = job.epochs * len(loaders.train)
    optimizer = make_optimizer(job, module)
    scheduler = make_schedule(job.sd, optimizer, module, steps)
    ratios = None
    if process.is_main:
        folder = args.runs / "_".join(str(part) for part in job if part is not None)
        folder.mkdir(parents=True, exist_ok=True)
        ratios = _Ratios(folder, optimizer, args.log_layers)
    after_step = {} if ratios is None else {"after_step": ratios.after_step}
    seconds = train(module, loss_of, optimizer, scheduler, loaders, job.epochs, process.device, **after_step)
    if ratios is not None:
        ratios.finish()
    thinned = [] if ratios is None else ratios.medians[:: max(1, len(ratios.medians) // 20)]
    return {"steps": steps, **found_by(scheduler, job.lr), "seconds": round(sum(seconds), 2), "trust_ratios": thinned}


def _classify(job: Job, args: argparse.Namespace, images: Images) -> Row:
    model = classifier(images).to(images.process.device)
    forward = parallel(model, images.process)
    facts = _train(job, args, images, model, lambda inputs, labels: F.cross_entropy(forward(inputs), labels))
    average_batch_norm(model, images.process)
    return {**job._asdict(), **facts, **evaluate(model, images.loaders(), images.process), "torch": torch.__version__}


def _pretrain(job: Job, args: argparse.Namespace, images: Images) -> Row:
    """Barlow Twins, and what a linear probe makes of the features; of those before the training, too."""
    process, how = images.process, DIGITS if images.name == "digits" else PHOTOS
    features, width = encoder(images)
    if process.world_size > 1 and process.device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        features = convert_sync_batchnorm(features)
    twins = BarlowTwins(features, width, args.projector, args.bt_lmbda).to(process.device)
    forward = parallel(twins, process)
    before = _probes(images, features, "random")
    if images.name == "digits":  # the pixels of others are too many
        before |= _probes(images, nn.Flatten(), "pixels")
    torch.manual_seed(1000 * job.seed + process.rank)  # each process has views of its own
    losses: list[Tensor] = []

    def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
        losses.append(forward(view(inputs, how), view(inputs, how)))
        del losses[:-1]
        return losses[0]

    facts = _train(job, args, images, twins, loss_of)
    facts["last_loss"] = round(losses[0].item(), 4)
    return {**job._asdict(), **facts, **_probes(images, features, "trained"), **before, "torch": torch.__version__}


def _probes(images: Images, features: nn.Module, name: str) -> Row:
    """Accuracies of probes with all labels and with a few a class, on the main process."""
    if not images.process.is_main:
        return {}
    alone = Images(images.name, images.config, images.data, images.size, Process(0, 1, images.process.device))
    loaders = alone.loaders(batch_size=min(64, images.data.num_train))  # nearly all images: what fills no batch is left out
    (inputs, labels), tested = (_features(features, loader, alone.process.device) for loader in (loaders.train, loaders.test))
    few = torch.cat([(labels == label).nonzero()[:FEW, 0] for label in range(images.data.num_classes)])
    both = {"all": (inputs, labels), "few": (inputs[few], labels[few])}
    return {f"{name}_{which}": round(linear_probe(part, tested, images.data.num_classes), 5) for which, part in both.items()}


@torch.no_grad()
def _features(model: nn.Module, loader: Iterable[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    model.eval()
    parts = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    model.train()
    inputs, labels = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(labels)


KINDS = ("trained", "random", "pixels")
"""What is probed: the trained features, the same before the training, the images themselves."""
COLORS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#56B4E9", "#CC79A7", "#999999", "#7F3F00")
"""Those of Okabe and Ito, and two more."""
TITLES = {"lars": "LARS", "tvlars": "TVLARS", "tvlars-reference": "TVLARS.reference", "lamb": "LAMB"}


def report(rows: Sequence[Row]) -> str:
    """A table in Markdown: medians over the seeds, with their range."""
    bt = rows[0]["mode"] == "bt"
    probes = {f"{kind}_{which}": f"{kind}, {which} labels" for which in ("all", "few") for kind in KINDS}
    columns = {key: title for key, title in probes.items() if key in rows[0]} if bt else {"top1": "top-1", "top5": "top-5"}
    cells = []
    for key, found in _grouped(rows):
        opt, sd, size, lr, lmbda = key
        name = [TITLES[opt], sd, str(size), "" if lr is None else f"{lr:g}", "" if lmbda is None else f"{lmbda:g}"]
        peaks = [row["peak_lr"] for row in found if row["peak_lr"] is not None]
        cells.append([*name, f"{statistics.median(peaks):.2g}" if peaks else "none", *(spread(found, c) for c in columns)])
    return table(["optimizer", "--sd", "batch", "LR", "lmbda", "peak LR", *columns.values()], cells)


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """The runs that differ by their seeds only, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in ("opt", "sd", "batch_size", "lr", "lmbda")), []).append(row)
    return iter(found.items())


def _draw_classification(rows: Sequence[Row], left: Any, right: Any) -> None:
    """Top-1 over the LR, medians with the span of the seeds; where AutoWU finds the LR, at the peak that it found."""
    curves: dict[str, list[list[Row]]] = {}
    for (opt, sd, _, _, lmbda), found in _grouped(rows):
        curves.setdefault(_title(opt, sd, lmbda), []).append(found)
    for number, (title, points) in enumerate(curves.items()):
        color, mark = COLORS[number % len(COLORS)], "*" if "autowu" in title else "o"
        tops = [[100 * row["top1"] for row in point] for point in points]
        middle = [statistics.median(top) for top in tops]
        spans = [[m - min(top) for m, top in zip(middle, tops, strict=True)]]
        spans += [[max(top) - m for m, top in zip(middle, tops, strict=True)]]
        x = [statistics.median(row["peak_lr"] or 1 for row in point) for point in points]
        left.errorbar(x, middle, spans, color=color, marker=mark, linewidth=1, label=title)
        _draw_ratios(right, points[-1][0], color, title)
    left.set(xscale="log", xlabel="peak LR", ylabel="top-1, %")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=7)


def _draw_probes(rows: Sequence[Row], left: Any, right: Any) -> None:
    """Accuracies of the probes, a point a seed."""
    groups = [(_title(opt, sd, lmbda), "trained", found) for (opt, sd, _, _, lmbda), found in _grouped(rows)]
    groups += [(kind, kind, groups[0][2]) for kind in KINDS[1:] if f"{kind}_all" in rows[0]]
    for number, (title, kind, found) in enumerate(groups):
        for which, mark in (("all", "o"), ("few", "^")):
            tops = [100 * row[f"{kind}_{which}"] for row in found]
            label = {"all": "all labels", "few": f"{FEW} labels a class"}[which] if number == 0 else None
            left.plot([number] * len(tops), tops, mark, color="#0072B2" if which == "all" else "#D55E00", alpha=0.6, label=label)
        if kind == "trained":
            _draw_ratios(right, found[0], COLORS[number % len(COLORS)], title)
    left.set_xticks(range(len(groups)), [title.replace(", ", "\n") for title, *_ in groups], fontsize=7)
    left.set(ylabel="top-1 of the probe, %")
    left.grid(axis="y", alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)


def _draw_ratios(axis: Any, row: Row, color: str, title: str) -> None:
    steps, ratios = zip(*row["trust_ratios"], strict=True)
    axis.plot(steps, ratios, color=color, linewidth=1, label=title)
    axis.set(yscale="log", xlabel="step", ylabel="median trust ratio of the layers")
    axis.grid(alpha=0.3)


def _title(opt: str, sd: str, lmbda: float | None) -> str:
    return f"{TITLES[opt]}, {sd}" + ("" if lmbda is None else f", lmbda {lmbda:g}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Of classification accuracies and trust ratios, of Barlow Twins the probes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    (_draw_probes if rows[0]["mode"] == "bt" else _draw_classification)(rows, *axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _numbers(parser: argparse.ArgumentParser, name: str, kind: type, default: Any, help: str) -> None:
    parser.add_argument(name, type=kind, nargs="+", default=[default], help=f"{help} (default: {default})")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="clf", choices=("clf", "bt"), help="classification (the default) or Barlow Twins")
    parser.add_argument(
        "--data-root", type=Path, help="CIFAR-10, CIFAR-100, Tiny ImageNet or an image folder (default: the digits)"
    )
    parser.add_argument("--img-size", type=int, help="side of the images of a root (default: 32 for CIFAR, else 64)")
    parser.add_argument("--model", help="of timm's, for the images of a root (default: resnet18)")
    parser.add_argument("--opt", nargs="+", default=["tvlars"], choices=OPTIMIZERS)
    parser.add_argument("--sd", nargs="+", default=["None"], choices=SCHEDULES, help="schedule of the LR; autowu finds one")
    _numbers(parser, "--lr", float, 1.0, "the paper has 1, 2 and 3")
    _numbers(parser, "--lmbda", float, 1e-3, "of TVLARS, a step; the paper has 1e-6 to 1e-2")
    _numbers(parser, "--batch-size", int, 512, "of a step, on all processes")
    _numbers(parser, "--seed", int, 0, "of weights, order and views")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--bt-lmbda", type=float, default=0.005, help="weight of the redundancy in Barlow Twins")
    parser.add_argument("--projector", type=int, nargs="+", default=[256, 256, 256], help="widths of the projector of Barlow Twins")
    parser.add_argument("--log-layers", type=int, default=5, metavar="N", help="log the layers of every Nth step")
    parser.add_argument("--workers", type=int, default=4, help="loader processes, but for the digits")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=Path, default=Path("runs", "tvlars"), help="folder of the runs' own folders")
    parser.add_argument("--out", type=Path, help="results file (default: experiments/results/tvlars_MODE.jsonl)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args(argv)
    args.out = args.out or HERE / "results" / f"tvlars_{args.mode}.jsonl"
    for name, least in (("log_layers", 1), ("epochs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_experiment(Experiment(jobs, run, report, draw), parse(argv))


if __name__ == "__main__":
    sys.exit(main())
