"""Kinds of training on which nothing of the rule was chosen: other losses than an error of a label, and optimizers hardly known.

- ``membrane``: the voltage of a cell's membrane, 12,000 samples that come with matplotlib; a GRU reads 32 of them and says by how
  much the next one differs. Windows of the last quarter of the recording are held out.
- ``terrain``: the height of a landscape, matplotlib's elevation model; a perceptron of Fourier features of the two coordinates.
- ``denoise``: the digits in noise of all levels, as a diffusion model is trained; a perceptron says what the noise was.
- ``vae``: a variational autoencoder of the digits; the loss is the negative evidence bound. In the test the mean is decoded.
- ``contrast``: two noisy views of each digit; the second is to be told from those of the others in the batch (InfoNCE, one way). In
  training a digit may be in a batch twice.
- ``physics``: a function whose second derivative is given, and which is 0 at both ends; held out is the function itself.
- ``ratings``: 12,000 ratings by 300 people of 200 things, drawn from a model of rank 6, with noise; embeddings of width 12.
- ``strokes``: sixteen measures of each of 20,000 printed letters, which one it is; a table of R's mlbench (``pip install rdata``
  and Debian's r-cran-mlbench, in R's site library or where ``R_LIBS_SITE`` says).

The last cases are known tasks with optimizers that AutoWU's families do not have, or have no measurement of: those of timm, SOAP
(``pip install pytorch_optimizer``) and the AdamW of Schedule-Free (``pip install schedulefree``).
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hard_tasks import Adder, Data, Regression, _perceptron
from tasks import Task, make_task
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KINDS", "OTHERS", "make_other_task"]

KINDS = (
    *("membrane adamw 64 500", "membrane sgd 64 500", "terrain adamw 256 1200", "terrain sgd 256 1200", "denoise adamw 64 1500"),
    *("vae adamw 64 900", "vae sgd 64 900", "contrast adamw 128 600", "contrast lars 128 600", "physics adamw 128 1200"),
    *("ratings adamw 256 1000", "ratings adagrad 256 1000", "mlp madgrad 64 300", "mlp adan 64 300", "cnn adopt 64 300"),
    *("vit mars 32 300", "gru laprop 16 300"),
    *("strokes adamw 128 1000", "strokes sgd 128 1000", "mlp SOAP 64 300", "lm32 SOAP 16 300"),
    *("cnn schedulefree 64 300", "gru schedulefree 16 300"),
)
"""Task, optimizer, batch size, steps."""
OTHERS = ("membrane", "terrain", "denoise", "vae", "contrast", "physics", "ratings", "strokes")

PAST = 32
LATENT = 16
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Measured(Task):
    """A task of another loss, which is a function of the outputs and targets of a whole batch. It has no accuracy."""

    measure: Callable[[Tensor, Tensor], Tensor]

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self.measure

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.measure(model(inputs), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: tuple[Tensor, Tensor], limit: int = 2048) -> tuple[float, float]:
        model.eval()
        inputs, targets = (part[:limit] for part in data)
        whole = range(0, len(inputs) - 127, 128)
        losses = [float(self.loss(model, inputs[k : k + 128], targets[k : k + 128])) for k in whole]
        model.train()
        return sum(losses) / len(losses), 0.0


class Variational(nn.Module):
    """Logits of the pixels, then mean and logarithmic variance of what they were drawn from; without a draw in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _perceptron(64, 128, 2 * LATENT), _perceptron(LATENT, 128, 64)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return torch.cat([self.decoder(drawn), mean, log_variance], 1)


def evidence(outputs: Tensor, images: Tensor) -> Tensor:
    """The negative evidence bound of an image, in nats."""
    logits, mean, log_variance = outputs[:, :64], outputs[:, 64:-LATENT], outputs[:, -LATENT:]
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    return F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1).add(divergence).mean()


