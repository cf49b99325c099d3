"""How far from a tuned learning rate? AutoWU, given no LR, beside a grid of peak LRs and beside what promises the same.

    python benchmarks/regret.py [--quick] [--device cuda] [--methods autowu paper ...] [--jobs 2]

Each case is a task, an optimizer, a batch size and a number of steps (tasks.py says what they are). For every seed it is trained
with each of nine peak LRs, half a decade apart, under 5 % linear warm-up and cosine, and once with each method, with the same
steps, data, order of the data and initial weights:

- ``autowu``: AutoWU(optimizer, total_steps=..., model=model), and nothing else; ``paper``: AutoWU.paper, in 30 epochs.
- what promises the same: peers.py says what and how.
- names in ABLATION: AutoWU with one thing changed; run where asked for.

Variants of the rule are compared on the suite of hard_tasks.py, whose grid is kept (or on another suite with a grid):

    python benchmarks/regret.py --suite hard --jobs 1 --variant NAME [--autowu '{"peak_factor": 0.5}'] [--cases vit "mlp*lion"]
        [--seeds 0 1] [--shard 1/2] [--minutes 5]
    python benchmarks/regret.py --suite hard --report [NAME 0.1.0 ...] [--against 0.1.0] [--seeds 0 1]

The first runs AutoWU(optimizer, total_steps=..., model=model, and the arguments given) as the checkout has it, and prints a line a
run; the lines are kept in results/hard/NAME.jsonl. Without `--variant` it runs what is missing of the grid: LRs from a middle one
outward until the two on both sides of the best are known. `--methods adalrs ...` runs peers, `--tuned` the best LR at other lengths
of the run. The second compares all, or what is named on the runs that these share, and an honest sweep; measures.py says what the
numbers are. The LR of a run is the one with which its cooldown begins. On the suites ``kinds``, of other_tasks.py, and
``optimizers``, 94 of the package pytorch_optimizer, nothing is to be chosen. A case whose package or data are not installed is left
out, with a word.

A run is a line of JSON in the results file, written when it ends; those that are there already are not run again. The report
takes test loss, final training loss (mean of the last tenth) and accuracy as ratios to the best of the grid on that seed and
metric, a bar that no sweep can beat that has to choose before it knows; ``sweep`` is an honest one: LR chosen on the other seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import inspect
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hard_tasks import HARD, LONG, PLATEAUS
from machine import machine
from measures import FLOOR, LOOKS, beside_peers, best_of_grid, freeze, geometric_mean, outcomes, profile, sweep, table, tuned_lrs
from other_tasks import KINDS
from peers import EPOCHS, PEERS, Recipe, cosine, peer
from tasks import PACKAGED, Task, learning_rates, make_optimizer, make_task, packaged
from torch import Tensor, nn

from autowu import AutoWU
from autowu.families import lr_range

HERE = Path(__file__).parent
TARGETS = "targets.json"
RESULTS = HERE / "results"
SEEDS = (0, 1, 2)

CASES: dict[str, tuple[str, ...]] = {
    "cpu": (
        *("mlp sgd 32 1980", "mlp sgd 128 480", "mlp adamw 128 480", "mlp adamp 512 240", "mlp lars 1347 240", "mlp lamb 128 480"),
        *("cnn sgd 128 480", "cnn adamw 32 900", "cnn adamp 128 480", "cnn lars 512 240", "cnn lamb 1347 210"),
        *("lm32 adamw 16 600", "lm32 adamp 64 210", "lm64 sgd 16 300", "lm64 adamw 16 300", "lm64 lars 16 300", "lm64 lamb 16 300"),
        *("lm128 adamw 8 300", "resnet sgd 32 300", "resnet adamw 64 240", "resnet lars 128 210"),
    ),
    "hard": HARD,
    "plateaus": PLATEAUS,
    "long": LONG,
    "kinds": KINDS,
    "optimizers": tuple(f"{task} {name} {size} 300" for task, size in (("mlp", 64), ("gru", 16)) for name in PACKAGED),
    "quick": ("mlp sgd 128 240", "cnn adamw 128 240", "mlp lamb 128 240"),
    "gpu": (
        *(
            "mlp sgd 128 480",
            "cnn sgd 128 480",
            "cnn lamb 1347 210",
            "lm128 adamw 64 1980",
            "lm256 adamw 64 1980",
            "lm512 adamw 64 990",
        ),
        *("lm256 sgd 64 1980", "lm256 lars 256 990", "lm256 lamb 256 990", "lm256 adamp 64 990"),
        *("resnet sgd 128 1980", "resnet adamw 512 600", "resnet lars 2048 300", "resnet lamb 2048 300"),
    ),
}

ADAPTIVE = ("hard", "plateaus", "long", "kinds", "optimizers")
"""Suites whose grid grows outward from a middle LR."""
STARTS = {
    "sgd": 0.1,
    "adamw": 0.01,
    "muon": 0.01,
    "lion": 0.001,
    "nadam": 0.003162,
    "rmsprop": 0.001,
    "adagrad": 0.03162,
    "adafactor": 0.01,
    "lars": 1.0,
    **dict.fromkeys(("madgrad", "adan", "adopt", "mars", "laprop", "schedulefree"), 0.003162),
}
"""Where a grid starts that grows outward; that of others by the default LR of their class."""
LENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Of a tuned run, as shares of the case's steps."""

