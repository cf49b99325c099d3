"""A run that is cut, saved and restored: LRs and weights to the bit, what the state is made of, and runs made longer."""

import functools
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autowu import AutoWU
from autowu.schedules import COOLDOWN_TYPES, WARMUP_TYPES

EPOCH, EPOCHS = 2, 80
TOTAL = EPOCH * EPOCHS


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def batch(number, size=24):
    images, labels = digits()
    drawn = torch.randint(len(images), (size,), generator=torch.Generator().manual_seed(number))
    return images[drawn], labels[drawn]


class Training:
    """A small network on the digits, `parts` micro-batches a step; everything that a checkpoint needs, and nothing else."""

    def __init__(self, make, parts=1, seed=0, lr=0.1):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        )
        groups = [{"params": self.model[:2].parameters()}, {"params": self.model[2:].parameters(), "lr": lr / 2}]
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        self.scheduler = make(self.optimizer)
        self.parts, self.position = parts, 0
        self.lrs, self.weights, self.phases, self.votes = [], [], [], []

    def advance(self, stop):
        """Go on until `stop` micro-batches were seen."""
        while self.position < stop:
            self.micro_batch()
        return self

    def micro_batch(self):
        inputs, targets = batch(self.position)
        loss = torch.nn.functional.cross_entropy(self.model(inputs), targets)
        (loss / self.parts).backward()
        self.position += 1
        if self.parts > 1:
            self.scheduler.observe(loss)
        if self.position % self.parts:
            return
        self.lrs.append([g["lr"] for g in self.optimizer.param_groups])
        self.phases.append(self.scheduler.phase)
        self.optimizer.step()
        self.scheduler.step(*([loss] if self.parts == 1 else []))
        self.optimizer.zero_grad()
        self.weights.append(torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().clone())
        self.votes.append(self.scheduler.decision.votes if self.scheduler.decision else 0)

    def save(self):
        buffer = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "grads": [p.grad for p in self.model.parameters()],
            "position": self.position,
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for parameter, grad in zip(self.model.parameters(), state["grads"], strict=True):
            parameter.grad = grad
        self.position = state["position"]
        return self


def other_scheduler(optimizer):
    """As unlike the saved one as the arguments allow but for the steps per epoch; shorter, so that it extends nothing."""
    return AutoWU(
        optimizer,
        EPOCH,
        9,
        immediate_cooldown=False,
        cooldown_type="sqrt",
        cooldown_fraction=0.7,
        min_lr=1e-3,
        max_lr=3.0,
        max_warmup_fraction=0.3,
        warmup_type="linear",
        warmup_unit="epoch",
        decay_phase_factor=0.3,
        test_interval=1,
        patience=1,
        confidence=0.6,
        min_contrast=0.0,
        gp="gpytorch",
        seed=7,
    )


def fresh_training(parts=1):
    """Other weights, another LR, other arguments; and nothing of the losses that it has seen may stay."""
    fresh = Training(other_scheduler, parts, seed=99, lr=0.7)
    for loss in (3.0, 2.0, 1.0):
        fresh.scheduler.observe(loss)
    return fresh


def resumed(training):
    return fresh_training(training.parts).load(training.save())


def assert_equals_the_rest(restored, uncut, step):
    """`restored`, cut after `step` steps, ran to the end as `uncut` did."""
    assert restored.lrs == uncut.lrs[step:]
    assert restored.phases == uncut.phases[step:]
    assert len(restored.weights) == len(uncut.weights) - step
    assert all(torch.equal(a, b) for a, b in zip(restored.weights, uncut.weights[step:], strict=True))
    assert restored.scheduler.switch == uncut.scheduler.switch
    assert repr(restored.scheduler) == repr(uncut.scheduler)
    assert restored.scheduler.decision == uncut.scheduler.decision


