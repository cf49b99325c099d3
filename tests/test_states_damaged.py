"""A state with one entry changed loads whole, or is refused in one line and leaves everything as it was."""

import functools
import math
from pathlib import Path

import pytest
import torch
from test_resume import assert_same
from torch import nn

from autowu import AutoWU, ClosedFormGP

_GONE = object()
OF_VERSION_4 = Path(__file__).parent / "data" / "states_version_4.pt"
RUN = {"steps_per_epoch": 10, "total_epochs": 30, "min_lr": 1e-5, "max_lr": 1.0, "test_interval": 4}


def made(groups=1, **arguments):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    parts = [[model.weight, model.bias]] if groups == 1 else [[model.weight], [model.bias]]
    optimizer = torch.optim.SGD([{"params": part} for part in parts], lr=0.1, momentum=0.9)
    return AutoWU(optimizer, model=model, **(RUN | arguments))


def advanced(scheduler, losses):
    for loss in losses:
        for group in scheduler.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.01)
        scheduler.optimizer.step()
        scheduler.step(loss)
    return scheduler


def valley(steps, start=0):
    return [1 + abs(k / 40 - 1) + 0.01 * ((k * 7) % 5) for k in range(start, steps)]


def with_a_block_to_be_read():
    state = advanced(made(), valley(23)).state_dict()
    return state | {"reader": state["reader"] | {"unread": [1.0, math.nan], "pending": [1.0, 2.0, 0.0]}}


def in_mid_step():
    scheduler = advanced(made(groups=2, decay_phase_stat="loss", decay_phase_factor=0.5, cooldown_fraction=0.1), valley(120))
    scheduler.observe(1.5)
    return scheduler.state_dict()


def of_the_paper():
    arguments = {name: value for name, value in RUN.items() if name not in ("steps_per_epoch", "total_epochs", "test_interval")}
    return advanced(AutoWU.paper(made().optimizer, 2, 20, test_interval=12, **arguments), valley(13)).state_dict()


STATES = {
    "at the start": lambda: made().state_dict(),
    "in the warm-up": lambda: advanced(made(groups=2), valley(33)).state_dict(),
    "a block to be read": with_a_block_to_be_read,
    "after the switch": lambda: advanced(made(immediate_cooldown=True), valley(90)).state_dict(),
    "plateau rule, in mid-step": in_mid_step,
    "of the paper": of_the_paper,
    "of version 4": lambda: torch.load(OF_VERSION_4, weights_only=True)["voting"]["scheduler"],
}


EVERY = {"of the paper": 5, "of version 4": 5}  # which load slowly
QUICK = 4  # of the values one in so many, another one at each entry


@functools.cache
def state_of(name):
    return STATES[name]()


def paths(value, path=()):
    """Every entry of a nested state, those that hold others too; of the lists of one kind only the first."""
    if path:
        yield path
    if isinstance(value, dict) and "rest" not in path:
        for key, inner in value.items():
            yield from paths(inner, (*path, key))
    elif isinstance(value, list | tuple) and value:
        yield from paths(value[0], (*path, 0))


def changed(value, path, to):
    """A copy of `value` with `to` at `path`."""
    key, *rest = path
    other = dict(value) if isinstance(value, dict) else list(value)
    other[key] = changed(value[key], rest, to) if rest else to
    if other[key] is _GONE:
        del other[key]
    return other


def others(value):
    """What may stand in the place of `value`, all of it wrong or at least unlike."""
    wrong = [None, True, False, math.nan, math.inf, -math.inf, "x" * 10**5, [], {}, [1.0, 2.0], {"x": 1}, object(), b"x", 1j]
    wrong += [-1, 0, 1, 3, 10**9, 2**63, -(10**30), 10**5000, -0.5, 0.5, 1e300]
    wrong += [torch.tensor(1.0), torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(7, dtype=torch.bool), torch.zeros(2).to_sparse()]
    if isinstance(value, torch.Tensor):
        wrong += [
            value.tolist(),
            value[None],
            value.to(torch.complex64),
            value.to("meta"),
            value.flatten()[:-1],
            value.repeat(2, *value.shape),
        ]
    if isinstance(value, list | tuple):
        wrong += [[*value, *value], list(value)[:-1], dict(enumerate(value)), "list"]
    if isinstance(value, dict):
        wrong += [value | {"unknown": 1}, value | {3: 1}, list(value.items())]
    return wrong


def seen_as_one(path, value):
    """Paths that are checked by the same words in every state."""
    place = tuple(key if isinstance(key, str) else "*" for key in path)
    return place, type(value)


@functools.cache
def entries_of(name):
    """Those that no state before has."""
    before, found = set(), []
    for other in list(STATES)[: list(STATES).index(name) + 1]:
        state = state_of(other)
        for path in paths(state):
            value = functools.reduce(lambda inner, key: inner[key], path, state)
            kind = (*seen_as_one(path, value), other == "of version 4")
            if kind not in before:
                before.add(kind)
                found += [path] if other == name else []
    return found


def refusal(scheduler, state):
    """Load a state; in which line it was refused, None where it was loaded."""
    try:
        scheduler.load_state_dict(state)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 500
        return message
    return None


