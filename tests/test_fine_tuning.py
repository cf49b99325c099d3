"""Fine-tuning with train.py: weights from a file, frozen modules, layer decay, and the LR that is found beside hand-set ones."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_training import ALONE, configured, made
from timm.optim import param_groups_layer_decay

from autowu.training.build import build_parts
from autowu.training.config import UsageError, parse_args
from autowu.training.data import Data, find_data
from autowu.training.evaluation import evaluate
from autowu.training.loop import train_step
from autowu.training.main import main
from autowu.training.models import build_model
from autowu.training.pretrained import freeze, load_weights

DIGITS = Data(num_classes=10, channels=1, num_train=1347, small=True)


def model_of(classes, name="test_resnet"):
    torch.manual_seed(classes)
    return timm.create_model(name, num_classes=classes, in_chans=1)


# Weights from a file


@pytest.mark.parametrize("form", ["weights.safetensors", "weights.pt", "run.pt", "average.pt", "timm.pt"])
def test_weights_of_any_form_are_taken_and_a_head_of_other_classes_is_new(tmp_path, form):
    model, other = model_of(5), model_of(4)
    path, weights = tmp_path / form, model.state_dict()
    if form.endswith(".safetensors"):
        save_file(weights, path)
    else:
        kept = {
            "weights": weights,
            "run": {"epoch": 3, "model": weights, "optimizer": {}},
            "average": {"model": other.state_dict(), "ema": weights},
            "timm": {"arch": "x", "state_dict": {f"module.{name}": value for name, value in weights.items()}},
        }
        torch.save(kept[path.stem], path)
    same, fewer = model_of(5), model_of(3)
    with torch.no_grad():
        same.fc.weight.zero_()
    head = fewer.fc.weight.clone()
    for one in (same, fewer):
        load_weights(one, path)
        for name, value in one.state_dict().items():
            if not name.startswith("fc."):
                assert torch.equal(value, weights[name])
    assert torch.equal(same.fc.weight, model.fc.weight)
    assert torch.equal(fewer.fc.weight, head)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(pickle.dumps(Malicious())), "it holds more than weights"),
        (lambda path: torch.save({"model": Malicious()}, path), "it holds more than weights"),
        (lambda path: torch.save(model_of(5, "test_efficientnet").state_dict(), path), "has not the weights of this model"),
        (lambda path: torch.save({**model_of(5).state_dict(), "more": torch.zeros(1)}, path), "more is none of it"),
        (lambda path: torch.save(timm.create_model("test_resnet").state_dict(), path), "conv1.0.weight is missing or of another"),
        (lambda path: torch.save([1], path), "holds no weights by their names"),
        (lambda path: torch.save({}, path), "holds no weights by their names"),
        (lambda path: torch.save({"a": 3}, path), "holds no weights by their names"),
        (lambda path: path.write_bytes(b"no weights"), "cannot be read"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_file_of_weights_is_said_in_one_line(tmp_path, monkeypatch, capsys, write, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights.pt")
    assert main(["--initial-checkpoint", "weights.pt", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("touched").exists()
    assert not Path("runs").exists()


def test_weights_come_from_one_place():
    with pytest.raises(UsageError, match="does not go with --pretrained"):
        parse_args(["--pretrained", "--initial-checkpoint", "x.pt"])


def test_timms_own_weights_are_taken_and_fetched_by_the_hub_alone(tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "timms.pt")
    options = ["--pretrained", "--model-kwargs", f"pretrained_cfg_overlay={{'file': '{tmp_path / 'timms.pt'}'}}"]
    found = build_model(parse_args(options), DIGITS).module
    weights = torch.load(tmp_path / "timms.pt")
    assert torch.equal(found.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    assert found.fc.weight.shape[0] == 10
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for model, said in (("test_resnet", "--model test_resnet: cannot be built"), ("resnet10t_", "not known")):
        assert main(["--pretrained", "--model", model, "--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


# Freezing


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_frozen_backbone_does_not_change_and_its_classifier_does(tmp_path, name):
    config = configured(tmp_path, "--model", name, "--freeze", "backbone", "--opt", "adamw")
    model = build_model(config, DIGITS).module
    parts = build_parts(config, ALONE, model, 10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_step(parts, torch.randn(4, 1, 32, 32), torch.arange(4))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    head = model.pretrained_cfg["classifier"]
    assert changed == {f"{head}.weight", f"{head}.bias"}


def test_named_modules_are_frozen_and_unknown_ones_refused():
    model = model_of(10)
    freeze(model, ["conv1", "layer1"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(("conv1.", "layer1.")))
    with pytest.raises(UsageError, match="--freeze layer9: not known; did you mean layer"):
        freeze(model, ["layer9"])
    with pytest.raises(UsageError, match="--freeze backbone fc: leaves nothing to train"):
        freeze(model, ["backbone", "fc"])


# Layer decay


@pytest.mark.parametrize("opt", ["adamw", "lars", "lamb"])
def test_the_lrs_of_the_layers_are_timms_shares_and_autowu_keeps_them(tmp_path, opt):
    config = configured(tmp_path, "--layer-decay", "0.5", "--opt", opt)
    model = model_of(10)
    scales = {
        parameter: group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5) for parameter in group["params"]
    }
    parts = build_parts(config, ALONE, model, 10)
    for _ in range(3):
        assert len({group["lr"] for group in parts.optimizer.param_groups}) > 2
        for group in parts.optimizer.param_groups:
            for parameter in group["params"]:
                assert group["lr"] == pytest.approx(parts.lr * scales[parameter])
        parts.step_scheduler(train_step(parts, torch.randn(4, 1, 32, 32), torch.arange(4)))
    assert sum(len(group["params"]) for group in parts.optimizer.param_groups) == len(scales)
    assert {group["weight_decay"] for group in parts.optimizer.param_groups} == {0.0, 5e-4}
    with pytest.raises(UsageError, match=r"--layer-decay 0\.0: must be above 0"):
        parse_args(["--layer-decay", "0"])


# Beside hand-set LRs


def test_from_pretrained_weights_the_lr_that_is_found_does_as_well_as_the_best_that_is_set_by_hand(tmp_path):
    options = ["--opt", "adamw", "--epochs", "16"]
    first, loaders = made(configured(tmp_path, *options, "--sched", "cosine", "--lr", "0.01"))
    for _ in range(8):  # on the digits 0 to 4 alone
        for images, labels in loaders.train:
            train_step(first, images[labels < 5], labels[labels < 5])

    def accuracy(*sched):
        parts, loaders = made(configured(tmp_path, *options, *sched))
        parts.model.load_state_dict(first.model.state_dict())
        for epoch in range(16):
            loaders.sampler.set_epoch(epoch)
            for images, labels in loaders.train:
                parts.step_scheduler(train_step(parts, images, labels))
        return evaluate(parts, loaders.test, ALONE)[1]

    by_hand = [accuracy("--sched", "cosine", "--lr", lr) for lr in ("1e-4", "1e-2")]
    assert max(by_hand) > min(by_hand) + 0.3
    assert accuracy() > max(by_hand) - 0.02


def test_a_run_from_its_own_checkpoint_begins_where_that_ended(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"model": model_of(10).state_dict()}, path)
    config = configured(tmp_path, "--initial-checkpoint", str(path))
    found = build_model(config, find_data(config, ALONE)).module
    assert torch.equal(found.fc.weight, model_of(10).fc.weight)
