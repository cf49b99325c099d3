"""A step of train.py under every option of precision and speed: clipping, float16, the average of the weights, memory format."""

import copy
from dataclasses import replace

import pytest
import torch
from test_training import ALONE, assert_same_weights, configured, looped, made
from torch import nn

from autowu.training.build import allow_tf32
from autowu.training.checkpoints import read_checkpoint
from autowu.training.evaluation import evaluate
from autowu.training.loop import train_step
from autowu.training.main import main
from autowu.training.progress import Progress

PLAIN = ["--opt", "momentum", "--momentum", "0", "--weight-decay", "0", "--sched", "cosine", "--lr", "0.1"]


def change(parts, loaders):
    """What a step of SGD changes, over its LR: the gradients as they were clipped."""
    before, lr = [p.detach().clone() for p in parts.model.parameters()], parts.lr
    train_step(parts, *next(iter(loaders.train)))
    return [(old - new).detach() / lr for old, new in zip(before, parts.model.parameters(), strict=True)]


def norm(grads):
    return torch.cat([grad.flatten() for grad in grads]).norm()


def test_gradients_are_clipped_by_norm_value_or_adaptively(tmp_path):
    whole = change(*made(configured(tmp_path, *PLAIN)))
    changes = {}
    for mode in ("norm", "value", "agc"):
        changes[mode] = change(*made(configured(tmp_path, *PLAIN, "--clip-grad", "0.01", "--clip-mode", mode)))
    assert norm(whole) > 0.1
    assert norm(changes["norm"]) == pytest.approx(0.01, rel=1e-2)
    for grad, clipped in zip(whole, changes["value"], strict=True):
        torch.testing.assert_close(clipped, grad.clamp(-0.01, 0.01), rtol=1e-3, atol=1e-5)
    assert norm(changes["agc"][:-2]) < norm(whole[:-2]) / 2
    for grad, clipped in zip(whole[-2:], changes["agc"][-2:], strict=True):  # the classifier
        torch.testing.assert_close(clipped, grad, rtol=1e-3, atol=1e-6)
    assert norm(change(*made(configured(tmp_path, *PLAIN, "--clip-grad", "0")))) == norm(whole)


