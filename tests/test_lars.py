"""LARS against an explicit loop in NumPy, against torch's optimizers where ratios are 1, and as an Optimizer."""

import copy
import pickle

import numpy as np
import pytest
import timm.optim
import torch

from autowu.optim import LAMB, LARS
from autowu.optim.batches import batches
from autowu.optim.engines import cpu

INNER = {
    "sgd": lambda groups, **kw: torch.optim.SGD(groups, lr=0.5, momentum=0.9, **kw),
    "nesterov": lambda groups, **kw: torch.optim.SGD(groups, lr=0.5, momentum=0.9, nesterov=True, **kw),
    "adam": lambda groups, **kw: torch.optim.Adam(groups, lr=0.01, **kw),
    "adamw": lambda groups, **kw: torch.optim.AdamW(groups, lr=0.01, **kw),
    "rmsprop": lambda groups, **kw: torch.optim.RMSprop(groups, lr=0.01, **kw),
}
SHAPES = [(5, 4), (4,), (3, 2, 2, 2), (1,)]


def make_parameters(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter((torch.randn(s, generator=generator, dtype=torch.float64) * scale).to(dtype)) for s in SHAPES]


def make_gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def take_steps(optimizer, parameters, steps):
    for step in steps:
        for parameter, gradient in zip(parameters, make_gradients(step, parameters[0].dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()


def adapted(weight, gradient, decay, coef, eps):
    """What the wrapped optimizer must be given in place of the gradient."""
    weight_norm, gradient_norm = np.sqrt((weight**2).sum()), np.sqrt((gradient**2).sum())
    ratio = 1.0
    if coef is not None and weight_norm > 0 and gradient_norm > 0:
        ratio = coef * weight_norm / (gradient_norm + decay * weight_norm + eps)
    return ratio * (gradient + decay * weight)


def test_against_a_loop_in_numpy():
    lr, momentum, eps, steps = 0.7, 0.9, 1e-3, 6
    rows = [  # shape, weight decay, trust coefficient, scale of the weights, scale of the gradients (None: no gradient)
        ((6, 5), 0.02, 0.01, 1.0, 1.0),
        ((4, 3, 3), 0.02, 0.01, 1e-3, 50.0),
        ((7,), 0.02, 0.01, 0.0, 1.0),  # starts with norm 0
        ((3, 3), 0.02, 0.01, 1.0, 0.0),  # a gradient of norm 0
        ((2, 2), 0.02, 0.01, 1.0, None),
        ((5,), 0.1, None, 1.0, 1.0),  # left out
        ((8, 2), 0.0, 0.3, 1.0, 1.0),
    ]
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) * scale for shape, _, _, scale, _ in rows]
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    groups = [
        {"params": parameters[:5], "weight_decay": 0.02},
        {"params": parameters[5:6], "weight_decay": 0.1, "adapt": False},
        {"params": parameters[6:], "trust_coef": 0.3},
    ]
    optimizer = LARS(torch.optim.SGD(groups, lr=lr, momentum=momentum), eps=eps, trust_coef=0.01)
    buffers = [None] * len(rows)
    for _ in range(steps):
        for i, (shape, decay, coef, _, scale) in enumerate(rows):
            if scale is None:
                continue
            gradient = rng.normal(size=shape) * scale
            parameters[i].grad = torch.tensor(gradient)
            update = adapted(weights[i], gradient, decay, coef, eps)
            buffers[i] = update if buffers[i] is None else momentum * buffers[i] + update
            weights[i] = weights[i] - lr * buffers[i]
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-11, atol=1e-14)


