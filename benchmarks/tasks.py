"""What the benchmarks train: real tasks that need no download, and the optimizers as people set them.

- ``cnn``, ``mlp``: scikit-learn's 1,797 handwritten digits, 8 x 8; a convolutional network with batch norm, and a perceptron of
  three hidden layers without any normalisation.
- ``lm32``, ``lm64``, ``lm128``, ...: a byte-level transformer of that width on the source of Python's standard library (on a
  GPU: of the installed packages too), a tenth of the files for the test.
- what stands in hard_tasks.py and other_tasks.py, where a name is none of these.
- ``resnet``: timm's test_resnet on the letters and digits of the 21 text fonts that come with matplotlib, 24 x 24, each drawn in
  several sizes, angles and places, blurred by noise; 62 classes, 13,020 images; held-out drawings for the test.
"""

from __future__ import annotations

import importlib
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from autowu.optim import LARS

__all__ = ["OPTIMIZERS", "Task", "learning_rates", "make_optimizer", "make_task"]

CONTEXT = 64
TEST_SEQUENCES = 256
TEXT_BYTES = 8_000_000


@dataclass(frozen=True)
class Task:
    """Data on the device, and how to make the model; a batch is a pair (inputs, targets)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    new_model: Callable[[], nn.Module]

    def steps(self, model: nn.Module, optimizer: Optimizer, batch_size: int, seed: int, number: int) -> Iterator[float]:
        """Take so many steps; the loss of each, once it is taken."""
        for inputs, targets in islice(self.batches(batch_size, seed), number):
            loss = self.loss(model, inputs, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield loss.item()

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end: the data in a new order each time through; what makes no full batch is left out."""
        inputs, targets = self.train
        generator = torch.Generator().manual_seed(seed)
        size = min(batch_size, len(inputs))
        while True:
            order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
            for first in range(0, len(inputs) - size + 1, size):
                picked = order[first : first + size]
                yield inputs[picked], targets[picked]

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Loss of flat outputs and targets."""
        return F.cross_entropy

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(model(inputs).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: tuple[Tensor, Tensor], limit: int = 2048) -> tuple[float, float]:
        """Mean loss and accuracy on the first `limit` of `data`, in evaluation mode."""
        model.eval()
        total, correct, count = 0.0, 0, 0
        for first in range(0, min(limit, len(data[0])), 256):
            logits = model(data[0][first : first + 256]).flatten(0, -2)
            wanted = data[1][first : first + 256].flatten()
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            correct += int((logits.argmax(1) == wanted).sum())
            count += int((wanted >= 0).sum())
        model.train()
        return total / count, correct / count


class Transformer(nn.Module):
    """A causal byte-level transformer of two pre-norm layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, max(2, width // 32), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bytes(x) + self.places.weight
        logits: Tensor = self.head(self.norm(self.layers(h, mask=self.mask, is_causal=True)))
        return logits


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def _mlp() -> nn.Module:
    hidden = (layer for width in (64, 128, 128) for layer in (nn.Linear(width, 128), nn.ReLU()))
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


def _resnet() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("test_resnet", num_classes=62, in_chans=1)
    return model


@lru_cache
def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x.reshape(-1, 1, 8, 8) / 16 - 0.5, y, test_size=450, random_state=0, stratify=y)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    return (train_x, train_y), (test_x, test_y)


@lru_cache
def _text(installed_packages: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts))
    if installed_packages:
        files += sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))

    def sequences(chosen: list[Path], limit: int) -> tuple[Tensor, Tensor]:
        text = np.frombuffer(b"".join(p.read_bytes() for p in chosen)[:limit], np.uint8)
        whole = torch.tensor(
            text[: len(text) // CONTEXT * CONTEXT + 1][: (len(text) - 1) // CONTEXT * CONTEXT + 1].astype(np.int64)
        )
        return whole[:-1].view(-1, CONTEXT), whole[1:].view(-1, CONTEXT)

    limit = 10 * TEXT_BYTES if installed_packages else TEXT_BYTES
    inputs, targets = sequences([p for k, p in enumerate(files) if k % 10], limit)
    held_out = sequences(files[::10], limit)
    spread = torch.linspace(0, len(held_out[0]) - 1, TEST_SEQUENCES).long()
    return (inputs, targets), (held_out[0][spread], held_out[1][spread])


@lru_cache
def _letters() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    import string

    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    families = ("DejaVuSans", "DejaVuSans-*", "DejaVuSansMono*", "DejaVuSerif", "DejaVuSerif-*", "STIXGeneral*")
    paths = sorted(path for family in families for path in folder.glob(f"{family}.ttf"))
    paths += [folder / f"{name}.ttf" for name in ("cmb10", "cmr10", "cmss10", "cmtt10", "cmmi10")]
    draw = np.random.default_rng(0)
    images, labels = [], []
    for path in paths:
        for label, character in enumerate(string.ascii_letters + string.digits):
            for _ in range(10):
                font = ImageFont.truetype(str(path), int(draw.integers(14, 20)))
                image = Image.new("L", (24, 24))
                place = (12 + draw.uniform(-2, 2), 12 + draw.uniform(-2, 2))
                ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="mm")
                images.append(np.asarray(image.rotate(draw.uniform(-15, 15), Image.Resampling.BILINEAR), np.float32))
                labels.append(label)
    x = torch.from_numpy(np.stack(images))[:, None] / 128 - 0.5
    x += 0.5 * torch.from_numpy(draw.standard_normal(x.shape, np.float32))
    y = torch.tensor(labels)
    order = torch.from_numpy(draw.permutation(len(y)))
    test, train = order[:2000], order[2000:]
    return (x[train], y[train]), (x[test], y[test])


