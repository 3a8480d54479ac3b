"""Where edgepress keeps what it has measured or made once."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The folder of all that: ``$EDGEPRESS_CACHE``, else ``edgepress`` in the user's cache folder.

    Example:
        >>> os.environ["EDGEPRESS_CACHE"] = "/tmp/cache"
        >>> str(cache_folder())
        '/tmp/cache'
        >>> del os.environ["EDGEPRESS_CACHE"]
    """
    own = os.environ.get("EDGEPRESS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgepress"