def test_a_ratio_by_hand():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # norm 5
    optimizer = LARS(torch.optim.SGD([weight], lr=1.0, weight_decay=0.2), eps=0.0, trust_coef=0.1)
    weight.grad = torch.tensor([[0.0, 1.0]])  # norm 1; ratio 0.1 * 5 / (1 + 0.2 * 5) = 0.25
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3 - 0.25 * 0.6, 4 - 0.25 * 1.8]]))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_around_any_optimizer_it_is_that_one_on_the_adapted_gradients(name, foreach):
    parameters, twins = make_parameters(), make_parameters()
    optimizer = LARS(INNER[name](parameters, weight_decay=0.05, foreach=foreach), trust_coef=0.02)
    plain = INNER[name](twins, weight_decay=0.0, foreach=foreach)
    for step in range(5):
        for twin, gradient in zip(twins, make_gradients(step), strict=True):
            twin.grad = torch.tensor(adapted(twin.detach().numpy(), gradient.numpy(), 0.05, 0.02, 1e-8))
        plain.step()
    take_steps(optimizer, parameters, range(5))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_without_adaptation_it_is_sgd_bit_for_bit(nesterov, foreach, dtype):
    parameters, twins = make_parameters(dtype), make_parameters(dtype)
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov, "foreach": foreach}
    optimizer = LARS(torch.optim.SGD([{"params": parameters, "adapt": False}], **arguments))
    take_steps(optimizer, parameters, range(5))
    take_steps(torch.optim.SGD(twins, **arguments), twins, range(5))
    assert all(torch.equal(p, t) for p, t in zip(parameters, twins, strict=True))


def test_groups_left_out_may_mix_precisions():
    single, double = make_parameters(torch.float32), make_parameters(torch.float64)
    twins = [*make_parameters(torch.float32), *make_parameters(torch.float64)]
    for optimizer, parameters in (
        (LARS(torch.optim.SGD([{"params": [*single, *double], "adapt": False}], lr=0.1, momentum=0.9)), [*single, *double]),
        (torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False), twins),
    ):
        for step in range(3):
            half = len(parameters) // 2
            for parameter, gradient in zip(parameters[:half], make_gradients(step, torch.float32), strict=True):
                parameter.grad = gradient
            for parameter, gradient in zip(parameters[half:], make_gradients(step, torch.float64), strict=True):
                parameter.grad = gradient
            optimizer.step()
    for parameter, twin in zip([*single, *double], twins, strict=True):
        torch.testing.assert_close(parameter, twin)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("size", [1e2, 1e5, 1e10, 1e15])
def test_a_ratio_of_any_size_scales_the_gradient(size, nesterov):
    """SGD's kernel is told 1 - ratio, as long as that can be told."""
    weight = torch.nn.Parameter(torch.ones(4, 4))  # norm 4
    optimizer = LARS(torch.optim.SGD([weight], lr=0.0, momentum=0.9, nesterov=nesterov), eps=0.0)
    for momentum in (1e-3, 1.9e-3):
        weight.grad = torch.full((4, 4), size)  # norm 4 * size, ratio 1e-3 / size
        optimizer.step()
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.full((4, 4), momentum), rtol=1e-6, atol=0)


def test_parameters_of_norm_zero_take_sgds_step_bit_for_bit():
    parameters, twins = make_parameters(torch.float32, 0.0), make_parameters(torch.float32, 0.0)
    take_steps(LARS(torch.optim.SGD(parameters, lr=0.1)), parameters, [0])
    take_steps(torch.optim.SGD(twins, lr=0.1), twins, [0])
    assert all(torch.equal(p, t) and p.abs().sum() > 0 for p, t in zip(parameters, twins, strict=True))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_one_step_in_every_precision(dtype, rtol):
    parameters, gradients = make_parameters(dtype), make_gradients(0, dtype)
    expected = [
        w - 3.0 * adapted(w, g.double().numpy(), 0.05, 0.1, 1e-8)
        for w, g in zip([p.detach().double().numpy() for p in parameters], gradients, strict=True)
    ]
    take_steps(LARS(torch.optim.SGD(parameters, lr=3.0, weight_decay=0.05), trust_coef=0.1), parameters, [0])
    for parameter, weight in zip(parameters, expected, strict=True):
        assert parameter.dtype == dtype
        np.testing.assert_allclose(parameter.detach().double().numpy(), weight, rtol=rtol, atol=rtol)


def test_norms_of_half_precision_do_not_overflow():
    weight = torch.nn.Parameter(torch.ones(400, 400, dtype=torch.float16))  # norm 400
    weight.grad = torch.full_like(weight, 500.0)  # norm 200,000, above the largest float16
    LARS(torch.optim.SGD([weight], lr=1.0), trust_coef=100.0).step()  # ratio 0.2
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1.0 - 100.0))


