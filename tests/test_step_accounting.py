"""Which calls count as a step, and what loss it had: micro-batches, skipped optimizer steps, replaced and wrapped optimizers."""

import contextlib
import copy
import functools
import logging
import math
import operator
import types
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autowu import AutoWU
from autowu.history import MISSING
from autowu.optim import LARS

TOTAL = 120
CURVE = [1 + abs(k / 30 - 1) + 0.02 * ((k * 7) % 5) for k in range(TOTAL + 20)]
ORDER = "how-to-adjust-learning-rate"


def parameter():
    """A parameter in training: it has a gradient."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.zeros(2)
    return weight


def sgd(parameters=None, lr=0.1):
    return torch.optim.SGD(parameters or [parameter()], lr=lr, momentum=0.9)


def autowu(optimizer=None, **arguments):
    defaults = {
        "total_steps": TOTAL,
        "min_lr": 1e-5,
        "max_lr": 1.0,
        "max_warmup_fraction": 0.5,
        "immediate_cooldown": False,
        "cooldown_fraction": 0.2,
        "watch": False,
    }
    return AutoWU(optimizer or sgd(), **(defaults | arguments))


def plateau(**arguments):
    """Records losses after the warm-up too."""
    return autowu(
        total_steps=None, steps_per_epoch=2, total_epochs=60, decay_phase_stat="loss", decay_phase_factor=0.5, **arguments
    )


def lr_of(scheduler):
    return float(scheduler.optimizer.param_groups[0]["lr"])


def take(scheduler, losses):
    lrs = []
    for loss in losses:
        lrs.append(lr_of(scheduler))
        scheduler.optimizer.step()
        scheduler.step(loss)
    return lrs


@functools.cache
def whole_run(steps):
    """A plain run on so many losses of `CURVE`, which nobody may change, and the LRs of its steps."""
    scheduler = autowu()
    return scheduler, take(scheduler, CURVE[:steps])


def recorded(scheduler):
    """The losses that were recorded one by one, in order; for runs in which no test has been yet."""
    return scheduler.history.staged.tolist()


def same(one, other):
    return np.array_equal(one, other, equal_nan=True)


# ---------------------------------------------------------------- micro-batches


MAKES = [autowu, plateau, functools.partial(autowu, gp="gpytorch", test_interval=7, patience=3)]


IDS = ["closed-form", "plateau", "gpytorch"]


@pytest.mark.parametrize(
    ("make", "last_by_step"),
    [
        pytest.param(make, last, id=f"{name}-{last}", marks=[pytest.mark.slow] if name == "gpytorch" and not last else [])
        for make, name in zip(MAKES, IDS, strict=True)
        for last in (False, True)
    ],
)
def test_observed_losses_are_their_mean(make, last_by_step):
    rng = np.random.default_rng(0)
    whole, parted = make(), make()
    for k in range(TOTAL):
        parts = (CURVE[k] + 0.3 * rng.normal(size=1 + k % 4)).tolist()
        mean = functools.reduce(operator.add, parts) / len(parts)  # `sum` compensates for rounding from Python 3.12 on
        assert lr_of(parted) == lr_of(whole)
        take(whole, [mean])
        parted.optimizer.step()
        for loss in parts[: len(parts) - last_by_step]:
            parted.observe(loss)
        parted.step(*parts[len(parts) - last_by_step :])
        assert parted.history.steps == whole.history.steps
        assert same(parted.history.state_dict()["losses"], whole.history.state_dict()["losses"])
    assert whole.switch.by_test
    assert parted.switch == whole.switch
    assert parted.state_dict()["state"] == whole.state_dict()["state"]


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def as_losses(draw):
    """A loss in some form, and its value as a float."""
    value = draw(st.floats(-1e3, 1e3, width=16))
    form = draw(st.sampled_from(["float", "numpy", "tensor"]))
    if form == "float":
        return value, value
    if form == "numpy":
        scalar = draw(st.sampled_from([np.float16, np.float32, np.float64]))(value)
        return scalar, float(scalar)
    shape = draw(st.sampled_from([(), (1,), (1, 1, 1)]))
    tensor = torch.full(shape, value, dtype=draw(st.sampled_from(DTYPES)), requires_grad=draw(st.booleans()))
    return tensor, tensor.item()


@given(st.lists(st.tuples(st.lists(as_losses(), max_size=5), st.one_of(st.none(), as_losses())), min_size=1, max_size=9))
@settings(max_examples=40)
def test_a_step_records_the_mean_of_whatever_forms_its_losses_had(steps):
    scheduler = autowu()
    expected = []
    for observed, last in steps:
        for loss, _ in observed:
            scheduler.observe(loss)
        scheduler.optimizer.step()
        scheduler.step(None if last is None else last[0])
        values = [value for _, value in [*observed, *([] if last is None else [last])]]
        expected.append(sum(values) / len(values) if values else MISSING)
    assert same(recorded(scheduler), expected)
    assert scheduler.last_epoch == len(steps)


def test_nothing_observed_is_a_missing_loss_and_the_schedule_goes_on(caplog):
    silent, told = (autowu(test_interval=3) for _ in range(2))  # with a loss in every interval
    for k, loss in enumerate(CURVE):
        for scheduler, missing in ((silent, ()), (told, (math.nan,))):
            scheduler.optimizer.step()
            scheduler.step(*(missing if k % 4 == 1 else [loss]))
        assert lr_of(silent) == lr_of(told)
        assert silent.last_epoch == k + 1
    assert silent.switch == told.switch
    assert silent.switch.by_test
    assert caplog.text.count("missing or not finite") == 2  # once each


def test_a_run_that_never_hears_of_a_loss_ends_its_warmup_at_the_limit():
    scheduler = autowu()
    lrs = take(scheduler, [None] * TOTAL)
    assert scheduler.phase == "done"
    assert not scheduler.switch.by_test
    assert scheduler.switch.lr == 0.1
    assert all(lr > 0 for lr in lrs)


@pytest.mark.parametrize(
    ("place", "bad"),
    [
        pytest.param(place, bad, marks=[] if place == quick else [pytest.mark.slow])
        for quick, bad in enumerate([math.nan, math.inf, -math.inf])
        for place in range(3)
    ],
)
def test_a_micro_batch_that_is_not_finite_makes_the_loss_of_its_step_missing(place, bad, caplog):
    parted, told = autowu(), autowu()
    for k, loss in enumerate(CURVE):
        parts = [loss, loss, loss]
        if k % 7 == 3:
            parts[place] = bad
        for part in parts:
            parted.observe(torch.tensor(part))
        parted.optimizer.step()
        parted.step()
        take(told, [math.nan if k % 7 == 3 else sum(torch.tensor(p).item() for p in parts) / 3])
        assert lr_of(parted) == lr_of(told)
    assert parted.switch == told.switch
    assert parted.switch.by_test
    assert caplog.text.count("missing or not finite") == 2


def test_losses_of_opposite_infinities_are_survived():
    scheduler = autowu()
    for loss in CURVE:
        scheduler.observe(math.inf)
        scheduler.observe(-math.inf)
        take(scheduler, [loss])
    assert scheduler.phase == "done"


@pytest.mark.parametrize("convert", [float, torch.tensor, np.float32, np.float64])
def test_micro_batches_of_huge_losses_are_survived_without_a_warning(convert):
    scheduler = autowu()
    for _ in range(5):
        for _ in range(3):
            scheduler.observe(convert(1e308 if convert in (float, np.float64) else 3e38))
        scheduler.optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 5


BAD = {
    "int": (1, TypeError),
    "bool": (True, TypeError),
    "None": (None, TypeError),
    "str": ("0.5", TypeError),
    "list": ([0.5], TypeError),
    "array of integers": (np.array([1]), TypeError),
    "array of several": (np.array([0.5, 0.5]), TypeError),
    "tensor of integers": (torch.tensor(1), TypeError),
    "complex tensor": (torch.tensor(1j), TypeError),
    "several": (torch.ones(2), ValueError),
    "empty": (torch.ones(0), ValueError),
}


@pytest.mark.parametrize("make", [autowu, plateau])
@pytest.mark.parametrize("taken", [0, 5, 70, 130])
def test_a_bad_loss_is_refused_by_observe_in_all_phases_and_changes_nothing(taken, make):
    scheduler, other = make(), make()
    for s in (scheduler, other):
        take(s, CURVE[:taken])
        s.observe(1.25)
    for name, (loss, error) in BAD.items():
        with pytest.raises(error, match="loss"):
            scheduler.observe(loss)
        if loss is not None:
            with pytest.raises(error, match="loss"):
                scheduler.step(loss)
        assert scheduler.state_dict()["micro_batches"] == other.state_dict()["micro_batches"], name
        assert scheduler.last_epoch == taken, name
    for s in (scheduler, other):
        s.optimizer.step()
        s.step(0.75)
    assert same(scheduler.history.state_dict()["losses"], other.history.state_dict()["losses"])
    assert scheduler.last_epoch == other.last_epoch == taken + 1
    assert take(scheduler, CURVE[taken:]) == take(other, CURVE[taken:])


def test_observe_keeps_no_graph_and_no_tensor_alive():
    scheduler = autowu()
    weight = torch.ones(1000, requires_grad=True)
    hidden = weight * 2
    loss = hidden.square().mean()
    refs = [weakref.ref(t) for t in (hidden, loss)]  # the graph holds `hidden`, to take the square's gradient
    scheduler.observe(loss)
    scheduler.observe(loss)
    del hidden, loss
    assert [ref() for ref in refs] == [None, None]


def test_a_loss_changed_in_place_after_it_was_observed_does_not_count():
    scheduler = autowu()
    loss = torch.tensor(2.0)
    scheduler.observe(loss)
    loss.fill_(50.0)
    scheduler.observe(loss.fill_(4.0))
    loss.zero_()
    scheduler.optimizer.step()
    scheduler.step()
    assert recorded(scheduler) == [3.0]


def test_observed_losses_do_not_leak_into_the_next_step_or_phase():
    scheduler = plateau()
    for k, loss in enumerate(CURVE):
        scheduler.observe(loss)
        scheduler.optimizer.step()
        scheduler.step()
        assert scheduler.state_dict()["micro_batches"] == {"sum": 0.0, "count": 0}
        assert scheduler.last_epoch == k + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_observed_losses_of_a_gpu_are_neither_waited_for_nor_changed_by_it():
    on_host, on_device = autowu(device="cpu", test_interval=59), autowu(device="cpu", test_interval=59)
    losses = torch.tensor(CURVE, dtype=torch.float64)
    on_device.observe(losses[0].cuda())
    torch.cuda.synchronize()
    copies = losses.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(50):
            for _ in range(1 + (k > 0), 3):
                on_device.observe(copies[k])
            on_device.optimizer.step()
            on_device.step(copies[k])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for k in range(50):
        for _ in range(2):
            on_host.observe(losses[k])
        on_host.optimizer.step()
        on_host.step(losses[k])
    assert recorded(on_device) == pytest.approx(recorded(on_host), rel=1e-15)  # a GPU multiplies by the reciprocal of the count


# ---------------------------------------------------------------- steps that a GradScaler skips


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def lookahead(parameters):
    from timm.optim.lookahead import Lookahead

    return Lookahead(sgd(parameters), alpha=0.5, k=2)


WRAPPED = {
    "SGD": sgd,
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "LARS": lambda parameters: LARS(sgd(parameters, lr=1.0)),
    "Lookahead": lookahead,
}


class Amp:
    """A network on the digits under a GradScaler; batch k is that of step k, however often that step is tried.

    The scheduler is told the losses of `CURVE`, so that it switches where it should whatever the network does.
    """

    def __init__(self, make=sgd, parts=1, **arguments):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        self.optimizer = make(list(self.model.parameters()))
        self.scheduler = autowu(self.optimizer, **arguments)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        self.parts, self.lrs, self.phases = parts, [], []

    def attempt(self, overflow):
        """Try the coming step, with an infinite gradient or without; whether it counted."""
        images, labels = digits()
        step = self.scheduler.last_epoch
        drawn = torch.randint(len(images), (32,), generator=torch.Generator().manual_seed(step))
        for part in range(self.parts):
            chosen = drawn[part :: self.parts]
            loss = torch.nn.functional.cross_entropy(self.model(images[chosen]), labels[chosen])
            self.scaler.scale(loss / self.parts).backward()
            if self.parts > 1:
                self.scheduler.observe(CURVE[step])
        if overflow:
            next(self.model.parameters()).grad[0, 0] = math.inf
        lr, phase = lr_of(self.scheduler), self.scheduler.phase
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step(*[CURVE[step]] * (self.parts == 1))
        self.optimizer.zero_grad()
        counted = self.scheduler.last_epoch > step
        if counted:
            self.lrs.append(lr)
            self.phases.append(phase)
        return counted

    def run(self, skipped=frozenset(), stop=TOTAL):
        attempts = 0
        while self.scheduler.last_epoch < stop:
            history, overflow = self.scheduler.history.steps, attempts in skipped
            recorded = self.scheduler.phase == "warmup" and not overflow
            assert self.attempt(overflow) is not overflow
            assert self.scheduler.history.steps == history + recorded
            attempts += 1
        return self

    def weights(self):
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()


@functools.cache
def plain_amp(make=sgd, parts=1):
    """A run of which no step is skipped, and which nobody may change."""
    return Amp(make, parts=parts).run()


SKIPS = {
    "the first": {0},
    "the first three": {0, 1, 2},
    "the second": {1},
    "in the warm-up": {9, 10, 17, 25},
    "around every test": set(range(5, 60, 2)),
    "at the end of the warm-up": set(range(32, 50)),
    "in stable": {70, 71, 72, 80},
    "in cooldown": {105, 106},
    "everywhere": {0, 1, 5, 6, 20, 60, 61, 100, 118, 125},
}


@pytest.mark.parametrize(
    ("skipped", "parts"),
    [
        pytest.param(steps, parts, id=f"{name}-{parts}", marks=[pytest.mark.slow] if parts > 1 and name != "everywhere" else [])
        for name, steps in SKIPS.items()
        for parts in (1, 3)
    ],
)
def test_a_step_that_the_scaler_skips_does_not_count(skipped, parts):
    plain, scaled = plain_amp(parts=parts), Amp(parts=parts).run(skipped)
    assert scaled.lrs == plain.lrs
    assert scaled.phases == plain.phases
    assert set(plain.phases) == {"warmup", "stable", "cooldown"}
    assert scaled.scheduler.switch == plain.scheduler.switch
    assert scaled.scheduler.switch.by_test
    assert same(scaled.scheduler.history.state_dict()["losses"], plain.scheduler.history.state_dict()["losses"])
    assert scaled.scaler.get_scale() < plain.scaler.get_scale()
    assert torch.equal(scaled.weights(), plain.weights())  # scales are powers of 2


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_optimizers_count_what_the_scaler_lets_through(make):
    plain, scaled = plain_amp(make), Amp(make).run(SKIPS["everywhere"])
    assert scaled.lrs == plain.lrs
    assert scaled.scheduler.switch == plain.scheduler.switch
    assert scaled.scheduler.switch.by_test
    assert torch.equal(scaled.weights(), plain.weights())
    assert lr_of(scaled.scheduler) == scaled.scheduler.get_last_lr()[0]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: up the gradient first, and from there a step of `base_optimizer`; no step of its own."""

    def __init__(self, parameters, base, **options):
        super().__init__(parameters, {"rho": 0.05, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["before"] = weight.clone()
            weight.add_(weight.grad, alpha=self.param_groups[0]["rho"] / (float(weight.grad.norm()) + 1e-12))

    @torch.no_grad()
    def second_step(self):
        for weight in self.param_groups[0]["params"]:
            weight.copy_(self.state[weight]["before"])
        self.base_optimizer.step()

    def step(self, closure):
        with torch.enable_grad():
            closure()
        self.first_step()
        self.zero_grad()
        with torch.enable_grad():
            closure()
        self.second_step()


def sam_run(every, base=torch.optim.SGD):
    """Digits under SAM, by its own `step` every so many steps, else by its two halves; the scheduler, and the inner one's LRs."""
    torch.manual_seed(0)
    images, labels = digits()
    model = torch.nn.Linear(64, 10)
    optimizer = SAM(model.parameters(), base, lr=0.1, weight_decay=1e-4)
    scheduler, lrs = AutoWU(optimizer, total_steps=100), []
    for step in range(100):
        drawn = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))

        def closure(drawn=drawn):
            loss = torch.nn.functional.cross_entropy(model(images[drawn]), labels[drawn])
            loss.backward()
            return loss

        optimizer.zero_grad()
        lrs.append(optimizer.base_optimizer.param_groups[0]["lr"])
        loss = closure().item()
        if every and step % every == 0:
            optimizer.step(closure)
        else:
            optimizer.first_step()
            optimizer.zero_grad()
            closure()
            optimizer.second_step()
        scheduler.step(loss)
    return scheduler, lrs


