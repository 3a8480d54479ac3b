import contextlib
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgepress.compress.checkpoint import fingerprint, read_checkpoint, write_checkpoint
from edgepress.compress.distill import Distill
from edgepress.compress.errors import FileError, TaskError
from edgepress.compress.network import trace
from edgepress.compress.randomness import deterministic, reproducible
from edgepress.compress.train import Precision, Schedule, fit

TRAINS = Path(__file__).with_name("killed_training.py")


def run(network, task, checkpoint, **schedule):
    def loss(outputs, inputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets)

    chosen = Schedule(**{"epochs": 1, "lr": 0.01, "deterministic": True} | schedule)
    return fit(network, task, loss, chosen, precision=Precision(), checkpoint=checkpoint, save_every=0.0)


def test_training_killed_at_random_moments_ends_at_the_same_bits(tmp_path):
    done = subprocess.run([sys.executable, TRAINS, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert found["same_log"]
    assert len(found["held"]) == 6
    assert found["held"] == sorted(found["held"])
    assert max(found["held"]) > 0
    assert found["left"] == ["checkpoint", "log.csv", "weights.pt"]


@contextlib.contextmanager
def room(count):
    """Files end after ``count`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def network(task):
    return trace(task.model, task.inputs)


def test_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(task, network, tmp_path):
    checkpoint = tmp_path / "run"
    run(network.copy(), task, checkpoint)
    before = checkpoint.read_bytes()
    with room(len(before) // 2), pytest.raises(FileError, match=r"Cannot write .*run \(.*as it was: make room") as error:
        run(network.copy(), task, checkpoint, epochs=2)
    assert "\n" not in str(error.value)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_damaged_checkpoint_is_one_sentence(task, network, tmp_path):
    checkpoint = tmp_path / "run"
    run(network.copy(), task, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(FileError, match="damaged: delete it"):
        run(network.copy(), task, checkpoint)


def test_checkpoint_of_another_start_is_not_taken(task, network, tmp_path):
    checkpoint = tmp_path / "run"
    run(network.copy(), task, checkpoint)
    other = network.copy()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    alone = other.copy()
    run(alone, task, None)
    run(other, task, checkpoint)
    assert fingerprint(alone.tensors()) == fingerprint(other.tensors())


def test_checkpoint_of_other_settings_of_a_pass_is_not_taken(task, network, tmp_path):
    follow = Distill(epochs=1, lr=0.05, labels=0.0, precision=Precision(), deterministic=True)
    learn = replace(follow, labels=1.0)
    expected = learn(network, task)
    replace(follow, checkpoint=tmp_path / "c")(network, task)
    after = replace(learn, checkpoint=tmp_path / "c")(network, task)
    assert fingerprint(after.tensors()) == fingerprint(expected.tensors())


def test_checkpoint_keeps_tied_weights_apart(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    write_checkpoint(tmp_path / "c", {"a": weight, "b": weight, "c": weight.T}, {"x": 0.1})
    tensors, state = read_checkpoint(tmp_path / "c")
    assert all(torch.equal(tensors[k], v) for k, v in {"a": weight, "b": weight, "c": weight.T}.items())
    assert state == {"x": 0.1}
    assert read_checkpoint(tmp_path / "none") is None


def test_batches_are_the_same_whatever_happens_between_them():
    def noise():
        return (torch.rand(()) for _ in range(4))

    disturbed = []
    for x in reproducible(noise, 1):
        disturbed.append(x)
        torch.manual_seed(9)
    assert disturbed == list(reproducible(noise, 1))
    assert disturbed != list(reproducible(noise, 2))


def test_training_leaves_the_random_state_as_it_was(task, network):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    run(network.copy(), task, None)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_says_what_has_no_deterministic_kernel():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(TaskError, match="upsample does not have a deterministic implementation: train"), deterministic(True):
        raise RuntimeError("upsample does not have a deterministic implementation. You can file an issue")
    with pytest.raises(RuntimeError, match="something else"), deterministic(True):
        raise RuntimeError("something else")
    assert not torch.are_deterministic_algorithms_enabled()
