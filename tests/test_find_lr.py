"""A range test that leaves no trace: the LR that a run would find, and all else as it was, bit for bit, however it ends."""

import copy
import importlib
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, ranks
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autowu
from autowu import AutoWU, find_lr
from autowu.optim import LARS


def make_model():
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
    model.register_parameter("frozen", nn.Parameter(torch.ones(4), requires_grad=False))
    return model


def make_data(batches=12):
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(batches, 16, 4, generator=generator)
    return [(x, x.sum(1, keepdim=True) + 0.3 * torch.randn(16, 1, generator=generator)) for x in xs]


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw with a tensor LR": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-3), amsgrad=True),
    "lars around": lambda params: LARS(torch.optim.SGD(params, lr=0.3, momentum=0.9)),
}


def groups(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def snapshot(model, optimizer, *generators):
    """All that a search may have changed, in a form that compares equal where every bit is the same."""
    state = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    grads = [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    held = [
        [(k, id(v), v.numpy().tobytes() if isinstance(v, torch.Tensor) else v) for k, v in kept.items()]
        for kept in optimizer.state.values()
    ]
    hooks = {name: list(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    numpys = np.random.get_state()  # noqa: NPY002
    draws = [torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist(), numpys[2:]]
    attributes = {name: id(value) for name, value in vars(optimizer).items()}
    own = [g.get_state().tolist() for g in generators]
    return [state, grads, modes, held, hooks, draws, attributes, repr(groups(optimizer)), own]


def trained(optimizer_name, steps=3):
    model = make_model()
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    for x, y in make_data()[:steps]:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_is_as_it_was_bit_for_bit(name, steps):
    model, optimizer = trained(name, steps)
    model[1].eval()
    before = snapshot(model, optimizer)
    found = find_lr(model, optimizer, F.mse_loss, make_data(), steps=60)
    assert snapshot(model, optimizer) == before
    assert math.isfinite(found.lr)


def run_on(model, optimizer, loader):
    """A further epoch: losses, and what was drawn."""
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.rand(1).item()


def test_the_run_that_follows_is_the_one_that_would_have_been():
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*make_data(), strict=True)))
    runs = []
    for search in (False, True):
        torch.manual_seed(5)
        model, optimizer = trained("sgd")
        loader = DataLoader(data, batch_size=16, shuffle=True)
        if search:
            find_lr(model, optimizer, F.mse_loss, loader, steps=60)
        scheduler = AutoWU(optimizer, total_steps=100, model=model)
        runs.append([run_on(model, optimizer, loader), run_on(model, optimizer, loader), scheduler.get_last_lr()])
    assert runs[0] == runs[1]


class Interrupt:
    """A loss that goes wrong at one of its steps."""

    def __init__(self, error, at=20):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return F.mse_loss(outputs, targets)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_exception_and_an_interrupt_leave_no_trace_either(error):
    model, optimizer = trained("adamw with a tensor LR")
    before = snapshot(model, optimizer)
    with pytest.raises(type(error)):
        find_lr(model, optimizer, Interrupt(error), make_data(), steps=60)
    assert snapshot(model, optimizer) == before


def test_a_loss_that_becomes_nan_ends_the_search_and_leaves_no_trace():
    model, optimizer = trained("sgd")
    before = snapshot(model, optimizer)

    def loss_fn(outputs, targets):
        blown = optimizer.param_groups[0]["lr"] > 0.5
        return F.mse_loss(outputs, targets) * (math.nan if blown else 1.0)

    found = find_lr(model, optimizer, loss_fn, make_data(), steps=60)
    assert snapshot(model, optimizer) == before
    assert found.lr < 0.5
    assert found.sure
    assert found.steps < 60


def test_a_loss_that_is_never_finite_gives_the_own_lr_and_says_that_nothing_was_found(caplog):
    model, optimizer = trained("sgd", 0)
    found = find_lr(model, optimizer, lambda out, y: out.sum() * math.nan, make_data(), steps=40)
    assert (found.lr, found.sure, found.interval) == (0.1, False, (1e-4, 10.0))
    assert "no loss curve could be fitted" in found.note
    assert [record.getMessage() for record in caplog.records] == [f"AutoWU, range test: {found.note}"]


def test_a_search_that_ends_too_low_says_so(caplog):
    model, optimizer = trained("sgd", 0)
    found = find_lr(model, optimizer, F.mse_loss, make_data(), steps=60, max_lr=2e-3)
    assert not found.sure
    assert "pass a higher max_lr" in found.note


def test_it_is_the_lr_that_the_warm_up_of_a_run_finds():
    model, optimizer = trained("sgd", 0)
    batches, twin = make_data(), copy.deepcopy(model)
    torch.manual_seed(7)
    found = find_lr(model, optimizer, F.mse_loss, batches, steps=80)
    own = OPTIMIZERS["sgd"](list(twin.parameters()))
    torch.manual_seed(7)
    scheduler = AutoWU(own, max_warmup_steps=80, rollback=False)
    step = 0
    while scheduler.switch is None:
        x, y = batches[step % len(batches)]
        own.zero_grad()
        loss = F.mse_loss(twin(x), y)
        loss.backward()
        own.step()
        scheduler.step(loss)
        step += 1
    assert (found.lr, found.steps) == (scheduler.switch.lr, scheduler.switch.step)
    assert found.interval[0] <= found.lr <= found.interval[1]
    assert len(found.lrs) == len(found.losses) == found.steps
    assert float(found) == found.lr


# ---------------------------------------------------------------- the loader


class Positioned:
    """Begins each time where it has ended, shuffled by a generator of its own, within a dataset that counts."""

    def __init__(self):
        self.position, self.rng, self.seen = 0, np.random.default_rng(0), []

    def __iter__(self):
        while True:
            self.position += 1
            self.seen.append(self.position)
            yield make_data()[self.rng.integers(12)]


class Opaque:
    """What it knows is in a closure; it saves and loads it."""

    __slots__ = ("load_state_dict", "state_dict", "take")

    def __init__(self):
        position = 0

        def take():
            nonlocal position
            position += 1
            return make_data()[position % 12]

        def load(state):
            nonlocal position
            position = state["position"]

        self.take, self.state_dict, self.load_state_dict = take, lambda: {"position": position}, load

    def __iter__(self):
        return self

    def __next__(self):
        return self.take()


def loader_of(**how):
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*make_data(), strict=True)))
    return DataLoader(data, batch_size=16, **how)