# Every cooldown with either kind of warm-up; unit and stable phase in all combinations.
VARIANTS = {
    f"{kind}-{unit}-{cooldown}-{'immediate' if immediate else 'stable'}": {
        "warmup_type": kind,
        "warmup_unit": unit,
        "cooldown_type": cooldown,
        "immediate_cooldown": immediate,
        "max_lr": 30.0 if kind == "exp" else 4.0,
        "test_interval": 3,
    }
    for kind, places in (("exp", (0, 1, 2, 3)), ("linear", (3, 2, 1, 0)))
    for cooldown, (unit, immediate) in zip(
        (COOLDOWN_TYPES[k] for k in places), ((u, i) for u in ("step", "epoch") for i in (True, False)), strict=True
    )
}
DECAYING = {
    "immediate_cooldown": False,
    "cooldown_fraction": 0.1,
    "decay_phase_factor": 0.5,
    "max_lr": 60.0,
    "test_interval": 3,
}
VARIANTS["decay"] = DECAYING | {"decay_phase_factor": 0.9}
VARIANTS["plateau"] = VARIANTS["micro-batches"] = DECAYING | {"decay_phase_stat": "loss"}
GPYTORCH = {"max_lr": 100.0, "max_warmup_fraction": 0.6, "test_interval": 8, "seed": 3}
VARIANTS["gpytorch"] = GPYTORCH | {"gp": "gpytorch", "immediate_cooldown": True}
VARIANTS["paper"] = GPYTORCH | {"immediate_cooldown": False}
SLOW = ("gpytorch", "paper")


def trainer(variant):
    make = AutoWU.paper if variant == "paper" else AutoWU
    arguments = VARIANTS[variant]
    return Training(lambda optimizer: make(optimizer, EPOCH, EPOCHS, **arguments), parts=3 if variant == "micro-batches" else 1)


@functools.cache
def uncut_run(variant):
    training = trainer(variant)
    training.advance(TOTAL * training.parts)
    assert training.scheduler.switch.by_test
    assert training.scheduler.phase == "done"
    assert training.weights[-1].isfinite().all()
    return training


@functools.cache
def saved_run(variant):
    """The same run, saved on the way at every cut; the bytes by step."""
    uncut, training, saved = uncut_run(variant), trainer(variant), {}
    for step in sorted(cut(uncut) for cut in cuts_of(variant).values()):
        saved[step] = training.advance(step * training.parts).save()
    assert_equals_the_rest(training.advance(TOTAL * training.parts), uncut, 0)
    return saved


CUTS = {
    "before the first step": lambda run: 0,
    "in the warm-up": lambda run: 11,
    "at one vote": lambda run: last(run, lambda k: run.votes[k] == 1 and run.phases[k + 1] == "warmup") + 1,
    "at two votes": lambda run: last(run, lambda k: run.votes[k] == 2 and run.phases[k + 1] == "warmup"),
    "a step before the switch": lambda run: run.scheduler.switch.step - 1,
    "at the switch": lambda run: run.scheduler.switch.step,
    "a step after the switch": lambda run: run.scheduler.switch.step + 1,
    "in stable": lambda run: run.phases.index("stable") + 17,
    "in cooldown": lambda run: run.phases.index("cooldown") + 9,
    "before the last step": lambda run: TOTAL - 1,
    "at the end": lambda run: TOTAL,
}


def cuts_of(variant):
    left_out = ["before the first step"] if variant in SLOW else []
    left_out += ["in stable"] if VARIANTS[variant].get("immediate_cooldown", True) else []
    return {name: cut for name, cut in CUTS.items() if name not in left_out}


def last(run, found):
    return max(k for k in range(TOTAL - 1) if found(k))


# Quick are all cuts of one run by itself and of one with micro-batches, a stable phase and the plateau rule; of the others one
# before the switch and one after it. GPyTorch's runs are slow: of their state alone are the tests further down.
EVERYWHERE, ELSEWHERE = ("exp-step-cosine-immediate", "micro-batches"), ("at one vote", "in cooldown")
CASES = [
    pytest.param(
        *(variant, cut),
        id=f"{variant}, {cut}",
        marks=[] if variant in EVERYWHERE or (cut in ELSEWHERE and variant not in SLOW) else [pytest.mark.slow],
    )
    for variant in VARIANTS
    for cut in cuts_of(variant)
]