def make_task(name: str, device: str = "cpu") -> Task:
    """The task of that name, see the head of this file."""
    models: dict[str, Callable[[], nn.Module]] = {"cnn": _cnn, "mlp": _mlp, "resnet": _resnet}
    model: Callable[[], nn.Module]
    if name not in models and not name.startswith("lm"):
        from hard_tasks import make_hard_task
        from other_tasks import OTHERS, make_other_task

        return make_other_task(name, device) if name in OTHERS else make_hard_task(name, device)
    if name.startswith("lm"):
        (train, test), model = _text(device != "cpu"), partial(Transformer, int(name[2:]))
    else:
        (train, test), model = _letters() if name == "resnet" else _digits(), models[name]

    def move(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return data[0].to(device), data[1].to(device)

    return Task(move(train), move(test), lambda: model().to(torch.device(device)))


OPTIMIZERS: dict[str, tuple[float, float]] = {
    "sgd": (1e-3, 10.0),
    "adamw": (1e-5, 0.1),
    "adamp": (1e-5, 0.1),
    "lars": (1e-2, 100.0),
    "lamb": (1e-4, 1.0),
}
"""Lowest and highest peak LR of the grid."""


def learning_rates(optimizer: str) -> list[float]:
    """The nine peak LRs of the grid, half a decade apart."""
    low, high = OPTIMIZERS[optimizer]
    return [float(f"{lr:.4g}") for lr in np.geomspace(low, high, 1 + round(2 * math.log10(high / low)))]


TORCHS: dict[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
"""Torch's own, as they come."""
PACKAGED = (
    *("AccSGD", "AdaBelief", "AdaBound", "AdaDelta", "AdaFactor", "AdaGC", "Adai", "Adalite", "AdaMax", "AdamC", "AdamG"),
    *("AdaMod", "AdamP", "AdamS", "AdamWSN", "Adan", "AdaNorm", "AdaPNM", "AdaShift", "AdaSmooth", "AdaTAM", "AdEMAMix"),
    *("ADOPT", "AggMo", "Aida", "Alice", "Amos", "Ano", "APOLLO", "ApolloDQN", "AvaGrad", "BCOS", "CAME", "Conda"),
    *("DASH", "DiffGrad", "DualAdam", "EmoFact", "EmoLynx", "EmoNavi", "EXAdam", "FAdam", "Fira", "FlashAdamW", "FOCUS"),
    *("Fromage", "FTRL", "GaLore", "Grams", "Gravity", "GrokFastAdamW", "Kate", "Lamb", "LaProp", "LARS", "Lion"),
    *("MADGRAD", "MARS", "MSVAG", "Nero", "NovoGrad", "PAdam", "PID", "PNM", "QHAdam", "QHM", "RACS", "RAdam", "Ranger"),
    *("ROSE", "ScalableShampoo", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD", "SCION", "SCIONLight", "SGDP"),
    *("SGDSaI", "SGDW", "Shampoo", "SignSGD", "SimplifiedAdEMAMix", "SM3", "SOAP", "SPAM", "SPlus", "SRMM", "StableAdamW"),
    *("StableSPAM", "SWATS", "TAM", "Tiger", "VSGD", "Yogi"),
)
"""Classes of the package pytorch_optimizer: all but those that find their own LR, need more than gradients, or take minutes."""


def packaged(name: str) -> Any:
    """The class of that name in pytorch_optimizer; for "schedulefree" the AdamW of that package."""
    package, name = ("schedulefree", "AdamWScheduleFree") if name == "schedulefree" else ("pytorch_optimizer", name)
    return getattr(importlib.import_module(package), name)


def make_optimizer(name: str, model: nn.Module, lr: float) -> Optimizer:
    """The optimizer, with no weight decay on norms and biases."""
    decay = {"sgd": 5e-4, "lars": 5e-4, "adamw": 0.05, "adamp": 0.05, "lamb": 0.01, "muon": 0.05, "lion": 0.05}.get(name, 0.0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9)
    if name in TORCHS:
        return TORCHS[name](groups, lr)
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(torch.optim.SGD(groups, lr, momentum=0.9))
    optimizer: Optimizer
    if name in (*PACKAGED, "schedulefree"):
        optimizer = packaged(name)(groups, lr=lr)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(groups, opt=name, lr=lr)
    return optimizer
