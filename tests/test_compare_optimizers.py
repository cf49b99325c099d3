"""The comparison of optimizers runs, on the digits and on a folder of images, and its page says what its results say."""

import contextlib
import importlib
import io
import json
import re
import sys

import pytest
import torch
from processes import ROOT
from sklearn.datasets import load_digits

from autowu.optim import param_groups

SCRIPT = "benchmarks/compare_optimizers.py"
RESULTS = ROOT / "benchmarks" / "results" / "compare_optimizers.jsonl"
PAGE = ROOT / "docs" / "optimizers.md"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare_optimizers")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(compare, monkeypatch, *arguments):
    """What the script prints, called in this process."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare.main()
    return printed.getvalue()


OPTIMIZERS = ("sgd", "momentum", "adam", "lars", "lamb", "tvlars", "tvlars-reference")


def test_every_recipe_makes_an_optimizer_that_steps(compare):
    assert tuple(compare.RECIPES) == OPTIMIZERS
    for recipe in compare.RECIPES.values():
        model = torch.nn.Linear(4, 2)
        before = model.weight.detach().clone()
        optimizer = recipe.make(param_groups(model, recipe.weight_decay), recipe.lr_at(64), 21)
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)


@pytest.mark.slow  # a script that nobody calls but who measures; that every recipe trains is tested above
@pytest.mark.parametrize("optimizers", [("momentum", "lars", "tvlars"), OPTIMIZERS])
def test_quick_trains_with_every_optimizer_and_runs_nothing_twice(compare, monkeypatch, tmp_path, optimizers):
    out, figure = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    command = ("--quick", "--epochs", 1, "--jobs", 1, "--out", out, "--figure", figure)
    if optimizers != OPTIMIZERS:
        command += ("--optimizers", *optimizers)
    first = call(compare, monkeypatch, *command)
    rows = rows_of(out)
    trained = {(row["optimizer"], row["schedule"]) for row in rows}
    both = {(name, schedule) for name in optimizers for schedule in ("hand-set", "autowu")}
    assert trained == both | {(name, "own") for name in optimizers if name.startswith("tvlars")}
    assert len(rows) == len(trained)
    assert all(row["steps"] == 21 and row["finite"] and row["seconds_per_epoch"] > 0 for row in rows)
    assert all(row["test_loss"] > 0 and row["train_loss"] > 0 and row["top1"] <= row["top5"] <= 1 for row in rows)
    assert max(row["top1"] for row in rows) > 0.9
    assert all((row["switch_step"] is not None) == (row["schedule"] == "autowu") for row in rows)
    layerwise = [row for row in rows if row["optimizer"] in ("lars", "lamb", "tvlars", "tvlars-reference")]
    assert all(row["trust_ratios"] == sorted(row["trust_ratios"]) and row["trust_ratios"][0] > 0 for row in layerwise)
    assert figure.stat().st_size > 10_000
    before, table = out.read_text(), first[first.index("| optimizer |") :]
    assert len([line for line in table.splitlines() if line.startswith("| LARS |")]) == 4
    # What is in the file is not run again, and the file is all that the report needs.
    assert call(compare, monkeypatch, *command).endswith(table)
    assert call(compare, monkeypatch, *command, "--report") == table
    assert out.read_text() == before


def test_the_hand_set_lrs_follow_the_rules_of_their_optimizers(compare):
    lrs = {name: [float(f"{recipe.lr_at(size):.6g}") for size in (64, 256, 1024)] for name, recipe in compare.RECIPES.items()}
    assert lrs["momentum"] == [0.025, 0.1, 0.4]
    assert lrs["lars"] == lrs["tvlars"] == [0.075, 0.3, 1.2]
    assert lrs["adam"] == [
        pytest.approx(0.001 / 2**0.5, rel=1e-5),
        pytest.approx(0.001 * 2**0.5, rel=1e-5),
        pytest.approx(0.00282843),
    ]


def test_a_run_that_is_not_finite_counts_as_the_worst(compare):
    row = {**rows_of(RESULTS)[0], "optimizer": "sgd", "schedule": "hand-set", "batch_size": 64, "steps": 630}
    good, bad = row | {"top1": 0.9, "test_loss": 0.5}, row | {"finite": False, "top1": 0.1, "test_loss": None}
    assert "| SGD | hand-set | 90.0%, 0.500 |" in compare.report([good, good, bad])
    assert "| SGD | hand-set | 10.0%, inf |" in compare.report([good, bad, bad])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Zeros, ones and twos of the digits as PNGs in class folders."""
    from PIL import Image

    digits, folder = load_digits(n_class=3), tmp_path_factory.mktemp("images")
    for number, (image, label) in enumerate(zip(digits.images[:150], digits.target[:150], strict=True)):
        (folder / f"digit {label}").mkdir(exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).save(folder / f"digit {label}" / f"{number}.png")
    return folder


@pytest.mark.slow  # other data and another model for what is run above
def test_a_folder_of_images_trains_an_alexnet(compare, monkeypatch, images, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ("--images", images, "--batch-sizes", 40, "--epochs", 5, "--seeds", 0, "--jobs", 1, "--out", out)
    table = call(compare, monkeypatch, *command, "--optimizers", "momentum", "--schedules", "hand-set")
    (row,) = rows_of(out)
    # A fifth of the 150 are for the test; 120 make 3 steps an epoch.
    assert [row["steps"], row["data"], row["top5"]] == [15, f"{images.name} 64", 1.0]
    assert row["top1"] > 0.6
    assert "batch 40, 15 steps" in table


def test_an_image_folder_with_train_and_val_is_taken_as_it_is_split(compare, images, tmp_path):
    (tmp_path / "val").symlink_to(images)
    (tmp_path / "train").mkdir()
    for label in ("digit 0", "digit 1", "digit 2"):
        (tmp_path / "train" / label).mkdir()
        first = sorted((images / label).iterdir())[0]
        (tmp_path / "train" / label / first.name).symlink_to(first)
    train, test, classes = compare.image_folders(tmp_path, 64)
    assert [len(train), len(test), classes] == [3, 150, 3]
    assert train[0][0].shape == (3, 64, 64)
    train, test, _ = compare.image_folders(images, 64)
    assert [len(train), len(test)] == [120, 30]
    assert not set(train.indices) & set(test.indices)


def test_a_batch_larger_than_the_data_is_refused(compare, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(compare, monkeypatch, "--quick", "--batch-sizes", 2048)
    assert "there are 1347 images to train on" in capsys.readouterr().err


def test_the_page_has_the_tables_of_the_results(compare):
    rows = compare.read(RESULTS)
    wanted = compare.jobs("digits", compare.BATCH_SIZES, compare.EPOCHS, compare.SEEDS)
    assert sorted(map(compare.job_of, rows)) == sorted(wanted)
    text = PAGE.read_text()
    for table in compare.report(rows).split("\n\n"):
        assert table in text


def test_the_page_has_its_figure_and_its_snippets_train():
    text = PAGE.read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert [(PAGE.parent / picture).resolve() for picture in pictures] == [ROOT / "assets" / "compare_optimizers.png"]
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    optimizers = []
    for snippet in snippets:
        names = {}
        exec(snippet, names)
        optimizers.append(names["optimizer"])
        assert [group["adapt"] for group in names["optimizer"].param_groups] == [True, False]
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["LARS", "LANS", "Muon", "Muon"]
    assert len(optimizers[0].layer_stats()) == 2