@pytest.mark.parametrize(("variant", "cut"), CASES)
def test_a_restored_run_equals_the_uncut_one(variant, cut):
    uncut = uncut_run(variant)
    step = CUTS[cut](uncut)
    restored = fresh_training(uncut.parts).load(saved_run(variant)[step])
    assert restored.scheduler.phase == [*uncut.phases, "done"][step]
    assert restored.scheduler.get_last_lr() == [*uncut.lrs, uncut.scheduler.get_last_lr()][step]
    assert_equals_the_rest(restored.advance(TOTAL * uncut.parts), uncut, step)


ENGINES = {
    "closed-form": ({"test_interval": 3}, (-1, 0, 1)),
    # A test of GPyTorch is slow: a few, and a cut between them.
    "gpytorch": ({"test_interval": 30, "gp": "gpytorch"}, (-25,)),
}


@pytest.mark.slow  # each of these is in a variant above
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("immediate", [True, False], ids=("immediate", "stable"))
@pytest.mark.parametrize("cooldown", COOLDOWN_TYPES)
@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("warmup", WARMUP_TYPES)
def test_every_combination_goes_on_around_its_switch(warmup, unit, cooldown, immediate, engine):
    more, cuts = ENGINES[engine]
    arguments = {"warmup_type": warmup, "warmup_unit": unit, "cooldown_type": cooldown, "immediate_cooldown": immediate} | more
    saved, uncut = {}, Training(lambda optimizer: AutoWU(optimizer, EPOCH, EPOCHS, **arguments))
    while uncut.position < TOTAL:
        saved[uncut.position] = uncut.save()
        uncut.micro_batch()
    for cut in cuts:
        step = uncut.scheduler.switch.step + cut
        assert_equals_the_rest(fresh_training().load(saved[step]).advance(TOTAL), uncut, step)


def test_the_plateau_rule_acts_in_the_runs_that_test_it():
    for variant in ("plateau", "micro-batches"):
        assert uncut_run(variant).scheduler.state_dict()["state"]["plateau_factor"] < 1


@functools.cache
def saved_between_micro_batches():
    """The run with micro-batches, saved one and two of them after every cut; the bytes by the number of micro-batches."""
    training, uncut = trainer("micro-batches"), uncut_run("micro-batches")
    places = sorted(3 * CUTS[cut](uncut) + observed for cut in CUTS if cut != "at the end" for observed in (1, 2))
    return {place: training.advance(place).save() for place in places}


@pytest.mark.parametrize("observed", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "at the end"])
def test_a_run_cut_between_micro_batches_equals_the_uncut_one(cut, observed):
    uncut = uncut_run("micro-batches")
    step = CUTS[cut](uncut)
    restored = fresh_training(3).load(saved_between_micro_batches()[3 * step + observed])
    assert_equals_the_rest(restored.advance(3 * TOTAL), uncut, step)


@pytest.mark.parametrize("cuts", [(1, 4, 5), (64, 200, 201, 390)], ids=str)
def test_a_run_cut_at_several_places_equals_the_uncut_one(cuts):
    assert_equals_the_uncut_one(cuts)


@pytest.mark.slow
@given(st.sets(st.integers(0, 3 * TOTAL), min_size=2, max_size=5))
@settings(max_examples=10)
def test_a_run_cut_at_any_places_equals_the_uncut_one(cuts):
    assert_equals_the_uncut_one(cuts)


def assert_equals_the_uncut_one(cuts):
    uncut = uncut_run("micro-batches")
    training, lrs, weights = trainer("micro-batches"), [], []
    for cut in [*sorted(cuts), 3 * TOTAL]:
        training.advance(cut)
        lrs, weights = lrs + training.lrs, weights + training.weights
        training = resumed(training)
    assert lrs == uncut.lrs
    assert all(torch.equal(a, b) for a, b in zip(weights, uncut.weights, strict=True))
    assert training.scheduler.switch == uncut.scheduler.switch