def test_float16_scales_the_loss_and_leaves_out_a_step_that_it_does_not_hold(tmp_path):
    parts, loaders = made(configured(tmp_path, *PLAIN, "--amp", "--amp-dtype", "float16", "--clip-grad", "1"))
    whole = change(*made(configured(tmp_path, *PLAIN, "--clip-grad", "1")))
    images, _ = next(iter(loaders.train))
    with parts.autocast():
        assert parts.model(images).dtype == torch.float16
    for grad, found in zip(whole, change(parts, loaders), strict=True):
        torch.testing.assert_close(found, grad, rtol=0.1, atol=0.02)  # clipped after it was scaled back
    scale = parts.scaler.get_scale()
    with torch.no_grad():
        parts.model[0].weight.mul_(1e30)
    before = copy.deepcopy(parts.model)
    train_step(parts, *next(iter(loaders.train)))
    for old, new in zip(before.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert parts.scaler.get_scale() == scale / 2
    assert made(configured(tmp_path, "--amp"))[0].scaler is None


def test_the_average_of_the_weights_is_that_of_the_definition_and_is_what_is_tested(tmp_path):
    parts, loaders = made(configured(tmp_path, *PLAIN, "--model-ema", "--model-ema-decay", "0.75"))
    expected = None
    for images, labels in list(loaders.train)[:6]:
        train_step(parts, images, labels)
        parts.step_scheduler(torch.tensor(1.0))
        now = parts.model[0].weight.detach().clone()
        # The first step copies the weights.
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(parts.tested[0].weight, expected)
    bare, _ = made(configured(tmp_path, *PLAIN))
    bare.model.load_state_dict(parts.ema.module.state_dict())
    assert evaluate(parts, loaders.test, ALONE) == evaluate(bare, loaders.test, ALONE)
    assert parts.model.training


def test_the_average_goes_back_with_the_model(tmp_path):
    config = configured(tmp_path, "--epochs", "12", "--model-ema", "--opt", "momentum")
    parts, loaders = made(config)
    went_back = 0
    for _ in range(12):
        for images, labels in loaders.train:
            loss = train_step(parts, images, labels)
            with torch.no_grad():
                parts.ema.module[0].weight.fill_(torch.nan)  # as after weights that have blown up
            parts.step_scheduler(loss)
            if sum("back at step" in event.message for event in parts.autowu.events) > went_back:
                went_back += 1
                assert_same_weights(parts.ema.module, parts.model)
    assert went_back


def test_the_average_leaves_the_weights_of_a_ramp_out(tmp_path, monkeypatch):
    monkeypatch.setattr("autowu.ramp.SHORTEST", 0)
    monkeypatch.setattr("autowu.ramp._LEAST", 32)
    monkeypatch.setattr("autowu.second_look.is_smooth", lambda _: False)  # as batches are that come in one order again and again
    options = ["--epochs", "100", "--cooldown-fraction", "0.1", "--model-ema", "--opt", "lamb"]
    parts, loaders = made(configured(tmp_path, *options))
    ramped, before = 0, None
    while parts.autowu.phase in ("warmup", "stable") and not (ramped and before is None):
        for images, labels in loaders.train:
            loss = train_step(parts, images, labels)
            if before is not None:
                assert_same_weights(parts.ema.module, before)
                ramped += 1
            parts.step_scheduler(loss)
            before = copy.deepcopy(parts.ema.module) if parts.autowu.in_ramp else None
    assert ramped > 2
    assert [event.kind for event in parts.autowu.events].count("ramp") == 1


@pytest.mark.parametrize("options", [["--amp", "--amp-dtype", "float16"], ["--model-ema", "--model-ema-warmup"]], ids=" ".join)
def test_a_run_goes_on_with_its_average_and_its_scaler(tmp_path, options):
    config = configured(tmp_path / "run", *options)
    parts, loaders = made(config)
    progress = looped(replace(config, epochs=1), parts, loaders).train(Progress())
    state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert ("ema" in state, "scaler" in state) == (parts.ema is not None, parts.scaler is not None)
    again, others = made(config)
    loop = looped(config, again, others)
    assert loop.checkpoints.load(tmp_path / "run" / "checkpoint.pt") == progress
    for one, data in ((parts, loaders), (again, others)):
        looped(config, one, data).train(progress)
    assert_same_weights(again.tested, parts.tested)
    assert_same_weights(again.model, parts.model)


@pytest.mark.parametrize(("device", "precision"), [("cuda", "high"), ("cpu", "highest")])
def test_tensorfloat32_is_for_gpus_where_it_is_asked_for(device, precision):
    before = torch.get_float32_matmul_precision()
    try:
        allow_tf32(False, torch.device(device))
        assert torch.get_float32_matmul_precision() == before
        allow_tf32(True, torch.device(device))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_format_and_stochastic_depth_are_those_asked_for(tmp_path):
    parts, loaders = made(configured(tmp_path, "--channels-last"))
    nn.init.ones_(parts.model[0].weight)
    assert parts.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert train_step(parts, *next(iter(loaders.train))).isfinite()


@pytest.mark.usefixtures("blank_figures")
def test_all_of_it_at_once_trains_to_the_end(tmp_path):
    options = ["--model", "test_vit", "--img-size", "16", "--batch-size", "300", "--grad-accum", "2", "--epochs", "1"]
    options += [
        "--drop-path",
        "0.1",
        "--model-kwargs",
        "init_values=0.1",
        "--grad-checkpointing",
        "--clip-grad",
        "1",
        "--model-ema",
    ]
    options += ["--amp", "--channels-last", "--opt", "adamw", "--opt-kwargs", "betas=(0.9,0.99)", "--device", "cpu"]
    assert main([*options, "--run-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--clip-mode", "norms"], "--clip-mode norms: not known; did you mean norm"),
        (["--clip-grad", "-1"], "--clip-grad -1.0: must be at least 0"),
        (["--amp-dtype", "float8"], "--amp-dtype float8: not known"),
        (["--model-ema-decay", "1.5"], "--model-ema-decay 1.5: must be at most 1"),
        (["--drop-path", "2"], "--drop-path 2.0: must be at most 1"),
        (["--model-kwargs", "nonsense=3"], "nonsense"),
        (["--model-kwargs", "nonsense"], "--model-kwargs nonsense: must be KEY=VALUE"),
        (["--opt-kwargs", "nonsense=3"], "--opt lars: cannot be built"),
        (["--opt", "adamw", "--opt-kwargs", "nonsense=3"], "--opt adamw: cannot be built"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert main([*options, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