def noisy(rng, generator):
    def collate(samples):
        noise = rng.random() * torch.rand(1, generator=generator)
        return [torch.stack(part) + noise for part in zip(*samples, strict=True)]

    return collate


LOADERS = {
    "own generator": lambda: loader_of(shuffle=True, generator=torch.Generator().manual_seed(4)),
    "position": Positioned,
    "opaque": Opaque,
    "iterator of a list": lambda: iter(make_data(200)),
    "transform with generators": lambda: loader_of(collate_fn=noisy(random.Random(0), torch.Generator())),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_loader_gives_the_batches_that_it_would_have_given(kind):
    first, loader = first_of(LOADERS[kind]()), LOADERS[kind]()
    model, optimizer = trained("sgd", 0)
    find_lr(model, optimizer, F.mse_loss, loader, steps=40)
    assert first_of(loader) == first


def first_of(loader):
    return [(x.numpy().tobytes(), y.numpy().tobytes()) for _, (x, y) in zip(range(8), loader, strict=False)]


def test_persistent_workers_in_the_middle_of_an_epoch_go_on_with_it():
    loader = loader_of(num_workers=1, persistent_workers=True)
    running = iter(loader)
    next(running)
    model, optimizer = trained("sgd", 0)
    find_lr(model, optimizer, F.mse_loss, loader, steps=26)
    assert torch.equal(next(running)[0], make_data()[1][0])
    assert loader._iterator is running


@pytest.mark.parametrize("make", [lambda: (batch for batch in make_data()), lambda: iter(loader_of())])
def test_an_iterator_that_cannot_be_put_back_is_refused(make):
    loader = make()
    model, optimizer = trained("sgd")
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match="pass the loader itself, or a list"):
        find_lr(model, optimizer, F.mse_loss, loader)
    assert snapshot(model, optimizer) == before
    assert torch.equal(next(loader)[0], make_data()[0][0])


# ---------------------------------------------------------------- how the step is taken


def test_a_step_function_with_a_graph_is_differentiated_and_one_without_has_taken_the_step():
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        model, optimizer = trained("sgd", 0)
        average = copy.deepcopy(model).requires_grad_(False)

        def step_fn(batch, model=model, optimizer=optimizer, own=own, average=average):
            loss = F.mse_loss(model(batch[0]), batch[1])
            with torch.no_grad():
                average[0].weight.lerp_(model[0].weight, 0.1)
            if own:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss = loss.detach()
            return loss

        both = nn.ModuleList([model, average])
        before = snapshot(both, optimizer)
        found.append(find_lr(both, optimizer, loader=make_data(), step_fn=step_fn, steps=60))
        assert snapshot(both, optimizer) == before
    assert found[0].lr == found[1].lr
    np.testing.assert_array_equal(found[0].losses, found[1].losses)


def test_accumulation_takes_the_mean_of_its_batches():
    batches = make_data()
    halves = [(x[half], y[half]) for x, y in batches for half in (slice(8), slice(8, 16))]
    found = []
    for loader, accumulate in ((batches, 1), (halves, 2)):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found.append(find_lr(model, optimizer, F.mse_loss, loader, steps=60, accumulate=accumulate))
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-3)
    assert found[0].lr == pytest.approx(found[1].lr, rel=0.05)


