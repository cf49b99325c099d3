"""A run put back to its snapshot goes on as it went on from there, and AutoWU puts it back at the switch."""

import copy
import functools
import io
import math
import threading

import pytest
import timm.optim
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from autowu import AutoWU, snapshot
from autowu.live import LiveRun
from autowu.multi_optimizer import MultiOptimizer
from autowu.optim import LAMB, LARS, TVLARS, Muon
from autowu.snapshot import Snapshot, free_memory

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd for-loop": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "lbfgs-like lists": lambda p: Listing(p),
    "lars": lambda p: LARS(torch.optim.SGD(p, lr=1.0, momentum=0.9)),
    "lamb": lambda p: timm.optim.Lamb(p, lr=0.01),
    "sam": lambda p: Sharpened(p),
    "lookahead": lambda p: timm.optim.Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9), k=3),
}


class Listing(torch.optim.Optimizer):
    """An optimizer that keeps lists and numbers: it goes along the mean of the last gradients, by a step that grows."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "growth": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["growth"] *= 1.1
            for p in group["params"]:
                last = self.state[p].setdefault("last", [])
                last.append(p.grad.clone())
                p -= group["lr"] * group["growth"] * torch.stack(last[-5:]).mean(0)


class Sharpened(torch.optim.Optimizer):
    """As SAM does, it holds the optimizer that takes its steps as `base_optimizer` and shares its groups with it."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01, "rho": 0.05})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=0.01)
        self.param_groups = self.base_optimizer.param_groups

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rises"] = self.state[p].get("rises", 0) + 1
        self.base_optimizer.step()


@functools.cache
def digits():
    read = load_digits()
    return torch.tensor(read.data / 16, dtype=torch.float32), torch.tensor(read.target)


class Training:
    """A small network with batch norm on the digits, one batch a step, the same ones every time."""

    def __init__(self, make, **arguments):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        self.optimizer = make(self.model.parameters())
        self.inputs, self.targets = (t.split(100) for t in digits())

    def steps(self, start, stop):
        for k in range(start, stop):
            loss = nn.functional.cross_entropy(self.model(self.inputs[k % 17]), self.targets[k % 17])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return self

    def tensors(self):
        return [t.clone() for t in (*self.model.parameters(), *self.model.buffers())]


def assert_equal(ours, others):
    assert len(ours) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        pytest.param(name, taken, marks=[] if taken == 7 or name in ("adamw fused", "lars") else [pytest.mark.slow])
        for name in OPTIMIZERS
        for taken in (0, 1, 7)
    ],
)
def test_a_restored_run_goes_on_as_it_did(name, taken):
    run = Training(OPTIMIZERS[name]).steps(0, taken)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    snapshot.take(taken)
    expected = run.steps(taken, taken + 9).tensors()
    run.steps(0, 5)
    assert snapshot.restore() == []
    assert_equal(run.steps(taken, taken + 9).tensors(), expected)
    snapshot.restore()  # the copy is still there
    assert_equal(run.steps(taken, taken + 9).tensors(), expected)


def test_tensors_are_restored_in_place_and_copied_into_the_same_room():
    run = Training(OPTIMIZERS["adamw"]).steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    snapshot.take(3)
    room = [t.data_ptr() for t in snapshot._copies.values()]
    live = [t.data_ptr() for t in (*run.model.parameters(), *run.model.buffers())]
    state = [s["exp_avg"].data_ptr() for s in run.optimizer.state.values()]
    run.steps(3, 6)
    snapshot.take(6)
    run.steps(6, 9)
    snapshot.restore()
    assert [t.data_ptr() for t in snapshot._copies.values()] == room
    assert [t.data_ptr() for t in (*run.model.parameters(), *run.model.buffers())] == live
    assert [s["exp_avg"].data_ptr() for s in run.optimizer.state.values()] == state


def test_the_lr_is_the_schedules():
    run = Training(OPTIMIZERS["amsgrad"]).steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    snapshot.take(3)
    run.optimizer.param_groups[0]["lr"].fill_(7.0)
    snapshot.restore()
    assert run.optimizer.param_groups[0]["lr"] == 7.0


def test_parameters_outside_the_model_are_copied_too():
    run = Training(OPTIMIZERS["sgd"])
    scale = nn.Parameter(torch.ones(1))
    run.optimizer.add_param_group({"params": [scale]})
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    snapshot.take(0)
    scale.data.fill_(5.0)
    snapshot.restore()
    assert scale.item() == 1.0


def test_without_a_copy_there_is_nothing_to_restore():
    run = Training(OPTIMIZERS["sgd"])
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    with pytest.raises(RuntimeError, match="no snapshot"):
        snapshot.restore()
    snapshot.take(0)
    snapshot.free()
    assert snapshot.step is None
    assert not snapshot._copies


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        ("buffer", math.nan),
        *((where, bad) for where in ("parameter", "state") for bad in (math.nan, math.inf, -math.inf)),
    ],
)
def test_what_is_not_finite_is_not_sound(where, bad):
    run = Training(OPTIMIZERS["adamw"]).steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    assert snapshot.live.sound() == 1.0
    tensors = {
        "parameter": run.model[3].bias.data,
        "buffer": run.model[1].running_var,
        "state": run.optimizer.state[run.model[0].weight]["exp_avg_sq"],
    }
    tensors[where].view(-1)[3] = bad
    assert snapshot.live.sound() == 0.0


