"""A run whose end is open, tested at eight horizons: with a short cooldown branched off, averaged, and with one from the average.

The run holds its LR, and is run again with one that falls (`stable_type="inverse_sqrt"`). All are compared with runs that were
tuned for the horizon: a linear warm-up over its first tenth, then a linear decay to 0, the peak LR the best of a grid on another
seed. The task is a character-level perceptron on the source of Python's standard library, with AdamW; what counts is the loss on
files that were held out.

OMP_NUM_THREADS=1 python benchmarks/anytime.py [--minutes 3.5]   # again and again, until it says that all is done
python benchmarks/anytime.py --report [--figure assets/anytime.png]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autowu import AutoWU
from autowu.anytime import AnytimeAverage

STEPS = 12_000
HORIZONS = [round(STEPS * 0.6**k) for k in range(7, -1, -1)]
COOLDOWN = 0.1
"""Share of a branch that is its cooldown: the seven that are no part of the longest run take 14.6 % of it."""
WARMUP = 200
"""Steps of a full warm-up, for the shortest horizon."""
GRID = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
SHAPE = "sqrt"
CHOOSING, REPORTED = 0, [1, 2, 3]
"""The seed on which the LRs of the tuned runs were chosen, and those that tell. Nothing of the open runs was chosen."""
CONTEXT, BATCH, TESTED = 16, 64, 8192
TRUNKS = {"constant": "", "inverse_sqrt": "falling_"}
"""What the run does after its warm-up (`stable_type`), and what its kinds in the results file begin with."""
LABELS = {
    "cooled_average": "cooldown of a tenth from the average",
    "average": "average of the trunk",
    "branch": "cooldown of a tenth from the trunk",
    "trunk": "trunk as it is",
}
"""What is compared, by the rest of its kind."""
RESULTS = Path(__file__).parent / "results" / "anytime.jsonl"


@lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor, int]:
    """Characters of the files to train on and of those held out, as numbers, and how many there are."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = ["".join(file.read_text(errors="replace") for file in files if (hash_of(file) == 0) is held) for held in (False, True)]
    known = {character: number for number, character in enumerate(sorted({c for c in "".join(parts) if c.isascii()}))}
    train, test = (torch.tensor([known.get(c, 0) for c in part]) for part in parts)
    return train, test, len(known)


def hash_of(file: Path) -> int:
    """A tenth of the files has 0."""
    return sum(file.name.encode()) % 10


