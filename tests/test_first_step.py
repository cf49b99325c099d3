"""The look at the first step of SGD: which LR range follows from it, that one too large is undone, and who is not looked at."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import ranks
from sklearn.datasets import load_digits
from timm.optim import Lookahead
from torch import nn
from torch.nn import functional as F

from autowu import AutoWU
from autowu.config import lag_share
from autowu.families import LR_RANGES
from autowu.plans import widened

STEPS = 300


class Run:
    """A perceptron that learns the digits, whose loss is multiplied by a `scale`."""

    def __init__(self, scale=1.0, make=None, dtype=torch.float32, **arguments):
        torch.manual_seed(0)
        self.scale, digits = scale, load_digits()
        self.inputs, self.labels = torch.tensor(digits.data, dtype=dtype) / 16, torch.tensor(digits.target)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)
        make = make or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.optimizer = make(self.model.parameters())
        self.scheduler = AutoWU(self.optimizer, **{"total_steps": STEPS, "model": self.model} | arguments)
        self.lrs = []

    def loss(self):
        rows = torch.randint(len(self.inputs), (64,))
        return self.scale * F.cross_entropy(self.model(self.inputs[rows]).float(), self.labels[rows])

    def train(self):
        """Take an optimizer step; its loss."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        return loss.item()

    def steps(self, number):
        for _ in range(number):
            self.scheduler.step(self.train())
        return self

    def kinds(self):
        return [event.kind for event in self.scheduler.events]

    def held(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()["state"]])

    @torch.no_grad()
    def accuracy(self):
        return (self.model.eval()(self.inputs).argmax(1) == self.labels).float().mean().item()


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 1e4, 1e8])
def test_an_lr_is_found_whatever_the_loss_is_multiplied_by(scale):
    run = Run(scale).steps(STEPS)
    assert run.accuracy() > 0.95
    assert ("range" in run.kinds()) == (scale != 1)
    assert 0.005 < run.scheduler.switch.lr * scale < 5


def test_a_first_step_that_is_far_too_large_is_undone():
    undone = []
    run = Run(1e8, on_rollback=undone.append)
    loss = run.loss()
    loss.backward()
    before = run.held()
    run.optimizer.step()
    assert not torch.equal(run.model[0].weight, before[0]["0.weight"])
    run.scheduler.step(loss.item())
    assert_same(run.held(), before)
    assert undone == [0]
    (event,) = run.scheduler.events
    assert (event.kind, event.step) == ("range", 1)
    assert "far more than is usual" in event.message
    assert event.message.endswith("model and optimizer are back at step 0")
    config, lr = run.scheduler.config, run.optimizer.param_groups[0]["lr"]
    assert config.min_lr < lr < 2 * config.min_lr < 1e-10
    assert config.max_lr == 10.0


def test_of_several_steps_before_the_first_of_the_scheduler_the_first_counts():
    one, two = Run(1e8).steps(1), Run(1e8)
    before = two.held()
    two.train()
    two.scheduler.step(two.train())
    assert two.scheduler.events[0].message == one.scheduler.events[0].message
    assert two.scheduler.config == one.scheduler.config
    torch.testing.assert_close(two.model[0].weight, before[0]["0.weight"], rtol=0, atol=0)


def test_the_curve_is_as_smooth_in_lrs_as_over_any_other_range():
    run = Run(1e8).steps(1)
    assert run.scheduler.gp.lengthscale == pytest.approx(0.5 / run.scheduler.config.decades)


def test_a_first_step_that_is_far_too_small_stays():
    run = Run(1e-4)
    after = [run.train(), run.held()]
    run.scheduler.step(after[0])
    assert_same(run.held(), after[1])
    (event,) = run.scheduler.events
    assert "far less than is usual: the LR range is now" in event.message
    assert run.scheduler.config.min_lr == 1e-4
    assert run.scheduler.config.max_lr > 1e4