def test_a_gradient_scaler_is_used_and_is_as_it_was():
    model, optimizer = trained("sgd", 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=5)
    new, seen = copy.deepcopy(vars(scaler)), set()
    for _ in range(2):
        before, known = snapshot(model, optimizer), copy.deepcopy(scaler.state_dict())

        def loss_fn(outputs, targets):
            assert outputs.dtype == torch.bfloat16
            seen.add(scaler.get_scale())
            return F.mse_loss(outputs.float(), targets)

        found = find_lr(model, optimizer, loss_fn, make_data(), steps=60, autocast=torch.bfloat16, scaler=scaler)
        assert found.sure
        assert snapshot(model, optimizer) == before
        assert scaler.state_dict() == known
        if new is not None:
            assert vars(scaler) == new
        new = None
        scaler.scale(torch.ones(1))  # which makes its tensors
    assert len(seen) > 1


def test_a_search_whose_steps_are_skipped_comes_to_an_end():
    model, optimizer = trained("sgd")
    scaler = torch.amp.GradScaler("cpu")
    found = find_lr(model, optimizer, lambda out, y: F.mse_loss(out, y) * 1e38, make_data(), steps=30, scaler=scaler)
    assert not found.sure


@pytest.mark.parametrize(
    ("error", "named", "arguments"),
    [
        (TypeError, "loss_fn, step_fn", {"loss_fn": None}),
        (TypeError, "loss_fn, step_fn", {"step_fn": print}),
        (TypeError, "loader=None", {"loader": None}),
        (ValueError, "loader: has no batch", {"loader": []}),
        (ValueError, "steps=25", {"steps": 25}),
        (TypeError, "steps=1.5", {"steps": 1.5}),
        (ValueError, "accumulate=0", {"accumulate": 0}),
        (ValueError, "min_lr", {"min_lr": -1.0}),
        (ValueError, "max_lr", {"min_lr": 1.0, "max_lr": 0.1}),
        (TypeError, "autocast", {"autocast": "bf16"}),
        (TypeError, "model", {"model": F.mse_loss}),
        (ValueError, "'weight'", {"model": nn.LazyLinear(1)}),
        (TypeError, "pass step_fn=", {"loader": [{"inputs": 1}]}),
        (ValueError, "the optimizer was never called", {"loss_fn": None, "step_fn": lambda batch: 1.0}),
    ],
)
def test_wrong_arguments_are_named_and_leave_no_trace(error, named, arguments):
    model, optimizer = trained("sgd")
    before = snapshot(model, optimizer)
    given = {"model": model, "optimizer": optimizer, "loss_fn": F.mse_loss, "loader": make_data(), "steps": 30} | arguments
    with pytest.raises(error, match=named):
        find_lr(**given)
    assert snapshot(model, optimizer) == before


# ---------------------------------------------------------------- the answer


def test_the_figure_shows_curve_fit_and_answer(tmp_path):
    model, optimizer = trained("sgd", 0)
    found = find_lr(model, optimizer, F.mse_loss, make_data(), steps=60)
    axes = found.plot().axes[0]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "LR", "training loss")
    labels = axes.get_legend_handles_labels()[1]
    assert labels[:2] == ["95 % band", "Gaussian process"]
    assert f"LR {found.lr:.3g}" in labels
    assert f"lr={found.lr:.4g}" in repr(found)


def test_two_ranks_come_to_one_answer(tmp_path):
    ranks(tmp_path, 2, "tests/find_lr_ranks.py", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["same"]
    assert first["sure"]
    assert len(first["mean"]) > 0


def test_the_table_of_the_page_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("find_lr")
    rows = [json.loads(line) for line in benchmark.OUT.read_text().splitlines()]
    assert {row["seed"] for row in rows} == {*benchmark.SEEDS}
    assert benchmark.report(rows) in (ROOT / "docs" / "find-lr.md").read_text()


def test_it_is_exported():
    assert autowu.find_lr is find_lr


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in (1, 2, 3))])
def test_the_page_works_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "find-lr.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    data = load_digits()
    pixels, labels = torch.tensor(data.data[:512] / 16, dtype=torch.float32), torch.tensor(data.target[:512])
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    names = {"torch": torch, "nn": nn, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}
    names["train_loader"] = DataLoader(TensorDataset(pixels, labels), 64, shuffle=True)
    names["find_lr"] = find_lr
    if block == 1:
        exec(blocks[0], names)
    exec(blocks[block], names)
    assert names["found"].sure
    assert Path("range.png").exists() == (block == 1)
