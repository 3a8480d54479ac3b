"""The whole loop: passes, export, verification, the task's own metric, measurement, verdict, report."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgepress.compress.distributed import join
from edgepress.compress.errors import FileError, RecipeError, TaskError, UserError
from edgepress.compress.fake import check_layers
from edgepress.compress.network import Network, trace
from edgepress.compress.progress import silenced
from edgepress.compress.quantization import PRECISIONS
from edgepress.compress.quantize import Quantize
from edgepress.compress.sparsify import dense_twin
from edgepress.compress.task import Predict, Task, metrics
from edgepress.targets.artifact import Artifact, deflated_bytes
from edgepress.targets.devices import Device, Failed, Job, find_device
from edgepress.targets.export import export
from edgepress.targets.kernels import expected_speed
from edgepress.targets.measure import Measurement, measure, noise_warning, ratio
from edgepress.targets.profile import profile
from edgepress.targets.runtimes import random_feeds
from edgepress.targets.stats import Ratio
from edgepress.targets.verify import Parity, drawing, verify

from .recipe import Recipe, default_recipe
from .repair import eased, repaired, why_slow
from .report import FileResult, Layer, Report, write
from .running import run_passes, say
from .tasks import load_task

__all__ = ["press"]


def press(
    task: Task | str,
    *,
    device: str | Device = "local",
    max_drop: float = 1.0,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    threads: int = 1,
) -> Report:
    """Compress a task's network and deliver measured files.

    Runs the recipe, exports the original and the result in every format and precision that the recipe names, runs every
    file, judges it by the task's metric, measures all in one interleaved run, and writes the files, ``recipe.yaml``,
    ``report.json`` and ``report.html`` into ``out``. Interrupted, the same call goes on after the last finished pass.
    Under ``torchrun`` the passes that train are shared by its processes; the first one alone writes, measures and returns, the
    others end when the passes are done.

    Args:
        task: the task, or its name as on the command line.
        device: where the files are measured.
        max_drop: how many points of the task's metric a file may lose, in the metric's own unit.
        out: the folder; ``runs/<name of the task>`` where None.
        recipe: what to do; `default_recipe` where None.
        threads: of the runtimes, while measuring.

    Returns:
        The report; ``report.accepted`` says whether a file met the budget and is not slower than the original.

    Raises:
        UserError: a mistake of the caller's: the task, the recipe, the device or the folder.
    """
    task = load_task(task) if isinstance(task, str) else task
    recipe = recipe or default_recipe()
    folder = _writable(Path(out) if out is not None else Path("runs") / task.name)
    with contextlib.closing(find_device(device)) as place:
        return _press(task, recipe, place, folder, max_drop, threads)


def _press(task: Task, recipe: Recipe, place: Device, folder: Path, max_drop: float, threads: int) -> Report:
    clock = _Clock()
    with clock.stage("trace"):
        original = trace(task.model, task.inputs)
    if said := drawing(original):
        raise TaskError(said)
    _check_layers(original, recipe)
    if not join(original.device).first:
        with silenced():
            run_passes(original, task, recipe.passes, folder / "passes", threads, place)
        raise SystemExit(0)
    with clock.stage("judge the original"):
        judge = _Judge.of(task, original.predict, max_drop)
    (folder / "recipe.yaml").write_text(recipe.yaml())
    with clock.stage("passes"):
        pressed = run_passes(original, task, recipe.passes, folder / "passes", threads, place)
    warnings: list[str] = []
    _write_plan(pressed, folder / "surgery.json", warnings)
    with clock.stage("export"):
        candidates = _export_all({"original": original, "pressed": pressed}, task, recipe, folder, warnings)
    with clock.stage("judge the files"):
        judged = [found for candidate in candidates if (found := _run_file(candidate, task, judge, place, warnings)) is not None]
        judged += [
            *_repaired_files(judged, candidates, task, recipe, judge, place, warnings),
            *_eased_files(judged, candidates, task, recipe, judge, place, threads),
        ]
    if not any(f.baseline for f in judged):
        raise FileError("None of the original's fp32 files works, so there is nothing to compare with: " + " ".join(warnings))
    with clock.stage("measure"), _dense_twins(judged, pressed, task, warnings) as twins:
        say("Measuring {} files in turns.", len(judged) + len(twins))
        measured = measure([f.artifact for f in judged] + list(twins.values()), device=place, threads=threads)
    warnings += _slow_precisions(judged, place)
    noise = noise_warning(measured)
    if noise:
        warnings.append(noise)
    dense = dict(zip(twins, measured[len(judged) :], strict=True))
    report = _report(task, judge, original, pressed, judged, measured[: len(judged)], dense, warnings, clock)
    if place.name == "local" and report.closest is not None:
        report = replace(report, profile=_profile(report.closest.artifact, threads))
    write(report, folder)
    return report


# ---- stages

_SLOWEST = 16
"""Modules in the profile of a report."""


def _check_layers(original: Network, recipe: Recipe) -> None:
    """Find out before anything is computed that the recipe speaks of layers that there are none of."""
    for how in (recipe.quantization(p) for p in recipe.precisions if p != "fp32"):
        check_layers(original, how)
    for item in recipe.passes:
        if isinstance(item, Quantize):
            check_layers(original, item.how)


def _write_plan(pressed: Network, path: Path, warnings: list[str]) -> None:
    """How the user replays what was cut on their own class and weights; a pass of theirs may have made that impossible."""
    try:
        pressed.plan().write(path)
    except FileError:
        raise
    except UserError as error:
        path.unlink(missing_ok=True)
        warnings.append(f"{path.name} was not written: {error}")


@contextmanager
def _dense_twins(judged: Sequence[_Judged], pressed: Network, task: Task, warnings: list[str]) -> Iterator[dict[Path, Artifact]]:
    """For each file with zeros, one of the same network without any: what the zeros buy is found out, not supposed."""
    twins: dict[Path, Artifact] = {}
    sparse = [f.artifact for f in judged if any(entry["pass"] == "Sparsify" for entry in f.artifact.history)]
    twin = dense_twin(pressed) if sparse else pressed
    with tempfile.TemporaryDirectory() as scratch:
        for artifact in sparse:
            path = Path(scratch) / artifact.path.name
            try:
                twins[artifact.path] = export(twin, path, artifact.precision, task.calibration_batches)
            except UserError as error:
                warnings.append(f"{path.name} has no dense twin to compare with: {error}")
        yield twins


@dataclass(frozen=True)
class _Candidate:
    network: Network
    artifact: Artifact
    baseline: bool
    repairs: str = ""
    """What was done to a quantized file to hold its accuracy, or to be faster."""


def _export_all(networks: dict[str, Network], task: Task, recipe: Recipe, folder: Path, warnings: list[str]) -> list[_Candidate]:
    """The originals in fp32 first: they are the baseline whatever the recipe asks for."""
    if not recipe.passes:
        networks = {"original": networks["original"]}
    found = []
    for stem, network in networks.items():
        for precision in dict.fromkeys(("fp32", *recipe.precisions)):  # fp32 always: what the others are compared with
            baseline = stem == "original" and precision == "fp32"
            for suffix in recipe.formats:
                path = folder / f"{stem}-{precision}.{suffix}"
                say("Writing {}.", path)
                try:
                    artifact = export(network, path, recipe.quantization(precision), task.calibration_batches)
                except UserError as error:
                    path.unlink(missing_ok=True)
                    warnings.append(f"{path.name} was not delivered: {error}")
                    continue
                found.append(_Candidate(network, artifact, baseline))
    return found


@dataclass(frozen=True)
class _Judged:
    artifact: Artifact
    baseline: bool
    repairs: str
    parity: Parity
    metrics: dict[str, float]
    drop: float
    deciding_drop: float


def _run_file(candidate: _Candidate, task: Task, judge: _Judge, place: Device, warnings: list[str]) -> _Judged | None:
    """Run one file and judge it; one that does not work is taken away and said so."""
    artifact = candidate.artifact
    try:
        _tried(artifact, place)
        parity = verify(artifact, candidate.network)
        reason = "" if parity.ok else parity.reason
    except UserError as error:
        reason = str(error)
    if reason:
        artifact.path.unlink(missing_ok=True)
        warnings.append(f"{artifact.path.name} was not delivered: {reason}")
        return None
    say("Running {} on the task's data.", artifact.path.name)
    runtime = place.open(artifact, threads=place.environment().get("usable_cores") or 1)
    try:
        values, drop, deciding = judge.file(runtime.predict)
    finally:
        runtime.close()
    return _Judged(artifact, candidate.baseline, candidate.repairs, parity, values, drop, deciding)


def _repaired_files(
    judged: Sequence[_Judged],
    candidates: Sequence[_Candidate],
    task: Task,
    recipe: Recipe,
    judge: _Judge,
    place: Device,
    warnings: list[str],
) -> list[_Judged]:
    """For each quantized file that lost too much while its float twin did not: one that does not lose so much."""
    found = []
    drops = {f.artifact.path: f.deciding_drop for f in judged}
    for candidate in candidates:
        path, precision = candidate.artifact.path, candidate.artifact.precision
        how = recipe.quantization(precision)
        held = drops.get(_float_twin(candidate.artifact), math.inf) <= judge.max_drop
        if path not in drops or not how.calibrated or drops[path] <= judge.max_drop or not held:
            continue
        say("{} lost {:.2f} points: looking for what brings them back.", path.name, drops[path])
        results: dict[str, _Judged | None] = {}

        def holds(artifact: Artifact, network: Network = candidate.network, results: dict[str, Any] = results) -> bool:
            made = _run_file(_Candidate(network, artifact, False), task, judge, place, warnings)
            results["last"] = made
            return made is not None and made.deciding_drop <= judge.max_drop

        try:
            made = repaired(candidate.network, path.with_stem(f"{path.stem}-repaired"), how, task, holds)
        except UserError as error:
            warnings.append(f"{path.name} could not be repaired: {error}")
            continue
        last = results.get("last")
        if made is None or last is None:
            warnings.append(f"Neither repairs nor layers in floats bring the accuracy of {path.name} back.")
        else:
            found.append(replace(last, artifact=made[0], repairs=made[1]))
    return found


def _eased_files(
    judged: Sequence[_Judged],
    candidates: Sequence[_Candidate],
    task: Task,
    recipe: Recipe,
    judge: _Judge,
    place: Device,
    threads: int,
) -> list[_Judged]:
    """For each quantized file that is faster with its first layers in floats: that one. Found by profile, so on this computer."""
    found = []
    known = {f.artifact.path: f for f in judged}
    for candidate in candidates if place.name == "local" else ():
        plain, floats = known.get(candidate.artifact.path), known.get(_float_twin(candidate.artifact))
        how = recipe.quantization(candidate.artifact.precision)
        if plain is None or floats is None or not how.calibrated or plain.deciding_drop > judge.max_drop:
            continue
        result, mixed = None, plain.artifact.path.with_stem(f"{plain.artifact.path.stem}-mixed")
        mixed.unlink(missing_ok=True)  # of an earlier run
        with contextlib.suppress(UserError):  # the file stands without
            made = eased(candidate.network, plain.artifact, floats.artifact, how, task, threads)
            if made is None:
                continue
            say("Measuring {} with {}.", plain.artifact.path.name, made[1])
            if ratio(*measure([plain.artifact, made[0]], device=place, threads=threads)).low > 1:
                result = _run_file(_Candidate(candidate.network, made[0], False, made[1]), task, judge, place, [])
        if result is not None and result.deciding_drop <= judge.max_drop:
            found.append(result)
        else:  # whatever went wrong, no file is left that no report speaks of
            mixed.unlink(missing_ok=True)
    return found


def _tried(artifact: Artifact, place: Device) -> None:
    """Run a file in a process of its own: one that crashes its runtime must not take the run with it."""
    outcome = place.check(Job(artifact, random_feeds(artifact)))
    if isinstance(outcome, Failed):
        raise outcome.error


def _profile(artifact: Artifact, threads: int) -> dict[str, Any] | None:
    """Where the time of a file goes, by module; what the profiler cannot do is no reason to end a run."""
    try:
        found = profile(artifact, threads)
    except UserError:
        return None
    modules = [{"name": name or "no module", "ns": ns, "share": share} for name, ns, share in found.by_module()[:_SLOWEST]]
    return {"file": artifact.path.name, "covered": found.covered, "caution": found.caution, "modules": modules}


@dataclass(frozen=True)
class _Judge:
    """The task's metric of the original, and how a file compares."""

    task: Task
    reference: dict[str, float]
    deciding_reference: float
    max_drop: float

    @classmethod
    def of(cls, task: Task, predict: Predict, max_drop: float) -> _Judge:
        reference = metrics(task, predict)
        value = reference[task.metric]
        if max_drop < 0:
            raise RecipeError(f"max_drop is {max_drop}; it is a number of points that may be lost, 0 or more.")
        if abs(value) <= 1 <= max_drop:
            raise RecipeError(
                f"The task's {task.metric} is {value:.4g}, so a drop of {max_drop:g} would accept anything: give max_drop in the "
                "metric's own unit (0.01 for one percent), or let evaluate return percent."
            )
        deciding = metrics(task, predict, validation=True)[task.metric] if task.validate is not None else value
        return cls(task, reference, deciding, max_drop)

    def file(self, predict: Predict) -> tuple[dict[str, float], float, float]:
        """Metrics by ``evaluate``, the drop of the deciding metric by ``evaluate``, and by ``validate`` where there is one."""
        values = metrics(self.task, predict)
        drop = self.task.drop(self.reference[self.task.metric], values[self.task.metric])
        if self.task.validate is None:
            return values, drop, drop
        decided = metrics(self.task, predict, validation=True)[self.task.metric]
        return values, drop, self.task.drop(self.deciding_reference, decided)

    def verdict(self, found: _Judged, faster: Ratio, than_twin: Ratio | None, threads: int) -> tuple[bool, str]:
        """Whether the file is accepted, and the sentence that says why.

        Args:
            found: the file.
            faster: its speed-up against the baseline.
            than_twin: against the same network in floats, where it is quantized.
            threads: of the runtime.
        """
        if found.baseline:
            return False, "the original, for comparison"
        over = found.deciding_drop - self.max_drop
        reasons = []
        where = " on the validation data" if self.task.validate is not None else ""
        if over > 1e-9:
            reasons.append(f"{self.task.metric} dropped {found.deciding_drop:.2f} points{where}, {over:.2f} over the budget")
        if faster.high < 1:
            reasons.append(f"slower than the original ({faster.high:.2f}x at best)")
        if than_twin is not None and than_twin.high < 1:
            why = why_slow(found.artifact, threads)
            reasons.append(f"slower than its float twin ({than_twin.high:.2f}x at best{'; ' if why else ''}{why})")
        if reasons:
            return False, "rejected: " + "; ".join(reasons)
        repairs = f" ({found.repairs})" if found.repairs else ""
        return True, f"accepted{repairs}" + ("" if faster.low > 1 else ", though not measurably faster than the original")


