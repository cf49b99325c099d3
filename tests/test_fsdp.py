"""--fsdp: two processes that have half of the model each train as two that have all of it, and so they go on. Real processes."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import zlib

import pytest
import torch
from processes import ranks, ranks_started
from test_checkpoints import Refused
from test_restart import RUN, SMALL, rows, run
from torch import nn

from autowu.training.config import UsageError
from autowu.training.main import main
from autowu.training.shards import _blocks, _Metadata, read_shards

OPTIONS = [
    "--batch-size",
    "64",
    "--grad-accum",
    "2",
    "--epochs",
    "2",
    "--clip-grad",
    "1",
    "--model-ema",
    "--model-ema-decay",
    "0.9",
]
MODEL = ["--model", "test_vit", "--img-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    run(folder, 2, "--fsdp", *OPTIONS)
    return folder


def states(folder, number=""):
    return read_shards(folder / "run" / f"checkpoint{number}", None)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else str(value) == str(other[name]), name


@pytest.mark.slow
def test_a_sharded_model_trains_as_a_whole_one(tmp_path, uncut):
    run(tmp_path, 2, *OPTIONS)
    one, other = rows(tmp_path), rows(uncut)
    assert len(one) == len(other) == 10
    for key in ("lr", "loss"):
        assert [float(row[key]) for row in other[:8]] == pytest.approx([float(row[key]) for row in one[:8]], rel=1e-3)
    whole, state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True), states(uncut)
    assert whole["model"].keys() == state["model"].keys()
    assert {len(list((uncut / "run" / "checkpoint").glob(f"{name}*"))) for name in ("__0_", "__1_", "rank-0", "rank-1")} == {1}


def test_a_sharded_run_that_was_cut_goes_on_bit_for_bit(tmp_path, uncut):
    run(tmp_path, 2, "--fsdp", *OPTIONS, cut_at=2)
    assert "begun" in states(tmp_path)
    run(tmp_path, 2, "--fsdp", *OPTIONS)
    assert rows(tmp_path) == rows(uncut)
    one, other = states(tmp_path), states(uncut)
    for part in ("model", "ema"):
        assert_same(one[part], other[part])
    for number, value in one["optimizer"]["state"].items():
        assert_same(value, other["optimizer"]["state"][number])


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "options"), [(1, OPTIONS), (4, ["--opt", "adamw", *OPTIONS])])
def test_a_sharded_run_goes_on_with_other_processes(tmp_path, uncut, processes, options):
    if options is not OPTIONS:
        run(tmp_path / "whole", 2, "--fsdp", *options)
    whole = uncut if options is OPTIONS else tmp_path / "whole"
    run(tmp_path, 2, "--fsdp", *options, cut_at=2)
    run(tmp_path, processes, "--fsdp", *options)
    for key in ("lr", "loss"):
        assert [float(row[key]) for row in rows(tmp_path)] == pytest.approx([float(row[key]) for row in rows(whole)], rel=2e-2)


@pytest.mark.slow
def test_batch_norm_goes_on_bit_for_bit_within_an_epoch_too(tmp_path):
    options = ["--model", "test_resnet", "--fsdp", "--batch-size", "128", "--epochs", "1"]
    run(tmp_path / "uncut", 2, *options)
    run(tmp_path, 2, *options, cut_at=2)
    run(tmp_path, 2, *options)
    assert rows(tmp_path) == rows(tmp_path / "uncut")
    assert_same(states(tmp_path)["model"], states(tmp_path / "uncut")["model"])


def test_the_model_of_a_sharded_run_is_tested_whole(uncut, capsys):
    last = json.loads((uncut / "run" / "summary.json").read_text())["test_accuracy"]
    for name in ("checkpoint", "best.pt"):
        assert main(["--config", str(uncut / "run" / "config.json"), "--eval", str(uncut / "run" / name)]) == 0
        said = capsys.readouterr().out
        if name == "checkpoint":
            assert f"test accuracy {last:.2%}" in said
    assert main([*MODEL, "--initial-checkpoint", str(uncut / "run" / "best.pt"), "--dry-run"]) == 0


def flipped(folder):
    path = next(folder.glob("__1_*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sealed(folder, name, write):
    """As one that knows of the checksums would do it."""
    write(folder / name)
    sums = json.loads((folder / "checksums.json").read_text())
    content = (folder / name).read_bytes()
    (folder / "checksums.json").write_text(json.dumps(sums | {name: [len(content), zlib.crc32(content)]}))


DAMAGES = {
    "a flipped bit": flipped,
    "short of a byte": lambda f: os.truncate(f / "rank-1.pt", (f / "rank-1.pt").stat().st_size - 1),
    "without a file": lambda f: (f / "rank-1.pt").unlink(),
    "without checksums": lambda f: (f / "checksums.json").unlink(),
    "malicious": lambda f: sealed(f, "rank-0.pt", lambda path: torch.save({"model": Refused(f / "executed")}, path)),
    "malicious metadata": lambda f: sealed(f, ".metadata", lambda path: path.write_bytes(pickle.dumps(Refused(f / "executed")))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_malicious_sharded_checkpoint_is_refused(tmp_path, uncut, damage):
    shutil.copytree(uncut / "run" / "checkpoint", tmp_path / "checkpoint")
    DAMAGES[damage](tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="checkpoint: damaged, or no checkpoint: "):
        read_shards(tmp_path / "checkpoint", None)
    assert not (tmp_path / "checkpoint" / "executed").exists()


@pytest.mark.slow
def test_a_damaged_sharded_checkpoint_is_set_aside_by_all_processes(tmp_path, uncut):
    shutil.copytree(uncut / "run", tmp_path / "run")
    flipped(tmp_path / "run" / "checkpoint")
    run(tmp_path, 2, "--fsdp", *OPTIONS)
    assert rows(tmp_path) == rows(uncut)
    assert_same(states(tmp_path)["model"], states(uncut)["model"])
    assert (tmp_path / "run" / "checkpoint.broken").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_later(tmp_path, capsys):
    command = [*MODEL, "--fsdp", "--batch-size", "256", "--epochs", "1", "--max-warmup-fraction", "0.5", "--run-dir"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main([*command, str(tmp_path / "run")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]
    assert len(said) == 1
    assert "cannot be written: File too large" in said[0]
    assert main([*command, str(tmp_path / "run"), "--resume"]) == 0  # alone: a group of one


# What two processes with halves of a small model do, beside one that has all of it.
STEP = """
import sys, torch
from dataclasses import replace
from test_training import ALONE, configured, made, small_model
from torch.utils.data import DataLoader, Subset
from autowu.training.build import build_parts
from autowu.training.evaluation import average_batch_norm, evaluate
from autowu.training.loop import train_step
from autowu.training.process import join
from autowu.training.shards import consolidated
PLAIN = ["--opt", "momentum", "--momentum", "0", "--weight-decay", "0", "--sched", "cosine", "--lr", "0.1"]
def weights(parts):
    return {name: value.clone() for name, value in consolidated(parts.model.state_dict()).items()}
