"""Progress on standard error: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["bar", "silenced"]

Update = Callable[..., None]

_LINE_EVERY_S = 20.0
_silent = False


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Show no progress inside."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


@contextlib.contextmanager
def bar(title: str) -> Iterator[Update]:
    """Yield ``update(fraction, text)``; the bar goes when the block ends.

    Example:
        >>> with silenced(), bar("Distil") as update:
        ...     update(0.5, "loss 0.31")
    """
    if _silent:
        yield _nothing
    elif not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:  # a machine with a GPU may have PyTorch alone
        yield _plain_lines(title)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=1.0, text="")

            def update(fraction: float, text: str = "") -> None:
                progress.update(task, completed=fraction, text=text)

            yield update


def _nothing(fraction: float, text: str = "") -> None:
    pass


def _plain_lines(title: str) -> Update:
    started = last = time.monotonic()

    def update(fraction: float, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S and fraction > 0:
            last = now
            left = (now - started) * (1 - fraction) / fraction
            print(f"{title}: {fraction:4.0%}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    return update