def lars_of_sgd(groups, **options):
    return LARS(torch.optim.SGD(groups, **options))


@pytest.mark.parametrize(("every", "base"), [(0, torch.optim.SGD), (5, torch.optim.AdamW), (5, lars_of_sgd)])
def test_a_step_of_what_sam_holds_is_a_step(every, base):
    scheduler, lrs = sam_run(every, base)
    assert scheduler.last_epoch == 100
    assert scheduler.phase == "done"
    assert len(set(lrs[:20])) == 20
    assert "optimizer" not in {event.kind for event in scheduler.events}


def test_what_lars_wraps_is_not_hooked():
    optimizer = LARS(sgd())
    autowu(optimizer)
    assert not optimizer.optim._optimizer_step_post_hooks


@pytest.mark.parametrize("cut", [0, 1, 20, 80, 110])
def test_a_skip_right_after_a_resume_does_not_count(cut):
    whole = plain_amp()
    saved = Amp().run(stop=cut)
    other = Amp(max_lr=7.0, total_steps=60)
    other.model.load_state_dict(saved.model.state_dict())
    other.optimizer.load_state_dict(saved.optimizer.state_dict())
    other.scheduler.load_state_dict(saved.scheduler.state_dict())
    other.run({0, 1, 3})
    assert saved.lrs + other.lrs == whole.lrs
    assert torch.equal(other.weights(), whole.weights())


