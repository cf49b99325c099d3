"""LAMB against a loop in NumPy, timm's LAMB, torch's AdamW where ratios are 1, and as an Optimizer."""

import copy
import pickle

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from autowu import AutoWU
from autowu.optim import LAMB

SHAPES = [(5, 4), (4,), (3, 2, 2, 2), (1,)]


def make_parameters(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_gradients(step, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def take_steps(optimizer, parameters, steps, shapes=SHAPES):
    for step in steps:
        for parameter, gradient in zip(parameters, make_gradients(step, parameters[0].dtype, shapes), strict=True):
            parameter.grad = gradient
        optimizer.step()


def groups_of(parameters):
    return [
        {"params": parameters[:2], "weight_decay": 0.05},
        {"params": parameters[2:3], "adapt": False, "weight_decay": 0.02, "lr": 0.02},
        {"params": parameters[3:], "eps": 1e-3},
    ]


def lamb_in_numpy(weights, gradients_of, steps, lr, betas, eps, decay, cap, correct, adapt=True):
    """Weights after `steps` steps, and the ratios of the last."""
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    counts, ratios = [0] * len(weights), [1.0] * len(weights)
    for step in range(steps):
        for i, gradient in enumerate(gradients_of(step)):
            if gradient is None:
                continue
            counts[i] += 1
            first = betas[0] * moments[i][0] + (1 - betas[0]) * gradient
            second = betas[1] * moments[i][1] + (1 - betas[1]) * gradient**2
            moments[i] = first, second
            if correct:
                first = first / (1 - betas[0] ** counts[i])
                second = second / (1 - betas[1] ** counts[i])
            update = first / (np.sqrt(second) + eps) + decay * weights[i]
            norms = np.sqrt((weights[i] ** 2).sum()), np.sqrt((update**2).sum())
            ratios[i] = min(norms[0] / norms[1], cap) if adapt and min(norms) > 0 else 1.0
            weights[i] = weights[i] - lr * ratios[i] * update
    return weights, ratios


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_against_a_loop_in_numpy(foreach, correct, decay):
    rng = np.random.default_rng(0)
    shapes = [(6, 5), (4, 3, 3), (7,), (3, 3), (2, 2), (8, 2)]
    weight_scales = [1.0, 1e-3, 0.0, 1.0, 1.0, 1e3]  # the third starts with norm 0, the last meets the clamp
    gradient_scales = [1.0, 50.0, 1.0, 0.0, None, 1e-2]  # None: no gradient
    weights = [rng.normal(size=shape) * scale for shape, scale in zip(shapes, weight_scales, strict=True)]
    gradients = [
        [None if scale is None else rng.normal(size=shape) * scale for shape, scale in zip(shapes, gradient_scales, strict=True)]
        for _ in range(6)
    ]
    parameters = [nn.Parameter(torch.tensor(weight)) for weight in weights]
    optimizer = LAMB(parameters, 0.05, (0.8, 0.95), 1e-3, decay, max_trust_ratio=5.0, bias_correction=correct, foreach=foreach)
    for row in gradients:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = None if gradient is None else torch.tensor(gradient)
        optimizer.step()
    expected, ratios = lamb_in_numpy(weights, gradients.__getitem__, 6, 0.05, (0.8, 0.95), 1e-3, decay, 5.0, correct)
    for parameter, weight in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-11, atol=1e-14)
    assert ratios[5] == 5.0
    assert [layer.name for layer in optimizer.layer_stats()] == ["0.0", "0.1", "0.2", "0.3", "0.5"]
    np.testing.assert_allclose([layer.trust_ratio for layer in optimizer.layer_stats()], ratios[:4] + ratios[5:], rtol=1e-11)


@pytest.mark.parametrize("foreach", [False, True])
def test_without_adaptation_it_is_adamw(foreach):
    parameters, twins = make_parameters(), make_parameters()
    optimizer = LAMB([{"params": parameters, "adapt": False}], lr=0.1, weight_decay=0.1, eps=1e-6, foreach=foreach)
    take_steps(optimizer, parameters, range(6))
    take_steps(torch.optim.AdamW(twins, lr=0.1, weight_decay=0.1, eps=1e-6), twins, range(6))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-12, atol=1e-14)
    assert optimizer.layer_stats() == []


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("correct", [False, True])
def test_without_the_clamp_it_is_timms_lamb(foreach, correct):
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    common = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "bias_correction": correct}
    take_steps(LAMB(parameters, max_trust_ratio=float("inf"), foreach=foreach, **common), parameters, range(6))
    take_steps(timm.optim.Lamb(twins, max_grad_norm=None, **common), twins, range(6))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("foreach", [False, True])
def test_in_every_precision(dtype, tolerance, foreach):
    shapes = [(8, 9), (70,), (3, 5, 2, 2), (1,)]
    parameters, twins = make_parameters(dtype, shapes), make_parameters(shapes=shapes)
    take_steps(LAMB(groups_of(parameters), foreach=foreach, lr=0.01), parameters, range(3), shapes)
    take_steps(LAMB(groups_of(twins), foreach=False, lr=0.01), twins, range(3), shapes)
    for parameter, twin in zip(parameters, twins, strict=True):
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter.double(), twin, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("memory_format", [torch.channels_last, "transposed"])
def test_the_layout_of_a_parameter_in_memory_changes_nothing(memory_format):
    shapes = [(6, 4, 3, 3)]
    (plain,), (other,) = make_parameters(torch.float32, shapes), make_parameters(torch.float32, shapes)
    if memory_format == "transposed":
        other.data = other.data.transpose(0, 3).contiguous().transpose(0, 3)
    else:
        other.data = other.data.contiguous(memory_format=memory_format)
    assert other.stride() != plain.stride()
    for parameter in (plain, other):
        optimizer = LAMB([parameter], lr=0.1, weight_decay=0.1)
        for step in range(3):
            parameter.grad = torch.empty_like(parameter).copy_(make_gradients(step, torch.float32, shapes)[0])
            optimizer.step()
    torch.testing.assert_close(other, plain)


