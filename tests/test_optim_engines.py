"""Every engine is held to its rule: awkward steps by each that takes it, against the rule written out densely in float64.

The kernels of a GPU run here where there is one, or, by test_optim_device.py, interpreted on the CPU.
"""

import importlib.util
import math
import os

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from autowu.optim import LAMB, LANS, LARS, TVLARS, Muon, lars, layerwise
from autowu.optim.batches import batches
from autowu.optim.engines import cpu, cpu_loops, gpu, pick
from autowu.optim.lans import Lans
from autowu.optim.muon import MuonRule
from autowu.optim.rules import LAMB_RULE, LARS_RULE, Lamb

STEPS = 5
KERNELS = importlib.util.find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3}

# How an engine is asked for: the module, and `foreach`. None is the reference, torch's operations.
ENGINES = {
    "one by one": (None, False),
    "at once": (None, True),
    "cpu": (cpu, False),
    "cpu_loops": (cpu_loops, False),
    "gpu": (gpu, True),
}
DTYPES = {cpu: (torch.float32, torch.float64), cpu_loops: (torch.float32, torch.float64), gpu: (torch.float32, torch.bfloat16)}
RULES = {  # who makes it, its options, the engines with kernels for it
    "lars": (LARS, [{}, {"maximize": True}, {"max_norm": 2.0}], (cpu, cpu_loops, gpu)),
    "momentum": (
        LARS,
        [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3, "maximize": True}],
        (cpu, cpu_loops, gpu),
    ),
    "tvlars": (TVLARS, [{}], (cpu, cpu_loops, gpu)),
    "lars around adamw": (AdamW, [{}], (gpu,)),
    "lamb": (LAMB, [{}, {"bias_correction": False}, {"max_trust_ratio": 0.7}], (cpu, cpu_loops, gpu)),
    "lans": (LANS, [{}, {"max_trust_ratio": 0.7}], ()),
    "muon": (Muon, [{}, {"max_trust_ratio": 0.05}], ()),
}


# ---- the rules, dense and obvious: each is given float64 tensors, the state of a parameter, and options -----------------------


def ratio_of(weight, other, formula):
    norms = float(weight.norm()), float(other.norm())
    return formula(*norms) if norms[0] > 0 and norms[1] > 0 else 1.0


def adapted(w, g, o):
    """The gradient that LARS gives to another optimizer, as one that is descended, and its ratio."""
    cap = o.get("max_norm", math.inf)

    def formula(weight, grad):
        weight, grad = min(weight, cap), min(grad, cap)
        return o["coef"] * weight / (grad + o["weight_decay"] * weight + 1e-8)

    ratio = ratio_of(w, g, formula) if o["adapt"] else 1.0
    return ratio * ((-g if o.get("maximize") else g) + o["weight_decay"] * w), ratio


def lars_step(w, g, state, o):
    g, ratio = adapted(w, g, o)
    if momentum := o.get("momentum", 0.0):
        new = g if "b" not in state else momentum * state["b"] + (1 - o.get("dampening", 0.0)) * g
        state["b"] = new
        g = g + momentum * new if o.get("nesterov") else new
    return w - o["lr"] * g, ratio


def adam_parts(g, state, o):
    state["t"] = state.get("t", 0) + 1
    (beta1, beta2), correct = o["betas"], o.get("bias_correction", True)
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    m, v = (x / (1 - beta ** state["t"]) if correct else x for x, beta in ((state["m"], beta1), (state["v"], beta2)))
    return m, v.sqrt() + o["eps"]


def scaled(w, update, o):
    update = update + o["weight_decay"] * w
    ratio = ratio_of(w, update, lambda weight, other: min(weight / other, o.get("max_trust_ratio", 10.0))) if o["adapt"] else 1.0
    return ratio * update, ratio


def lamb_step(w, g, state, o):
    m, root = adam_parts(g, state, o)
    update, ratio = scaled(w, m / root, o)
    return w - o["lr"] * update, ratio


def lans_step(w, g, state, o):
    if not o["adapt"]:
        return lamb_step(w, g, state, o)
    g = g / g.norm() if g.norm() > 0 else g
    m, root = adam_parts(g, state, o)
    beta, (of_momentum, ratio), (of_gradient, _) = o["betas"][0], scaled(w, m / root, o), scaled(w, g / root, o)
    return w - o["lr"] * (beta * of_momentum + (1 - beta) * of_gradient), ratio