@pytest.mark.parametrize("variant", ["exp-step-cosine-immediate", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_state_held_in_memory_is_not_changed_by_the_run_or_by_a_load(variant):
    uncut = uncut_run(variant)
    step = uncut.scheduler.switch.step - 3
    training = trainer(variant).advance(step)
    state = training.scheduler.state_dict()
    model = {k: v.clone() for k, v in training.model.state_dict().items()}
    training.advance(TOTAL)
    optimizer_state = trainer(variant).advance(step).optimizer.state_dict()
    for _ in range(2):
        fresh = Training(other_scheduler, seed=99, lr=0.7)
        fresh.model.load_state_dict(model)
        fresh.optimizer.load_state_dict(
            {"param_groups": optimizer_state["param_groups"], "state": copied(optimizer_state["state"])}
        )
        fresh.scheduler.load_state_dict(state)
        fresh.position = step
        assert_equals_the_rest(fresh.advance(TOTAL), uncut, step)


def copied(state):
    return {k: {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in s.items()} for k, s in state.items()}


@pytest.mark.parametrize(("variant", "step"), [("plateau", 30), ("plateau", 110), ("plateau", TOTAL), ("paper", 40)])
def test_a_restored_state_saves_as_the_same_state(variant, step):
    training = run_of(variant, step)
    assert_same(resumed(training).scheduler.state_dict(), training.scheduler.state_dict())


@functools.cache
def run_of(variant, step):
    """A run up to a step, of which several tests read and which none may change."""
    return trainer(variant).advance(step)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other or (one != one and other != other)  # NaN


# ---------------------------------------------------------------- what a state is made of


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def sgd(lr=0.1):
    return torch.optim.SGD([parameter()], lr=lr)


def advance(scheduler, losses):
    """Take one optimizer step for each loss; the LRs that they ran at."""
    lrs = []
    for loss in losses:
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss)
    return lrs


def leaves(state, path="state"):
    if type(state) is dict:
        for key, value in state.items():
            assert type(key) in (str, int) or {type(part) for part in key} <= {str, int}, path  # where a tensor of a copy stands
            yield from leaves(value, f"{path}[{key!r}]")
    elif type(state) in (list, tuple):
        for index, value in enumerate(state):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, state


PLAIN = (int, float, bool, str, type(None), torch.Tensor)


@pytest.mark.parametrize("convert", [float, np.float64, np.float32, torch.tensor])
@pytest.mark.parametrize("variant", ["exp-step-cosine-immediate", "plateau"])
def test_the_state_is_of_plain_types_and_tensors(variant, convert):
    scheduler = trainer(variant).scheduler
    states = []
    for k in range(TOTAL):
        scheduler.observe(convert(1 + abs(k / 30 - 1)))
        states.append(scheduler.state_dict())
        scheduler.optimizer.step()
        scheduler.step(convert(1 + abs(k / 30 - 1)))
    assert scheduler.switch.by_test
    for state in (*states[::10], scheduler.state_dict()):
        for path, leaf in leaves(state):
            assert type(leaf) in PLAIN, path


@pytest.mark.parametrize("variant", [pytest.param("gpytorch", marks=pytest.mark.slow), "paper"])
def test_the_state_with_gpytorch_is_of_plain_types_and_tensors(variant):
    for path, leaf in leaves(run_of(variant, 40).scheduler.state_dict()):
        assert type(leaf) in PLAIN, path
        assert not (isinstance(leaf, torch.Tensor) and leaf.requires_grad), path


def test_the_state_names_its_class_and_version():
    state = AutoWU(sgd(), total_steps=100).state_dict()
    assert state["class"] == "AutoWU"
    assert type(state["version"]) is int


def test_the_state_of_a_long_warmup_is_small(tmp_path):
    scheduler = AutoWU(sgd(), total_steps=105_000, max_warmup_fraction=0.32, test_interval=5_000)
    generator = torch.Generator().manual_seed(0)
    losses = (2 - torch.arange(30_000) / 30_000 + 0.1 * torch.randn(30_000, generator=generator)).tolist()
    advance(scheduler, losses)  # of themselves 240,000 bytes
    assert scheduler.phase == "warmup"
    assert scheduler.history.steps == 30_000
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    assert (tmp_path / "scheduler.pt").stat().st_size < 200_000
    history = scheduler.state_dict()["judge"]["history"]
    assert [key for key, value in history.items() if isinstance(value, torch.Tensor)] == ["losses"]
    assert history["losses"].untyped_storage().nbytes() < 100_000


# ---------------------------------------------------------------- what is refused


STRANGE = {
    "another class": ({"class": "StepLR"}, r"class='StepLR'"),
    "another version": ({"version": 2}, r"version=2\b"),
    "a later version": ({"version": 7}, r"version=7\b"),
    "a version in words": ({"version": "5"}, r"version='5'"),
    "no class": ({"class": None}, r"class=None"),
    "no version": ({"version": None}, r"version=None"),
}


@pytest.mark.parametrize(("change", "named"), STRANGE.values(), ids=STRANGE)
def test_a_strange_state_is_refused_and_changes_nothing(change, named):
    scheduler = AutoWU(sgd(), total_steps=100)
    advance(scheduler, [2.0] * 30)
    before = scheduler.state_dict()
    changed = AutoWU(sgd(lr=3.0), total_steps=50, gp="gpytorch").state_dict() | change
    with pytest.raises(ValueError, match=named):
        scheduler.load_state_dict({key: value for key, value in changed.items() if value is not None})
    assert_same(scheduler.state_dict(), before)


def test_an_empty_state_and_that_of_an_optimizer_are_refused():
    for state in ({}, sgd().state_dict()):
        with pytest.raises(ValueError, match=re.escape("class=None: the state is not of AutoWU")):
            AutoWU(sgd(), total_steps=100).load_state_dict(state)


def test_a_checkpoint_that_holds_the_state_among_others_is_refused_with_its_name():
    scheduler = AutoWU(sgd(), total_steps=100)
    checkpoint = {"model": {}, "scheduler": scheduler.state_dict(), "epoch": 3}
    with pytest.raises(ValueError, match="the state is not of AutoWU; pass its 'scheduler' alone"):
        scheduler.load_state_dict(checkpoint)


def test_a_state_with_a_users_kernel_needs_the_kernel():
    import gpytorch

    from autowu import GPyTorchGP

    def kernel():
        return gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5))

    def make(**arguments):
        run = {"total_steps": 200, "max_warmup_fraction": 0.4, "test_interval": 12, "patience": 3}
        return AutoWU(sgd(), min_lr=1e-5, max_lr=1.0, **run, **arguments)

    scheduler = make(gp=GPyTorchGP(kernel(), num_subsamples=1))
    curve = [1 + abs(k / 45 - 1) + 0.01 * ((k * 7) % 5) for k in range(200)]
    advance(scheduler, curve[:50])
    state = scheduler.state_dict()
    for other in (make(), make(gp="gpytorch")):
        with pytest.raises(ValueError, match="kernel"):
            other.load_state_dict(state)
        assert other.last_epoch == 0
    other = make(gp=GPyTorchGP(kernel(), num_subsamples=3, seed=8))
    other.load_state_dict(state)
    assert advance(other, curve[50:]) == advance(scheduler, curve[50:])
    assert scheduler.switch.by_test


