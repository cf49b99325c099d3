"""What the optimizers refuse: values out of their range or of another kind, wherever they come from."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from autowu.optim import LAMB, LANS, LARS, TVLARS, Muon

NOT_NUMBERS = ["0.1", 1j, True, torch.tensor(0.1), [0.1], np.array(0.1)]
AT_LEAST_0 = [-1e-9, math.nan, math.inf, 1e300, *NOT_NUMBERS]
ABOVE_0 = [0.0, *AT_LEAST_0]
ABOVE_0_OR_INF = [0, -1.0, math.nan, None, *NOT_NUMBERS]
LRS = [
    *(-1.0, math.nan, math.inf, 1e300, 10**400, "0.1", 1j, True),
    *(torch.tensor([0.1, 0.1]), torch.tensor(math.nan), torch.tensor(-0.1), torch.tensor(1), torch.tensor(0.1, device="meta")),
]
BELOW_1 = [1.0, -0.1, math.nan, *NOT_NUMBERS]
BETAS = [(0.9, 0.99, 0.999), (0.9,), (), 0.9, None, "00", (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), (0.9, "0.9"), torch.zeros(2)]
FLAGS = [1, "yes", None, torch.tensor(True)]
FINITE = [math.nan, -math.inf, 1e300, *NOT_NUMBERS]
TRUST_SCALED = {"lr": LRS, "eps": ABOVE_0, "weight_decay": AT_LEAST_0, "betas": BETAS, "max_trust_ratio": ABOVE_0_OR_INF}
TRUST_SCALED |= {"capturable": FLAGS, "foreach": [1, "yes"]}
LARS_OWN = {"trust_coef": ABOVE_0, "lr": LRS, "weight_decay": AT_LEAST_0, "momentum": AT_LEAST_0, "nesterov": FLAGS}
TVLARS_OWN = {"lmbda": AT_LEAST_0, "alpha": ABOVE_0, "delay": FINITE, "gamma_min": AT_LEAST_0, "max_norm": ABOVE_0_OR_INF}
TVLARS_OWN |= {"lr": LRS, "weight_decay": AT_LEAST_0, "momentum": AT_LEAST_0, "nesterov": FLAGS, "capturable": FLAGS}

CONSTRUCTOR = {
    LAMB: TRUST_SCALED | {"bias_correction": FLAGS},
    LANS: TRUST_SCALED,
    Muon: TRUST_SCALED | {"momentum": BELOW_1},
    TVLARS: TVLARS_OWN | {"eta": ABOVE_0, "eps": AT_LEAST_0},
    LARS: {"trust_coef": ABOVE_0, "eps": AT_LEAST_0, "foreach": [1, "yes"]},
}
GROUP = {
    LAMB: CONSTRUCTOR[LAMB] | {"adapt": FLAGS},
    LANS: CONSTRUCTOR[LANS] | {"adapt": FLAGS},
    Muon: CONSTRUCTOR[Muon] | {"adapt": FLAGS},
    TVLARS: TVLARS_OWN | {"adapt": FLAGS, "trust_coef": ABOVE_0, "step": [3, torch.tensor(-1.0), torch.tensor([1.0, 2.0])]},
    LARS: LARS_OWN | {"adapt": FLAGS, "dampening": FINITE},
}


def cases(table):
    return [pytest.param(cls, name, values, id=f"{cls.__name__}-{name}") for cls in table for name, values in table[cls].items()]


def refused(name):
    return pytest.raises((TypeError, ValueError), match=f"^{name}=.*: .*must")


def parameter():
    return nn.Parameter(torch.ones(3, 2))


def build(cls, params, **arguments):
    return LARS(SGD(params, lr=0.1), **arguments) if cls is LARS else cls(params, **{"lr": 0.1} | arguments)


def contents(optimizer):
    """All that an optimizer keeps, and of its parameters which they are."""
    groups = [group | {"params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    return copy.deepcopy((groups, optimizer.defaults, {id(param): state for param, state in optimizer.state.items()}))


@pytest.mark.parametrize(("cls", "name", "values"), cases(CONSTRUCTOR))
def test_a_constructor_names_the_argument_that_it_refuses(cls, name, values):
    for value in values:
        with refused(name):
            build(cls, [parameter()], **{name: value})


@pytest.mark.parametrize(("cls", "name", "values"), cases(GROUP))
def test_a_group_is_refused_wherever_it_comes_from_and_nothing_is_changed(cls, name, values):
    optimizer = build(cls, [parameter()])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    optimizer.step()
    before = repr(contents(optimizer))
    for value in values:
        with refused(name):  # as the second, after a sound one
            build(cls, [{"params": [parameter()]}, {"params": [parameter()], name: value}])
        with refused(name):
            optimizer.add_param_group({"params": [parameter()], name: value})
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0][name] = value
        with refused(name):
            optimizer.load_state_dict(state)
        assert repr(contents(optimizer)) == before
    optimizer.step()


@pytest.mark.parametrize("cls", CONSTRUCTOR)
def test_what_torch_itself_refuses_of_a_group_leaves_the_optimizer_as_it_was(cls):
    param = parameter()
    optimizer = build(cls, [param])
    before = contents(optimizer)
    for group in ({"params": [param]}, {"params": [parameter().detach() * parameter()]}, {"params": 1}, [parameter()], None):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            optimizer.add_param_group(group)
    assert repr(contents(optimizer)) == repr(before)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("cls", [LAMB, LANS, Muon, TVLARS])
def test_what_is_accepted_at_the_ends_of_the_ranges_steps(cls, foreach):
    largest = float(torch.finfo(torch.float32).max)
    ends = [{"lr": 0}, {"lr": largest}, {"lr": np.float32(0.1)}, {"lr": torch.tensor([0.1])}, {"lr": torch.tensor(0.1).double()}]
    ends += [
        {"weight_decay": largest},
        {"weight_decay": np.int64(1)},
        {"lr": np.float16(0.1)},
        {"eps": np.float32(1e-6)},
        {"eps": largest},
    ]
    ends += [{"betas": [0.9, 0.99]}, {"betas": (0, 0)}, {"max_trust_ratio": math.inf}] if cls is not TVLARS else []
    ends += [{"delay": -largest}, {"delay": largest}, {"alpha": largest, "lmbda": largest}] if cls is TVLARS else []
    for arguments in ends:
        for adapt in (True, False):
            param = parameter()
            optimizer = build(cls, [{"params": [param], "adapt": adapt}], foreach=foreach, **arguments)
            for _ in range(2):
                param.grad = torch.full((3, 2), 1e-3)
                optimizer.step()


def test_a_pickle_with_a_value_out_of_its_range_is_refused():
    optimizer = LAMB([parameter()])
    state = optimizer.__getstate__()
    state["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr=nan: must be at least 0"):
        LAMB.__new__(LAMB).__setstate__(state)


@pytest.mark.parametrize("cls", [LARS, TVLARS])
def test_groups_state_and_defaults_that_a_host_sets_are_the_wrapped_optimizers(cls):
    optimizer = build(cls, [parameter()])
    groups, state, defaults = copy.deepcopy(optimizer.param_groups), copy.deepcopy(optimizer.state), dict(optimizer.defaults)
    own = ("adapt", "trust_coef")
    groups.append({key: value for key, value in groups[0].items() if key not in own} | {"params": [parameter()]})
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    assert optimizer.optim.param_groups is groups
    assert optimizer.optim.state is state
    assert optimizer.optim.defaults is defaults
    assert [groups[1][name] for name in own] == [True, 0.001]
    for group in groups:
        group["params"][0].grad = torch.ones(3, 2)
    optimizer.step()
    assert all(bool((group["params"][0] < 1).all()) for group in groups)
    with refused("weight_decay"):
        optimizer.param_groups = [groups[0], groups[1] | {"weight_decay": -1.0}]
    assert optimizer.param_groups is groups


ALL = {
    **{cls.__name__: cls for cls in (LAMB, LANS, Muon, TVLARS)},
    "LARS": lambda groups, lr, **options: LARS(SGD(groups, lr=lr, momentum=0.9), **options),
    "LARS around Adam": lambda groups, lr, **options: LARS(torch.optim.Adam(groups, lr=lr), **options),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn)
SHAPES = ((3, 2), (0, 2), (2, 0), (0,), (), (1, 1), (2, 0, 3))


@pytest.mark.filterwarnings("ignore:LARS around")
@pytest.mark.parametrize("foreach", [pytest.param(None, marks=pytest.mark.slow), True, False])  # None is one of the two
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_what_is_accepted_when_made_steps(make, foreach):
    for dtype in DTYPES:
        for shape in SHAPES if dtype == torch.float32 else ((3, 2), (0, 2), ()):
            for device in ("cpu", "meta"):
                for adapt in (True, False):
                    param = nn.Parameter(torch.ones(shape, device=device).to(dtype))
                    try:
                        optimizer = make([{"params": [param], "adapt": adapt}], lr=0.1, foreach=foreach)
                    except TypeError:
                        assert dtype.itemsize == 1 or dtype.is_complex or (make is LANS and dtype == torch.float16)
                        continue
                    for _ in range(2):
                        param.grad = torch.ones_like(param.detach())
                        optimizer.step()


@pytest.mark.filterwarnings("ignore:LARS around", "ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_empty_groups_mixed_ones_and_closures_step(make):
    mixed = [nn.Parameter(torch.ones(2, 2).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    for groups in ([{"params": []}, {"params": [parameter(), *mixed, nn.Parameter(torch.ones(0, 3)), parameter()]}],):
        for foreach in (None, True, False):
            optimizer = make([dict(group) for group in groups], lr=0.1, foreach=foreach)
            for param in optimizer.param_groups[1]["params"][:-1]:  # the last has no gradient
                param.grad = torch.ones_like(param.detach())
            assert optimizer.step(lambda: 0.5) == 0.5
            optimizer.layer_stats()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()


@pytest.mark.filterwarnings("ignore:LARS around")
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_sparse_gradient_is_refused_by_name_whatever_its_shape(make):
    for shape in SHAPES:
        for options in ({"foreach": False}, {"foreach": True}, {}):
            param = nn.Parameter(torch.ones(shape))
            optimizer = make([param], lr=0.1, **options)
            param.grad = torch.ones(shape).to_sparse()
            with pytest.raises(RuntimeError, match=r"(LARS|LAMB|LANS|Muon): a gradient of layout"):
                optimizer.step()


@pytest.mark.parametrize("cls", [LARS, TVLARS, LAMB])
def test_a_late_group_of_numbers_of_8_bits_is_refused_and_nothing_is_changed(cls):
    optimizer = build(cls, [parameter()])
    before = repr(contents(optimizer))
    with pytest.raises(TypeError, match=r"params: .*float8_e4m3fn; take bfloat16 or better"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]})
    assert repr(contents(optimizer)) == before
