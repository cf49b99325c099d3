"""Recipes and configurations: what overrides what, and that each recipe trains to the end."""

import csv
import json
import re
import shlex
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import ROOT, ranks

from autowu.training.augment import Lighting, transforms
from autowu.training.config import UsageError, parse_args
from autowu.training.main import main
from autowu.training.optimizers import build_optimizer, build_scheduler
from autowu.training.options import RECIPES as FOUND
from autowu.training.recipes import read_recipe

RECIPES = ["efficientnet_b0-imagenet", "resnet50-imagenet", "resnet50-lars", "vit_small-imagenet"]
TINY = ["--model", "test_resnet", "--img-size", "32", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Some images of two classes in ImageNet's layout: bright ones and dark ones."""
    root, draw = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for label in range(2):
            folder = root / part / f"class-{label}"
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(128 * label, 128 * label + 128, (40, 48, 3))
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{k}.png")
    return root


def fields(*options):
    return asdict(parse_args(options)) | {"run_dir": None}


def losses(path):
    with (path / "metrics.csv").open(newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


# Each recipe


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(("recipe", "options"), [*((recipe, []) for recipe in RECIPES), ("resnet50-lars", ["--sched", "poly"])])
def test_a_recipe_trains_to_the_end_and_its_configuration_does_so_again(tmp_path, small_folder, recipe, options):
    command = ["--recipe", recipe, "--data-dir", str(small_folder), *TINY, *options]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    for name, value in read_recipe(recipe).items():
        given = {"model": "test_resnet", "epochs": 1, "batch_size": 4} | ({"sched": "poly"} if options else {})
        assert saved[name] == given.get(name, value)
    if recipe == "resnet50-imagenet":
        assert main(["--config", str(tmp_path / "run" / "config.json"), "--run-dir", str(tmp_path / "again")]) == 0
        assert losses(tmp_path / "again") == losses(tmp_path / "run")
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved | {"run_dir": str(tmp_path / "again")}


def test_the_recipes_are_those_that_are_told_of(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = re.sub(r"-\s+", "-", capsys.readouterr().out) + (ROOT / "docs" / "train.md").read_text()
    assert all(text.count(recipe) >= 2 for recipe in RECIPES)
    assert FOUND == RECIPES
    for recipe in RECIPES:
        config = parse_args(["--recipe", recipe, "--data-dir", "images"])
        assert {name: getattr(config, name) for name in read_recipe(recipe)} == read_recipe(recipe)


@pytest.mark.usefixtures("blank_figures")
def test_the_published_command_runs_in_two_processes(tmp_path, small_folder):
    options = ["--data-root", small_folder, "--amp", "--batch-size", "4", "--model", "test_efficientnet"]
    options += ["--epochs", "1", "--img-size", "32", "--device", "cpu", "--workers", "0", "--run-dir", tmp_path / "run"]
    ranks(tmp_path, 2, "train.py", "--local-rank=0", *options)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["recipe"], saved["opt"], saved["world_size"], saved["amp"]) == ("resnet50-imagenet", "adamp", 2, True)
    assert len(losses(tmp_path / "run")) == 32 // (2 * 4)


@pytest.mark.parametrize(
    ("options", "recipe", "model"),
    [
        ([], "resnet50-imagenet", "resnet50"),
        (["--model", "efficientnet_b0"], "efficientnet_b0-imagenet", "efficientnet_b0"),
        (["--model", "resnet101"], "resnet50-imagenet", "resnet101"),
        (["--recipe", "resnet50-lars"], "resnet50-lars", "resnet50"),
    ],
)
def test_a_data_root_is_the_published_recipe(options, recipe, model):
    config = parse_args(["--data-root", "/data", "--amp", "--batch-size", "256", *options])
    assert (config.recipe, config.model, config.batch_size, config.amp) == (recipe, model, 256, True)
    assert (config.dataset, str(config.data_dir)) == ("folder", "/data")


@pytest.mark.parametrize("page", ["README.md", "docs/train.md", "docs/several-machines.md"])
def test_every_command_of_the_docs_is_one(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    commands = re.findall(r"^.*\btrain\.py\b([^&\n]*)", blocks, re.MULTILINE)
    assert commands
    for command in commands:
        for rank in ([], ["--local-rank=0"], ["--local_rank=0"]):  # as torch.distributed.launch of today, and of before, passes it
            parse_args([*rank, *shlex.split(command)])


def test_the_published_optimizer_has_its_numbers():
    config = parse_args(["--recipe", "resnet50-imagenet", "--data-dir", "images"])
    (groups, _) = build_optimizer(config, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))).param_groups, 0
    for group in groups:
        assert (group["delta"], group["wd_ratio"], group["nesterov"]) == (0.1, 0.1, False)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]