# ---------------------------------------------------------------- a longer run


FACTORS = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "half_cosine": lambda p: math.cos(0.5 * math.pi * p),
    "linear": lambda p: 1 - p,
    "sqrt": lambda p: 1 - math.sqrt(p),
}
VALLEY = [1 + abs(k / 80 - 1) + 0.02 * ((k * 7) % 5) for k in range(700)]


def planned(epochs, **arguments):
    # The valley rises whatever the LR, which the watch would take for a divergence; it is still near its minimum at the limit.
    return AutoWU(sgd(), 10, epochs, min_lr=1e-5, max_lr=1.0, min_rise=0.0, watch=False, **arguments)


def carried_on(scheduler, other, path):
    torch.save(scheduler.state_dict(), path)
    other.load_state_dict(torch.load(path, weights_only=True))
    return other


PLACES = {"start": 0, "warm-up": 41, "stable": 180, "cooldown": 275, "last step": 299, "end": 300, "past the end": 320}


@functools.cache
def short_run(immediate, cooldown_type):
    """The LRs of a run of 300 steps and 20 past its end, and what is saved of it at every place."""
    scheduler = planned(30, immediate_cooldown=immediate, cooldown_type=cooldown_type, cooldown_fraction=0.3)
    lrs, saved = [], {}
    for place in PLACES.values():
        lrs += advance(scheduler, VALLEY[len(lrs) : place])
        buffer = io.BytesIO()
        torch.save(scheduler.state_dict(), buffer)
        saved[place] = buffer.getvalue()
    return lrs, saved


