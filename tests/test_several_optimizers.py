"""One schedule for several optimizers: one phase, one horizon, each with a peak LR of its own."""

import copy
import io
import math
import pickle
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from curves import valley
from processes import ROOT
from torch import nn

import autowu.optim
from autowu import AutoWU, MultiOptimizer
from autowu.config import MAX_LAG
from autowu.families import LR_RANGES
from autowu.kin import everyone, parts, several
from autowu.optim import LAMB, LARS
from autowu.phases import Switch, common_lr, copy_share, each_config, warmup_lr_at
from autowu.plotting import draw_state

MUON, ADAM = LR_RANGES["unknown"], LR_RANGES["adam"]


class Task:
    """A small network, its matrices trained by one optimizer, the rest by another."""

    def __init__(self, matrices=torch.optim.Muon, rest=torch.optim.AdamW, combine=list, **arguments):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
        self.inputs = torch.randn(512, 8)
        self.targets = self.inputs[:, :3].sin().sum(1, keepdim=True)
        parameters = list(self.model.parameters())
        self.first = matrices([p for p in parameters if p.ndim == 2], lr=0.01)
        self.second = rest([p for p in parameters if p.ndim < 2], lr=0.001)
        self.scheduler = AutoWU(combine([self.first, self.second]), **{"total_steps": 200, "model": self.model} | arguments)
        self.lrs, self.losses = [], []

    def loss(self, step):
        drawn = torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))
        return nn.functional.mse_loss(self.model(self.inputs[drawn]), self.targets[drawn])

    def run(self, until, told=None):
        """Train up to step `until`; `told` is the curve that the scheduler is shown in place of the losses."""
        for step in range(self.scheduler.last_epoch, until):
            loss = self.loss(step)
            self.model.zero_grad()
            loss.backward()
            self.lrs.append([group["lr"] for one in (self.first, self.second) for group in one.param_groups])
            self.losses.append(loss.item())
            self.first.step()
            self.second.step()
            self.scheduler.step(loss if told is None else float(told[step]))
        return self

    def save(self):
        file = io.BytesIO()
        states = [self.model.state_dict(), self.first.state_dict(), self.second.state_dict(), self.scheduler.state_dict()]
        torch.save(states, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, states):
        for part, state in zip((self.model, self.first, self.second, self.scheduler), states, strict=True):
            part.load_state_dict(state)
        return self

    def weights(self):
        return [
            *self.model.state_dict().values(),
            *(v for one in (self.first, self.second) for s in one.state.values() for v in s.values()),
        ]


@pytest.fixture(scope="module")
def whole():
    return Task().run(200)


# ---------------------------------------------------------------- LRs


def test_one_warm_up_one_switch_and_each_optimizer_its_own_range_and_peak(whole):
    scheduler, (first, second) = whole.scheduler, zip(*whole.lrs, strict=True)
    config, switch = scheduler.config, scheduler.switch
    assert (config.min_lr, config.max_lr, *config.others[0][:2]) == (*MUON, *ADAM)
    assert scheduler.phase == "done"
    assert switch.by_test
    assert (first[0], second[0]) == (MUON[0], ADAM[0])
    # As far through the one range, in decades, as through the other.
    for lr, other in zip(first[: switch.step], second[: switch.step], strict=True):
        assert math.log(lr / MUON[0]) / math.log(MUON[1] / MUON[0]) == pytest.approx(
            math.log(other / ADAM[0]) / math.log(ADAM[1] / ADAM[0]), abs=1e-9
        )
    assert (first[switch.step], second[switch.step]) == (switch.lr, switch.others[0]) == switch.lrs
    # The far edge is one place of the warm-up, and each peak its factor below the LR there.
    places = [
        math.log(lr / factor / low) / math.log(high / low)
        for lr, (low, high, factor) in zip(switch.lrs, [(*MUON, config.peak_factor), *config.others], strict=True)
    ]
    assert places[0] == pytest.approx(places[1], abs=1e-9)
    # From there on they fall together.
    assert all(
        a / switch.lr == pytest.approx(b / switch.others[0]) for a, b in list(zip(first, second, strict=True))[switch.step :]
    )
    assert sum(whole.losses[-10:]) < 0.2 * sum(whole.losses[:10])


