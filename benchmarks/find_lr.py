"""How good is the LR of `autowu.find_lr` for a run, beside what torch-lr-finder and Lightning's tuner suggest?

    python benchmarks/find_lr.py [--seeds 3 4] [--cases vit "mlp*lion"] [--shard 1/2] [--minutes 3.5] [--report]

The cases are those of regret.py's hard suite. On each seed every method is asked for an LR on a fresh model, over the LR range that
AutoWU has for the optimizer, and a run of the case's length is trained at it, with the schedule of the suite's grid: 5 % linear
warm-up, then cosine. So the LR is the peak of a cosine.

- ``find_lr``: as it is. It takes 200 steps at most.
- ``torch-lr-finder``: its own range test of 100 steps, and the LR of the steepest descent, which it suggests.
- ``lightning``: ``Tuner.lr_find``'s suggestion of the same kind, after its 100 steps, with its smoothing and early stop.

A run is a line in results/find_lr.jsonl, written when it ends; what is there is not run again. The report takes the test loss over
the best of the suite's grid on that seed. Seeds 0 to 2 have chosen the rules of AutoWU; 3 and 4 have chosen nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from measures import FLOOR, best_of_grid, geometric_mean
from peers import RANGE_TEST_STEPS, range_test
from regret import Case, chosen_cases, grid_file, read, train
from tasks import Task, make_optimizer, make_task
from torch import Tensor, nn

from autowu import find_lr
from autowu.families import lr_range

OUT = Path(__file__).parent / "results" / "find_lr.jsonl"
METHODS = ("find_lr", "torch-lr-finder", "lightning")
SEEDS = (3, 4)


class Loader:
    """Batches of a task without end, those of a seed each time."""

    def __init__(self, task: Task, batch_size: int, seed: int) -> None:
        self.task, self.batch_size, self.seed = task, batch_size, seed

    def __iter__(self) -> Any:
        return self.task.batches(self.batch_size, self.seed)


def ours(case: Case, task: Task, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = task.new_model()
    optimizer = make_optimizer(case.optimizer, model, 1.0)

    def step_fn(batch: Any) -> Tensor:
        return task.loss(model, *batch)

    found = find_lr(model, optimizer, step_fn=step_fn, loader=Loader(task, case.batch_size, seed))
    low, high = found.interval
    return {"lr": found.lr, "low": low, "high": high, "sure": found.sure, "steps": found.steps}


def lightnings(case: Case, task: Task, seed: int) -> dict[str, Any]:
    """What Lightning's tuner suggests; its default where it says that there is nothing to suggest."""
    import lightning
    from lightning.pytorch.tuner.tuning import Tuner

    torch.manual_seed(seed)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module = task.new_model()
            self.lr = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return task.loss(self.model, *batch)

        def configure_optimizers(self) -> Any:
            return make_optimizer(case.optimizer, self.model, self.lr)

    class Batches(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return task.batches(case.batch_size, seed)

    module = Module()
    low, high = lr_range(make_optimizer(case.optimizer, module.model, 1.0))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet)
        loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
        how: dict[str, Any] = {"min_lr": low, "max_lr": high, "num_training": RANGE_TEST_STEPS, "attr_name": "lr"}
        finder = Tuner(trainer).lr_find(module, loader, **how)
    suggested = None if finder is None else finder.suggestion()
    return {"lr": suggested or math.sqrt(low * high), "sure": suggested is not None, "steps": RANGE_TEST_STEPS}


def suggest(method: str, case: Case, seed: int) -> dict[str, Any]:
    task = make_task(case.task, "cpu")
    if method == "find_lr":
        return ours(case, task, seed)
    if method == "lightning":
        return lightnings(case, task, seed)
    return {"lr": range_test(case.optimizer, case.batch_size, task, seed), "steps": RANGE_TEST_STEPS}


def run(name: str, method: str, seed: int) -> dict[str, Any]:
    case = Case.parse(name)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = suggest(method, case, seed)
        found["search_seconds"] = round(time.perf_counter() - started, 2)
        row = train(case, "grid", found["lr"], seed, "cpu")
    return row | {"case": name, "method": method} | {f"search_{k}" if k == "steps" else k: v for k, v in found.items()}


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[tuple[str, int], float]]:
    """Test loss over the grid's best, by method, case and seed, of what all have run; infinite where a run ended non-finite."""
    best = best_of_grid(read(grid_file("hard")))
    found: dict[str, dict[tuple[str, int], float]] = {method: {} for method in METHODS}
    for row in rows:
        if (key := (row["case"], row["seed"])) in best:
            loss = max(row["test_loss"], FLOOR) if row["finite"] else math.inf
            found[row["method"]][key] = loss / best[key].loss
    shared = set.intersection(*(set(of_method) for of_method in found.values()))
    return {method: {key: of_method[key] for key in sorted(shared)} for method, of_method in found.items()}


def ahead(mine: dict[tuple[str, int], float], theirs: dict[tuple[str, int], float]) -> str:
    """Their loss over ours on the runs that both ended finite, and by how many standard errors over the cases it is above 1."""
    shared = [key for key in mine if math.isfinite(theirs[key]) and math.isfinite(mine[key])]
    by_case: dict[str, list[float]] = {}
    for key in shared:
        by_case.setdefault(key[0], []).append(math.log(theirs[key] / mine[key]))
    logs = [statistics.fmean(of_case) for of_case in by_case.values()]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(statistics.fmean(logs)):.2f} ({statistics.fmean(logs) / error:.1f})"


def report(rows: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    found = ratios(rows)
    lines = ["| method | runs | test loss | worst | non-finite | over `find_lr` (standard errors) |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        finite = [ratio for ratio in found[method].values() if math.isfinite(ratio)]
        lost, behind = len(found[method]) - len(finite), "" if method == METHODS[0] else ahead(found[METHODS[0]], found[method])
        mean, worst = f"{geometric_mean(finite):.2f}", f"{max(found[method].values()):.2f}"
        lines.append(f"| {method} | {len(found[method])} | {mean} | {worst} | {lost} | {behind} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="of the suite those that contain it")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="the K-th of N parts of the cases")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing, print the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("autowu", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    has_grid = {(row["case"], row["seed"]) for row in read(grid_file("hard"))}
    shard, shards = map(int, args.shard.split("/"))
    done, started = {(row["case"], row["method"], row["seed"]) for row in read(args.out)}, time.perf_counter()
    for seed in args.seeds:
        for case in chosen_cases("hard", args.cases)[shard - 1 :: shards]:
            for method in args.methods:
                late = time.perf_counter() - started > 60 * args.minutes
                if args.report or late or (case, seed) not in has_grid or (case, method, seed) in done:
                    continue
                try:
                    row = run(case, method, seed)
                except Exception as error:
                    print(f"{case}, {method}, seed {seed}: {error!r}", flush=True)
                    continue
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if args.report:
        print(report([row for row in read(args.out) if row["seed"] in args.seeds]))


if __name__ == "__main__":
    main()
