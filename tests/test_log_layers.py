"""train.py --log-layers: real runs, and what is read back from their folders."""

import csv
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from processes import Forked, ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autowu.optim import LARS, param_groups
from autowu.plotting import draw_layers
from autowu.training.build import build, build_model
from autowu.training.config import parse_args
from autowu.training.data import find_data
from autowu.training.folder import RunFolder
from autowu.training.layers import LayerLog
from autowu.training.main import main
from autowu.training.process import join
from autowu.training.run import train_run

# A model without batch norm, so that two processes compute what one does; 10 steps an epoch, of which every third is logged.
SMALL = ["--model", "test_vit", "--img-size", "16", "--epochs", "3", "--device", "cpu"]
SHORT = [*SMALL, "--batch-size", "128"]
EVERY = ["--log-layers", "3"]
LOGGED = list(range(0, 30, 3))
COLUMNS = ["step", "layer", "weight_norm", "grad_norm", "trust_ratio", "lr"]


def table(folder):
    return pq.ParquetFile(folder / "layers.parquet").read()


def events(folder):
    """(step, value) of each tag."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def events_of(rows):
    """What `events` should give for the rows of a table."""
    found = {}
    for row in rows.to_pylist():
        for kind in ("trust_ratio", "weight_norm", "grad_norm"):
            found.setdefault(f"{kind}/{row['layer']}", []).append((row["step"], np.float32(row[kind])))
    return found


def lrs(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*SHORT, *EVERY, "--run-dir", str(folder)]) == 0
    return folder


def test_the_file_has_a_row_for_every_adapted_layer_and_logged_step(whole):
    rows = table(whole)
    assert rows.column_names == COLUMNS
    config = parse_args([*SHORT, "--run-dir", "unused"])
    with join("cpu") as process:
        model = build_model(config, find_data(config, process)).module
    layers = param_groups(model)[0]["param_names"]
    assert len(layers) > 10
    assert rows["step"].to_pylist() == [step for step in LOGGED for _ in layers]
    assert rows["layer"].to_pylist() == layers * len(LOGGED)
    assert rows["lr"].to_pylist() == [lrs(whole)[step] for step in LOGGED for _ in layers]
    assert np.isfinite(rows["trust_ratio"].to_numpy()).all()


def test_tensorboard_has_the_same_values_under_a_group_for_each_kind(whole):
    assert events(whole) == events_of(table(whole))


def test_the_folder_holds_one_file_and_a_picture(whole):
    assert not (whole / "layers").exists()
    assert not list(whole.rglob("*.partial"))
    with Image.open(whole / "layers.png") as image:
        assert image.width > 500


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("opt", ["lars", "lamb", "tvlars"])
def test_values_are_those_of_the_definition(tmp_path, opt):
    config = parse_args(
        [*SHORT, "--epochs", "1", "--max-warmup-fraction", "0.5", *EVERY, "--opt", opt, "--run-dir", str(tmp_path / "run")]
    )
    expected = []

    def before_the_step(optimizer, args, kwargs):
        decayed = optimizer.param_groups[0]
        for name, p in zip(decayed["param_names"], decayed["params"], strict=True):
            norms = (p.detach().double().norm().item(), p.grad.double().norm().item())
            # TVLARS counts steps on its own: when AutoWU goes back, it goes back too.
            expected.append((name, *norms, decayed["lr"], float(decayed.get("step", 0))))

    with join("cpu") as process:
        data = find_data(config, process)
        torch.manual_seed(config.seed)
        parts, loaders = build(config, process, data)
        parts.optimizer.register_step_pre_hook(before_the_step)
        train_run(config, process, parts, loaders, RunFolder(config, 1), time.perf_counter())
    rows = table(tmp_path / "run").to_pylist()
    assert len(expected) // 10 * 4 == len(rows)
    layers = len(expected) // 10
    expected = [values for k, values in enumerate(expected) if k // layers % 3 == 0]
    for row, (name, weight_norm, grad_norm, lr, step) in zip(rows, expected, strict=True):
        assert (row["layer"], row["lr"]) == (name, lr)
        assert row["weight_norm"] == pytest.approx(weight_norm, rel=1e-5)
        if opt == "lamb":  # Adam's update stands in the place of the gradient
            ratio = min(weight_norm / row["grad_norm"], 10) if weight_norm * row["grad_norm"] > 0 else 1.0
        else:
            assert row["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
            sigmoid = 1 / (1 + np.exp(1e-3 * step)) + 1e-3 if opt == "tvlars" else 1.0
            ratio = 0.001 * sigmoid * weight_norm / (grad_norm + config.weight_decay * weight_norm + 1e-8)
        assert row["trust_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert len({round(row["trust_ratio"], 6) for row in rows}) > layers


@pytest.mark.usefixtures("blank_figures")
def test_a_killed_run_keeps_its_parts_and_goes_on_without_gap_or_repetition(tmp_path, whole):
    folder = tmp_path / "cut"
    run = Forked(tmp_path, "train.py", *SHORT, *EVERY, "--run-dir", folder)
    run.wait_for_line("epoch   2/3")
    run.process.kill()
    assert run.end() < 0
    assert not (folder / "layers.parquet").exists()
    parts = sorted((folder / "layers").glob("*.parquet"))
    kept = pa.concat_tables([pq.ParquetFile(part).read() for part in parts])
    assert kept == table(whole).slice(0, len(kept))
    assert kept["step"][-1].as_py() >= 18
    time.sleep(1.1)  # event files are named after the second, and read in the order of their names
    assert main([*SHORT, *EVERY, "--run-dir", str(folder), "--resume"]) == 0
    assert table(folder) == table(whole)
    assert events(folder) == events(whole)
    assert not (folder / "layers").exists()
    assert len(list((folder / "tensorboard").iterdir())) == 2
    # Nothing is left to train: the file stays.
    assert main([*SHORT, *EVERY, "--run-dir", str(folder), "--resume"]) == 0
    assert table(folder) == table(whole)


def stepped():
    """An optimizer that has taken a step."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = LARS(torch.optim.SGD(param_groups(model), lr=0.5))
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path):
    optimizer = stepped()
    log = LayerLog(tmp_path, 0)
    for step in range(10):
        log.add(step, optimizer)
    log.save()  # the checkpoint is taken here, and the run is killed in the next epoch, in which a part was written
    for step in range(10, 16):
        log.add(step, optimizer)
        if step == 13:
            log.save()
    log.close()
    (tmp_path / "layers" / "part-000000014.partial").write_bytes(b"half")
    assert len(list((tmp_path / "layers").glob("*.parquet"))) == 2

    log = LayerLog(tmp_path, 10)
    assert [part.name for part in (tmp_path / "layers").iterdir()] == ["part-000000000.parquet"]
    for step in range(10, 20):
        log.add(step, optimizer)
    log.finish()
    log.close()
    assert table(tmp_path)["step"].to_pylist() == [step for step in range(20) for _ in range(2)]
    assert events(tmp_path) == events_of(table(tmp_path))