def test_the_wrapped_optimizer_of_lookahead_runs_at_the_lr():
    optimizer = lookahead([parameter()])
    scheduler = autowu(optimizer)
    for loss in CURVE:
        assert optimizer._base_optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.phase == "done"
    assert scheduler.switch.by_test


def test_a_step_that_a_fused_optimizer_skips_counts_because_it_is_called():
    fused = Amp(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True))
    before = fused.weights().clone()
    fused.attempt(overflow=True)
    assert torch.equal(fused.weights(), before)
    assert fused.scheduler.last_epoch == 1


# ---------------------------------------------------------------- calls without an optimizer step


@pytest.mark.parametrize("calls", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_several_calls_after_one_optimizer_step_count_once(calls):
    once, often = autowu(), autowu()
    for k, loss in enumerate(CURVE):
        assert lr_of(often) == lr_of(once)
        take(once, [loss])
        often.optimizer.step()
        often.step(loss)
        for _ in range(calls - 1):
            often.step(77.0)
        assert often.last_epoch == k + 1
    assert often.switch == once.switch


def test_losses_observed_for_a_step_that_did_not_count_are_dropped():
    scheduler = autowu()
    take(scheduler, [2.0])
    scheduler.observe(50.0)
    scheduler.step()  # the optimizer was not called
    scheduler.observe(3.0)
    scheduler.optimizer.step()
    scheduler.step()
    assert recorded(scheduler) == [2.0, 3.0]


@pytest.mark.parametrize("steps", [1, 30, TOTAL + 5])
def test_a_fresh_scheduler_can_be_wound_forward(steps):
    scheduler = autowu()

    def wind():
        for loss in CURVE[:steps]:
            scheduler.step(loss)

    with pytest.warns(UserWarning, match=ORDER) as caught:
        wind()
    assert len(caught) == 1
    assert scheduler.last_epoch == steps
    reference, _ = whole_run(steps)
    assert lr_of(scheduler) == lr_of(reference)
    assert scheduler.switch == reference.switch


# ---------------------------------------------------------------- an optimizer whose step was replaced


def plain_step(self, closure=None):
    return type(self).step(self, closure)


def through_the_old_step(optimizer):
    old = optimizer.step

    def step(self, closure=None):
        return old(closure)

    return types.MethodType(step, optimizer)


REPLACED = {
    "a method": lambda optimizer: types.MethodType(plain_step, optimizer),
    "a function": lambda optimizer: functools.partial(plain_step, optimizer),
    "its class's": lambda optimizer: type(optimizer).step.__get__(optimizer),
}


def nan_gradients(scheduler):
    for group in scheduler.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, math.nan)


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("taken", [1, 25])
def test_a_replaced_step_that_calls_its_class_is_seen(taken, replace, caplog):
    scheduler, (reference, _) = autowu(), whole_run(len(CURVE))
    take(scheduler, CURVE[:taken])
    scheduler.optimizer.step = replace(scheduler.optimizer)
    for loss in CURVE[taken:]:
        take(scheduler, [loss])
        scheduler.step(loss)  # no optimizer step before it
    assert (scheduler.switch, scheduler.last_epoch) == (reference.switch, reference.last_epoch)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("gradients", [lambda scheduler: None, nan_gradients], ids=["none", "nan"])