def _slow_precisions(judged: Sequence[_Judged], place: Device) -> list[str]:
    """What to expect of precisions that the device has no fast kernels for."""
    facts, said = place.environment(), []
    for artifact in {(f.artifact.format, f.artifact.precision): f.artifact for f in judged}.values():
        if artifact.precision in PRECISIONS:
            speed, reason = expected_speed(artifact.format, artifact.precision, facts)
            if speed in ("perhaps", "slow"):
                said.append(f"{artifact.precision} in .{artifact.format} files: {reason}.")
    return said


# ---- the report


def _report(
    task: Task,
    judge: _Judge,
    original: Network,
    pressed: Network,
    judged: Sequence[_Judged],
    measured: Sequence[Measurement],
    dense: dict[Path, Measurement],
    warnings: Sequence[str],
    clock: _Clock,
) -> Report:
    pairs = list(zip(judged, measured, strict=True))
    base, base_time = min(((f, m) for f, m in pairs if f.baseline), key=lambda pair: pair[1].p50_ns)
    files = []
    floats = {f.artifact.path: times for f, times in pairs if f.artifact.precision == "fp32"}
    for found, times in pairs:
        speedup = ratio(base_time, times)
        float_twin = None if found.artifact.precision == "fp32" else floats.get(_float_twin(found.artifact))
        than_twin = ratio(float_twin, times) if float_twin is not None else None
        accepted, verdict = judge.verdict(found, speedup, than_twin, times.threads)
        twin = dense.get(found.artifact.path)
        files.append(
            FileResult(
                artifact=found.artifact,
                metrics=found.metrics,
                drop=found.drop,
                measurement=times,
                speedup=speedup,
                smaller=base.artifact.bytes / found.artifact.bytes,
                parity=found.parity,
                accepted=accepted,
                verdict=verdict,
                original=found.baseline,
                deflated_bytes=deflated_bytes(found.artifact) if dense else None,
                sparse_speedup=ratio(twin, times) if twin is not None else None,
            )
        )
    return Report(
        task=task.name,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        max_drop=judge.max_drop,
        original={"metrics": judge.reference, "parameters": original.parameter_count, "macs": original.macs()},
        compressed={"parameters": pressed.parameter_count, "macs": pressed.macs()},
        baseline=base.artifact.path.name,
        files=tuple(files),
        layers=_layers(original, pressed),
        passes=pressed.history,
        decided_on="evaluate" if task.validate is None else "validate",
        environment=measured[0].environment,
        warnings=tuple(warnings),
        seconds=clock.seconds,
        accepted=any(f.accepted for f in files),
    )


def _float_twin(artifact: Artifact) -> Path:
    """Where the same network stands in floats, in the same format."""
    stem = artifact.path.stem.removesuffix("-repaired").removesuffix("-mixed").removesuffix(artifact.precision)
    return artifact.path.with_name(f"{stem}fp32{artifact.path.suffix}")


def _layers(before: Network, after: Network) -> tuple[Layer, ...]:
    """Output channels of every convolution and linear layer, before and after; 0 where the layer is gone."""
    left = after.state_dict()
    found = []
    for node in before.module.graph.nodes:
        kind = str(getattr(node.target, "_schema", None) and node.target._schema.name.removeprefix("aten::"))
        if node.op != "call_function" or not (kind.startswith("conv") or kind == "linear"):
            continue
        name = str(node.args[1].target)
        axis = 1 if "transpose" in kind else 0
        channels = before.state_dict()[name].shape[axis]
        found.append(Layer(name.removesuffix(".weight"), kind, channels, left[name].shape[axis] if name in left else 0))
    return tuple(dict.fromkeys(found))


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - started, 2)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(f"Cannot write into {folder}: {error.strerror or error}; choose another folder with --out.") from error
    return folder
