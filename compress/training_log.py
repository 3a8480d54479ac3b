"""The course of a training run, as a table for a spreadsheet or for TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import FileError, RecipeError

__all__ = ["COLUMNS", "Note", "open_log"]

COLUMNS = ("step", "epoch", "lr", "loss", "metric", "seconds")
"""Steps of the optimizer so far, epochs begun, learning rate, moving average of the loss, the task's metric where it was
evaluated, seconds of training so far."""

Note = Callable[[dict[str, Any]], None]
"""Takes one row: values by column; absent ones stay empty."""


@contextlib.contextmanager
def open_log(target: str | os.PathLike[str] | None, rows: int = 0, steps: int = 0) -> Iterator[Note]:
    """Yield the function that notes a row.

    Args:
        target: a file that ends in '.csv', or a folder for TensorBoard; None for no log.
        rows: noted before, by a run that goes on; those behind them go.
        steps: done before.

    Raises:
        FileError: the file cannot be written.
        RecipeError: a folder, and TensorBoard is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open_log(Path(folder) / "run.csv") as note:
        ...         note({"step": 1, "epoch": 1, "loss": 0.5})
        ...     print((Path(folder) / "run.csv").read_text().splitlines())
        ['step,epoch,lr,loss,metric,seconds', '1,1,,0.5,,']
    """
    if target is None:
        yield lambda row: None
    elif Path(target).suffix == ".csv":
        with _table(Path(target), rows) as note:
            yield note
    else:
        with _tensorboard(Path(target), steps) as note:
            yield note


@contextlib.contextmanager
def _table(path: Path, count: int) -> Iterator[Note]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines()[1 : count + 1] if count and path.is_file() else []
        scratch = path.with_name(f".{path.name}.part")
        scratch.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
        os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(path, error) from error

    def note(row: dict[str, Any]) -> None:
        try:  # opened for each row: what is noted is there, whatever happens next
            with path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        except OSError as error:
            raise _unwritable(path, error) from error

    yield note


def _unwritable(path: Path, error: OSError) -> FileError:
    return FileError(f"Cannot write the log {path}: {error.strerror or error}; make room or give another place.")


@contextlib.contextmanager
def _tensorboard(folder: Path, steps: int) -> Iterator[Note]:
    try:
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined]
    except ImportError as error:
        raise RecipeError(
            f"The log {folder} is a folder, and for one TensorBoard is needed: pip install tensorboard, or log to a .csv file."
        ) from error
    try:
        writer = SummaryWriter(str(folder), purge_step=steps + 1 if steps else None)
    except OSError as error:
        raise _unwritable(folder, error) from error

    def note(row: dict[str, Any]) -> None:
        try:
            for name in ("lr", "loss", "metric"):
                if row.get(name) is not None:
                    writer.add_scalar(name, row[name], row["step"])
        except OSError as error:
            raise _unwritable(folder, error) from error

    with contextlib.closing(writer):
        yield note
