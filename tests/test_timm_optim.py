"""The optimizers in timm's factory: built by timm, on timm's models and groups, and as timm's script parses its options."""

import argparse
import logging
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from processes import ROOT, Forked
from sklearn.datasets import load_digits
from timm.optim import Lamb, Lars, create_optimizer, create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.utils import ParseKwargs

from autowu.integrations.timm import register_optimizers
from autowu.optim import LAMB, LARS, TVLARS, param_groups

OURS = {"lars": LARS, "lamb": LAMB, "tvlars": TVLARS}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A copy of timm's registry, put back afterwards."""
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    return default_registry


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=16, num_classes=10, in_chans=1)


DIGITS = load_digits()
IMAGES = torch.nn.functional.interpolate(torch.tensor(DIGITS.images, dtype=torch.float32)[:64, None] / 16, size=(16, 16))
LABELS = torch.tensor(DIGITS.target)[:64]


def loss_of(model):
    return torch.nn.functional.cross_entropy(model(IMAGES), LABELS)


def backward(model):
    model.zero_grad()
    loss_of(model).backward()


def test_nothing_is_registered_unless_asked_for(tmp_path):
    code = """
import autowu.integrations.timm
from timm.optim import Lars, create_optimizer_v2, list_optimizers
import torch
assert type(create_optimizer_v2(torch.nn.Linear(1, 1), "lars")) is Lars
assert "tvlars" not in list_optimizers()
"""
    asked = Forked(tmp_path, "-c", code)
    assert asked.end() == 0, asked.stderr


@pytest.mark.parametrize("name", OURS)
def test_timm_builds_ours_and_it_learns(name):
    register_optimizers()
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    lr = {"lars": 1.0, "lamb": 0.01, "tvlars": 1.0}[name]
    optimizer = create_optimizer_v2(model, opt=name, lr=lr, weight_decay=1e-4, momentum=0.8)
    assert type(optimizer) is OURS[name]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 1e-4]
    assert [g["adapt"] for g in optimizer.param_groups] == [False, True]
    assert [g["lr"] for g in optimizer.param_groups] == [lr, lr]
    assert [g.get("momentum", 0.8) for g in optimizer.param_groups] == [0.8, 0.8]
    first = loss_of(model).item()
    for _ in range(15):
        backward(model)
        optimizer.step()
    assert loss_of(model).item() < first - 1.5
    assert len(optimizer.layer_stats()) == len(optimizer.param_groups[1]["params"])


def test_the_steps_of_lars_are_those_that_timm_takes(model):
    start = {name: p.detach().clone() for name, p in model.state_dict().items()}
    weights = []
    for optimizer_class in (Lars, LARS):
        if optimizer_class is LARS:
            register_optimizers()
        model.load_state_dict(start)
        optimizer = create_optimizer_v2(model, opt="lars", lr=0.1, weight_decay=1e-2, trust_coeff=0.02, nesterov=True)
        assert type(optimizer) is optimizer_class
        for _ in range(3):
            backward(model)
            optimizer.step()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, theirs in weights[0].items():
        torch.testing.assert_close(weights[1][name], theirs, rtol=1e-4, atol=1e-6)
    assert not torch.equal(theirs, start[name])


def test_timms_own_stay_under_names_of_their_own(model, caplog):
    before = set(list_optimizers())
    register_optimizers()
    assert set(list_optimizers()) == before | {"tvlars", "timmlars", "timmlamb"}
    assert type(create_optimizer_v2(model, opt="timmlars", weight_decay=1e-4)) is Lars
    assert type(create_optimizer_v2(model, opt="timmlamb", weight_decay=1e-4)) is Lamb
    for name in ("larc", "nlars", "nlarc", "lambc"):
        assert type(create_optimizer_v2(model, opt=name, weight_decay=1e-4)) in (Lars, Lamb)
    assert [r.getMessage() for r in caplog.records] == [f"Optimizer {n} already registered, overwriting" for n in ("lars", "lamb")]


def test_registering_twice_is_registering_once(model, caplog):
    register_optimizers()
    names = list_optimizers()
    caplog.clear()
    register_optimizers()
    assert not caplog.records
    assert list_optimizers() == names
    assert type(create_optimizer_v2(model, opt="timmlars", weight_decay=1e-4)) is Lars


