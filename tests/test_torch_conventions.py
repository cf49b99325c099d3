"""AutoWU beside torch's own schedulers: what a caller may expect of any LRScheduler, and optimizers under torch.compile."""

import copy
import functools
import gc
import io
import pickle
import types
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from autowu import AutoWU
from autowu.optim import LARS

TOTAL = 120
CURVE = [1 + abs(k / 30 - 1) + 0.02 * ((k * 7) % 5) for k in range(TOTAL + 20)]
"""Lowest at step 30; the runs below switch by test between steps 31 and 60."""
ORDER = "how-to-adjust-learning-rate"
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def parameter():
    return torch.nn.Parameter(torch.ones(3))


def two_groups():
    return [{"params": [parameter()]}, {"params": [parameter()], "lr": 0.02}]


def sgd(lr=0.1, groups=None):
    return torch.optim.SGD(groups or two_groups(), lr=lr, momentum=0.9)


def autowu(optimizer, **arguments):
    defaults = {"total_steps": TOTAL, "min_lr": 1e-5, "max_lr": 1.0, "immediate_cooldown": False}
    defaults |= {"warmup_type": "exp", "max_warmup_fraction": 0.4, "patience": 3}
    return AutoWU(optimizer, **(defaults | arguments))


def take(scheduler, losses):
    """One optimizer step for each loss; the LRs of all groups that they ran at."""
    lrs = []
    for loss in losses:
        lrs.append([float(g["lr"]) for g in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step(loss)
    return lrs


# ---------------------------------------------------------------- the state


DIFFERENT = {
    "range": {"max_lr": 7.0},
    "length": {"total_steps": 60, "immediate_cooldown": True, "cooldown_type": "linear"},
    "epochs": {"total_steps": None, "steps_per_epoch": 3, "total_epochs": 9, "warmup_unit": "epoch", "decay_phase_factor": 0.5},
    "rule": {"gp": "gpytorch", "patience": 9, "confidence": 0.6, "min_contrast": 0.0, "test_interval": 11},
}


@pytest.mark.parametrize(
    ("different", "taken"),
    [
        pytest.param(different, taken, id=f"{name}-{taken}", marks=[] if name == "rule" or taken == 20 else [pytest.mark.slow])
        for name, different in DIFFERENT.items()
        for taken in (0, 1, 20, 70, 119)
    ],
)
def test_a_state_makes_another_instance_alike(different, taken):
    scheduler, other = autowu(sgd()), autowu(sgd(lr=3.0), **different)
    take(scheduler, CURVE[:taken])
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.get_last_lr() == scheduler.get_last_lr()
    assert other.last_epoch == scheduler.last_epoch == taken
    rest = (CURVE * 2)[taken : taken + 100]
    assert take(other, rest) == take(scheduler, rest)
    assert other.get_last_lr() == scheduler.get_last_lr()


def test_the_state_leaves_the_optimizer_out():
    scheduler = autowu(sgd())
    take(scheduler, CURVE[:5])
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    assert "optimizer" not in scheduler.state_dict()
    assert b"torch.optim" not in buffer.getvalue()


# ---------------------------------------------------------------- attributes


def test_it_is_a_scheduler_of_torch():
    assert isinstance(autowu(sgd()), LRScheduler)


def test_base_lrs_and_initial_lrs_are_as_torch_sets_them():
    ours, theirs = sgd(), sgd()
    scheduler, reference = autowu(ours), ExponentialLR(theirs, 0.9)
    assert scheduler.base_lrs == reference.base_lrs == [0.1, 0.02]
    assert [g["initial_lr"] for g in ours.param_groups] == [g["initial_lr"] for g in theirs.param_groups] == [0.1, 0.02]
    take(scheduler, CURVE)
    assert [g["initial_lr"] for g in ours.param_groups] == [0.1, 0.02]


def test_an_initial_lr_that_is_there_stays():
    optimizer = sgd()
    for group, lr in zip(optimizer.param_groups, (0.5, 0.25), strict=True):
        group["initial_lr"] = lr
    scheduler = autowu(optimizer)
    assert [g["initial_lr"] for g in optimizer.param_groups] == scheduler.base_lrs == [0.5, 0.25]
    first, second = (g["lr"] for g in optimizer.param_groups)
    assert second == pytest.approx(first / 2)


def test_an_initial_lr_of_tensors_is_no_alias_of_the_lr():
    optimizer = sgd(lr=torch.tensor(0.1), groups=[{"params": [parameter()]}, {"params": [parameter()]}])
    scheduler = autowu(optimizer)
    take(scheduler, CURVE[:50])
    assert [float(g["initial_lr"]) for g in optimizer.param_groups] == pytest.approx([0.1, 0.1])
    assert [float(lr) for lr in scheduler.base_lrs] == pytest.approx([0.1, 0.1])


def test_last_epoch_counts_the_steps():
    scheduler = autowu(sgd())
    assert scheduler.last_epoch == 0
    for k in range(TOTAL + 10):
        take(scheduler, CURVE[k : k + 1])
        assert scheduler.last_epoch == k + 1


def test_the_first_lr_is_set_at_construction():
    optimizer = sgd()
    scheduler = autowu(optimizer)
    assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups] == [1e-5, pytest.approx(2e-6)]


def test_repr_names_class_phase_step_and_range():
    scheduler = autowu(sgd())
    assert repr(scheduler).startswith("AutoWU(phase='warmup', step=0/120, lr=1e-05, lr_range=(1e-05, 1)")
    take(scheduler, CURVE)
    assert repr(scheduler).startswith(f"AutoWU(phase='done', step=140/120, lr={scheduler.lr_at(140):.4g}, switch=(step=")


@pytest.mark.parametrize("cut", [3, 70, 110])
def test_a_group_added_later_runs_at_the_lr_of_torchs_ratio(cut):
    scheduler = autowu(sgd())
    take(scheduler, CURVE[:cut])
    optimizer = scheduler.optimizer
    optimizer.add_param_group({"params": [parameter()], "lr": optimizer.param_groups[0]["lr"] / 2})
    lrs = take(scheduler, CURVE[cut:])
    assert [lr[2] for lr in lrs] == pytest.approx([lr[0] / 2 for lr in lrs])
    assert len(scheduler.base_lrs) == len(scheduler.get_last_lr()) == 3
    assert all("initial_lr" in group for group in optimizer.param_groups)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("gp", ["closed-form", "gpytorch"])
def test_no_reference_cycle_holds_the_scheduler_or_its_optimizer(gp):
    scheduler = autowu(sgd(), gp=gp, test_interval=20)
    take(scheduler, CURVE)
    refs = weakref.ref(scheduler), weakref.ref(scheduler.optimizer)
    gc.collect()
    gc.disable()
    try:
        del scheduler
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_the_optimizer_does_not_hold_the_scheduler():
    optimizer = sgd()
    scheduler = autowu(optimizer)
    take(scheduler, CURVE[:50])
    assert not [r for r in gc.get_referrers(scheduler) if isinstance(r, dict | list | tuple) and r is not globals()]
    ref = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler
        assert ref() is None
    finally:
        gc.enable()
    optimizer.step()


def test_steps_tests_and_states_leave_nothing_to_collect():
    scheduler = autowu(sgd(lr=torch.tensor(0.1)), test_interval=2)
    take(scheduler, [torch.tensor(loss) for loss in CURVE[:20]])
    gc.collect()
    flags = gc.get_debug()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        take(scheduler, [torch.tensor(loss) for loss in CURVE[20:]])
        scheduler.load_state_dict(scheduler.state_dict())
        found = gc.collect()
        garbage = [type(thing).__name__ for thing in gc.garbage]
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.enable()
    assert (found, garbage) == (0, [])
    assert scheduler.switch.by_test


# ---------------------------------------------------------------- warnings about the order


def test_the_wrong_order_warns_once_as_torch_does():
    scheduler = autowu(sgd())
    with pytest.warns(UserWarning, match=ORDER) as caught:
        scheduler.step(1.0)
    assert len(caught) == 1
    take(scheduler, CURVE)  # a warning is an error here


def test_the_wrong_order_in_every_step_warns_once():
    scheduler = autowu(sgd())

    def step_first(losses):
        for loss in losses:
            scheduler.step(loss)
            scheduler.optimizer.step()

    with pytest.warns(UserWarning, match=ORDER) as caught:
        step_first(CURVE)
    assert len(caught) == 1
    assert scheduler.last_epoch == len(CURVE)


@pytest.mark.parametrize("taken", [0, 1, 40, TOTAL])
def test_the_right_order_warns_neither_at_the_start_nor_after_a_resume(taken):
    scheduler, other = autowu(sgd()), autowu(sgd())
    take(scheduler, CURVE[:taken])
    other.optimizer.load_state_dict(scheduler.optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    take(other, CURVE[taken:])
    assert other.last_epoch == len(CURVE)


def test_a_resumed_run_is_no_longer_asked_for_the_order():
    scheduler, other = autowu(sgd()), autowu(sgd())
    take(scheduler, CURVE[:2])
    other.load_state_dict(scheduler.state_dict())
    other.step(CURVE[2])  # a warning is an error here
    assert other.last_epoch == 3


def test_the_wrong_order_after_a_resume_at_the_start_warns():
    other = autowu(sgd())
    other.load_state_dict(autowu(sgd()).state_dict())
    with pytest.warns(UserWarning, match=ORDER):
        other.step(1.0)


@pytest.mark.parametrize("make", [autowu, lambda optimizer: ExponentialLR(optimizer, 0.9)], ids=["AutoWU", "torch"])
def test_an_overridden_optimizer_step_warns_as_torch_does(make):
    optimizer = sgd()
    scheduler = make(optimizer)
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match=rf"has been overridden.*{ORDER}") as caught:
        scheduler.step(*[1.0] if isinstance(scheduler, AutoWU) else [])
    assert len(caught) == 1
    assert scheduler.last_epoch == 1


BESIDE = {
    "StepLR": lambda optimizer: StepLR(optimizer, 30),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, 0.99),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 50),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda k: 1.0),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=1000),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer),
}