# Arguments of AutoWU by the name under which its runs are recorded.
Variants = dict[str, dict[str, Any]]
METHODS = ("autowu", "paper", *PEERS[:5])
ABLATION: Variants = {
    f"{share:.0%} of the run, {factor:.2g} of the LR{', from a decade below' if below else ''}": {
        "max_warmup_fraction": share,
        "peak_factor": factor,
        "below": below,
        "warmup_type": "exp",
        "patience": 3,
        "immediate_cooldown": True,
        "cooldown_type": "cosine",
    }
    for share, factor, below in (
        *((0.5, 1.0, True), (0.5, 0.5, True), (0.35, 0.5, True), (0.25, 1.0, True), (0.25, 0.5, True), (0.25, 1 / 3, True)),
        *((0.4, 1.0, False), (0.4, 0.7, False), (0.4, 0.5, False)),
    )
}
"""Of the first search: share of the run for the warm-up, peak LR over that at the minimum; some from a tenth of the `min_lr`."""
ABLATION |= {
    "cosine from the switch on": {"immediate_cooldown": True, "cooldown_type": "cosine"},
    "linear from the switch on": {"immediate_cooldown": True},
    "cosine over the last half": {"cooldown_type": "cosine", "cooldown_fraction": 0.5},
    "half of the LR for all but LAMB": {"halved": True},
}
"""Of the last one."""


@dataclass(frozen=True)
class Case:
    task: str
    optimizer: str
    batch_size: int
    steps: int

    @classmethod
    def parse(cls, name: str) -> Case:
        task, optimizer, batch_size, steps = name.split()
        return cls(task, optimizer, int(batch_size), int(steps))

    def __str__(self) -> str:
        return f"{self.task} {self.optimizer} {self.batch_size} {self.steps}"


