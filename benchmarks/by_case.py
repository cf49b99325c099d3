"""What the scripts share that try something on each case with each seed: arguments, a results file to go on with, the report."""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from regret import read

__all__ = ["command"]

Rows = list[dict[str, Any]]


def command(
    doc: str | None,
    results: Path,
    cases: Iterable[str],
    seeds: Iterable[int],
    run: Callable[[str, int], dict[str, Any]],
    report: Callable[[Rows], str],
) -> None:
    """Run what the file of results does not have yet, a line of JSON each, and print the report of all.

    Args:
        doc: of the script.
        results: the file, by default.
        cases, seeds: by default.
        run: what is tried with a case and a seed; its line.
        report: of the lines, as Markdown.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*seeds])
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="those that contain it")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="the K-th of N parts of what is to be run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("autowu").setLevel(logging.CRITICAL)
    chosen = [case for case in dict.fromkeys(cases) if any(fnmatch.fnmatch(case, f"*{p}*") for p in args.cases)]
    done = {(row["case"], row["seed"]) for row in read(args.out)}
    shard, shards = map(int, args.shard.split("/"))
    wanted = [key for key in ((case, seed) for seed in args.seeds for case in chosen) if key not in done]
    started = time.perf_counter()
    for case, seed in [] if args.report else wanted[shard - 1 :: shards]:
        if time.perf_counter() - started > 60 * args.minutes:
            break
        row = json.loads(json.dumps(run(case, seed)), parse_float=lambda x: float(f"{float(x):.6g}"))
        with args.out.open("a") as file:
            print(json.dumps(row), file=file)
    print(report([row for row in read(args.out) if row["seed"] in args.seeds]))
