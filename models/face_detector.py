"""A face detector of 0.27 million parameters, trained on WIDER FACE, and its task: 30 photos.

Linzaer, Ultra-Light-Fast-Generic-Face-Detector-1MB, version 'slim' at 320x240: depthwise separable convolutions, and boxes and
scores at four scales as in W. Liu and others, "SSD: Single Shot MultiBox Detector", ECCV 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgepress.compress.errors import TaskError
from edgepress.compress.task import Predict, Task

from .packs import data_folder
from .published import read_data, read_photos

__all__ = ["FaceDetector", "Faces", "detections", "face_detector", "overlap"]

_SOURCE = "https://github.com/Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB"
_HEIGHT, _WIDTH = 240, 320
_SCALES = ((8, (10, 16, 24)), (16, (32, 48)), (32, (64, 96)), (64, (128, 192, 256)))  # pixels between cells, sizes of faces
# (channels, stride) of the pairs of depthwise and pointwise convolutions; a scale's heads sit behind pairs 7, 10 and 12
_PAIRS = ((32, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1))
_TAPS = (8, 11, 13)
_CERTAIN, _SAME_FACE, _FOUND = 0.7, 0.3, 0.5  # score of a detection, overlap of two of one face, overlap with the reference


class FaceDetector(nn.Module):
    """``[N, 3, 240, 320]`` to scores ``[N, 4420, 2]`` (no face, face) and boxes ``[N, 4420, 4]``.

    A box is its left, top, right and bottom, in 0..1 of the photo.

    Example:
        >>> [tuple(x.shape) for x in FaceDetector().eval()(torch.zeros(1, 3, 240, 320))]
        [(1, 4420, 2), (1, 4420, 4)]
    """

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())], 16
        for outputs, stride in _PAIRS:
            depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
            pointwise = nn.Conv2d(channels, outputs, 1, bias=False)
            first = [depthwise, nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.Sequential(*first, pointwise, nn.BatchNorm2d(outputs), nn.ReLU()))
            channels = outputs
        self.base_net = nn.Sequential(*layers)
        self.extras = nn.Sequential(nn.Sequential(nn.Conv2d(256, 64, 1), nn.ReLU(), _separable(64, 256, 2), nn.ReLU()))
        counts = [len(sizes) for _, sizes in _SCALES]
        self.classification_headers = nn.ModuleList(_headers([2 * count for count in counts]))
        self.regression_headers = nn.ModuleList(_headers([4 * count for count in counts]))
        self.register_buffer("anchors", _anchors(), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Colours as (value - 127) / 128, red first."""
        scores, places, layers = [], [], [*self.base_net, *self.extras]
        for i, (start, end) in enumerate(pairwise((0, *_TAPS, len(layers)))):
            for layer in layers[start:end]:
                x = layer(x)
            scores.append(self.classification_headers[i](x).permute(0, 2, 3, 1).reshape(len(x), -1, 2))
            places.append(self.regression_headers[i](x).permute(0, 2, 3, 1).reshape(len(x), -1, 4))
        place = torch.cat(places, 1)
        centre = place[..., :2] * 0.1 * self.anchors[:, 2:] + self.anchors[:, :2]
        half = torch.exp(place[..., 2:] * 0.2) * self.anchors[:, 2:] / 2
        return torch.cat(scores, 1).softmax(2), torch.cat([centre - half, centre + half], 2)


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs)
    return nn.Sequential(depthwise, nn.ReLU(), nn.Conv2d(inputs, outputs, 1))


def _headers(outputs: list[int]) -> Iterator[nn.Module]:
    for inputs, count in zip((64, 128, 256), outputs[:3], strict=True):
        yield _separable(inputs, count, 1)
    yield nn.Conv2d(256, outputs[3], 3, padding=1)