with join("cpu", group=True) as process:
    for options in ([], ["--clip-grad", "0.01"], ["--clip-grad", "0.01", "--clip-mode", "agc"],
                    ["--clip-grad", "0.01", "--clip-mode", "value"], ["--grad-accum", "4", "--batch-size", "16"],
                    ["--amp", "--amp-dtype", "float16"], ["--opt", "adamw", "--layer-decay", "0.5"], ["--opt", "lamb"]):
        config = configured(sys.argv[1], "--batch-size", "64", *PLAIN, *options, "--fsdp")
        torch.manual_seed(0)
        parts, loaders = made(config, process)
        whole = build_parts(replace(config, fsdp=False, batch_size=128, grad_accum=1), ALONE, small_model(), 10)
        for one in (parts, whole):
            one.model[1].eval()  # batch norm would see batches of other images
        images, labels = next(iter(loaders.train))
        everything = process.gather((images, labels))
        losses = [train_step(parts, images, labels), train_step(whole, *(torch.cat(both) for both in zip(*everything)))]
        assert abs(process.mean(losses[0]) - losses[1]) < (1e-2 if parts.scaler else 1e-5), options
        tolerance = dict(rtol=1e-2, atol=1e-3) if parts.scaler else dict(rtol=1e-4, atol=1e-6)
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(weights(parts)[name], value, **tolerance)
        assert any(hasattr(p, "placements") and p.to_local().numel() < p.numel() for p in parts.model.parameters())
        if parts.scaler:  # what is not finite on one process leaves the step out on both
            before, scale = weights(parts), parts.scaler.get_scale()
            train_step(parts, images * (float("inf") if process.rank else 1), labels)
            assert parts.scaler.get_scale() == scale / 2
            assert all(torch.equal(before[name], value) for name, value in weights(parts).items() if value.is_floating_point())
    # Each tests its share, in as many passes: the other one has nothing left.
    average_batch_norm(parts.model, process)
    test = loaders.test.dataset.dataset
    for count in (257, 1):
        share = DataLoader(Subset(test, range(process.rank, count, 2)), 128)
        found = evaluate(parts, share, process)
        whole.model.load_state_dict(weights(parts))
        expected = evaluate(whole, DataLoader(Subset(test, range(count)), 64), ALONE)
        assert found[1] == expected[1] and abs(found[0] - expected[0]) < 1e-4, (found, expected)
    del parts
