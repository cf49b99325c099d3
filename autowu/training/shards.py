"""What --fsdp does: a model in shards, one a process, and checkpoints to which every process writes its own.

Such a checkpoint is a folder. torch.distributed.checkpoint keeps the sharded tensors in it, which any number of processes can read.
All else is in a file a process. What each file holds is written last, as its size and checksum.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autowu.training.errors import UsageError
from autowu.training.files import save
from autowu.training.process import Process

__all__ = ["clip_adaptively", "consolidated", "is_sharded", "read_shards", "shard", "write_shards"]

_CHECKSUMS = "checksums.json"
_SHARDED = "sharded"
_OF_METADATA = "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"
_ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in [*_OF_METADATA.split(), "BytesStorageMetadata"]}
_ALLOWED |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
_ALLOWED |= {("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath")} | {("pathlib._local", "PosixPath")}


def shard(model: nn.Module, process: Process) -> None:
    """Split the parameters of `model` over all processes, in place; each of its blocks gathers its own when it computes.

    Raises:
        UsageError: if this torch cannot, or a parameter is of a layout that cannot be split.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UsageError("--fsdp: needs torch 2.6 or later") from None
    mesh = _mesh(process)
    try:
        for module in [*_blocks(model), model]:
            fully_shard(module, mesh=mesh)
    except NotImplementedError as error:
        raise UsageError(f"--fsdp: {error}") from None


def _mesh(process: Process) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(process.device.type, (process.world_size,))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What a model repeats: modules of one class that stand in a row, and have no such row within."""
    rows: dict[nn.Module, list[nn.Module]] = {
        row: _repeated(row) for row in model.modules() if isinstance(row, nn.Sequential | nn.ModuleList)
    }
    found = dict.fromkeys(block for blocks in rows.values() for block in blocks)
    return [block for block in found if not any(rows.get(part) for part in block.modules())]


def _repeated(row: Iterable[nn.Module]) -> list[nn.Module]:
    blocks = [module for module in row if any(True for _ in module.parameters())]
    kinds = Counter(type(block) for block in blocks)
    return [block for block in blocks if kinds[type(block)] > 1]


def is_sharded(tensor: Any) -> bool:
    """Whether this process has a part of it only."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def clip_adaptively(parameters: Iterable[Tensor], factor: float) -> None:
    """timm's adaptive clipping of sharded gradients: a process has whole rows, but of a bias a part."""
    from timm.utils.agc import adaptive_clip_grad

    for parameter in parameters:
        if parameter.grad is None:
            continue
        weight, grad = (t.detach().to_local() for t in (parameter, parameter.grad))  # type: ignore[attr-defined]
        if parameter.ndim > 1:
            weight.grad = grad
            adaptive_clip_grad([weight], factor)
        else:
            most, norm = (t.detach().full_tensor().norm() for t in (parameter, parameter.grad))  # type: ignore[attr-defined]
            most = most.clamp(min=1e-3) * factor
            grad.mul_(torch.where(norm < most, 1.0, most / norm.clamp(min=1e-6)))


def consolidated(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of a model with its tensors whole, on the CPU. All processes must ask for it."""
    return {name: (t.full_tensor() if is_sharded(t) else t).cpu() for name, t in state.items()}


def write_shards(state: Mapping[str, Any], folder: Path, process: Process) -> Path:
    """Write this process's part of `state`, beside `folder`; what is to be moved there, complete and on the disk, on all processes.

    Raises:
        OSError: if it cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    partial = folder.with_name(f"{folder.name}.partial")
    process.on_main(lambda: _emptied(partial))
    tensors: dict[str, Tensor] = {}
    rest = _taken_out(state, tensors, "")
    try:
        save_shards(tensors, storage_writer=_writer(partial))
    except CheckpointException as error:
        raise next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error) from None
    own = partial / f"rank-{process.rank}.pt"
    save(rest, own)
    with own.open("rb") as file:
        os.fsync(file.fileno())
    mine = [own, *partial.glob(f"__{process.rank}_*.distcp"), *([partial / ".metadata"] if process.is_main else [])]
    sums = process.gather({path.name: _checksum(path) for path in mine})
    if process.is_main:
        with (partial / _CHECKSUMS).open("w") as text:
            json.dump({name: value for of_rank in sums for name, value in of_rank.items()}, text)
            text.flush()
            os.fsync(text.fileno())
    return partial


