"""Steps of the GPU's kernels against those of torch's operations: on a GPU, or interpreted with TRITON_INTERPRET=1.

Run by test_optim_device.py in a process of its own, for Triton decides between the two when it is imported.
"""

import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError

from autowu.optim import LAMB, LARS, TVLARS
from autowu.optim.batches import Batch, LayerNorms
from autowu.optim.engines import gpu
from autowu.optim.engines import triton as kernels
from autowu.optim.rules import LARS_RULE

DEVICE = torch.device("cpu" if type(kernels.norms).__module__ == "triton.runtime.interpreter" else "cuda")
SHAPES = ((64, 65), (1,), (3, 5), (2, 8, 4, 4), (4_104,), (16,), (0,), (100,))  # two blocks in the first and in the long one
FREE = ("empty", "select", "unbind", "view", "detach", "alias", "pin_memory", "_to_copy", "lift_fresh", "is_pinned")
HALF = {torch.float16: 3e-3, torch.bfloat16: 3e-2}  # what a step may be off; the interpreter truncates to bfloat16

OPTIMIZERS = {
    "lars": ("lars_sgd", lambda groups, **kw: LARS(SGD(groups, lr=0.5), trust_coef=0.1, **kw)),
    "momentum": ("lars_sgd", lambda groups, **kw: LARS(SGD(groups, lr=0.5, momentum=0.9), trust_coef=0.1, **kw)),
    "nesterov": ("lars_sgd", lambda groups, **kw: LARS(SGD(groups, lr=0.5, momentum=0.9, nesterov=True), trust_coef=0.1, **kw)),
    "dampening": ("lars_sgd", lambda groups, **kw: LARS(SGD(groups, lr=0.5, momentum=0.9, dampening=0.3), trust_coef=0.1, **kw)),
    "maximize": ("lars_sgd", lambda groups, **kw: LARS(SGD(groups, lr=0.5, maximize=True), trust_coef=0.1, **kw)),
    "tvlars": ("lars_sgd", lambda groups, **kw: TVLARS(groups, lr=0.5, eta=0.1, lmbda=0.5, delay=2, max_norm=5.0, **kw)),
    "tensor lr": ("lars_sgd", lambda groups, **kw: LARS(SGD(groups, lr=at(0.5), momentum=0.9), trust_coef=0.1, **kw)),
    "around adamw": ("lars_scale", lambda groups, **kw: LARS(AdamW(groups, lr=0.01, eps=1e-3), **kw)),
    "around sgd": ("lars_scale", lambda groups, **kw: LARS(SGD(groups, lr=0.5, maximize=True, foreach=False), **kw)),
    "lamb": ("lamb", lambda groups, **kw: LAMB(groups, lr=0.01, eps=1e-3, max_trust_ratio=1.0, **kw)),
    "uncorrected lamb": ("lamb", lambda groups, **kw: LAMB(groups, lr=0.01, eps=1e-3, bias_correction=False, **kw)),
    "lamb, tensor lr": ("lamb", lambda groups, **kw: LAMB(groups, lr=at(0.01), eps=1e-3, **kw)),
}
EVERY_KERNEL = ("nesterov", "around adamw", "lamb, tensor lr")
QUICK = {(name, dtype) for name in EVERY_KERNEL for dtype in (torch.float32, torch.bfloat16)}
# Interpreted, where each run is slow, the halves are for one of every kernel.
CASES = [
    pytest.param(name, dtype, id=f"{dtype}-{name}", marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for dtype in (torch.float32, *HALF)
    for name in OPTIMIZERS
    if dtype not in HALF or DEVICE.type == "cuda" or name in EVERY_KERNEL
]


def at(lr):
    return torch.tensor(lr, device=DEVICE)


@pytest.fixture(autouse=True)
def _numbers_of_the_device(monkeypatch):
    if DEVICE.type == "cpu":  # where a tensor would be read, as it is there to read
        monkeypatch.setattr(gpu._Launch, "number", lambda _, value: value if isinstance(value, torch.Tensor) else float(value))


def parameters(dtype):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES]
    drawn[3] = drawn[3].to(memory_format=torch.channels_last)
    drawn[5].zero_()
    drawn[7] = torch.cat((drawn[7], drawn[7]))[1:101]  # it begins at an odd address
    return [nn.Parameter(tensor) for tensor in drawn]


