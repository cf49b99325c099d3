"""The loops in C++ of compiled steps against the same in float64, on any number of threads, and a step that has to do without."""

import logging
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autowu.optim import LAMB
from autowu.optim.engines import cpu
from autowu.optim.engines.cpu_loops import build, check_cache
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


def spoiled(tmp_path, how):
    """A cache of torch's that others could write to, or replace, and the words that say so."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    if how == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        folder.rmdir()
        folder.symlink_to("real")
        os.lchown(folder, 12345, 12345)
    elif how == "owner":
        os.chown(folder, 12345, 12345)
    elif how == "group":
        os.chown(folder, -1, 12345)
        folder.chmod(0o770)
    elif how == "parent":
        tmp_path.chmod(0o777)
    else:
        folder.chmod(0o777)
    owns, writes = "belongs to user 12345", "may be written by others"
    return folder, {"link": owns, "owner": owns, "group": writes, "all": writes, "parent": "may be replaced by others"}[how]


@pytest.mark.parametrize("how", ["all", "parent", "owner", "group", "link"])
def test_a_cache_where_others_could_put_a_library_is_refused_in_one_line(tmp_path, monkeypatch, caplog, how):
    if how in ("owner", "group", "link") and os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    folder, said = spoiled(tmp_path, how)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    with caplog.at_level(logging.WARNING):
        assert type(build.__wrapped__()) is cpu.Passes
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("autowu")]
    assert said in line
    assert str(folder) in line
    assert "set TORCHINDUCTOR_CACHE_DIR" in line
    assert not list(folder.iterdir())  # nothing was built there


def test_a_cache_of_ones_own_is_taken(tmp_path):
    for mode in (0o700, 0o755):
        tmp_path.chmod(mode)
        check_cache(str(tmp_path))
    tmp_path.chmod(0o775)
    os.chown(tmp_path, -1, os.geteuid())
    check_cache(str(tmp_path))