@pytest.mark.parametrize("name", OURS)
def test_lookahead_goes_around_ours(model, name):
    register_optimizers()
    optimizer = create_optimizer_v2(model, opt=f"lookahead_{name}", lr=0.01, weight_decay=1e-4)
    assert type(optimizer._base_optimizer) is OURS[name]
    first = loss_of(model).item()
    for _ in range(6):
        backward(model)
        optimizer.step()
    assert loss_of(model).item() != first


@pytest.mark.parametrize("name", OURS)
def test_without_weight_decay_nothing_is_adapted_as_with_timm(model, name, caplog):
    register_optimizers()
    caplog.clear()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.1)
    assert [g["adapt"] for g in optimizer.param_groups] == [False]
    assert f"{name}: no parameter group has weight decay" in caplog.text
    caplog.clear()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.1, always_adapt=True)
    assert [g["adapt"] for g in optimizer.param_groups] == [True]
    assert not caplog.records


@pytest.mark.parametrize("name", OURS)
def test_groups_that_say_what_is_adapted_are_believed(model, name):
    register_optimizers()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.1, param_group_fn=param_groups)
    assert [(g["adapt"], g["weight_decay"]) for g in optimizer.param_groups] == [(True, 0.0), (False, 0.0)]
    backward(model)
    optimizer.step()
    assert [layer.name for layer in optimizer.layer_stats()] == optimizer.param_groups[0]["param_names"]


def test_parameters_without_groups_are_one_group(model):
    register_optimizers()
    optimizer = create_optimizer_v2(model.parameters(), opt="lars", lr=0.1, weight_decay=1e-4)
    assert [(g["adapt"], len(g["params"])) for g in optimizer.param_groups] == [(True, len(list(model.parameters())))]


def test_the_groups_that_were_passed_stay_as_they_were(model):
    register_optimizers()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    create_optimizer_v2(groups, opt="lamb", lr=0.1)
    assert set(groups[0]) == {"params", "weight_decay"}


def test_layer_decay_keeps_its_scales(model):
    register_optimizers()
    optimizer = create_optimizer_v2(model, opt="lamb", lr=0.1, weight_decay=1e-4, layer_decay=0.5)
    assert len({g["lr_scale"] for g in optimizer.param_groups}) > 2
    assert all(g["adapt"] == (g["weight_decay"] != 0) for g in optimizer.param_groups)
    assert {g["adapt"] for g in optimizer.param_groups} == {True, False}


def test_options_of_timms_script_reach_ours(model):
    parser = argparse.ArgumentParser()
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    arguments = {"lr": 0.1, "weight_decay": 1e-4, "momentum": 0.7, "opt_eps": 1e-5, "opt_foreach": True}
    register_optimizers()
    for opt, option, key, value in (
        ("lars", "trust_coef=0.02", "trust_coef", 0.02),
        ("lars", "nesterov=True", "nesterov", True),
        ("lamb", "max_trust_ratio=5.0", "max_trust_ratio", 5.0),
        ("tvlars", "gamma_min=0.5", "gamma_min", 0.5),
    ):
        opt_args = parser.parse_args(["--opt-kwargs", option]).opt_kwargs
        optimizer = create_optimizer(SimpleNamespace(opt=opt, opt_args=opt_args, **arguments), model)
        assert optimizer.param_groups[0][key] == value
        assert (optimizer.eps if opt != "lamb" else optimizer.param_groups[0]["eps"]) == 1e-5
        assert optimizer.param_groups[0]["foreach"] is True


@pytest.mark.parametrize(("opt", "option"), [("lars", "trust_clip"), ("lamb", "max_grad_norm"), ("lamb", "decoupled_decay")])
def test_an_option_that_only_timms_has_is_refused(model, opt, option):
    register_optimizers()
    with pytest.raises(TypeError, match=option):
        create_optimizer_v2(model, opt=opt, weight_decay=1e-4, **{option: 1})


def test_the_blocks_of_the_page_run(monkeypatch, caplog):
    page = (ROOT / "docs" / "timm.md").read_text().split("## LARS, LAMB and TVLARS under timm's names")[1]
    blocks = re.findall(r"```python3\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    names = {"model": timm.create_model("test_resnet")}
    with caplog.at_level(logging.INFO, "autowu"):
        for block in blocks:
            exec(block, names)
    assert type(names["optimizer"]) is LAMB
    assert [g["adapt"] for g in names["optimizer"].param_groups] == [True, False]