def test_an_infinite_mask_among_the_buffers_is_sound():
    run = Training(OPTIMIZERS["sgd"])
    run.model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    assert snapshot.live.sound() == 1.0
    run.model.mask[0, 0] = math.nan
    assert snapshot.live.sound() == 0.0


def test_huge_but_finite_is_sound():
    run = Training(OPTIMIZERS["sgd"])
    run.model[0].weight.data.fill_(3e38)
    assert Snapshot(LiveRun(run.optimizer, run.model)).live.sound() == 1.0


def trained(make=OPTIMIZERS["adamw"], given=True):
    """A run of three steps and its copy, taken then."""
    run = Training(make).steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model if given else None))
    snapshot.take(3)
    return run, snapshot


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_model_parameters_and_their_state_go_back(name):
    run, snapshot = trained(OPTIMIZERS[name], given=False)
    weights = [p.clone() for p in run.model.parameters()]
    inner = getattr(run.optimizer, "base_optimizer", run.optimizer)
    state = copy.deepcopy([inner.state[p] for p in run.model.parameters()])
    mean = run.steps(3, 6).model[1].running_mean.clone()
    assert snapshot.restore() == []
    assert_equal(list(run.model.parameters()), weights)
    torch.testing.assert_close([inner.state[p] for p in run.model.parameters()], state, rtol=0, atol=0)
    assert torch.equal(run.model[1].running_mean, mean)


@pytest.mark.parametrize("place", [0, -1])
def test_a_parameter_that_joined_since_stays_as_it_is_and_is_named(place):
    run, snapshot = trained(given=False)
    weights = [p.clone() for p in run.model.parameters()]
    late = nn.Parameter(torch.ones(3))
    if place == 0:  # before all others
        run.optimizer.param_groups[0]["params"].insert(0, late)
    else:
        run.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    run.optimizer.step()
    moved, momentum = late.clone(), run.optimizer.state[late]["exp_avg"].clone()
    assert snapshot.restore() == ["0" if place == 0 else "6"]
    assert_equal([*run.model.parameters(), late, run.optimizer.state[late]["exp_avg"]], [*weights, moved, momentum])


def test_a_parameter_that_was_replaced_keeps_its_own_moments():
    run, snapshot = trained()
    before = run.model[0].weight.clone()
    run.model[3] = nn.Linear(16, 12)
    old = run.optimizer.param_groups[0]["params"]
    run.optimizer.param_groups[0]["params"] = [*old[:4], *run.model[3].parameters()]
    run.steps(3, 6)
    head = [t.clone() for p in run.model[3].parameters() for t in (p, run.optimizer.state[p]["exp_avg"])]
    assert snapshot.restore() == ["3.weight", "3.bias"]
    assert torch.equal(run.model[0].weight, before)
    assert_equal([t for p in run.model[3].parameters() for t in (p, run.optimizer.state[p]["exp_avg"])], head)


def test_a_parameter_of_another_shape_stays_whole():
    run, snapshot = trained()
    run.model[3].bias.data = torch.full((12,), 5.0)
    run.optimizer.state[run.model[3].bias]["exp_avg"] = torch.full((12,), 7.0)
    assert snapshot.restore() == ["3.bias"]
    assert (run.model[3].bias == 5.0).all()
    assert (run.optimizer.state[run.model[3].bias]["exp_avg"] == 7.0).all()


def test_a_parameter_that_was_frozen_since_goes_back_too():
    run = Training(lambda p: torch.optim.SGD(p, lr=0.1)).steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    snapshot.take(3)
    before = run.model[0].weight.clone()
    run.steps(3, 6).model[0].weight.requires_grad_(False)
    assert snapshot.restore() == []
    assert torch.equal(run.model[0].weight, before)


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize(
    "named", [lambda run, average: nn.ModuleList([run.model, average]), lambda run, average: both(run, average)]
)
def test_an_average_that_begins_after_the_copy_begins_again_where_it_is_lost(lost, named):
    run = Training(OPTIMIZERS["adamw"])
    average = copy.deepcopy(run.model).requires_grad_(False)
    snapshot = Snapshot(LiveRun(run.optimizer, named(run, average)))
    run.steps(0, 3)
    snapshot.take(3)
    weights = [p.detach().clone() for p in run.model.parameters()]
    run.steps(3, 5)
    for mean, parameter in zip(average.parameters(), run.model.parameters(), strict=True):
        mean.data.lerp_(parameter.data * (math.nan if lost else 1.0), 0.5)
    before = [mean.clone() for mean in average.parameters()]
    left = snapshot.restore()
    expected = weights if lost else before
    assert all(torch.equal(mean, now) for mean, now in zip(average.parameters(), expected, strict=True))
    assert (left == []) == lost
    assert bool(snapshot.live.sound())