@pytest.mark.parametrize("taken", [1, 25, 80])
def test_a_replaced_step_never_freezes_the_schedule_and_is_reported_once(taken, gradients, caplog):
    scheduler, (_, expected) = autowu(), whole_run(len(CURVE))
    lrs = take(scheduler, CURVE[:taken])
    scheduler.optimizer.step = lambda: None  # an update of its own, past the class
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="autowu"):
        for k in range(taken, len(CURVE)):
            gradients(scheduler)
            lrs += take(scheduler, CURVE[k : k + 1])
            assert scheduler.last_epoch == k + 1
    assert lrs == expected
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"AutoWU, step {taken + 1}: optimizer.step was replaced; from here on every call counts, skipped steps too"
    ]


@pytest.mark.parametrize("gradients", [lambda scheduler: None, nan_gradients], ids=["none", "nan"])
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_step_replaced_at_once_is_told_of_by_torch_and_freezes_nothing(replace, gradients):
    scheduler, (_, expected) = autowu(), whole_run(len(CURVE))
    scheduler.optimizer.step = replace(scheduler.optimizer)
    gradients(scheduler)
    with pytest.warns(UserWarning, match="has been overridden"):
        lrs = take(scheduler, CURVE[:1])
    assert lrs + take(scheduler, CURVE[1:]) == expected