def test_a_gradient_or_a_loaded_moment_may_lie_otherwise_in_memory_than_its_parameter():
    shapes = [(6, 4, 3, 3)]
    (plain,), (other,) = make_parameters(torch.float32, shapes), make_parameters(torch.float32, shapes)
    optimizers = [LAMB([parameter], lr=0.1) for parameter in (plain, other)]
    for step in range(4):
        plain.grad = make_gradients(step, torch.float32, shapes)[0]
        other.grad = plain.grad.clone(memory_format=torch.channels_last if step % 2 else torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
        state = optimizers[1].state[other]
        state["exp_avg"] = state["exp_avg"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other, plain)


def test_mixed_dtypes_in_one_group():
    shapes = [(4, 4), (4, 4)]
    single, double = make_parameters(torch.float32, shapes)[0], make_parameters(torch.float64, shapes)[0]
    optimizer = LAMB([single, double], lr=0.1)
    for step in range(3):
        for parameter in (single, double):
            parameter.grad = make_gradients(step, parameter.dtype, shapes)[0]
        optimizer.step()
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


def test_single_and_multi_tensor_states_interchange(tmp_path):
    runs = {}
    for path in [(False, False), (False, True), (True, False)]:
        parameters = make_parameters()
        optimizer = LAMB(groups_of(parameters), lr=0.1, foreach=path[0])
        take_steps(optimizer, parameters, range(3))
        torch.save({"weights": parameters, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        others = [nn.Parameter(weight.detach()) for weight in saved["weights"]]
        other = LAMB([{"params": others[:2]}, {"params": others[2:3]}, {"params": others[3:]}], lr=0.5)
        other.load_state_dict(saved["optimizer"])
        for group in other.param_groups:
            group["foreach"] = path[1]
        take_steps(other, others, range(3, 6))
        runs[path] = others
    for path, weights in runs.items():
        for weight, reference in zip(weights, runs[False, False], strict=True):
            torch.testing.assert_close(weight, reference, rtol=1e-12, atol=1e-14, msg=str(path))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(copied):
    parameters = make_parameters()
    optimizer = LAMB(groups_of(parameters), lr=0.1)
    take_steps(optimizer, parameters, range(3))
    others, other = copied((parameters, optimizer))
    before = [parameter.detach().clone() for parameter in parameters]
    take_steps(other, others, [3])
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    take_steps(optimizer, parameters, [3])
    assert all(torch.equal(p, o) and not torch.equal(p, b) for p, o, b in zip(parameters, others, before, strict=True))


def test_a_loss_scale_is_taken_off_and_an_overflow_skips_the_step():
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, plain = LAMB(parameters, lr=0.1), LAMB(twins, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for parameter, twin, gradient in zip(parameters, twins, make_gradients(step, torch.float32), strict=True):
            parameter.grad = scaler.scale(gradient) if step != 2 else torch.full_like(gradient, float("inf"))
            twin.grad = gradient
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            plain.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


def test_closure_is_evaluated_once_with_gradients():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer, calls = LAMB([weight], lr=0.1), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = weight.pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 25.0
    assert calls == [True]
    # Adam's first update is the sign: norm sqrt(2), and the weight's is 5.
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - 0.1 * 5 / 2**0.5)


def test_a_tensor_as_lr():
    parameters, twins = make_parameters(), make_parameters()
    take_steps(LAMB(groups_of(parameters), lr=torch.tensor(0.1)), parameters, range(3))
    take_steps(LAMB(groups_of(twins), lr=0.1), twins, range(3))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-7, atol=1e-8)  # 0.1 in float32


def test_autowu_drives_it():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = LAMB(model.parameters())
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
    assert scheduler.switch is not None
    assert losses[-1] < 0.05 * losses[0]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = LAMB(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="LAMB: a gradient of layout torch"):
        optimizer.step()


def test_nothing_happens_without_gradients():
    parameters = make_parameters()
    optimizer = LAMB([{"params": parameters}, {"params": []}], lr=0.1)
    optimizer.step()
    assert optimizer.layer_stats() == []
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"max_trust_ratio": 0.0}, "max_trust_ratio=0.0"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        LAMB([nn.Parameter(torch.ones(1))], **arguments)


@pytest.mark.parametrize(
    ("group", "error", "named"),
    [({"eps": -1.0}, ValueError, "eps=-1.0"), ({"betas": (2, 2)}, ValueError, "betas"), ({"adapt": "no"}, TypeError, "adapt='no'")],
)
def test_a_group_out_of_range_is_not_added(group, error, named):
    optimizer = LAMB([nn.Parameter(torch.ones(1))])
    with pytest.raises(error, match=named):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **group})
    assert len(optimizer.param_groups) == 1


def test_it_goes_on_from_a_state_of_adamw():
    parameters = make_parameters()
    plain = torch.optim.AdamW(parameters, lr=0.1)
    take_steps(plain, parameters, range(3))
    optimizer = LAMB(parameters, lr=0.5, max_trust_ratio=3.0)
    optimizer.load_state_dict(plain.state_dict())
    take_steps(optimizer, parameters, [3])
    assert optimizer.param_groups[0]["max_trust_ratio"] == 3.0
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_complex_parameters_are_refused():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="params: LAMB: a complex parameter"):
        LAMB([weight])
    late = nn.Parameter(torch.ones(2))
    optimizer = LAMB([late])
    late.data = weight.detach()
    late.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()