def test_where_the_range_is_right_nothing_is_changed_and_nothing_is_held():
    run, plain = Run(), Run(min_lr=1e-4, max_lr=10.0)
    for other in (run, plain):
        torch.manual_seed(1)
        other.steps(1)
        assert other.scheduler.state_dict()["snapshot"] is None
        assert not other.optimizer._optimizer_step_pre_hooks
        other.steps(STEPS - 1)
    assert run.scheduler.config == plain.scheduler.config
    assert run.lrs == plain.lrs
    assert_same(run.held(), plain.held())


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_lr": 1e-4},
        {"max_lr": 10.0},
        {"rollback": False},
        {"warmup_type": "linear"},
        {"watch": False},
        {"make": lambda parameters: torch.optim.Adam(parameters)},
        {"total_steps": None, "total_samples": 10**6},
    ],
    ids=lambda arguments: list(arguments)[-1],
)
def test_who_is_not_looked_at(arguments):
    run = Run(1e8, **arguments)
    config = run.scheduler.config
    for _ in range(3):
        run.scheduler.step(run.train(), samples=64)
    assert "range" not in run.kinds()
    assert (run.scheduler.config.min_lr, run.scheduler.config.max_lr) == (config.min_lr, config.max_lr)


def test_of_several_optimizers_none_is_looked_at():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    both = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    scheduler = AutoWU(both, total_steps=STEPS, model=model)
    (1e8 * model(torch.ones(1, 4)).square().sum()).backward()
    for optimizer in both:
        optimizer.step()
    scheduler.step(1.0)
    assert "range" not in [event.kind for event in scheduler.events]


def test_weights_in_few_digits_are_not_taken_for_weights_that_do_not_move():
    assert "range" not in Run(1e-4, dtype=torch.bfloat16).steps(2).kinds()
    assert "range" in Run(1e8, dtype=torch.bfloat16).steps(2).kinds()


@pytest.mark.parametrize("fault", ["zero weights", "no gradient", "NaN"])
def test_a_first_step_that_says_nothing_changes_nothing(fault):
    run = Run(1e8)
    with torch.no_grad():
        for parameter in run.model.parameters() if fault == "zero weights" else []:
            parameter.zero_()
    loss = run.loss()
    loss.backward()
    for parameter in run.model.parameters() if fault in ("no gradient", "NaN") else []:
        parameter.grad = None if fault == "no gradient" else torch.full_like(parameter, math.nan)
    run.optimizer.step()
    run.scheduler.step(loss.item())
    assert "range" not in run.kinds()
    assert run.scheduler.config.min_lr == LR_RANGES["sgd"][0]


def test_weights_that_are_loaded_before_the_first_step_have_not_been_moved_by_it():
    run, other = Run(), Run(dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(100)
    run.model.load_state_dict(other.model.state_dict())
    assert "range" not in run.steps(1).kinds()


def test_weights_that_begin_tiny_lose_no_lr():
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 1), torch.randn(256, 8)
    nn.init.normal_(model.weight, std=1e-6)
    nn.init.zeros_(model.bias)
    scheduler = AutoWU(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), total_steps=STEPS, model=model)
    for _ in range(STEPS):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        scheduler.optimizer.zero_grad()
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step(loss.item())
    assert scheduler.events[0].kind == "range"
    assert loss.item() < 0.01


def test_a_step_that_was_taken_before_a_state_was_loaded_does_not_count():
    run = Run(1e6)
    parts = run.model, run.optimizer, run.scheduler
    states = copy.deepcopy([part.state_dict() for part in parts])
    run.train()
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    run.scale = 1.0
    assert "range" not in run.steps(2).kinds()


def set_lr(run):
    run.optimizer.param_groups[0]["lr"] = 0.5


def load_lr(run):
    run.optimizer.load_state_dict(torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9).state_dict())


@pytest.mark.parametrize("change", [set_lr, load_lr])
def test_a_first_step_at_another_lr_says_nothing(change):
    run = Run()
    change(run)
    run.steps(1)
    assert "range" not in run.kinds()
    assert (run.scheduler.config.min_lr, run.scheduler.config.max_lr) == LR_RANGES["sgd"]