EVERY_PLACE = ((True, "sqrt"), (False, "cosine"))  # quick for these, and for the others the one in the cooldown


@pytest.mark.parametrize(
    ("immediate", "cooldown_type", "cut"),
    [
        pytest.param(
            *(immediate, cooldown_type, cut),
            id=f"{immediate}-{cooldown_type}-{place}",
            marks=[] if place == "cooldown" or (immediate, cooldown_type) in EVERY_PLACE else [pytest.mark.slow],
        )
        for immediate in (True, False)
        for cooldown_type in COOLDOWN_TYPES
        for place, cut in PLACES.items()
    ],
)
def test_a_longer_run_moves_the_cooldown_and_nothing_else(immediate, cooldown_type, cut):
    uncut, saved = short_run(immediate, cooldown_type)
    longer = planned(55, cooldown_type="linear", max_warmup_fraction=0.2)
    longer.load_state_dict(torch.load(io.BytesIO(saved[cut]), weights_only=True))
    lrs = uncut[:cut] + advance(longer, VALLEY[cut:570])

    switch, total = longer.switch, 550
    assert switch.by_test
    assert uncut[300:] == [uncut[299]] * 20
    start = switch.step if immediate else total - round(0.3 * total)
    assert lrs[: max(cut, switch.step)] == uncut[: max(cut, switch.step)]
    assert switch.lr == uncut[switch.step]
    for k in range(max(cut, switch.step), total):
        progress = max(0.0, (k - start) / (total - start))
        assert lrs[k] == pytest.approx(switch.lr * FACTORS[cooldown_type](progress), rel=1e-9), k
    assert lrs[total:] == [lrs[total - 1]] * (len(lrs) - total)
    assert 0 < lrs[total - 1] < 0.2 * switch.lr
    assert longer.phase == "done"


@pytest.mark.parametrize("cut", [41, 180, 275, 310])
def test_a_shorter_plan_does_not_shorten_the_run(cut, tmp_path):
    arguments = {"immediate_cooldown": False}
    uncut = advance(planned(30, **arguments), VALLEY[:350])
    scheduler = planned(30, **arguments)
    advance(scheduler, VALLEY[:cut])
    for epochs in (29, 12):
        shorter = carried_on(scheduler, planned(epochs, **arguments), tmp_path / "state.pt")
        assert shorter.config == scheduler.config
        assert advance(shorter, VALLEY[cut:350]) == uncut[cut:]


def test_a_run_made_longer_stays_so_when_saved_again(tmp_path):
    scheduler = planned(30)
    advance(scheduler, VALLEY[:200])
    longer = carried_on(scheduler, planned(40), tmp_path / "state.pt")
    again = carried_on(longer, planned(30), tmp_path / "state.pt")
    assert again.config == longer.config
    assert again.config.total_steps == 400
    assert advance(again, VALLEY[200:450]) == advance(longer, VALLEY[200:450])
    longest = carried_on(again, planned(60), tmp_path / "state.pt")
    assert (longest.phase, longest.config.total_steps) == ("cooldown", 600)


