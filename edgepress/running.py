"""Run the passes of a recipe, each finished one kept on disk, in one process or several."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgepress.compress.distill import Distill
from edgepress.compress.distributed import World, join
from edgepress.compress.errors import EdgepressError, RecipeError
from edgepress.compress.network import Network
from edgepress.compress.passes import Pass, describe
from edgepress.compress.pruning import Prune
from edgepress.compress.quantize import Quantize
from edgepress.compress.schedule import Schedule
from edgepress.compress.task import Task
from edgepress.compress.teacher import fingerprint
from edgepress.targets.devices import Device
from edgepress.targets.latency import LatencyTable

from . import __version__

__all__ = ["run_passes", "say"]

_RUNTIMES = {"onnx": "onnxruntime", "tflite": "litert"}


def run_passes(
    network: Network, task: Task, passes: Sequence[Pass], folder: Path, threads: int = 1, place: str | Device = "local"
) -> Network:
    """Run the passes, keeping each one's network on disk: an interrupted run goes on after the last one that is there."""
    world, unchanged = join(network.device), fingerprint(network)
    key = hashlib.sha256(f"{__version__} {unchanged}".encode())
    for number, item in enumerate(passes):
        name = type(item).__name__
        taught = [fingerprint(getattr(p, "teacher", None)) for p in (item, getattr(item, "recover", None))]
        key.update(json.dumps([name, describe(item), taught]).encode())
        saved = folder / f"{number:02d}-{name.lower()}-{key.hexdigest()[:10]}"
        if world.agree(saved.is_dir):
            say("{} was finished before: going on from {}; delete that folder to run it again, on other data say.", name, saved)
            network = Network.load(saved)
            unchanged = fingerprint(network)
            continue
        checkpoint = saved.with_suffix(".checkpoint")
        if isinstance(item, Distill | Quantize | Prune) and (world.size == 1 or not isinstance(item, Prune)):
            item = replace(item, checkpoint=checkpoint)
            if checkpoint.exists():
                say("{} was interrupted: going on from {}; delete it to start over, on other data say.", name, checkpoint)
        if isinstance(item, Prune) and item.latency is not None and item.clock is None:
            item = replace(item, clock=LatencyTable(_RUNTIMES[item.format], item.precision, threads=threads, device=place))
        started = time.monotonic()
        try:
            result = _run_pass(item, network, task, saved, unchanged, world)
        except EdgepressError as error:
            done = ", ".join(type(p).__name__ for p in passes[:number]) or "nothing"
            raise type(error)(f"{name} (pass {number + 1} of {len(passes)}, after {done}): {error}") from error
        if world.first and checkpoint.is_file():
            checkpoint.unlink()
        say(
            "{}: {:.0f} s, {:.1f} million MACs, {:,} parameters.",
            name,
            time.monotonic() - started,
            result.macs() / 1e6,
            result.parameter_count,
        )
        network, unchanged = result, fingerprint(result)
    return network


def _run_pass(item: Pass, network: Network, task: Task, saved: Path, unchanged: str, world: World) -> Network:
    """Run one pass and save its result. Of several processes all run what trains, the first alone the rest; it saves."""

    def run() -> Network:
        result = item(network, task)
        if fingerprint(network) != unchanged:
            raise RecipeError(f"The pass {type(item).__name__} changed the network it was given; a pass returns a new one.")
        return result

    if world.size == 1:
        result = run()
        result.save(saved)
        return result
    if isinstance(item, Schedule) or (isinstance(item, Prune) and item.recover is not None):
        result = run()
        world.agree(lambda: str(result.save(saved)))
    else:
        world.agree(lambda: str(run().save(saved)))
    return Network.load(saved).to(network.device)


def say(text: str, *values: Any) -> None:
    """A line on standard error, from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text.format(*values), file=sys.stderr, flush=True)
