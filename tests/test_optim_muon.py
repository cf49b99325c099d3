"""Muon beside torch's, its parts, resumed, refused, and on real data. tests/test_optim_engines.py has it against its formula."""

import copy
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from autowu.optim import Muon, param_groups
from autowu.optim.muon import orthogonal

SHAPES = [(5, 8), (4,), (3, 2, 2, 2), (9, 4)]
needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="a torch without Muon")


def drawn(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_parameters(dtype=torch.float32):
    return [nn.Parameter(drawn(i, shape, dtype)) for i, shape in enumerate(SHAPES)]


def take_steps(optimizer, parameters, steps):
    for step in steps:
        for i, parameter in enumerate(parameters):
            parameter.grad = drawn(100 + 10 * step + i, parameter.shape, parameter.dtype)
        optimizer.step()


def steps_of_constant_ratio(parameters, ratio, lr, **others):
    """Muon whose ratio is known: the cap, which every layer meets."""
    return Muon(parameters, lr=lr / ratio, max_trust_ratio=ratio, **others)


@needs_torchs
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(12, 20), (16, 16), (40, 10)])
def test_with_the_ratio_taken_out_it_is_torchs_muon(shape, decay, foreach):
    parameter, twin = (nn.Parameter(drawn(0, shape)) for _ in range(2))
    optimizer = steps_of_constant_ratio([parameter], 2.0**-10, 0.05, weight_decay=decay, foreach=foreach)
    taller = max(1.0, shape[0] / shape[1]) ** 0.5  # torch takes that much of the LR for a tall matrix, but not for its decay
    theirs = torch.optim.Muon([twin], lr=0.05 / taller, weight_decay=decay * taller)
    take_steps(optimizer, [parameter], range(5))
    take_steps(theirs, [twin], range(5))
    torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)


@needs_torchs
@pytest.mark.parametrize("shape", [(12, 20), (16, 16), (40, 10), (1, 7), (7, 1)])
def test_it_makes_orthogonal_what_torch_does(shape):
    matrix = drawn(0, shape)
    theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(orthogonal(matrix), theirs, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_singular_values_come_near_one(scale):
    values = torch.linalg.svdvals(orthogonal(scale * drawn(0, (30, 50))).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("scale", [2.0**66, 2.0**100])
def test_huge_gradients_step_as_others_do(scale):
    assert torch.equal(orthogonal(scale * drawn(0, (30, 50))), orthogonal(drawn(0, (30, 50))))


def test_an_embedding_meets_no_cap():
    embedding = nn.Embedding(1000, 16)
    before = embedding.weight.detach().clone()
    embedding.weight.grad = drawn(0, (1000, 16))
    optimizer = Muon(embedding.parameters(), lr=0.01)
    optimizer.step()
    (layer,) = optimizer.layer_stats()
    assert layer.trust_ratio > 20
    assert float((embedding.weight.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.bfloat16))


def test_a_step_changes_a_matrix_by_the_lr():
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Muon(parameters, lr=0.01)
    take_steps(optimizer, parameters, [0])
    for i in (0, 2, 3):
        change = (parameters[i].detach() - before[i]).norm() / before[i].norm()
        assert float(change) == pytest.approx(0.01, rel=1e-3)
    assert [layer.name for layer in optimizer.layer_stats()] == ["0.0", "0.2", "0.3"]


def test_a_kernel_is_a_matrix_of_its_outputs():
    kernel, matrix = nn.Parameter(drawn(0, (6, 3, 2, 2))), nn.Parameter(drawn(0, (6, 12)))
    optimizers = [Muon([kernel], lr=0.1, weight_decay=0.1), Muon([matrix], lr=0.1, weight_decay=0.1)]
    for step in range(4):
        matrix.grad = drawn(10 + step, (6, 12))
        kernel.grad = matrix.grad.reshape(kernel.shape)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)


@pytest.mark.parametrize("foreach", [False, True])
def test_what_is_no_matrix_or_left_out_is_stepped_by_adamw(foreach):
    parameters, twins = make_parameters(torch.float64), make_parameters(torch.float64)
    common = {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-6, "betas": (0.8, 0.9)}
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "adapt": False}]
    take_steps(Muon(groups, foreach=foreach, **common), parameters, range(5))
    take_steps(torch.optim.AdamW(twins, **common), twins, range(5))
    for i, (parameter, twin) in enumerate(zip(parameters, twins, strict=True)):
        if i:
            torch.testing.assert_close(parameter, twin, rtol=1e-12, atol=1e-14)
        else:
            assert not torch.allclose(parameter, twin)


def test_a_group_may_stop_to_adapt():
    parameters = make_parameters()
    optimizer = Muon(parameters, lr=0.1)
    take_steps(optimizer, parameters, range(2))
    optimizer.param_groups[0]["adapt"] = False
    take_steps(optimizer, parameters, range(2, 4))
    assert optimizer.layer_stats() == []
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [2.0, 4.0, 2.0, 2.0]


@pytest.mark.parametrize("foreach", [False, True])
def test_cut_and_resumed_it_goes_on_bit_for_bit(foreach, tmp_path):
    def make(parameters):
        groups = [{"params": parameters[:3], "weight_decay": 0.05}, {"params": parameters[3:], "adapt": False}]
        return Muon(groups, lr=0.1, foreach=foreach)

    parameters = make_parameters()
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
    optimizer = Muon(parameters, lr=0.1)
    take_steps(optimizer, parameters, range(3))
    others, other = copied((parameters, optimizer))
    take_steps(other, others, [3])
    assert not any(torch.equal(p, o) for p, o in zip(parameters, others, strict=True))
    take_steps(optimizer, parameters, [3])
    assert all(torch.equal(p, o) for p, o in zip(parameters, others, strict=True))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be at least 0 and finite"),
        ({"momentum": 1.0}, r"momentum=1.0: must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): must both be in"),
        ({"eps": 0.0}, "eps=0.0: must be above 0 and finite"),
        ({"max_trust_ratio": 0.0}, "max_trust_ratio=0.0: must be above 0"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        Muon([nn.Parameter(torch.ones(1))], **arguments)
    optimizer = Muon([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=named):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **arguments})


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="Muon: a gradient of layout torch"):
        Muon(embedding.parameters()).step()


def test_a_convolutional_network_learns_the_digits():
    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    model = nn.Sequential(*layers)
    optimizer = Muon(param_groups(model, weight_decay=0.01), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for step in range(100):
        batch = torch.randperm(1347, generator=torch.Generator().manual_seed(step))[:128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    assert (model(images[1347:]).argmax(1) == labels[1347:]).float().mean() > 0.93
    assert [layer.name for layer in optimizer.layer_stats()] == ["0.weight", "5.weight"]