def recipe(method: str, lr: float | None, case: Case, task: Task, model: nn.Module, seed: int, variants: Variants) -> Recipe:
    """What `method` does to train `model`; `lr` is for the grid."""
    total, warmup = case.steps, round(0.05 * case.steps)
    if method == "grid":
        assert lr is not None
        optimizer = make_optimizer(case.optimizer, model, lr)
        constant = case.optimizer.lower().startswith("schedulefree")  # as its authors want it
        length = math.inf if constant else total
        schedule = cosine(optimizer, length, warmup)
        return Recipe(optimizer, lambda loss: schedule.step())
    if method in ("autowu", "paper", *ABLATION, *variants):
        optimizer = make_optimizer(case.optimizer, model, default_lr(case.optimizer))
        if method == "paper":
            scheduler = AutoWU.paper(optimizer, total // EPOCHS, EPOCHS, seed=seed)
        else:
            options: dict[str, Any] = {"model": model} | ABLATION.get(method, {}) | variants.get(method, {})
            if options.pop("halved", False) and case.optimizer != "lamb":
                options["peak_factor"] = 0.5
            if options.pop("below", False):
                options["min_lr"] = lr_range(optimizer)[0] / 10
            scheduler = AutoWU(optimizer, total_steps=total, **options)

        chosen: list[float] = []

        def step(loss: Tensor) -> None:
            scheduler.step(loss)
            if not chosen and scheduler.phase in ("cooldown", "done"):
                chosen.append(max(float(lr) for lr in scheduler.get_last_lr()))

        def facts() -> dict[str, Any]:
            switch = scheduler.switch
            events = [event.kind for event in getattr(scheduler, "events", [])]
            known = {"found_lr": switch and switch.lr, "switch_step": switch and switch.step, "events": events}
            return known | ({"cooldown_lr": chosen[0]} if method in variants else {})

        return Recipe(optimizer, step, facts)
    return peer(method, case.optimizer, case.batch_size, total, task, model, seed)


def train(
    case: Case, method: str, lr: float | None, seed: int, device: str, variants: Variants | None = None, looks: bool = False
) -> dict[str, Any]:
    """One run; the line of the results file, with `looks` the test losses at :data:`LOOKS` of the run among it."""
    started = time.perf_counter()
    task = make_task(case.task, device)
    torch.manual_seed(seed)
    model = task.new_model()
    chosen = recipe(method, lr, case, task, model, seed, variants or {})
    batches, losses = task.batches(case.batch_size, seed), []
    seen: dict[int, float] = dict.fromkeys((round(share * case.steps) for share in LOOKS if looks), math.inf)
    for step in range(1, case.steps + 1):
        inputs, targets = next(batches)
        loss = task.loss(model, inputs, targets)
        chosen.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        chosen.optimizer.step()
        chosen.after_step(loss.detach())
        losses.append(loss.detach())
        if step in seen:
            with averaged(chosen.optimizer):
                seen[step] = task.evaluate(model, task.test, 512)[0]
    if hasattr(chosen.optimizer, "eval"):  # its average weights, and the batch-norm statistics that belong to them
        chosen.optimizer.eval()
        with torch.no_grad():
            for _ in range(50):
                model(next(batches)[0])
    test_loss, accuracy = task.evaluate(model, task.test)
    train_loss = float(torch.stack(losses[-max(1, case.steps // 10) :]).mean())
    finite = math.isfinite(test_loss) and math.isfinite(train_loss)
    return {
        "case": str(case),
        "method": method,
        "lr": lr,
        "seed": seed,
        "finite": finite,
        "test_loss": round(test_loss, 6) if finite else None,
        "train_loss": round(train_loss, 6) if finite else None,
        "accuracy": round(accuracy, 5),
        "seconds": round(time.perf_counter() - started, 2),
        **({"looks": [round(x, 6) if math.isfinite(x) else None for x in seen.values()]} if looks else {}),
        **chosen.facts(),
    }


@contextlib.contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """The weights that an optimizer of the Schedule-Free kind would be judged by, for a while."""
    swaps = hasattr(optimizer, "eval")
    if swaps:
        optimizer.eval()
    yield
    if swaps:
        optimizer.train()


def applies(method: str, case: Case) -> bool:
    """Whether there is such a method for the case's optimizer."""
    only = {"schedule-free": ("sgd", "adamw"), "d-adaptation": ("sgd", "adamw"), "prodigy": ("adamw",)}
    return case.optimizer in only.get(method, (case.optimizer,))


# A case, a method, an LR for the grid, and a seed.
Job = tuple[str, str, float | None, int]


def jobs(cases: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[Job]:
    """All runs that are asked for: (case, method, LR, seed)."""
    wanted: list[Job] = []
    for seed in seeds:
        for name in cases:
            case = Case.parse(name)
            for method in methods:
                lrs: list[float | None] = [*learning_rates(case.optimizer)] if method == "grid" else [None]
                wanted += [(name, method, lr, seed) for lr in lrs if applies(method, case)]
    return wanted


def default_lr(optimizer: str) -> float:
    """The one with which a class of a package comes; 1 for the others, which look at none before their first step."""
    return float(inspect.signature(packaged(optimizer)).parameters["lr"].default) if optimizer in PACKAGED else 1.0


def start_of(optimizer: str) -> float:
    """Where the grid of an optimizer of that name starts."""
    nearest = 10 ** (round(2 * math.log10(default_lr(optimizer))) / 2)
    return STARTS.get(optimizer) or float(f"{nearest:.4g}")


def usual(grid: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a grid with which it began on each case and seed, by the LR that an optimizer comes with, as of a method."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for row in grid:
        first.setdefault((row["case"], row["seed"]), row | {"method": "usual LR", "found_lr": row["lr"]})
    return [*first.values()]


def next_lr(known: dict[float, float], start: float) -> float | None:
    """Which LR of the hard suite's grid, half a decade apart, to run next, by the losses of those that ran.

    The grid grows outward from `start` until the two on both sides of the best one have run, and has no edges.
    """
    if not known:
        return start
    lowest = min(known.values())
    if math.isinf(lowest):  # too high all of them
        return float(f"{min(known) / math.sqrt(10):.4g}")
    best = min((lr for lr in known if known[lr] == lowest), key=lambda lr: abs(math.log(lr / start)))
    around = (float(f"{10 ** (round(2 * math.log10(best) + k) / 2):.4g}") for k in (1, -1, 2, -2))
    return next((lr for lr in around if lr not in known), None)


def run_grid(cases: list[str], seeds: list[int], path: Path, device: str, minutes: float) -> None:
    """Run what is missing of a suite's grid."""
    started = time.perf_counter()
    rows = read(path)
    path.parent.mkdir(exist_ok=True)
    for seed in seeds:
        for case in cases:
            try:
                _grow(case, seed, rows, path, device, started + 60 * minutes)
            except (ModuleNotFoundError, FileNotFoundError) as missing:
                print(f"{case}: {missing}", flush=True)


def _grow(case: str, seed: int, rows: list[dict[str, Any]], path: Path, device: str, end: float) -> None:
    """The grid of one case on one seed, until that time."""
    lr: float | None = 0.0
    while lr is not None:
        mine = [row for row in rows if row["case"] == case]
        losses = {row["lr"]: row["test_loss"] if row["finite"] else math.inf for row in mine if row["seed"] == seed}
        lr = next_lr(losses, start_of(case.split()[1]))
        if lr is not None:
            if time.perf_counter() > end:
                return
            rows.append(run((case, "grid", lr, seed), device, {}))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")


def run(job: Job, device: str, variants: Variants, looks: bool = False) -> dict[str, Any]:
    """A run in a process that may do others."""
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.ERROR)
    for noisy in ("dadaptation", "root"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    name, method, lr, seed = job
    case, trained_as = Case.parse(name), method
    if method.startswith("tuned"):
        case, trained_as = replace(case, steps=round(float(method.split()[1]) * case.steps)), "grid"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # what the range test prints
        row = train(case, trained_as, lr, seed, device, variants, looks)
    return row | {"case": name, "method": method} | ({"autowu": variants[method]} if method in variants else {})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(left: list[Job], workers: int, one_run: Callable[[Job], dict[str, Any]]) -> Iterator[tuple[Job, Any]]:
    """Each job with its line or the exception it ended with; of one worker in this process, in order."""
    if workers == 1:
        for job in left:
            try:
                yield job, one_run(job)
            except Exception as error:
                yield job, error
        return
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            futures = {pool.submit(one_run, job): job for job in left}
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_all(
    wanted: list[Job],
    path: Path,
    device: str,
    workers: int,
    variants: Variants | None = None,
    minutes: float = math.inf,
    looks: bool = False,
) -> None:
    """Run what is not in the file yet, and append it; none is begun after so many minutes."""
    done = {(r["case"], r["method"], r["lr"], r["seed"]) for r in read(path)}
    left = [job for job in wanted if job not in done]
    started = time.perf_counter()
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for count, (job, row) in enumerate(
            ended(left, workers, partial(run, device=device, variants=variants or {}, looks=looks)), 1
        ):
            if isinstance(row, BaseException):
                print(f"{job}: {row!r}", flush=True)
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            seconds = time.perf_counter() - started
            if count % 20 == 0 or count == len(left) or seconds > 60 * minutes:
                print(f"{count} of {len(left)} runs in {seconds:.0f} s", flush=True)
            if seconds > 60 * minutes:
                break


@dataclass(frozen=True)
class Score:
    """A method's ratios to the best of the grid, one a case and seed; None for a run that ended non-finite."""

    method: str
    ratios: dict[tuple[str, int], float | None]

    @property
    def finite(self) -> list[float]:
        return [r for r in self.ratios.values() if r is not None]

    @property
    def mean(self) -> float:
        return geometric_mean(self.finite)

    @property
    def worst(self) -> float:
        """The worst case: its geometric mean over the seeds, infinite where a run ended non-finite."""
        return max(self.of_case(case) for case in {case for case, _ in self.ratios})

    def of_case(self, case: str) -> float:
        ratios = [r for (name, _), r in self.ratios.items() if name == case]
        return math.inf if None in ratios else geometric_mean(r for r in ratios if r is not None)


def scores(rows: list[dict[str, Any]], metric: str) -> dict[str, Score]:
    """Every method's score on `metric`, "test_loss", "train_loss" or "accuracy", and the honest sweep's as "sweep"."""
    best_of: Callable[[Iterable[float]], float] = max if metric == "accuracy" else min
    grid: dict[tuple[str, int], dict[float, float]] = {}
    for row in rows:
        if row["method"] == "grid":
            value = max(row[metric], FLOOR) if row["finite"] else (0.0 if metric == "accuracy" else math.inf)
            grid.setdefault((row["case"], row["seed"]), {})[row["lr"]] = value
    best = {key: best_of(values.values()) for key, values in grid.items()}
    ratios: dict[str, dict[tuple[str, int], float | None]] = {}
    for row in rows:
        key = row["case"], row["seed"]
        if row["method"] != "grid" and key in best:
            ratios.setdefault(row["method"], {})[key] = max(row[metric], FLOOR) / best[key] if row["finite"] else None
    for (case, seed), values in grid.items():
        others = [grid[other] for other in grid if other[0] == case and other[1] != seed]
        if others:
            sums = {lr: sum(math.log(max(other[lr], 1e-12)) for other in others) for lr in values}
            bound = best_of(sums.values())
            value = next(values[lr] for lr in sums if sums[lr] == bound)
            ratios.setdefault("sweep", {})[case, seed] = value / best[case, seed] if math.isfinite(value) else None
    return {method: Score(method, found) for method, found in ratios.items()}


COSTS = {"sweep": "9", "onecycle": "1 and 100 steps", "plateau": "1 and 100 steps"}


def report(rows: list[dict[str, Any]]) -> str:
    """The tables, as Markdown."""
    by_metric = {metric: scores(rows, metric) for metric in ("test_loss", "train_loss", "accuracy")}
    test = by_metric["test_loss"]
    order = sorted(test, key=lambda m: [*METHODS, "sweep"].index(m) if m in [*METHODS, "sweep"] else -1)
    lines = [
        "| method | cases | test loss | worst case | AutoWU on the same cases | training loss | accuracy | non-finite "
        "| above twice | runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in order:
        score = test[method]
        same = [test["autowu"].ratios.get(key) for key in score.ratios] if "autowu" in test else []
        shared = [r for r in same if r is not None]
        cells = [
            method,
            str(len({case for case, _ in score.ratios})),
            f"{score.mean:.2f}",
            f"{score.worst:.2f}",
            f"{geometric_mean(shared):.2f}" if shared else "",
            f"{by_metric['train_loss'][method].mean:.2f}",
            f"{by_metric['accuracy'][method].mean:.3f}",
            str(sum(r is None for r in score.ratios.values())),
            str(sum(r is not None and r > 2 for r in score.ratios.values())),
            COSTS.get(method, "1"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| case | {' | '.join(order)} |", "|---|" + "---|" * len(order)]
    for case in dict.fromkeys(row["case"] for row in rows):
        has = [any(name == case for name, _ in test[m].ratios) for m in order]
        cells = [f"{test[m].of_case(case):.2f}" if there else "" for m, there in zip(order, has, strict=True)]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A row a case: the ratio of each method's test loss to the best of the grid."""
    import matplotlib.pyplot as plt

    test = scores(rows, "test_loss")
    cases = list(dict.fromkeys(row["case"] for row in rows))[::-1]
    shown = [m for m in ("sweep", *METHODS) if m in test]  # AutoWU comes second
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(cases) + 1.4), layout="constrained")
    marks = dict(zip(shown, "|osD^v<>P", strict=False))
    limit = 12.0
    for method in [m for m in shown if m != "autowu"] + ["autowu"]:
        points = [(test[method].of_case(c), k) for k, c in enumerate(cases) if any(name == c for name, _ in test[method].ratios)]
        strong = method == "autowu"
        axes.scatter(
            [min(ratio, limit) for ratio, _ in points],
            [k for _, k in points],
            marker=marks[method],
            s=45 if strong else 28,
            color="tab:red" if strong else "black" if method == "sweep" else f"C{(0, 1, 2, 4, 5, 8, 9)[shown.index(method) - 2]}",
            alpha=1 if strong else 0.65,
            label=method,
        )
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlim=(0.4, limit * 1.1), yticks=range(len(cases)), yticklabels=cases)
    axes.set_xticks([0.5, 1, 2, 5, limit], ["0.5", "1", "2", "5", f"{limit:g}+"])
    axes.minorticks_off()
    axes.set_xlabel("test loss over that of the best LR of the grid (best chosen afterwards)")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def grid_file(suite: str) -> Path:
    if suite in ADAPTIVE:
        return RESULTS / suite / "grid.jsonl"
    return RESULTS / ("regret.jsonl" if suite == "cpu" else f"regret_{suite}.jsonl")


def chosen_cases(suite: str, patterns: list[str] | None) -> list[str]:
    """The suite's cases that contain a pattern; a pattern of four words is the name of a case, of the suite or another."""
    if patterns is None:
        return [*CASES[suite]]
    names = [pattern for pattern in patterns if len(pattern.split()) == 4]
    found = [case for case in CASES[suite] for p in patterns if p not in names and fnmatch.fnmatch(case, f"*{p}*")]
    return [*dict.fromkeys(found + names)]


def compare(args: argparse.Namespace, suite: str) -> None:
    """Run the grid, a variant of AutoWU, peers or tuned runs; print what was run, or the tables of all."""
    cases, grid, folder = chosen_cases(suite, args.cases), grid_file(suite), RESULTS / suite
    best = tuned_lrs(read(grid))
    if args.freeze:
        freeze(read(folder / "tuned.jsonl"), folder / TARGETS)
        return
    names = [args.variant] if args.variant else args.methods if args.methods != [*METHODS] else []
    variants: Variants = {args.variant: json.loads(args.autowu)} if args.variant else {}
    report = args.report is not None
    if not names and not args.tuned and not report:
        run_grid(cases, args.seeds, grid, args.device, args.minutes)
    wanted = jobs(cases, names, args.seeds)
    if args.tuned:
        wanted = [(case, f"tuned {n}", best[case], seed) for seed in args.seeds for case in cases if case in best for n in LENGTHS]
    shard, shards = map(int, args.shard.split("/"))
    for name in names or ["tuned"] * args.tuned:
        path = args.out or folder / f"{name}.jsonl"
        if any(row.get("autowu", {}) != variants.get(name, {}) for row in read(path)):
            raise SystemExit(f"{path} has runs with other arguments than {args.autowu}: take another name, or remove it")
        mine = [job for job in wanted[shard - 1 :: shards] if args.tuned or job[1] == name]
        if not report:
            run_all(mine, path, args.device, args.jobs, variants, args.minutes, looks=suite in ADAPTIVE)
    files = [folder / f"{name}.jsonl" for name in names or args.report or []] or sorted(folder.glob("*.jsonl"))
    files = [args.out] if args.out else files
    rows = [row for file in files for row in read(file) if row["case"] in cases and row["seed"] in args.seeds]
    if report and suite == "optimizers":
        rows += usual(row for row in rows if row["method"] == "grid")
    found = outcomes(rows, best_of_grid(read(grid)), read(folder / "tuned.jsonl"))
    if report:
        ran = {run.case for run in found}
        found += sweep((row for row in read(grid) if row["case"] in ran), args.seeds)
    else:
        print(*found, sep="\n")
    if found:
        print(table(found, args.against, common=bool(args.report)))
    if report and (folder / TARGETS).exists():
        targets = json.loads((folder / TARGETS).read_text())
        print(profile(rows, targets, args.against))
        if any(run.method == "default" for run in found):
            print("", beside_peers(found, rows, targets), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three small cases, the grid and AutoWU, two seeds: two minutes")
    parser.add_argument("--suite", choices=[*CASES], help="by default cpu, or by --quick and --device")
    parser.add_argument("--variant", metavar="NAME", help="run AutoWU as it is, and record its runs under this name")
    parser.add_argument("--autowu", default="{}", metavar="JSON", help="its arguments in the runs of --variant")
    parser.add_argument(
        "--report", nargs="*", metavar="NAME", help="run nothing; compare all, or those on the runs that they share"
    )
    parser.add_argument("--against", default="0.1.0", metavar="NAME", help="whom the others are compared with in --report")
    parser.add_argument("--tuned", action="store_true", help="train the best LR of the grid at other lengths of the run")
    parser.add_argument("--freeze", action="store_true", help="take the targets of the profile from the tuned runs, once")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="the K-th of N parts of what is to be run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="of the suite those that contain it; or others by name")
    parser.add_argument(
        "--methods", nargs="+", default=[*METHODS], choices=["grid", "autowu", "paper", *PEERS, *ABLATION], help="beside the grid"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    suite = args.suite or ("quick" if args.quick else "cpu" if args.device == "cpu" else "gpu")
    if suite in ADAPTIVE or args.variant or args.report is not None or args.tuned:
        compare(args, suite)
        return
    out = args.out or grid_file(suite)
    seeds, methods = (args.seeds[:2], ["autowu", "paper"]) if suite == "quick" else (args.seeds, args.methods)
    cases = chosen_cases(suite, args.cases)
    print(json.dumps(machine(args.device)))
    run_all(jobs(cases, dict.fromkeys(["grid", *methods]), seeds), out, args.device, args.jobs)
    rows = [row for row in read(out) if row["case"] in cases and row["seed"] in seeds and row["method"] in ("grid", *methods)]
    print(report(rows))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
