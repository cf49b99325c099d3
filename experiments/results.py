"""The results file of an experiment, a line of JSON a run, and what is made of it: what is asked for is run, and reported."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from autowu.training.config import RunError, UsageError
from autowu.training.process import Process, join

__all__ = ["HERE", "Experiment", "Row", "main", "median", "read", "spread", "table"]

HERE = Path(__file__).parent
Row = dict[str, Any]


class Experiment(NamedTuple):
    """What an experiment is made of.

    Attributes:
        jobs: from the arguments to all runs that are asked for; a run is named by a NamedTuple, whose fields are in its row.
        run: one of them, on all processes, to its row of the results file.
        report: rows to tables in Markdown.
        draw: rows to the figure in a file.
    """

    jobs: Callable[[argparse.Namespace], Sequence[Any]]
    run: Callable[[Any, argparse.Namespace, Process], Row]
    report: Callable[[Sequence[Row]], str]
    draw: Callable[[Sequence[Row], Path], None]


def main(experiment: Experiment, args: argparse.Namespace) -> int:
    """Run what is not in the file `args.out` yet and say what came out; the exit code. What cannot be is said in one line."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        wanted = experiment.jobs(args)
        if not args.report:
            with join(args.device) as process:
                wrong = _run_all(experiment, wanted, args, process)
            if wrong is not None:
                raise wrong
    except UsageError as error:  # the same on all processes
        if is_main:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return error.code
    except RunError as error:  # said by `join`
        return error.code
    if not is_main:
        return 0
    rows = [row for row in read(args.out) if _named(row, wanted)]
    if not rows:
        print(f"{args.out}: no such runs in it", file=sys.stderr)
        return 2
    print(experiment.report(rows))
    if args.figure:
        experiment.draw(rows, args.figure)
    return 0


def _run_all(experiment: Experiment, wanted: Sequence[Any], args: argparse.Namespace, process: Process) -> UsageError | None:
    """What cannot be of what the user asked for."""
    rows = process.gather(read(args.out))[0]
    for job in [job for job in wanted if not any(_named(row, [job]) for row in rows)]:
        try:
            row = experiment.run(job, args, process)
        except UsageError as error:
            return error
        if process.is_main:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:  # written as it goes: a run that is cut off leaves those before it
                file.write(json.dumps(row) + "\n")
            print(" ".join(f"{key}={value}" for key, value in row.items() if not isinstance(value, list)), flush=True)
    return None


def _named(row: Row, jobs: Sequence[Any]) -> bool:
    """Whether a row is of one of these runs."""
    return any(all(row.get(key) == value for key, value in job._asdict().items()) for job in jobs)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def median(rows: Iterable[Row], key: str) -> float:
    return float(statistics.median(row[key] for row in rows))


def spread(rows: Iterable[Row], key: str) -> str:
    """Accuracies as a median and, of several, the least and the greatest, in per cent."""
    values = sorted(100 * row[key] for row in rows)
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({values[0]:.1f} to {values[-1]:.1f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
