"""LANS where it is something known, resumed, refused, and on real data. tests/test_optim_engines.py has it against its formula."""

import copy
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from autowu import AutoWU
from autowu.optim import LAMB, LANS, param_groups

SHAPES = [(5, 4), (4,), (3, 2, 2, 2), (6, 6)]


def make_parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def make_gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def take_steps(optimizer, parameters, steps, change=lambda gradient: gradient):
    for step in steps:
        for parameter, gradient in zip(parameters, make_gradients(step), strict=True):
            parameter.grad = change(gradient).to(parameter.dtype)
        optimizer.step()


def assert_all_close(parameters, twins, rtol=1e-10):
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("foreach", [False, True])
def test_without_momentum_it_is_lamb_on_normalised_gradients(foreach):
    parameters, twins = make_parameters(), make_parameters()
    common = {"lr": 0.05, "betas": (0.0, 0.9), "weight_decay": 0.1, "foreach": foreach}
    take_steps(LANS(parameters, **common), parameters, range(6))
    take_steps(LAMB(twins, **common), twins, range(6), lambda gradient: gradient / gradient.norm())
    assert_all_close(parameters, twins)


def test_where_the_gradient_stays_it_is_lamb_on_the_normalised_one():
    parameters, twins = make_parameters(), make_parameters()
    for some, optimizer in ((parameters, LANS(parameters, lr=0.05)), (twins, LAMB(twins, lr=0.05))):
        for _ in range(6):
            take_steps(optimizer, some, [0], lambda gradient: gradient / gradient.norm())
    assert_all_close(parameters, twins)


def test_the_size_of_a_gradient_means_nothing():
    parameters, twins = make_parameters(), make_parameters()
    take_steps(LANS(parameters, lr=0.05), parameters, range(6))
    take_steps(LANS(twins, lr=0.05), twins, range(6), lambda gradient: 2.0 ** gradient.numel() * gradient)
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(parameters, twins, strict=True))


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**66, 2.0**100])
def test_huge_and_tiny_gradients_step_as_others_do(scale):
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    take_steps(LANS(parameters, lr=0.05), parameters, range(3))
    take_steps(LANS(twins, lr=0.05), twins, range(3), lambda gradient: scale * gradient)
    assert_all_close(parameters, twins, 1e-6)


@pytest.mark.parametrize("foreach", [False, True])
def test_float16_is_refused_before_its_moments_underflow(foreach):
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    with pytest.raises(TypeError, match=r"params: LANS: float16 weights; .* take float32 or bfloat16"):
        LANS([nn.Parameter(start.clone())])
    weight = nn.Parameter(start.float())
    optimizer = LANS([weight], foreach=foreach)
    weight.data = start.clone()
    weight.grad = start.clone()
    with pytest.raises(RuntimeError, match=r"LANS: float16 weights; .* take float32 or bfloat16"):
        optimizer.step()
    assert torch.equal(weight, start)
    LANS([{"params": [weight], "adapt": False}], foreach=foreach).step()
    assert not torch.equal(weight, start)


@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_stay_as_they_are(foreach):
    parameters = make_parameters()
    optimizer = LANS([{"params": parameters[:2]}, {"params": parameters[2:], "adapt": False}], weight_decay=0.1, foreach=foreach)
    take_steps(optimizer, parameters, [0])
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, make_gradients(0), strict=True))


@pytest.mark.parametrize("foreach", [False, True])
def test_without_adaptation_it_is_adamw(foreach):
    parameters, twins = make_parameters(), make_parameters()
    common = {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-6}
    optimizer = LANS([{"params": parameters, "adapt": False}], foreach=foreach, **common)
    take_steps(optimizer, parameters, range(6))
    take_steps(torch.optim.AdamW(twins, **common), twins, range(6))
    assert_all_close(parameters, twins, 1e-12)
    assert optimizer.layer_stats() == []


def test_the_stats_are_those_of_the_momentums_part():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[1.0, 1.0]])
    optimizer = LANS([weight], lr=0.1)
    optimizer.step()
    (layer,) = optimizer.layer_stats()
    assert layer[1:] == pytest.approx((5.0, 2**0.5, 5 / 2**0.5), rel=1e-4)
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - 0.1 * 5 / 2**0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
def test_cut_and_resumed_it_goes_on_bit_for_bit(foreach, tmp_path):
    def make(parameters):
        groups = [{"params": parameters[:2], "weight_decay": 0.05}, {"params": parameters[2:3], "adapt": False}]
        return LANS([*groups, {"params": parameters[3:]}], lr=0.1, foreach=foreach)

    parameters = make_parameters(torch.float32)
    optimizer = make(parameters)
    take_steps(optimizer, parameters, range(3))
    torch.save({"weights": parameters, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    others = [nn.Parameter(weight.detach()) for weight in saved["weights"]]
    other = make(others)
    other.load_state_dict(saved["optimizer"])
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(other, others, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(copied):
    parameters = make_parameters()
    optimizer = LANS(parameters, lr=0.1)
    take_steps(optimizer, parameters, range(3))
    others, other = copied((parameters, optimizer))
    take_steps(other, others, [3])
    assert not any(torch.equal(p, o) for p, o in zip(parameters, others, strict=True))
    take_steps(optimizer, parameters, [3])
    assert all(torch.equal(p, o) for p, o in zip(parameters, others, strict=True))


def test_it_goes_on_from_a_state_of_lamb():
    parameters = make_parameters()
    lamb = LAMB(parameters, lr=0.1)
    take_steps(lamb, parameters, range(3))
    optimizer = LANS(parameters)
    optimizer.load_state_dict(lamb.state_dict())
    take_steps(optimizer, parameters, [3])
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


@pytest.mark.parametrize("corrected", [True, False])
def test_from_a_lamb_that_corrects_nothing_it_goes_on_uncorrected(corrected):
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    optimizer = LANS([weight], lr=0.1)
    optimizer.load_state_dict(LAMB([weight], lr=0.1, bias_correction=corrected).state_dict())
    optimizer.step()
    (layer,) = optimizer.layer_stats()
    assert layer.grad_norm == pytest.approx(4.0 if corrected else 4 * 0.1 / 0.001**0.5, rel=1e-3)


@pytest.mark.parametrize("kind", [LAMB, LANS])
def test_keys_of_other_optimizers_in_a_group_are_let_be(kind):
    optimizer = kind([{"params": [nn.Parameter(torch.ones(1))], "momentum": 1.0}])
    assert optimizer.param_groups[0]["momentum"] == 1.0
    with pytest.raises(ValueError, match="betas"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "momentum": 1.0, "betas": (0.9, 1.0)})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be at least 0 and finite"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): must both be in"),
        ({"eps": 0.0}, "eps=0.0: must be above 0 and finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be at least 0"),
        ({"max_trust_ratio": 0.0}, "max_trust_ratio=0.0: must be above 0"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        LANS([nn.Parameter(torch.ones(1))], **arguments)
    optimizer = LANS([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=named):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **arguments})


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="LANS: a gradient of layout torch"):
        LANS(embedding.parameters()).step()


def test_it_learns_the_digits_with_autowu():
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = LANS(param_groups(model, weight_decay=0.01))
    scheduler = AutoWU(optimizer, total_steps=150, model=model)
    for step in range(150):
        batch = torch.randperm(1347, generator=torch.Generator().manual_seed(step))[:256]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    assert (model(images[1347:]).argmax(1) == labels[1347:]).float().mean() > 0.9
    assert [layer.name for layer in optimizer.layer_stats()] == ["0.weight", "3.weight"]
