"""Union-find and the algebra of axes, without a network."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.compress.pruning.labels import Atom, Labels, axis, size

PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25)


@settings(deadline=None, derandomize=True)
@given(st.lists(PAIRS, max_size=4), st.sets(st.integers(0, 19), max_size=3))
def test_union_must_agree_with_a_plain_partition(batches, frozen):
    labels = Labels()
    ids = labels.new(20)
    parts = [{i} for i in range(20)]
    half = len(batches) // 2
    for i, pairs in enumerate(batches):
        if i == half and frozen:  # some unions come before the freeze, some after
            labels.freeze(np.array(sorted(frozen)), "test")
        if pairs:
            labels.union(*np.array(pairs).T)
        for a, b in pairs:
            both = next(p for p in parts if a in p) | next(p for p in parts if b in p)
            parts = [p for p in parts if not p & both] + [both]
    if not batches and frozen:
        labels.freeze(np.array(sorted(frozen)), "test")
    assert {frozenset(np.flatnonzero(labels.find(ids) == r).tolist()) for r in labels.find(ids)} == set(map(frozenset, parts))
    assert set(np.flatnonzero(labels.frozen(ids)).tolist()) == {i for p in parts if p & frozen for i in p}


def test_labels_must_grow_past_their_first_block():
    labels = Labels()
    ids = labels.new(5000)
    labels.union(ids[:-1], ids[1:])
    assert (labels.find(ids) == 0).all()


def test_freeze_must_log_only_what_was_free():
    labels = Labels()
    ids = labels.new(4)
    labels.context = "first"
    labels.freeze(ids[:2], "a")
    labels.context = "second"
    labels.freeze(ids[:3], "b")
    assert [(f.context, f.reason, f.labels.tolist()) for f in labels.log] == [("first", "a", [0, 1]), ("second", "b", [2])]


def test_reshape_must_keep_merged_factors_apart():
    labels = Labels()
    heads = labels.new(4)
    merged, _ = labels.reshape([axis(13), axis(4, heads), axis(3)], [52, 3], lambda i: "inner")
    assert [a.size for a in merged[0]] == [13, 4]
    back, _ = labels.reshape(merged, [13, 4, 3], lambda i: "inner")
    assert back[1][0].labels is heads
    assert not labels.frozen(heads).any()


def test_reshape_must_join_what_a_split_cannot_tell_apart():
    for side, expected in (("inner", [0, 1, 2, 0, 1, 2]), ("outer", [0, 0, 0, 3, 3, 3])):
        labels = Labels()
        ids = labels.new(6)
        labels.reshape([axis(6, ids)], [2, 3], lambda i, side=side: side)
        assert labels.find(ids).tolist() == expected


def test_reshape_must_not_join_a_pattern_that_repeats_already():
    labels = Labels()
    ids = labels.new(3)
    out, splits = labels.reshape([axis(6, np.tile(ids, 2))], [2, 3], lambda i: "outer")
    assert not splits
    assert out[0][0].labels is None
    assert len(set(labels.find(ids).tolist())) == 3


def test_reshape_across_factors_must_freeze():
    labels = Labels()
    ids = labels.new(6)
    labels.reshape([axis(4), axis(6, ids)], [3, 8], lambda i: "inner")
    assert labels.frozen(ids).all()


def test_flat_must_keep_real_channels_rather_than_constants():
    labels = Labels()
    real, constant = labels.new(2), labels.new(6, soft=True)
    flat = labels.flat((Atom(6, constant), Atom(2, real)))
    assert flat.tolist() == real.tolist() * 6
    assert labels.frozen(constant).all()
    assert not labels.frozen(real).any()


def test_broadcast_must_join_from_the_right_and_let_ones_stretch():
    labels = Labels()
    a, b = labels.new(3), labels.new(3)
    out = labels.broadcast([(axis(2), axis(3, a), axis(4)), (axis(3, b), ())])
    assert [size(x) for x in out] == [2, 3, 4]
    assert labels.find(a).tolist() == labels.find(b).tolist()
