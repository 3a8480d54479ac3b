"""Files take turns: A B C, B C A, ... Whatever the device does in the meantime falls on all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time

from .frames import Failure
from .machine import Energy, busy_s, celsius, mhz, readings

__all__ = ["Turn", "interleave"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .sessions import Session

_TIMER_STEPS = 100  # a sample lasts at least so many steps of the clock: 1 % precision
_LEAST_ROUNDS = 5  # with fewer an interval says little
_SETTLED = 0.05  # two windows of the warm-up whose medians differ by less are alike
_LONG_NS = 1_000_000_000  # a run this long is taken once a round


class Turn:
    """One file's part in a run.

    Args:
        session: the file; what is timed is its ``run``, unless it brings a stopwatch of its own.
        feeds: what it is run on.
    """

    def __init__(self, session: Session, feeds: Sequence[Any]):
        self.session, self.feeds = session, feeds
        self._stopwatch: Callable[[int], int] | None = None
        self.typical_ns, self.loops, self.repeats = 0.0, 1, 1
        self.rounds: list[list[int]] = []
        self.joules: float | None = None
        self.runs = 0

    def prepare(self) -> None:
        """Let a session with a stopwatch of its own get ready: what it compiles is no part of the warm-up."""
        if self.session.stopwatch is not None:
            self._stopwatch = self.session.stopwatch(self.feeds)

    def sample(self, clock: Callable[[], int]) -> int:
        """Nanoseconds of one run, the mean over ``loops``."""
        if self._stopwatch is not None:
            spent = self._stopwatch(self.loops)
        else:
            run, feeds = self.session.run, self.feeds
            start = clock()
            for _ in range(self.loops):
                run(feeds)
            spent = clock() - start
        if spent < 0:
            raise Failure("clock")
        return round(spent / self.loops)

    @property
    def settle(self) -> int:
        """Runs before a round's first sample: the neighbour has left its own data in the caches."""
        return max(1, min(50, self.repeats // 10))


def interleave(
    turns: Sequence[Turn],
    plan: dict[str, Any],
    clock: Callable[[], int] = time.perf_counter_ns,
    begin: Callable[[int], None] = lambda i: None,
) -> dict[str, Any]:
    """Warm up, choose repeats, take turns.

    Args:
        turns: the files; their ``rounds`` are filled.
        plan: `edgepress.targets.measure.Plan` as a dictionary.
        clock: nanoseconds.
        begin: is told which file runs next.

    Returns:
        What happened meanwhile: ``other_cores`` (how many cores everything else kept busy), ``stolen_cores`` (taken by a
        hypervisor), ``clock_jump_s`` (wall clock against monotonic), and a ``trace`` of seconds, MHz and degrees by round.
    """
    import random

    for i, turn in enumerate(turns):
        begin(i)
        turn.prepare()
        _warm_up(turn, plan, clock)
        _choose_repeats(turn, plan, clock)
    order, energy = random.Random(plan["seed"]), Energy()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    start, wall, busy, trace = time.monotonic(), time.time(), busy_s(), []
    try:
        for _ in range(_rounds(turns, plan)):
            for i in order.sample(range(len(turns)), len(turns)):
                begin(i)
                _take_round(turns[i], clock, energy)
            trace.append([round(time.monotonic() - start, 3), mhz(), celsius()])
    finally:
        if collecting:
            gc.enable()
    spent, busy_end = max(time.monotonic() - start, 1e-9), busy_s()
    seen: dict[str, Any] = {"trace": trace, "clock_jump_s": round(time.time() - wall - spent, 3)}
    for key, index in (("other_cores", 0), ("stolen_cores", 1)):
        seen[key] = round(max(busy_end[index] - busy[index], 0.0) / spent, 2) if busy and busy_end else None
    return seen


def _warm_up(turn: Turn, plan: dict[str, Any], clock: Callable[[], int]) -> None:
    """Run until two windows in a row have like medians: caches, frequency and the runtime's own lazy work have settled."""
    window_ns = plan["warmup_s"] * 1e9 / 2
    start, before = clock(), math.inf
    while True:
        samples = [turn.sample(clock)]
        opened = clock()
        while clock() - opened < window_ns:
            samples.append(turn.sample(clock))
        turn.typical_ns = max(statistics.median(samples), 1.0)
        if abs(turn.typical_ns / before - 1) < _SETTLED or clock() - start >= 10 * plan["warmup_s"] * 1e9:
            return
        before = turn.typical_ns


def _choose_repeats(turn: Turn, plan: dict[str, Any], clock: Callable[[], int]) -> None:
    step = max(min((b - a for a, b in readings(clock) if b > a), default=1), turn.session.step_ns)
    turn.loops = max(1, math.ceil(_TIMER_STEPS * step / turn.typical_ns))
    wanted = math.ceil(plan["min_round_s"] * 1e9 / (turn.typical_ns * turn.loops))
    turn.repeats = min(max(wanted, 3 if turn.typical_ns < _LONG_NS else 1), plan["max_samples"])


def _rounds(turns: Sequence[Turn], plan: dict[str, Any]) -> int:
    one_ns = sum(turn.typical_ns * turn.loops * (turn.repeats + turn.settle) for turn in turns)
    if plan.get("sustained_s"):
        return max(_LEAST_ROUNDS, int(plan["sustained_s"] * 1e9 / one_ns))
    return min(int(plan["rounds"]), max(_LEAST_ROUNDS, int(plan["budget_s"] * 1e9 / one_ns)))


def _take_round(turn: Turn, clock: Callable[[], int], energy: Energy) -> None:
    for _ in range(turn.settle):
        turn.sample(clock)
    before = energy.joules()
    turn.rounds.append([turn.sample(clock) for _ in range(turn.repeats)])
    after = energy.joules()
    turn.runs += turn.repeats * turn.loops
    if before is not None and after is not None:
        turn.joules = (turn.joules or 0.0) + after - before