def both(run, average):
    """Under names of which several end alike."""
    holder = nn.Module()
    holder.student, holder.teacher, holder.other = nn.Sequential(run.model), nn.Sequential(average), nn.Linear(3, 3)
    return holder


def test_an_average_of_the_weights_goes_back_from_a_saved_copy():
    def averaged():
        run = Training(OPTIMIZERS["adamw"])
        average = copy.deepcopy(run.model).requires_grad_(False)
        return run, average, Snapshot(LiveRun(run.optimizer, nn.ModuleList([run.model, average])))

    run, average, taken = averaged()
    run.steps(0, 3)
    average[0].weight.data.lerp_(run.model[0].weight.data, 0.5)
    taken.take(3)
    _, again, snapshot = averaged()
    snapshot.load_state_dict(copy.deepcopy(taken.state_dict()))
    again[0].weight.data.fill_(math.nan)
    assert snapshot.misfit() is None
    assert snapshot.restore() == []
    assert torch.equal(again[0].weight, average[0].weight)


def test_a_buffer_that_grew_and_one_that_is_expanded_go_back():
    run = Training(OPTIMIZERS["sgd"])
    run.model.register_buffer("queue", torch.arange(3.0))
    run.model.register_buffer("wide", torch.ones(1).expand(5))
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    snapshot.take(0)
    run.model.queue = torch.arange(9.0)
    run.model.wide[:1] = 4.0
    assert snapshot.restore() == []
    assert torch.equal(run.model.queue, torch.arange(3.0))
    assert torch.equal(run.model.wide, torch.ones(5))
    run.model.queue += 1
    snapshot.restore()
    assert torch.equal(run.model.queue, torch.arange(3.0))


def test_an_extra_state_goes_back():
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model = nn.Sequential(Counting(2, 1))
    model[0].seen = 3
    snapshot = Snapshot(LiveRun(torch.optim.SGD(model.parameters(), lr=0.1), nn.DataParallel(model)))
    snapshot.take(0)
    model[0].seen = 9
    snapshot.restore()
    assert model[0].seen == 3


def test_state_that_the_optimizer_has_made_anew_in_another_shape_comes_back():
    run, snapshot = trained()
    expected = copy.deepcopy(run.optimizer.state_dict()["state"])
    run.optimizer.state[run.model[3].bias]["exp_avg"] = torch.zeros(3, 10)
    run.optimizer.state[run.model[0].bias]["exp_avg"] = 0.0
    assert snapshot.restore() == []
    torch.testing.assert_close(run.optimizer.state_dict()["state"], expected, rtol=0, atol=0)


def test_state_that_the_optimizer_has_dropped_comes_back():
    run, snapshot = trained()
    expected = copy.deepcopy(run.optimizer.state_dict()["state"])
    run.optimizer.state.clear()
    snapshot.restore()
    torch.testing.assert_close(run.optimizer.state_dict()["state"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("saved", "loaded"), [(nn.DataParallel, None), (None, nn.DataParallel), (torch.compile, None)])
def test_a_copy_of_a_wrapped_model_fits_the_bare_one(saved, loaded):
    run, other = Training(OPTIMIZERS["adamw"]).steps(0, 3), Training(OPTIMIZERS["adamw"]).steps(0, 1)
    taken = Snapshot(LiveRun(run.optimizer, saved(run.model) if saved else run.model))
    taken.take(3)
    snapshot = Snapshot(LiveRun(other.optimizer, loaded(other.model) if loaded else other.model))
    snapshot.load_state_dict(copy.deepcopy(taken.state_dict()))
    assert snapshot.restore() == []
    # DataParallel moves a model to the GPU, if there is one.
    torch.testing.assert_close(other.tensors(), run.tensors(), rtol=0, atol=0, check_device=False)
    states = other.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0, check_device=False)


def test_with_the_model_a_loaded_copy_goes_by_name_not_by_place():
    run, other = Training(OPTIMIZERS["adamw"]).steps(0, 3), Training(lambda p: OPTIMIZERS["adamw"](reversed(list(p)))).steps(0, 1)
    taken = Snapshot(LiveRun(run.optimizer, run.model))
    taken.take(3)
    snapshot = Snapshot(LiveRun(other.optimizer, other.model))
    snapshot.load_state_dict(copy.deepcopy(taken.state_dict()))
    snapshot.restore()
    for ours, theirs in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(other.optimizer.state[theirs], run.optimizer.state[ours], rtol=0, atol=0)


@pytest.mark.parametrize("change", ["another head", "a layer less", "without the model"])
def test_a_loaded_copy_that_does_not_fit_is_refused_before_anything_is_written(change):
    run, other = Training(OPTIMIZERS["adamw"]).steps(0, 3), Training(OPTIMIZERS["adamw"])
    taken = Snapshot(LiveRun(run.optimizer, run.model))
    taken.take(3)
    if change != "without the model":
        other.model = nn.Sequential(*other.model[:3], *([nn.Linear(16, 12)] if change == "another head" else []))
        other.optimizer = OPTIMIZERS["adamw"](other.model.parameters())
    before = other.tensors()
    snapshot = Snapshot(LiveRun(other.optimizer, None if change == "without the model" else other.model))
    snapshot.load_state_dict(taken.state_dict())
    reason = "which takes the model= it was made with" if change == "without the model" else "the run has none of that shape"
    assert reason in snapshot.misfit()
    with pytest.raises(RuntimeError, match=reason):
        snapshot.restore()
    assert_equal(other.tensors(), before)