class Views(nn.Module):
    """Embeddings of two views of each image, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = F.normalize(self.net(x.flatten(0, 1)), dim=1)
        return embedded.view(len(x), -1)


def contrast(outputs: Tensor, _: Tensor) -> Tensor:
    """Which of the second views belongs to a first one."""
    first, second = outputs.chunk(2, 1)
    return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(outputs), device=outputs.device))


class Solution(nn.Module):
    """A function that is 0 at 0 and 1; in training its second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _perceptron(1, 64, 64, 1, bend=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._at(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._at(x).sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return bend

    def _at(self, x: Tensor) -> Tensor:
        value: Tensor = self.net(x) * x * (1 - x)
        return value


class Ratings(nn.Module):
    """The rating by a person of a thing, from an embedding and an offset of each."""

    def __init__(self) -> None:
        super().__init__()
        self.people, self.things = nn.Embedding(300, 13), nn.Embedding(200, 13)
        for table in (self.people, self.things):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.people(x[:, 0]), self.things(x[:, 1])
        rating: Tensor = (a[:, 1:] * b[:, 1:]).sum(1, keepdim=True) + a[:, :1] + b[:, :1]
        return rating


def _sample_data(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "sample_data", name)


def _mlbench(name: str) -> Any:
    """A table of R's mlbench, as pandas has them."""
    path = Path(os.environ.get("R_LIBS_SITE", "/usr/lib/R/site-library"), "mlbench", "data", f"{name}.rda")
    return importlib.import_module("rdata").read_rda(path, default_encoding="ascii")[name]


def _mixed(x: Tensor, y: Tensor, test: int) -> Data:
    """The rows in a random order, the same every time, so many of them held out."""
    order = torch.from_numpy(np.random.default_rng(7).permutation(len(x)))
    return (x[order[test:]], y[order[test:]]), (x[order[:test]], y[order[:test]])


def _waves(x: Tensor, octaves: int) -> Tensor:
    """Sines and cosines of each column, of so many octaves."""
    angles = (x[:, :, None] * math.pi * 2.0 ** torch.arange(octaves)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


@lru_cache
def _data(name: str) -> Data:
    draw = torch.Generator().manual_seed(7)
    if name == "membrane":
        voltage = torch.from_numpy(np.fromfile(_sample_data("membrane.dat"), np.float32))
        voltage = (voltage - voltage.mean()) / voltage.std()
        past = voltage.unfold(0, PAST + 1, 1)
        inputs = torch.stack([past[:, :-1], past[:, :-1].diff(dim=1, prepend=past[:, :1])], 2)
        change = past[:, -1:] - past[:, -2:-1]
        targets, end = change / change.std(), 3 * len(past) // 4
        _, held_out = _mixed(inputs[end + PAST :], targets[end + PAST :], 2000)
        return (inputs[:end], targets[:end]), held_out
    if name == "terrain":
        height = torch.from_numpy(np.load(_sample_data("jacksboro_fault_dem.npz"))["elevation"].astype(np.float32))
        grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in height.shape), indexing="ij"), 2).view(-1, 2)
        return _mixed(_waves(grid, 5), ((height - height.mean()) / height.std()).view(-1, 1), 2000)
    if name == "physics":
        x, places = torch.rand(20_000, 1, generator=draw), torch.linspace(0, 1, 500)[:, None]
        pull = -((3 * math.pi) ** 2) * torch.sin(3 * math.pi * x) - math.pi**2 * torch.sin(math.pi * x)
        return (x, pull), (places, torch.sin(3 * math.pi * places) + torch.sin(math.pi * places))
    if name == "ratings":
        people, things = torch.randn(300, 6, generator=draw), torch.randn(200, 6, generator=draw)
        picked = torch.randperm(300 * 200, generator=draw)[:12_000]
        pairs = torch.stack([picked // 200, picked % 200], 1)
        rating = (people[pairs[:, 0]] * things[pairs[:, 1]]).sum(1, keepdim=True) / 2 + 3.5
        return _mixed(pairs, rating + 0.3 * torch.randn(rating.shape, generator=draw), 2000)
    if name == "strokes":
        letters = _mlbench("LetterRecognition")
        measures = torch.from_numpy(letters.iloc[:, 1:].to_numpy(np.float32))
        which = torch.from_numpy(letters["lettr"].cat.codes.to_numpy(np.int64))
        return _mixed((measures - measures.mean(0)) / measures.std(0), which, 4000)
    digits = make_task("mlp")
    images, unseen = (part[0].flatten(1) + 0.5 for part in (digits.train, digits.test))
    if name == "vae":
        return (images, images), (unseen, unseen)
    made = _in_noise if name == "denoise" else _two_views
    return made(images.repeat(20, 1), draw), made(unseen.repeat(4, 1), draw)


def _in_noise(images: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each in noise of some level, with the level, and the noise."""
    level, noise = torch.rand(len(images), 1, generator=draw), torch.randn(images.shape, generator=draw)
    angle = level * math.pi / 2
    return torch.cat([angle.cos() * (2 * images - 1) + angle.sin() * noise, _waves(level, 8)], 1), noise


def _two_views(images: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each twice, in noise and with a fifth of its pixels gone; there is no target."""
    views = images[:, None] + 0.2 * torch.randn(len(images), 2, 64, generator=draw)
    return views * (torch.rand(views.shape, generator=draw) > 0.2), torch.zeros(len(images))


def make_other_task(name: str, device: str = "cpu") -> Task:
    """The task of that name, see the head of this file."""
    train, test = ((x.to(device), y.to(device)) for x, y in _data(name))
    models: dict[str, Callable[[], nn.Module]] = {
        "membrane": Adder,
        "terrain": partial(_perceptron, 20, 64, 64, 1),
        "denoise": partial(_perceptron, 80, 256, 256, 64, bend=nn.SiLU),
        "vae": Variational,
        "contrast": Views,
        "physics": Solution,
        "ratings": Ratings,
        "strokes": partial(_perceptron, 16, 128, 26),
    }
    measures = {"vae": evidence, "contrast": contrast}

    def new_model() -> nn.Module:
        return models[name]().to(torch.device(device))

    if name in measures:
        return Measured(train, test, new_model, measures[name])
    return (Task if name == "strokes" else Regression)(train, test, new_model)