def muon_step(w, g, state, o):
    if not o["adapt"] or w.ndim < 2:
        return lamb_step(w, g, state, o | {"adapt": False})
    state["b"] = 0.95 * state.get("b", 0) + 0.05 * g
    ahead = (0.95 * state["b"] + 0.05 * g).flatten(1)
    if not ahead.isfinite().all():
        return torch.full_like(w, math.nan), 1.0
    left, values, right = torch.linalg.svd(ahead, full_matrices=False)
    values = values / max(float(values.norm()), 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    update, ratio = scaled(w, (left * values @ right).reshape(w.shape), {"max_trust_ratio": math.inf} | o)
    return w - o["lr"] * update, ratio


def tvlars_step(w, g, state, o):
    state["t"] = state.get("t", 0)
    return lars_step(w, g, state, o | {"coef": 0.1 * (1 / (1 + math.exp(0.5 * (o["time"] - 2))) + 0.01), "momentum": 0.9})


def around_adamw_step(w, g, state, o):
    g, ratio = adapted(w, g, o)
    w, _ = lamb_step(w, g, state, o | {"adapt": False, "weight_decay": 0.0})
    return w, ratio


DENSE = {
    "lars": lars_step,
    "momentum": lars_step,
    "tvlars": tvlars_step,
    "lars around adamw": around_adamw_step,
    "lamb": lamb_step,
    "lans": lans_step,
    "muon": muon_step,
}


# ---- the awkward steps -------------------------------------------------------------------------------------------------------


def drawn(seed, shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = ((6, 5), (4, 3, 3), (7,), (3, 3), (2, 2), (8, 2), (3, 2, 4, 4), (1,), (70, 60), (9, 4), (5, 4))
ZERO_WEIGHT, ZERO_GRAD, NAN, LATE, LARGE, CHANNELS_LAST = 1, 3, 4, 5, 9, 6


def weights():
    found = [drawn(i, shape) for i, shape in enumerate(SHAPES)]
    found[ZERO_WEIGHT].zero_()
    found[LARGE].mul_(100)  # meets the cap
    return found


def gradients(step):
    found = [drawn(100 * step + 50 + i, shape) for i, shape in enumerate(SHAPES)]
    found[ZERO_GRAD].zero_()
    if step == 3:
        found[NAN][0, 0] = math.nan
    return [None if (i == LATE and step < 2) or (i == 0 and step == 3) else grad for i, grad in enumerate(found)]


def group_options(rule):
    base = {"lr": 0.5, "coef": 0.1} if DENSE[rule] in (lars_step, tvlars_step) else {**ADAM, "coef": 0.1}
    return (base | {"weight_decay": 0.05, "adapt": True}, base | {"weight_decay": 0.02, "adapt": False})


def dense(rule, options):
    """Weights and ratios of the rule in float64; what the last group has does not adapt."""
    found, states, ratios = weights(), [{} for _ in SHAPES], [None] * len(SHAPES)
    for step in range(STEPS):
        for i, grad in enumerate(gradients(step)):
            own = group_options(rule)[i >= 8] | options | {"time": step}
            if grad is not None:
                found[i], ratios[i] = DENSE[rule](found[i], grad, states[i], own)
            else:
                ratios[i] = None
    return found, ratios[:8]


def make(rule, options, groups, foreach):
    kind, lr = RULES[rule][0], group_options(rule)[0]["lr"]
    if kind is LARS:
        caps = {key: value for key, value in options.items() if key == "max_norm"}
        sgd = {key: value for key, value in options.items() if key != "max_norm"}
        return LARS(SGD([group | caps for group in groups], lr=lr, **sgd), trust_coef=0.1, foreach=foreach or None)
    if kind is TVLARS:
        return TVLARS(groups, lr, eta=0.1, lmbda=0.5, delay=2, gamma_min=0.01, foreach=foreach)
    if kind is AdamW:
        return LARS(AdamW(groups, **ADAM), trust_coef=0.1, foreach=foreach)
    return kind(groups, **ADAM, **options, foreach=foreach)


def cases():
    for rule, (_, several, kernels) in RULES.items():
        for engine, (module, _) in ENGINES.items():
            if module is None or module in kernels:
                for dtype in DTYPES.get(module, tuple(TOLERANCES)):
                    if rule == "lans" and dtype == torch.float16:  # which it refuses
                        continue
                    for options in several:
                        yield pytest.param(rule, engine, dtype, options, id=f"{rule}-{engine}-{str(dtype)[6:]}-{options}")


@pytest.mark.parametrize(("rule", "engine", "dtype", "options"), list(cases()))
def test_an_engine_takes_the_steps_of_its_rule(rule, engine, dtype, options, monkeypatch):
    module, foreach = ENGINES[engine]
    if module is gpu and not KERNELS:
        pytest.skip("no GPU, and kernels are not interpreted")
    cpu_loops.register()
    taken = []

    def only(rule, batch, one_by_one, at_once):
        taken.append(rule.name)
        return module if module is not None and module.takes(rule, batch) else None

    for place in (lars, layerwise):
        monkeypatch.setattr(place, "pick", only)
    monkeypatch.setattr(gpu, "_works", lambda *_: module is gpu)
    if DEVICE.type == "cpu" and module is gpu:
        monkeypatch.setattr(gpu._Launch, "number", lambda _, value: float(value))
    device = DEVICE if module in (None, gpu) else torch.device("cpu")
    parameters = [nn.Parameter(weight.to(device, dtype)) for weight in weights()]
    parameters[CHANNELS_LAST].data = parameters[CHANNELS_LAST].data.contiguous(memory_format=torch.channels_last)
    groups = [{"params": parameters[:8], "weight_decay": 0.05}, {"params": parameters[8:], "weight_decay": 0.02, "adapt": False}]
    optimizer = make(rule, options, groups, foreach)
    for step in range(STEPS):
        for parameter, grad in zip(parameters, gradients(step), strict=True):
            parameter.grad = None if grad is None else torch.empty_like(parameter).copy_(grad)
        optimizer.step()
    expected, ratios = dense(rule, options)
    tolerance = max(TOLERANCES[dtype], 2e-2 if rule == "muon" else 0.0)  # it is made orthogonal in bfloat16
    for i, (parameter, weight) in enumerate(zip(parameters, expected, strict=True)):
        own = parameter.detach().double().cpu()
        assert torch.equal(own.isnan(), weight.isnan()), i
        error = (own - weight).nan_to_num().norm()
        assert error <= tolerance * (1 + weight.nan_to_num().norm()), i
    stats = {int(layer.name.split(".")[1]): layer.trust_ratio for layer in optimizer.layer_stats()}
    adapting = [i for i, ratio in enumerate(ratios) if ratio is not None and (rule != "muon" or len(SHAPES[i]) > 1)]
    assert list(stats) == adapting
    assert list(stats.values()) == pytest.approx([ratios[i] for i in adapting], rel=10 * tolerance)
    assert taken or RULES[rule][0] is AdamW


def test_what_has_no_kernel_runs_by_the_reference():
    tensors = [torch.ones(4, 4), torch.ones(4, 4)]
    (batch,) = batches([tensors[0]], [tensors[1]])
    assert pick(LARS_RULE, batch, one_by_one=True, at_once=False) is cpu
    for rule in (Lans(), MuonRule()):
        assert pick(rule, batch, one_by_one=True, at_once=True) is None
    (half,) = batches([tensors[0].half()], [tensors[1].half()])
    assert pick(LAMB_RULE, half, one_by_one=True, at_once=True) is None


def test_numbers_reach_the_operators_by_name():
    assert cpu_loops._SIGNATURES["lamb"].schema().split(", ")[-8:] == [
        "Tensor lr",
        "float beta1",
        "float beta2",
        "float eps",
        "float weight_decay",
        "float max_trust_ratio",
        "bool bias_correction",
        "bool adapt",
    ]
    assert [kind for kind in cpu_loops._SIGNATURES["lars"].kinds() if kind == "Tensor"] == ["Tensor", "Tensor"]  # coef and lr


def test_a_rule_has_a_name_of_its_own_or_engines_would_run_another():
    with pytest.raises(TypeError, match="Halved: a rule needs a `name` of its own"):

        class Halved(Lamb):
            def ratio(self, weight, other, numbers):
                return super().ratio(weight, other, numbers) / 2

    class Named(Lamb):
        name = "named"

        def ratio(self, weight, other, numbers):
            return super().ratio(weight, other, numbers) / 2

    class Mine(LAMB):
        rules = (Named(),)

    stats = []
    for kind in (LAMB, Mine):
        weight = nn.Parameter(torch.ones(3, 3))
        weight.grad = torch.ones(3, 3)
        optimizer = kind([weight], lr=0.1)
        optimizer.step()
        stats += optimizer.layer_stats()
    assert stats[1].trust_ratio == pytest.approx(stats[0].trust_ratio / 2, rel=1e-5)
