"""The data of train.py: the same order and the same augmentation however a run is split, and every source of images."""

import gzip
import json
import random
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from autowu.training.augment import mixing
from autowu.training.build import build
from autowu.training.config import UsageError, parse_args
from autowu.training.data import Streamed, find_data, make_loaders
from autowu.training.draws import Augmented, Draws, drawing
from autowu.training.loop import train_step
from autowu.training.main import main
from autowu.training.process import Process
from autowu.training.sources import Noise

ALONE = Process(0, 1, torch.device("cpu"))
MODEL_CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
HEAVY = ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5", "--lighting", "0.1"]


def write_images(folder, number, label):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(label)
    for k in range(number):
        pixels = draw.integers(0, 128, (20, 24, 3)) + 127 * label
        Image.fromarray(pixels.astype("uint8")).save(folder / f"{k}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of two classes to train on, 6 to test on."""
    root = tmp_path_factory.mktemp("images")
    for label in range(2):
        write_images(root / "train" / f"class-{label}", 12, label)
        write_images(root / "val" / f"class-{label}", 3, label)
    return root


def configured(path, *options):
    command = ["--data-dir", str(path), "--device", "cpu", "--workers", "0", "--batch-size", "4", "--run-dir", "run"]
    return parse_args([*command, *options])


def loaders_of(config, process=ALONE):
    return make_loaders(config, process, find_data(config, process), 16, MODEL_CONFIG)


def epoch_of(config, process=ALONE, epoch=0):
    """The batches of images that a process has in an epoch."""
    loaders = loaders_of(config, process)
    loaders.sampler.set_epoch(epoch)
    return [images for images, _ in loaders.train]


def as_set(batches):
    return {tuple(image.flatten().tolist()) for batch in batches for image in batch}


# Order and augmentation


@pytest.mark.parametrize("repeats", ["0", "3"])
def test_every_step_has_the_same_augmented_images_on_any_number_of_processes(images, repeats):
    config = configured(images, "--aug-repeats", repeats, *HEAVY, "--batch-size", "8")
    alone = epoch_of(config, epoch=1)
    assert len(alone) == 3
    for processes, size, accum in ((4, 2, 1), (2, 2, 2)):
        split = replace(config, batch_size=size, grad_accum=accum)
        shares = [epoch_of(split, Process(rank, processes, ALONE.device), epoch=1) for rank in range(processes)]
        for step, batch in enumerate(alone):
            assert as_set([batch]) == as_set([share[step] for share in shares])


def test_augmentation_does_not_depend_on_loader_processes_and_differs_by_epoch_and_seed(images):
    config = configured(images, *HEAVY)
    loaders = loaders_of(replace(config, workers=2))
    epochs = []
    for epoch in range(2):  # the same loader processes go on
        loaders.sampler.set_epoch(epoch)
        epochs.append([batch for batch, _ in loaders.train])
        assert all(torch.equal(*pair) for pair in zip(epochs[-1], epoch_of(config, epoch=epoch), strict=True))
    assert not as_set(epochs[0]) & as_set(epochs[1])
    assert not as_set(epochs[0]) & as_set(epoch_of(replace(config, seed=1)))


def test_an_image_is_drawn_as_often_in_a_row_as_is_asked_for():
    draws = Draws(20, ALONE, 5, 3)
    draws.set_epoch(2)
    indices = [draw.image for draw in draws]
    assert len(indices) == len(draws) == 20
    assert sorted(Counter(indices).values()) == [2, 3, 3, 3, 3, 3, 3]
    assert indices[:3] == [indices[0]] * 3
    assert len({draw.place for draw in draws}) == 20  # each augmented in its own way
    halves = [[draw.image for draw in Draws(21, Process(rank, 2, ALONE.device), 5, 1)] for rank in range(2)]
    assert len(halves[0]) == len(halves[1]) == 10
    assert len({*halves[0], *halves[1]}) == 20


def test_random_numbers_of_an_image_leave_those_of_the_process_alone():
    def draws():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    expected = [draws() for _ in range(2)]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    found = [draws()]
    inside = []
    for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (2, 2, 3)):
        with drawing(*key):
            inside.append(draws())
    found.append(draws())
    assert found == expected
    assert inside[0] == inside[1]
    assert len(set(inside)) == 3


# Mixing


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_batches_are_mixed_with_their_labels_each_on_its_own(mode):
    config = parse_args(["--mixup", "0.8", "--cutmix", "1", "--mixup-mode", mode, "--label-smoothing", "0.1", "--batch-size", "4"])
    plain = [(torch.full((3, 8, 8), float(k)), k % 2) for k in range(8)]
    augmented = Augmented(plain, mixing(config, 2), config.batch_size)
    draws = list(Draws(8, ALONE, 0))
    images, labels = augmented.__getitems__(draws)
    assert images.shape == (8, 3, 8, 8)
    assert labels.shape == (8, 2)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    again, _ = Augmented(plain, mixing(config, 2), config.batch_size).__getitems__(draws)
    assert torch.equal(images, again)
    # With the partner from the other end of its own batch of four, and no other.
    for first in (0, 4):
        values = [draw.image for draw in draws[first : first + 4]]
        for k in range(4):
            pair = sorted((values[k], values[3 - k]))
            assert pair[0] <= images[first + k].min()
            assert images[first + k].max() <= pair[1]


def test_mixed_labels_are_smoothed_once(images):
    config = configured(images, "--mixup", "0.8", "--label-smoothing", "0.1", "--img-size", "32", "--model", "test_vit")
    parts, loaders = build(config, ALONE, find_data(config, ALONE))
    batch, labels = next(iter(loaders.train))
    expected = -(parts.model(batch).log_softmax(1) * labels).sum(1).mean()
    assert train_step(parts, batch, labels).item() == pytest.approx(expected.item(), rel=1e-5)