def test_a_copy_that_has_no_room_says_so(monkeypatch):
    run, snapshot = Training(OPTIMIZERS["sgd"]), None
    monkeypatch.setattr("autowu.snapshot.free_memory", lambda device: 1000.0)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model))
    with pytest.raises(MemoryError, match=r"a copy of .* GB has no room in the 1e-06 GB"):
        snapshot.take(0)
    assert snapshot.step is None


def test_the_memory_of_the_host_is_known():
    assert 1e8 < free_memory(torch.device("cpu")) < 1e14


ON_A_GPU = {
    **{name: OPTIMIZERS[name] for name in ("sgd", "adamw", "adamw fused", "lars", "lamb", "sam", "lookahead")},
    "adamw capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "LAMB": lambda p: LAMB(p, lr=0.01),
    "TVLARS": lambda p: TVLARS(p, lr=0.1),
    "Muon": lambda p: Muon([{"params": [q for q in p if q.ndim == 2]}], lr=0.02),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("way", ["beside", "on the host", "loaded"])
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_run_on_a_gpu_goes_on_as_it_did(name, way, cleared):
    run = Training(ON_A_GPU["sgd"])
    run.model.cuda()
    run.inputs, run.targets = ([t.cuda() for t in ts] for ts in (run.inputs, run.targets))
    run.optimizer = ON_A_GPU[name](run.model.parameters())
    run.steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model), torch.device("cpu") if way == "on the host" else None)
    snapshot.take(3)
    expected = run.steps(3, 9).tensors()
    if way == "loaded":
        snapshot.load_state_dict(copy.deepcopy(snapshot.state_dict()))
    if cleared:
        run.optimizer.state.clear()
    assert snapshot.restore() == []
    assert_equal(run.steps(3, 9).tensors(), expected)


