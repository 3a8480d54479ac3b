"""Which architectures become a quantized file that runs, and how far its outputs are from the network's.

    python benchmarks/quantization_coverage.py [--precision int8] [--format onnx,tflite] [--only vgg,bert]

Needs the `bench` extra. Every network of `benchmarks/zoo.py`, with random weights and statistics, is written in the precision,
calibrated on 16 random examples, and run on 16 others.

What the numbers mean: power of the outputs, about their mean, over that of the file's error, in decibels; of several outputs the
lowest. 20 dB are an error of a hundredth of the variance. What bounds them: random weights make some networks worse conditioned
than trained ones are (layers that saturate, tokens that are constant), so a low number is a question and not yet a fault; a file
that cannot be written or run is one. A precision that a runtime has no kernels for in that network is said, and no failure. The
last line is JSON; the exit code is 0 where every file was written and ran.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo import ZOO, Inputs

import edgepress as ep
from edgepress.compress.errors import UserError
from edgepress.compress.progress import silenced

EXAMPLES = 16
NOTHING = "Nothing in the network can be stored"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--format", default="onnx,tflite")
    parser.add_argument("--only", default="", help="names of the zoo, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    formats, names = arguments.format.split(","), arguments.only.split(",") if arguments.only else list(ZOO)
    rows = []
    print(f"{arguments.precision:<28}" + "".join(f"{each:>8}" for each in formats))
    for name in names:
        row = {"name": name, **dict(tried(name, arguments.precision, formats))}
        cells = [row[each] if isinstance(row[each], float) else None for each in formats]
        print(f"{name:<28}" + "".join(f"{'-' if cell is None else f'{cell:.1f}':>8}" for cell in cells), flush=True)
        for each in formats:
            if isinstance(row[each], str):
                print(f"    {each}: {row[each]}")
        rows.append(row)
    failed = [row["name"] for row in rows if any(isinstance(row[f], str) and not row[f].startswith(NOTHING) for f in formats)]
    print(f"{len(rows) - len(failed)} of {len(rows)} were written and ran" + (f", not {', '.join(failed)}" if failed else ""))
    print(json.dumps({"precision": arguments.precision, "failed": failed, "rows": rows}))
    return 3 if failed else 0


def tried(name: str, precision: str, formats: list[str]) -> Iterator[tuple[str, Any]]:
    """For each format the decibels, or a sentence; and the seconds of all."""
    started = time.monotonic()
    model, inputs = ZOO[name]()
    random = torch.Generator().manual_seed(0)
    seen, shown = examples(inputs, random), examples(inputs, random)
    with silenced(), tempfile.TemporaryDirectory() as folder:
        network = ep.trace(model, inputs)
        arrays = [x.numpy() for x in shown]
        for suffix in formats:
            try:
                artifact = ep.export(network, Path(folder) / f"net.{suffix}", precision, [seen])
                runtime = ep.open_runtime(artifact)
                yield suffix, decibels(runtime.predict(*arrays), network.predict(*arrays))
                runtime.close()
            except UserError as error:
                yield suffix, str(error)
    yield "seconds", round(time.monotonic() - started, 1)


def examples(inputs: Inputs, random: torch.Generator) -> tuple[Tensor, ...]:
    """Others of the same mean and deviation; integers are drawn from those that are there."""

    def like(x: Tensor) -> Tensor:
        shape = (EXAMPLES, *x.shape[1:])
        if not x.is_floating_point():
            return x.flatten()[torch.randint(x.numel(), shape, generator=random)]
        return torch.randn(shape, generator=random) * x.std() + x.mean()

    return tuple(like(x) for x in inputs)


def decibels(found: Any, wanted: Any) -> float:
    """Of the worst float output."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True)
    ratios = [np.var(w) / max(float(np.mean((w - f) ** 2)), 1e-30) for f, w in pairs if w.dtype.kind == "f"]
    return round(10 * float(np.log10(max(min(ratios, default=1e30), 1e-30))), 1)


if __name__ == "__main__":
    sys.exit(main())