def take_steps(make, dtype, monkeypatch, kernels):
    """Parameters, state, stats and the kernels' functions that three steps called: with gradients missing, late, zero."""
    called = set()

    def seen(name, step):
        return lambda *args: called.add(name) or step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_works", lambda *_: kernels)
        for rule, step in gpu.STEPS.items():
            patch.setitem(gpu.STEPS, rule, seen(step.__name__, step))
        patch.setattr(gpu, "lars_scale", seen("lars_scale", gpu.lars_scale))
        params = parameters(dtype)
        own = {"weight_decay": 0.05}, {"adapt": False, "weight_decay": 0.02}, {}
        optimizer = make(
            [{"params": part, **o} for part, o in zip((params[:4], params[4:5], params[5:]), own, strict=True)], foreach=True
        )
        for step in range(3):
            generator = torch.Generator().manual_seed(100 + step)
            for param in params:
                drawn = torch.randn(param.shape, generator=generator)  # float16 holds no second moments of small ones
                param.grad = torch.empty_like(param).copy_(drawn + drawn.sign() / 4)
            if step == 0:
                params[0].grad = None
            if step == 2:
                params[2].grad = None
                params[1].grad.zero_()
            optimizer.step()
    return params, [optimizer.state.get(param, {}) for param in params], optimizer.layer_stats(), called


def assert_near(own, others, tolerance):
    """All together: single elements may be differences of much larger ones."""
    own, others = (torch.cat([tensor.detach().double().flatten() for tensor in some]) for some in (own, others))
    assert (own - others).norm() <= tolerance * others.norm() + 1e-9


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_kernels_take_the_steps_of_torchs_operations(name, dtype, monkeypatch):
    expected, make = OPTIMIZERS[name]
    tolerance = HALF.get(dtype, 1e-6)
    params, state, stats, called = take_steps(make, dtype, monkeypatch, True)
    # Float16 is too small for Adam's second moments of these gradients, however they are made.
    reference = take_steps(make, dtype if dtype in HALF else torch.float64, monkeypatch, False)
    assert (called, reference[3]) == ({expected}, set())
    assert_near(params, reference[0], tolerance)
    for own, other in zip(state, reference[1], strict=True):
        assert [key for key in own if own[key] is not None] == [key for key in other if other[key] is not None]
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"):
        own, others = ([row[key] for row in rows if row.get(key) is not None] for rows in (state, reference[1]))
        if own:
            assert_near(own, others, tolerance)
    assert [layer.name for layer in stats] == [layer.name for layer in reference[2]]
    for layer, other in zip(stats, reference[2], strict=True):
        assert layer[1:] == pytest.approx(other[1:], rel=10 * tolerance, abs=1e-9)


