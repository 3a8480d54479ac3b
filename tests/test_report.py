import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from edgepress import report as report_module
from edgepress.compare import Benched
from edgepress.compress.errors import FileError
from edgepress.page import render
from edgepress.plot import Dot, bars, scatter
from edgepress.report import FileResult, Layer, Report, bench_table, table, to_json, write
from edgepress.targets.artifact import Artifact
from edgepress.targets.measure import Measurement, ratio
from edgepress.targets.stats import Ratio
from edgepress.targets.verify import Parity

EVIL = "<script>alert('&\"')</script>"
DOCS = Path(__file__).parents[1] / "docs"
ENVIRONMENT = {"device": "local", "cpu": "Some CPU", "cores": 4, "memory_bytes": 8_000_000_000, "governor": None}


def measured(artifact, p50_us, peak=60_000_000):
    samples = tuple((int(p50_us * 1000) - 10, int(p50_us * 1000), int(p50_us * 1000) + 10) for _ in range(6))
    return Measurement(artifact, "local", "onnxruntime", "1.31", 1, samples, 1, peak, 36_000_000, ENVIRONMENT)


def file_of(folder, name, size, value, p50_us, verdict="accepted", original=False):
    artifact = Artifact(folder / name, name.rpartition(".")[2], "fp32" if original else "int8", (), (), "ab" * 32, size)
    times = measured(artifact, p50_us) if p50_us else None
    speed = ratio(measured(artifact, 2000), times) if times else None
    metrics = None if value is None else {"accuracy": value, "top5": value / 2 + 50}
    drop = None if value is None else 93.4 - value
    parity = Parity(2e-5, 1e-6, 10, True) if original else None
    return FileResult(artifact, metrics, drop, times, speed, 3_600_000 / size, parity, verdict == "accepted", verdict, original)


@pytest.fixture
def report(tmp_path):
    files = (
        file_of(tmp_path, "original.onnx", 3_600_000, 93.4, 2000, "the original, for comparison", original=True),
        file_of(tmp_path, "original.tflite", 3_500_000, 93.4, 2300, "the original, for comparison", original=True),
        file_of(tmp_path, "pressed.onnx", 450_000, 92.7, 600),
        file_of(tmp_path, "pressed.tflite", 400_000, 92.6, 500),
        file_of(tmp_path, "greedy.tflite", 200_000, 90.0, 300, "rejected: accuracy dropped 3.40 points, 2.40 over the budget"),
        file_of(tmp_path, "broken.tflite", 410_000, None, None, "rejected: it does not run"),
    )
    return Report(
        task="resnet",
        metric="accuracy",
        higher_is_better=True,
        max_drop=1.0,
        original={"metrics": {"accuracy": 93.4}, "parameters": 853_018, "macs": 125_485_056},
        baseline="original.onnx",
        files=files,
        layers=(Layer("stem", "conv2d", 16, 16), Layer("1.0.conv1", "conv2d", 16, 8), Layer("1.1.conv1", "conv2d", 16, 0)),
        passes=({"pass": "Prune", "macs": 0.5, "criterion": {"taylor": {"batches": 8}}},),
        decided_on="evaluate",
        environment=ENVIRONMENT,
        warnings=(),
        seconds={"prune": 12.5},
        accepted=True,
    )  # fmt: skip


def without_accepted(report):
    files = tuple(dataclasses.replace(f, accepted=False) for f in report.files if f.name in ("original.onnx", "greedy.tflite"))
    return dataclasses.replace(report, files=files, accepted=False)


def text_of(renderable, width=80):
    sink = io.StringIO()
    Console(file=sink, width=width).print(renderable)
    return sink.getvalue()


class Page(HTMLParser):
    """What a browser would see: text, tags, balanced or not."""

    VOID = ("meta", "br", "circle", "rect", "line", "link")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.addresses = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


# ---- the verdict


def test_best_must_be_the_fastest_accepted_file(report):
    assert report.best.name == "pressed.tflite"
    assert "pressed.tflite is 4.00× faster and 9.00× smaller compared with original.onnx" in report.summary
    assert "accuracy 92.60, the original's 93.40" in report.summary


