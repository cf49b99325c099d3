"""What large batches do to seven optimizers in the same number of epochs: at LRs set by hand, and with AutoWU given none.

    python benchmarks/compare_optimizers.py [--quick] [--jobs 2] [--figure assets/compare_optimizers.png]
    python benchmarks/compare_optimizers.py --images FOLDER [--batch-sizes 256 1024] [--epochs 30] [--device cuda]

A small convolutional network (tasks.py) is trained on scikit-learn's digits with batches of 64, 256 and 1,347, which is all of
them, for 30 epochs: 630, 150 and 30 steps. All runs of a seed begin with the same weights, and those of one batch size see the data
in the same order. Schedules:

- ``hand-set``: 5 % linear warm-up, then cosine. The peak LR is a convention of the field for one batch size, brought to this one by
  the linear rule, for Adam and LAMB by the square-root rule; RECIPES says where each comes from. None was tuned on this task.
- ``autowu``: AutoWU(optimizer, total_steps=..., model=model), and nothing else.
- ``own``: TVLARS alone, at the hand-set LR and with nothing but the decay of its trust coefficient, as its authors use it.

Under the first two schedules that decay and the schedule's multiply. It is set by the length T of the run. For ``tvlars``
(lmbda = 10 / T, delay = T / 2) the coefficient begins at 99 % of its bound, has 86 % at 0.32 T, where AutoWU's warm-up ends at the
latest, half at T / 2 and 1 % in the end. ``tvlars-reference`` (lmbda = 5 / T) falls from the first step, by 0.32 T to about a
fifth, and ends at 1 % too.

Weights are decayed and adapted, norms and biases are not (``param_groups``). A run is a line of JSON in the results file, written
when it ends; those that are there already are not run again. ``--report`` makes the tables, and with ``--figure`` the figure, from
the file alone. The images of ``--images`` lie in class folders, in train/ and val/ or all together, then a fifth of each class is
for the test; an AlexNet with batch norm is trained on them, without augmentation.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from machine import machine
from peers import cosine
from regret import read
from tasks import make_task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, Dataset, Subset

from autowu import AutoWU
from autowu.optim import LAMB, LARS, TVLARS, linear_scaled_lr, param_groups, sqrt_scaled_lr

HERE = Path(__file__).parent
EPOCHS = 30
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZES = (64, 256, 1347)

Groups = list[dict[str, Any]]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """An optimizer as it is set by hand.

    Attributes:
        make: from parameter groups, an LR and the number of steps in the run.
        lr, batch_size: the LR by convention, and the batch size that it is for.
        scaled: the rule by which the LR goes with the batch size.
    """

    title: str
    make: Callable[[Groups, float, int], Optimizer]
    lr: float
    batch_size: int
    scaled: Callable[[float, int, int], float]
    weight_decay: float
    schedules: tuple[str, ...] = ("hand-set", "autowu")

    def lr_at(self, batch_size: int) -> float:
        return self.scaled(self.lr, batch_size, self.batch_size)


def _lars(groups: Groups, lr: float, steps: int) -> Optimizer:
    return LARS(SGD(groups, lr, momentum=0.9))


def _tvlars(groups: Groups, lr: float, steps: int) -> Optimizer:
    return TVLARS(groups, lr, lmbda=10 / steps, delay=steps / 2)


def _tvlars_reference(groups: Groups, lr: float, steps: int) -> Optimizer:
    return TVLARS.reference(groups, lr, lmbda=5 / steps)


RECIPES = {
    # As momentum's, over 1 - 0.9: in the end a gradient moves the weights as far.
    "sgd": Recipe("SGD", lambda groups, lr, steps: SGD(groups, lr), 1.0, 256, linear_scaled_lr, 5e-4),
    # ResNet-50 on ImageNet, Goyal et al. 2017.
    "momentum": Recipe("SGD, momentum", lambda groups, lr, steps: SGD(groups, lr, 0.9), 0.1, 256, linear_scaled_lr, 5e-4),
    # Default and batch size of Kingma and Ba 2015.
    "adam": Recipe("Adam", lambda groups, lr, steps: Adam(groups, lr), 1e-3, 128, sqrt_scaled_lr, 0.0),
    # SimCLR, Chen et al. 2020.
    "lars": Recipe("LARS", _lars, 0.3, 256, linear_scaled_lr, 5e-4),
    # ResNet-50 on ImageNet, You et al. 2020.
    "lamb": Recipe("LAMB", lambda groups, lr, steps: LAMB(groups, lr, weight_decay=0.01), 5e-3, 512, sqrt_scaled_lr, 0.01),
    # As LARS.
    "tvlars": Recipe("TVLARS", _tvlars, 0.3, 256, linear_scaled_lr, 5e-4, ("hand-set", "autowu", "own")),
    "tvlars-reference": Recipe(
        "TVLARS.reference", _tvlars_reference, 0.3, 256, linear_scaled_lr, 5e-4, ("hand-set", "autowu", "own")
    ),
}
SCHEDULES = {"hand-set": "hand-set", "autowu": "AutoWU", "own": "its own decay"}


class Job(NamedTuple):
    """What names a run in the results file."""

    data: str
    optimizer: str
    schedule: str
    batch_size: int
    epochs: int
    seed: int


class Digits:
    """The digits and the convolutional network of tasks.py."""

    def __init__(self, device: str) -> None:
        self._task = make_task("cnn", device)
        self.train_size = len(self._task.train[0])
        self.new_model = self._task.new_model
        self.batches = self._task.batches

    def chunks(self, part: str) -> Iterable[Batch]:
        """All of "train" or "test", in order."""
        inputs, targets = self._task.train if part == "train" else self._task.test
        return ((inputs[first : first + 256], targets[first : first + 256]) for first in range(0, len(inputs), 256))


class Images:
    """A folder of images and an AlexNet for them."""

    def __init__(self, folder: Path, size: int, device: str, workers: int) -> None:
        train, test, self.classes = image_folders(folder, size)
        self._parts = {"train": train, "test": test}
        self.train_size = len(train)  # type: ignore[arg-type]
        self._size, self._device = size, torch.device(device)
        self._options: dict[str, Any] = {"num_workers": workers, "pin_memory": device == "cuda"}

    def new_model(self) -> nn.Module:
        return alexnet(self.classes, self._size).to(self._device)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Batches without end: the data in a new order each time through; what makes no full batch is left out."""
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(self._parts["train"], batch_size, True, drop_last=True, generator=generator, **self._options)
        while True:
            yield from self._moved(loader)

    def chunks(self, part: str) -> Iterable[Batch]:
        return self._moved(DataLoader(self._parts[part], 256, **self._options))

    def _moved(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for inputs, targets in loader:
            yield inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)