def test_lr_at_tells_the_lr_of_every_step_of_each_optimizer(whole):
    told = [[whole.scheduler.lr_at(step), whole.scheduler.lr_at(step, 1)] for step in range(200)]
    assert told == whole.lrs
    assert whole.scheduler.lr_at(10**6, 1) == whole.lrs[-1][1]


def test_a_list_of_one_optimizer_is_that_optimizer():
    def run(wrap):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        scheduler, lrs = AutoWU(wrap(optimizer), total_steps=100, watch=False), []
        assert scheduler.optimizer is optimizer
        for loss in valley(100):
            optimizer.step()
            scheduler.step(float(loss))
            lrs += scheduler.get_last_lr()
        return lrs, scheduler.state_dict()["config"]

    assert run(lambda one: one) == run(lambda one: [one]) == run(lambda one: (one,))


def test_arguments_may_be_given_for_each_optimizer_for_all_or_left_to_the_family():
    config = Task(min_lr=[None, 1e-4], max_lr=(0.5, 1), peak_factor=0.3).scheduler.config
    assert (config.min_lr, config.max_lr, config.peak_factor) == (MUON[0], 0.5, 0.3)
    assert config.others == ((1e-4, 1.0, 0.3),)
    config = Task(LAMB, peak_factor=[None, 0.2], total_steps=10**5).scheduler.config
    assert (config.peak_factor, config.others[0]) == (0.1, (*ADAM, 0.2))