@pytest.mark.parametrize(
    ("name", "options"), [("adamw", {}), ("adamw", {"capturable": True}), ("adamw", {"fused": True}), ("sgd", {})]
)
def test_moments_of_every_shape_go_where_their_parameter_is_and_counters_where_the_optimizer_reads_them(name, options):
    def run(device):
        model = nn.ParameterDict({"matrix": torch.ones(2, 2), "scale": torch.tensor(1.0)}).to(device)
        return model, OPTIMIZERS[name](model.parameters())

    model, optimizer = run("cpu")
    (model["matrix"].sum() * model["scale"]).backward()
    optimizer.step()
    snapshot = Snapshot(LiveRun(optimizer, model))
    snapshot.take(1)
    elsewhere, begun = run("meta")
    begun.param_groups[0].update(options)  # at construction some ask for a GPU
    loaded = Snapshot(LiveRun(begun, elsewhere))
    loaded.load_state_dict(snapshot.state_dict())
    loaded.restore()
    for parameter in elsewhere.values():
        state = dict(begun.state[parameter])
        if (counter := state.pop("step", None)) is not None:
            assert counter.device.type == ("meta" if options else "cpu")
        assert state
        assert all(moment.is_meta and moment.shape == parameter.shape for moment in state.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_in_host_memory_is_pinned():
    run = Training(OPTIMIZERS["adamw"])
    run.model.cuda()
    run.inputs, run.targets = ([t.cuda() for t in ts] for ts in (run.inputs, run.targets))
    run.optimizer = OPTIMIZERS["adamw"](run.model.parameters())
    run.steps(0, 3)
    snapshot = Snapshot(LiveRun(run.optimizer, run.model), torch.device("cpu"))
    snapshot.take(3)
    expected = run.steps(3, 9).tensors()
    originals = LiveRun(run.optimizer, run.model).look().tensors  # AdamW's counters are on the host themselves
    assert {key for key, t in snapshot._copies.items() if t.is_pinned()} == {key for key, t in originals.items() if t.is_cuda}
    snapshot.restore()
    assert_equal(run.steps(3, 9).tensors(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_on_its_way_to_host_memory_is_waited_for_where_it_is_saved():
    model = nn.Linear(4096, 4096, device="cuda")
    snapshot = Snapshot(LiveRun(torch.optim.SGD(model.parameters(), lr=0.1), model), torch.device("cpu"))
    snapshot.take(0)
    busy = torch.randn(8192, 8192, device="cuda")
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(step)
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ busy)  # the device has more to do when the copy is asked for
        snapshot.take(step)
        saved = snapshot.state_dict()["tensors"]["parameter", "weight"]
        assert (saved == step).all()


# ---------------------------------------------------------------- in AutoWU


def perceptron(seed, epochs=30, **arguments):
    """An MLP without normalisation, which an overshoot can destroy; AutoWU's end of the story and the accuracy."""
    torch.manual_seed(seed)
    inputs, targets = digits()
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keeps = {"model": model} if arguments.pop("keeps") else {"rollback": False}
    scheduler = AutoWU(optimizer, steps_per_epoch=14, total_epochs=30, **keeps, **arguments)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(inputs)).split(128)[:14]:
            loss = nn.functional.cross_entropy(model(inputs[index]), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
    return scheduler, (model(inputs).argmax(1) == targets).float().mean().item()


# Quick are one that is set back by a test and the one that explodes.
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_overshoot_leaves_no_trace(seed, caplog):
    with caplog.at_level("INFO", logger="autowu"):
        scheduler, accuracy = perceptron(seed, keeps=True)
    assert scheduler.switch.by_test == (seed != 2)
    assert ("explosion" in [event.kind for event in scheduler.events]) == (seed == 2)
    assert accuracy > 0.98
    assert "model and optimizer are back at step" in caplog.text
    assert scheduler._rooms.rollback.held is None  # given back


FAR_UP = {"warmup_type": "exp", "max_warmup_fraction": 0.4, "patience": 5}


def test_without_going_back_it_does():
    damaged = next(seed for seed in (2, 0, 1, 3) if perceptron(seed, keeps=False, **FAR_UP)[1] < 0.9)
    assert perceptron(damaged, keeps=True, **FAR_UP)[1] > 0.98


@pytest.mark.slow
def test_going_back_no_seed_is_left_with_one():
    assert min(perceptron(seed, keeps=True, **FAR_UP)[1] for seed in range(4)) > 0.98


def regression(seed, steps=300, **arguments):
    """A perceptron without normalisation on the raw diabetes data, by the plain call; AutoWU's end of the story and the loss."""
    torch.manual_seed(seed)
    diabetes = load_diabetes()
    inputs = torch.tensor(diabetes.data / diabetes.data.std(0), dtype=torch.float32)
    targets = torch.tensor(diabetes.target, dtype=torch.float32)[:, None]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = AutoWU(optimizer, total_steps=steps, **arguments)
    for _ in range(steps):
        index = torch.randint(442, (64,))
        loss = nn.functional.mse_loss(model(inputs[index]), targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    return scheduler, nn.functional.mse_loss(model(inputs), targets).item()


LONG = pytest.param(13, 800, marks=pytest.mark.slow)  # which comes apart, before it has come down, to 1e22


@pytest.mark.parametrize(("seed", "steps"), [(0, 300), *(pytest.param(seed, 300, marks=pytest.mark.slow) for seed in (1, 2)), LONG])
def test_the_plain_call_survives_an_explosion(seed, steps):
    scheduler, loss = regression(seed, steps)
    assert "lost" not in [event.kind for event in scheduler.events]
    assert loss < 10_000  # 29,000 at the start


@pytest.mark.parametrize("seed", [12, 15])
def test_a_run_that_comes_apart_again_and_again_ends_with_finite_weights(seed):
    """Three setbacks were all, and copies taken soon after going back were no better than what had come apart."""
    scheduler, loss = regression(seed)
    assert math.isfinite(loss)
    assert "lost" not in [event.kind for event in scheduler.events]


@pytest.mark.parametrize("at", [250, 299])
def test_weights_that_are_lost_when_the_watch_is_over_are_an_error(at, caplog):
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 1), torch.randn(64, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoWU(optimizer, total_steps=300)
    for step in range(300):
        loss = (model(inputs) - inputs[:, :1]).square().mean() * (math.nan if step == at else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(loss)
    (event,) = [event for event in scheduler.events if event.kind == "lost"]
    assert at < event.step <= min(at + scheduler.config.test_interval, 300)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "start again from a checkpoint" in record.getMessage()


def test_without_going_back_weights_that_are_lost_are_an_error_and_no_lower_peak(caplog):
    scheduler, loss = regression(0, rollback=False)
    assert math.isnan(loss)
    assert [event.kind for event in scheduler.events] == ["loss", "explosion", "lost", "switch", "peak"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "rollback=False" in record.getMessage()


def test_memory_is_said_when_the_scheduler_is_made(caplog):
    run = Training(OPTIMIZERS["sgd"])
    with caplog.at_level("INFO", logger="autowu"):
        AutoWU(run.optimizer, total_steps=100, model=run.model)
        AutoWU(run.optimizer, total_steps=100, rollback=False)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "at most two of 0.005104 MB of parameters and buffers" in message
    assert "rollback=False" in message


def test_the_snapshot_changes_no_decision():
    kept, plain = (perceptron(1, epochs=13, keeps=keeps)[0].switch for keeps in (True, False))
    assert kept == plain
    assert plain.by_test


def test_a_loss_that_falls_to_the_limit_of_the_warmup_keeps_the_model_as_it_is():
    run = Training(OPTIMIZERS["sgd"])
    scheduler = AutoWU(run.optimizer, total_steps=200, model=run.model, max_warmup_fraction=0.5, immediate_cooldown=True)
    for k in range(100):
        run.optimizer.step()
        scheduler.step(3.0 - k / 100)
        with torch.no_grad():
            run.model[3].bias.fill_(k)
    assert scheduler.switch.step == 100
    assert run.model[3].bias[0] == 99


def test_weights_that_are_not_finite_are_no_snapshot():
    run = Training(OPTIMIZERS["sgd"])
    scheduler = AutoWU(run.optimizer, total_steps=400, model=run.model)
    taken = []
    for k in range(60):
        run.optimizer.step()
        if k == 40:
            run.model[3].bias.data.fill_(math.nan)  # a loss that is still finite
        scheduler.step(3.0 - k / 100)
        taken.append(scheduler._rooms.rollback.held)
    assert max(step for step in taken if step is not None) <= 40
    assert taken[-1] == taken[41]


def test_a_model_that_cannot_be_copied_is_survived_and_reported_once(caplog):
    run = Training(OPTIMIZERS["sgd"])
    run.optimizer.param_groups[0]["lock"] = threading.Lock()  # no copy of it can be made
    scheduler = AutoWU(run.optimizer, total_steps=400, model=run.model, min_rise=0.0)
    for k in range(400):
        run.optimizer.step()
        scheduler.step(abs(k / 100 - 1) + 0.01 * math.sin(7 * k))
    assert scheduler.switch.by_test
    assert len([r for r in caplog.records if "could not be copied" in r.getMessage()]) == 1


def test_a_loaded_state_brings_its_copy(tmp_path):
    run, other = Training(OPTIMIZERS["sgd"]), Training(OPTIMIZERS["sgd"])
    scheduler = AutoWU(run.optimizer, total_steps=400, model=run.model)
    copied = {}
    for k in range(60):
        run.optimizer.step()
        copied[k + 1] = {name: value.clone() for name, value in run.model.state_dict().items()}
        with torch.no_grad():
            run.model[3].bias.fill_(k + 1)
        copied[k + 1]["3.bias"] = run.model[3].bias.detach().clone()
        scheduler.step(3.0 - k / 100)
    held = scheduler._rooms.rollback.held
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    run.optimizer.step()
    scheduler._rooms.rollback.renew(61, 0.0)  # over the newer, which the saved state must not notice
    resumed = AutoWU(other.optimizer, total_steps=400, model=other.model)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rollback = resumed._rooms.rollback
    assert rollback.put_back(61).step == held
    assert all(torch.equal(value, copied[held][name]) for name, value in other.model.state_dict().items())
    rollback.keep_one(scheduler.lr_at(held - 1))
    older = rollback.put_back(61).step
    assert older < held
    assert scheduler.lr_at(older) <= 0.5 * scheduler.lr_at(held)
    assert all(torch.equal(value, copied[older][name]) for name, value in other.model.state_dict().items())


@pytest.mark.parametrize(
    ("peak_factor", "cut"),
    [
        pytest.param(
            factor, cut, marks=[] if cut == 97 or (factor, cut) in ((0.5, None), (0.8, 50), (0.2, 130)) else [pytest.mark.slow]
        )
        for factor in (0.2, 0.5, 0.8)
        for cut in (None, 50, 97, 130)
    ],
)
def test_the_run_goes_back_to_the_newest_copy_at_no_more_than_the_peak(peak_factor, cut):
    def scheduled(run):
        return AutoWU(run.optimizer, total_steps=600, model=run.model, peak_factor=peak_factor, min_rise=0.0, watch=False)

    run = Training(OPTIMIZERS["sgd"])
    scheduler, copied, k = scheduled(run), set(), 0
    while scheduler.switch is None:
        run.optimizer.step()
        with torch.no_grad():
            run.model[3].bias.fill_(k + 1)
        scheduler.step(abs(k / 110 - 1) + 0.01 * math.sin(7 * k))
        if scheduler.switch is None:
            copied.add(scheduler._rooms.rollback.held)
        k += 1
        if k == cut:
            saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), scheduler.state_dict()))
            run = Training(OPTIMIZERS["sgd"])
            scheduler = scheduled(run)
            for part, state in zip((run.model, run.optimizer, scheduler), saved, strict=True):
                part.load_state_dict(state)
    warmup = AutoWU(Training(OPTIMIZERS["sgd"]).optimizer, total_steps=600)
    older, newer = sorted(copied - {None})[-2:]
    assert scheduler.switch.by_test
    assert run.model[3].bias[0] == (newer if warmup.lr_at(newer) <= scheduler.switch.lr else older)
    assert warmup.lr_at(older) <= peak_factor * warmup.lr_at(newer)
    assert scheduler.state_dict()["snapshot"] is None  # nothing watches, so none is held


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"model": "resnet50"}, "model='resnet50'"), ({"snapshot_device": "abacus"}, "snapshot_device='abacus'")],
)
def test_a_bad_argument_is_named(arguments, named):
    with pytest.raises((TypeError, ValueError), match=named):
        AutoWU(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), total_steps=100, **arguments)