@pytest.mark.parametrize(
    ("saved", "now", "total"),
    [
        ((10, 30, None), (20, 31, None), 620),  # epochs count, in the steps that they have now
        ((10, 30, None), (20, 30, None), 600),
        ((10, 30, None), (1, 40, None), 40),
        ((None, None, 300), (None, None, 301), 301),
        ((None, None, 300), (None, None, 299), 300),
        ((10, 30, None), (None, None, 1000), 300),  # no common unit
        ((None, None, 300), (10, 100, None), 300),
    ],
)
def test_the_length_is_compared_in_epochs_or_in_steps(saved, now, total):
    def make(steps_per_epoch, epochs, steps):
        return AutoWU(sgd(), steps_per_epoch, epochs, total_steps=steps)

    scheduler = make(*now)
    scheduler.load_state_dict(make(*saved).state_dict())
    assert scheduler.config.total_steps == total


@pytest.mark.parametrize(
    ("saved", "cut", "now", "said"),
    [
        ((10, 30, None), 180, (20, 30, None), r"20 steps here and had 10 .* from step 360 of 600, and was at step 180 of 300"),
        ((10, 30, None), 180, (5, 30, None), r"from step 90 of 150"),
        ((10, 30, None), 20, (5, 30, None), r"from step 10 of 150"),
        ((10, 30, None), 180, (20, 31, None), r"from step 360 of 620"),
        ((10, 30, None), 180, (10, 12, None), r"ends at step 120; .* with its 300 steps, or more to extend it"),
        ((10, 30, None), 180, (None, None, 400), r"ends at step 400; .* from step 300 on .*, in done"),
        ((10, 30, None), 300, (10, 30, None), r"is over, its 300 steps are taken; the LR stays at"),
        ((10, 30, None), 320, (20, 30, None), r"is over"),
        ((None, None, 300), 300, (None, None, 200), r"is over"),
    ],
)
def test_a_run_that_is_over_or_not_as_long_as_planned_is_warned_of_once(saved, cut, now, said, caplog):
    def make(steps_per_epoch, epochs, steps):
        return AutoWU(sgd(), steps_per_epoch, epochs, total_steps=steps, min_lr=1e-5, max_lr=1.0, watch=False)

    scheduler, resumed = make(*saved), make(*now)
    advance(scheduler, VALLEY[:cut])
    resumed.load_state_dict(scheduler.state_dict())
    advance(resumed, VALLEY[cut : cut + 30])
    (event,) = [event for event in resumed.events if event.kind == "resume"]
    assert event.step == cut * (resumed.config.steps_per_epoch or 1) // (scheduler.config.steps_per_epoch or 1)
    assert re.search(said, event.message)
    assert [record.levelname for record in caplog.records if event.message in record.getMessage()] == ["WARNING"]
    assert "resume" not in [event["kind"] for event in resumed.state_dict()["events"]]  # it is of the object, not of the run


def test_the_lr_at_the_end_is_as_the_warning_says():
    scheduler, resumed = AutoWU(sgd(), 10, 30, watch=False), AutoWU(sgd(), total_steps=240, watch=False)
    advance(scheduler, VALLEY[:180])
    resumed.load_state_dict(scheduler.state_dict())
    lrs = advance(resumed, VALLEY[180:241])
    assert f"the LR will not have come to its end ({lrs[-1]:.4g}, in cooldown)" in resumed.events[-1].message


