"""The experiments run from end to end, Barlow Twins is the same on any number of ranks, and their page says what came out."""

import importlib
import itertools
import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from barlow_ranks import gradients, make_twins, make_views
from PIL import Image
from processes import ROOT, ranks
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from autowu import AutoWU
from autowu.training.process import Process

HERE = ROOT / "experiments"
PAGE = HERE / "README.md"
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def module(monkeypatch):
    """A module of experiments/ by its name."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- Barlow Twins


def test_two_ranks_have_the_loss_and_the_gradients_of_one_process_with_the_whole_batch(tmp_path):
    ranks(tmp_path, 2, "tests/barlow_ranks.py", tmp_path)
    twins = make_twins()
    expected = gradients(twins, twins, make_views())
    assert len(expected) > 10
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")


def test_the_cross_correlation_is_numpys(module):
    torch.manual_seed(0)
    first = torch.randn(50, 4, dtype=torch.float64) * 3 + 1
    second = first.roll(1, 1) + torch.randn(50, 4, dtype=torch.float64)
    expected = np.corrcoef(first.T, second.T)[:4, 4:]
    found = module("barlow_twins").cross_correlation(first, second)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_loss_is_that_of_its_definition(module):
    correlation = torch.tensor([[0.5, 0.25], [-0.5, 1.0]])
    loss = module("barlow_twins").redundancy_loss(correlation, 0.1)
    assert loss.item() == pytest.approx(0.25 + 0.1 * (0.0625 + 0.25))


def test_a_view_without_strengths_is_the_image_and_with_a_flip_it_or_its_mirror(module):
    barlow = module("barlow_twins")
    images = torch.randn(40, 3, 8, 8)
    still = barlow.Augmentation(rotation=0, sides=(1, 1), shift=0, flip=False, jitter=0, grey=0, noise=0)
    torch.testing.assert_close(barlow.view(images, still), images, rtol=1e-4, atol=1e-4)
    seen = barlow.view(images, barlow.Augmentation(0, (1, 1), 0, True, 0, 0, 0))
    same, mirrored = (((seen - other).abs().amax((1, 2, 3)) < 1e-3) for other in (images, images.flip(3)))
    assert (same ^ mirrored).all()
    assert 5 < same.sum() < 35


@pytest.mark.parametrize("kind", ["DIGITS", "PHOTOS"])
def test_two_views_of_an_image_differ_and_are_nearer_than_views_of_two(module, kind):
    barlow = module("barlow_twins")
    images = torch.tensor(load_digits().images[:200], dtype=torch.float32)[:, None] / 6 - 0.8
    if kind == "PHOTOS":
        images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    first, second = (barlow.view(images, getattr(barlow, kind)) for _ in range(2))
    assert first.shape == images.shape
    own, other = ((first - second.roll(k, 0)).square().mean((1, 2, 3)).median() for k in (0, 1))
    assert 0.01 < own < other


def test_the_probe_is_a_logistic_regression(module):
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    train, test = (inputs[:1000], labels[:1000]), (inputs[1000:], labels[1000:])
    found = module("barlow_twins").linear_probe(train, test, 10, decay=1e-2)
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-5
    peer = LogisticRegression(C=1 / (1000 * 1e-2), max_iter=1000).fit((train[0] - mean) / deviation, train[1])
    assert found == pytest.approx(peer.score((test[0] - mean) / deviation, test[1]), abs=0.006)


# ---------------------------------------------------------------- the scripts

SHORT = ("--epochs", "1", "--batch-size", "256", "--device", "cpu", "--log-layers", "3")


def call(script, tmp_path, *arguments):
    """The code of a script that is called in this process, and the rows of its results file."""
    out = tmp_path / "rows.jsonl"
    folder = ("--runs", str(tmp_path / "runs")) if script.__name__ == "tvlars" else ()
    return script.main([*arguments, "--out", str(out), *folder]), rows_of(out) if out.exists() else []


def test_the_schedules_are_those_of_their_names(module):
    loop = module("loop")
    lrs = {}
    for name in loop.SCHEDULES[:3]:
        parameter = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([parameter], lr=2.0)
        scheduler = loop.make_schedule(name, optimizer, torch.nn.Module(), 20)
        lrs[name] = []
        for _ in range(20):
            lrs[name].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    assert lrs["None"] == [2.0] * 20
    cosine = [1 + np.cos(np.pi * step / 20) for step in range(20)]
    np.testing.assert_allclose(lrs["cosine"], cosine, atol=1e-9)
    assert lrs["lars-warm"][:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(lrs["lars-warm"][2:]))
    assert isinstance(loop.make_schedule("autowu", optimizer, torch.nn.Linear(1, 1), 20), AutoWU)


@pytest.mark.usefixtures("blank_figures")
def test_tvlars_classifies_with_every_combination_once_and_logs_trust_ratios(module, tmp_path, capsys):
    tvlars = module("tvlars")
    command = ("--opt", "lars", "tvlars", "--sd", "None", "autowu", "--lmbda", "1e-6", "0.5", *SHORT)
    code, rows = call(tvlars, tmp_path, *command)
    assert code == 0
    assert [(row["opt"], row["sd"], row["lr"], row["lmbda"]) for row in rows] == [
        *(("lars", "None", 1.0, None), ("lars", "autowu", None, None)),
        *(
            ("tvlars", "None", 1.0, 1e-6),
            ("tvlars", "None", 1.0, 0.5),
            ("tvlars", "autowu", None, 1e-6),
            ("tvlars", "autowu", None, 0.5),
        ),
    ]
    assert all(row["steps"] == 5 and 0 <= row["top1"] <= row["top5"] <= 1 for row in rows)
    table = capsys.readouterr().out.split("| optimizer |")[1]
    assert table.count("| TVLARS | None | 256 | 1 |") == 2
    tables = {}
    for folder in (tmp_path / "runs").iterdir():
        tables[tuple(folder.name.split("_")[3:6])] = pq.ParquetFile(folder / "layers.parquet").read()
    lars, slow, fast = (tables[key] for key in (("lars", "None", "1.0"), ("tvlars", "None", "1.0"), ("tvlars", "autowu", "1e-06")))
    for logged in (lars, slow, fast):
        assert logged.column_names == ["step", "layer", "weight_norm", "grad_norm", "trust_ratio", "lr"]
        assert sorted(set(logged["step"].to_pylist())) == [0, 3]
        assert set(logged["layer"].to_pylist()) == {"0.0.weight", "0.3.weight", "0.6.weight", "1.weight"}
    assert set(lars["lr"].to_pylist()) == {1.0}
    # Both begin with the same weights and batch; TVLARS then has 1 / (1 + 1) + gamma_min times the ratio of LARS.
    of_lars, of_tvlars = (logged["trust_ratio"].to_numpy()[:4] for logged in (lars, slow))
    np.testing.assert_allclose(of_tvlars, 0.501 * of_lars, rtol=1e-4)
    medians = [float(np.median(lars["trust_ratio"].to_numpy()[first : first + 4])) for first in range(0, 8, 4)]
    assert [ratio for _, ratio in rows[0]["trust_ratios"]] == pytest.approx(medians, rel=1e-3)
    before = (tmp_path / "rows.jsonl").read_text()
    assert call(tvlars, tmp_path, *command, "--figure", str(tmp_path / "figure.png"))[0] == 0
    assert (tmp_path / "rows.jsonl").read_text() == before  # nothing is run twice
    assert (tmp_path / "figure.png").exists()


def test_barlow_twins_is_trained_and_probed(module, tmp_path, capsys):
    code, (row,) = call(
        module("tvlars"), tmp_path, "--mode", "bt", "--sd", "autowu", *SHORT, "--figure", str(tmp_path / "figure.png")
    )
    assert code == 0
    assert [row[key] for key in ("mode", "opt", "sd", "steps", "projector")] == ["bt", "tvlars", "autowu", 5, "256-256-256"]
    assert all(0.2 < row[f"{kind}_{which}"] <= 1 for kind in ("trained", "random", "pixels") for which in ("all", "few"))
    assert row["pixels_all"] > 0.9
    assert np.isfinite(row["last_loss"])
    assert list((tmp_path / "runs").glob("*/layers.parquet"))
    assert "| TVLARS | autowu | 256 |" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_barlow_twins_trains_on_two_ranks(module, tmp_path):
    options = ("--mode", "bt", "--sd", "autowu", *SHORT, "--out", tmp_path / "rows.jsonl", "--runs", tmp_path / "runs")
    ranks(tmp_path, 2, "experiments/tvlars.py", *options)
    (two,) = rows_of(tmp_path / "rows.jsonl")
    assert two["steps"] == 5
    assert np.isfinite(two["last_loss"])


@pytest.mark.parametrize(
    "names", [("momentum", "adam"), pytest.param(("sgd", "momentum", "adam", "lars"), marks=pytest.mark.slow)], ids=" ".join
)
def test_alexnet_trains_with_several_optimizers_at_several_batch_sizes(module, tmp_path, capsys, names):
    options = (
        "--batch-size",
        "256",
        "512",
        "--epochs",
        "1",
        "--seed",
        "0",
        "--device",
        "cpu",
        "--figure",
        str(tmp_path / "figure.png"),
        *(() if len(names) == 4 else ("--optimizers", *names)),
    )
    code, rows = call(module("alexnet_batches"), tmp_path, *options)
    assert code == 0
    assert {(row["optimizer"], row["schedule"], row["batch_size"]) for row in rows} == set(
        itertools.product(names, ("hand-set", "autowu"), (256, 512))
    )
    assert all(row["seconds_per_epoch"] > 0 and row["top1"] <= row["top5"] for row in rows)
    lrs = {(row["optimizer"], row["batch_size"]): row["lr"] for row in rows if row["schedule"] == "hand-set"}
    assert lrs["momentum", 512] == pytest.approx(2 * lrs["momentum", 256])
    assert lrs["adam", 512] == pytest.approx(2**0.5 * lrs["adam", 256], rel=1e-5)
    assert "| batch 256, 5 steps | batch 512, 2 steps |" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# ---------------------------------------------------------------- images of a root


def write_images(folder, count, seed):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.fixture
def tiny(tmp_path):
    """A root with a folder in Tiny ImageNet's layout, of two classes."""
    root = tmp_path / "root" / "tiny-imagenet-200"
    for label in range(2):
        write_images(root / "train" / f"n0{label}" / "images", 8, label)
    write_images(root / "val" / "images", 4, 9)
    lines = (f"{number}.png\tn0{number % 2}\t0\t0\t9\t9\n" for number in range(4))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root.parent


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A root with CIFAR-10's files as they are unpacked, of ten images each, and without the check of their sums."""
    import torchvision.datasets.cifar as source

    monkeypatch.setattr(source, "check_integrity", lambda *_: True)
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        images = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}))
    return folder.parent