def test_a_copy_that_an_interrupt_has_torn_is_none(monkeypatch):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copied = Snapshot(LiveRun(optimizer, model))
    copied.take(10)

    def torn(targets, sources):
        targets[0].copy_(sources[0])
        raise KeyboardInterrupt

    with torch.no_grad():
        model.weight.fill_(20)
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "_copy", torn)
        with pytest.raises(KeyboardInterrupt):
            copied.take(20)
    assert copied.state_dict() is None
    with pytest.raises(RuntimeError, match="no snapshot was taken"):
        copied.restore()
    copied.take(30)
    assert copied.step == 30


def test_a_copy_that_has_no_room_leaves_the_one_before(monkeypatch):
    model = nn.Linear(2, 2)
    copied = Snapshot(LiveRun(torch.optim.SGD(model.parameters(), lr=0.1), model))
    copied.take(10)
    model.register_buffer("more", torch.ones(3))
    monkeypatch.setattr(snapshot, "free_memory", lambda _: 0.0)
    with pytest.raises(MemoryError):
        copied.take(20)
    assert copied.step == 10
    with torch.no_grad():
        before = model.weight.clone()
        model.weight.zero_()
    copied.restore()
    assert torch.equal(model.weight, before)


class Odd(torch.optim.Optimizer):
    """Keeps its momentum in places of its own, and refers to what it works on."""

    def __init__(self, model, place):
        super().__init__([{"params": list(model.parameters()), "mod": model, "act": torch.tanh}], {"lr": 0.1})
        self.place = place

    @torch.no_grad()
    def step(self):
        for index, p in enumerate(self.param_groups[0]["params"]):
            if self.place == "of a parameter":
                self.state[p] = moment = self.state.get(p, torch.zeros_like(p)) * 0.9 + p.grad
            elif self.place == "by name":
                moments = self.state.setdefault("moments", {})
                moments[index] = moment = moments.get(index, torch.zeros_like(p)) * 0.9 + p.grad
            else:
                whole = self.state.setdefault("of all", {})
                whole[p] = moment = whole.get(p, torch.zeros_like(p)) * 0.9 + p.grad
            p -= 0.1 * moment
        self.state["taken"] = self.state.get("taken", 0) + 1
        self.state["rate"] = torch.tensor(0.5) ** self.state["taken"]
        self.state["seen"] = [*self.state.get("seen", []), self.param_groups[0]["params"][0]]