def test_a_gradient_or_a_loaded_buffer_may_lie_otherwise_in_memory_than_its_parameter():
    shape = (6, 4, 3, 3)
    plain, other = (torch.nn.Parameter(torch.linspace(-1, 2, 216).reshape(shape)) for _ in range(2))
    optimizers = [LARS(torch.optim.SGD([p], lr=0.5, momentum=0.9, weight_decay=0.1), trust_coef=0.1) for p in (plain, other)]
    for step in range(4):
        plain.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        other.grad = plain.grad.clone(memory_format=torch.channels_last if step % 2 else torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
        state = optimizers[1].state[other]
        state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other, plain)


def test_mixed_dtypes_in_one_group():
    single, double = torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.full((3, 3), 2.0).double())
    single.grad, double.grad = torch.ones_like(single), torch.ones_like(double)
    LARS(torch.optim.SGD([single, double], lr=1.0), eps=0.0, trust_coef=0.25).step()  # each ratio 0.25 * 2
    torch.testing.assert_close(single.detach(), torch.full_like(single, 1.5))
    torch.testing.assert_close(double.detach(), torch.full_like(double, 1.5))


def test_closure_is_evaluated_once_and_before_the_ratios():
    (weight, twin) = (torch.nn.Parameter(torch.tensor([[3.0, 4.0]])) for _ in range(2))
    optimizer, plain = (LARS(torch.optim.SGD([p], lr=1.0, weight_decay=0.1), trust_coef=0.1) for p in (weight, twin))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = weight.pow(2).sum()
        loss.backward()
        return loss

    weight.grad = torch.full_like(weight, 1e6)  # of an earlier step: must not count
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 25.0
    twin.pow(2).sum().backward()
    assert plain.step() is None
    assert torch.equal(weight, twin)
    assert not torch.equal(weight, torch.tensor([[3.0, 4.0]]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    parameters = make_parameters()
    optimizer = LARS(torch.optim.SGD(parameters, lr=0.1))
    take_steps(optimizer, parameters, [0])
    optimizer.zero_grad(set_to_none=set_to_none)
    assert [None if p.grad is None else p.grad.abs().sum().item() for p in parameters] == [None if set_to_none else 0.0] * 4


@pytest.mark.parametrize("name", INNER)
def test_state_dict_round_trip(name, tmp_path):
    parameters = make_parameters()
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "adapt": False}]
    optimizer = LARS(INNER[name](groups), trust_coef=0.02)
    take_steps(optimizer, parameters, range(3))
    torch.save({"weights": parameters, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    others = [torch.nn.Parameter(w.detach()) for w in saved["weights"]]
    other = LARS(INNER[name]([{"params": others[:2]}, {"params": others[2:]}]), trust_coef=0.5)
    other.load_state_dict(saved["optimizer"])
    kept = ("weight_decay", "trust_coef", "adapt")
    assert [[g[k] for k in kept] for g in other.param_groups] == [[g[k] for k in kept] for g in optimizer.param_groups]
    take_steps(optimizer, parameters, range(3, 6))
    take_steps(other, others, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_a_state_that_does_not_say_what_is_adapted_leaves_it_as_it_is():
    parameters, others = make_parameters(), make_parameters()
    plain = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.5)
    groups = [{"params": others[:2], "trust_coef": 0.3}, {"params": others[2:], "adapt": False}]
    optimizer = LARS(torch.optim.SGD(groups, lr=0.1))
    optimizer.load_state_dict(plain.state_dict())
    assert [(group["lr"], group["trust_coef"], group["adapt"]) for group in optimizer.param_groups] == [
        (0.5, 0.3, True),
        (0.5, 0.001, False),
    ]


def test_loads_the_state_of_the_wrapped_optimizer_alone():
    parameters, others = make_parameters(), make_parameters()
    plain = INNER["sgd"](parameters)
    take_steps(plain, parameters, range(2))
    optimizer = LARS(INNER["sgd"](others))
    optimizer.load_state_dict(plain.state_dict())
    take_steps(optimizer, others, [2])
    assert optimizer.param_groups[0]["trust_coef"] == 0.001
    assert len(optimizer.state) == len(others)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", INNER)
def test_copies_go_on_alike_and_apart(name, copied):
    parameters = make_parameters()
    optimizer = LARS(INNER[name](parameters, weight_decay=0.1), eps=1e-4, trust_coef=0.02)
    take_steps(optimizer, parameters, range(3))
    others, other = copied((parameters, optimizer))
    before = [p.detach().clone() for p in parameters]
    take_steps(other, others, [3])
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    take_steps(optimizer, parameters, [3])
    assert all(torch.equal(p, o) and not torch.equal(p, b) for p, o, b in zip(parameters, others, before, strict=True))


def test_add_param_group():
    parameters = make_parameters()
    optimizer = LARS(torch.optim.SGD(parameters[:1], lr=1.0), eps=0.0, trust_coef=0.25)
    late, left_out = (torch.nn.Parameter(torch.full((2, 2), 2.0)) for _ in range(2))
    optimizer.add_param_group({"params": [late]})
    optimizer.add_param_group({"params": [left_out], "adapt": False, "lr": 0.5})
    assert len(optimizer.param_groups) == 3
    for parameter in (late, left_out):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((2, 2), 1.5))
    torch.testing.assert_close(left_out.detach(), torch.full((2, 2), 1.5))


def test_shares_groups_state_and_defaults_with_the_wrapped_optimizer():
    inner = INNER["sgd"](make_parameters())
    optimizer = LARS(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "SGD" in repr(optimizer)
    assert "trust_coef=0.001" in repr(optimizer)


def test_schedulers_of_torch_drive_it():
    parameters = make_parameters()
    optimizer = LARS(torch.optim.SGD(parameters, lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    lrs = []
    for step in range(6):
        lrs.append(optimizer.param_groups[0]["lr"])
        take_steps(optimizer, parameters, [step])
        scheduler.step()
    assert lrs == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_step_hooks_run():
    parameters, seen = make_parameters(), []
    optimizer = LARS(torch.optim.SGD(parameters, lr=1.0))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    take_steps(optimizer, parameters, [0])
    assert seen == ["before", "after"]


class Failing(torch.optim.SGD):
    """An optimizer whose step fails."""

    def step(self, closure=None):
        raise OSError("no such device")


def test_weight_decay_of_the_groups_stays():
    parameters = make_parameters()
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]
    optimizer = LARS(torch.optim.SGD(groups, lr=0.1, weight_decay=0.2))
    take_steps(optimizer, parameters, range(2))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.2]


def test_weight_decay_of_the_groups_stays_where_the_wrapped_step_fails():
    parameters = make_parameters()
    optimizer = LARS(Failing(parameters, lr=0.1, weight_decay=0.2))
    with pytest.raises(OSError, match="no such device"):
        take_steps(optimizer, parameters, [0])
    assert optimizer.param_groups[0]["weight_decay"] == 0.2


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = LARS(torch.optim.SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
        ({"trust_coef": 0.0}, ValueError, "trust_coef=0.0"),
        ({"trust_coef": float("inf")}, ValueError, "trust_coef=inf"),
        ({"optimizer": "sgd"}, TypeError, "optimizer='sgd'"),
        ({"optimizer": torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))])}, TypeError, "LBFGS"),
        (
            {"optimizer": torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "trust_coef": -2.0}], lr=1.0)},
            ValueError,
            "trust_coef=-2.0",
        ),
    ],
)
def test_bad_arguments(arguments, error, named):
    good = {"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)}
    with pytest.raises(error, match=named):
        LARS(**(good | arguments))


def test_it_is_timms_lars():
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    arguments = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.02, "nesterov": True}
    take_steps(LARS(torch.optim.SGD(parameters, **arguments), trust_coef=0.01), parameters, range(6))
    take_steps(timm.optim.Lars(twins, trust_coeff=0.01, always_adapt=True, **arguments), twins, range(6))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "fused": True},
    ],
    ids=str,
)
def test_every_path_takes_the_same_steps(arguments, dtype):
    """SGD's kernel parameter by parameter, the gradients scaled one by one, and all at a time."""
    runs = []
    for path in ("kernel", "one by one", "all at a time"):
        parameters = make_parameters(dtype)
        groups = [
            {"params": parameters[:2], "weight_decay": 0.05},
            {"params": parameters[2:3], "adapt": False},
            {"params": parameters[3:]},
        ]
        optimizer = LARS(torch.optim.SGD(groups, lr=0.5, **arguments), trust_coef=0.1, foreach=path == "all at a time" or None)
        if path == "one by one":
            optimizer.optim.register_step_post_hook(lambda *_: None)
        assert (optimizer._engine() is cpu) == (path == "kernel")
        take_steps(optimizer, parameters, range(2))
        for parameter, gradient in zip(parameters, make_gradients(2, dtype), strict=True):
            parameter.grad = gradient
        parameters[1].grad = None
        optimizer.step()
        take_steps(optimizer, parameters, [3])
        runs.append((parameters, optimizer))
    for parameters, optimizer in runs[1:]:
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for parameter, reference in zip(parameters, runs[0][0], strict=True):
            torch.testing.assert_close(parameter, reference, rtol=tolerance, atol=tolerance)
            state, expected = optimizer.state.get(parameter, {}), runs[0][1].state.get(reference, {})
            assert {k for k, v in state.items() if v is not None} == {k for k, v in expected.items() if v is not None}
        for layer, reference in zip(optimizer.layer_stats(), runs[0][1].layer_stats(), strict=True):
            assert layer.name == reference.name
            assert layer[1:] == pytest.approx(reference[1:], rel=tolerance)