def _anchors() -> Tensor:
    """Centre, width and height ``[4420, 4]`` of the box that each prediction moves, in 0..1 of the photo."""
    rows = []
    for stride, sizes in _SCALES:
        down, across = -(-_HEIGHT // stride), -(-_WIDTH // stride)
        for j in range(down):
            for i in range(across):
                centre = ((i + 0.5) / across, (j + 0.5) / down)
                rows += [(*centre, size / _WIDTH, size / _HEIGHT) for size in sizes]
    return torch.tensor(rows).clamp(0, 1)


def overlap(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box ``[4]`` with each of ``[N, 4]``.

    Example:
        >>> overlap(np.array([0, 0, 2, 2]), np.array([[0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 3, 3]])).round(2).tolist()
        [1.0, 0.33, 0.0]
    """
    sides = np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])
    common = sides.clip(min=0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1) + (one[2:] - one[:2]).prod()
    return np.asarray(common / np.maximum(areas - common, 1e-12))


def detections(scores: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The faces of one photo: scores above 0.7, best first, and of boxes that overlap by more than 0.3 only the best.

    Args:
        scores: ``[4420, 2]``.
        boxes: ``[4420, 4]``.

    Returns:
        Scores ``[F]`` and boxes ``[F, 4]``.
    """
    rows = np.flatnonzero(scores[:, 1] > _CERTAIN)
    rows = rows[np.argsort(-scores[rows, 1], kind="stable")]
    kept: list[int] = []
    while len(rows):
        kept.append(int(rows[0]))
        rows = rows[1:][overlap(boxes[rows[0]], boxes[rows[1:]]) <= _SAME_FACE]
    return scores[kept, 1], boxes[kept]


@dataclass(frozen=True)
class Faces:
    """Photos ``[N, 3, 240, 320]`` as uint8, every third of which calibrates, and the network that says where faces are."""

    photos: Tensor
    model: nn.Module
    first: int | None = None

    @staticmethod
    def prepare(photos: Tensor) -> Tensor:
        """uint8 to the network's input."""
        return (photos.float() - 127) / 128

    def calibration(self) -> Iterator[Tensor]:
        """Every third photo."""
        return iter(self.prepare(self.photos[::3]).split(2))

    def evaluate(self, predict: Predict) -> dict[str, float]:
        """How well the detections on the other photos match the float network's.

        ``f1``: of the faces that either finds, in percent, those that both find (boxes that overlap by half at least), as the
        harmonic mean of both shares. ``overlap``: of the boxes of these, in percent. ``score_error``: the mean difference of
        their scores, in percent.
        """
        judged = torch.arange(len(self.photos)) % 3 != 0
        found = wanted = 0
        overlaps, differences = [], []
        for photo in self.prepare(self.photos[judged][: self.first]).split(1):
            with torch.inference_mode():
                reference = detections(*(x[0].numpy() for x in self.model(photo)))
            scores, boxes = detections(*(np.asarray(x)[0] for x in predict(photo.numpy())))
            found, wanted = found + len(boxes), wanted + len(reference[1])
            for row, share in _pairs(boxes, reference[1]):
                overlaps.append(share)
                differences.append(abs(float(scores[row[0]] - reference[0][row[1]])))
        mean = [100 * float(np.mean(values)) if values else 0.0 for values in (overlaps, differences)]
        return {"f1": 200.0 * len(overlaps) / max(found + wanted, 1), "overlap": mean[0], "score_error": mean[1]}


def _pairs(boxes: np.ndarray, reference: np.ndarray) -> Iterator[tuple[tuple[int, int], float]]:
    """((row of a box, row of its reference), overlap), each at most once, the best detections first."""
    free = np.ones(len(reference), bool)
    for i, box in enumerate(boxes):
        shares = overlap(box, reference) * free
        if len(shares) and shares.max() >= _FOUND:
            j = int(shares.argmax())
            free[j] = False
            yield (i, j), float(shares[j])


def face_detector(examples: int | None = None) -> Task:
    """The trained detector, judged by its own detections in float: 10 photos calibrate, 20 judge.

    Args:
        examples: judge by the first so many photos only.

    Raises:
        TaskError: data or weights are missing, or Pillow is.
    """
    path = data_folder() / "deploy" / "face_slim320.safetensors"
    if not path.is_file():
        raise TaskError(
            f"The weights {path} are missing: they come from {_SOURCE}, and docs/reference-data.md says in which form."
        )
    model = FaceDetector()
    model.load_state_dict(load_file(path))
    photos = torch.from_numpy(read_photos(read_data("face_images", _SOURCE), (_HEIGHT, _WIDTH)))
    data = Faces(photos, model.eval(), examples)
    return Task(
        model=model,
        example_inputs=data.prepare(photos[:2]),
        calibration_batches=data.calibration,
        evaluate=data.evaluate,
        metric="f1",
        name="face-detector",
    )