def odd_steps(model, optimizer, number):
    for _ in range(number):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).square().sum().backward()
        optimizer.step()


def odd_values(model, optimizer):
    flat = [p.detach().clone() for p in model.parameters()]
    for key, value in optimizer.state.items():
        values = value.values() if isinstance(value, dict) else [value]
        flat += [torch.as_tensor(one).clone() for one in values if key != "seen"]
    return flat


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("place", ["of a parameter", "by name", "of all"])
def test_what_an_optimizer_keeps_in_places_of_its_own_goes_back_and_what_it_refers_to_stays(place, saved):
    model = nn.Linear(2, 2)
    optimizer = Odd(model, place)
    odd_steps(model, optimizer, 3)
    copied = Snapshot(LiveRun(optimizer, model))
    copied.take(3)
    expected = odd_values(model, optimizer)
    if saved:
        file = io.BytesIO()
        torch.save(copied.state_dict(), file)
        file.seek(0)
        copied = Snapshot(LiveRun(optimizer, model))
        copied.load_state_dict(torch.load(file, weights_only=True))
    odd_steps(model, optimizer, 4)
    optimizer.state["made since"] = 1
    copied.restore()
    group, seen = optimizer.param_groups[0], optimizer.state["seen"]
    assert group["mod"] is model
    assert group["act"] is torch.tanh
    assert all(one is group["params"][0] for one in seen)
    assert "made since" not in optimizer.state
    if not saved or place != "of all":  # a key that is a parameter is of this process alone
        assert len(seen) == 7  # it refers to a parameter, and is left
        for now, before in zip(odd_values(model, optimizer), expected, strict=True):
            assert torch.equal(now, before)
    odd_steps(model, optimizer, 1)


class Wrapped(torch.optim.Optimizer):
    """Has the groups and the state of what it wraps."""

    def __init__(self, inner):
        self.optimizer = inner

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)


@pytest.mark.parametrize("several", [False, True])
def test_what_several_optimizers_keep_in_places_of_their_own_goes_back(several):
    models = [nn.Linear(2, 2) for _ in range(4)]
    inner = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    optimizer = MultiOptimizer(inner) if several else Wrapped(Wrapped(inner[0]))
    known = inner if several else inner[:1]
    for index, one in enumerate(known):
        one.state["k"], one.state["table"] = index, {"a": index}
    copied = Snapshot(LiveRun(optimizer, nn.ModuleList(models)))
    for _ in range(3):
        copied.take(1)
        for one in known:
            one.state["k"], one.state["table"]["a"], one.state["since"] = 99, 99, {"step": 0}
        copied.restore()
        for index, one in enumerate(known):
            assert {key: value for key, value in one.state.items() if isinstance(key, str)} == {"k": index, "table": {"a": index}}


