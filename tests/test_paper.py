"""AutoWU.paper against decisions of the published code on recorded warm-ups; benchmarks/paper_decisions.py has them all."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
spec = importlib.util.spec_from_file_location("paper_decisions", BENCHMARKS / "paper_decisions.py")
paper_decisions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper_decisions)

# task, optimizer, batch size, seed, warm-up steps; each switched by test, far from the threshold of the vote.
HANDFUL = [
    ("mlp", "lars", 32, 0, 240),
    ("mlp", "adamw", 128, 0, 240),
    ("mlp", "lamb", 512, 1, 240),
    ("cnn", "sgd", 32, 0, 900),
]


@pytest.fixture(scope="module")
def curves():
    lines = (BENCHMARKS / "data" / "warmups.jsonl").read_text().splitlines()
    keys = ("task", "optimizer", "batch_size", "seed", "warmup_steps")
    return {tuple(curve[k] for k in keys): curve for curve in map(json.loads, lines)}


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=pytest.mark.slow if number else []) for number, key in enumerate(HANDFUL)],
    ids=lambda key: "-".join(map(str, key)),
)
def test_decides_as_the_published_code(curves, key):
    run = next(r for r in curves[key]["published_code"] if r["by_test"])
    assert paper_decisions.agrees(paper_decisions.replay(curves[key], run), run)


@pytest.mark.slow  # a warm-up that ends at its limit by the preset's rule is tested without its fit, too
def test_times_out_where_the_published_code_does(curves):
    curve = curves["cnn", "adamw", 512, 0, 240]
    run = next(r for r in curve["published_code"] if not r["by_test"])
    switch = paper_decisions.replay(curve, run)
    assert not switch.by_test
    assert switch.step == run["switch_step"]
    # It goes back to the minimum instead of keeping the LR that it has reached.
    assert switch.lr < run["lr_after_switch"] / 10