WRONG = {
    "min_lr=[0.1, 0.1, 0.1]: must be one number for all, or a list of 2": {"min_lr": [0.1, 0.1, 0.1]},
    "peak_factor=[]: must be one number for all, or a list of 2": {"peak_factor": []},
    "min_lr[1]=-1: must be above 0": {"min_lr": [0.1, -1]},
    "max_lr[0]='high': must be a number": {"max_lr": ["high", 1.0]},
    "peak_factor[1]=2: must be above 0 and at most 1": {"peak_factor": (0.1, 2)},
    "min_lr[1]=1.5: must be below max_lr[1]=1.0": {"min_lr": [0.1, 1.5]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_value_names_the_argument_the_optimizer_the_value_and_the_range(message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Task(**WRONG[message])


def test_a_list_of_several_values_is_none_for_one_optimizer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=re.escape("max_lr=[1.0, 2.0]: must be one number")):
        AutoWU(optimizer, total_steps=100, max_lr=[1.0, 2.0])
    assert AutoWU(optimizer, total_steps=100, max_lr=[1.0]).config.max_lr == 1.0


def weight(*shape):
    return nn.Parameter(torch.ones(*shape or (2,)))


def sgd(*parameters, lr=0.1, **options):
    return torch.optim.SGD(list(parameters), lr=lr, **options)


def test_what_is_no_list_of_optimizers_with_parameters_of_their_own_is_refused_in_words():
    shared, one = weight(3), sgd(weight())
    for wrong, message in (
        ([], r"optimizer=\[\]: must be a list of one or more"),
        ([one, one], r"optimizer\[1\]: is optimizer\[0\] again; give each once"),
        ([one, None], r"optimizer\[1\]=None: must be a torch.optim.Optimizer"),
        ([one, [sgd(weight())]], r"optimizer\[1\]=\[SGD"),
        ({"a": one}, r"optimizer=\{'a': SGD.*must be a torch.optim.Optimizer, or a list of them"),
        (
            [one, sgd(shared), sgd(weight(), shared)],
            r"optimizer\[2\]: a parameter of shape \(3,\) is trained by optimizer\[1\] as well",
        ),
        ([one, MultiOptimizer([one, sgd(weight())])], r"optimizer\[1\]: a parameter"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            AutoWU(wrong, total_steps=100)
    two = sgd(weight())
    two.param_groups[0]["lr"] = None
    with pytest.raises(TypeError, match=r"optimizer\[1\].param_groups\[0\]\['lr'\]=None"):
        AutoWU([one, two], total_steps=100)


def test_without_a_curve_each_goes_on_at_its_own_lr_brought_into_its_range():
    task = Task(max_lr=[0.005, 1.0]).run(200, told=[math.nan] * 200)
    assert task.scheduler.switch.lrs == (0.005, 0.001)
    assert "0.005 and 0.001" in next(event.message for event in task.scheduler.events if event.kind == "peak")


# ---------------------------------------------------------------- steps


def test_a_step_counts_where_any_of_the_optimizers_was_called():
    task = Task(rollback=False).run(20)
    for called, counts in (([task.first], 1), ([], 0), ([task.second], 1), ([], 0), ([task.second, task.first], 1)):
        before = task.scheduler.last_epoch
        for one in called:
            one.step()
        task.scheduler.step(1.0)
        assert task.scheduler.last_epoch - before == counts


@pytest.mark.parametrize("infinite", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("at", [0, 7])
def test_a_scaler_skips_a_step_only_where_it_skips_all_optimizers(infinite, at):
    task = Task(rollback=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(at + 1):
        task.model.zero_grad()
        scaler.scale(task.loss(step)).backward()
        for index in infinite if step == at else ():
            (task.first, task.second)[index].param_groups[0]["params"][0].grad.fill_(math.inf)
        scaler.step(task.first)
        scaler.step(task.second)
        scaler.update()
        task.scheduler.step(1.0)
    assert task.scheduler.last_epoch == at + (len(infinite) < 2)


def test_an_optimizer_without_room_for_hooks_is_seen_too():
    class Bare(torch.optim.SGD):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr=lr)
            del self._optimizer_step_post_hooks
            self._optimizer_step_pre_hooks = {}

        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

    Bare.step.hooked = True  # as that of a class which torch has not patched
    task = Task(Bare, Bare, rollback=False).run(5)
    task.scheduler.step(1.0)
    assert task.scheduler.last_epoch == 5
    task.first.step()
    task.scheduler.step(1.0)
    assert task.scheduler.last_epoch == 6


# ---------------------------------------------------------------- copies and setbacks


def test_going_back_puts_weights_buffers_and_the_states_of_all_optimizers_back():
    task, kept = Task(watch=False), {}
    told = valley(64, noise=0.0)
    for step in range(64):
        kept[step] = copy.deepcopy(task.weights())
        task.run(step + 1, told=told)
        if task.scheduler.switch is not None:
            break
    back = int(re.search(r"back at step (\d+)", task.scheduler.events[-1].message)[1])
    for now, then in zip(task.weights(), kept[back], strict=True):
        assert torch.equal(now, then)
    # No optimizer was above its peak there.
    assert all(lr <= peak for lr, peak in zip(task.lrs[back - 1], task.scheduler.switch.lrs, strict=True))


@pytest.mark.parametrize("shape", ["exp", "two_speed", "linear"])
@pytest.mark.parametrize("factors", [(0.4, 0.05), (0.05, 0.4)])
def test_a_copy_is_late_enough_where_no_optimizer_was_above_its_peak(shape, factors):
    config = Task(rollback=False, warmup_type=shape, peak_factor=factors, min_lr=[1e-4, 1e-3], max_lr=[1.0, 0.1]).scheduler.config
    first, second = each_config(config)
    peaks = [one.peak_factor * warmup_lr_at(one, 50) for one in (first, second)]
    least = common_lr(config, Switch(55, peaks[0], 1.0, 50.0, True, (peaks[1],)))
    place = next(at for at in range(64_000) if warmup_lr_at(first, at / 1000) >= least * (1 - 1e-9)) / 1000
    shares = [warmup_lr_at(one, place) / peak for one, peak in zip((first, second), peaks, strict=True)]
    assert max(shares) == pytest.approx(1.0, rel=1e-3)
    if shape == "exp":
        assert copy_share(config) == pytest.approx(least / warmup_lr_at(first, 50))


def test_a_divergence_halves_all_peaks_alike():
    task = Task().run(80)
    switch = task.scheduler.switch
    for _ in range(3):
        task.first.step()
        task.scheduler.step(math.nan)
    assert task.scheduler.events[-1].kind == "divergence"
    assert " and ".join(f"{lr / 2:.4g}" for lr in switch.lrs) in task.scheduler.events[-1].message
    assert [lr / peak for lr, peak in zip(task.scheduler.get_last_lr(), switch.lrs, strict=True)] == pytest.approx(
        [0.5, 0.5], rel=0.1
    )


def test_an_explosion_ends_the_warm_up_of_all():
    task = Task().run(30)
    task.run(33, told=[math.nan] * 33)
    assert [event.kind for event in task.scheduler.events if event.kind != "loss"] == ["explosion", "switch"]
    assert len(task.scheduler.switch.lrs) == 2
    assert all(low <= lr < seen for low, lr, seen in zip((MUON[0], ADAM[0]), task.scheduler.switch.lrs, task.lrs[30], strict=True))


# ---------------------------------------------------------------- states


@pytest.mark.parametrize("at", [pytest.param(5, marks=pytest.mark.slow), 40, pytest.param(120, marks=pytest.mark.slow)])
def test_a_run_that_is_cut_and_resumed_goes_on_bit_for_bit(whole, at):
    saved = Task().run(at).save()
    resumed = Task(total_steps=200).load(saved).run(200)
    assert resumed.lrs == whole.lrs[at:]
    assert resumed.losses == whole.losses[at:]
    assert resumed.scheduler.switch == whole.scheduler.switch


def test_a_state_is_of_as_many_optimizers_as_it_was_saved_of():
    two, one = Task(), sgd(weight())
    with pytest.raises(ValueError, match=r"state_dict of 2 optimizers: this scheduler has 1; build it with the same ones"):
        AutoWU(one, total_steps=200).load_state_dict(two.scheduler.state_dict())
    with pytest.raises(ValueError, match=r"state_dict of 1 optimizers: this scheduler has 2; build it with that one"):
        two.scheduler.load_state_dict(AutoWU(one, total_steps=200).state_dict())
    three = AutoWU([one, sgd(weight()), sgd(weight())], total_steps=200)
    with pytest.raises(ValueError, match=r"state_dict of 2 optimizers: this scheduler has 3"):
        three.load_state_dict(two.scheduler.state_dict())
    more = Task()
    more.second.add_param_group({"params": [weight()], "lr": 0.01})
    more.run(1)
    with pytest.raises(ValueError, match=r"state_dict of 2 parameter groups: optimizer 1 has 1; add the groups"):
        two.scheduler.load_state_dict(more.scheduler.state_dict())


def test_a_damaged_state_of_several_names_the_entry():
    task = Task().run(80)
    for path, wrong in (
        (("config", "others"), ()),
        (("config", "others"), [(1.0, 0.1, 0.4)]),
        (("config", "others"), [(0.1, 1.0)]),
        (("config", "others"), [(0.1, 1.0, 7.0)]),
        (("state", "switch", "others"), [0.1, 0.2]),
        (("state", "switch", "others"), [-1.0]),
        (("groups", "others"), []),
        (("judge", "last", "others"), []),
    ):
        state = inner = copy.deepcopy(task.scheduler.state_dict())
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        with pytest.raises((TypeError, ValueError), match="others"):
            Task().scheduler.load_state_dict(state)


def test_a_state_that_cannot_be_loaded_leaves_all_as_it_was():
    task, other = Task().run(30), Task(matrices=torch.optim.SGD).run(60)
    before = repr(task.scheduler.state_dict())
    state = other.scheduler.state_dict()
    state["judge"]["gp"]["class"] = "Unheard"
    with pytest.raises(ValueError, match="engine Unheard"):
        task.scheduler.load_state_dict(state)
    assert repr(task.scheduler.state_dict()) == before


def test_a_state_of_one_optimizer_that_knows_nothing_of_several_loads():
    def without(state):
        if not isinstance(state, dict):
            return state
        return {key: without(value) for key, value in state.items() if key != "others"}

    def fresh():
        return AutoWU(sgd(weight()), total_steps=100, watch=False)

    scheduler = fresh()
    for loss in valley(60):
        scheduler.optimizer.step()
        scheduler.step(float(loss))
    state = scheduler.state_dict()
    assert "others" not in state["groups"]
    resumed = fresh()
    resumed.load_state_dict(without(state))
    assert (resumed.switch, resumed.get_last_lr(), resumed.config) == (scheduler.switch, scheduler.get_last_lr(), scheduler.config)


def test_groups_that_are_added_later_stay_with_their_optimizer_and_are_resumed():
    def grown():
        task = Task(rollback=False)
        task.first.add_param_group({"params": [weight(2, 2)], "lr": 2 * task.first.param_groups[0]["lr"]})
        return task

    task = Task(rollback=False).run(10)
    task.first.add_param_group({"params": [weight(2, 2)], "lr": 2 * task.first.param_groups[0]["lr"]})
    task.run(60)
    first, late, second = task.scheduler.get_last_lr()
    assert late == pytest.approx(2 * first)
    assert [group["lr"] for group in task.scheduler.optimizer.param_groups] == [first, late, second]
    assert task.scheduler.base_lrs == [0.01, task.first.param_groups[1]["initial_lr"], 0.001]
    resumed = grown()
    resumed.scheduler.load_state_dict(task.scheduler.state_dict())
    assert resumed.scheduler.get_last_lr() == [first, late, second]
    assert resumed.scheduler.base_lrs == task.scheduler.base_lrs
    earlier = grown()  # the state is from before the group was added
    earlier.scheduler.load_state_dict(Task(rollback=False).run(5).scheduler.state_dict())
    now, added, other = earlier.scheduler.get_last_lr()
    assert (added / now, earlier.scheduler.base_lrs) == (pytest.approx(2.0), [0.01, 2e-5, 0.001])
    assert other == task.lrs[5][1]


# ---------------------------------------------------------------- the end of a run


def test_a_run_can_be_made_longer_and_searched_again():
    task = Task(cooldown_fraction=0.5).run(90)
    peaks = task.scheduler.switch.lrs
    task.scheduler.extend(total_steps=240)
    assert task.scheduler.get_last_lr() == list(peaks)
    task.scheduler.rewarm(0.1)
    assert task.scheduler.get_last_lr() == pytest.approx([peak / 10 for peak in peaks])
    task.run(240)
    assert task.scheduler.phase == "done"
    assert len(task.scheduler.switch.lrs) == 2


def test_a_branch_cools_down_with_the_peaks_of_all():
    trunk = Task(cooldown_fraction=0.2).run(100)
    branch = Task()
    branch.scheduler.load_state_dict(trunk.scheduler.fork_cooldown(0.5))
    branch.scheduler.optimizer.step()
    branch.scheduler.step(1.0)
    shares = [lr / peak for lr, peak in zip(branch.scheduler.get_last_lr(), trunk.scheduler.switch.lrs, strict=True)]
    assert shares == pytest.approx([0.99, 0.99])


def test_a_budget_plans_the_warm_up_of_all():
    task = Task(total_steps=None, total_samples=64 * 100, peak_factor=[0.3, None], min_lr=[1e-4, 1e-5])
    state = task.save()[-1]
    assert state["horizon"]["budget"]["given"]["peak_factor"] == (0.3, None)
    task.scheduler.load_state_dict(state)
    while not task.scheduler.should_stop:
        task.model.zero_grad()
        loss = task.loss(task.scheduler.last_epoch)
        loss.backward()
        task.first.step()
        task.second.step()
        task.scheduler.step(loss, samples=64)
    config = task.scheduler.config
    assert (task.scheduler.last_epoch, config.warmup_steps) == (100, 32)
    assert (config.min_lr, config.peak_factor, config.others[0][0]) == (1e-4, 0.3, 1e-5)
    assert config.others[0][2] == 0.4 * 10**-MAX_LAG  # less by the lag in so few steps


def test_a_run_without_a_fixed_end_cools_down_when_asked():
    task = Task(total_steps=None, max_warmup_steps=60).run(100)
    peaks = task.scheduler.switch.lrs
    task.scheduler.start_cooldown(20)
    task.run(111)
    assert [lr / peak for lr, peak in zip(task.scheduler.get_last_lr(), peaks, strict=True)] == pytest.approx([0.5, 0.5])


# ---------------------------------------------------------------- what is shown


def test_repr_messages_report_and_figure_tell_the_lrs_of_all(whole):
    scheduler = whole.scheduler
    assert repr(Task().scheduler).startswith(
        "AutoWU(phase='warmup', step=0/200, lr=1e-05 and 1e-05, lr_range=(1e-05, 10) and (1e-05, 1)"
    )
    peaks = " and ".join(f"{lr:.4g}" for lr in scheduler.switch.lrs)
    assert f"lr={peaks}" in repr(scheduler)
    assert f"LR {peaks}, the loss was lowest" in scheduler.events[0].message
    assert peaks in scheduler._repr_html_()
    for figure in (scheduler.plot(), draw_state(scheduler.state_dict())):
        drawn = [line for line in figure.axes[2].get_lines() if str(line.get_label()).startswith("optimizer")]
        assert [line.get_label() for line in drawn] == ["optimizer 0", "optimizer 1"]
        for line, lrs in zip(drawn, zip(*whole.lrs, strict=True), strict=True):
            assert [lrs[int(step)] for step in line.get_xdata()] == pytest.approx(list(line.get_ydata()))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))], ids=["copied", "pickled"]
)
def test_a_copy_goes_on_by_itself(again):
    task = Task(model=None).run(30)
    other = again(task.scheduler)
    for optimizer in other.optimizer.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
    other.step(task.losses[-1])
    task.run(31, told=[task.losses[29]] * 31)
    assert other.get_last_lr() == task.scheduler.get_last_lr()
    other.step(1.0)
    assert other.last_epoch == 31  # no optimizer was called


# ---------------------------------------------------------------- as one optimizer


def test_the_optimizers_as_one_have_their_groups_states_and_steps():
    task = Task().run(3)
    together = task.scheduler.optimizer
    assert isinstance(together, MultiOptimizer)
    assert together.param_groups == [*task.first.param_groups, *task.second.param_groups]
    assert {*together.state} == {*task.first.state, *task.second.state}
    new = weight()
    task.second.add_param_group({"params": [new]})
    together.state[new] = {"seen": 1}
    assert task.second.state.pop(new) == {"seen": 1}
    assert new not in together.state
    with pytest.raises(KeyError):
        together.state[weight()]
    with pytest.raises(TypeError, match="add the group to one of them"):
        together.add_param_group({"params": [weight()]})
    seen = []
    together.register_step_post_hook(lambda *_: seen.append("hook"))
    before, new.grad = [p.clone() for p in task.model.parameters()], torch.ones(2)
    assert together.step(lambda: seen.append("closure") or 3.0) == 3.0
    assert seen == ["closure", "hook"]
    assert not any(torch.equal(before[at], list(task.model.parameters())[at]) for at in (0, 2))  # of each optimizer one
    together.zero_grad()
    assert all(p.grad is None for p in task.model.parameters())


def test_the_state_of_the_optimizers_as_one_is_that_of_all():
    task, other = Task().run(3), Task()
    other.scheduler.optimizer.load_state_dict(task.scheduler.optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(task.weights()[-6:], other.weights()[-6:], strict=True))
    with pytest.raises(ValueError, match="state_dict of 1 optimizers: this has 2"):
        other.scheduler.optimizer.load_state_dict(task.first.state_dict())


def test_stepping_them_as_one_is_stepping_each(whole):
    task = Task(combine=MultiOptimizer)
    for step in range(whole.scheduler.switch.step):
        task.model.zero_grad()
        loss = task.loss(step)
        loss.backward()
        task.scheduler.optimizer.step()
        task.scheduler.step(loss)
    assert task.scheduler.switch == whole.scheduler.switch


# ---------------------------------------------------------------- wrappers


class Both(torch.optim.Optimizer):
    """Steps two optimizers, as such are written by hand."""

    def __init__(self, inner, own_groups=False):
        groups = [group for one in inner for group in one.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self.matrices, self.rest = inner
        if not own_groups:
            self.param_groups = groups

    def step(self, closure=None):
        self.matrices.step()
        self.rest.step()


def lookahead(inner):
    from timm.optim.lookahead import Lookahead

    return Lookahead(MultiOptimizer(inner), k=3)


@pytest.mark.parametrize("combine", [Both, lookahead], ids=["Both", "Lookahead"])
def test_a_wrapper_that_steps_several_has_a_peak_for_each_and_goes_back_with_the_states_of_all(combine):
    task, kept = Task(combine=combine, watch=False), {}
    optimizer = task.scheduler.optimizer
    assert parts(optimizer) == [task.first, task.second]
    assert (task.scheduler.config.max_lr, task.scheduler.config.others[0][1]) == (MUON[1], ADAM[1])
    for step, loss in enumerate(valley(64, noise=0.0)):
        kept[step] = copy.deepcopy(task.weights())
        task.model.zero_grad()
        task.loss(step).backward()
        optimizer.step()
        task.scheduler.step(float(loss))
        if task.scheduler.switch is not None:
            break
    back = int(re.search(r"back at step (\d+)", task.scheduler.events[-1].message)[1])
    assert all(torch.equal(a, b) for a, b in zip(task.weights(), kept[back], strict=True) if isinstance(a, torch.Tensor))
    assert [group["lr"] for one in (task.first, task.second) for group in one.param_groups] == list(task.scheduler.switch.lrs)
    before = task.scheduler.last_epoch
    task.scheduler.step(1.0)
    assert task.scheduler.last_epoch == before


def test_a_wrapper_that_steps_several_through_groups_of_its_own_is_refused_in_words():
    with pytest.raises(
        ValueError, match="optimizer=Both: steps several optimizers through parameter groups of its own; pass these"
    ):
        Task(combine=lambda inner: Both(inner, own_groups=True))


def test_what_holds_other_optimizers_without_dividing_its_parameters_among_them_is_one_optimizer():
    one, two, shared = weight(), weight(), weight()
    for held in ([sgd(one), sgd(weight())], [sgd(one), sgd(two, shared)], [sgd(one)]):
        outer = sgd(one, two)
        outer.others = held
        assert several(outer) == []
        assert parts(outer) == [outer]


def test_wrappers_within_a_list_keep_their_order():
    inner, other = sgd(weight()), torch.optim.AdamW([weight()])
    wrapped = LARS(inner)
    together = MultiOptimizer([wrapped, MultiOptimizer([other, sgd(weight())])])
    assert [type(one).__name__ for one in parts(together)] == ["LARS", "AdamW", "SGD"]
    assert everyone(together)[:2] == [wrapped, inner]
    config = AutoWU(together, total_steps=1000).config
    assert [config.min_lr, *(low for low, _, _ in config.others)] == [LR_RANGES[name][0] for name in ("lars", "adam", "sgd")]


class SAM(torch.optim.Optimizer):
    """Two passes: up the gradient, and from there a step of `base_optimizer`."""

    def __init__(self, base):
        self.base_optimizer = base
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups

    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            kept = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(p.grad, alpha=0.01)
        self.zero_grad()
        loss = closure()
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
        self.base_optimizer.step()
        return loss


def test_two_passes_of_sam_beside_another_optimizer_are_one_step():
    task = Task(lambda p, lr: SAM(torch.optim.SGD(p, lr=lr, momentum=0.9)), rollback=False)
    for step in range(30):

        def closure(step=step):
            loss = task.loss(step)
            loss.backward()
            return loss

        task.model.zero_grad()
        loss = closure()
        task.first.step(closure)
        task.second.step()
        task.scheduler.step(loss)
        assert task.scheduler.last_epoch == step + 1
        assert task.first.base_optimizer.param_groups[0]["lr"] == task.scheduler.get_last_lr()[0]
    assert (task.scheduler.config.min_lr, task.scheduler.config.others[0][0]) == (LR_RANGES["sgd"][0], ADAM[0])


def test_sam_around_several_is_a_step_of_all():
    task = Task(combine=lambda inner: SAM(MultiOptimizer(inner)), rollback=False)
    for step in range(10):
        task.model.zero_grad()
        task.loss(step).backward()
        task.scheduler.optimizer.step(lambda step=step: task.loss(step).backward())
        task.scheduler.step(1.0)
    assert task.scheduler.last_epoch == 10
    assert len(task.scheduler.config.others) == 1


def test_lbfgs_beside_another_optimizer_calls_its_closure_and_counts_once():
    task = Task(lambda p, lr: torch.optim.LBFGS(p, lr=lr, max_iter=4), rollback=False)
    calls = []
    for step in range(12):

        def closure(step=step):
            task.model.zero_grad()
            loss = task.loss(step)
            loss.backward()
            calls.append(step)
            return loss

        loss = task.first.step(closure)
        task.second.step()
        task.scheduler.step(loss.detach())
    assert task.scheduler.last_epoch == 12
    assert len(calls) > 12
    assert not task.scheduler.events
    with pytest.raises(TypeError, match="LBFGS calls a closure of its own, several times: call the step of each optimizer"):
        task.scheduler.optimizer.step()


def test_the_trust_scaled_muon_for_matrices_and_adamw_for_the_rest_learn():
    task = Task(autowu.optim.Muon, total_steps=120).run(120)
    assert task.scheduler.phase == "done"
    assert sum(task.losses[-10:]) < 0.2 * sum(task.losses[:10])


# ---------------------------------------------------------------- as shown


def test_the_example_learns(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["muon_digits.py", "--epochs", "6"])
    runpy.run_path(str(ROOT / "examples" / "muon_digits.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"peak LRs \S+ and \S+ from step \d+ of 126", said)
    assert float(re.search(r"test accuracy ([\d.]+)%", said)[1]) > 80


def test_the_blocks_of_the_page_run():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "several-optimizers.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["loss"] < 1.0
    module = nn.Module()
    module.matrices, module.rest, module.trainer = names["matrices"], names["rest"], SimpleNamespace(estimated_stepping_batches=100)
    configured = names["configure_optimizers"](module)
    assert configured["lr_scheduler"]["scheduler"].optimizer is configured["optimizer"]