"""


def test_each_block_that_a_model_repeats_is_a_unit():
    import timm

    for name, kind, number in (("resnet50", "Bottleneck", 16), ("test_vit", "Block", 6), ("mixer_s32_224", "MixerBlock", 8)):
        model = timm.create_model(name)
        blocks = _blocks(model)
        assert {type(block).__name__ for block in blocks} == {kind}
        assert len(blocks) == len(set(blocks)) == number
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert len(_blocks(nn.ModuleList([mixed, mixed]))) == 4  # each once, none in another


def test_a_step_of_a_sharded_model_is_that_of_the_whole_under_every_option(tmp_path):
    ranks(tmp_path, 2, "-c", STEP, tmp_path / "run")


def made_at(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.slow
def test_a_sharded_run_killed_while_it_writes_goes_on(tmp_path, uncut):
    command = ["-c", RUN, tmp_path, "never", *SMALL, "--run-dir", tmp_path / "run", "--resume", "auto", "--fsdp", *OPTIONS]
    partial = tmp_path / "run" / "checkpoint.partial"
    for kill in range(4):
        before = made_at(partial)  # what the last kill has left
        with ranks_started(tmp_path / f"out-{kill}", 2, *command) as processes:
            while made_at(partial) == before and processes[0].process.is_alive():
                pass
            os.kill(processes[kill % 2].process.pid, signal.SIGKILL)
            assert {process.end() for process in processes} == {-signal.SIGKILL, 1}
    run(tmp_path, 2, "--fsdp", *OPTIONS)
    assert rows(tmp_path) == rows(uncut)


class Pickled:
    """Pickles as that call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_of_a_checkpoint_the_members_of_enums_are_read_and_no_other_attribute_is():
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as KIND

    def read(*call):
        return _Metadata(io.BytesIO(pickle.dumps(Pickled(*call)))).load()

    assert read(getattr, (KIND, "TORCH_PRESERVE_FORMAT")) is KIND.TORCH_PRESERVE_FORMAT  # as Python 3.11.2 has them
    for call in ((getattr, (torch.Size, "mro")), (getattr, (KIND.TORCH_PRESERVE_FORMAT, "__class__")), (os.getenv, ("HOME",))):
        with pytest.raises(pickle.UnpicklingError, match="is no part of a checkpoint"):
            read(*call)
