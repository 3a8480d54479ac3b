"""The command line as a user meets it: exit codes, one sentence for each mistake, nothing half-written."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edgepress import __version__
from edgepress.cli import _parser, main
from edgepress.compress.network import trace

TASK = """
import torch
import edgepress as ep

images, labels = torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,))

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 3)).eval()

def build(**changes):
    fields = dict(
        model=network(), example_inputs=images[:1], train_batches=[(images, labels)] * 4, calibration_batches=[images],
        evaluate=lambda predict: {"accuracy": 100.0 * float((predict(images.numpy()).argmax(1) == labels.numpy()).mean())},
        metric="accuracy",
    )
    return ep.Task(**{**fields, **changes})
"""


SLOW = """
def slow(epoch):
    import time
    for batch in [(images, labels)] * 4:
        time.sleep(0.1)
        yield batch

def bad():
    return build(train_batches=slow)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def add(folder, code):
    (folder / "task.py").write_text(TASK + code)


def fails(capsys, code, said, *arguments):
    """Run; one sentence on standard error that says ``said``, nothing on standard output."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("edgepress: ")
    for part in said if isinstance(said, tuple) else (said,):
        assert part in last
    assert "Traceback" not in err
    assert out == ""
    return last


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("digit", ("There is no task 'digit'", "did you mean 'digits'?")),
        ("task.py", "name the function in it, as task.py:build"),
        ("net.onnx:build", "net.onnx is not a Python file"),
        ("nothing.py:build", "There is no file nothing.py"),
        ("task.py:biuld", ("has no function 'biuld'", "build")),
        ("task.py:network", "returned a Sequential, not an edgepress.Task"),
    ],
)
def test_a_task_that_is_not_one_is_refused(folder, capsys, task, said):
    fails(capsys, 2, said, "compress", task, "--out", "out")
    assert not (folder / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("evaluate=lambda predict: 1 / 0", ("evaluate raised ZeroDivisionError", "task.py, line")),
        ("metric='f1'", "must return a dict with the metric 'f1'; it returned keys ['accuracy']"),
        ("evaluate=lambda predict: {'accuracy': float('nan')}", "returned nan for 'accuracy'"),
        ("evaluate=lambda predict: {'accuracy': 0.5}", "a drop of 1 would accept anything"),
        ("example_inputs=torch.zeros(1, 3, 8, 8)", "does not run on the example inputs of shape [1, 3, 8, 8]"),
        ("model=torch.nn.Linear(8, 3).requires_grad_(False).fill()", "raised AttributeError"),
        ("train_batches=[]", "Task.train_batches yielded no batch"),
        ("train_batches=[(torch.zeros(4, 3, 8, 8), labels[:4])]", "has the shape [4, 3, 8, 8]; the network takes [N, 1, 8, 8]"),
        ("train_batches=[(images.double(), labels)]", "Input 1 is float64; the network takes float32"),
        ("train_batches=[(images, labels + 5)]", ("cross-entropy failed", "targets of train_batches")),
        ("train_batches=lambda epoch: open('no.png')", "Task.train_batches raised FileNotFoundError"),
        ("train_batches=None, calibration_batches=None", "neither train_batches nor calibration_batches"),
    ],
)
def test_a_task_that_does_not_work_is_explained(folder, capsys, changes, said):
    add(folder, f"\ndef bad():\n    return build({changes})\n")
    fails(capsys, 2, said, "compress", "task.py:bad", "--out", "out")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def bad():\n    m = network()\n    m[0].weight.data[0] = float('nan')\n    return build(model=m)",
            "'0.weight' holds NaN",
        ),
        ("def bad():\n    raise ValueError('no disk')", ("raised ValueError: no disk", "(line 20)")),
        ("def bad(:", "SyntaxError"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_does_not_work_is_explained(folder, capsys, code, said):
    add(folder, f"\n{code}\n")
    fails(capsys, 2, said, "compress", "task.py:bad", "--out", "out")


def test_debug_shows_the_traceback(folder, capsys):
    assert main(["compress", "digit", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compres", "digits"], "there is no command 'compres'; did you mean 'compress'?"),
        (["bench"], "required: files"),
        (["bench", "a.onnx", "--threads", "0"], "'0' is not a whole number above 0"),
        (["bench", "a.onnx", "--sustained", "x"], "'x' is not a number of minutes above 0"),
        (["compress", "digits", "--max-drop", "little"], "invalid float value: 'little'"),
    ],
)
def test_wrong_arguments_get_one_sentence(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_recipe_formats_and_devices_are_checked_before_anything_runs(folder, capsys):
    (folder / "recipe.yaml").write_text("passes: [{prune: {mac: 0.5}}]")
    fails(capsys, 2, "did you mean 'macs'?", "compress", "task.py:build", "--recipe", "recipe.yaml", "--out", "out")
    fails(
        capsys,
        2,
        "'onxx' is no known format; did you mean 'onnx'?",
        "compress",
        "task.py:build",
        "--format",
        "onxx",
        "--out",
        "out",
    )
    fails(capsys, 2, "'moon'", "compress", "task.py:build", "--device", "moon", "--out", "out")
    fails(capsys, 2, "max_drop is -1", "compress", "task.py:build", "--max-drop", "-1", "--out", "out")


def test_a_folder_that_cannot_be_written_is_named(folder, capsys):
    (folder / "taken").write_text("a file")
    fails(capsys, 2, ("Cannot write into taken", "--out"), "compress", "task.py:build", "--out", "taken")
    assert (folder / "taken").read_text() == "a file"


@pytest.mark.parametrize("name", ["net.onnx", "net.tflite"])
def test_bench_and_verify_refuse_a_truncated_file(folder, capsys, name):
    assert main(["export", "task.py:build", name]) == 0
    capsys.readouterr()
    blob = (folder / name).read_bytes()
    (folder / name).write_bytes(blob[: len(blob) // 2])
    fails(capsys, 2, name, "bench", name)
    fails(capsys, 2, name, "verify", name, "task.py:build")
    fails(capsys, 2, "nothing.onnx", "bench", "nothing.onnx")


def test_export_verify_and_bench_serve_a_users_network(folder, capsys):
    assert main(["export", "task.py:build", "net.onnx"]) == 0
    assert "differs from the network by at most" in capsys.readouterr().out
    assert main(["export", "task.py:build", "net.tflite", "--precision", "int8", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["format"], described["precision"]) == ("tflite", "int8")
    assert described["bytes"] == (folder / "net.tflite").stat().st_size
    assert main(["verify", "net.tflite", "task.py:build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"].keys() == {"accuracy"}
    assert main(["bench", "net.onnx", "net.tflite", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [f["runtime"].split()[0] for f in files] == ["onnxruntime", "litert"]
    assert files[0]["speedup"]["value"] == 1.0
    assert main(["bench", "net.onnx", "net.tflite"]) == 0
    assert "net.tflite" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".py" and p.name != "__pycache__") == ["net.onnx", "net.tflite"]


def test_verify_sees_a_file_of_another_network(folder, capsys):
    add(folder, "\ndef other():\n    m = network(); m[3].bias.data.add_(1.0); return build(model=m)\n")
    assert main(["export", "task.py:build", "net.onnx"]) == 0
    assert main(["verify", "net.onnx", "task.py:other"]) == 3


def test_inspect_shows_groups_of_a_task_and_of_a_saved_network(folder, capsys):
    assert main(["inspect", "task.py:build", "--json"]) == 0
    from_task = json.loads(capsys.readouterr().out)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 3))
    trace(net, torch.zeros(1, 1, 8, 8)).save(folder / "saved")
    assert main(["inspect", "saved", "--json"]) == 0
    from_folder = json.loads(capsys.readouterr().out)
    assert from_task["groups"] == from_folder["groups"]
    assert from_task["groups"][0]["channels"] == 16
    assert main(["inspect", "saved"]) == 0
    assert "1,891 parameters" in capsys.readouterr().out


def test_tasks_and_version_answer(capsys):
    assert main(["tasks"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["tasks", "--json"]) == 0
    assert "resnet56-cifar10" in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"edgepress {__version__}"


@pytest.mark.parametrize("command", ["compress", "export", "bench", "devices", "micro", "profile", "verify", "inspect", "tasks"])
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"edgepress {command}" in out.split("example:")[1]
    assert "exit codes" in out


def test_reference_task_says_what_to_download(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEPRESS_DATA", raising=False)
    fails(capsys, 2, "EDGEPRESS_DATA", "inspect", "resnet56-cifar10")
    monkeypatch.setenv("EDGEPRESS_DATA", str(tmp_path))
    fails(capsys, 2, ("resnet56-4bfd9763.th", "pytorch_resnet_cifar10"), "inspect", "resnet56-cifar10")


def test_ctrl_c_in_training_loses_nothing(folder):
    add(folder, SLOW)
    (folder / "recipe.yaml").write_text("passes: [{distill: {epochs: 6}}]\nexport: {formats: [onnx], precisions: [fp32]}\n")
    command = [sys.executable, "-m", "edgepress", "compress", "task.py:bad", "--recipe", "recipe.yaml", "--out", "out"]
    command += ["--max-drop", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    deadline = time.monotonic() + 120
    while not list(folder.glob("out/passes/*.checkpoint")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("edgepress: Interrupted; nothing that was finished is lost.")
    assert "Traceback" not in err
    left = [p.name for p in (folder / "out").rglob("*") if p.is_file()]
    assert all(n == "recipe.yaml" or n.endswith(".checkpoint") for n in left), left
    again = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert again.returncode in (0, 3), again.stderr
    assert "Distill was interrupted: going on from" in again.stderr
    history = json.loads((folder / "out" / "report.json").read_text())["passes"]
    assert history[0]["found"]["epochs"] == 6
    third = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert "Distill was finished before" in third.stderr


def test_a_pipe_that_closes_is_no_error(folder):
    command = f"{sys.executable} -m edgepress tasks | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, env={**os.environ})
    assert "Traceback" not in done.stderr


# ---- devices


def test_devices_says_what_this_computer_is(capsys):
    assert main(["devices", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["local"]
    assert found["cores"] >= 1
    assert main(["devices"]) == 0
    shown = capsys.readouterr().out
    assert "CPU" in shown
    assert "ssh://user@host" in shown


def test_devices_and_bench_refuse_what_is_no_device(capsys, tmp_path):
    fails(capsys, 2, "There is no device 'toaster'", "devices", "toaster")
    fails(capsys, 2, "is no address", "devices", "ssh://-oProxyCommand=x")
    fails(capsys, 2, "there is no program adb here", "devices", "adb://R58M")


def test_bench_measures_the_others_where_a_file_fails(folder, capsys):
    from onnx import TensorProto, helper, save

    def file(name, operator):
        ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in "xy"]
        graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", ports[:1], ports[1:])
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), name)

    file("good.onnx", "Relu")
    file("bad.onnx", "Nonsense")
    assert main(["bench", "bad.onnx", "good.onnx", "--json"]) == 2
    out, err = capsys.readouterr()
    bad, good = json.loads(out)["files"]
    assert "Nonsense" in bad["error"]
    assert "Nonsense" in err
    assert good["error"] is None
    assert good["speedup"]["value"] == 1.0
    assert good["cold_start"]["load_ns"] > 0
    assert main(["bench", "bad.onnx", "good.onnx"]) == 2
    assert "baseline" in capsys.readouterr().out
    fails(capsys, 2, "good.onnx is run by onnxruntime, not by litert", "bench", "good.onnx", "--runtime", "litert")


def test_profile_shows_where_the_time_goes(folder, capsys):
    assert main(["export", "task.py:build", "net.onnx"]) == 0
    capsys.readouterr()
    assert main(["profile", "net.onnx", "--runs", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows_ns"] == pytest.approx(sum(row["median_ns"] for row in found["rows"]))
    assert found["plain_ns"] > 0
    for by in ("step", "operator", "module"):
        assert main(["profile", "net.onnx", "--runs", "5", "--by", by]) == 0
        assert "The rows are" in capsys.readouterr().out


def test_instructions_are_shown_without_a_time():
    from rich.console import Console

    from edgepress.tables import count_table
    from edgepress.targets.artifact import Artifact
    from edgepress.targets.devices.count import InstructionCount

    file = Artifact(Path("a.onnx"), "onnx", "int8", (), (), "", 10)
    counts = [InstructionCount(file, "cortex-a76", "onnxruntime", "1", n, {"dot_i8": n // 2}, 2, 0.0) for n in (2000, 1000)]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(count_table(counts))
    shown = console.export_text()
    assert "2.00×" in shown
    assert "emulated cortex-a76" in shown
    assert " ms" not in shown


@pytest.mark.parametrize(("text", "minutes"), [("90s", 1.5), ("20m", 20.0), ("1.5h", 90.0), ("5", 5.0)])
def test_a_time_budget_is_read_in_any_unit(text, minutes):
    assert _parser().parse_args(["compress", "digits", "--time-budget", text]).time_budget == minutes


@pytest.mark.parametrize("arguments", [["--time-budget", "soon"], ["--time-budget", "0m"]])
def test_a_time_budget_that_is_none_is_a_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        _parser().parse_args(["compress", "digits", *arguments])
    assert stopped.value.code == 2
    assert "is no time above 0" in capsys.readouterr().err


def test_layers_in_another_precision_are_read_from_the_command_line():
    arguments = _parser().parse_args(["export", "digits", "net.onnx", "--layer", "head.*=fp32", "--layer", "op:softmax=fp16"])
    assert dict(arguments.layer) == {"head.*": "fp32", "op:softmax": "fp16"}
    with pytest.raises(SystemExit):
        _parser().parse_args(["export", "digits", "net.onnx", "--layer", "head.*"])


LOUD = """
import torch, edgepress as ep

def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[0] *= LOUDNESS
        model[1].weight[:, 0] = 0
    x = torch.randn(32, 8)
    return ep.Task(model, x[:2], lambda predict: {"score": 0.0}, "score", calibration_batches=[x])
"""


@pytest.mark.parametrize(("loudness", "warned"), [(1, False), (10_000, True)])
def test_export_warns_of_outputs_that_are_far_off(loudness, warned, tmp_path, capsys):
    task = tmp_path / "loud.py"
    task.write_text(LOUD.replace("LOUDNESS", str(loudness)))
    assert main(["export", f"{task}:build", str(tmp_path / "net.tflite"), "--precision", "int8"]) == 0
    out, err = capsys.readouterr()
    assert "on 16 examples" in out
    assert ("`edgepress sensitivity` names the layers" in err) is warned
