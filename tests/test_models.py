import io
import lzma
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from edgepress.compress.errors import TaskError
from edgepress.compress.task import score
from edgepress.models.cifar10 import Cifar10
from edgepress.models.packs import decode_images, read_pack
from edgepress.models.resnet_cifar import CifarResNet, resnet_cifar10


def encode(images):
    """The inverse of `decode_images`, pixel by pixel."""
    planes = (
        [images]
        if images.ndim == 3
        else [images[..., 1], *(((images[..., k].astype(int) - images[..., 1] + 128) & 255) for k in (0, 2))]
    )
    residues = []
    for plane in planes:
        plane = plane.astype(int)
        guess = np.zeros_like(plane)
        for i in range(plane.shape[1]):
            for j in range(plane.shape[2]):
                if i and j:
                    a, b, c = plane[:, i, j - 1], plane[:, i - 1, j], plane[:, i - 1, j - 1]
                    guess[:, i, j] = np.where(
                        c >= np.maximum(a, b), np.minimum(a, b), np.where(c <= np.minimum(a, b), np.maximum(a, b), a + b - c)
                    )
                elif i or j:
                    guess[:, i, j] = plane[:, i - 1, j] if i else plane[:, i, j - 1]
        residues.append(((plane - guess) & 255).astype(np.uint8))
    head = np.array([images.ndim, *images.shape], "<i8").tobytes()
    return head + lzma.compress(np.ascontiguousarray(np.stack(residues, 1)).tobytes())


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 6, 7, 3)])
def test_packed_images_come_back_bit_by_bit(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode_images(encode(images)), images)
    np.savez(tmp_path / "pack.npz", **{"x@med": np.frombuffer(encode(images), np.uint8), "y": np.arange(3)})
    pack = read_pack(tmp_path / "pack.npz")
    assert np.array_equal(pack["x"], images)
    assert np.array_equal(pack["y"], np.arange(3))


def batch(seed, count=6):
    random = np.random.default_rng(seed)
    return {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": random.integers(0, 10, count).tolist()}


def write_standard(folder, spoil=None):
    unpacked = folder / "cifar-10-batches-py"
    unpacked.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        (unpacked / name).write_bytes(pickle.dumps(spoil if spoil and seed == 2 else batch(seed), protocol=2))
    return unpacked


def test_standard_batches_are_read(tmp_path):
    write_standard(tmp_path)
    data = Cifar10.read(tmp_path)
    assert data.train_images.shape == (30, 3, 32, 32)
    assert np.array_equal(data.test_images.reshape(6, -1).numpy(), batch(5)["data"])
    assert data.test_labels.tolist() == batch(5)["labels"]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/edgepress-was-here",))


def test_a_batch_with_code_in_it_is_refused(tmp_path):
    write_standard(tmp_path, spoil={"data": Evil(), "labels": []})
    with pytest.raises(TaskError, match="system has no place in a CIFAR-10 batch"):
        Cifar10.read(tmp_path)
    assert not os.path.exists("/tmp/edgepress-was-here")


def test_missing_and_wrong_archives_are_explained(tmp_path):
    with pytest.raises(TaskError, match=r"put cifar-10-python\.tar\.gz from https.*SHA-256 6d958be0"):
        Cifar10.read(tmp_path)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("nothing"), io.BytesIO())
    with pytest.raises(TaskError, match="has not the SHA-256"):
        Cifar10.read(tmp_path)


def test_augmentation_repeats_and_only_shifts_and_flips(tmp_path):
    write_standard(tmp_path)
    data = Cifar10(**{**Cifar10.read(tmp_path).__dict__, "batch": 10})
    one, two, other = (list(data.augmented(epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    assert len(one) == 3
    plain = torch.nn.functional.pad(data.inputs(data.train_images), (4, 4, 4, 4))
    crop = one[0][0][0]
    windows = plain.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    assert any(torch.equal(crop, w) or torch.equal(crop.flip(2), w) for w in windows)


def test_published_checkpoints_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_DATA", str(tmp_path))
    write_standard(tmp_path)
    torch.manual_seed(0)
    model = CifarResNet(20)
    (tmp_path / "weights").mkdir()
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "weights" / "resnet20-12fca82f.th")
    task = resnet_cifar10(20)
    assert all(torch.equal(a, b) for a, b in zip(task.model.state_dict().values(), model.state_dict().values(), strict=True))


def test_reference_networks_reproduce_their_accuracy(reference_data):
    task = resnet_cifar10(20)
    with torch.inference_mode():
        assert score(task, lambda x: task.model(torch.from_numpy(x)).numpy()) == pytest.approx(91.73)
