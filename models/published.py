"""Published weights and data sets in the folder that ``EDGEPRESS_DATA`` names."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from edgepress.compress.errors import TaskError

from .packs import data_folder, read_pack

__all__ = ["read_data", "read_photos", "read_weights"]


def read_weights(name: str, source: str) -> dict[str, Tensor]:
    """The weights in ``weights/{name}.safetensors``.

    Args:
        name: of the file, without the suffix.
        source: where they were published, for the message.

    Raises:
        TaskError: ``EDGEPRESS_DATA`` is not set, or the file is missing or damaged.
    """
    path = data_folder() / "weights" / f"{name}.safetensors"
    if not path.is_file():
        raise TaskError(
            f"The weights {path} are missing: they come from {source}, and docs/reference-data.md says in which form."
        )
    try:
        weights: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors has an error of its own for each damage
        raise TaskError(f"{path} is damaged ({error}): copy it again.") from error
    return weights


def read_data(name: str, source: str) -> dict[str, np.ndarray]:
    """The arrays of ``{name}.npz``.

    Raises:
        TaskError: ``EDGEPRESS_DATA`` is not set, or the file is missing or damaged.
    """
    path = data_folder() / f"{name}.npz"
    if not path.is_file():
        raise TaskError(f"The data {path} are missing: they come from {source}, and docs/reference-data.md says in which form.")
    return read_pack(path)


def read_photos(pack: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The JPEG images of a pack, resized where they are not of ``size``.

    Args:
        pack: ``jpeg``, all files one behind the other as uint8, and ``offsets`` ``[N + 1]``, where each begins.
        size: (height, width) in pixels.

    Returns:
        uint8 ``[N, 3, height, width]``, red first.

    Raises:
        TaskError: Pillow is not installed, or an image is damaged.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise TaskError("This reference task reads JPEG images, and Pillow is not installed: pip install Pillow") from error
    blob, offsets = pack["jpeg"].tobytes(), pack["offsets"].tolist()
    photos = np.empty((len(offsets) - 1, 3, *size), np.uint8)
    for i, (start, end) in enumerate(pairwise(offsets)):
        try:
            with Image.open(io.BytesIO(blob[start:end])) as image:
                colours = image.convert("RGB")
        except OSError as error:
            raise TaskError(f"Photo {i} of the reference data is damaged ({error}): copy the data again.") from error
        if colours.size != size[::-1]:
            colours = colours.resize(size[::-1], Image.Resampling.BILINEAR)
        photos[i] = np.asarray(colours).transpose(2, 0, 1)
    return photos
