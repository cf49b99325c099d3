"""What the history keeps of the losses: the same sums at any cadence, on a bounded memory, through a save and a restore."""

import gc
import io
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autowu.history import MISSING, LossHistory

FIELDS = ("positions", "sums", "squares", "counts", "anchor")

finite_losses = st.floats(-100, 100).map(lambda v: round(v, 3))
any_losses = st.one_of(finite_losses, st.sampled_from([math.nan, math.inf, -math.inf]))
# Each loss comes with whether a test, which folds the staged losses, follows it.
appends = st.lists(st.tuples(any_losses, st.booleans()), min_size=1, max_size=150)
max_points = st.sampled_from([2, 8, 10, None])


def mean(history):
    total, count = history.total().tolist()
    return total / count if count else math.nan


def filled(losses, **kwargs):
    history = LossHistory(**kwargs)
    for loss in losses:
        history.append(loss)
    return history


def assert_same_curve(curve, other):
    """Bit for bit."""
    for name in FIELDS:
        assert torch.equal(getattr(curve, name).nan_to_num(-1.0), getattr(other, name).nan_to_num(-1.0))
    assert (curve.end, curve.resolution) == (other.end, other.resolution)


def saved_and_loaded(history):
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    return LossHistory.from_state_dict(torch.load(file, weights_only=True))


def expected_bins(losses, max_points, anchor):
    """Positions (in steps), sums, squares, counts and width of the bins of a list of losses less `anchor`."""
    width = 1
    while max_points is not None and len(losses) > width * max_points:
        width *= 2
    rows = []
    for start in range(0, len(losses), width):
        inside = losses[start : start + width]
        kept = np.array([v - anchor for v in inside if math.isfinite(v)])
        rows.append((start + (len(inside) - 1) / 2, kept.sum(), (kept**2).sum(), len(kept)))
    return np.array(rows).T, width


