"""A small LSTM on spoken digits, trained on the spot, and its task.

Z. Jackson and others, Free Spoken Digit Dataset: 3,000 clips of six speakers at 8 kHz. The first five of each speaker's 50 clips
of a digit judge, as its authors divide them; the next five decide; the others train.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from edgepress.compress.task import Evaluate, Predict, Task

from .published import read_data
from .trained import trained

__all__ = ["SpokenDigitsNet", "log_mel", "spoken_digits"]

_SOURCE = "https://github.com/Jakobovski/free-spoken-digit-dataset"
FRAMES, BANDS = 32, 32
_WINDOW, _HOP = 512, 256  # samples: 64 ms, every 32 ms
_FLOOR = 0.1  # of the energy of a band: what is below counts as silence
_EPOCHS, _BATCH = 25, 64


class SpokenDigitsNet(nn.Module):
    """One LSTM and a linear layer on the mean of its states: ``[N, 32, 32]`` (frames, bands) to logits ``[N, 10]``.

    Example:
        >>> SpokenDigitsNet()(torch.zeros(2, FRAMES, BANDS)).shape
        torch.Size([2, 10])
    """

    def __init__(self, units: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, units, batch_first=True)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Log-mel energies ``[N, frames, bands]`` to logits ``[N, 10]``."""
        states, _ = self.lstm(x)
        return self.head(self.drop(states.mean(1)))  # type: ignore[no-any-return]


def log_mel(samples: np.ndarray, rate: int = 8000) -> np.ndarray:
    """The energies of a sound in bands of equal width on the mel scale.

    Args:
        samples: int16 ``[S]``.
        rate: samples in a second.

    Returns:
        float32 ``[32, 32]``, frames of 32 ms and bands: natural logarithms, 0 in silence, of the sound at full volume. A longer
        sound is cut, a shorter one ends in silence.

    Example:
        >>> tone = (1000 * np.sin(np.arange(8000) * 2 * np.pi * 1000 / 8000)).astype(np.int16)
        >>> log_mel(tone).shape, int(log_mel(tone)[5].argmax())
        ((32, 32), 14)
    """
    length = _WINDOW + (FRAMES - 1) * _HOP
    padded = np.zeros(length, np.float32)
    padded[: min(len(samples), length)] = samples[:length] / max(1.0, float(np.abs(samples[:length].astype(np.float32)).max()))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    return np.asarray(np.log1p(power @ _filters(rate) / _FLOOR) / 2, np.float32)


def _filters(rate: int) -> np.ndarray:
    """Triangles ``[frequencies, bands]`` with corners at equal distances in mel, ``2595 log10(1 + f / 700)``."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(_WINDOW, 1 / rate)[:, None]
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling))


def spoken_digits(examples: int | None = None) -> Task:
    """Train the network (about a minute, the first time) and return the task; 2,400 clips train, 300 decide, 300 judge.

    Args:
        examples: judge by the first so many clips only.
    """
    pack = read_data("fsdd", _SOURCE)
    ends, rate = pack["offsets"].tolist(), int(pack["rate"])
    sounds = torch.from_numpy(np.stack([log_mel(pack["audio"][a:b], rate) for a, b in pairwise(ends)]))
    labels, number = torch.from_numpy(pack["label"]).long(), torch.from_numpy(pack["index"])
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, held_out, train = (mixed[part[mixed]] for part in (number < 5, (number >= 5) & (number < 10), number >= 10))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(epoch)
        for rows in train[torch.randperm(len(train), generator=random)].split(_BATCH):
            late = int(torch.randint(0, 5, (1,), generator=random))  # frames that the sound begins later
            yield torch.roll(sounds[rows], late, 1), labels[rows]

    def judge(rows: Tensor) -> Evaluate:
        def evaluate(predict: Predict) -> dict[str, float]:
            chosen = predict(sounds[rows].numpy()).argmax(1)
            return {"accuracy": 100.0 * float((chosen == labels[rows].numpy()).mean())}

        return evaluate

    return Task(
        model=trained("spoken-digits", SpokenDigitsNet, batches, _EPOCHS, 3e-3),
        example_inputs=sounds[:2],
        train_batches=batches,
        calibration_batches=lambda: sounds[train[:400]].split(50),
        evaluate=judge(test[:examples]),
        validate=judge(held_out),
        metric="accuracy",
        name="spoken-digits",
    )