@pytest.mark.parametrize(
    ("saved", "cut", "now"),
    [((10, 30), 180, (10, 30)), ((10, 30), 180, (10, 40)), ((10, 30), 300, (10, 31)), ((10, 30), 0, (10, 30))],
)
def test_a_run_that_goes_on_as_planned_or_longer_is_not_warned_of(saved, cut, now, caplog):
    scheduler, resumed = AutoWU(sgd(), *saved, watch=False), AutoWU(sgd(), *now, watch=False)
    advance(scheduler, VALLEY[:cut])
    resumed.load_state_dict(scheduler.state_dict())
    assert not [event for event in resumed.events if event.kind == "resume"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("cut", [110, 180, 245])
def test_decays_of_the_stable_phase_go_on_in_a_longer_run(cut, tmp_path):
    scheduler = planned(30, immediate_cooldown=False, cooldown_fraction=0.2, decay_phase_factor=0.9)
    advance(scheduler, VALLEY[:cut])
    longer = carried_on(scheduler, planned(50, immediate_cooldown=False), tmp_path / "state.pt")
    lrs = advance(longer, VALLEY[cut:500])
    switch = longer.switch
    expected = [switch.lr * 0.9 ** ((k - switch.step) // 10) for k in range(cut, 400)]
    assert lrs[: 400 - cut] == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- devices


def test_a_state_is_loaded_with_any_map_location(tmp_path):
    scheduler = AutoWU(sgd(), total_steps=300, min_lr=1e-5, max_lr=1.0)
    advance(scheduler, VALLEY[:60])
    scheduler.observe(torch.tensor(1.5))
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    expected = advance(scheduler, VALLEY[60:300])
    for location in ("cpu", torch.device("cpu"), lambda storage, _: storage):
        other = AutoWU(sgd(), total_steps=50)
        other.load_state_dict(torch.load(tmp_path / "state.pt", map_location=location, weights_only=True))
        assert advance(other, VALLEY[60:300]) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("location", ["cpu", "cuda", None])
@pytest.mark.parametrize("later", ["cpu", "cuda"])
@pytest.mark.parametrize("gp", ["closed-form", "gpytorch"])
def test_the_state_of_a_gpu_run_goes_on_elsewhere(gp, later, location, tmp_path):
    def make(**arguments):
        return AutoWU(sgd(), total_steps=300, min_lr=1e-5, max_lr=1.0, test_interval=15, gp=gp, device="cpu", **arguments)

    # It learns again after the switch: there is nothing to set back, which the watch of losses on a GPU does in blocks.
    curve = [(1 + abs(k / 50 - 1) + 0.02 * ((k * 7) % 5)) * min(1, 90 / (k + 1)) ** 2 for k in range(300)]
    losses = torch.tensor(curve, dtype=torch.float64)
    expected = advance(make(), curve)
    scheduler = make()
    advance(scheduler, losses[:60].cuda())
    scheduler.observe(losses[60].cuda())
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    other = AutoWU(sgd(), total_steps=50, device="cpu")
    other.load_state_dict(torch.load(tmp_path / "state.pt", map_location=location, weights_only=True))
    other.optimizer.step()
    other.observe(losses[60].to(later))
    other.step()
    assert advance(other, losses[61:300].to(later)) == pytest.approx(expected[61:], rel=1e-12)  # a GPU sums in another order
    assert other.switch.by_test


# ---------------------------------------------------------------- groups, and states that do not fit


def grouped(*lrs, **more):
    return AutoWU(
        torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr, **more} for lr in lrs]), total_steps=50
    )


def test_a_state_of_more_groups_than_the_optimizer_is_refused_before_anything_is_changed():
    other = grouped(0.1)
    before = other.state_dict()
    with pytest.raises(ValueError, match="of 2 parameter groups: the optimizer has 1"):
        other.load_state_dict(grouped(0.3, 0.1).state_dict())
    assert other.state_dict()["groups"] == before["groups"]


def test_a_group_that_the_state_does_not_know_keeps_its_ratio_to_the_first():
    other = grouped(0.2, 0.1, lr_scale=0.5)
    other.load_state_dict(grouped(0.1).state_dict())
    first, second = other.get_last_lr()
    assert second == pytest.approx(first / 2)
    assert [float(lr) for lr in other.base_lrs] == [0.1, 0.1]
    other.optimizer.step()
    other.step(1.0)
    first, second = other.get_last_lr()
    assert second == pytest.approx(first / 2)


def test_base_lrs_come_from_the_state():
    other = grouped(0.7, 0.7)
    other.load_state_dict(grouped(0.3, 0.1).state_dict())
    assert other.base_lrs == [0.3, 0.1]


@pytest.mark.parametrize("key", ["judge", "state", "groups", "stage", "snapshot"])
def test_an_incomplete_state_is_refused_by_name(key):
    state = grouped(0.1).state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"without '{key}'"):
        grouped(0.1).load_state_dict(state)


def test_what_is_no_state_is_refused():
    with pytest.raises(TypeError, match="state_dict=None: must be a dictionary"):
        grouped(0.1).load_state_dict(None)
