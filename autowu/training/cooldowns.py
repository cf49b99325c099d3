"""Several cooldowns that branch off one run, and what came of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from autowu.scheduler import AutoWU
from autowu.training.build import build, build_model, build_parts
from autowu.training.config import TrainConfig, UsageError
from autowu.training.data import Data, Loaders
from autowu.training.files import replacing
from autowu.training.folder import RunFolder
from autowu.training.process import Process
from autowu.training.run import train_run

__all__ = ["first_steps", "report", "train_cooldowns"]


def train_cooldowns(config: TrainConfig, process: Process, data: Data, trunk: RunFolder, started: float) -> dict[str, Any]:
    """Train the trunk, which has the smallest of several values of `cooldown_fraction`, then a branch for each other one.

    Args:
        config: of all of them; their values are in ascending order.
        process: this process among those of the run.
        data: that they train on.
        trunk: folder of the trunk, in which each branch has its own.
        started: time of the start by `time.perf_counter`.

    Returns:
        The trunk's summary.

    Raises:
        UsageError: if something in `config` cannot be, before anything was trained.
        Stopped: if a signal asks for it; all that was trained is saved.
    """
    assert isinstance(config.cooldown_fraction, list)
    smallest, *others = config.cooldown_fraction
    branches = [replace(config, cooldown_fraction=f, run_dir=config.run_dir / f"cooldown-{f}", resume=False) for f in others]
    # On the main process, that the ranks do not differ on what is done.
    done = process.gather([(branch.run_dir / "summary.json").exists() for branch in branches])[0]
    trunk_config = replace(config, cooldown_fraction=smallest)
    summary, loaders, starts = _train_trunk(trunk_config, process, data, trunk, others, started)
    with closing(loaders):
        for branch, is_done in zip(branches, done, strict=True):
            if not is_done:
                _train_branch(branch, process, data, loaders, trunk)
    if process.is_main:
        folders = [trunk, *(RunFolder(branch, process.world_size) for branch in branches)]
        report(config.cooldown_fraction, [0, *starts.values()], folders)
    return summary


def first_steps(scheduler: AutoWU, fractions: Sequence[float]) -> dict[float, int]:
    """The step that the branch with each `cooldown_fraction` begins with.

    Raises:
        UsageError: if one would begin in the warm-up.
    """
    for fraction in fractions:
        try:
            scheduler.fork_cooldown(fraction)
        except ValueError as error:
            raise UsageError(f"--cooldown-fraction {fraction}: {error}") from None
    return {fraction: scheduler.cooldown_start(fraction) for fraction in fractions}


def _train_trunk(
    config: TrainConfig, process: Process, data: Data, folder: RunFolder, others: Sequence[float], started: float
) -> tuple[dict[str, Any], Loaders, dict[float, int]]:
    """Its summary, what it shares with the branches, and where they begin; its model is let go of for theirs."""
    parts, loaders = build(config, process, data)
    assert parts.autowu is not None
    starts = first_steps(parts.autowu, others)
    try:
        process.on_main(folder.claim)
        return train_run(config, process, parts, loaders, folder, started, branches=starts), loaders, starts
    except BaseException:
        loaders.close()
        raise


def _train_branch(config: TrainConfig, process: Process, data: Data, loaders: Loaders, trunk: RunFolder) -> None:
    """Train a cooldown from its branch point, or from its own last checkpoint."""
    started = time.perf_counter()
    folder = RunFolder(config, process.world_size)
    resume = process.gather(bool(folder.checkpoints()))[0]
    if process.is_main:
        print(f"\ncooldown_fraction {config.cooldown_fraction}", flush=True)
    parts = build_parts(config, process, build_model(config, data).module, len(loaders.train))
    train_run(replace(config, resume=resume), process, parts, loaders, folder, started, trunk=None if resume else trunk)


def report(fractions: Sequence[float], first_steps: Sequence[int], folders: Sequence[RunFolder]) -> None:
    """Print a table of the finished runs; write ``cooldowns.json`` and ``cooldowns.png`` into the folder of the trunk.

    Args:
        fractions: `cooldown_fraction` of each run, the trunk's first.
        first_steps: step at which each left the trunk, 0 for the trunk itself.
        folders: of the same runs.
    """
    trunk = folders[0]
    runs = []
    for fraction, first_step, folder in zip(fractions, first_steps, folders, strict=True):
        summary = folder.read_summary()
        runs.append(
            {
                "cooldown_fraction": fraction,
                "first_step": first_step,
                "trained_steps": summary["total_steps"] - first_step,
                "test_loss": summary["test_loss"],
                "test_accuracy": summary["test_accuracy"],
                "folder": str(folder.path.relative_to(trunk.path)),
            }
        )
    best = min(runs, key=_rank)
    steps = sum(run["trained_steps"] for run in runs)
    content = {"best": best["cooldown_fraction"], "best_by": "validation", "trained_steps": steps, "runs": runs}
    trunk.write_json("cooldowns.json", content)
    _draw(fractions, folders, [run["test_loss"] for run in runs])
    print("\ncooldown_fraction  steps trained for it  test loss  test accuracy")
    for run in runs:
        print(
            f"{run['cooldown_fraction']!s:>17}  {run['trained_steps']:>20}  {run['test_loss']:>9.4f}  {run['test_accuracy']:>13.2%}"
        )
    print(f"best by validation: cooldown_fraction {best['cooldown_fraction']}; {steps} steps trained in all", flush=True)


def _rank(run: dict[str, Any]) -> tuple[float, float]:
    loss = run["test_loss"]
    return -run["test_accuracy"], loss if math.isfinite(loss) else math.inf


def _draw(fractions: Sequence[float], folders: Sequence[RunFolder], final_losses: Sequence[float]) -> None:
    from autowu.plotting import draw_cooldowns

    rows = {fraction: folder.rows("metrics.csv") for fraction, folder in zip(fractions, folders, strict=True)}
    losses, lrs = ({f: [float(row[key]) for row in steps] for f, steps in rows.items()} for key in ("loss", "lr"))
    figure = draw_cooldowns(losses, lrs, dict(zip(fractions, final_losses, strict=True)))
    with replacing(folders[0].path / "cooldowns.png") as partial:
        figure.savefig(partial, dpi=150, format="png")