@pytest.mark.parametrize(
    ("make", "first"),
    [
        pytest.param(make, first, id=f"{name}-{first}", marks=[] if (k + (first == "other")) % 2 else [pytest.mark.slow])
        for k, (name, make) in enumerate(BESIDE.items())
        for first in ("autowu", "other")
    ],
)
def test_a_scheduler_of_torch_on_the_same_optimizer_does_not_warn(make, first):
    optimizer = sgd()
    if first == "other":
        other, scheduler = make(optimizer), autowu(optimizer)
    else:
        scheduler, other = autowu(optimizer), make(optimizer)
    for k, loss in enumerate(CURVE):
        optimizer.step()
        steps = [lambda loss=loss: scheduler.step(loss), lambda: other.step(*[1.0] if make is BESIDE["ReduceLROnPlateau"] else [])]
        for step in steps if first == "autowu" else reversed(steps):
            step()
        assert scheduler.last_epoch == other.last_epoch == k + 1


def test_a_scheduler_of_torch_still_warns_about_the_wrong_order():
    optimizer = sgd()
    autowu(optimizer)
    other = StepLR(optimizer, 30)
    with pytest.warns(UserWarning, match=ORDER):
        other.step()


def test_a_second_scheduler_after_the_first_is_gone_counts_every_step():
    optimizer = sgd()
    for _ in range(2):
        scheduler = autowu(optimizer)
        take(scheduler, CURVE)
        assert (scheduler.last_epoch, scheduler.phase) == (len(CURVE), "done")