@pytest.mark.parametrize("mode", ["clf", "bt"])
def test_tiny_imagenet_is_found_under_its_root(module, tmp_path, tiny, mode):
    options = ("--mode", mode, "--data-root", str(tiny), "--img-size", "32", "--model", "test_resnet", "--workers", "0")
    short = ("--batch-size", "8", "--epochs", "1", "--device", "cpu", "--projector", "8", "8")
    code, (row,) = call(module("tvlars"), tmp_path, *options, *short)
    assert code == 0
    assert [row["data"], row["model"], row["steps"]] == ["tiny-imagenet-200", "test_resnet", 2]


def test_cifar_is_found_under_its_root(module, cifar):
    images = module("images")
    found = images.open_images(cifar, ALONE, 25, 0, workers=0)
    assert [found.name, found.size, found.data.num_train, found.data.num_classes] == ["cifar10", 32, 50, 10]
    inputs, labels = next(iter(found.loaders().train))
    assert [inputs.shape, labels.shape] == [(25, 3, 32, 32), (25,)]


@pytest.mark.slow
def test_a_root_trains_torchvisions_alexnet(module, tmp_path, tiny):
    options = ("--data-root", str(tiny), "--workers", "0", "--optimizers", "momentum", "--schedules", "hand-set")
    code, (row,) = call(module("alexnet_batches"), tmp_path, *options, "--batch-size", "8", "--epochs", "1", "--seed", "0")
    assert code == 0
    assert [row["steps"], row["img_size"]] == [2, 64]


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("tvlars", ("--data-root", "nowhere"), "--data-root nowhere: no such folder"),
        ("tvlars", ("--batch-size", "2000"), "is more than the 1347 training images"),
        ("alexnet_batches", ("--batch-size", "2000", "--seed", "0"), "is more than the 1347 training images"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(module, tmp_path, capsys, script, options, said):
    code, rows = call(module(script), tmp_path, *options, "--device", "cpu")
    error = capsys.readouterr().err
    assert (code, rows) == (2, [])
    assert said in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- the page


def blocks():
    """The arguments of every command of the page: script, those of its report, and the figure."""
    found = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for words in (shlex.split(command.replace("\\\n", " ")) for command in found):
        assert words[0] == "python"
        assert words[-3:-1] == ["--report", "--figure"]
        yield Path(words[1]).stem, words[2:-2], ROOT / words[-1]


@pytest.mark.parametrize(
    ("script", "arguments", "figure"), list(blocks()), ids=lambda value: value.stem if isinstance(value, Path) else ""
)
def test_the_page_has_the_tables_and_the_figure_of_the_results(module, capsys, script, arguments, figure):
    assert module(script).main(arguments) == 0
    text = PAGE.read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in text
    assert figure.stat().st_size > 10_000
    assert f"]({figure.relative_to(HERE)})" in text


def test_the_features_of_barlow_twins_are_ahead_of_random_ones():
    rows = rows_of(HERE / "results" / "tvlars_bt.jsonl")
    assert {row["opt"] for row in rows} == {"lars", "tvlars"}
    assert len({row["seed"] for row in rows}) >= 3
    for which in ("all", "few"):
        assert min(row[f"trained_{which}"] for row in rows) > max(row[f"random_{which}"] for row in rows)
    assert max(row["seconds"] for row in rows) < 120


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["lars", "tvlars"])
def test_they_are_so_again_on_another_seed(module, tmp_path, opt):
    command = ("--mode", "bt", "--opt", opt, "--sd", "autowu", "--batch-size", "128", "--epochs", "40", "--seed", "7")
    code, (row,) = call(module("tvlars"), tmp_path, *command, "--device", "cpu")
    assert code == 0
    assert row["trained_all"] > row["random_all"]
    assert row["trained_few"] > row["random_few"] + 0.03
