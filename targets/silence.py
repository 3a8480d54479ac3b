"""Keep third parties' progress bars, log lines and warnings off the terminal, whichever way they write them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import IO

__all__ = ["silence"]


@contextlib.contextmanager
def silence() -> Iterator[IO[bytes]]:
    """Divert everything that is written to the terminal inside the block, by Python and by C++ alike.

    Yields the file that it goes to, for a message that says what went wrong. Errors are raised as ever.

    Example:
        >>> with silence() as log:
        ...     print("noise")
        ...     _ = log.seek(0), log.read()
    """
    with tempfile.TemporaryFile() as sink, contextlib.ExitStack() as stack:
        text = stack.enter_context(open(os.dup(sink.fileno()), "w", errors="replace", buffering=1))
        for number in (1, 2):
            stack.enter_context(_divert(number, sink.fileno()))
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, disabled)
        yield sink


@contextlib.contextmanager
def _divert(number: int, target: int) -> Iterator[None]:
    """Point file descriptor ``number`` (1 or 2) at ``target``: C++ code writes there without asking Python."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        kept = os.dup(number)
    except OSError:  # a process without that descriptor has nothing to keep quiet
        yield
        return
    try:
        os.dup2(target, number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
