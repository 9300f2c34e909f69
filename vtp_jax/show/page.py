"""The page of a report: a run's record -> one HTML document with everything inside it."""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import io
import json
import platform
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from vtp_jax.run import metrics, paths
from vtp_jax.run.evaluations import Evaluation
from vtp_jax.show import numbers
from vtp_jax.show.numbers import LOSSES, WAYS
from vtp_jax.show.record import Points, Record, Series, Steps
from vtp_jax.types import UserError

PACKAGES = (
    *("vtp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow"),
    *("tensorflow-cpu", "av", "sentencepiece", "tokenizers", "pillow"),
)
TYPES = {".png": "image/png", ".webp": "image/webp", ".gif": "image/gif", ".svg": "image/svg+xml"}
COLORS = ("#1f5fbf", "#c2571a", "#2b8a57", "#8a5ab5", "#7a6a2f", "#b0356b")
RECALL = re.compile(r"(t2v|v2t)_r(\d+)")
UNKNOWN = "The protocol was not recorded: the run was evaluated by an older version."
# Numbers that are shown as tiles, and those that they are compared with.
HEADLINES = (
    "t2v_r1",
    "v2t_r1",
    "match_accuracy",
    "top1",
    "knn1",
    "f1",
    "restored_db",
    "words_right",
)
PARTS = {  # of run/goodput.py, in words
    "step": "training steps",
    "start": "start: lists, restoring, making the state",
    "compile": "compiling",
    "data": "waiting for data",
    "evaluate": "evaluating",
    "save": "saving",
    "lost": "lost: steps done again after a restart",
    "between": "between processes",
}
AGAINST = {"knn1": "chance", "restored_db": "interpolated_db"}


def page(record: Record, label: str) -> str:
    """The whole document. label: a word or two next to the title."""
    name = title_of(record.config)
    first, others = reconstructions(record)
    sections = {
        "Restored videos": first,
        "Evaluations": evaluation_tables(record),
        "Losses": loss_curves(record),
        "Evaluations over time": evaluation_curves(record),
        "More restored videos": others,
        "What captions find": gallery(record),
        "Time": timings(record),
        "Other curves": other_curves(record),
        "Settings": settings(record),
    }
    folder = paths.absolute(record.folder).name
    optional = {"More restored videos"}  # than the first
    absent = [title for title, body in sections.items() if not body and title not in optional]
    body = "".join(
        f'<section id="{slug(title)}"><h2>{escape(title)}</h2>{text}</section>'
        for title, text in sections.items()
        if text
    )
    links = "".join(
        f'<a href="#{slug(title)}">{escape(title)}</a>' for title in sections if sections[title]
    )
    tag = f'<span class="tag">{escape(label)}</span>' if label else ""
    note = (
        f'<p class="soft">Not in this report, because the run wrote nothing for it: '
        f"{escape(', '.join(absent))}.</p>"
        if absent
        else ""
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: {escape(folder)}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{escape(name)} <small>{escape(folder)}</small>{tag}</h1>"
        f"{progress(record.steps)}<nav>{links}</nav></header>"
        f"<main>{headline(record)}{body}{note}</main></body></html>\n"
    )


# Sections. Each returns HTML, or "" if the run has nothing for it.


def progress(steps: Steps) -> str:
    """How far the run is: a run that was stopped never looks finished."""
    if steps.done is None or steps.asked is None:
        return ""
    if steps.finished:
        return f'<p class="soft">{steps.done:,} steps: finished.</p>'
    text = "The same command goes on from the newest checkpoint"
    text += f", of step {steps.saved:,}." if steps.saved is not None else ", but there is none."
    return (
        f'<p class="stopped"><b>{steps.done:,} of {steps.asked:,} steps.</b> '
        f"This run is not finished: every number below is of an unfinished net. {text}</p>"
    )