# ---------------------------------------------------------------- tensor LRs


def test_tensor_lrs_stay_the_same_objects_in_all_phases():
    lr = torch.tensor(0.1, dtype=torch.float64)
    groups = [{"params": [parameter()]}, {"params": [parameter()]}, {"params": [parameter()], "lr": torch.tensor(0.05)}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    scheduler = autowu(optimizer)
    held = [(g["lr"], g["lr"].data_ptr()) for g in optimizer.param_groups]
    assert held[0][0] is lr
    assert len({pointer for _, pointer in held}) == 3
    plain = autowu(torch.optim.SGD([parameter()], lr=0.1))
    seen = set()
    for loss in CURVE:
        seen.add(scheduler.phase)
        expected, rates = plain.optimizer.param_groups[0]["lr"], [g["lr"] for g in optimizer.param_groups]
        assert [(rate, rate.data_ptr()) for rate in rates] == held
        assert all(rate is tensor for rate, (tensor, _) in zip(rates, held, strict=True))
        assert [float(rate) for rate in rates] == pytest.approx([expected, expected, expected / 2], rel=1e-6)
        take(plain, [loss])
        take(scheduler, [loss])
    assert seen == {"warmup", "stable", "cooldown"} | {"done"}


def test_tensor_lrs_are_restored_in_place():
    lr = torch.tensor(0.1)
    scheduler, other = autowu(sgd(lr=0.1)), autowu(sgd(lr=lr))
    take(scheduler, CURVE[:50])
    other.load_state_dict(scheduler.state_dict())
    assert other.optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(scheduler.get_last_lr()[0])


@functools.cache
def lrs_of_a_run():
    return take(autowu(sgd(lr=torch.tensor(0.1))), CURVE)


@pytest.mark.skipif(TORCH < (2, 6), reason="torch before 2.6 hands out the tensors of the groups themselves")
@pytest.mark.parametrize("stage", [0, 20, 70, 110, 130])
def test_what_get_last_lr_returns_cannot_corrupt_the_schedule(stage):
    expected = lrs_of_a_run()
    scheduler = autowu(sgd(lr=torch.tensor(0.1)))
    lrs = take(scheduler, CURVE[:stage])
    for lr in scheduler.get_last_lr():
        torch.as_tensor(lr).fill_(99.0)
    for lr in scheduler.base_lrs:
        torch.as_tensor(lr).fill_(77.0)
    scheduler.get_last_lr().clear()
    assert lrs + take(scheduler, CURVE[stage:]) == expected


@pytest.mark.skipif(TORCH < (2, 6), reason="torch before 2.6 hands out the tensors of the groups themselves")
def test_what_get_last_lr_returns_cannot_corrupt_a_restored_schedule():
    scheduler, other = autowu(sgd(lr=torch.tensor(0.1))), autowu(sgd(lr=torch.tensor(0.1)))
    take(scheduler, CURVE[:50])
    other.load_state_dict(scheduler.state_dict())
    before = [float(g["lr"]) for g in other.optimizer.param_groups]
    for lr in other.get_last_lr():
        torch.as_tensor(lr).fill_(99.0)
    assert [float(g["lr"]) for g in other.optimizer.param_groups] == before


# ---------------------------------------------------------------- copies


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize(
    ("copied", "lr", "taken"),
    [
        pytest.param(
            copied, lr, taken, id=f"{name}-{kind}-{taken}", marks=[] if kind == "tensor" or taken == 40 else [pytest.mark.slow]
        )
        for name, copied in COPIES.items()
        for kind, lr in (("float", 0.1), ("tensor", torch.tensor(0.1)))
        for taken in (1, 40, 80, 115)
    ],
)
def test_a_pair_of_optimizer_and_scheduler_is_copied_as_a_pair(taken, lr, copied):
    scheduler = autowu(sgd(lr=lr))
    take(scheduler, CURVE[:taken])
    optimizer, other = copied((scheduler.optimizer, scheduler))
    assert other.optimizer is optimizer
    assert optimizer is not scheduler.optimizer
    before = scheduler.get_last_lr()
    lrs = take(other, CURVE[taken:])
    assert scheduler.get_last_lr() == before
    assert lrs == take(scheduler, CURVE[taken:])


# ---------------------------------------------------------------- torch.compile


SECOND_STEP = 3
"""Compiled anew in step 2, in which momentum buffers exist for the first time; never after."""

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.1), momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
    "LARS": lambda parameters: LARS(torch.optim.SGD(parameters, lr=torch.tensor(0.1), momentum=0.9)),
}

