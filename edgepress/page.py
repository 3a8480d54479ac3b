"""``report.html``: the page of a run, made from the same plain values as ``report.json``.

One file without scripts that loads nothing; every text that comes from outside is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any
from urllib.parse import quote

from .plot import Dot, bars, scatter, shares
from .units import NOT_MEASURED, format_bytes, format_count, format_gain, format_metric, format_ms, format_points, format_times

__all__ = ["render"]

Document = Mapping[str, Any]


def render(document: Document) -> str:
    """The page for a report, as HTML.

    Args:
        document: what `edgepress.report.to_json` gives, or a ``report.json`` that was read back.
    """
    template = Template(resources.files("edgepress").joinpath("report.html").read_text(encoding="utf-8"))
    accepted = bool(document["accepted"])
    return template.substitute(
        title=f"{escape(document['task'])}: {'accepted' if accepted else 'not accepted'} · edgepress",
        pill=f'<span class="pill {"yes" if accepted else "no"}">{"Accepted" if accepted else "Not accepted"}</span>',
        eyebrow=escape(f"{document['task']} · measured on {document['environment'].get('cpu') or 'an unknown CPU'}"),
        headline=escape(_headline(document)),
        lead=escape(_lead(document)),
        tiles="".join(_tiles(document)),
        warnings=_warnings(document["warnings"]),
        scatter=_scatter(document),
        files=_files(document),
        layers=_layers(document["layers"]),
        profile=_profile(document.get("profile")),
        passes=_passes(document),
        environment=_environment(document),
        footer=escape(f"Made by edgepress {document['edgepress']} from report.json; raw samples are in samples.json."),
    )


# ---- the top of the page


def _subject(document: Document) -> dict[str, Any] | None:
    """The file that the top of the page is about: the recommended one, or the closest."""
    wanted = document["best"] or document["closest"]
    return next((f for f in document["files"] if wanted and f["path"] == wanted), None)


def _baseline(document: Document) -> dict[str, Any] | None:
    return next((f for f in document["files"] if _name(f) == document["baseline"]), None)


def _name(file: Mapping[str, Any]) -> str:
    return str(file["path"]).rpartition("/")[2]


def _headline(document: Document) -> str:
    file = _subject(document)
    if file is None:
        return "No file was accepted: none could be judged."
    if not document["best"]:
        reason = str(file["verdict"]).removeprefix("rejected: ").rstrip(".")
        return f"No file was accepted. The closest, {_name(file)}: {reason}."
    gains = [format_gain(file["smaller"], "smaller", "larger", "as large")]
    if speed := file["speedup"]:
        decided = speed["low"] > 1 or speed["high"] < 1
        gains.insert(0, format_gain(speed["value"], "faster", "slower", "as fast", decided=decided))
    text = f"Deploy {_name(file)}: {' and '.join(gains)}"
    drop = file["drop"]
    if drop is None:
        return f"{text}."
    lost = "no" if drop <= 0 else format_points(drop)
    return f"{text}, for {lost} points of {document['metric']}."


def _lead(document: Document) -> str:
    data = "the task's validation data" if document["decided_on"] == "validate" else "the task's evaluation data"
    budget = f"up to {format_points(document['max_drop'])} points of {document['metric']} may be lost, judged on {data}"
    text = f"Accepted is what meets the budget ({budget}) and is not slower than {document['baseline']}, the faster original."
    if document["decided_on"] == "validate":
        text += f" The {document['metric']} shown is of the evaluation data."
    return f"{text} All figures are of the exported files, run by their own runtimes."


def _tiles(document: Document) -> Iterable[str]:
    file, baseline = _subject(document) or {}, _baseline(document) or {}
    name, metric, original = document["metric"], document["metric"], document["original"]
    yield _tile(name, format_metric(_metric(file, metric)), _was(format_metric(_metric(original, metric))))
    yield _tile("median time", format_ms(_p50(file)), _was(format_ms(_p50(baseline))))
    speed = file.get("speedup")
    yield _tile("faster", format_times(speed["value"] if speed else None), _interval(speed))
    yield _tile("file size", format_bytes(file.get("bytes")), _was(format_bytes(baseline.get("bytes"))))
    yield _tile("peak memory", format_bytes(_peak(file)), _was(format_bytes(_peak(baseline))))
    if "macs" in document["compressed"]:
        macs = format_count(document["compressed"]["macs"])
        yield _tile("multiply-adds", macs, _was(format_count(original.get("macs"))))


def _tile(what: str, value: str, origin: str) -> str:
    kind = "value none" if value == NOT_MEASURED else "value"
    return (
        f'<div class="tile"><div class="what">{escape(what)}</div><div class="{kind}">{escape(value)}</div>'
        f'<div class="from">{escape(origin)}</div></div>'
    )


def _was(value: str) -> str:
    return f"original: {value}"


def _interval(speed: Mapping[str, float] | None) -> str:
    return f"95 %: {_between(speed)}" if speed else ""


def _between(speed: Mapping[str, float]) -> str:
    return f"{format_times(speed['low']).rstrip('×')} to {format_times(speed['high'])}"


def _metric(owner: Mapping[str, Any], metric: str) -> float | None:
    return (owner.get("metrics") or {}).get(metric)


def _p50(file: Mapping[str, Any]) -> float | None:
    return file["latency"]["p50_ns"] if file.get("latency") else None


def _peak(file: Mapping[str, Any]) -> float | None:
    return file["memory"]["peak_bytes"] if file.get("memory") else None


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(w)}</li>" for w in warnings)
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


# ---- the sections


def _section(title: str, about: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{body}</section>'


def _scatter(document: Document) -> str:
    metric, drawn, left_out = document["metric"], [], []
    for file in document["files"]:
        value, p50 = _metric(file, metric), _p50(file)
        if value is None or p50 is None:
            left_out.append(_name(file))
            continue
        state = "original" if file["original"] else "accepted" if file["accepted"] else "rejected"
        drawn.append(Dot(_name(file), p50, value, file["bytes"], file["format"], state))
    plot = scatter(
        drawn,
        metric,
        reference=_metric(document["original"], metric),
        max_drop=document["max_drop"],
        higher_is_better=document["higher_is_better"],
        baseline_ns=_p50(_baseline(document) or {}),
    )
    if not plot:
        return ""
    about = "Up is better, left is faster, small is smaller: the area of a marker is the size of the file."
    if left_out:
        about += f" Not shown, because not measured: {', '.join(left_out)}."
    return _section(f"{metric.capitalize()}, time and size", about, plot + _legend(drawn))


def _legend(dots: list[Dot]) -> str:
    names = {"onnx": "ONNX in ONNX Runtime", "tflite": "TFLite in LiteRT"}
    keys = [(f"{f} accepted", names.get(f, f)) for f in sorted({d.format for d in dots})]
    some = dots[0].format
    for state, text in (("rejected", "not accepted"), ("original", "original, fp32")):
        if any(d.state == state for d in dots):
            keys.append((f"{some} {state}", text))
    circles = "".join(
        f'<span><svg viewBox="0 0 18 18"><circle class="dot {escape(c)}" cx="9" cy="9" r="7"/></svg>{escape(t)}</span>'
        for c, t in keys
    )
    return f'<div class="legend">{circles}<span>shaded: within the budget and not slower</span></div>'


def _files(document: Document) -> str:
    metric = document["metric"]
    heads = ["file", metric, "drop", "p50", "p90", "p99", "faster", "size", "memory", "verdict"]
    head = "".join(f"<th{' class=words' if h == 'verdict' else ''}>{escape(h)}</th>" for h in heads)
    rows = "".join(_row(document, f) for f in document["files"])
    about = (
        "p50, p90 and p99 are milliseconds of one run; 'faster' is the baseline's median over the file's, with its 95 % "
        "interval; memory is the peak of a process of its own that loads and runs the file, Python included."
    )
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("Files", about, body)


def _row(document: Document, file: Mapping[str, Any]) -> str:
    latency = file["latency"] or {}
    kind = f"{file['format']} {file['precision']}"
    how = f"{kind} · {latency['runtime']} · {_threads(latency['threads'])}" if latency else kind
    drop = file["drop"]
    cells = [
        f'<td><a href="{escape(quote(file["path"]))}">{escape(_name(file))}</a><small>{escape(how)}</small></td>',
        _cell(format_metric(_metric(file, document["metric"]))),
        _cell(NOT_MEASURED if drop is None else ("−" if drop < 0 else "") + format_points(drop)),
        *(_cell(format_ms(latency.get(key)).removesuffix(" ms")) for key in ("p50_ns", "p90_ns", "p99_ns")),
        _faster(document, file),
        f"<td>{escape(format_bytes(file['bytes']))}<small>{escape(_size_gain(file))}</small></td>",
        _cell(format_bytes(_peak(file))),
        _verdict(file, latency),
    ]
    best = " class=best" if file["path"] == document["best"] else ""
    return f"<tr{best}>{''.join(cells)}</tr>"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _cell(text: str) -> str:
    return '<td class="none">–</td>' if text == NOT_MEASURED else f"<td>{escape(text)}</td>"


def _faster(document: Document, file: Mapping[str, Any]) -> str:
    if _name(file) == document["baseline"]:
        return '<td class="none">baseline</td>'
    speed = file["speedup"]
    if not speed:
        return _cell(NOT_MEASURED)
    return f"<td>{escape(format_times(speed['value']))}<small>{escape(_between(speed))}</small></td>"


def _size_gain(file: Mapping[str, Any]) -> str:
    gain = format_gain(file["smaller"], "smaller", "larger", "")
    packed = file.get("deflated_bytes")
    return gain if packed is None else f"{gain}{', ' if gain else ''}{format_bytes(packed)} deflated"


def _verdict(file: Mapping[str, Any], latency: Mapping[str, Any]) -> str:
    kind = "yes-text" if file["accepted"] else "none" if file["original"] else "no-text"
    small = f"<small>{escape(_parity(file['parity']))}</small>" if _parity(file["parity"]) else ""
    if file.get("sparse_speedup"):
        small += f"<small>{escape(file['sparse_speedup']['note'])}</small>"
    if latency.get("noise"):
        small += f'<small title="{escape(latency["noise"])}">noisy times</small>'
    return f'<td class="words"><span class="{kind}">{escape(file["verdict"])}</span>{small}</td>'


def _parity(parity: Mapping[str, Any] | None) -> str:
    if not parity or parity.get("max_abs") is None:
        return ""
    return f"outputs differ by {parity['max_abs']:.2g} at most"


def _layers(layers: list[dict[str, Any]]) -> str:
    if not layers:
        return ""
    gone = sum(layer["after"] == 0 for layer in layers)
    cut = sum(0 < layer["after"] < layer["before"] for layer in layers)
    about = f"Output channels of {len(layers)} layers: {cut} narrower, {gone} gone, {len(layers) - cut - gone} as they were."
    keys = (("before", "before"), ("after", "after"), ("gone", "layer is gone"))
    legend = "".join(
        f'<span><svg viewBox="0 0 18 18"><rect class="key {c}" x="1" y="4" width="16" height="10" rx="2"/></svg>{t}</span>'
        for c, t in keys
    )
    plot = bars([(layer["name"], layer["before"], layer["after"]) for layer in layers])
    return _section("Channels before and after", about, f'{plot}<div class="legend">{legend}</div>')


def _profile(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    about = f"One run of {found['file']}, by the runtime's own profiler, summed over modules: {found['covered']:.0%} of a run."
    if found["caution"]:
        about += f" To be read with care: {found['caution']}."
    return _section("Where the time goes", about, shares([(row["name"], row["ns"], row["share"]) for row in found["modules"]]))


def _passes(document: Document) -> str:
    if not document["passes"]:
        return ""
    items = []
    for entry in document["passes"]:
        facts = "".join(
            f"<div><dt>{escape(str(k))}</dt><dd><code>{escape(_short(v))}</code></dd></div>"
            for k, v in entry.items()
            if k != "pass"
        )
        items.append(f"<li><b>{escape(str(entry.get('pass', '?')))}</b><dl>{facts}</dl></li>")
    return _section("Passes", "What was done to the network, in this order.", f'<ol class="passes">{"".join(items)}</ol>')


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}… (see report.json)"


def _environment(document: Document) -> str:
    facts = {k: v for k, v in document["environment"].items() if v not in (None, "", [], {})}
    pairs = [(k.replace("_", " "), _fact(k, v)) for k, v in facts.items()]
    pairs += [(f"{stage} took", f"{seconds:.1f} s") for stage, seconds in document["seconds"].items()]
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    about = "What the times depend on: they hold for this machine and these versions."
    return _section("Environment", about, f'<dl class="facts">{items}</dl>')


def _fact(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
