"""torch.compile(optimizer.step): one graph, the steps of the eager optimizer, no new graph for a new LR."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, RMSprop

from autowu.optim import LAMB, LANS, LARS, TVLARS, Muon
from autowu.optim.engines import cpu_loops
from autowu.optim.rules import LambNumbers, LarsNumbers

SHAPES = ((5, 4), (7,), (3, 3, 2), (1,))
OPTIMIZERS = {
    "lars_sgd": lambda groups, **kw: LARS(SGD(groups, momentum=0.9, nesterov=True, **kw)),
    "lars_sgd_foreach": lambda groups, **kw: LARS(SGD(groups, momentum=0.9, foreach=True, **kw), foreach=True),
    "lars_adamw": lambda groups, **kw: LARS(AdamW(groups, **kw)),
    "lars_rmsprop": lambda groups, **kw: LARS(RMSprop(groups, **kw)),
    "tvlars": lambda groups, **kw: TVLARS(groups, lmbda=0.3, **kw),
    "lamb": LAMB,
    "lamb_foreach": lambda groups, **kw: LAMB(groups, foreach=True, **kw),
    "lans": LANS,
    "muon": lambda groups, **kw: Muon(groups, momentum=0.5, **kw),
}
QUICK = ("lars_sgd", "lamb", "muon")  # the operators of LARS and LAMB, and what is traced


def make_parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make(name, parameters):
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "adapt": False}]
    return OPTIMIZERS[name](groups, lr=torch.tensor(0.1))


def take_steps(optimizer, parameters, step, count=6):
    for number in range(count):
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"].fill_(0.02 * (number + 1))
        step()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


# Torch's own warnings while it compiles: no CUDA here, and the profiler's record in a step is left out.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in OPTIMIZERS])
def test_compiled_it_takes_the_same_steps_in_one_graph_with_an_operator_for_each_group(name, monkeypatch):
    operators = []
    build = cpu_loops.build
    monkeypatch.setattr(cpu_loops, "build", lambda: operators.append(name) or build())
    parameters, twins = make_parameters(), make_parameters()
    optimizer, compiled = make(name, parameters), make(name, twins)
    take_steps(optimizer, parameters, optimizer.step)
    take_steps(compiled, twins, torch.compile(compiled.step, fullgraph=True))
    # Momentum buffers are made in the first step of SGD, so the second is another graph; six LRs are no reason for one.
    assert counters["stats"]["unique_graphs"] == (2 if "sgd" in name or name == "tvlars" else 1)
    if name in ("lars_sgd", "tvlars", "lamb"):
        assert len(operators) == 6 * 2
    tolerance = 0.03 if name == "muon" else 1e-4  # it rounds to bfloat16, elsewhere once compiled
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(twin, parameter, rtol=tolerance, atol=0.2 * tolerance)
    assert len(compiled.layer_stats()) == (1 if name == "muon" else 2)
    for layer, expected in zip(compiled.layer_stats(), optimizer.layer_stats(), strict=True):
        assert layer.name == expected.name
        assert layer[1:] == pytest.approx(expected[1:], rel=tolerance)
    if name == "tvlars":
        assert [int(group["step"]) for group in compiled.param_groups] == [6, 6]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_state_goes_on_eagerly():
    parameters, twins = make_parameters(), make_parameters()
    optimizer, compiled = make("lamb", parameters), make("lamb", twins)
    for _ in range(2):
        take_steps(optimizer, parameters, optimizer.step, 2)
    take_steps(compiled, twins, torch.compile(compiled.step, fullgraph=True), 2)
    other = make("lamb", twins)
    other.load_state_dict(compiled.state_dict())
    take_steps(other, twins, other.step, 2)
    for state, expected in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert state["step"] == expected["step"] == 4
        torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=1e-5, atol=1e-6)
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(twin, parameter, rtol=1e-4, atol=2e-5)


UNPICKLED = """
import os, pickle, sys, warnings
import torch, autowu.optim, torch._dynamo

warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    if os.fork():  # each in a process where nothing was registered; what was imported is there
        assert os.wait()[1] == 0
        continue
    optimizer = pickle.load(open(path, "rb"))
    assert hasattr(torch.ops.autowu, "lamb_") and hasattr(torch.ops.autowu, "lars_")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    torch.compile(optimizer.step, fullgraph=True)()
    print(all(parameter.isfinite().all() for group in optimizer.param_groups for parameter in group["params"]))
    break
"""


@pytest.mark.slow  # that one is pickled, and that one compiles, is held above
@pytest.mark.parametrize("names", [("lamb",), ("lars_sgd", "lamb")])
def test_an_unpickled_optimizer_compiles_in_a_process_of_its_own(tmp_path, names):
    paths = []
    for name in names:
        paths.append(tmp_path / name)
        with open(paths[-1], "wb") as file:
            pickle.dump(make(name, make_parameters()), file)
    done = subprocess.run([sys.executable, "-c", UNPICKLED, *paths], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n" * len(names)


@pytest.mark.parametrize("adapt", [True, False])
def test_the_operators_are_what_their_schemas_say(adapt):
    def column():
        return [parameter.detach() for parameter in make_parameters()]

    cpu_loops.register()
    lr, coef = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    fresh, steps = [False for _ in SHAPES], [torch.ones(()) for _ in SHAPES]
    lars = LarsNumbers(
        coef, 1e-8, max_norm=float("inf"), weight_decay=0.1, maximize=False, adapt=adapt, lr=lr, momentum=0.9, nesterov=adapt
    )
    lamb = LambNumbers(lr, 0.9, 0.99, 1e-6, weight_decay=0.1, max_trust_ratio=10.0, bias_correction=True, adapt=adapt)
    moments = column(), [tensor.abs() for tensor in column()]
    torch.library.opcheck(torch.ops.autowu.lars_.default, (column(), column(), column(), fresh, *lars))
    torch.library.opcheck(torch.ops.autowu.lamb_.default, (column(), column(), *moments, steps, *lamb))