# Dynamo itself reads .grad of tensors that are no leaves where backward() splits a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Trained:
    """A small network on fixed data; the loss that the scheduler is told is that of `CURVE`, so that the switch is sure."""

    def __init__(self, make, **arguments):
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        self.optimizer = make(self.model.parameters())
        self.inputs, self.targets = torch.randn(16, 8), torch.randn(16, 1)
        self.scheduler = autowu(self.optimizer, **arguments)
        self.step = self.optimizer.step

    def train_step(self):
        loss = torch.nn.functional.mse_loss(self.model(self.inputs), self.targets)
        loss.backward()
        self.step()
        self.optimizer.zero_grad()

    def run(self, train_step, start, stop):
        lrs = []
        for k in range(start, stop):
            lrs.append(float(self.optimizer.param_groups[0]["lr"]))
            train_step()
            self.scheduler.step(CURVE[k])
            assert self.scheduler.last_epoch == k + 1
        return lrs


def compiled_step(trained, backend):
    trained.step = torch.compile(trained.optimizer.step, backend=backend)
    return trained.train_step


def compiled_train_step(trained, backend):
    return torch.compile(trained.train_step, backend=backend)


def replaced_step(trained, backend):
    trained.optimizer.step = trained.step = torch.compile(trained.optimizer.step, backend=backend)
    return trained.train_step