def everything(scheduler):
    """The state of a scheduler, the LRs, and its engine."""
    lrs = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    return {"state": scheduler.state_dict(), "lrs": lrs, "engine": repr(scheduler.gp)}


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *(pytest.param(name, QUICK * EVERY.get(name, 1), id=name) for name in STATES),
        *(pytest.param(name, EVERY.get(name, 1), id=f"{name}, all values", marks=pytest.mark.slow) for name in STATES),
    ],
)
def test_a_state_with_one_entry_changed_is_loaded_whole_or_refused_whole(name, every):
    state = state_of(name)
    groups = len(state["base_lrs"])
    target = advanced(made(groups), valley(7))
    before = everything(target)
    for number, path in enumerate(entries_of(name)):
        value = functools.reduce(lambda inner, key: inner[key], path, state)
        for to in [_GONE, *others(value)[number % every :: every]]:
            message = refusal(target, changed(state, path, to))
            if message is None:  # plausible: the run goes on
                if not {"rest", "tensors"} & set(path):  # what the optimizer keeps is looked into when it goes back
                    advanced(target, valley(3))
                if path[0] == "config":  # a longer run stays longer
                    target = advanced(made(groups), valley(7))
                assert refusal(target, before["state"]) is None
            elif name != "of version 4" and len(path) > 1 and "without" not in message and path[:2] != ("judge", "gp"):
                assert message.startswith("state_dict["), message
                assert path[0] in message
        assert_same(everything(target), before)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("judge", "history", "steps"), 34, r'\["judge"\]\["history"\]\["steps"\]=34: must be at most 33'),
        (("judge", "history", "folded"), 2**40, r'\["judge"\]\["history"\]\["folded"\]'),
        (
            ("judge", "history", "max_points"),
            10**9,
            r'\["judge"\]\["history"\]\["max_points"\]=1000000000: must be an integer from 2',
        ),
        (("judge", "history", "stage"), 2**31, r'\["judge"\]\["history"\]\["stage"\]'),
        (("judge", "gp", "state", "lengthscale"), 1e-9, r'\["judge"\]\["gp"\]\["state"\]\["lengthscale"\]=1e-09: must be'),
        (("last_epoch",), 200, r'"step_count"\]=34: must be one more than last_epoch=200'),
        (("groups", "ratios"), [1.0], r'\["groups"\]\["ratios"\] of 1 groups'),
        (("config", "min_lr"), 7.0, r"min_lr=7.0: must be below max_lr=1.0"),
        (("config", "min_lr"), None, r'\["config"\]\["min_lr"\]=None: must be a number above 0'),
        (("config", "cooldown_type"), "cubic", r'\["config"\]\["cooldown_type"\]=\'cubic\': must be one of'),
        (("config", "stable_type"), "sqrt", r'\["config"\]\["stable_type"\]=\'sqrt\': must be one of'),
        (("config", "total_steps"), 40, r'\["config"\]: warmup_steps='),
        (("snapshot", "newer", "step"), 50, r'\["snapshot"\]\["newer"\]\["step"\]=50: must be at most 33'),
        (("judge", "posterior", "mean"), torch.zeros(2, 500).double(), r'\["posterior"\]\["variance"\] of shape \(1, 500\)'),
        (("reader", "watch", "best"), math.nan, r'\["reader"\]\["watch"\]\["best"\]=nan'),
        (("calls", "skipped"), True, r'\["calls"\]\["skipped"\]=True: must be an integer'),
    ],
)
def test_the_refusal_names_the_entry_and_what_it_may_be(path, value, named):
    state = changed(state_of("in the warm-up"), path, value)
    with pytest.raises((TypeError, ValueError), match=r"^state_dict.*" + named):
        made(groups=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("config", "max_lr"), 2.0), (("base_lrs",), [0.2, 0.2]), (("snapshot",), None), (("config", "patience"), 9)],
)
def test_what_is_plausible_loads(path, value):
    made(groups=2).load_state_dict(changed(state_of("in the warm-up"), path, value))


class Fragile(ClosedFormGP):
    """An engine that takes what it is given before it looks at it."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if state["lengthscale"] > 1:
            raise RuntimeError("pos\nand more")


def test_what_only_an_engine_finds_out_leaves_it_and_all_rooms_as_they_were():
    engine = Fragile(0.1)
    scheduler = advanced(made(gp=engine), valley(33))
    state = changed(scheduler.state_dict(), ("judge", "gp", "state"), {"lengthscale": 2.0})
    before = everything(advanced(scheduler, valley(36, 33)))
    assert refusal(scheduler, state) == "state_dict: the state is damaged (RuntimeError: pos and more)"
    assert scheduler.gp is engine
    assert_same(everything(scheduler), before)


def test_a_room_that_fails_when_others_have_loaded_takes_them_back(monkeypatch):
    scheduler = advanced(made(), valley(33))
    other = advanced(made(immediate_cooldown=True), valley(65))
    held = other._rooms.rollback.held
    assert held is not None

    def fail():
        raise MemoryError

    monkeypatch.setattr(other, "_write_lrs", fail)
    before = everything(other)
    assert refusal(other, scheduler.state_dict()).startswith("state_dict: the state is damaged (MemoryError")
    assert_same(everything(other), before)
    assert other._rooms.rollback.held == held
    assert other.phase == "cooldown"
