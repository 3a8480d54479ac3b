import doctest
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from test_offline import RECORD

import edgepress

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def modules():
    for folder in ("", "compress", "compress.pruning", "targets", "models"):
        package = importlib.import_module("edgepress" + ("." + folder if folder else ""))
        yield package.__name__
        yield from (f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if m.name != "__main__")


@pytest.mark.parametrize("name", sorted(set(modules())))
def test_docstrings_show_what_happens(name):
    module = importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not failed


def test_documented_code_is_the_code_that_runs():
    task = (DOCS / "my_task.py").read_text()
    (shown,) = re.findall(r"## The judge\n\n```python\n(.*?)```", (DOCS / "your-own-network.md").read_text(), re.S)
    bare = re.sub(r'    """.*?"""\n', "", task)
    assert shown.strip() in bare


def test_readme_task_is_the_documented_contract():
    (shown,) = re.findall(r"```python\n# my_task\.py\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(shown.strip().splitlines()) <= 20
    names = set(re.findall(r"\b(\w+)=", shown))
    assert names <= set(edgepress.Task.__dataclass_fields__) | {"batch_size", "weights_only", "shuffle"}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The walk-through's own command, run as a user would, every attempt to connect recorded."""
    folder = tmp_path_factory.mktemp("walk")
    for name in ("my_task.py", "my_recipe.yaml"):
        shutil.copy(DOCS / name, folder)
    record = folder / "record"
    record.write_text("")
    arguments = ["compress", "my_task.py:build", "--recipe", "my_recipe.yaml", "--max-drop", "2", "--out", "out", "--json"]
    code = f"{RECORD}\nfrom edgepress.cli import main\nraise SystemExit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code, str(record)], cwd=folder, capture_output=True, text=True, timeout=500)
    return folder, done, record.read_text()


def test_walk_through_is_accepted(walked):
    folder, done, _ = walked
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["accepted"]
    files = {f["path"] for f in report["files"]}
    assert {os.path.basename(f) for f in files} >= {"original-fp32.onnx", "pressed-int8.onnx", "pressed-int8.tflite"}
    assert "Traceback" not in done.stderr
    for name in ("report.json", "report.html", "recipe.yaml", "pressed-int8.tflite"):
        assert (folder / "out" / name).stat().st_size > 0
    written = json.loads((folder / "out" / "report.json").read_text())
    assert written["summary"] == report["summary"]
    assert edgepress.read_recipe(folder / "out" / "recipe.yaml") == edgepress.read_recipe(folder / "my_recipe.yaml")


def test_walk_through_attempts_no_connection(walked):
    assert walked[2] == ""


def test_walk_through_page_needs_no_network(walked):
    page = (walked[0] / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "<script src" not in page
    assert "@import" not in page


def test_walk_through_measures_what_it_reports(walked):
    folder, done, _ = walked
    samples = json.loads((folder / "out" / "samples.json").read_text())
    assert samples
    for file in json.loads(done.stdout)["files"]:
        assert file["latency"]["p50_ns"] > 0
        assert file["bytes"] == (folder / "out" / os.path.basename(file["path"])).stat().st_size


def test_documented_passes_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "your-own-network.md").read_text(), re.S)
    names = {"ep": edgepress, "task": importlib.import_module("my_task").build()}
    (block,) = (b for b in blocks if b.startswith("network = ep.trace"))
    exec(block, names)
    assert names["smaller"].macs() <= 0.6 * names["network"].macs()
    assert edgepress.verify(names["artifact"], names["smaller"]).ok
    assert names["artifact"].bytes < names["baseline"].bytes
    assert capsys.readouterr().out.strip() == str(edgepress.ratio(names["before"], names["after"]))
