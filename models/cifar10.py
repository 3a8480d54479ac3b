"""CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images, 32x32, ten classes."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.compress.errors import TaskError
from edgepress.compress.task import Predict, Task

from .packs import read_pack

__all__ = ["Cifar10", "RawCifar10"]

_ARCHIVE = "cifar-10-python.tar.gz"
_ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # as Keras checks it
_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
# ImageNet's statistics: what the published CIFAR ResNets were trained with
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Cifar10:
    """The data set as uint8 images ``[N, 3, 32, 32]`` and int64 labels ``[N]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    batch: int = 128

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From ``cifar10.npz``, from the standard python archive or from its unpacked batches in ``folder``.

        Raises:
            TaskError: none of them is there (the message says what to download), or one is damaged.
        """
        if (folder / "cifar10.npz").is_file():
            pack = read_pack(folder / "cifar10.npz")
            images = [torch.from_numpy(pack[k]).permute(0, 3, 1, 2).contiguous() for k in ("x_train", "x_test")]
            labels = [torch.from_numpy(pack[k].astype(np.int64)) for k in ("y_train", "y_test")]
            return cls(images[0], labels[0], images[1], labels[1])
        parts = [_unpickle_arrays(blob) for blob in _standard_batches(folder)]
        pixels = [torch.from_numpy(np.asarray(p["data"], np.uint8).reshape(-1, 3, 32, 32)) for p in parts]
        classes = [torch.as_tensor(p["labels"], dtype=torch.int64) for p in parts]
        return cls(torch.cat(pixels[:5]), torch.cat(classes[:5]), pixels[5], classes[5])

    def task(self, name: str, model: nn.Module) -> Task:
        """Classifying the data by a trained network, whose inputs are `inputs`."""
        return Task(
            model=model.eval(),
            example_inputs=self.inputs(self.test_images[:2]),
            train_batches=self.augmented,
            calibration_batches=self.calibration,
            evaluate=self.evaluate,
            metric="accuracy",
            name=name,
        )

    def first(self, examples: int | None) -> Self:
        """The same with the first so many test images only; with all where it is None."""
        return replace(self, test_images=self.test_images[:examples], test_labels=self.test_labels[:examples])

    @staticmethod
    def inputs(images: Tensor) -> Tensor:
        """uint8 ``[N, 3, 32, 32]`` to the float inputs of the networks."""
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (_MEAN, _STD))
        return (images.float() - mean) / std

    def augmented(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled epoch with the usual augmentation: 4 pixels of padding, a random crop, a random flip."""
        random = torch.Generator().manual_seed(1000 + epoch)
        order = torch.randperm(len(self.train_images), generator=random)
        for rows in order.split(self.batch):
            if len(rows) < self.batch:
                return
            yield self._crop(self.train_images[rows], random), self.train_labels[rows]

    def _crop(self, images: Tensor, random: torch.Generator) -> Tensor:
        count = len(images)
        padded = F.pad(self.inputs(images), (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2, count), generator=random)
        rows = top[:, None] + torch.arange(32)
        columns = left[:, None] + torch.arange(32)
        flip = torch.rand(count, generator=random) < 0.5
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        index = torch.arange(count)
        cropped = padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2)

    def calibration(self) -> Iterator[Tensor]:
        """500 training images, unlabelled, in batches."""
        for images in self.train_images[:500].split(50):
            yield self.inputs(images)

    def evaluate(self, predict: Predict) -> dict[str, float]:
        """Top-1 accuracy in percent on the test images."""
        right = 0
        for images, labels in zip(self.test_images.split(250), self.test_labels.split(250), strict=True):
            right += int((predict(self.inputs(images).numpy()).argmax(1) == labels.numpy()).sum())
        return {"accuracy": 100.0 * right / len(self.test_labels)}


class RawCifar10(Cifar10):
    """The same images for networks that take pixels from 0 to 255 as they are."""

    @staticmethod
    def inputs(images: Tensor) -> Tensor:
        """uint8 ``[N, 3, 32, 32]`` as floats."""
        return images.float()


def _standard_batches(folder: Path) -> list[bytes]:
    unpacked = folder / "cifar-10-batches-py"
    if all((unpacked / name).is_file() for name in _FILES):
        return [(unpacked / name).read_bytes() for name in _FILES]
    archive = folder / _ARCHIVE
    if not archive.is_file():
        raise TaskError(
            f"CIFAR-10 is missing: put {_ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html "
            f"(SHA-256 {_ARCHIVE_SHA256}) into {folder}, as it is or unpacked."
        )
    blob = archive.read_bytes()
    if hashlib.sha256(blob).hexdigest() != _ARCHIVE_SHA256:
        raise TaskError(f"{archive} has not the SHA-256 {_ARCHIVE_SHA256}: download it again.")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        members = [tar.extractfile(f"cifar-10-batches-py/{name}") for name in _FILES]
        return [member.read() for member in members if member is not None]


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of the official batches, which hold dicts, lists, bytes and numpy arrays; nothing else loads."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")
        module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def _unpickle_arrays(blob: bytes) -> dict[str, Any]:
    try:
        batch = _ArraysOnly(io.BytesIO(blob), encoding="latin1").load()
        return {key: batch[key] for key in ("data", "labels")}
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise TaskError(f"A CIFAR-10 batch is damaged ({error}): download {_ARCHIVE} again.") from error
