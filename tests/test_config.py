"""The list of the scheduler's arguments, and what is made of them."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autowu import AutoWU, checks
from autowu.config import ARGUMENTS, Config, checked, configure

PARAMETERS = inspect.signature(AutoWU).parameters
DEFAULTS = {name: parameter.default for name, parameter in PARAMETERS.items()}


def sgd(momentum=0.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=momentum)


def config_of(**arguments):
    return configure(checked(DEFAULTS | {"optimizer": sgd(), "total_steps": 1000} | arguments))


def test_signature_docstring_and_list_have_the_same_arguments_in_the_same_order():
    documented = inspect.getdoc(AutoWU).split("\nArgs:\n")[1].split("\n\n")[0]
    assert re.findall(r"^    (\w+): ", documented, re.MULTILINE) == list(ARGUMENTS) == list(PARAMETERS)


def test_every_default_passes_its_check():
    given_ones = {"optimizer": sgd(), "total_steps": 10}
    assert checked(DEFAULTS | given_ones) == DEFAULTS | given_ones


def test_every_field_of_a_configuration_comes_from_an_argument_or_is_resolved():
    resolved = {"warmup_steps", "warmup_limit", "warmup_origin", "cooldown_start", "replanned_at", "replanned_progress", "others"}
    fields = {field for field in inspect.signature(Config).parameters if field not in resolved}
    assert fields <= set(ARGUMENTS)


NO_LRS = [None, "0.1", 1j, True, [0.1], math.nan, math.inf, -0.1, 10**400]
NO_LRS += [torch.tensor(value) for value in (math.nan, -0.1, 1, 1j)]
NO_LRS += [torch.tensor([0.1, 0.2]), torch.tensor(0.1, requires_grad=True), torch.tensor(0.1, device="meta")]


def test_an_lr_of_a_group_that_cannot_be_set_is_named_with_its_group():
    for value in NO_LRS:
        for key in ("lr", "initial_lr", "lr_scale"):
            optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1)
            optimizer.param_groups[1][key] = value
            with pytest.raises((TypeError, ValueError), match=rf"^optimizer.param_groups\[1\]\['{key}'\]=.*must"):
                AutoWU(optimizer, total_steps=100)
    optimizer = sgd()
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(TypeError, match=r"optimizer.param_groups\[0\]\['lr'\]=None: must be a number"):
        AutoWU(optimizer, total_steps=100)


def test_adafactor_with_steps_of_its_own_is_told_the_cure():
    from transformers import Adafactor

    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError, match=r"\['lr'\]=None.*lr=1e-3, relative_step=False"):
        AutoWU(Adafactor(parameters), total_steps=100)
    AutoWU(Adafactor(parameters, lr=1e-3, relative_step=False), total_steps=100)


def test_lrs_that_can_be_set_are_taken():
    for value in (0, 0.0, 1, np.float32(0.1), np.float16(0.1), torch.tensor(0.1), torch.tensor([0.1])):
        optimizer = sgd()
        optimizer.param_groups[0]["lr"] = value
        AutoWU(optimizer, total_steps=100)


WRONG = {
    "steps_per_epoch": [0, 2.5, True, "ten"],
    "total_epochs": [0, -1, None],
    "total_steps": [0, 1.0],
    "total_samples": [0, -5, 2.5, True, "all"],
    "total_tokens": [0, 1e9, "1e9"],
    "total_seconds": [0, -1, math.nan, math.inf, "1 h", True],
    "immediate_cooldown": [1, "yes", None],
    "cooldown": ["plateau", True, 0.5],
    "cooldown_type": ["quadratic", None],
    "cooldown_fraction": [0, 1, math.nan, "half"],
    "min_lr": [0, -1e-3, math.inf, "low", True, 10**400],
    "max_lr": [0.0, math.nan],
    "max_warmup_fraction": [0, 1.5, "all"],
    "max_warmup_steps": [0, 1.5, "all"],
    "warmup_type": ["sqrt"],
    "warmup_unit": ["batch"],
    "stable_type": ["sqrt", None, True],
    "decay_phase_stat": ["accuracy"],
    "decay_phase_factor": [0, 2.0],
    "test_interval": [0, "batch", 1.5],
    "patience": [0, 1.0],
    "confidence": [0.5, 1, 95],
    "min_contrast": [-1, math.inf],
    "min_rise": [-0.1, math.nan, "none"],
    "peak_factor": [0, 1.1, "half"],
    "gp": ["exact", 3, None],
    "device": ["abacus"],
    "seed": [1.0, None, True],
    "model": ["resnet50"],
    "snapshot_device": ["abacus"],
    "watch": [0],
    "rollback": [0, None],
    "on_rollback": [3, "print"],
    "process_group": ["nccl"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=str)
def test_a_wrong_value_is_an_error_that_names_argument_and_value(name, value):
    arguments = {"steps_per_epoch": 10, "total_epochs": 10} if name != "total_steps" else {}
    with pytest.raises((TypeError, ValueError), match=re.escape(f"{name}={value!r}")):
        AutoWU(sgd(), **(arguments | {name: value}))


def test_every_argument_but_the_optimizer_has_wrong_values_above():
    assert WRONG.keys() == ARGUMENTS.keys() - {"optimizer"}
    with pytest.raises(TypeError, match="optimizer=3"):
        AutoWU(3, total_steps=10)


def test_numbers_of_numpy_are_numbers():
    config = config_of(total_steps=np.int64(1000), min_lr=np.float32(1e-3), patience=np.int32(2))
    assert (config.total_steps, config.patience) == (1000, 2)
    assert config.min_lr == pytest.approx(1e-3)
    assert {type(config.total_steps), type(config.patience), type(config.min_lr)} == {int, float}


@given(st.floats(0.0, 0.99), st.integers(100, 10**6))
def test_a_default_peak_is_lower_by_what_the_lr_grows_within_the_memory_of_momentum(momentum, total):
    config = config_of(optimizer=sgd(momentum), total_steps=total, warmup_type="exp")
    decades = math.log10(config.max_lr / config.min_lr) * momentum / (1 - momentum) / config.warmup_steps
    at_edge = 0.4 * min(max(total / 2000, 1), 2)  # of SGD
    assert config.peak_factor == pytest.approx(at_edge * 10 ** -min(decades, 0.5))
    assert config_of(optimizer=sgd(momentum), total_steps=total, peak_factor=0.8).peak_factor == 0.8


def test_a_loss_is_one_floating_point_number():
    assert checks.loss(1.5) == checks.loss(np.float32(1.5)) == 1.5
    loss = torch.ones(1, 1, dtype=torch.bfloat16)
    assert checks.loss(loss) is loss
    assert checks.loss(np.array(1.5)) == checks.loss(np.full((1, 1), 1.5, dtype=np.float16)) == 1.5
    arrays = (np.ones(2), np.array(1), np.array(1j), np.array([]))
    for wrong in (1, True, None, "low", 1j, *arrays, torch.ones(2), torch.ones(1, dtype=torch.int64), torch.tensor(1j)):
        with pytest.raises((TypeError, ValueError), match="loss"):
            checks.loss(wrong)


@pytest.mark.parametrize(("total", "steps"), [(100, 32), (860, 275), (1_000, 297), (10_000, 940), (100_000, 2972), (10**6, 9400)])
def test_a_longer_run_has_a_longer_warm_up_of_a_smaller_share(total, steps):
    assert config_of(total_steps=total).warmup_steps == steps
    assert config_of(total_steps=total, max_warmup_fraction=0.32).warmup_steps == int(0.32 * total)