def test_what_cannot_be_copied_of_such_places_stays_and_is_no_reason_not_to_go_back():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    odd = {"lock": threading.Lock(), "sparse": torch.eye(2).to_sparse(), "table": {1.5: 2}, "best": torch.tensor(math.inf)}
    optimizer.state.update(odd)
    live = LiveRun(optimizer, model)
    assert live.sound()
    scheduler = AutoWU(optimizer, total_steps=100, model=model)
    rollback = scheduler._rooms.rollback
    rollback.take(0, 0.1, 0.0, 0.5)
    assert rollback.put_back(2).step == 0
    assert all(optimizer.state[key] is value for key, value in odd.items() if key != "table")
    assert optimizer.state["table"] == {1.5: 2}
    AutoWU(optimizer, total_steps=100, model=model).load_state_dict(scheduler.state_dict())


def test_a_copy_that_was_saved_knows_what_had_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copied = Snapshot(LiveRun(optimizer, model))
    copied.take(1)
    model[0].requires_grad_(False)  # its turn is over, and the run is cut
    again = Snapshot(LiveRun(optimizer, model))
    assert {*again.live.parameters()} == {"1.weight", "1.bias"}
    again.load_state_dict(copied.state_dict())
    assert {*again.live.parameters()} == {*dict(model.named_parameters())}


def test_a_copy_that_was_saved_before_such_places_were_known_leaves_them():
    model = nn.Linear(2, 2)
    optimizer = Odd(model, "by name")
    odd_steps(model, optimizer, 3)
    copied = Snapshot(LiveRun(optimizer, model))
    copied.take(3)
    state = copied.state_dict()
    for part in ("tensors", "rest"):
        state[part] = {key: value for key, value in state[part].items() if key[0] != "named"}
    odd_steps(model, optimizer, 2)
    again = Snapshot(LiveRun(optimizer, model))
    again.load_state_dict(state)
    again.restore()
    assert optimizer.state["taken"] == 5
    odd_steps(model, optimizer, 1)


def test_layers_that_take_turns_in_training_all_go_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    live = LiveRun(optimizer, model)
    model[1].requires_grad_(False)
    copied = Snapshot(live)
    copied.take(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[1].requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    assert not live.sound()
    assert copied.restore() == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_frozen_base_is_still_no_part_of_a_copy():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    live = LiveRun(torch.optim.SGD(model[1].parameters(), lr=0.1), model)
    assert {*live.parameters()} == {"1.weight", "1.bias"}


def with_buffers(**buffers):
    model = nn.Linear(2, 2)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2)]),
    ],
    ids=["coo", "csr", "meta", "nested"],
)
def test_a_buffer_that_cannot_be_copied_stays_and_the_rest_goes_back(make, caplog):
    buffer = make()
    model, optimizer = with_buffers(odd=buffer)
    with caplog.at_level("INFO", logger="autowu"):
        scheduler = AutoWU(optimizer, total_steps=100, model=model)
    assert "stay as they are: odd" in caplog.text
    rollback = scheduler._rooms.rollback
    rollback.take(1, 0.1, 0.0, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(7)
    assert rollback.put_back(2).step == 1
    assert torch.equal(model.weight, before)
    assert model.odd is buffer


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag], ids=["conjugate", "negative"])
def test_a_buffer_that_is_such_a_view_goes_back(view):
    model, optimizer = with_buffers(rope=view(torch.tensor([1 + 2j, 3 - 1j])))
    assert model.rope.is_conj() or model.rope.is_neg()
    before = model.rope.clone()
    copied = Snapshot(LiveRun(optimizer, model))
    copied.take(1)
    with torch.no_grad():
        model.rope.mul_(3)
    assert copied.restore() == []
    assert torch.equal(model.rope.resolve_conj().resolve_neg(), before.resolve_conj().resolve_neg())


@pytest.mark.parametrize("saved", [False, True])
def test_an_expanded_buffer_that_was_replaced_has_its_shape_again(saved):
    model, optimizer = with_buffers(prior=torch.ones(1).expand(16))
    live = LiveRun(optimizer, model)
    copied = Snapshot(live)
    copied.take(1)
    state = copied.state_dict()
    model.prior = torch.full((16,), 5.0)
    if saved:
        copied = Snapshot(live)
        copied.load_state_dict(state)
    copied.restore()
    assert torch.equal(model.prior, torch.ones(16))


class Half(nn.Linear):
    def get_extra_state(self):
        return {"one": 1}


class Raising(Half):
    def set_extra_state(self, state):
        raise RuntimeError("not now")


@pytest.mark.parametrize(("module", "left"), [(Half, []), (Raising, ["0"])])
def test_an_extra_state_that_cannot_be_set_is_no_reason_not_to_go_back(module, left):
    model = nn.Sequential(module(2, 2))
    copied = Snapshot(LiveRun(torch.optim.SGD(model.parameters(), lr=0.1), model))
    copied.take(1)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(9)
    assert copied.restore() == left
    assert torch.equal(model[0].weight, before)


def test_a_model_without_values_is_refused_in_words():
    model = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="its parameter 'weight' has no values yet; pass a batch through the model first"):
        AutoWU(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=100, model=model)