# Sources


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    "options",
    [
        ["--dataset", "synthetic", "--img-size", "16", "--batch-size", "32", "--num-classes", "7"],
        ["--mixup", "0.5", "--cutmix", "1", "--global-batch-size", "336", "--grad-accum", "2"],
    ],
    ids=["noise", "mixed digits"],
)
def test_a_run_on_data_in_memory(tmp_path, monkeypatch, options):
    monkeypatch.setattr(Noise, "NUM_TRAIN", 64)
    monkeypatch.setattr(Noise, "NUM_TEST", 16)
    command = ["--device", "cpu", "--epochs", "1", "--model", "test_vit", "--max-warmup-fraction", "0.5", *options]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["total_steps"] == {7: 2, None: 4}[parse_args(options).num_classes]
    assert summary["batch_size"] in (32, 336)


def write_mnist(root):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in (("train", 12), ("t10k", 6)):
        pixels = np.random.default_rng(0).integers(0, 255, (number, 28, 28)).astype("uint8")
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, number, 28, 28) + pixels.tobytes())
        labels = (np.arange(number) % 10).astype("uint8")
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, number) + labels.tobytes())
        for name in ("images-idx3", "labels-idx1"):
            path = folder / f"{part}-{name}-ubyte"
            path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))


def test_a_dataset_of_timms_is_trained_on_by_its_name(tmp_path):
    write_mnist(tmp_path)
    config = configured(tmp_path, "--dataset", "torch/mnist", "--model", "test_vit", "--num-classes", "12")
    data = find_data(config, ALONE)
    assert (data.num_classes, data.channels, data.num_train) == (12, 3, 12)
    parts, loaders = build(config, ALONE, data)
    batch, labels = next(iter(loaders.train))
    assert batch.shape == (4, 3, 32, 32)
    assert train_step(parts, batch, labels).isfinite()
    assert len(loaders.test.dataset) == 6
    with pytest.raises(UsageError, match="--num-classes 9: the data have 10"):
        find_data(replace(config, num_classes=9), ALONE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "torch/cifar10", "--data-dir", "EMPTY"], "--dataset-download fetches"),
        (["--dataset", "torch/cifar10"], "needs --data-dir"),
        (["--dataset", "torch/nonsense", "--data-dir", "EMPTY"], "Unknown torchvision dataset nonsense"),
        (["--dataset", "hfds/nonsense"], "--dataset hfds/nonsense: cannot be opened"),
        (["--dataset", "synthetics"], "did you mean synthetic"),
        (["--dataset", "synthetic", "--data-dir", "EMPTY"], "goes with --dataset folder"),
        (["--dataset-download"], "--dataset-download: goes with a dataset of timm's"),
        (["--mixup", "0.8", "--batch-size", "63"], "--batch-size 63: must be even with --mixup or --cutmix"),
        (["--mixup-mode", "elements"], "--mixup-mode elements: not known"),
        (["--mixup", "-1"], "--mixup -1.0: must be at least 0"),
        (["--mixup-prob", "1.5"], "--mixup-prob 1.5: must be at most 1"),
        (["--scale", "0.5", "0.1"], "--scale 0.5 0.1: must be above 0, in ascending order"),
        (["--remode", "noise"], "--remode noise: not known"),
        (["--num-classes", "3"], "--num-classes 3: the data have 10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    assert main([*options, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(Path("EMPTY").iterdir())
    assert not Path("runs").exists()


def test_tiny_imagenet_lies_in_its_own_layout(tmp_path):
    for label in range(2):
        write_images(tmp_path / "train" / f"n0{label}" / "images", 4, label)
    write_images(tmp_path / "val" / "images", 4, 0)
    names = ["n01", "n00", "n01", "n01"]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(f"{k}.png\t{name}\t0\t0\t9\t9\n" for k, name in enumerate(names)))
    config = configured(tmp_path)
    assert (find_data(config, ALONE).num_classes, find_data(config, ALONE).num_train) == (2, 8)
    _, labels = next(iter(loaders_of(config).test))
    assert labels.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"0.png\tn00\n1.png\n", "val_annotations.txt: no tab and class after '1.png'"),
        (b"0.png n00 0 0\n", "val_annotations.txt: no tab and class after '0.png n00 0 0'"),
        (b"\xff\xfe0\0.\0p\0n\0g\0", "'utf-8' codec can't decode"),
        (b"", "do not have the same classes"),
    ],
    ids=["cut", "spaces", "bytes", "empty"],
)
def test_annotations_that_are_none_are_said(tmp_path, text, said):
    write_images(tmp_path / "train" / "n00", 1, 0)
    write_images(tmp_path / "val" / "images", 1, 0)
    (tmp_path / "val" / "val_annotations.txt").write_bytes(text)
    with pytest.raises(UsageError, match=f"--data-dir .*: .*{re.escape(said)}"):
        find_data(configured(tmp_path), ALONE)


class Numbers(IterableDataset):
    """A stream of ten numbers that begins elsewhere in every epoch."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(100 * self.epoch, 100 * self.epoch + 10))


def test_a_stream_gives_as_many_steps_as_were_counted_and_is_told_the_epoch():
    stream = Numbers()
    loader = Streamed(DataLoader(stream, 4, drop_last=True), stream, 0, 3)
    loader.set_epoch(1)
    assert len(loader) == 3
    assert [batch.tolist() for batch in loader] == [[100, 101, 102, 103], [104, 105, 106, 107], [100, 101, 102, 103]]