@given(appends=appends, max_points=max_points)
@settings(deadline=None, max_examples=60)
def test_bins_hold_the_sums_of_their_losses_at_any_cadence_of_tests(appends, max_points):
    history = LossHistory(max_points)
    for loss, test in appends:
        history.append(loss)
        if test:
            history.curve(warmup_steps=200)
    losses = [loss for loss, _ in appends]
    curve = history.curve(warmup_steps=200)
    anchor = float(curve.anchor)
    (positions, sums, squares, counts), width = expected_bins(losses, max_points, anchor)
    np.testing.assert_allclose(curve.positions, positions / 200, rtol=1e-12)
    np.testing.assert_array_equal(curve.counts, counts)
    # It is one of the losses; where there is none it is NaN.
    assert anchor in losses or not any(math.isfinite(v) for v in losses)
    np.testing.assert_allclose(curve.sums, sums, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(curve.squares, squares, rtol=1e-12, atol=1e-9)
    assert curve.end == len(losses) / 200
    assert curve.resolution == width / 200
    assert history.steps == len(losses)


@pytest.mark.parametrize("max_points", [8, 1000, 2048, None])
@pytest.mark.parametrize("n", [1023, 1024, 1025, 2048, 2049, 5000])
def test_bins_when_the_staging_buffer_runs_full(n, max_points):
    losses = np.random.default_rng(n).normal(3, 1, n).tolist()
    curve = filled(losses, max_points=max_points).curve(n)
    (positions, sums, squares, counts), _ = expected_bins(losses, max_points, float(curve.anchor))
    np.testing.assert_allclose(curve.positions, positions / n, rtol=1e-12)
    np.testing.assert_array_equal(curve.counts, counts)
    np.testing.assert_allclose(curve.sums, sums, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(curve.squares, squares, rtol=1e-9, atol=1e-9)


def test_a_large_constant_in_the_loss_costs_no_precision():
    losses = np.random.default_rng(0).normal(0, 1e-3, 100)
    plain = filled(losses.tolist(), max_points=8).curve(100)
    shifted = filled((losses + 1e6).tolist(), max_points=8).curve(100)
    np.testing.assert_allclose(shifted.squares, plain.squares, rtol=1e-5)
    np.testing.assert_allclose(shifted.finite()[1] - 1e6, plain.finite()[1], atol=1e-9)


def test_memory_stops_growing():
    def stored(history):
        return history.state_dict()["losses"].numel()

    history = filled([1.0] * 5000, max_points=64)
    for _ in range(20_000):
        history.append(1.0)
        assert stored(history) <= 1 + 3 * 64 + 1024
    assert len(history.curve(25_000).positions) <= 64
    assert stored(filled([1.0] * 5000, max_points=None)) > 4000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_of_one_element_count_as_their_value(dtype, shape, requires_grad):
    losses = [torch.full(shape, v, dtype=dtype, requires_grad=requires_grad) for v in (2.5, 1.25, 0.1)]
    from_tensors = filled(losses).curve(10)
    assert_same_curve(from_tensors, filled([loss.item() for loss in losses]).curve(10))
    assert not from_tensors.sums.requires_grad
    assert from_tensors.sums.dtype == torch.float64


def test_floats_and_tensors_mix():
    mixed = filled([2.0, torch.tensor(1.5), torch.tensor([1.0], dtype=torch.float16), np.float64(0.5), np.float32(0.25)])
    assert_same_curve(mixed.curve(10), filled([2.0, 1.5, 1.0, 0.5, 0.25]).curve(10))


def test_the_graph_is_not_kept_alive():
    weight = torch.ones(3, requires_grad=True)
    activation = weight * 2
    loss = activation.square().sum()
    history = filled([loss])
    dead = [weakref.ref(activation), weakref.ref(loss)]
    del activation, loss
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert mean(history) == 12.0


def test_a_loss_changed_in_place_after_its_append_leaves_the_history_as_it_was():
    loss = torch.tensor(2.0)
    history = filled([loss])
    loss.fill_(99.0)
    history.append(loss.fill_(1.0))
    loss.zero_()
    assert mean(history) == 1.5


def test_appending_and_folding_change_no_curve_given_out():
    history = filled([3.0, 2.0, 1.0], max_points=4)
    curve = history.curve(100)
    before = {name: getattr(curve, name).clone() for name in FIELDS}
    for _ in range(50):
        history.append(7.0)
        history.curve(100)
    for name in FIELDS:
        assert torch.equal(getattr(curve, name), before[name])


def test_a_history_without_a_finite_loss():
    history = filled([math.nan, math.inf, -math.inf])
    curve = history.curve(10)
    assert curve.counts.tolist() == [0, 0, 0]
    assert curve.sums.tolist() == [0, 0, 0]
    assert curve.finite()[0].numel() == 0
    assert math.isnan(mean(history))
    history.append(4.0)
    positions, losses = history.curve(10).finite()
    assert (positions.tolist(), losses.tolist()) == ([0.3], [4.0])


def test_no_loss_at_all():
    curve = LossHistory().curve(10)
    assert curve.positions.numel() == 0
    assert curve.end == 0
    assert math.isnan(mean(LossHistory()))


@given(appends=appends, count=st.integers(1, 60), max_points=max_points)
@settings(deadline=None, max_examples=150)
def test_the_last_losses_are_those_that_were_not_merged(appends, count, max_points):
    history, since = LossHistory(max_points), 0
    for loss, test in appends:
        history.append(loss)
        since += 1
        if test:
            history.fold()
            since = 0
    kept = since if history._width > 1 else len(appends)
    losses = [loss for loss, _ in appends][len(appends) - min(count, kept) :]
    expected = [loss if math.isfinite(loss) else math.nan for loss in losses]
    last = history.last(count)
    assert torch.where(last.isfinite(), last, torch.nan).tolist() == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(losses=st.lists(any_losses, max_size=100), max_points=max_points)
@settings(deadline=None, max_examples=100)
def test_mean_is_that_of_the_finite_losses(losses, max_points):
    finite = [v for v in losses if math.isfinite(v)]
    expected = np.mean(finite) if finite else math.nan
    assert mean(filled(losses, max_points=max_points)) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(appends=appends, cuts=st.sets(st.integers(0, 150), max_size=4), max_points=max_points)
@settings(deadline=None, max_examples=150)
def test_a_cut_run_goes_on_bit_for_bit_as_one_uncut(appends, cuts, max_points):
    uncut, cut = LossHistory(max_points), LossHistory(max_points)
    for k, (loss, test) in enumerate(appends):
        uncut.append(loss)
        if k in cuts:
            cut = saved_and_loaded(cut)
        cut.append(loss)
        if test:
            assert_same_curve(cut.curve(200), uncut.curve(200))
    assert_same_curve(saved_and_loaded(cut).curve(200), uncut.curve(200))


@pytest.mark.parametrize("max_points", [8, 2048, None])
@pytest.mark.parametrize("saved_at", [0, 1, 1023, 1024, 1025, 2500])
def test_a_run_cut_about_a_full_staging_buffer(saved_at, max_points):
    losses = np.random.default_rng(1).normal(size=4000).tolist()
    cut = saved_and_loaded(filled(losses[:saved_at], max_points=max_points))
    for loss in losses[saved_at:]:
        cut.append(loss)
    assert_same_curve(cut.curve(4000), filled(losses, max_points=max_points).curve(4000))


@given(appends=appends, max_points=max_points)
@settings(deadline=None, max_examples=50)
def test_saving_changes_nothing(appends, max_points):
    watched, plain = LossHistory(max_points), LossHistory(max_points)
    for loss, test in appends:
        watched.append(loss)
        plain.append(loss)
        watched.state_dict()
        if test:
            assert_same_curve(watched.curve(200), plain.curve(200))
    assert_same_curve(watched.curve(200), plain.curve(200))


def test_a_saved_state_is_a_copy():
    history = filled([3.0, 2.0])
    state = history.state_dict()
    for loss in (9.0, 9.0):
        history.append(loss)
    history.curve(10)
    restored = LossHistory.from_state_dict(state)
    restored.append(1.0)
    assert mean(restored) == 2.0
    assert mean(LossHistory.from_state_dict(state)) == 2.5


def test_nothing_on_the_way_to_a_clipped_curve_reads_a_value_on_the_host():
    history = LossHistory(max_points=8)
    loss = torch.empty((), device="meta")  # a tensor without values: to read one raises
    for _ in range(50):
        history.append(loss)
        curve = history.curve(100).clipped()
    history.append(1.0)
    assert history.device.type == "meta"
    assert curve.sums.shape == (7,)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        curve.sums.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_synchronises_with_a_gpu():
    losses = torch.linspace(2, 1, 3000, device="cuda")
    history = LossHistory(max_points=64)
    history.append(1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(3000):
            history.append(losses[k])
        history.append(0.5)
        history.curve(4000).clipped()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert history.device.type == "cuda"
    expected = filled([1.0, *losses.tolist(), 0.5], max_points=64)
    torch.testing.assert_close(history.curve(4000).sums.cpu(), expected.curve(4000).sums)
    ours, loaded = history.curve(4000), saved_and_loaded(history).curve(4000)
    for name in FIELDS:  # the host divides where a GPU multiplies by the reciprocal
        torch.testing.assert_close(getattr(ours, name).cpu(), getattr(loaded, name), rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("folds", [(), (1,), (2, 5)])
def test_the_mean_is_that_of_the_finite_losses_and_folds_nothing(folds):
    history = LossHistory()
    losses = [3.0, math.nan, 1.0, MISSING, 2.5, math.inf, 1e3]
    for step, loss in enumerate(losses):
        history.append(loss)
        finite = [value for value in losses[: step + 1] if math.isfinite(value)]
        assert float(history.mean()) == pytest.approx(sum(finite) / len(finite))
        if step in folds:
            history.fold()
    assert len(history.staged) == len(losses) - max((fold + 1 for fold in folds), default=0)
    assert LossHistory().mean().isnan()
