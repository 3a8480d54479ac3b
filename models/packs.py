"""Where reference data and weights come from, and the lossless image packs they may be stored in.

``EDGEPRESS_DATA`` names a folder; `docs/reference-data.md` lists what it may hold and where a user gets it.
"""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import numpy as np

from edgepress.compress.errors import TaskError

__all__ = ["data_folder", "decode_images", "read_pack"]


def data_folder() -> Path:
    """The folder that ``EDGEPRESS_DATA`` names.

    Raises:
        TaskError: the variable is not set, or names no folder.
    """
    value = os.environ.get("EDGEPRESS_DATA")
    if not value:
        raise TaskError(
            "This reference task reads its data from the folder that EDGEPRESS_DATA names, and the variable is not set: "
            "see docs/reference-data.md for what to download, then export EDGEPRESS_DATA=/that/folder."
        )
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise TaskError(f"EDGEPRESS_DATA names {folder}, which is not a folder.")
    return folder


def read_pack(path: Path) -> dict[str, np.ndarray]:
    """Read an ``.npz`` without pickles; entries named ``<key>@med`` are images that `decode_images` unpacks."""
    try:
        with np.load(path, allow_pickle=False) as pack:
            return {
                key.removesuffix("@med"): decode_images(pack[key].tobytes()) if key.endswith("@med") else pack[key]
                for key in pack.files
            }
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise TaskError(f"{path} is damaged ({error}): copy it again.") from error


def decode_images(blob: bytes) -> np.ndarray:
    """Unpack uint8 images ``[N, H, W]`` or ``[N, H, W, 3]``.

    The blob is a little-endian int64 header (rank, then the shape) and LZMA data: planes ``[N, K, H, W]`` of prediction
    residues modulo 256. The predictor is the median edge detector of LOCO-I (Weinberger, Seroussi, Sapiro 2000); colour
    planes are stored as green, red minus green plus 128, blue minus green plus 128.
    """
    rank = int(np.frombuffer(blob, "<i8", 1)[0])
    shape = np.frombuffer(blob, "<i8", rank, 8).tolist()
    count, height, width = shape[:3]
    planes = 1 if rank == 3 else 3
    residues = np.frombuffer(lzma.decompress(blob[8 + 8 * rank :]), np.uint8).reshape(count, planes, height, width)
    decoded = [_undo_prediction(residues[:, k]) for k in range(planes)]
    if planes == 1:
        return decoded[0]
    green = decoded[0].astype(np.int16)
    red, blue = (((plane + green - 128) & 255).astype(np.uint8) for plane in decoded[1:])
    return np.stack([red, decoded[0], blue], axis=-1)


def _undo_prediction(residues: np.ndarray) -> np.ndarray:
    """Rows and columns in turn, all images at once: residues ``[N, H, W]`` to pixels of the same shape."""
    count, height, width = residues.shape
    steps = np.ascontiguousarray(residues.transpose(1, 2, 0)).astype(np.int16)
    pixels = np.zeros((height, width, count), np.int16)
    for i in range(height):
        for j in range(width):
            if i and j:
                west, north, corner = pixels[i, j - 1], pixels[i - 1, j], pixels[i - 1, j - 1]
                low, high = np.minimum(west, north), np.maximum(west, north)
                guess = np.clip(west + north - corner, low, high)
            else:
                guess = pixels[i - 1, j] if i else pixels[i, j - 1] if j else np.zeros(count, np.int16)
            pixels[i, j] = (steps[i, j] + guess) & 255
    return pixels.transpose(2, 0, 1).astype(np.uint8)
