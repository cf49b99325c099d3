"""The measure itself runs: a case of the quick suite, with real models in real processes."""

import json
import subprocess
import sys

import pytest
from processes import ROOT


def test_regret_measures_a_case_and_runs_nothing_twice(tmp_path):
    out, figure = tmp_path / "regret.jsonl", tmp_path / "regret.png"
    case = "mlp lamb 128 240"
    command = [sys.executable, "benchmarks/regret.py", "--quick", "--cases", case, "--out", out, "--figure", figure]
    first = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted({row["seed"] for row in rows}) == [0, 1]
    assert [sum(row["method"] == method for row in rows) for method in ("grid", "autowu", "paper")] == [18, 2, 2]
    assert all(row["case"] == case for row in rows)
    found = [row for row in rows if row["method"] == "autowu"]
    assert all(row["finite"] and row["accuracy"] > 0.9 for row in found)
    assert figure.stat().st_size > 10_000
    before = out.read_text()
    second = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.read_text() == before
    table = first[first.index("| method |") :]
    assert second.endswith(table)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == ["| autowu", "| paper", "| sweep"]


@pytest.mark.parametrize(("rounds", "processes"), [(1, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_optimizers_are_measured_beside_their_limits(tmp_path, rounds, processes):
    out = tmp_path / "optim.json"
    options = ["--models", "test_resnet", "--rounds", f"{rounds}", "--processes", f"{processes}", "--no-compile", "--out", out]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_optim.py", *options], cwd=ROOT, check=True, capture_output=True, text=True
    )
    rows = json.loads(out.read_text())["rows"]
    ratios = {row["optimizer"]: row["ratio"] for row in rows}
    assert {"LARS", "TVLARS", "LAMB", "LARS, foreach", "timm Lars", "timm Lamb"} < set(ratios)
    assert ratios["torch SGD, fused"] == ratios["torch AdamW, fused"] == 1.0
    assert all(min(row["ratios"]) <= row["ratio"] <= max(row["ratios"]) and row["milliseconds"] > 0 for row in rows)
    assert all(len(row["ratios"]) == processes for row in rows)
    for line in (f"| LARS | fused SGD | {ratios['LARS']:.2f} |", "| *limit of LAMB* | fused AdamW | *1.43* |"):
        assert line in done.stdout.splitlines()