WAYS = [compiled_step, compiled_train_step, replaced_step]


# LARS is one graph from torch 2.6 on.
TRACED = {"LARS": [pytest.mark.skipif(torch.__version__ < (2, 6), reason="needs torch 2.6")]}
QUICK = {("LARS", compiled_train_step), ("SGD", replaced_step), ("AdamW", compiled_step)}  # each optimizer, and each way
COMPILED = [
    pytest.param(
        make,
        way,
        id=f"{name}-{way.__name__}",
        marks=TRACED.get(name, []) + ([] if (name, way) in QUICK else [pytest.mark.slow]),
    )
    for name, make in OPTIMIZERS.items()
    for way in WAYS
]


@pytest.mark.parametrize(("make", "compiled"), COMPILED)
def test_a_compiled_step_is_not_compiled_again_as_the_lr_changes(make, compiled):
    trained, counter = Trained(make), CompileCounter()
    train_step = compiled(trained, counter)
    lrs = trained.run(train_step, 0, SECOND_STEP)
    compilations = counter.frame_count
    assert compilations > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        lrs += trained.run(train_step, SECOND_STEP, SECOND_STEP + 70)
    assert counter.frame_count == compilations
    assert trained.scheduler.switch.by_test
    assert len(set(lrs)) > 30

    eager = Trained(make)
    assert eager.run(eager.train_step, 0, SECOND_STEP + 70) == lrs
    for a, b in zip(trained.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # compiled steps use the arithmetic of `capturable`


@pytest.mark.parametrize(
    "make", [pytest.param(m, id=name, marks=TRACED.get(name, [pytest.mark.slow])) for name, m in OPTIMIZERS.items()]
)
def test_a_step_compiled_by_aot_eager_advances_the_schedule(make):
    trained = Trained(make)
    train_step = compiled_step(trained, "aot_eager")
    lrs = trained.run(train_step, 0, SECOND_STEP)
    with torch._dynamo.config.patch(error_on_recompile=True):
        lrs += trained.run(train_step, SECOND_STEP, SECOND_STEP + 50)
    assert trained.scheduler.switch.by_test
    eager = Trained(make)
    assert eager.run(eager.train_step, 0, SECOND_STEP + 50) == lrs


@pytest.mark.parametrize("compiled", WAYS)
def test_a_call_without_a_compiled_step_before_it_does_not_count(compiled):
    trained = Trained(OPTIMIZERS["SGD"])
    train_step = compiled(trained, CompileCounter())
    for k in range(10):
        train_step()
        for _ in range(3):
            trained.scheduler.step(CURVE[k])
        assert trained.scheduler.last_epoch == trained.scheduler.history.steps == k + 1


def test_a_step_compiled_before_the_scheduler_was_made_advances_it():
    torch._dynamo.reset()
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="eager")
    scheduler = autowu(optimizer)

    for k in range(TOTAL):
        weight.grad = torch.ones_like(weight)
        step()
        scheduler.step(CURVE[k])
    assert (scheduler.last_epoch, scheduler.phase) == (TOTAL, "done")


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="a torch whose compiler goes on, frame by frame, where it has given up")
def test_a_compiled_function_may_hold_the_scheduler_too():
    trained = Trained(OPTIMIZERS["SGD"])

    @torch.compile(backend="eager")
    def both(loss):
        trained.optimizer.step()
        trained.scheduler.step(loss)

    lrs = []
    for k in range(60):
        lrs.append(float(trained.optimizer.param_groups[0]["lr"]))
        torch.nn.functional.mse_loss(trained.model(trained.inputs), trained.targets).backward()
        both(CURVE[k])
        trained.optimizer.zero_grad()
        assert trained.scheduler.last_epoch == k + 1
    eager = Trained(OPTIMIZERS["SGD"])
    assert eager.run(eager.train_step, 0, 60) == lrs