def image_folders(folder: Path, size: int) -> tuple[Dataset[Any], Dataset[Any], int]:
    """The images to train on and to test with, as squares of `size` pixels, and the number of classes."""
    from sklearn.model_selection import train_test_split
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    transform = Compose([Resize(size), CenterCrop(size), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    if (folder / "train").is_dir():
        train, test = (ImageFolder(str(folder / part), transform) for part in ("train", "val"))
        if train.classes != test.classes:
            raise SystemExit(f"--images {folder}: train and val do not have the same classes")
        return train, test, len(train.classes)
    images = ImageFolder(str(folder), transform)
    parts = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=images.targets)
    return Subset(images, parts[0]), Subset(images, parts[1]), len(images.classes)


def alexnet(classes: int, size: int) -> nn.Module:
    """AlexNet in the widths of torchvision's, with batch norm in place of local response normalisation, for 64 pixels or more."""

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=2 if kernel > 3 else 1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    features = nn.Sequential(
        *(*conv(3, 64, 11, 4), nn.MaxPool2d(3, 2)),
        *(*conv(64, 192, 5), nn.MaxPool2d(3, 2)),
        *(*conv(192, 384, 3), *conv(384, 256, 3), *conv(256, 256, 3), nn.MaxPool2d(3, 2), nn.Flatten()),
    )
    with torch.no_grad():
        width = features.eval()(torch.zeros(1, 3, size, size)).shape[1]
    hidden = (layer for inputs in (width, 4096) for layer in (nn.Dropout(), nn.Linear(inputs, 4096), nn.ReLU()))
    return nn.Sequential(*features, *hidden, nn.Linear(4096, classes)).train()


@dataclass(frozen=True)
class Settings:
    """What all runs of a call share."""

    images: Path | None
    size: int
    device: str
    workers: int

    @property
    def data(self) -> str:
        return "digits" if self.images is None else f"{self.images.resolve().name} {self.size}"


@lru_cache(1)
def source(settings: Settings) -> Digits | Images:
    if settings.images is None:
        return Digits(settings.device)
    return Images(settings.images, settings.size, settings.device, settings.workers)


@torch.no_grad()
def evaluate(model: nn.Module, chunks: Iterable[Batch]) -> tuple[float, float, float]:
    """Mean loss and top-1 and top-5 accuracy, in evaluation mode."""
    model.eval()
    loss, top1, top5, count = 0.0, 0, 0, 0
    for inputs, targets in chunks:
        logits = model(inputs)
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        count += len(targets)
    model.train()
    return loss / count, top1 / count, top5 / count


def clock(device: str) -> float:
    """Seconds of this process, which others on the machine hardly change; on a GPU, seconds by the clock."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def train(job: Job, settings: Settings) -> dict[str, Any]:
    """One run; the line of the results file."""
    data, recipe = source(settings), RECIPES[job.optimizer]
    steps_per_epoch = data.train_size // job.batch_size
    total = steps_per_epoch * job.epochs
    torch.manual_seed(job.seed)
    model = data.new_model()
    peak: float | None = recipe.lr_at(job.batch_size)
    assert peak is not None
    # AutoWU sets the LR; it takes none from the optimizer.
    optimizer = recipe.make(param_groups(model, recipe.weight_decay), 1.0 if job.schedule == "autowu" else peak, total)
    scheduler = AutoWU(optimizer, total_steps=total, model=model) if job.schedule == "autowu" else None
    schedule = cosine(optimizer, total, round(0.05 * total)) if job.schedule == "hand-set" else None
    batches, seconds = data.batches(job.batch_size, job.seed), []
    for _ in range(job.epochs):
        started = clock(settings.device)
        for _ in range(steps_per_epoch):
            inputs, targets = next(batches)
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if scheduler is not None:
                scheduler.step(loss.detach())
            elif schedule is not None:
                schedule.step()
        seconds.append(clock(settings.device) - started)
    facts: dict[str, Any] = {"switch_step": None, "events": []}
    if scheduler is not None:
        switch, events = scheduler.switch, [(event.kind, event.step) for event in scheduler.events]
        setbacks = sum(kind == "divergence" for kind, _ in events)
        peak = None if switch is None else switch.lr * 0.5**setbacks
        facts = {"switch_step": None if switch is None else switch.step, "events": events}
    if isinstance(optimizer, (LARS, LAMB)):
        ratios = sorted(layer.trust_ratio for layer in optimizer.layer_stats())
        spread = (ratios[0], statistics.median(ratios), ratios[-1])
        facts["trust_ratios"] = [float(f"{ratio:.4g}") for ratio in spread] if math.isfinite(sum(spread)) else None
    train_loss, *_ = evaluate(model, data.chunks("train"))
    test_loss, top1, top5 = evaluate(model, data.chunks("test"))
    finite = math.isfinite(test_loss) and math.isfinite(train_loss)
    return {
        **job._asdict(),
        "steps": total,
        "finite": finite,
        "top1": round(top1, 5),
        "top5": round(top5, 5),
        "test_loss": round(test_loss, 6) if finite else None,
        "train_loss": round(train_loss, 6) if finite else None,
        "peak_lr": None if peak is None else float(f"{peak:.4g}"),
        **facts,
        "seconds_per_epoch": float(f"{statistics.median(seconds):.4g}"),
        **{key: value for key, value in machine(settings.device).items() if key in ("device", "torch")},
    }


def run(job: Job, settings: Settings) -> dict[str, Any]:
    """A run in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    return train(job, settings)


def jobs(
    data: str,
    batch_sizes: Iterable[int],
    epochs: int,
    seeds: Iterable[int],
    optimizers: Iterable[str] = RECIPES,
    schedules: Iterable[str] = SCHEDULES,
) -> list[Job]:
    """All runs that are asked for."""
    return [
        Job(data, name, schedule, batch_size, epochs, seed)
        for seed in seeds
        for batch_size in batch_sizes
        for name in optimizers
        for schedule in RECIPES[name].schedules
        if schedule in schedules
    ]


def job_of(row: dict[str, Any]) -> Job:
    return Job(*(row[field] for field in Job._fields))


def run_all(wanted: list[Job], path: Path, settings: Settings, workers: int) -> None:
    """Run what is not in the file yet, and append it."""
    done = {job_of(row) for row in read(path)}
    left = [job for job in wanted if job not in done]
    started = time.perf_counter()
    if not left:
        return
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool, path.open("a") as file:
        futures = {pool.submit(run, job, settings): job for job in left}
        for count, future in enumerate(as_completed(futures), 1):
            if error := future.exception():
                print(f"{futures[future]}: {error!r}", flush=True)
                continue
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            if count % 20 == 0 or count == len(left):
                print(f"{count} of {len(left)} runs in {time.perf_counter() - started:.0f} s", flush=True)


Rows = list[dict[str, Any]]


def by_case(rows: Rows) -> dict[tuple[str, str], dict[int, Rows]]:
    """The runs of each optimizer and schedule, by batch size, in the order of RECIPES."""
    found: dict[tuple[str, str], dict[int, Rows]] = {}
    for name, recipe in RECIPES.items():
        for schedule in recipe.schedules:
            own = [row for row in rows if (row["optimizer"], row["schedule"]) == (name, schedule)]
            if own:
                sizes = sorted({row["batch_size"] for row in own})
                found[name, schedule] = {size: [row for row in own if row["batch_size"] == size] for size in sizes}
    return found


def median(rows: Rows, key: str) -> float:
    """Over the seeds; a run that ended non-finite counts as the worst."""
    return statistics.median(math.inf if row[key] is None else row[key] for row in rows)


def report(rows: Rows) -> str:
    """The two tables, as Markdown: what came out, and what the runs did."""
    sizes = sorted({row["batch_size"] for row in rows})
    steps = {row["batch_size"]: row["steps"] for row in rows}
    cases = by_case(rows)
    titles = {case: [RECIPES[case[0]].title, SCHEDULES[case[1]]] for case in cases}
    lines = [
        f"| optimizer | schedule | {' | '.join(f'batch {size:,}, {steps[size]} steps' for size in sizes)} |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for case, found in cases.items():
        cells = [
            f"{median(found[size], 'top1'):.1%}, {median(found[size], 'test_loss'):.3f}" if size in found else "" for size in sizes
        ]
        lines.append(f"| {' | '.join([*titles[case], *cells])} |")
    lines += [
        "",
        f"| optimizer | schedule | {' | '.join(f'peak LR, batch {size:,}' for size in sizes)} | trust ratios | time |",
        "|---|---|" + "---|" * len(sizes) + "---|---|",
    ]
    baseline = cases.get(("sgd", "hand-set"), {})
    for case, found in cases.items():
        cells = [_peak(found[size]) if size in found else "" for size in sizes]
        cells.append(_ratios(found[max(found)]))
        times = [
            median(found[size], "seconds_per_epoch") / median(baseline[size], "seconds_per_epoch")
            for size in baseline
            if size in found
        ]
        cells.append(", ".join(f"{ratio:.2f}" for ratio in times))
        lines.append(f"| {' | '.join([*titles[case], *cells])} |")
    return "\n".join(lines)


def _peak(rows: Rows) -> str:
    lr = f"{median(rows, 'peak_lr'):.2g}"
    return lr if rows[0]["switch_step"] is None else f"{lr} (step {median(rows, 'switch_step'):.0f})"


def _ratios(rows: Rows) -> str:
    spreads = [row["trust_ratios"] for row in rows if row.get("trust_ratios")]
    return ", ".join(f"{statistics.median(values):.2g}" for values in zip(*spreads, strict=True))


STYLES = {
    "sgd": ("#000000", "o"),
    "momentum": ("#999999", "s"),
    "adam": ("#E69F00", "D"),
    "lars": ("#0072B2", "^"),
    "lamb": ("#D55E00", "v"),
    "tvlars": ("#56B4E9", "P"),
    "tvlars-reference": ("#009E73", "X"),
}
"""Colour and mark of each optimizer; the colours are those of Okabe and Ito."""


def draw(rows: Rows, path: Path) -> None:
    """A column a schedule, a row a metric: the medians over the batch size, with the span of the seeds."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    sizes = sorted({row["batch_size"] for row in rows})
    columns = [schedule for schedule in SCHEDULES if any(row["schedule"] == schedule for row in rows)]
    figure, axes = plt.subplots(
        2, len(columns), figsize=(1 + 2.9 * len(columns), 6), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    count = len(RECIPES)
    metrics: dict[str, Callable[[dict[str, Any]], float]] = {
        "wrong on the test set": lambda row: max(1 - row["top1"], 2e-3),
        "test loss": lambda row: row["test_loss"] if row["finite"] else math.nan,
    }
    for line, (label, metric) in enumerate(metrics.items()):
        for column, schedule in enumerate(columns):
            panel = axes[line][column]
            for number, (name, (color, mark)) in enumerate(STYLES.items()):
                values = {
                    size: sorted(metric(row) for row in found) for size, found in by_case(rows).get((name, schedule), {}).items()
                }
                # Side by side, so that no mark hides another.
                x = [sizes.index(size) + 0.07 * (number - (count - 1) / 2) for size in values]
                middle = [statistics.median(own) for own in values.values()]
                spans = [[m - own[0] for m, own in zip(middle, values.values(), strict=True)]]
                spans += [[own[-1] - m for m, own in zip(middle, values.values(), strict=True)]]
                style = {"color": color, "marker": mark, "markersize": 5, "linewidth": 1.0, "elinewidth": 0.8}
                panel.errorbar(x, middle, spans, label=RECIPES[name].title, **style)
            every = [value for value in map(metric, rows) if math.isfinite(value)]
            panel.set(yscale="log", ylim=(0.8 * min(every), 1.25 * max(every)))
            panel.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
            panel.grid(axis="y", alpha=0.3)
            if line == 0:
                panel.set_title({"hand-set": "LR set by hand", "autowu": "AutoWU, no LR given", "own": "TVLARS alone"}[schedule])
            else:
                panel.set_xlabel("batch size")
            if column == 0:
                panel.set_ylabel(label)
    for axis, label_of in (
        (axes[0][0].yaxis, lambda share, _: f"{100 * share:g} %"),
        (axes[1][0].yaxis, lambda loss, _: f"{loss:g}"),
    ):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(label_of)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 epochs, batches of 64, one seed: under a minute")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--images", type=Path, help="a folder of images in place of the digits")
    parser.add_argument("--image-size", type=int, default=64, help="pixels, 64 or more")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--optimizers", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument("--schedules", nargs="+", default=[*SCHEDULES], choices=[*SCHEDULES])
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--workers", type=int, default=0, help="of each process, that load images")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.image_size < 64:
        parser.error(f"--image-size {args.image_size}: must be at least 64")
    settings = Settings(args.images, args.image_size, args.device, args.workers)
    suffix = ("_quick" if args.quick else "") + ("_images" if args.images else "")
    out = args.out or HERE / "results" / f"compare_optimizers{suffix}.jsonl"
    epochs = args.epochs or (2 if args.quick else EPOCHS)
    seeds = args.seeds or ([0] if args.quick else [*SEEDS])
    batch_sizes = args.batch_sizes or ([64] if args.quick else [256, 1024] if args.images else [*BATCH_SIZES])
    wanted = jobs(settings.data, batch_sizes, epochs, seeds, args.optimizers, args.schedules)
    if not args.report:
        if max(batch_sizes) > (size := source(settings).train_size):
            parser.error(f"--batch-sizes {max(batch_sizes)}: there are {size} images to train on")
        print(json.dumps(machine(args.device)))
        run_all(wanted, out, settings, args.jobs)
    rows = [row for row in read(out) if job_of(row) in set(wanted)]
    if not rows:
        parser.error(f"{out}: no such runs in it")
    print(report(rows))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