def test_best_must_never_be_an_original(report):
    originals = tuple(dataclasses.replace(f, accepted=True) for f in report.files if f.original)
    assert dataclasses.replace(report, files=originals).best is None


def test_summary_must_say_by_how_much_nothing_met_the_budget(report):
    rejected = without_accepted(report)
    assert rejected.best is None
    assert rejected.closest.name == "greedy.tflite"
    assert rejected.summary.endswith("The closest, greedy.tflite: accuracy dropped 3.40 points, 2.40 over the budget.")
    nothing = dataclasses.replace(rejected, files=rejected.files[:1])
    assert "none could be judged" in nothing.summary


def test_summary_must_not_call_a_slower_file_faster(report):
    slow = dataclasses.replace(report.best, speedup=Ratio(0.8, 0.7, 0.9))
    assert "1.25× slower" in dataclasses.replace(report, files=(slow,)).summary
    equal = dataclasses.replace(report.best, speedup=Ratio(1.05, 0.97, 1.1))
    assert "is as fast and" in dataclasses.replace(report, files=(equal,)).summary


# ---- JSON


def keys_of(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            if key not in ("metrics", "environment", "seconds", "passes"):  # free keys
                yield from keys_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def test_json_must_hold_only_documented_keys(report):
    text = (DOCS / "report.md").read_text()
    assert [key for key in keys_of(to_json(report)) if f"`{key}`" not in text] == []


def test_json_must_be_plain_and_give_relative_paths(report, tmp_path):
    document = to_json(report, tmp_path)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [f["path"] for f in document["files"]][:2] == ["original.onnx", "original.tflite"]
    assert to_json(report, tmp_path / "deeper")["best"] == "../pressed.tflite"
    assert str(tmp_path) not in json.dumps(to_json(report))


def test_json_must_give_each_files_figures(report):
    best = next(f for f in to_json(report)["files"] if f["path"] == "pressed.tflite")
    assert (best["format"], best["precision"], best["bytes"], best["sha256"]) == ("tflite", "int8", 400_000, "ab" * 32)
    assert (best["latency"]["p50_ns"], best["latency"]["samples"], best["latency"]["rounds"]) == (500_000.0, 18, 6)
    assert best["speedup"] == {"value": 4.0, "low": pytest.approx(4.0), "high": pytest.approx(4.0)}
    assert best["memory"] == {"peak_bytes": 60_000_000, "idle_bytes": 36_000_000}
    assert best["metrics"] == {"accuracy": 92.6, "top5": pytest.approx(96.3)}


def test_json_must_say_null_for_what_was_not_measured(report):
    broken = to_json(report)["files"][-1]
    assert [broken[key] for key in ("metrics", "drop", "latency", "memory", "speedup", "parity")] == [None] * 6
    odd = dataclasses.replace(report.files[2], metrics={"accuracy": 92.7, "loss": math.nan})
    assert to_json(dataclasses.replace(report, files=(odd,)))["files"][0]["metrics"] == {"accuracy": 92.7, "loss": None}


# ---- files


def test_write_must_leave_report_page_and_samples(report, tmp_path):
    path = write(report, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.json"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "samples.json"]
    samples = json.loads((path.parent / "samples.json").read_text())["files"]
    assert len(samples) == 5
    assert samples[0]["rounds_ns"][0] == [1_999_990, 2_000_000, 2_000_010]
    assert json.loads(path.read_text())["files"][0]["path"] == "../../original.onnx"


def test_write_must_leave_the_old_report_whole_when_it_fails(report, tmp_path, monkeypatch):
    write(report, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module.os, "replace", full)
    with pytest.raises(FileError, match=r"Cannot write the report into .*: No space left on device"):
        write(dataclasses.replace(report, task="other"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_write_must_refuse_a_folder_that_is_a_file(report, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileError, match="Cannot write the report into"):
        write(report, tmp_path / "taken")


# ---- the page


def test_page_must_be_self_contained_and_well_formed(report):
    html = render(to_json(report))
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import|//\w", html.replace("<!doctype html>", ""))
    assert page.addresses == [f.name for f in report.files]
    assert "Deploy pressed.tflite: 4.00× faster and 9.00× smaller, for 0.80 points of accuracy." in page.text


def test_page_must_escape_every_text_that_comes_from_outside(report, tmp_path):
    best = dataclasses.replace(
        report.best, verdict=EVIL, artifact=dataclasses.replace(report.best.artifact, path=tmp_path / EVIL)
    )
    evil = dataclasses.replace(
        report,
        task=EVIL,
        metric=EVIL,
        files=(report.files[0], best),
        layers=(Layer(EVIL, EVIL, 4, 2),),
        passes=({"pass": EVIL, EVIL: EVIL},),
        environment={EVIL: EVIL, "cpu": EVIL},
        warnings=(EVIL,),
        seconds={EVIL: 1.0},
        original={"metrics": {EVIL: 93.4}},
    )
    page = Page(render(to_json(evil)))
    assert "script" not in page.tags
    assert page.open == []
    assert page.text.count(EVIL) > 8


def test_page_must_not_show_what_was_not_measured(report):
    bare = dataclasses.replace(report.files[3], measurement=None, speedup=None, metrics=None, drop=None)
    page = Page(render(to_json(dataclasses.replace(report, files=(bare,), layers=(), passes=(), original={}))))
    assert page.text.count("not measured") >= 4
    assert "circle" not in page.tags
    assert not re.search(r"\bNone\b|\bnan\b", page.text)
    assert "Not shown, because not measured: broken.tflite" in Page(render(to_json(report))).text


def test_page_must_say_when_nothing_was_accepted_and_show_warnings(report):
    rejected = dataclasses.replace(without_accepted(report), warnings=("The machine was too noisy.",), decided_on="validate")
    page = Page(render(to_json(rejected)))
    assert "Not accepted" in page.text
    assert "No file was accepted. The closest, greedy.tflite: accuracy dropped 3.40 points" in page.text
    assert "The machine was too noisy." in page.text
    assert "judged on the task's validation data" in page.text


def test_page_must_be_made_from_a_report_that_was_read_back(report, tmp_path):
    path = write(report, tmp_path)
    assert render(json.loads(path.read_text())) == (tmp_path / "report.html").read_text()


# ---- the plots


def circles(svg):
    found = re.findall(r'<circle class="dot ([^"]+)" cx="([\d.-]+)" cy="([\d.-]+)" r="([\d.]+)"><title>([^:]+):', svg)
    return {label: (kind, float(x), float(y), float(r)) for kind, x, y, r, label in found}


def test_scatter_must_place_by_time_and_metric_with_area_by_size():
    dots = [Dot("a", 4e6, 93, 400, "onnx", "original"), Dot("b", 1e6, 92, 100, "tflite", "accepted")]
    found = circles(scatter(dots, "accuracy", reference=93, max_drop=2, baseline_ns=4e6))
    assert found["a"][1] > found["b"][1]
    assert found["a"][2] < found["b"][2]  # pixels count downwards
    assert found["a"][3] == pytest.approx(2 * found["b"][3], abs=0.1)
    assert found["b"][0] == "tflite accepted"


def test_scatter_must_turn_the_axis_round_where_lower_is_better():
    dots = [Dot("good", 1e6, 0.1, 9, "onnx", "accepted"), Dot("bad", 1e6, 0.2, 9, "onnx", "rejected")]
    found = circles(scatter(dots, "error", reference=0.1, max_drop=0.2, higher_is_better=False))
    assert found["good"][2] < found["bad"][2]


def test_scatter_must_use_a_logarithmic_axis_only_for_a_wide_range():
    near = [Dot("a", 1e6, 93, 9, "onnx", "accepted"), Dot("b", 9e6, 93, 9, "onnx", "accepted")]
    assert "logarithmic" not in scatter(near, "accuracy")
    assert "logarithmic" in scatter([*near, Dot("c", 1e5, 93, 9, "onnx", "accepted")], "accuracy")


def test_scatter_must_not_let_one_collapsed_file_flatten_the_rest():
    dots = [Dot("a", 1e6, 93.0, 9, "onnx", "accepted"), Dot("b", 2e6, 92.5, 9, "onnx", "accepted")]
    svg = scatter([*dots, Dot("ruin", 1e6, 10.0, 9, "onnx", "rejected")], "accuracy", reference=93.2, max_drop=1.0)
    found = circles(svg)
    assert found["b"][2] - found["a"][2] > 50
    assert found["ruin"][2] > found["b"][2]
    assert "ruin · 10.00, off scale" in svg


@pytest.mark.parametrize("count", [1, 4, 10])
def test_scatter_labels_must_not_overlap(count):
    dots = [
        Dot(f"network_{i}_int8.tflite", 1e6 + 2e4 * i, 92 + 0.05 * (i % 3), 100 + 50 * i, "tflite", "accepted")
        for i in range(count)
    ]
    svg = scatter(dots, "accuracy", reference=93, max_drop=2, baseline_ns=2e6)
    boxes = []
    for x, y, anchor, text in re.findall(r'<text class="label" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]+)', svg):
        width = 6.0 * len(text)
        left = float(x) - (width if anchor == "end" else 0)
        boxes.append((left, float(y) - 11, left + width, float(y) + 3))
    assert len(boxes) == count
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= 1040
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("value", [0.0, 93.0, -5.0])
def test_scatter_must_bear_files_that_are_all_alike(value):
    svg = scatter([Dot("a", 1e6, value, 0, "onnx", "accepted")] * 2, "accuracy", reference=value, max_drop=0.0)
    assert "nan" not in svg
    assert "inf" not in svg
    assert scatter([], "accuracy") == scatter([Dot("a", 1e6, math.nan, 9, "onnx", "accepted")], "accuracy") == ""


def test_bars_must_show_before_and_after_and_mark_what_is_gone():
    svg = bars([("kept", 64, 64), ("cut", 64, 16), ("gone", 64, 0)])
    assert re.findall(r'<g class="(\w+)"><title>([^<]+)', svg) == [
        ("same", "kept: 64 channels, 64"),
        ("cut", "cut: 64 channels, 16"),
        ("gone", "gone: 64 channels, gone"),
    ]
    widths = [float(w) for w in re.findall(r'class="after"[^>]* width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1)
    assert widths[2] == 0


def test_bars_must_keep_long_names_apart_by_their_numbers():
    svg = bars([(f"encoder.layers.{i}.attention.self.output_projection", 768, 512) for i in range(60)])
    shown = re.findall(r'class="layer"[^>]*>([^<]+)<', svg)
    assert len(set(shown)) == 60


# ---- the terminal


def test_table_must_fit_eighty_columns_and_name_the_recommended_file(report):
    shown = text_of(table(report))
    assert max(map(len, shown.splitlines())) <= 80
    assert "Recommended: pressed.tflite" in shown
    assert re.search(r"pressed\.tflite +400 kB +92\.60 +0\.80 +0\.500 ms +4\.00× ±0\.00 +accepted", shown)
    assert re.search(r"original\.onnx .* baseline +original", shown)
    assert "greedy.tflite: accuracy dropped 3.40 points" in shown
    assert re.search(r"broken\.tflite +410 kB +– +– +– +– +rejected", shown)


def test_table_must_not_read_names_as_markup(report, tmp_path):
    name = "[bold]x.onnx"
    odd = dataclasses.replace(report.best, artifact=dataclasses.replace(report.best.artifact, path=tmp_path / name))
    assert name in text_of(table(dataclasses.replace(report, files=(odd,), warnings=("[red]hot",))), 120)


def test_bench_table_must_say_what_cannot_be_told_apart(report):
    ratios = [Ratio(1, 1, 1), Ratio(1.01, 0.9, 1.1), Ratio(3.3, 3.2, 3.4)]
    files = zip(report.files[:3], ratios, [None, None, {"accuracy": 93.5}], [None, None, 0.0], strict=True)
    rows = [Benched(f.artifact, f.measurement, r, metrics, apart) for f, r, metrics, apart in files]
    shown = text_of(bench_table([*rows, Benched(report.files[0].artifact, error="it broke")]), 140)
    assert "93.5" in shown
    assert shown.count(report.files[0].artifact.path.name) > 1
    assert "Cannot tell which is faster: original.onnx or original.tflite." in shown
    assert "3.30× ±0.10" in shown
    assert "6 interleaved rounds" in shown