def headline(record: Record) -> str:
    """The most important numbers, as tiles, each with the step and the stream that it is of."""
    tiles = []
    shown: set[str] = set()
    for one in record.series:  # those of training come first
        if one.subject.evaluator in shown:
            continue
        shown.add(one.subject.evaluator)
        last = one.last
        of = f"{one.subject.stream or one.subject.evaluator}, step {last.step:,}"
        for name in HEADLINES:
            if name in last.numbers:
                against = compared(last, name)
                tiles.append(
                    (numbers.text(name, last.numbers[name]), numbers.title(name), f"{of}{against}")
                )
    for key in list(LOSSES)[1:]:
        if found := record.last(f"train/{key}"):
            step, value = found
            tiles.append(
                (metrics.number(value), f"loss, {LOSSES[key]}", f"training, step {step:,}")
            )
    if speeds := [value for _, value in record.curves.get("train/clips_per_s", [])]:
        tiles.append((metrics.number(statistics.median(speeds)), "clips a second", "median"))
    if (total := record.summary.get("seconds_total")) is not None:
        tiles.append((numbers.seconds(float(total)), "in all", "every stage"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span>'
        f"<i>{escape(of)}</i></div>"
        for value, text, of in tiles
    )
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def compared(one: Evaluation, name: str) -> str:
    """What a number of an evaluation is to be compared with, in words."""
    if (against := AGAINST.get(name, "")) in one.numbers:
        words = "chance" if against == "chance" else "interpolated"
        return f", {words} {numbers.text(name, one.numbers[against])}"
    if RECALL.fullmatch(name) and (size := one.numbers.get("n_videos")):
        return f", chance {numbers.text(name, 1 / size)}"
    return ""


def evaluation_tables(record: Record) -> str:
    """What was evaluated: the newest numbers of each set, with their step and protocol."""
    found = "".join(
        f'<article><h3>{escape(label(one, record.series))}</h3><p class="soft">'
        f"{escape(described(one.last, record))}</p>{last_numbers(one.last)}"
        f'<p class="soft">{escape(one.subject.protocol or UNKNOWN)}</p>{history(one, record)}'
        "</article>"
        for one in record.series
    )
    if record.replaced:
        found += (
            f'<p class="soft">{record.replaced} evaluations are left out: training went back to an '
            "older checkpoint and replaced the weights that they are of.</p>"
        )
    return found


def label(one: Series, among: Sequence[Series]) -> str:
    """The name of an evaluator, with its stream and set where they are known, and with more where
    several have the same."""
    of = one.subject
    where = ", ".join(filter(None, [of.set, of.split]))
    on = (f" on {of.stream}" if of.stream != of.evaluator else "") + (f": {where}" if where else "")
    name = of.evaluator + on
    same = [
        x
        for x in among
        if (x.subject.evaluator, x.subject.stream, x.subject.set, x.subject.split)
        == (of.evaluator, of.stream, of.set, of.split)
    ]
    return name if len(same) == 1 else f"{name} ({same.index(one) + 1} of {len(same)})"


def described(one: Evaluation, record: Record) -> str:
    """Step, checkpoint, time and command of an evaluation."""
    kept = one.checkpoint and (record.folder / one.checkpoint).exists()
    parts = [
        f"Step {one.step:,}",
        f"kept in {one.checkpoint}" if kept else "no checkpoint of this step is kept",
        f"evaluated by {one.by}" if one.by else "",
        moment(one.time),
    ]
    return ", ".join(filter(None, parts)) + "."


def moment(time: float) -> str:
    at = datetime.datetime.fromtimestamp(time, datetime.UTC)
    return at.strftime("%Y-%m-%d %H:%M UTC") if time else ""


def last_numbers(one: Evaluation) -> str:
    """The numbers of one evaluation: recalls both ways, pairs with and without the other modality,
    the others, and the counts in words."""
    found, left = "", dict(one.numbers)
    ks = sorted({int(m[2]) for name in left if (m := RECALL.fullmatch(name))})
    if ks:
        found += recall_table(one, ks)
        left = {name: v for name, v in left.items() if not name.startswith(("t2v_", "v2t_"))}
    if pairs := numbers.pairs(list(left)):
        rows = [
            [
                f"{numbers.title(name)} (the other: {other})",
                numbers.text(name, one.numbers[name]),
                numbers.text(name, one.numbers[without]),
                numbers.difference(name, one.numbers[name] - one.numbers[without]),
            ]
            for name, without, other in pairs
        ]
        found += table(["", "with the other modality", "without it", "difference"], rows)
        left = {name: v for name, v in left.items() if not any(name in (p[0], p[1]) for p in pairs)}
    counts = {name: left.pop(name) for name in list(left) if name.startswith("n_")}
    if left:
        found += table(["", ""], [[numbers.title(k), numbers.text(k, v)] for k, v in left.items()])
    text = ", ".join(f"{v:,.0f} {numbers.title(name)}" for name, v in counts.items())
    return found + (f'<p class="soft">{escape(text)}.</p>' if text else "")


def recall_table(one: Evaluation, ks: Sequence[int]) -> str:
    """R@k both ways, with chance."""
    names = [*(f"r{k}" for k in ks), "gmean", "mdr", "mnr"]
    columns = [*(f"R@{k}" for k in ks), "gmean", "median rank", "mean rank"]
    rows = []
    for way, text in WAYS.items():
        keys = [f"{way}_{name}" for name in names]
        cells = [numbers.text(key, one.numbers[key]) if key in one.numbers else "" for key in keys]
        if any(cells):
            rows.append([text, *cells])
    if size := one.numbers.get("n_videos"):
        # With several captions a video, chance differs between the ways.
        same = one.numbers.get("n_captions", size) == size
        shares = [numbers.text(f"r{k}", min(1.0, k / size)) for k in ks]
        rows.append(["chance" if same else f"chance, {WAYS['t2v']}", *shares, "", "", ""])
    return table(["", *columns], rows)


def history(one: Series, record: Record) -> str:
    """All evaluations of a series, if there are several."""
    if len(one.evaluations) < 2:
        return ""
    names = [name for name in HEADLINES if name in one.names]
    names = names or [name for name in one.names if not name.startswith("n_")][:6]
    rows = [
        [
            f"{e.step:,}",
            *(numbers.text(n, e.numbers[n]) if n in e.numbers else "" for n in names),
            "kept" if e.checkpoint and (record.folder / e.checkpoint).exists() else "",
            e.by,
            moment(e.time),
        ]
        for e in reversed(one.evaluations)
    ]
    head = ["step", *map(numbers.title, names), "checkpoint", "by", "time"]
    return (
        f"<details><summary>All {len(rows)} evaluations of this kind</summary>"
        f"{table(head, rows)}</details>"
    )


def loss_curves(record: Record) -> str:
    """One chart per loss term: training, and validation if it was measured."""
    names = [k.removeprefix("train/") for k in record.curves if k.startswith("train/loss")]
    charts = []
    for name in sorted(names, key=lambda n: [*LOSSES, n].index(n)):
        lines = {"training": record.curves[f"train/{name}"]}
        for one in record.series:
            if points := one.curve(name):
                lines[label(one, record.series)] = points
        charts.append(chart(LOSSES.get(name, name), lines))
    return grid(charts)


def evaluation_curves(record: Record) -> str:
    """The numbers of every series with several steps, those of one unit in one chart."""
    charts = []
    for one in record.series:
        if len({e.step for e in one.evaluations}) < 2:
            continue
        name = label(one, record.series)
        ways = {way: [n for n in one.names if n.startswith(f"{way}_r")] for way in WAYS}
        size = one.last.numbers.get("n_videos")
        for way, keys in ways.items():
            lines = {numbers.title(k.removeprefix(f"{way}_")): in_units(one, k) for k in keys}
            level = {"chance of R@1": 100 / size} if size and "R@1" in lines else {}
            if lines:
                charts.append(chart(f"{name}\n{WAYS[way]}, %", lines, level, top=100.0))
        rest = [n for n in one.names if not n.startswith(("t2v_", "v2t_", "n_", "loss"))]
        for unit in dict.fromkeys(map(numbers.unit, rest)):
            lines = {numbers.title(n): in_units(one, n) for n in rest if numbers.unit(n) == unit}
            top = 100.0 if unit == "%" else None
            charts.append(chart(f"{name}" + (f", {unit}" if unit else ""), lines, top=top))
    return grid(charts)


def in_units(one: Series, name: str) -> Points:
    """A curve in the unit of its number."""
    scale = 100 if numbers.unit(name) == "%" else 1
    return [(step, scale * value) for step, value in one.curve(name)]


def reconstructions(record: Record) -> tuple[str, str]:
    """Storyboards and animations, with the statistics used to make them: of the first clip, with
    which the report opens, and of the others."""
    figures = []
    for one in record.pictures.get("reconstructions", []):
        board, moving = picture(record, one["picture"]), picture(record, one["animation"])
        said = f"{one['words_right']} of {one['words_hidden']} hidden words correct"
        text = f"{one['title']}: {said}" if one["words_hidden"] else str(one["title"])
        figures.append(
            f'<figure><div class="scroll board">{image(board, text)}</div>'
            f"{image(moving, text + ', moving')}"
            f"<figcaption>{escape(text)}</figcaption></figure>"
        )
    if not figures:
        return "", ""
    note = (
        f"{drawn(record)}Statistics: {record.pictures['statistics']} ({record.pictures['note']})."
    )
    return f'<p class="soft">{escape(note)}</p>{figures[0]}', "".join(figures[1:])


def drawn(record: Record) -> str:
    """What the pictures are of, if they say so."""
    index = record.pictures
    return f"Step {index['step']:,}, '{index['stream']}'. " if "step" in index else ""


def gallery(record: Record) -> str:
    """The videos retrieved for single captions; failures come first."""
    shown = record.pictures.get("retrieval", [])
    if not shown:
        return ""
    failed = sum(one["rank"] > 1 for one in shown)
    note = drawn(record) + (
        f"{failed} of the {len(shown)} captions shown do not retrieve their video first; these "
        "are listed first, the worst ahead. The correct video is framed in green; scores are "
        "cosines."
    )
    images = "".join(
        f"<figure>{image(picture(record, one['picture']), one['caption'])}</figure>"
        for one in shown
    )
    return f'<p class="soft">{escape(note)}</p><div class="grid wide">{images}</div>'


def timings(record: Record) -> str:
    """Where the time went: of the training by kind, over all restarts, and of the demo by stage."""
    found = ""
    if (spent := record.spent) and spent.whole:
        seconds = {k: spent.parts[k] for k in [*PARTS, *spent.parts] if k in spent.parts}
        found += "<h3>Training</h3>" + bars(seconds, PARTS, spent.whole)
        lives = f"{spent.lives} processes" if spent.lives > 1 else "one process"
        found += (
            f'<p class="soft">Wall time of {lives}. Goodput, the share of steps that count: '
            f"{100 * spent.goodput:.1f} %.</p>"
        )
    stages = {str(k): float(v) for k, v in (record.summary.get("seconds") or {}).items()}
    if stages:
        found += "<h3>Stages</h3>" if found else ""
        found += bars(
            stages, total=float(record.summary.get("seconds_total", sum(stages.values())))
        )
    return found


def bars(
    seconds: Mapping[str, float], words: Mapping[str, str] = {}, total: float | None = None
) -> str:
    """One bar of all parts, and a table of them that sums to the whole."""
    whole = sum(seconds.values()) if total is None else float(total)
    shares = {k: 100 * v / whole if whole else 0.0 for k, v in seconds.items()}
    colors = dict(zip(seconds, COLORS * len(seconds), strict=False))
    bar = "".join(f'<i style="width:{shares[k]:.3f}%;background:{colors[k]}"></i>' for k in seconds)
    rows = "".join(
        f'<tr><td><i class="key" style="background:{colors[k]}"></i>'
        f"{escape(words.get(k, k))}</td><td>{escape(numbers.seconds(v))}</td>"
        f"<td>{shares[k]:.1f} %</td></tr>"
        for k, v in seconds.items()
    )
    foot = f"<tr><th>in all</th><th>{escape(numbers.seconds(whole))}</th><th></th></tr>"
    return f'<div class="bar">{bar}</div><div class="scroll"><table>{rows}{foot}</table></div>'


def other_curves(record: Record) -> str:
    """All other training curves, except the data counts."""
    names = [
        key
        for key in record.curves
        if key.startswith("train/") and not key.startswith("train/loss")
    ]
    return grid([chart(key.removeprefix("train/"), {key: record.curves[key]}) for key in names])


def settings(record: Record) -> str:
    """Rows read, the resolved config, the table of parameters and versions."""
    rows: list[list[Any]] = []
    for key in record.curves:
        if key.startswith("data/") and (found := record.last(key)):
            name = key.removeprefix("data/")
            words = "rows read" if name == "rows" else f"rows {name.replace('failed/', 'failed: ')}"
            rows.append([f"{words}, up to step {found[0]:,}", f"{found[1]:,.0f}"])
    body = table(["", ""], rows) if rows else ""
    body += "<h3>Where this report was written</h3>" + table(["", ""], list(versions()))
    if record.config:
        text = json.dumps(record.config, indent=2, sort_keys=True)
        body += f"<details><summary>Resolved config</summary><pre>{escape(text)}</pre></details>"
    if record.parameters:
        text = escape(record.parameters)
        body += f"<details><summary>Parameters</summary><pre>{text}</pre></details>"
    return body


# Parts.


def title_of(config: Mapping[str, Any]) -> str:
    """The method of a run, and its task."""
    names = [(config.get(section) or {}).get("name") for section in ("method", "task")]
    return " + ".join(map(str, filter(None, names))) or "run"


def versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; the first column is text, the others are numbers."""
    top = "".join(f"<th>{escape(str(c))}</th>" for c in head)
    top = f"<tr>{top}</tr>" if any(head) else ""
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape(c if isinstance(c, str) else metrics.number(c))}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def grid(charts: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def chart(
    title: str,
    lines: Mapping[str, Points],
    levels: Mapping[str, float] | None = None,
    top: float | None = None,
) -> str:
    """An SVG chart of lines over steps, and dotted levels. `top` fixes the axis to 0..top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.8, 3.0), layout="constrained")
    for (name, points), color in zip(lines.items(), COLORS * len(lines), strict=False):
        mark = "o" if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), label=name, color=color, marker=mark, markersize=3)
    for name, level in (levels or {}).items():
        axes.axhline(level, label=name, color="#555", linestyle=":", linewidth=2)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if top is not None:
        axes.set_ylim(0, top * 1.02)
    if len(lines) + len(levels or {}) > 1:
        axes.legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return f'<figure class="chart">{image(uri(out.getvalue(), ".svg"), title)}</figure>'


