import gc
import itertools

import numpy as np
import pytest

from edgepress.targets.agent import turns as turns_module
from edgepress.targets.agent.frames import Failure
from edgepress.targets.agent.sessions import Session
from edgepress.targets.agent.turns import Turn, interleave

PLAN = {"rounds": 20, "min_round_s": 0.05, "max_samples": 1000, "warmup_s": 0.3, "budget_s": 60.0, "sustained_s": 0.0, "seed": 0}


class Clock:
    """A clock that only moves when something runs, in steps of ``step`` nanoseconds."""

    def __init__(self, step=1):
        self.now, self.step = 0, step

    def __call__(self):
        self.now += 1  # reading it takes time, or two readings would never differ
        return self.now // self.step * self.step


def turns_of(clock, durations, log):
    """Files that take a given time of a fake clock, and write down when they were run."""

    def paced(name, times):
        times = itertools.repeat(times) if isinstance(times, int) else iter(times)

        def run(feeds):
            clock.now += next(times)
            log.append((name, gc.isenabled()))
            return []

        turn = Turn(Session(name, "1", run), [])
        return turn

    return [paced(name, times) for name, times in durations.items()]


def test_interleave_must_give_each_file_one_turn_a_round_in_changing_order():
    clock, log = Clock(), []
    turns = turns_of(clock, {"a": 100_000, "b": 200_000, "c": 300_000}, log)
    interleave(turns, PLAN | {"rounds": 12, "min_round_s": 0.002, "warmup_s": 0.001}, clock)
    timed = [name for name, collecting in log if not collecting]
    blocks = [name for i, name in enumerate(timed) if not i or timed[i - 1] != name]
    runs = {turn.session.name: turn.repeats + turn.settle for turn in turns}
    assert {name: timed.count(name) for name in "abc"} == {name: 12 * count for name, count in runs.items()}
    assert len(blocks) >= 12 * 3 - 11  # a file may end one round and open the next
    at, orders = 0, set()
    for _ in range(12):
        size = sum(runs.values())
        orders.add("".join(dict.fromkeys(timed[at : at + size])))
        assert {name: timed[at : at + size].count(name) for name in "abc"} == runs
        at += size
    assert len(orders) > 2


def test_interleave_must_keep_every_sample_with_its_round():
    clock = Clock()
    turns = turns_of(clock, {"a": 100_000, "b": 400_000}, [])
    interleave(turns, PLAN | {"rounds": 7, "min_round_s": 0.002, "warmup_s": 0.001}, clock)
    for turn, ns in zip(turns, (100_000, 400_000), strict=True):
        assert len(turn.rounds) == 7
        assert {sample for samples in turn.rounds for sample in samples} <= {ns, ns + 1}
    assert len(turns[0].rounds[0]) == pytest.approx(4 * len(turns[1].rounds[0]), abs=1)


def test_interleave_must_switch_garbage_collection_off_and_on_again_even_after_a_failure():
    clock, log = Clock(), []
    interleave(turns_of(clock, {"a": 1000}, log), PLAN | {"rounds": 2, "min_round_s": 1e-5, "warmup_s": 0.0}, clock)
    assert (("a", False) in log, gc.isenabled()) == (True, True)
    turns = turns_of(clock, {"a": [1000] * 5 + ["not a time"]}, log)
    with pytest.raises(TypeError):
        interleave(turns, PLAN | {"rounds": 20, "min_round_s": 1e-5, "warmup_s": 0.0}, clock)
    assert gc.isenabled()


def test_samples_must_last_long_enough_for_the_clock():
    clock = Clock(step=1000)
    turns = turns_of(clock, {"short": 2_000, "long": 1_000_000}, [])
    interleave(turns, PLAN | {"rounds": 2, "min_round_s": 0.001, "warmup_s": 0.001}, clock)
    assert turns[0].loops >= 50
    assert turns[1].loops == 1
    assert np.median(turns[0].rounds[0]) == pytest.approx(2_000, rel=0.02)


def test_budget_must_leave_out_rounds_but_never_below_five():
    for budget_s, rounds in ((1e9, 20), (0.105, 10), (1e-6, 5)):
        clock = Clock()
        turns = turns_of(clock, {"a": 1_000_000}, [])
        interleave(turns, PLAN | {"min_round_s": 0.009, "warmup_s": 0.0, "budget_s": budget_s}, clock)
        assert len(turns[0].rounds) == rounds


def test_warm_up_must_go_on_until_times_settle():
    clock, log = Clock(), []
    falling = [int(10_000_000 * 0.8**i) for i in range(12)] + [500_000] * 10_000
    turns = turns_of(clock, {"a": falling}, log)
    interleave(turns, PLAN | {"rounds": 3, "min_round_s": 0.001, "warmup_s": 0.01}, clock)
    assert {sample for samples in turns[0].rounds for sample in samples} <= {500_000, 500_001}


def test_what_happened_meanwhile_must_be_counted_in_cores(monkeypatch):
    readings = iter([(10.0, 0.0), (1e9, 5e8)])
    monkeypatch.setattr(turns_module, "busy_s", lambda: next(readings))
    seen = interleave(turns_of(Clock(), {"a": 1000}, []), PLAN | {"rounds": 2, "min_round_s": 1e-5, "warmup_s": 0.0}, Clock())
    assert seen["other_cores"] > seen["stolen_cores"] > 1e3


def test_a_clock_that_goes_backwards_must_end_the_run():
    clock = Clock()
    with pytest.raises(Failure, match="clock"):
        interleave(turns_of(clock, {"a": [1000] * 5 + [-5000]}, []), PLAN | {"warmup_s": 0.0, "min_round_s": 1e-5}, clock)


def test_a_wall_clock_that_jumps_must_be_seen(monkeypatch):
    times = iter([1e9, 1e9 + 3600])
    monkeypatch.setattr(turns_module.time, "time", lambda: next(times))
    clock = Clock()
    seen = interleave(turns_of(clock, {"a": 1000}, []), PLAN | {"rounds": 2, "min_round_s": 1e-5, "warmup_s": 0.0}, clock)
    assert seen["clock_jump_s"] == pytest.approx(3600, abs=1)


def test_sustained_runs_must_last_as_long_as_was_asked():
    clock = Clock()
    turns = turns_of(clock, {"a": 1_000_000}, [])
    interleave(turns, PLAN | {"min_round_s": 0.009, "warmup_s": 0.0, "budget_s": 1e-6, "sustained_s": 1.0}, clock)
    assert len(turns[0].rounds) == pytest.approx(100, abs=1)


def test_energy_must_be_added_up_over_a_files_own_turns(monkeypatch):
    class Sensor:
        def __init__(self):
            self.read = 0.0

        def joules(self):
            self.read += 1.0
            return self.read

    monkeypatch.setattr(turns_module, "Energy", Sensor)
    clock = Clock()
    turns = turns_of(clock, {"a": 1000, "b": 1000}, [])
    interleave(turns, PLAN | {"rounds": 6, "min_round_s": 1e-5, "warmup_s": 0.0}, clock)
    assert [turn.joules for turn in turns] == [6.0, 6.0]
    assert all(turn.runs == 6 * turn.repeats * turn.loops for turn in turns)
