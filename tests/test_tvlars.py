"""TVLARS against a loop in NumPy, against LARS where time stands still, and its step count."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from autowu import AutoWU
from autowu.families import family
from autowu.optim import LARS, TVLARS

SHAPES = [(6, 5), (4, 3, 3), (7,), (3, 3)]


def make_parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def make_gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def take_steps(optimizer, parameters, steps):
    for step in steps:
        for parameter, gradient in zip(parameters, make_gradients(step, parameters[0].dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()


def tvlars_in_numpy(
    weights, steps, lr, momentum, eta, lmbda, alpha, delay, gamma_min, decay, cap=math.inf, eps=1e-8, nesterov=False
):
    buffers = [None] * len(weights)
    for step in range(steps):
        factor = 1 / (alpha + np.exp(lmbda * (step - delay))) + gamma_min
        for i, gradient in enumerate(g.numpy() for g in make_gradients(step)):
            weight_norm, gradient_norm = (min(np.sqrt((x**2).sum()), cap) for x in (weights[i], gradient))
            ratio = eta * factor * weight_norm / (gradient_norm + decay * weight_norm + eps)
            update = ratio * (gradient + decay * weights[i])
            buffers[i] = update if buffers[i] is None else momentum * buffers[i] + update
            weights[i] = weights[i] - lr * (update + momentum * buffers[i] if nesterov else buffers[i])
    return weights


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_against_a_loop_in_numpy(foreach, nesterov):
    values = {"momentum": 0.8, "eta": 0.05, "lmbda": 0.7, "alpha": 0.3, "delay": 4.0, "gamma_min": 0.02}
    parameters = make_parameters()
    weights = [parameter.detach().numpy().copy() for parameter in parameters]
    optimizer = TVLARS(parameters, 0.7, **values, weight_decay=0.1, nesterov=nesterov, foreach=foreach)
    take_steps(optimizer, parameters, range(10))
    expected = tvlars_in_numpy(weights, 10, 0.7, **values, decay=0.1, nesterov=nesterov)
    for parameter, weight in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-11, atol=1e-14)


def test_the_preset_clamps_norms_and_falls_from_the_first_step():
    parameters = make_parameters()
    with torch.no_grad():
        parameters[0].mul_(100)
    weights = [parameter.detach().numpy().copy() for parameter in parameters]
    take_steps(TVLARS.reference(parameters, 2.0, lmbda=0.3, gamma_min=0.01), parameters, range(5))
    expected = tvlars_in_numpy(weights, 5, 2.0, 0.9, 0.001, 0.3, 0.1, -1.0, 0.01, 0.0, cap=10.0)
    for parameter, weight in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-11, atol=1e-14)


def test_where_time_stands_still_it_is_lars():
    parameters, twins = make_parameters(), make_parameters()
    take_steps(TVLARS(parameters, 0.5, eta=0.01, lmbda=0, alpha=1.0, gamma_min=0.5), parameters, range(4))
    take_steps(LARS(torch.optim.SGD(twins, lr=0.5, momentum=0.9), trust_coef=0.01), twins, range(4))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-13, atol=1e-14)


def test_the_factor_goes_from_its_bound_to_what_is_left():
    parameters = make_parameters()
    optimizer = TVLARS(parameters, 1e-30, eta=0.5, lmbda=1.0, alpha=0.25, delay=50, gamma_min=0.125)
    factors = []
    for step in range(2000):
        take_steps(optimizer, parameters, [step])
        layer = optimizer.layer_stats()[0]
        factors.append(layer.trust_ratio * layer.grad_norm / layer.weight_norm / 0.5)
    assert factors[0] == pytest.approx(4.125)
    assert factors[50] == pytest.approx(1 / 1.25 + 0.125)
    assert factors[1999] == pytest.approx(0.125)  # the exponential is past the largest float
    assert all(later <= earlier * (1 + 1e-7) for earlier, later in itertools.pairwise(factors))


def test_groups_left_out_are_stepped_as_by_sgd_whatever_the_time():
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    take_steps(TVLARS([{"params": parameters, "adapt": False}], 0.1, lmbda=5.0, weight_decay=0.1), parameters, range(4))
    take_steps(torch.optim.SGD(twins, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True), twins, range(4))
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(parameters, twins, strict=True))


@pytest.mark.parametrize("foreach", [None, True])
def test_cut_and_resumed_it_goes_on_in_time(tmp_path, foreach):
    parameters = make_parameters()
    optimizer = TVLARS(
        [{"params": parameters[:2]}, {"params": parameters[2:], "lmbda": 0.1}], 1.0, eta=0.1, lmbda=0.5, foreach=foreach
    )
    take_steps(optimizer, parameters, range(3))
    torch.save({"weights": parameters, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    others = [nn.Parameter(weight.detach()) for weight in saved["weights"]]
    other = TVLARS([{"params": others[:2]}, {"params": others[2:]}], 0.3, foreach=foreach)
    other.load_state_dict(saved["optimizer"])
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(other, others, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert [int(group["step"]) for group in other.param_groups] == [6, 6]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(copied):
    parameters = make_parameters()
    optimizer = TVLARS(parameters, 1.0, eta=0.1, lmbda=0.5)
    take_steps(optimizer, parameters, range(3))
    others, other = copied((parameters, optimizer))
    take_steps(other, others, [3])
    assert int(optimizer.param_groups[0]["step"]) == 3
    take_steps(optimizer, parameters, [3])
    assert all(torch.equal(p, o) for p, o in zip(parameters, others, strict=True))


def test_a_group_added_later_joins_in_time():
    parameters = make_parameters()
    optimizer = TVLARS(parameters[:2], 1.0, lmbda=0.5)
    take_steps(optimizer, parameters, range(3))
    optimizer.add_param_group({"params": parameters[2:], "lmbda": 0.0})
    assert [int(group["step"]) for group in optimizer.param_groups] == [3, 3]
    take_steps(optimizer, parameters, [3])
    assert [int(group["step"]) for group in optimizer.param_groups] == [4, 4]
    assert [group["lmbda"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_a_count_that_stays_a_tensor_gives_the_same():
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer = TVLARS(parameters, 1.0, eta=0.1, lmbda=0.5, foreach=True, capturable=True)
    take_steps(TVLARS(twins, 1.0, eta=0.1, lmbda=0.5), twins, range(3))
    take_steps(optimizer, parameters, range(3))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


def test_autowu_takes_it_for_lars_and_drives_it():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = TVLARS(model.parameters(), 1.0, lmbda=0.005)
    assert family(optimizer) == "lars"
    scheduler = AutoWU(optimizer, total_steps=200, model=model)
    inputs = torch.randn(256, 8)
    targets = inputs.sum(1, keepdim=True)
    losses = []
    for _ in range(200):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert int(optimizer.param_groups[0]["step"]) == 200


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "-1.0"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"lmbda": -0.1}, "lmbda=-0.1"),
        ({"lmbda": math.inf}, "lmbda=inf"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"delay": math.nan}, "delay=nan"),
        ({"gamma_min": -1.0}, "gamma_min=-1.0"),
        ({"max_norm": 0.0}, "max_norm=0.0"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"momentum": -1.0}, "-1.0"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        TVLARS([nn.Parameter(torch.ones(1))], **({"lr": 0.1} | arguments))


def test_a_state_of_lars_leaves_its_own_values_and_its_time():
    parameters, others = make_parameters(), make_parameters()
    lars = LARS(torch.optim.SGD(others, lr=0.3, momentum=0.9), trust_coef=0.02)
    optimizer = TVLARS([{"params": parameters, "lmbda": 0.5, "alpha": 0.2}], 1.0)
    take_steps(optimizer, parameters, range(2))
    optimizer.load_state_dict(lars.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lmbda"], group["alpha"], int(group["step"]), group["trust_coef"], group["lr"]) == (0.5, 0.2, 2, 0.02, 0.3)


def test_a_step_that_only_makes_state_takes_no_time():
    parameters = make_parameters()
    for lr in (0.0, torch.tensor(0.0)):
        optimizer = TVLARS(parameters, lr)
        take_steps(optimizer, parameters, [0])
        assert int(optimizer.param_groups[0]["step"]) == 0


def test_groups_out_of_range_are_refused():
    for group in ({"alpha": 0.0}, {"lmbda": -1.0}, {"max_norm": -1.0}):
        with pytest.raises(ValueError, match=next(iter(group))):
            TVLARS([{"params": make_parameters(), **group}], 1.0)
