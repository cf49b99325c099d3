"""Image folders: ImageNet's layout, and that of Tiny ImageNet, whose validation images are named with their classes in a file."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from autowu.training.errors import RunError, UsageError

__all__ = ["Readable", "image_folder"]

_ANNOTATIONS = "val_annotations.txt"


def image_folder(root: Path, transform: Any = None) -> Any:
    """The images under `root`, as CLASS/IMAGE at any depth, or as its file of annotations says.

    Raises:
        UsageError: if the folder is not there, is not laid out so or is empty.
    """
    kind = _Annotated if (root / _ANNOTATIONS).is_file() else ImageFolder
    try:
        return kind(str(root), transform, loader=_load)
    except (OSError, ValueError, csv.Error) as error:
        # It says whether the folder, its class folders or their images are missing, or what cannot be read.
        reason = str(error).split(". Supported")[0]
        raise UsageError(f"--data-dir {root.parent}: {reason}") from None


class _Annotated(ImageFolder):  # type: ignore[misc]
    """Images whose classes are in a file of IMAGE, tab, CLASS and what is no concern here."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted({name for _, name in _annotations(directory)})
        return classes, {name: index for index, name in enumerate(classes)}

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        return [(str(Path(directory, "images", image)), class_to_idx[name]) for image, name in _annotations(directory)]


def _annotations(directory: str) -> list[list[str]]:
    with Path(directory, _ANNOTATIONS).open(newline="") as file:
        rows = [row[:2] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    if short := next((row for row in rows if len(row) < 2), None):
        raise ValueError(f"{_ANNOTATIONS}: no tab and class after {short[0]!r}")
    return rows


def _load(path: str) -> Any:
    try:
        return default_loader(path)
    except Exception as error:  # whatever a decoder raises on bytes that are no image
        reason = getattr(error, "strerror", None) or (f"{error}" if path not in f"{error}" else "no image file")
        raise RunError(f"{path}: cannot be read as an image: {reason}") from None


class Readable(Dataset[Any]):
    """The images of a folder; where corrupt ones are skipped, the next that can be read is in the place of each."""

    def __init__(self, images: Any, skip_corrupt: bool) -> None:
        self._images = images
        self._skip_corrupt = skip_corrupt

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        for later in range(len(self)):
            try:
                return self._images[(index + later) % len(self)]
            except RunError as error:
                if not self._skip_corrupt:
                    raise RunError(f"{error}; repair or remove it, or train with --skip-corrupt") from None
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise RunError(f"{self._images.root}: no image can be read")
