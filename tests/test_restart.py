"""A run of train.py that goes on under another number of processes, or with another of them: real processes."""

import csv
import json

import pytest
import torch
from processes import ranks

from autowu.training.checkpoints import mean_of_losses

# A run whose processes write down the images of each step; rank 0 sends itself a signal at one, where it is given.
RUN = """
import json, os, signal, sys
from blank_figures import blank
from autowu.training import loop
from autowu.training.main import main
folder, cut_at, *arguments = sys.argv[1:]
def train_step(parts, images, labels, step=loop.train_step):
    with open(f"{folder}/images-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
        file.write(json.dumps(images.double().square().sum((1, 2, 3)).tolist()) + "\\n")
    return step(parts, images, labels)
def recorded(self, step, optimizer):
    if cut_at == f"{step}" and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
loop.train_step = train_step
loop.NullRecorder.step = recorded
from autowu.training import records
records.Recorder.step = recorded
with blank():
    sys.exit(main(arguments))
"""
SMALL = ["--model", "test_vit", "--img-size", "16", "--device", "cpu", "--max-warmup-fraction", "0.5", "--checkpoint-steps", "3"]


def run(folder, processes, *options, cut_at="never"):
    folder.mkdir(exist_ok=True)
    ranks(
        folder / f"out-{processes}-{cut_at}",
        processes,
        "-c",
        RUN,
        folder,
        cut_at,
        *SMALL,
        "--run-dir",
        folder / "run",
        "--resume",
        "auto",
        *options,
    )


def steps(folder):
    """The images of each step, by what they sum to, whichever processes had them."""
    of_ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("images-*.jsonl"))]
    return [sorted(image for part in parts for image in part) for parts in zip(*of_ranks, strict=True)]


def rows(folder):
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    run(folder, 2, "--batch-size", "64", "--epochs", "2")
    return folder


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        (2, 1, ["--batch-size", "64"]),
        pytest.param(1, 2, ["--global-batch-size", "128"], marks=pytest.mark.slow),
        pytest.param(2, 4, ["--batch-size", "64"], marks=pytest.mark.slow),
        pytest.param(4, 2, ["--global-batch-size", "128", "--grad-accum", "2"], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_processes_on_the_same_images_and_schedule(tmp_path, uncut, before, after, options):
    options = [*options, "--epochs", "2"]
    run(tmp_path, before, *options, cut_at=13)
    seen = steps(tmp_path)
    taken = len(rows_of_checkpoint := torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["begun"]["lrs"]) + 10
    assert rows_of_checkpoint
    for path in tmp_path.glob("images-*.jsonl"):
        path.unlink()
    run(tmp_path, after, *options)
    assert seen[:taken] + steps(tmp_path) == steps(uncut)
    one, other = rows(uncut), rows(tmp_path)
    assert len(one) == len(other) == 20
    for key in ("lr", "loss"):
        assert [float(row[key]) for row in other] == pytest.approx([float(row[key]) for row in one], rel=2e-2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["batch_size"], summary["world_size"]) == (128, after)


def test_losses_of_several_processes_become_their_mean_where_they_are_finite():
    inf, nan = float("inf"), float("nan")
    first = {"history": {"losses": torch.tensor([1.0, 0.1, -inf, nan, 5.0])}, "level": 3.0, "epoch": None}
    second = {"history": {"losses": torch.tensor([2.0, 0.1, -inf, 7.0, inf])}, "level": 4.0, "epoch": {"losses": torch.ones(2)}}
    merged = mean_of_losses([first, second])
    torch.testing.assert_close(merged["history"]["losses"], torch.tensor([1.5, 0.1, -inf, 7.0, 5.0]))
    assert (merged["level"], merged["epoch"]) == (3.0, None)