def test_a_step_replaced_by_one_that_calls_the_old_one_is_no_trouble(caplog):
    scheduler, (reference, _) = autowu(), whole_run(len(CURVE))
    take(scheduler, CURVE[:3])
    scheduler.optimizer.step = through_the_old_step(scheduler.optimizer)
    take(scheduler, CURVE[3:])
    assert scheduler.get_last_lr() == reference.get_last_lr()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def held_run(taken):
    """A run that calls, after `taken` plain steps, a bound step that was held since before the scheduler was made."""
    weight = parameter()
    optimizer = sgd([weight])
    held = optimizer.step
    scheduler = autowu(optimizer)
    take(scheduler, CURVE[:taken])
    return scheduler, held


def train_on(scheduler, step, losses):
    for loss in losses:
        nan_gradients(scheduler)
        step()
        scheduler.step(loss)


def test_a_run_of_a_held_step_that_blows_up_is_not_frozen():
    scheduler, held = held_run(0)
    train_on(scheduler, held, [math.nan] * TOTAL)
    assert scheduler.last_epoch == TOTAL


def test_a_step_held_from_before_is_seen():
    scheduler, held = held_run(5)
    train_on(scheduler, held, CURVE[5:])
    scheduler.step(1.0)  # no optimizer step before it
    assert scheduler.last_epoch == len(CURVE)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_losses_of_another_run_can_be_replayed_without_training(steps):
    weight = torch.nn.Parameter(torch.ones(2))
    scheduler = autowu(sgd([weight]))
    take(scheduler, CURVE[:steps])  # without a gradient nothing is trained
    with contextlib.nullcontext() if steps else pytest.warns(UserWarning, match=ORDER):
        for loss in CURVE[steps:]:
            scheduler.step(loss)
    reference, _ = whole_run(len(CURVE))
    assert (scheduler.switch, scheduler.last_epoch) == (reference.switch, len(CURVE))


@pytest.mark.parametrize(("value", "counted"), [(1.0, 1), (math.inf, 0)])
def test_sparse_gradients_show_what_was_skipped_first(value, counted):
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    scheduler = autowu(torch.optim.SGD(embedding.parameters(), lr=0.1))
    (embedding(torch.tensor([1, 1])).sum() * value).backward()
    with pytest.warns(UserWarning, match=ORDER) if counted else contextlib.nullcontext():
        scheduler.step(1.0)
    assert scheduler.last_epoch == counted


def test_a_copy_of_a_run_reports_nothing_and_sees_skips(caplog):
    scheduler = autowu()
    take(scheduler, CURVE[:5])
    other = copy.deepcopy(scheduler)
    take(other, CURVE[5:10])
    other.step(1.0)  # no optimizer step before it
    assert other.last_epoch == 10
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