# What overrides what


def test_every_field_of_a_recipe_is_overridden_by_its_option():
    other = {"model": "vgg11", "opt": "sgd", "sched": "cosine", "opt_kwargs": {"delta": 0.2}, "sync_bn": False}
    other |= dict.fromkeys(
        ("weight_decay", "momentum", "label_smoothing", "lr", "color_jitter", "lighting", "reprob", "mixup", "cutmix"), 0.5
    )
    other |= {"epochs": 7, "batch_size": 7, "warmup_epochs": 7.0, "auto_augment": "none"}
    for recipe in RECIPES:
        for name, value in read_recipe(recipe).items():
            assert other[name] != value
            option = f"--{name.replace('_', '-')}"
            given = {"opt_kwargs": ["--opt-kwargs", "delta=0.2"], "sync_bn": ["--no-sync-bn"]}.get(name, [option, str(other[name])])
            assert getattr(parse_args(["--recipe", recipe, *given]), name) == other[name]


def test_an_option_is_over_the_file_which_is_over_the_recipe(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("recipe: resnet50-lars\nepochs: 10\nweight-decay: 1e-3\ncooldown_fraction: 0.3\namp: true\nlr: null\n")
    config = parse_args(["--config", str(path), "--epochs", "5"])
    assert (config.recipe, config.momentum, config.epochs, config.weight_decay) == ("resnet50-lars", 0.929, 5, 1e-3)
    assert (config.cooldown_fraction, config.amp, config.lr) == (0.3, True, None)
    assert parse_args(["--config", str(path), "--no-amp", "--recipe", "resnet50-imagenet"]).amp is False
    assert parse_args(["--config", str(path), "--recipe", "resnet50-imagenet"]).opt == "adamp"


def test_what_belongs_to_an_optimizer_model_or_schedule_goes_with_it():
    recipe = ["--recipe", "resnet50-imagenet"]
    assert parse_args([*recipe, "--opt", "adamp"]).opt_kwargs["delta"] == 0.1
    assert parse_args([*recipe, "--opt", "lamb"]).opt_kwargs is None
    assert parse_args([*recipe, "--opt", "lamb", "--opt-kwargs", "clip=10", "x=a"]).opt_kwargs == {"clip": 10, "x": "a"}
    assert parse_args([*recipe, "--sched", "cosine"]).sched == "cosine"


@pytest.mark.parametrize("name", ["several", "one"])
def test_a_saved_configuration_is_the_same_when_it_is_read(tmp_path, name):
    options = ["--data-dir", "a b", "--opt-kwargs", "betas=(0.9,0.99)", "--scale", "0.2", "1", "--amp", "--device", "cpu"]
    options += ["--cooldown-fraction", *(["0.3"] if name == "one" else ["0.1", "0.3"]), "--no-aug", "--max-lr", "2", "--seed", "3"]
    saved = {k: v if v is None or isinstance(v, (bool, int, float, list, dict)) else str(v) for k, v in fields(*options).items()}
    for file, text in (("config.json", json.dumps(saved)), ("config.yaml", yaml.safe_dump(json.loads(json.dumps(saved))))):
        (tmp_path / file).write_text(text)
        read = parse_args(["--config", str(tmp_path / file)])
        assert json.loads(json.dumps(asdict(read), default=str)) | {"run_dir": None} == json.loads(json.dumps(saved))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3", "epoch: not known; did you mean epochs"),
        ("epochs: many", "argument --epochs: invalid int value: 'many'"),
        ("epochs: 2.5", "argument --epochs: invalid int value: '2.5'"),
        ("amp: 3", "--amp"),
        ("opt_kwargs: 3", "must be KEY=VALUE"),
        ("[1, 2]", "must be options and their values, not a list"),
        ("", "must be options and their values, not a NoneType"),
        ("epochs: [", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
        ("label_smoothing: 2", "--label-smoothing 2.0: must be at most 1"),
        ("recipe: resnet50-lar", "--recipe resnet50-lar: not known; did you mean resnet50-lars"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_is_said_in_one_line(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "own.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# Batches


@pytest.mark.parametrize(
    ("processes", "options", "split"),
    [
        (1, [], (64, 1)),
        (4, ["--batch-size", "256"], (256, 1)),
        (4, ["-b", "8", "--grad-accum", "3"], (8, 3)),
        (4, ["--global-batch-size", "1024"], (256, 1)),
        (4, ["--global-batch-size", "1024", "--grad-accum", "8"], (32, 8)),
        (4, ["--global-batch-size", "1024", "--batch-size", "64"], (64, 4)),
        (2, ["--global-batch-size", "12", "--batch-size", "2", "--grad-accum", "3"], (2, 3)),
        (8, ["--recipe", "resnet50-lars", "--global-batch-size", "32768"], (4096, 1)),
        (8, ["--recipe", "resnet50-lars", "--global-batch-size", "32768", "--batch-size", "256"], (256, 16)),
        (3, ["--global-batch-size", "1024"], "3 processes; it must be a multiple of 3"),
        (2, ["--global-batch-size", "10", "--grad-accum", "3"], "2 processes x --grad-accum 3; it must be a multiple of 6"),
        (2, ["--global-batch-size", "8", "--batch-size", "8"], "2 processes x --batch-size 8; it must be a multiple of 16"),
        (1, ["--global-batch-size", "8", "--batch-size", "2", "--grad-accum", "2"], "which is 4; leave one of the three out"),
        (1, ["--global-batch-size", "0"], "--global-batch-size 0: must be at least 1"),
        (1, ["--grad-accum", "0"], "--grad-accum 0: must be at least 1"),
    ],
)
def test_a_step_is_split_over_processes_and_accumulation(monkeypatch, processes, options, split):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if isinstance(split, str):
        with pytest.raises(UsageError) as error:
            parse_args(options)
        assert split in str(error.value)
    else:
        config = parse_args(options)
        assert (config.batch_size, config.grad_accum) == split
        assert config.global_batch_size in (None, config.step_size * processes)


def test_a_configuration_keeps_its_global_batch_on_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    saved = fields("--global-batch-size", "96", "--grad-accum", "3") | {"world_size": 4}
    assert saved["batch_size"] == 8
    path = tmp_path / "config.json"
    path.write_text(json.dumps(saved))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_args(["--config", str(path)]).step_size * 2 == 96
    config = parse_args(["--config", str(path), "--batch-size", "4"])
    assert (config.batch_size, config.grad_accum) == (4, 12)
    config = parse_args(["--config", str(path), "--batch-size", "4", "--grad-accum", "1"])
    assert (config.step_size, config.global_batch_size) == (4, None)


# Schedule


@pytest.mark.parametrize("sched", ["cosine", "poly"])
def test_a_hand_set_schedule_warms_up_and_decays_to_0(sched):
    options = ["--sched", sched, "--lr", "2", "--warmup-epochs", "2", "--epochs", "10", "--opt", "momentum"]
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(config := parse_args(options), model)
    scheduler = build_scheduler(config, model, optimizer, 5)
    lrs = []
    for _ in range(50):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert lrs[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    half = {"cosine": 1.0, "poly": 0.5}[sched]
    assert lrs[10] == 2
    assert lrs[30] == pytest.approx(half)
    assert lrs[49] < 0.01


# Images


def test_lighting_shifts_each_colour_of_an_image_as_imagenets_vary():
    torch.manual_seed(0)
    image = torch.zeros(3, 2, 2)
    shifts = torch.stack([Lighting(0.1)(image) for _ in range(4000)])
    assert torch.equal(shifts, shifts[:, :, :1, :1].expand_as(shifts))
    components, variances = torch.tensor(Lighting.COMPONENTS), torch.tensor(Lighting.VARIANCES)
    expected = 0.1**2 * components @ torch.diag(variances**2) @ components.T
    torch.testing.assert_close(torch.cov(shifts[:, :, 0, 0].T), expected, rtol=0.1, atol=2e-6)


def test_lighting_comes_before_normalisation():
    model_config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    names = []
    for options in ([], ["--lighting", "0.1", "--reprob", "0.5", "--aa", "rand-m9-mstd0.5-inc1"]):
        train, test = transforms(parse_args(options), 32, model_config)
        names.append([type(step).__name__ for step in train.transforms])
        assert "Lighting" not in [type(step).__name__ for step in test.transforms]
    assert "ColorJitter" in names[0]
    assert names[1][names[1].index("Lighting") + 1 :] == ["Normalize", "RandomErasing"]
    assert "RandAugment" in names[1]
    with pytest.raises(UsageError, match="--auto-augment nonsense: not known"):
        transforms(parse_args(["--aa", "nonsense"]), 32, model_config)