def test_mixed_dtypes_share_a_group(monkeypatch):
    monkeypatch.setattr(gpu, "_works", lambda *_: True)
    for make in (OPTIMIZERS["momentum"][1], OPTIMIZERS["lamb"][1]):
        weights = [nn.Parameter(torch.ones(40, device=DEVICE, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer = make([{"params": weights}], foreach=True)
        optimizer.step()
        torch.testing.assert_close(weights[1].float(), weights[0].detach(), rtol=1e-2, atol=0.0)
        assert weights[0].max() < 1
        assert [layer.name for layer in optimizer.layer_stats()] == ["0.0", "0.1"]


def test_a_nan_gets_the_ratio_one(monkeypatch):
    monkeypatch.setattr(gpu, "_works", lambda *_: True)
    for name in ("momentum", "lamb", "around adamw"):
        weight = nn.Parameter(torch.ones(5000, device=DEVICE))
        weight.grad = torch.zeros_like(weight)
        weight.grad[4500] = float("nan")
        optimizer, version = OPTIMIZERS[name][1]([weight], foreach=True), weight._version
        optimizer.step()
        assert weight._version > version  # or autograd would not notice
        assert optimizer.layer_stats()[0].trust_ratio == 1
        assert weight.isnan().sum() == 1


def takes(*columns):
    return gpu.takes(LARS_RULE, Batch(columns[0], list(columns), None))


def test_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(gpu, "_works", lambda *_: True)
    weight = torch.ones(8, 4, 1, 1, device=DEVICE)
    assert takes([weight], [torch.ones_like(weight)])
    # The stride of a dimension with one index is any.
    assert takes([weight], [torch.ones(8 * 4, device=DEVICE).as_strided((8, 4, 1, 1), (4, 1, 7, 7))])
    others = (
        torch.ones(4, 8, 1, 1, device=DEVICE).transpose(0, 1),
        torch.ones(8, 4, 1, 1, device=DEVICE, dtype=torch.float64),
        torch.ones(1, device=DEVICE).expand(8, 4, 1, 1),
        *([torch.ones(8, 4, 1, 1)] if DEVICE.type == "cuda" else []),
    )
    for other in others:
        assert not takes([weight], [other])
    assert not takes([weight.double()], [weight.double()])
    assert not takes([weight[:, ::2]], [weight[:, ::2]])
    assert not takes([], [])


def test_a_sparse_gradient_is_refused(monkeypatch):
    monkeypatch.setattr(gpu, "_works", lambda *_: True)
    for name in ("momentum", "lamb", "around adamw"):
        weight = nn.Parameter(torch.ones(4, 3, device=DEVICE))
        weight.grad = torch.ones(4, 3, device=DEVICE).to_sparse()
        with pytest.raises(RuntimeError, match="gradient of layout"):
            OPTIMIZERS[name][1]([weight], foreach=True).step()


def test_wide_loads_are_for_what_lies_right():
    even = torch.zeros(64, device=DEVICE)
    sizes = {"params": [even, even[:60], even[4:12], even[1:9]], "grads": [even[:64], even[:60], even[8:16], even[8:16]]}
    launches = {launch.even: launch.params for launch in gpu._launches(tuple(sizes.values()))}
    assert [param.data_ptr() - even.data_ptr() for param in launches[True]] == [0, 16]
    assert [param.numel() for param in launches[False]] == [60, 8]
    (launch,) = gpu._launches(([even], [even[1:]]))
    assert not launch.even


def test_a_step_that_may_be_captured_is_the_same_in_its_warm_up(monkeypatch):
    monkeypatch.setattr(gpu, "_launches", None)
    monkeypatch.setattr(gpu, "_works", lambda *_: True)
    for make in (LAMB, TVLARS, lambda params, **kw: LARS(AdamW(params, lr=kw.pop("lr"), capturable=kw.pop("capturable")), **kw)):
        weight = nn.Parameter(torch.ones(5, device=DEVICE))
        weight.grad = torch.ones_like(weight)
        if DEVICE.type == "cuda" or make in (LAMB, TVLARS):  # torch's optimizers are not capturable on the CPU
            make([weight], lr=0.1, capturable=True, foreach=True).step()
            assert weight.max() < 1


@pytest.mark.parametrize("name", ["momentum", "lamb", "uncorrected lamb"])
def test_a_step_of_many_parameters_is_a_few_dozen_launches(name, monkeypatch):
    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # What only makes tensors or views launches nothing.
            self.count += not any(word in func.name() for word in FREE)
            return func(*args, **(kwargs or {}))

    launches = [0]

    def count(self, *_, **__):
        launches[0] += 1

    monkeypatch.setattr(gpu, "_works", lambda *_: True)
    monkeypatch.setattr(gpu._Launch, "over_blocks", count)
    monkeypatch.setattr(gpu._Launch, "ratios", lambda self, *_, **__: count(self) or LayerNorms(self.params, self.ones()))
    sizes = [100 + 8 * i for i in range(54)]
    params = [nn.Parameter(torch.ones(size, device=DEVICE)) for size in sizes + sizes + sizes]
    optimizer = OPTIMIZERS[name][1]([{"params": params[:54]}, {"params": params[54:], "adapt": False}], foreach=True)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        launches[0] = 0
        with Operations() as operations:
            optimizer.step()
    # A multi-tensor operation may be several launches, each of which takes a hundred tensors or more.
    assert launches[0] <= 6
    assert operations.count <= 24


def test_they_try_themselves_first(monkeypatch):
    for default, dtype in zip((torch.float32, torch.float64, torch.bfloat16), (*HALF, torch.float32), strict=True):
        torch.set_default_dtype(default)
        try:
            gpu._try(DEVICE, dtype)
        finally:
            torch.set_default_dtype(torch.float32)
    for name in ("norms", "lars_ratios", "sgd", "scale", "moments", "lamb_ratios", "lamb"):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, type("Idle", (), {"__getitem__": lambda _, grid: lambda *args, **kw: None})())
            with pytest.raises((AssertionError, InterpreterError)):  # the latter for numbers that nobody made
                gpu._try(DEVICE, torch.float32)


def test_interpreted_kernels_are_for_no_gpu(caplog):
    gpu._works.cache_clear()
    assert not gpu._works(torch.device("cpu"), torch.float32)
    if DEVICE.type == "cpu":
        assert not gpu._works(torch.device("cuda"), torch.float32)
    assert not caplog.records


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, on which they run")
def test_that_they_fail_is_told_once(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET")
    gpu._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not gpu._works(torch.device("cuda"), torch.float32)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["LARS and LAMB"]
