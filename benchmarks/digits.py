"""What `python train.py` finds on the digits, by optimizer: LR, switch, accuracy. No LR is given to any of them.

Runs train.py with its defaults but for --opt, and with a plain cosine at a hand-set LR for comparison; prints a table and writes
results/digits.json, and the figure of the first run as assets/digits.png.

    python benchmarks/digits.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIELDS = ("opt", "sched", "switch_step", "minimum_step", "peak_lr", "test_accuracy", "test_loss", "total_steps", "wall_s")


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for opt in ("lars", "lamb", "adamw", "sgd"):
            for sched in ("autowu", "cosine"):
                run_dir = Path(folder, f"{opt}-{sched}")
                command = [sys.executable, "train.py", "--opt", opt, "--sched", sched, "--run-dir", str(run_dir)]
                # One thread: how sums are split over threads is enough to move a test's verdict.
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
                summary = json.loads((run_dir / "summary.json").read_text())
                rows.append({field: summary[field] for field in FIELDS})
                print("  ".join(f"{field} {rows[-1][field]}" for field in FIELDS), flush=True)
        shutil.copy(Path(folder, "lars-autowu", "figure.png"), ROOT / "assets" / "digits.png")
    (ROOT / "benchmarks" / "results" / "digits.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
