import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_training
import torch
from torch import nn

from edgepress.compress.distributed import World, join, synchronised
from edgepress.compress.errors import TaskError, UserError
from edgepress.compress.network import trace
from edgepress.compress.precision import twin

SCRIPT = Path(shared_training.__file__)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process found, and each of two."""
    alone, both = (tmp_path_factory.mktemp(name) for name in ("alone", "both"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"EVALUATED": str(both), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, SCRIPT, both], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    before = os.environ.get("EVALUATED")
    os.environ["EVALUATED"] = str(alone)
    found = shared_training.train(alone)
    if before is None:
        del os.environ["EVALUATED"]
    return found, [torch.load(both / f"found-{rank}.pt", weights_only=False) for rank in (0, 1)], alone, both


@pytest.mark.parametrize("kind", ["fit", "distill"])
def test_two_processes_train_as_one(runs, kind):
    alone, (first, second), *_ = runs
    start = shared_training.make_task().model.state_dict()
    for name, expected in alone[kind].items():
        torch.testing.assert_close(first[kind][name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(first[kind][name], second[kind][name])
    assert not torch.allclose(alone[kind]["4.weight"], start["4.weight"], atol=1e-3)
    assert first[f"{kind}-found"]["processes"] == 2
    assert first[f"{kind}-found"]["losses"] == pytest.approx(alone[f"{kind}-found"]["losses"], rel=1e-4)
    assert first["measured"] == second["measured"]


def test_finished_run_is_taken_by_both(runs):
    for found in runs[1]:
        assert all(torch.equal(found["fit"][name], found["finished"][name]) for name in found["fit"])
        assert found["fit-found"]["steps"] == found["finished-found"]["steps"] == 9


def test_one_process_writes_and_evaluates(runs):
    *_, alone, both = runs
    assert not (both / "1").exists()
    assert (both / "0").exists()
    rows = [[line.split(",")[:2] for line in (f / "log.csv").read_text().splitlines()] for f in (alone, both)]
    assert rows[0] == rows[1]


def test_batch_smaller_than_the_processes_is_a_sentence_in_both(runs):
    for found in runs[1]:
        assert "A batch of 1 cannot be shared by 2 processes" in found["small"]


def test_slices_are_a_batch_whole():
    inputs, targets = (torch.arange(7), torch.arange(14).view(7, 2)), {"a": torch.arange(7), "b": 3, "c": torch.arange(2)}
    shares = [World(rank, 3).share(inputs, targets) for rank in range(3)]
    for i, whole in enumerate(inputs):
        assert torch.equal(torch.cat([share[0][i] for share in shares]), whole)
    assert torch.equal(torch.cat([share[1]["a"] for share in shares]), targets["a"])
    assert all(share[1]["b"] == 3 and len(share[1]["c"]) == 2 for share in shares)
    with pytest.raises(TaskError, match="A batch of 2 cannot be shared by 3"):
        World(0, 3).share((torch.zeros(2),), None)


def test_processes_that_do_not_meet_are_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but the processes do not meet .*torchrun"):
        join(torch.device("cpu"))


@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_normalisation_is_torchs_own_where_there_is_one_process(monkeypatch, affine):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(5, 2, 6, 6) + 3
    kept = {}
    for kind in ("torch", "ours"):
        network = trace(model, torch.zeros(1, 2, 6, 6)).train()
        call = network if kind == "torch" else synchronised(twin(network))
        y = call(x)
        y.square().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        kept[kind] = [y.detach(), *gradients, *network.module.buffers()]
    for ours, theirs in zip(kept["ours"], kept["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compress_in_two_processes_writes_one_report(tmp_path):
    (tmp_path / "tiny.py").write_text(
        "import edgepress as ep\nimport shared_training\n\n\ndef build():\n    return shared_training.make_task()\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "passes:\n  - prune: {macs: 0.7, multiple: 1, rounds: 1}\n  - distill: {epochs: 1, lr: 0.01}\n"
        "export: {formats: [onnx], precisions: [fp32]}\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edgepress"]
    command += ["compress", str(tmp_path / "tiny.py:build"), "--recipe", str(tmp_path / "recipe.yaml"), "--max-drop", "0.9"]
    paths = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"EVALUATED": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    out = tmp_path / "out"
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300, env=environment)
    assert (out / "report.json").is_file(), done.stderr[-3000:]
    assert done.stderr.count("Distill: ") == 1
    assert done.stdout.count("Report: ") == 1
    assert not (tmp_path / "1").exists()  # the second process judges nothing
    saved = sorted(path.name.split("-")[1] for path in (out / "passes").iterdir())
    assert saved == ["distill", "prune"]
