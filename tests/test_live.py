"""What a run changes: found by the optimizer alone or with the model, under the names that it has without wrappers."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autowu.live import LiveRun


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


NAMES = {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
BUFFERS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_the_optimizer_alone_knows_every_parameter_and_its_state():
    model = network()
    optimizer = adam(model.parameters())
    train(model, optimizer)
    tensors = LiveRun(optimizer).look().tensors
    assert {key[1] for key in tensors if key[0] == "parameter"} == set(range(6))
    assert {key[2:] for key in tensors if key[0] == "state"} == {
        (k, name) for k in range(6) for name in ("step", "exp_avg", "exp_avg_sq")
    }
    assert not [key for key in tensors if key[0] == "buffer"]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_names_are_those_without_wrappers(wrap):
    model = network()
    live = LiveRun(adam(model.parameters()), wrap(model))
    assert set(live.parameters()) == NAMES
    assert set(live.buffers()) == BUFFERS


def test_names_that_wrappers_alone_tell_apart_stay_as_they_are():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.module = nn.Linear(2, 1, bias=False)

    model = Both()
    assert set(LiveRun(adam(model.parameters()), model).parameters()) == {"weight", "module.weight"}


@pytest.mark.parametrize("given", [True, False])
def test_a_frozen_base_is_not_copied(given):
    model = network()
    model[0].requires_grad_(False)
    live = LiveRun(adam(model.parameters()), model if given else None)
    train(model, live.optimizer)
    live.look_for_averages()
    found = live.parameters().values()
    assert {id(p) for p in found} == {id(p) for layer in (model[1], model[2]) for p in layer.parameters()}


@pytest.mark.parametrize("through_data", [True, False])
def test_an_average_of_the_weights_is_found_though_it_does_not_train(through_data):
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).requires_grad_(False)
    average.update_parameters(model)  # the first update copies
    live = LiveRun(adam(model.parameters()), nn.ModuleList([model, average]))
    live.look_for_averages()
    before = set(live.parameters())
    train(model, live.optimizer)
    if through_data:
        for ours, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
            ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)
    else:
        average.update_parameters(model)
    live.look_for_averages()
    assert before == {f"0.{name}" for name in NAMES}
    assert set(live.parameters()) == before | {f"1.{name}" for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_parameter_of_any_dtype_that_is_not_finite_is_not_sound(dtype, bad):
    parameter = nn.Parameter(torch.zeros(5, dtype=dtype))
    live = LiveRun(torch.optim.SGD([parameter], lr=0.1))
    assert live.sound() == 1.0
    parameter.data[2] = complex(0.0, bad) if dtype.is_complex else bad
    assert live.sound() == 0.0


def test_a_parameter_in_eight_bits_is_looked_at_too():
    parameter = nn.Parameter(torch.zeros(5).to(torch.float8_e5m2))
    live = LiveRun(torch.optim.SGD([parameter], lr=0.1))
    assert live.sound() == 1.0
    parameter.data = torch.full((5,), math.inf).to(torch.float8_e5m2)
    assert live.sound() == 0.0


def test_nothing_at_all_is_sound():
    assert LiveRun(torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.1)).sound() == 1.0


class Wrapper(torch.optim.Optimizer):
    """Holds an optimizer and a state of its own."""

    def __init__(self, inner):
        self.optimizer = inner
        self.param_groups = [dict(group) for group in inner.param_groups]
        self.state = {p: {"slow": p.detach().clone()} for group in inner.param_groups for p in group["params"]}


def test_what_a_wrapper_and_what_it_wraps_keep_is_found():
    model = network()
    inner = adam(model.parameters())
    train(model, inner)
    holders = {where for where, _, _ in LiveRun(Wrapper(inner), model).holders()}
    places = [*(("state", name) for name in NAMES), ("group", 0), ("named", 0)]
    assert holders == {(kind, level, label) for level in range(2) for kind, label in places}