def test_a_run_cut_off_while_its_parts_were_joined_goes_on(tmp_path):
    log = LayerLog(tmp_path, 0)
    for step in range(2):
        log.add(step, stepped())
        log.save()
    last = tmp_path / "layers" / "part-000000001.parquet"
    left = last.read_bytes()
    log.finish()
    log.close()
    before = table(tmp_path)
    assert before["step"].to_pylist() == [0, 0, 1, 1]
    last.parent.mkdir()
    last.write_bytes(left)
    LayerLog(tmp_path, 2).finish()
    assert table(tmp_path) == before
    assert not last.exists()


@pytest.mark.usefixtures("blank_figures")
def test_every_cooldown_has_the_steps_of_all_its_run(tmp_path):
    options = [*SMALL, "--batch-size", "128", "--log-layers", "3"]
    folder = tmp_path / "run"
    assert main([*options, "--cooldown-fraction", "0.2", "0.37", "--max-warmup-fraction", "0.4", "--run-dir", str(folder)]) == 0
    runs = json.loads((folder / "cooldowns.json").read_text())["runs"]
    first = runs[1]["first_step"]
    assert first % 10 != 0  # within an epoch
    trunk, branch = (table(folder / run["folder"]) for run in runs)
    for rows in (trunk, branch):
        assert sorted(set(rows["step"].to_pylist())) == LOGGED
        assert len(rows) == len(trunk)
    same = sum(step < first for step in trunk["step"].to_pylist())
    assert trunk.slice(0, same) == branch.slice(0, same)
    assert trunk.slice(same) != branch.slice(same)
    for run, rows in zip(runs, (trunk, branch), strict=True):
        assert events(folder / run["folder"]) == events_of(rows)