def read_shards(folder: Path, process: Process | None) -> dict[str, Any]:
    """The state in `folder`, with this process's shards; for None, which need be of no group, the state with whole tensors.

    It is as in a checkpoint of one file. What each process has of its own is a list by rank: where as many processes wrote it, this
    one's in every place, and else all of theirs, without AutoWU's copies of the model, which cannot be split anew.

    Raises:
        UsageError: if a file is missing, damaged or none of such a checkpoint.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    state: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    error = None
    try:
        names = _checked(folder, process)
        state = _rest(folder, sum(name.startswith("rank-") for name in names), process)
        state = _with_room(state, tensors, None if process is None else _mesh(process))
    except Exception as raised:  # whatever is raised on bytes of any kind
        error = _damaged(folder, raised)
    if error := next(filter(None, [error] if process is None else process.gather(error)), None):
        raise error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no group, where none is wanted
            load(tensors, storage_reader=_reader(folder), no_dist=process is None)
    except CheckpointException as raised:
        raise _damaged(folder, raised) from None
    return state


def _damaged(folder: Path, error: BaseException) -> UsageError:
    return UsageError(f"{folder}: damaged, or no checkpoint: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _taken_out(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` with a note in the place of every sharded tensor, which goes to `tensors`."""
    if is_sharded(value):
        tensors[name] = value
        (placement,) = value.placements
        return {_SHARDED: name, "shape": list(value.shape), "dtype": value.dtype, "dim": placement.dim}
    if isinstance(value, Mapping):
        return {key: _taken_out(item, tensors, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_taken_out(item, tensors, f"{name}/{k}") for k, item in enumerate(value)]
    return value


def _with_room(value: Any, tensors: dict[str, Tensor], mesh: Any) -> Any:
    """What :func:`_taken_out` gave with room for the sharded tensors, which `tensors` has too."""
    if isinstance(value, dict) and _SHARDED in value:
        tensors[value[_SHARDED]] = room = _room(value["shape"], value["dtype"], value["dim"], mesh)
        return room
    if isinstance(value, dict):
        return {key: _with_room(item, tensors, mesh) for key, item in value.items()}
    return [_with_room(item, tensors, mesh) for item in value] if isinstance(value, list) else value


def _room(shape: list[int], dtype: torch.dtype, dim: int, mesh: Any) -> Tensor:
    if mesh is None:
        return torch.zeros(shape, dtype=dtype)
    from torch.distributed.tensor import Shard, zeros

    return zeros(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(dim)])


def _rest(folder: Path, saved: int, process: Process | None) -> dict[str, Any]:
    """All but the sharded tensors."""

    if process is not None and process.world_size == saved:
        state: dict[str, Any] = torch.load(folder / f"rank-{process.rank}.pt", "cpu", weights_only=True)
        schedulers = state["scheduler"] * saved
    else:
        state, *others = (torch.load(folder / f"rank-{k}.pt", "cpu", weights_only=True, mmap=True) for k in range(saved))
        schedulers = [scheduler for of_rank in (state, *others) for scheduler in of_rank["scheduler"]]
        schedulers = [scheduler | {"snapshot": None} if "snapshot" in scheduler else scheduler for scheduler in schedulers]
    state["scheduler"] = schedulers
    if "begun" in state:
        state["begun"]["random"] = state["begun"]["random"] * saved
    return state


def _checked(folder: Path, process: Process | None) -> list[str]:
    """The names of its files, each of which a process has compared with its checksum."""
    sums = json.loads((folder / _CHECKSUMS).read_text())
    names = sorted(sums)
    for name in names if process is None else names[process.rank :: process.world_size]:
        if _checksum(folder / name) != sums[name]:
            raise ValueError(f"wrong checksum of {name}")
    return names


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return [path.stat().st_size, value]


class _Metadata(pickle.Unpickler):
    """Reads what torch.distributed.checkpoint knows of its files, which it pickles, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11 before 3.11.4 pickles the member of an enum
            return _member
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


def _member(kind: Any, name: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is no part of a checkpoint")


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Writer(FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            try:
                return super().write_data(*args)
            except RuntimeError as error:  # torch's own, after that of a file that cannot be written
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    return Writer(folder)


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                metadata = _Metadata(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)