def test_a_step_inside_a_wrapper_that_passes_the_hooks_by_is_looked_at():
    run = Run(1e6, make=lambda parameters: Lookahead(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))).steps(STEPS)
    assert run.kinds()[0] == "range"
    assert run.accuracy() > 0.9


def test_parameters_that_the_optimizer_has_not_do_not_count():
    run = Run(0.1)
    large = nn.ModuleDict({"trained": run.model, "other": nn.Linear(1000, 1000)})
    with torch.no_grad():
        large["other"].weight.mul_(1000)
    scheduler = AutoWU(torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9), total_steps=STEPS, model=large)
    run.loss().backward()
    scheduler.optimizer.step()
    scheduler.step(1.0)
    assert "range" not in [event.kind for event in scheduler.events]


def test_a_copy_that_fails_leaves_the_range_as_it_is(monkeypatch):
    run = Run(1e8)
    monkeypatch.setattr("autowu.snapshot.free_memory", lambda _: 0)
    run.steps(2)
    assert run.kinds()[0] == "snapshot"
    assert "range" not in run.kinds()


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_run_that_is_cut_goes_on_bit_for_bit(cut):
    whole = Run(1e6)
    torch.manual_seed(1)
    whole.steps(cut)
    state, held, draws = copy.deepcopy(whole.scheduler.state_dict()), whole.held(), torch.get_rng_state()
    optimizer = copy.deepcopy(whole.optimizer.state_dict())
    whole.steps(STEPS - cut)
    again = Run(1e6)
    again.model.load_state_dict(held[0])
    again.optimizer.load_state_dict(optimizer)
    again.scheduler.load_state_dict(state)
    torch.set_rng_state(draws)
    again.steps(STEPS - cut)
    assert again.lrs == whole.lrs[cut:]
    assert again.kinds() == whole.kinds()
    assert_same(again.held(), whole.held())


def test_a_resumed_run_is_past_its_first_step():
    run = Run().steps(20)
    again = Run(1e8)
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    again.steps(1)
    assert "range" not in again.kinds()


@given(st.floats(-12, 12), st.one_of(st.none(), st.floats(0.1, 1)), st.booleans())
def test_a_range_is_widened_to_one_side(decades, given, immediate):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    config = AutoWU(optimizer, total_steps=STEPS, peak_factor=given, immediate_cooldown=immediate).config
    after = widened(config, given, optimizer, 10**decades)
    end, moved = ("min_lr", "max_lr") if decades > 0 else ("max_lr", "min_lr")
    assert getattr(after, moved) == pytest.approx(getattr(config, moved) * 10**decades)
    assert getattr(after, end) == getattr(config, end)
    ends = AutoWU(optimizer, total_steps=STEPS, peak_factor=given, min_lr=after.min_lr, max_lr=after.max_lr).config
    assert after.peak_factor == pytest.approx(ends.peak_factor)
    assert lag_share(optimizer, after.min_lr, after.max_lr, after.warmup_type, after.warmup_steps) <= 1


def test_two_ranks_undo_the_step_together(tmp_path):
    ranks(tmp_path, 2, "tests/first_step_ranks.py", str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.pop("kinds") == second.pop("kinds") == ["range"]
    assert first["min_lr"] < 1e-8
    assert_same(first, second)
    assert_same(first["weights"], first["before"])


def test_ranks_of_which_one_was_given_its_range_are_refused_together(tmp_path):
    ranks(tmp_path, 2, "tests/first_step_ranks.py", str(tmp_path), "given")
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all("looks at the first step" in one for one in said)


def test_where_one_rank_cannot_copy_no_range_is_widened(tmp_path):
    ranks(tmp_path, 2, "tests/first_step_ranks.py", str(tmp_path), "no room")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [one.pop("kinds") for one in found] == [[], ["snapshot"]]
    assert_same(*found)
    assert found[0]["min_lr"] == LR_RANGES["sgd"][0]
