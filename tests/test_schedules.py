"""The formulas of the schedules: named properties and named numbers."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autowu.schedules import COOLDOWN_TYPES, STABLE_TYPES, WARMUP_TYPES, cooldown_factor, stable_factor, warmup_lr

steps = st.integers(2, 1000)
low_lrs = st.floats(1e-8, 1e-2)
spans = st.floats(1.5, 1e8)  # max_lr / min_lr
progress = st.floats(0, 1)
# Cosine is flat at 0: closer points than this are equal in float64.
apart = st.tuples(progress, progress).filter(lambda pair: pair[1] - pair[0] > 1e-6)


@pytest.mark.parametrize("warmup_type", WARMUP_TYPES)
@given(n=steps, low=low_lrs, span=spans)
@settings(max_examples=50)
def test_warmup_goes_from_min_lr_to_max_lr_and_rises_on_the_way(warmup_type, n, low, span):
    lrs = [warmup_lr(k, n, low, low * span, warmup_type) for k in range(n + 1)]
    assert lrs[0] == low
    assert lrs[-1] == pytest.approx(low * span, rel=1e-12)
    assert all(a < b for a, b in pairwise(lrs))


@given(n=steps, low=low_lrs, span=spans)
@settings(max_examples=50)
def test_exponential_warmup_has_a_constant_ratio(n, low, span):
    lrs = [warmup_lr(k, n, low, low * span, "exp") for k in range(n + 1)]
    assert [b / a for a, b in pairwise(lrs)] == pytest.approx([span ** (1 / n)] * n, rel=1e-12)


@given(n=steps, low=low_lrs, span=spans)
@settings(max_examples=50)
def test_linear_warmup_has_a_constant_difference(n, low, span):
    high = low * span
    lrs = [warmup_lr(k, n, low, high, "linear") for k in range(n + 1)]
    assert [b - a for a, b in pairwise(lrs)] == pytest.approx([(high - low) / n] * n, abs=1e-12 * high)


@pytest.mark.parametrize(
    ("warmup_type", "position", "expected"),
    [
        *(("exp", 25, 1e-4), ("exp", 37.5, 1e-4 * math.sqrt(10)), ("linear", 25, 0.2500075), ("linear", 37.5, 0.37500625)),
        *(("two_speed", 12.5, 1e-5 * 10**0.8), ("two_speed", 25, 1e-5 * 10**1.6), ("two_speed", 62.5, 1e-5 * 10**2.8)),
    ],
)
def test_warmup_numbers(warmup_type, position, expected):
    assert warmup_lr(position, 100, 1e-5, 1e-5 * 10**4 if warmup_type != "linear" else 1.0, warmup_type) == pytest.approx(expected)


@pytest.mark.parametrize("cooldown_type", COOLDOWN_TYPES)
def test_cooldown_goes_from_one_to_zero(cooldown_type):
    assert cooldown_factor(0.0, cooldown_type) == 1.0
    assert cooldown_factor(1.0, cooldown_type) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("cooldown_type", COOLDOWN_TYPES)
@given(pair=apart)
def test_cooldown_falls_strictly(cooldown_type, pair):
    assert cooldown_factor(pair[0], cooldown_type) > cooldown_factor(pair[1], cooldown_type) >= 0.0


@pytest.mark.parametrize(
    ("cooldown_type", "quarter", "half"),
    [
        ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5),
        ("half_cosine", math.cos(math.pi / 8), math.cos(math.pi / 4)),
        ("linear", 0.75, 0.5),
        ("sqrt", 0.5, 1 - math.sqrt(0.5)),
    ],
)
def test_cooldown_numbers(cooldown_type, quarter, half):
    assert cooldown_factor(0.25, cooldown_type) == pytest.approx(quarter, rel=1e-12)
    assert cooldown_factor(0.5, cooldown_type) == pytest.approx(half, rel=1e-12)


@given(age=st.floats(0, 1e9))
def test_a_stable_factor_is_held_or_falls_with_the_root_from_an_age_of_one_on(age):
    assert stable_factor(age) == stable_factor(age, "constant") == 1.0
    assert stable_factor(age, "inverse_sqrt") == (1.0 if age <= 1 else pytest.approx(math.sqrt(1 / age), rel=1e-12))


@given(u=progress)
def test_cosine_is_symmetric(u):
    assert cooldown_factor(u, "cosine") + cooldown_factor(1 - u, "cosine") == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("n", [8, 100, 1001])
def test_two_speeds_pass_two_fifths_of_the_decades_in_a_quarter_and_keep_to_two_paces(n):
    decades = [math.log10(warmup_lr(k, n, 1e-4, 10.0, "two_speed") / 1e-4) for k in range(n + 1)]
    paces = [(b - a) * n / 5 for a, b in pairwise(decades)]
    quarter = n // 4
    assert warmup_lr(n / 4, n, 1e-4, 10.0, "two_speed") == pytest.approx(1e-2)
    assert paces[:quarter] == pytest.approx([1.6] * quarter)
    assert paces[-(n - quarter - 1) :] == pytest.approx([0.8] * (n - quarter - 1))


def test_all_documented_types_are_there():
    assert set(WARMUP_TYPES) == {"exp", "linear", "two_speed"}
    assert set(STABLE_TYPES) == {"constant", "inverse_sqrt"}
    assert set(COOLDOWN_TYPES) == {"cosine", "half_cosine", "linear", "sqrt"}
