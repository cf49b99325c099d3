"""What --log-layers writes: norms and trust ratios of the layers, to TensorBoard and to a Parquet file."""

from __future__ import annotations

import importlib.util
import itertools
import operator
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from autowu.training.config import TrainConfig, UsageError
from autowu.training.files import replacing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from autowu.optim import LayerStats

__all__ = ["LayerLog", "check_layer_log"]

_COLUMNS = ("step", "layer", "weight_norm", "grad_norm", "trust_ratio", "lr")
_PART_ROWS = 200_000  # held in memory at most


def check_layer_log(config: TrainConfig, optimizer: Optimizer) -> None:
    """See that what ``--log-layers`` needs is there.

    Raises:
        UsageError: if the optimizer has nothing to log, or a package to log with is not installed.
    """
    if not hasattr(optimizer, "layer_stats"):
        raise UsageError(
            f"--log-layers {config.log_layers}: goes with --opt lars, lamb or tvlars; {config.opt} has no trust ratios"
        )
    missing = [name for name in ("tensorboard", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--log-layers {config.log_layers}: needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class LayerLog:
    """Collects the statistics of the layers of a run, in the folder of the run.

    ``layers.parquet`` has a row a layer and logged step, with the columns step, layer, weight_norm, grad_norm, trust_ratio and lr.
    Until the run is finished its rows are in parts, ``layers/part-STEP.parquet``, each with the rows from that step on to the next
    part. No part reaches over a checkpoint: a run that goes on from one drops the parts that begin after it. ``tensorboard`` has
    the same values.

    Args:
        path: folder of the run.
        step: steps done, whose rows are kept.
        trunk: folder of a finished run that these steps are taken from, instead of this run's own.
    """

    def __init__(self, path: Path, step: int, trunk: Path | None = None) -> None:
        self.path = path
        self.file = path / "layers.parquet"
        self.parts = path / "layers"
        self.first_step = step
        self._rows: list[tuple[int, str, float, float, float, float]] = []
        self._writer: SummaryWriter | None = None
        if trunk is not None:
            shutil.rmtree(self.parts, ignore_errors=True)
            self.first_step = 0
            self._take_over(trunk / "layers.parquet", step)
        else:
            if self.file.exists():  # of a run that was done: all parts are in it, and more may follow
                shutil.rmtree(self.parts, ignore_errors=True)
                self.parts.mkdir()
                self.file.rename(self.parts / "part-000000000.parquet")
            for part in [*self.parts.glob("*.partial"), *(p for p in self._parts() if _begin(p) >= step)]:
                part.unlink()

    def add(self, step: int, optimizer: Optimizer) -> None:
        """Log the step that `optimizer` has just taken, at the LRs that it still has."""
        lrs = {name: float(group["lr"]) for group in optimizer.param_groups for name in group["param_names"]}
        stats: Sequence[LayerStats] = optimizer.layer_stats()  # type: ignore[attr-defined]
        self._add([(step, *layer, lrs[layer.name]) for layer in stats])

    def save(self) -> None:
        """Write down all that was added, before a checkpoint after which nothing of it is computed again."""
        if self._writer is not None:
            self._writer.flush()
        if self._rows:
            self.parts.mkdir(exist_ok=True)
            self._write(self.parts / f"part-{self._rows[0][0]:09d}.parquet", [self._table()])
            self._rows.clear()

    def finish(self) -> None:
        """Join the parts in one file, and draw it."""
        import pyarrow.parquet as pq

        from autowu.plotting import draw_layers

        self.save()
        if parts := self._parts():
            self._write(self.file, (pq.ParquetFile(part).read() for part in parts))
            shutil.rmtree(self.parts)
        if self.file.exists():
            table = pq.ParquetFile(self.file).read()
            figure = draw_layers({name: table[name].to_numpy() for name in ("step", "layer", "trust_ratio")})
            with replacing(self.path / "layers.png") as partial:
                figure.savefig(partial, dpi=150, format="png")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, rows: Sequence[tuple[int, str, float, float, float, float]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a run that was cut off has logged of later steps is purged.
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=self.first_step)
        for step, of_step in itertools.groupby(rows, operator.itemgetter(0)):
            # All of a step in one event: add_scalar takes 0.2 ms a value.
            values = [
                Summary.Value(tag=f"{name}/{layer}", simple_value=value)
                for _, layer, weight_norm, grad_norm, trust_ratio, _ in of_step
                for name, value in (("trust_ratio", trust_ratio), ("weight_norm", weight_norm), ("grad_norm", grad_norm))
            ]
            self._writer.file_writer.add_summary(Summary(value=values), step)  # type: ignore[attr-defined]
        self._rows += rows
        if len(self._rows) >= _PART_ROWS:
            self.save()

    def _take_over(self, file: Path, step: int) -> None:
        """Add the rows of the steps before `step`."""
        import pyarrow.parquet as pq

        if not file.exists():
            return
        for batch in pq.ParquetFile(file).iter_batches():
            self._add([row for row in zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True) if row[0] < step])
        self.save()

    def _parts(self) -> list[Path]:
        return sorted(self.parts.glob("part-*.parquet"))

    def _table(self) -> Any:
        import pyarrow as pa

        types = {"step": pa.int64(), "layer": pa.string()}
        columns = zip(*self._rows, strict=True)
        return pa.table({name: pa.array(c, types.get(name, pa.float64())) for name, c in zip(_COLUMNS, columns, strict=True)})

    @staticmethod
    def _write(path: Path, tables: Any) -> None:
        import pyarrow.parquet as pq

        with replacing(path) as partial:
            writer = None
            try:
                for table in tables:
                    writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd")
                    writer.write_table(table)
            finally:
                if writer is not None:
                    writer.close()


def _begin(part: Path) -> int:
    return int(part.stem.removeprefix("part-"))
