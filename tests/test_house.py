import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgepress

ROOT = Path(__file__).parents[1]
FOLDERS = ("compress", "targets", "models", "edgepress")
MAY_IMPORT = {
    "compress": set(),
    "targets": {"compress"},
    "models": {"compress"},
    "edgepress": {"compress", "targets", "models"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_they_may(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "edgepress" and len(parts) > 1 and parts[1] in FOLDERS:
                assert parts[1] in MAY_IMPORT[folder], f"{path} imports {name}"
            assert parts[0] not in ("compress", "targets", "models"), f"{path} imports {name} as a top-level package"


def test_importing_edgepress_loads_nothing_heavy():
    code = "import sys, edgepress; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "numpy", "onnx", "onnxruntime", "ai_edge_litert", "nncf", "rich", "yaml", "sklearn"}


def test_public_names_are_these():
    assert set(edgepress.__all__) == {
        *("Task", "Network", "trace", "load_task"),
        *("Taylor", "Fisher", "Activation", "OBD", "Magnitude", "Lamp", "BatchNormScale", "GeometricMedian", "Random"),
        *("Prune", "LatencyTable", "inspect", "Shorten", "Sparsify", "Distill", "transplant"),
        *("Quantization", "quantization", "Quantize", "fake_quantized", "Equalize", "Round", "sensitivity"),
        *("Artifact", "read_artifact", "export", "open_runtime", "Parity", "verify"),
        *("Measurement", "Plan", "measure", "ratio", "bench", "find_device"),
        *("count_instructions", "profile", "check_microcontroller", "write_c_array"),
        *("Recipe", "default_recipe", "read_recipe", "press", "Report"),
        *("EdgepressError", "UserError", "TaskError", "TraceError", "RecipeError", "FileError", "DeviceError"),
        "__version__",
    }
    for name in edgepress.__all__:
        value = getattr(edgepress, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'Prun'"):
        edgepress.Prun  # noqa: B018


def test_every_package_is_named_for_the_wheel():
    import tomllib

    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(("edgepress", *p.parent.relative_to(ROOT).parts)).replace("edgepress.edgepress", "edgepress")
        for folder in FOLDERS
        for p in (ROOT / folder).rglob("__init__.py")
    }
    assert named == found
