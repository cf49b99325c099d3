"""The LR range of a warm-up by the optimizer's family, for optimizers as users make them."""

import pytest
import torch

from autowu import AutoWU
from autowu.families import LR_RANGES, family, lr_range, peak_factor, peak_lag
from autowu.kin import chain
from autowu.optim import LARS


def parameters():
    return torch.nn.Linear(3, 2).parameters()


def timm_optimizer(name):
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(torch.nn.Linear(3, 2), opt=name, lr=0.1)


class HouseAdamW(torch.optim.AdamW):
    """A user's own optimizer."""


class Drift(torch.optim.Optimizer):
    """An optimizer that nobody has heard of."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        return None


class Wrapper(torch.optim.Optimizer):
    """Holds the optimizer that takes the steps under a name of its own, as SAM does under `base_optimizer`."""

    def __init__(self, inner, name="base_optimizer", own=False):
        super().__init__([dict(group) for group in inner.param_groups] if own else inner.param_groups, {})
        setattr(self, name, inner)


def sam(inner, **options):
    return lambda: Wrapper(inner(parameters(), lr=0.1), **options)


NAMES = ("base_optimizer", "inner_optimizer", "_optimizer", "optim", "optimizer", "base", "_inner", "wrapped_opt")


OPTIMIZERS = {
    **{f"SGD as {name}": (sam(torch.optim.SGD, name=name), "sgd") for name in NAMES},
    "AdamW in a wrapper with groups of its own": (sam(torch.optim.AdamW, own=True), "adam"),
    "LARS in a wrapper": (lambda: Wrapper(LARS(torch.optim.SGD(parameters(), lr=0.1))), "lars"),
    "a wrapper in a wrapper": (lambda: Wrapper(sam(torch.optim.Adam)(), name="outer"), "adam"),
    "LARS around a wrapper": (lambda: LARS(sam(torch.optim.SGD)()), "lars"),
    "a known name around SGD": (lambda: type("AdamW", (Wrapper,), {})(torch.optim.SGD(parameters(), lr=0.1)), "sgd"),
    "torch SGD": (lambda: torch.optim.SGD(parameters(), lr=0.1), "sgd"),
    "torch Adam": (lambda: torch.optim.Adam(parameters()), "adam"),
    "torch AdamW": (lambda: torch.optim.AdamW(parameters()), "adam"),
    "torch NAdam": (lambda: torch.optim.NAdam(parameters()), "adam"),
    "torch RMSprop": (lambda: torch.optim.RMSprop(parameters()), "adam"),
    "timm sgd": (lambda: timm_optimizer("sgd"), "sgd"),
    "timm adamw": (lambda: timm_optimizer("adamw"), "adam"),
    "timm adamp": (lambda: timm_optimizer("adamp"), "adam"),
    "timm lamb": (lambda: timm_optimizer("lamb"), "lamb"),
    "timm lars": (lambda: timm_optimizer("lars"), "lars"),
    "LARS around SGD": (lambda: LARS(torch.optim.SGD(parameters(), lr=0.1)), "lars"),
    "LARS around a subclass of SGD": (lambda: LARS(timm_optimizer("sgdp")), "lars"),
    "LARS around AdamW": (lambda: LARS(torch.optim.AdamW(parameters())), "adam"),
    "a subclass of AdamW": (lambda: HouseAdamW(parameters()), "adam"),
    "an unknown class": (lambda: Drift(parameters()), "unknown"),
    "torch Adadelta": (lambda: torch.optim.Adadelta(parameters()), "unknown"),
}


@pytest.mark.parametrize(("make", "expected"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_family_and_range(make, expected):
    optimizer = make()
    assert family(optimizer) == expected
    assert lr_range(optimizer) == LR_RANGES[expected]


@pytest.mark.parametrize(("make", "expected"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scheduler_takes_the_range_of_the_family(make, expected):
    scheduler = AutoWU(make(), total_steps=100)
    assert (scheduler.lr_at(0), scheduler.config.max_lr) == LR_RANGES[expected]


def test_a_given_end_of_the_range_wins_over_the_table():
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    assert AutoWU(optimizer, total_steps=100, min_lr=1e-3).config.min_lr == 1e-3
    assert AutoWU(optimizer, total_steps=100, min_lr=1e-3).config.max_lr == LR_RANGES["sgd"][1]
    assert AutoWU(optimizer, total_steps=100, max_lr=0.5).config.max_lr == 0.5
    assert AutoWU(optimizer, total_steps=100, max_lr=0.5).config.min_lr == LR_RANGES["sgd"][0]


def test_the_published_range_is_the_same_for_every_family():
    for optimizer in (torch.optim.SGD(parameters(), lr=0.1), torch.optim.AdamW(parameters())):
        config = AutoWU.paper(optimizer, 10, 10).config
        assert (config.min_lr, config.max_lr) == (1e-5, 1.0)


def test_every_range_is_one():
    assert set(LR_RANGES) == {"sgd", "adam", "lars", "lamb", "unknown"}
    assert all(0 < low < high for low, high in LR_RANGES.values())


@pytest.mark.parametrize(
    ("make", "factor", "lag"),
    [
        (lambda: torch.optim.SGD(parameters(), lr=0.1), 0.4, 0.0),
        (lambda: torch.optim.SGD(parameters(), lr=0.1, momentum=0.75, nesterov=True), 0.4, 3.0),
        (lambda: torch.optim.Adam(parameters(), betas=(0.95, 0.999)), 0.4, 19.0),
        (lambda: torch.optim.RMSprop(parameters(), momentum=0.5), 0.4, 1.0),
        (lambda: LARS(torch.optim.AdamW(parameters())), 0.4, 9.0),
        (lambda: LARS(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)), 0.4, 0.0),
        (lambda: timm_optimizer("lamb"), 0.1, 0.0),
        (lambda: timm_optimizer("adafactor"), 0.4, 0.0),  # has betas that are None
        (lambda: Drift(parameters()), 0.4, 0.0),
    ],
)
def test_peak_factor_and_lag(make, factor, lag):
    optimizer = make()
    assert peak_factor(optimizer) == factor
    assert peak_lag(optimizer) == pytest.approx(lag)


@pytest.mark.parametrize(
    ("make", "factors"),
    [
        (lambda: torch.optim.SGD(parameters(), lr=0.1), (0.4, 0.4, 0.6, 0.8, 0.8)),
        (lambda: torch.optim.AdamW(parameters()), (0.4,) * 5),
        (lambda: LARS(torch.optim.SGD(parameters(), lr=0.1)), (0.4,) * 5),
        (lambda: timm_optimizer("lamb"), (0.1,) * 5),
    ],
)
def test_in_long_runs_of_sgd_the_peak_is_nearer_to_the_edge(make, factors):
    assert [peak_factor(make(), steps) for steps in (10, 2000, 3000, 4000, 10**6)] == pytest.approx(factors)
    assert AutoWU(make(), steps_per_epoch=1000, total_epochs=50).config.peak_factor == pytest.approx(factors[-1], rel=0.05)


def test_the_peak_of_a_run_with_a_budget_is_that_of_one_of_its_length():
    weight = torch.nn.Parameter(torch.zeros(1))
    scheduler = AutoWU(torch.optim.SGD([weight], lr=0.1), total_samples=32 * 6000)
    for _ in range(60):
        (weight - 1).square().sum().backward()
        scheduler.optimizer.step()
        scheduler.step(1.0, samples=32)
    assert scheduler.config.peak_factor == pytest.approx(0.8)


@pytest.mark.parametrize("warmup_type", ["two_speed", "exp"])
def test_the_peak_is_as_far_below_the_minimum_as_the_lr_grows_in_the_lag(warmup_type):
    scheduler = AutoWU(torch.optim.Adam(parameters()), total_steps=5000, warmup_type=warmup_type)  # lags by 9 steps
    end = scheduler.config.warmup_steps
    grown = scheduler.lr_at(end - 1) / scheduler.lr_at(end - 10)
    assert scheduler.config.peak_factor == pytest.approx(0.4 / grown)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"total_steps": 60}, 0.4 * 10**-0.5),  # half a decade at most
        ({"total_steps": 60, "warmup_type": "linear"}, 0.4),
        ({"total_steps": 60, "peak_factor": 0.7}, 0.7),
    ],
    ids=str,
)
def test_where_the_lag_does_not_count_in_full(arguments, expected):
    for optimizer in (torch.optim.Adam(parameters()), torch.optim.SGD(parameters(), lr=0.1, momentum=1.0)):
        assert AutoWU(optimizer, **arguments).config.peak_factor == pytest.approx(expected)
    assert AutoWU.paper(torch.optim.Adam(parameters()), 10, 6).config.peak_factor == 1.0


def test_a_wrapper_has_the_lag_of_what_it_holds_and_a_circle_ends():
    inner = torch.optim.SGD(parameters(), lr=0.1, momentum=0.75)
    wrapper = Wrapper(inner, own=True)
    del wrapper.param_groups[0]["momentum"]
    assert peak_lag(wrapper) == pytest.approx(3.0)
    inner.base_optimizer = wrapper
    assert chain(wrapper) == [wrapper, inner]
    assert chain(inner) == [inner, wrapper]
    wrapper.optimizer = wrapper
    assert (family(wrapper), family(inner)) == ("sgd", "sgd")


def test_only_an_optimizer_of_the_same_parameters_is_wrapped():
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    optimizer.optimizer, optimizer.base = "Adam", torch.optim.Adam  # a name, and a class
    optimizer.other = torch.optim.Adam(parameters())
    assert chain(optimizer) == [optimizer]