def test_the_decay_shrinks_the_weights_of_an_optimizer_that_maximizes():
    for foreach in (None, True):
        weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        weight.grad = torch.tensor([[0.0, 1.0]])
        LARS(torch.optim.SGD([weight], lr=1.0, weight_decay=0.2, maximize=True), eps=0.0, trust_coef=0.1, foreach=foreach).step()
        torch.testing.assert_close(weight.detach(), torch.tensor([[3 - 0.25 * 0.6, 4 - 0.25 * (0.8 - 1.0)]]))


def test_a_batch_is_of_one_dtype():
    tensors = [torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(4)]
    single, double = batches(tensors, [tensor + 1 for tensor in tensors])
    assert [tensor.numel() for tensor in single.params] == [2, 4]
    assert [tensor.numel() for tensor in double.params] == [3]
    for batch in (single, double):
        assert all(torch.equal(own, tensor) for own, tensor in zip(batch.columns[0], batch.params, strict=True))
        assert all(torch.equal(other, tensor + 1) for other, tensor in zip(batch.columns[1], batch.params, strict=True))
    assert batches([], []) == []


def test_autograd_knows_of_the_step():
    """A graph whose weights were stepped in between is refused, as with torch's own optimizers."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    optimizer = LARS(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    loss = model(torch.ones(2, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layer_stats():
    named = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        named[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        named[1].weight.zero_()
    groups = [
        {"params": [named[0].weight], "param_names": ["first.weight"], "weight_decay": 0.2},
        {"params": [torch.nn.Parameter(torch.ones(2))], "param_names": ["left_out"], "adapt": False},
        {"params": [named[1].weight, torch.nn.Parameter(torch.ones(1))], "param_names": ["last.weight", "without gradient"]},
    ]
    optimizer = LARS(torch.optim.SGD(groups, lr=1.0), eps=0.0, trust_coef=0.1)
    assert optimizer.layer_stats() == []
    named[0].weight.grad = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    groups[1]["params"][0].grad = torch.ones(2)
    named[1].weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    assert optimizer.layer_stats() == [
        ("first.weight", 5.0, 1.0, pytest.approx(0.1 * 5 / (1 + 0.2 * 5))),
        ("last.weight", 0.0, 5.0, 1.0),
    ]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.layer_stats() == []


def test_a_loss_scale_is_taken_off_before_the_norms():
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, plain = (LARS(torch.optim.SGD(ps, lr=0.5, momentum=0.9), trust_coef=0.1) for ps in (parameters, twins))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for parameter, twin, gradient in zip(parameters, twins, make_gradients(step, torch.float32), strict=True):
            parameter.grad = scaler.scale(gradient.clone()) if step != 2 else torch.full_like(gradient, float("inf"))
            twin.grad = gradient
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            plain.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


def test_gradients_that_overflow_or_are_no_numbers_raise_nothing():
    for value in (float("inf"), float("nan")):
        for foreach in (None, True):
            parameters = make_parameters(torch.float32)
            optimizer = LARS(torch.optim.SGD(parameters, lr=0.5, momentum=0.9), foreach=foreach)
            parameters[0].grad = torch.full_like(parameters[0], value)
            parameters[1].grad = torch.ones_like(parameters[1])
            optimizer.step()
            assert not parameters[0].isfinite().any()
            assert parameters[1].isfinite().all()


def test_a_scheduler_of_the_wrapped_optimizer_sees_its_steps():
    parameters = make_parameters()
    optimizer = LARS(torch.optim.SGD(parameters, lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optim, step_size=1, gamma=0.1)
    take_steps(optimizer, parameters, [0])
    scheduler.step()  # warns, which is an error here, where no step was seen
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_ratio_beyond_the_range_of_half_precision():
    for foreach in (None, True):
        weight = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.float16))
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, 0] = 6e-7  # ratio 0.001 * 100 / 6e-7, above the largest float16
        LARS(torch.optim.SGD([weight], lr=1.0), foreach=foreach).step()
        torch.testing.assert_close(weight[0, :2].detach().double(), torch.tensor([0.9, 1.0]).double(), rtol=0.03, atol=0)


def test_the_default_dtype_changes_nothing():
    runs = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            parameters = make_parameters(torch.float32)
            take_steps(LARS(torch.optim.SGD(parameters, lr=0.5, momentum=0.9)), parameters, range(3))
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_norm_of_many_equal_elements():
    weight = torch.nn.Parameter(torch.full((30_000_000,), 0.1))
    weight.grad = torch.full_like(weight, 0.1)
    optimizer = LARS(torch.optim.SGD([weight], lr=0.0))
    optimizer.step()
    assert optimizer.layer_stats()[0].weight_norm == pytest.approx(0.1 * 30_000_000**0.5, rel=1e-3)


def test_a_model_that_changes_its_dtype_after_a_step():
    parameters = make_parameters(torch.float32)
    optimizer = LARS(torch.optim.SGD(parameters, lr=0.5, momentum=0.9))
    take_steps(optimizer, parameters, range(2))
    for parameter in parameters:
        parameter.data = parameter.data.double()
    before = [parameter.detach().clone() for parameter in parameters]
    take_steps(optimizer, parameters, [2])
    assert not any(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


def test_an_expanded_gradient():
    weight, twin = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    weight.grad, twin.grad = torch.ones(1, 1).expand(3, 4), torch.ones(3, 4)
    for parameter in (weight, twin):
        LARS(torch.optim.SGD([parameter], lr=0.5)).step()
    torch.testing.assert_close(weight, twin)


def test_hooks_on_saving_and_loading_run():
    optimizer, seen = LARS(torch.optim.SGD(make_parameters(), lr=1.0)), []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "saved", "loading", "loaded"]


def test_a_group_out_of_range_is_not_added():
    optimizer = LARS(torch.optim.SGD(make_parameters(), lr=1.0))
    for group, error in (({"trust_coef": -1.0}, ValueError), ({"adapt": "no"}, TypeError)):
        with pytest.raises(error, match=next(iter(group))):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **group})
    assert len(optimizer.param_groups) == 1


def test_a_default_device_is_not_that_of_the_parameters():
    parameters, twins = make_parameters(torch.float32), make_parameters(torch.float32)
    for chosen, device in ((parameters, "meta"), (twins, "cpu")):
        for optimizer in (LARS(torch.optim.SGD(chosen, lr=0.1, momentum=0.9, nesterov=True)), LAMB(chosen)):
            for parameter, gradient in zip(chosen, make_gradients(0, torch.float32), strict=True):
                parameter.grad = gradient
            with torch.device(device):
                optimizer.step()
            assert all(layer.trust_ratio > 0 for layer in optimizer.layer_stats())
            assert len(optimizer.layer_stats()) == len(chosen)
    assert all(torch.equal(p, t) for p, t in zip(parameters, twins, strict=True))
