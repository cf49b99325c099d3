"""What `import autowu` takes on top of `import torch`, by `python -X importtime`, and which modules take it.

python benchmarks/start_up.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "start_up.json"


def microseconds() -> dict[str, tuple[int, int]]:
    """Of each module: its own time and that of all that it imports, in a process that imports torch and then autowu."""
    command = [sys.executable, "-X", "importtime", "-c", "import torch; import autowu"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rows = [line.removeprefix("import time:").split("|") for line in said.splitlines() if line.startswith("import time:")]
    return {name.strip(): (int(own), int(total)) for own, total, name in rows if own.strip().isdigit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    runs = [microseconds() for _ in range(args.repeats + 1)][1:]  # the first fills the caches
    # The least of each: what else a machine does adds to a time and never takes from it.
    torch, autowu = (min(run[name][1] for run in runs) for name in ("torch", "autowu"))
    result = {"torch_ms": round(torch / 1e3), "autowu_ms": round(autowu / 1e3), "share": round(autowu / torch, 4)}
    result["repeats"] = args.repeats
    longest = sorted(((own, name) for name, (own, _) in runs[-1].items() if name.startswith("autowu")), reverse=True)
    RESULTS.write_text(json.dumps(result) + "\n")
    print(result, longest[:8], sep="\n")


if __name__ == "__main__":
    main()
