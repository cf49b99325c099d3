"""The groups that param_groups makes of real models, and learning rates by batch size."""

import logging
import math
import re

import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_weight_decay
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from autowu.optim.param_groups import linear_scaled_lr, param_groups, sqrt_scaled_lr


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


MODELS = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "vit": lambda: timm.create_model("test_vit"),
    "convnext": lambda: timm.create_model("test_convnext"),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 1, 1)),
    "efficientnet": lambda: timm.create_model("test_efficientnet"),
    "gpt2": gpt2,
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]()


def named(groups):
    return {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}


def placed(groups):
    """Whether each parameter is adapted, by name."""
    return {name: g["adapt"] for g in groups for name in g["param_names"]}


def test_every_trainable_parameter_is_there_once_under_its_name(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 5 != 2)
    groups = param_groups(model, 1e-4)
    listed = [p for g in groups for p in g["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    wanted = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    assert {name: id(p) for name, p in named(groups).items()} == wanted
    assert 0 < len(wanted) < len(list(model.parameters()))


def test_a_group_has_decay_and_adaptation_or_neither(model):
    assert [(g["weight_decay"], g["adapt"]) for g in param_groups(model, 1e-4)] == [(1e-4, True), (0.0, False)]
    assert [(g["weight_decay"], g["adapt"]) for g in param_groups(model)] == [(0.0, True), (0.0, False)]


def test_norms_and_biases_are_left_out_and_kernels_are_not(model):
    adapted = placed(param_groups(model, 1e-4))
    kernels = [
        name + ".weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | Conv1D) and name + ".weight" in adapted
    ]
    assert len(kernels) > 5
    assert all(adapted[name] for name in kernels)
    assert all(named(param_groups(model))[name].ndim > 1 for name in adapted if adapted[name])
    biases = [name for name in adapted if name.endswith("bias")]
    assert len(biases) > 5
    assert not any(adapted[name] for name in biases)


@pytest.mark.parametrize("model", ["resnet18", "vit", "convnext", "swin", "efficientnet"], indirect=True)
def test_timm_decays_what_is_decayed_here(model):
    theirs = param_groups_weight_decay(model, 1e-4, no_weight_decay_list=getattr(model, "no_weight_decay", set)())
    ours = param_groups(model, 1e-4)
    for decay in (0.0, 1e-4):
        sets = [{id(p) for g in groups if g["weight_decay"] == decay for p in g["params"]} for groups in (theirs, ours)]
        assert sets[0] == sets[1]
        assert sets[0]


def test_a_shared_parameter_is_listed_by_its_first_name():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    names = [name for g in param_groups(model) for name in g["param_names"]]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def no_weight_decay(self):
        return {"second.weight"}


def test_a_shared_parameter_is_left_out_under_any_of_its_names():
    assert placed(param_groups(Shared(), 1e-4)) == {"first.weight": False, "first.bias": False, "second.bias": False}


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((3, 4))
        self.own_norm = ScaleNorm()
        self.sync = nn.SyncBatchNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.unbiased = nn.Parameter(torch.ones(2, 2))
        self.position_bias_table = nn.Parameter(torch.ones(2, 2))
        self.head = nn.Linear(1, 4)


def test_norms_and_biases_of_many_dimensions_are_left_out():
    adapted = placed(param_groups(Block(), 1e-4))
    many = {name: adapted[name] for name, p in Block().named_parameters() if p.ndim > 1}
    assert many == {
        "norm.weight": False,
        "norm.bias": False,
        "own_norm.scale": False,
        "attention.in_proj_weight": True,
        "attention.bias_k": False,
        "attention.bias_v": False,
        "attention.out_proj.weight": True,
        "unbiased": True,
        "position_bias_table": False,
        "head.weight": True,
    }


def test_what_the_model_names_is_left_out():
    model = timm.create_model("test_vit")
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    adapted = placed(param_groups(model, 1e-4))
    assert not adapted["pos_embed"]
    assert not adapted["cls_token"]
    assert model.pos_embed.ndim == 3
    assert adapted["patch_embed.proj.weight"]


def test_what_the_model_names_may_be_patterns():
    model = Block()
    model.no_weight_decay = lambda: ["attention.*"]
    adapted = placed(param_groups(model, 1e-4))
    assert [adapted[n] for n in ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight")] == [False, False, True]


class Outer(nn.Module):
    """A model with a submodule of the name that DistributedDataParallel gives its own."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 4))

    def no_weight_decay(self):
        return {"pos_embed"}

    def forward(self, x):
        return self.module(x)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_are_those_of_the_model_inside_its_wrappers(group_of_one):
    model = Outer()
    plain = placed(param_groups(model))
    assert plain == {"module.weight": True, "module.bias": False, "pos_embed": False}
    parallel = nn.parallel.DistributedDataParallel(model)
    wrapped = (parallel, torch.compile(model), torch.compile(parallel), nn.DataParallel(model))
    for one in wrapped:
        assert list(dict(one.named_parameters())) != list(dict(model.named_parameters()))
        groups = param_groups(one)
        assert placed(groups) == plain
        assert all(p is dict(model.named_parameters())[name] for name, p in named(groups).items())
    assert placed(param_groups(nn.parallel.DistributedDataParallel(torch.compile(model)))) == plain


def test_names_are_those_of_the_model_with_compiled_parts():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = placed(param_groups(model))
    model[1] = torch.compile(model[1])
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert placed(param_groups(model)) == plain


def test_wrapped_modules_may_be_empty_or_have_no_length():
    model = nn.Sequential(nn.Linear(2, 2), nn.DataParallel(nn.Sequential()))
    assert list(placed(param_groups(model))) == ["0.weight", "0.bias"]


def test_a_group_that_would_be_empty_is_left_out():
    assert [g["adapt"] for g in param_groups(nn.LayerNorm(4))] == [False]
    assert [g["adapt"] for g in param_groups(nn.Linear(4, 4, bias=False))] == [True]
    assert param_groups(nn.ReLU()) == []
    assert param_groups(nn.Linear(4, 4).requires_grad_(False)) == []


def test_torch_takes_the_groups_and_names_the_parameters_by_them(model):
    optimizer = torch.optim.SGD(param_groups(model, 1e-4), lr=0.1)
    saved = optimizer.state_dict()["param_groups"]
    names = [g["param_names"] for g in saved]
    assert names == [g["param_names"] for g in param_groups(model)]
    assert [len(g["params"]) for g in saved] == [len(n) for n in names]
    assert [g["adapt"] for g in saved] == [True, False]


def test_it_says_what_it_put_where(caplog):
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    with caplog.at_level(logging.INFO, "autowu"):
        param_groups(model, 1e-4)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    expected = "1 tensors (8 elements) with weight decay 0.0001 and adaptation; 3 tensors (6 elements) with neither; 2 that need no"
    assert expected in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "autowu"):
        param_groups(model, 1e-4)
    lines = [r.getMessage() for r in caplog.records if r.levelname == "DEBUG"]
    assert len(lines) == 2
    assert lines[0].endswith("adaptation: 0.weight")
    assert lines[1].endswith("neither: 0.bias, 1.weight, 1.bias")


def test_a_model_that_holds_itself_is_walked_once():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].parent = model
    assert list(placed(param_groups(model))) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: param_groups([nn.Parameter(torch.ones(1))]), TypeError, "must be a torch.nn.Module"),
        (lambda: param_groups(nn.Linear(1, 1), -0.1), ValueError, "weight_decay=-0.1: must be at least 0"),
        (lambda: param_groups(nn.Linear(1, 1), math.nan), ValueError, "weight_decay=nan: must be at least 0"),
        (lambda: param_groups(nn.LazyLinear(1)), ValueError, "parameter weight has no shape yet"),
        (lambda: linear_scaled_lr(0.0, 32), ValueError, "base_lr=0.0: must be above 0"),
        (lambda: linear_scaled_lr(math.inf, 32), ValueError, "base_lr=inf: must be above 0 and finite"),
        (lambda: linear_scaled_lr(0.1, 0), ValueError, "batch_size=0: must be at least 1"),
        (lambda: linear_scaled_lr(0.1, 32, -1), ValueError, "base_batch_size=-1: must be at least 1"),
        (lambda: linear_scaled_lr(0.1, 32.5), TypeError, "batch_size=32.5: must be an integer"),
        (lambda: sqrt_scaled_lr(math.nan, 32), ValueError, "base_lr=nan: must be above 0"),
        (lambda: sqrt_scaled_lr(0.1, 0), ValueError, "batch_size=0: must be at least 1"),
        (lambda: sqrt_scaled_lr(0.1, 32, 1.0), TypeError, "base_batch_size=1.0: must be an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_names_argument_value_and_range(call, error, said):
    with pytest.raises(error, match=re.escape(said)):
        call()


SIZES = st.integers(1, 10**6)
LRS = st.floats(1e-8, 1e3)


@given(LRS, SIZES, SIZES)
def test_lr_is_in_proportion_to_the_batch_or_its_root(lr, size, base):
    assert linear_scaled_lr(lr, base, base) == sqrt_scaled_lr(lr, base, base) == lr
    assert linear_scaled_lr(lr, size, base) / lr == pytest.approx(size / base)
    assert sqrt_scaled_lr(lr, 4 * size, base) == pytest.approx(2 * sqrt_scaled_lr(lr, size, base))
    assert (sqrt_scaled_lr(lr, size, base) / lr) ** 2 == pytest.approx(size / base)


def test_the_recipes_in_print():
    # Goyal et al. 2017: ResNet-50, 0.1 for 256 images. You et al. 2020: BERT with LAMB, 5e-3 for 32,768 sequences, 1/8 for 512.
    assert linear_scaled_lr(0.1, 8192) == pytest.approx(3.2)
    assert sqrt_scaled_lr(5e-3, 512, 32768) == pytest.approx(5e-3 / 8)