def test_two_processes_write_one_file_of_what_one_process_computes(tmp_path, whole):
    ranks(tmp_path, 2, "train.py", *SMALL, "--batch-size", "64", *EVERY, "--run-dir", tmp_path / "two")
    rows = table(tmp_path / "two")
    assert len(list((tmp_path / "two").rglob("*.parquet"))) == len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    assert rows.select(COLUMNS[:2]) == table(whole).select(COLUMNS[:2])
    early = sum(step < 10 for step in rows["step"].to_pylist())
    for name in COLUMNS[2:]:
        # Rounding grows along the run; the gradients of one process alone would differ from the start.
        torch.testing.assert_close(
            torch.tensor(rows[name].to_numpy()[:early]), torch.tensor(table(whole)[name].to_numpy()[:early]), rtol=2e-3, atol=1e-7
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--opt", "adamw", "--log-layers", "5"],
            "--log-layers 5: goes with --opt lars, lamb or tvlars; adamw has no trust ratios",
        ),
        (["--opt", "lookahead_lamb", "--log-layers", "5"], "lookahead_lamb has no trust ratios"),
        (["--log-layers", "0"], "--log-layers 0: must be at least 1"),
    ],
)
def test_what_cannot_be_logged_is_refused_at_the_start(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_packages_that_are_not_there_are_named_and_not_needed_otherwise(tmp_path):
    code = f"""
import sys
for name in [name for name in sys.modules if name.startswith("autowu")]:
    del sys.modules[name]
sys.modules["tensorboard"] = sys.modules["pyarrow.parquet"] = None
from autowu.training.main import main
options = {[*SHORT, "--epochs", "1", "--run-dir"]}
assert main([*options, {str(tmp_path / "runs" / "plain")!r}]) == 0
assert main([*options, {str(tmp_path / "runs" / "logged")!r}, "--log-layers", "3"]) == 2
"""
    hidden = Forked(tmp_path, "-c", code)
    assert hidden.end() == 0, hidden.stderr
    assert "--log-layers 3: needs tensorboard: pip install tensorboard" in hidden.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plain"]
    assert not list((tmp_path / "runs" / "plain").glob("layers*"))


@pytest.mark.parametrize(("layers", "named"), [(1, 1), (40, 40), (160, 40)])
def test_some_of_many_layers_are_named(layers, named):
    names = [f"stages.{k}.conv.weight" for k in range(layers)]
    columns = {"step": np.repeat([0, 5, 10], layers), "layer": names * 3, "trust_ratio": np.full(3 * layers, 0.1)}
    figure = draw_layers(columns)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == named
    assert (labels[0], labels[-1]) == ("stages.0.conv", f"stages.{layers - 1}.conv")
    assert figure.get_figheight() <= 9


def test_the_picture_shows_the_logarithm_of_each_ratio_in_its_place(whole):
    rows = table(whole)
    (mesh,) = draw_layers(rows.to_pydict()).axes[0].collections
    logs = np.log10(rows["trust_ratio"].to_numpy()).reshape(len(LOGGED), -1)
    np.testing.assert_allclose(mesh.get_array(), logs.T)


def test_a_layer_without_a_ratio_is_left_out_of_the_picture():
    columns = {"step": [0, 0, 1], "layer": ["a", "b", "a"], "trust_ratio": [0.1, 0.0, np.nan]}
    (mesh,) = draw_layers(columns).axes[0].collections
    np.testing.assert_allclose(np.ma.filled(mesh.get_array(), np.nan), [[-1, np.nan], [np.nan, np.nan]])
    assert not draw_layers({"step": [], "layer": [], "trust_ratio": []}).axes[0].collections