def examples(source: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contexts (number, CONTEXT) and the characters that follow."""
    at = torch.randint(len(source) - CONTEXT, (number, 1), generator=generator)
    window = source[at + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    characters = text()[2]
    layers = [nn.Linear(CONTEXT * 16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, characters)]
    return nn.Sequential(nn.Embedding(characters, 16), nn.Flatten(), *layers)


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)


@torch.no_grad()
def tested(model: nn.Module) -> float:
    """Loss on characters that were held out, the same for all."""
    inputs, targets = examples(text()[1], TESTED, torch.Generator().manual_seed(12345))
    return F.cross_entropy(model(inputs), targets).item()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Tensor:
    inputs, targets = examples(text()[0], BATCH, generator)
    loss = F.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss


def tuned_run(seed: int, steps: int, lr: float) -> dict[str, Any]:
    """A run whose schedule is for `steps` steps."""
    model = new_model(seed)
    optimizer, generator = new_optimizer(model, lr), torch.Generator().manual_seed(1000 + seed)
    warmup = steps / 10
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((k + 1) / warmup, (steps - k) / (steps - warmup))
        step(model, optimizer, generator)
    return {"kind": "tuned", "seed": seed, "steps": steps, "lr": lr, "loss": tested(model)}


def open_run(seed: int, stable_type: str, end: float) -> list[dict[str, Any]]:
    """A run without an end, its average, and branches of both; when the time is up, what there is of it. It goes on from there."""
    prefix = TRUNKS[stable_type]
    rows: list[dict[str, Any]] = []
    model = new_model(seed)
    optimizer, generator = new_optimizer(model, 1e-3), torch.Generator().manual_seed(1000 + seed)
    scheduler = AutoWU(optimizer, model=model, max_warmup_steps=WARMUP, stable_type=stable_type)
    average = AnytimeAverage(model)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average}
    kept = RESULTS.with_name(f"anytime-{prefix}{seed}.pt")
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        generator.set_state(saved["generator"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for k in range(scheduler.last_epoch, STEPS + 1):
        if time.monotonic() > end:
            torch.save({"generator": generator.get_state(), **{name: part.state_dict() for name, part in parts.items()}}, kept)
            return rows
        for horizon in HORIZONS:
            if k == horizon - (length := round(COOLDOWN * horizon)):
                for kind, weights in (("branch", model), ("cooled_average", average.module)):
                    loss, lr = branch(weights, optimizer, scheduler, generator, length)
                    rows.append({"kind": prefix + kind, "seed": seed, "steps": horizon, "lr": lr, "loss": loss})
        if k in HORIZONS:
            rows.append({"kind": f"{prefix}trunk", "seed": seed, "steps": k, "loss": tested(model)})
            rows.append({"kind": f"{prefix}average", "seed": seed, "steps": k, "loss": tested(average)})
        scheduler.step(step(model, optimizer, generator))
        average.update(model, scheduler)
    kept.unlink(missing_ok=True)
    return rows


def branch(
    model: nn.Module, optimizer: torch.optim.Optimizer, trunk: AutoWU, generator: torch.Generator, length: int
) -> tuple[float, float]:
    """What a cooldown from these weights leads to, and the peak LR."""
    state = trunk.fork_cooldown(steps=length)
    state["config"]["cooldown_type"] = SHAPE
    own = copy.deepcopy(model)
    own_optimizer, own_generator = new_optimizer(own, 1e-3), generator.clone_state()
    own_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = AutoWU(own_optimizer, model=own)
    scheduler.load_state_dict(state)
    while not scheduler.should_stop:
        scheduler.step(step(own, own_optimizer, own_generator))
    assert trunk.switch is not None
    return tested(own), trunk.switch.lr


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def best_lr(rows: list[dict[str, Any]], steps: int) -> float:
    found = [row for row in rows if row["kind"] == "tuned" and row["seed"] == CHOOSING and row["steps"] == steps]
    lr: float = min(found, key=lambda row: float(row["loss"]))["lr"]
    return lr


def grid(steps: int) -> list[float]:
    """The LRs to be tried: all for the four shortest horizons, then those beside the best of the horizon before."""
    before = HORIZONS.index(steps) - 1
    if before < 3:
        return GRID
    middle = GRID.index(best_lr(read(), HORIZONS[before]))
    return GRID[max(0, middle - 1) : middle + 2]


def pieces(seeds: list[int], end: float) -> Iterator[list[dict[str, Any]]]:
    """What is still to be done, one by one; the tuned runs first."""
    for seed in seeds:
        for steps in HORIZONS:
            for lr in grid(steps) if seed == CHOOSING else [best_lr(read(), steps)]:
                if not any(r["kind"] == "tuned" and (r["seed"], r["steps"], r["lr"]) == (seed, steps, lr) for r in read()):
                    yield [tuned_run(seed, steps, lr)]
    for stable_type, prefix in TRUNKS.items():
        for seed in seeds:
            done = any((row["kind"], row["seed"], row["steps"]) == (f"{prefix}trunk", seed, STEPS) for row in read())
            if seed != CHOOSING and not done:
                yield open_run(seed, stable_type, end)


def work(minutes: float, seeds: list[int]) -> None:
    """Do pieces until the time is up; each is written when it is done."""
    end = time.monotonic() + 60 * minutes
    for rows in pieces(seeds, end):
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if time.monotonic() > end:
            print(f"{len(read())} rows; there is more to do")
            return
    print("all is done")


def ratios(rows: list[dict[str, Any]], prefix: str) -> dict[str, dict[int, list[float]]]:
    """Loss over that of the tuned run of the same seed and horizon, of each reported seed: by kind, by horizon."""
    losses = {(r["kind"], r["seed"], r["steps"]): r["loss"] for r in rows}

    def of(kind: str, steps: int) -> list[float]:
        seeds = [seed for seed in REPORTED if (kind, seed, steps) in losses]
        return [losses[kind, seed, steps] / losses["tuned", seed, steps] for seed in seeds]

    return {kind: {steps: of(prefix + kind, steps) for steps in HORIZONS} for kind in LABELS}


def measured(rows: list[dict[str, Any]]) -> list[str]:
    """The stable types of which a run has come to its last horizon."""
    return [name for name, prefix in TRUNKS.items() if ratios(rows, prefix)["trunk"][STEPS]]


def report(rows: list[dict[str, Any]]) -> str:
    """A table for each stable type."""
    tables = []
    for stable_type in measured(rows):
        columns = ratios(rows, TRUNKS[stable_type])
        lines = ["| steps | tuned LR | cooled average | average | branch | trunk as it is |", "|---" * 6 + "|"]
        for steps in HORIZONS:
            cells = [f"{statistics.mean(found[steps]):.3f}" for found in columns.values()]
            lines.append(f"| {steps:,} | {best_lr(rows, steps):g} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each stable type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = measured(rows)
    fig, panels = plt.subplots(1, len(names), figsize=(2 + 5 * len(names), 4), layout="constrained", sharey=True, squeeze=False)
    for stable_type, axes in zip(names, panels[0], strict=True):
        for name, found in ratios(rows, TRUNKS[stable_type]).items():
            line = axes.plot(HORIZONS, [statistics.mean(found[steps]) for steps in HORIZONS], marker="o", label=LABELS[name])[0]
            for steps in HORIZONS:
                axes.plot([steps] * len(found[steps]), found[steps], ".", color=line.get_color(), markersize=4)
        axes.axhline(1, color="black", linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="steps", title=f'stable_type="{stable_type}"' if len(names) > 1 else None)
    panels[0, 0].set_ylabel("test loss / that of a run tuned for so many steps")
    panels[0, 0].legend()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.5)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[CHOOSING, *REPORTED])
    args = parser.parse_args()
    if not args.report:
        work(args.minutes, args.seeds)
        return
    print(report(read()))
    if args.figure is not None:
        draw(read(), args.figure)


if __name__ == "__main__":
    main()
