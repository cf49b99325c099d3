"""The loops in C++ of compiled steps against the same in float64, on any number of threads, and a step that has to do without."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autowu.optim import LAMB
from autowu.optim.engines.cpu_loops import build
from autowu.optim.rules import LambNumbers

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA:UserWarning")
sizes = st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 4096, 32768, 32769, 100_003]))


def draw(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def lamb_update(tensors, step=3.0, correct=True):
    """Norms that the loop returns; what it makes is in the tensors: weight, gradient, both moments, update."""
    count = torch.tensor(step if correct else float("inf"))
    return build().lamb_update(*tensors, count, LambNumbers(0.1, 0.9, 0.99, 1e-4, 0.1, 10.0, correct, True))


@settings(deadline=None, max_examples=40)
@given(sizes)
def test_norms(size):
    weight, grad = draw(size, 2)
    assert build().norms(weight, grad) == pytest.approx((float(weight.double().norm()), float(grad.double().norm())), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(sizes, st.booleans(), st.integers(1, 1000))
def test_the_update_of_lamb(size, correct, step):
    weight, grad, first, second, update = draw(size, 5)
    second.square_()
    w, g, m, v = (tensor.double() for tensor in (weight, grad, first, second))
    norms = lamb_update([weight, grad, first, second, update], step, correct)
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    corrected = (m / (1 - 0.9**step), v / (1 - 0.99**step)) if correct else (m, v)
    expected = -(corrected[0] / (corrected[1].sqrt() + 1e-4) + 0.1 * w)
    torch.testing.assert_close(first, m.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second, v.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(update, expected.float(), rtol=1e-4, atol=1e-5)
    assert norms == pytest.approx((float(w.norm()), float(expected.norm())), rel=1e-5)


def test_the_threads_change_no_bit():
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            weight, grad, first, second, update = draw(300_007, 5)
            second.square_()
            results.append((build().norms(weight, grad), lamb_update([weight, grad, first, second, update]), update))
        finally:
            torch.set_num_threads(before)
    for norms, others, update in results[1:]:
        assert (norms, others) == results[0][:2]
        assert torch.equal(update, results[0][2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_seen(bad):
    weight, grad = draw(5000, 2)
    grad[4321] = bad
    assert not torch.tensor(build().norms(weight, grad)[1]).isfinite()


# Torch's own warnings while it compiles.
@pytest.mark.filterwarnings("ignore")
def test_without_a_compiler_for_them_the_step_is_the_eager_one(monkeypatch, caplog):
    def no_compiler(source):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", no_compiler)
    torch._dynamo.reset()
    build.cache_clear()
    try:
        weights = []
        for compiled in (False, True):
            (weight, *gradients) = draw((50, 30), 4)
            parameter = nn.Parameter(weight)
            optimizer = LAMB([parameter], lr=torch.tensor(0.1), weight_decay=0.1)
            step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
            with caplog.at_level(logging.WARNING, logger="autowu"):
                for gradient in gradients:
                    parameter.grad = gradient
                    step()
            weights.append(parameter.detach())
        assert torch.equal(*weights)
        assert [record.getMessage() for record in caplog.records if "C++" in record.getMessage()] == [
            "LARS and LAMB: torch could not build their loops in C++, compiled steps are slower without: no compiler"
        ]
    finally:
        build.cache_clear()