def picture(record: Record, name: str) -> str:
    """A file of pictures/ as a data URI. Raises UserError if it is absent."""
    path = record.folder / "pictures" / name
    if not path.exists():
        raise UserError(
            f"pictures/index.json names '{name}', which is absent; run `vtp visualize` again"
        )
    return uri(path.read_bytes(), path.suffix)


def uri(data: bytes, suffix: str) -> str:
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(data).decode()}"


def image(source: str, text: str) -> str:
    return f'<img src="{source}" alt="{escape(text)}" decoding="async">'


STYLE = """
:root{color-scheme:light;--ink:#1c2024;--soft:#5d666f;--line:#dfe3e8;--blue:#1f5fbf}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header,main{max-width:1200px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:28px;margin:0 0 8px}h1 small{color:var(--soft);font-weight:400;font-size:20px}
h2{font-size:20px;margin:0 0 12px}h3{font-size:16px;margin:12px 0 6px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-bottom:18px}
nav a{color:var(--blue);text-decoration:none}nav a:hover{text-decoration:underline}
.tag{font-size:14px;background:#fbe3c8;color:#6b3a00;border-radius:4px;padding:3px 9px;
margin-left:12px;vertical-align:middle}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:18px 20px;
margin:0 0 18px}
.soft{color:var(--soft);font-size:14px;margin:6px 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-bottom:18px}
.tile{background:#fff;border:1px solid var(--line);border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:22px;line-height:1.4;white-space:nowrap}
.tile span{display:block;font-size:14px}
.tile i{font-style:normal;color:var(--soft);font-size:13px}
.stopped{background:#fbe3c8;color:#6b3a00;border-radius:6px;padding:10px 14px;margin:0 0 12px}
article{margin:0 0 22px}article+article{border-top:1px solid var(--line);padding-top:8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 14px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:8em}
@media(max-width:600px){section{padding:14px}th,td{padding:5px 8px}header,main{padding:0 10px}}
th{font-weight:600;font-size:14px}
.bar{display:flex;height:26px;border-radius:4px;overflow:hidden;margin:4px 0 10px}
.bar i{display:block}
.key{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:8px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:12px}
.grid.wide{grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr))}
figure{margin:0 0 18px}figure.chart{margin:0}
figure img{display:block;max-width:100%;height:auto;margin-bottom:6px}
.chart img{width:100%;max-width:520px}
.scroll.board img{min-width:860px}.scroll>img{min-width:480px}
figcaption{color:var(--soft);font-size:14px}
details{margin-top:12px}summary{cursor:pointer;color:var(--blue)}
pre{overflow:auto;max-height:480px;background:#f6f7f9;border:1px solid var(--line);
border-radius:6px;padding:12px;font-size:13px}
"""
