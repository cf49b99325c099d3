"""What came of several cooldowns that branched off one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autowu.training.records import RunFolder

__all__ = ["report"]


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
    figure.savefig(folders[0].path / "cooldowns.png", dpi=150)
