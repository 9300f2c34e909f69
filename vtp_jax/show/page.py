"""The page of a report: a run's record -> one HTML document with everything inside it."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from vtp_jax.run import metrics
from vtp_jax.show.record import Points, Record
from vtp_jax.types import UserError

PACKAGES = (
    *("vtp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow"),
    *("tensorflow-cpu", "av", "sentencepiece", "tokenizers", "pillow"),
)
TYPES = {".png": "image/png", ".webp": "image/webp", ".gif": "image/gif", ".svg": "image/svg+xml"}
COLORS = ("#1f5fbf", "#c2571a", "#2b8a57", "#8a5ab5", "#7a6a2f", "#b0356b")
LOSSES = {
    "loss": "total",
    "loss_video": "video: hidden cubes",
    "loss_text": "text: hidden words",
    "loss_vtc": "contrast (VTC)",
    "loss_vtm": "matching (VTM)",
}
RECALL = re.compile(r"eval/(.+)/(t2v|v2t)_r(\d+)")


def page(record: Record, label: str) -> str:
    """The whole document. label: a word or two next to the title."""
    name = str(record.config.get("method", {}).get("name", "")) or "run"
    sections = {
        "Retrieval": retrieval_table(record),
        "Losses": loss_curves(record),
        "Retrieval over time": recall_curves(record),
        "Restored videos": reconstructions(record),
        "What captions find": gallery(record),
        "Time": timings(record),
        "Other curves": other_curves(record),
        "Settings": settings(record),
    }
    absent = [title for title, body in sections.items() if not body]
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
        f"<title>{escape(name)}: {escape(record.folder.name)}</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{escape(name)} <small>{escape(record.folder.name)}</small>{tag}</h1>"
        f"<nav>{links}</nav></header><main>{headline(record)}{body}{note}</main></body></html>\n"
    )


# Sections. Each returns HTML, or "" if the run has nothing for it.


def headline(record: Record) -> str:
    """The most important numbers, as tiles."""
    tiles = []
    for way, text in (("t2v", "captions find videos"), ("v2t", "videos find captions")):
        value = record.summary.get(f"{way}_r1", last_recall(record, way, 1))
        if value is not None:
            size = chance(record)
            against = f", chance {percent(1 / size)}" if size else ""
            tiles.append((percent(value), f"R@1, {text}{against}"))
    for key in list(LOSSES)[1:]:
        value = record.summary.get(key, record.last(f"train/{key}"))
        if value is not None:
            tiles.append((metrics.number(value), f"loss, {LOSSES[key]}"))
    speed = record.summary.get("clips_per_s", record.last("train/clips_per_s"))
    if speed is not None:
        tiles.append((metrics.number(speed), "clips a second"))
    if (total := record.summary.get("seconds_total")) is not None:
        tiles.append((metrics.duration(float(total)), "minutes in total"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in tiles
    )
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def retrieval_table(record: Record) -> str:
    """The last numbers of every retrieval evaluator, both ways, and its protocol."""
    found = ""
    for name in evaluators(record):
        of = {
            k.split("/")[-1]: v
            for k in record.curves
            if (v := record.last(k)) is not None and k.startswith(f"eval/{name}/")
        }
        ks = recalls(record, name)
        columns = [f"R@{k}" for k in ks] + ["gmean", "MdR", "MnR"]
        keys = [f"r{k}" for k in ks] + ["gmean", "mdr", "mnr"]
        rows = []
        for way, text in (("t2v", "caption to video"), ("v2t", "video to caption")):
            cells = [
                ""
                if (v := of.get(f"{way}_{key}")) is None
                else metrics.number(v)
                if key in ("mdr", "mnr")
                else percent(v)
                for key in keys
            ]
            rows.append([text, *cells])
        size = chance(record, name)
        if size:
            rows.append(["chance", *[percent(min(1.0, k / size)) for k in ks], "", "", ""])
        counts = [
            f"{metrics.number(of[key])} {text}"
            for key, text in (
                ("n_videos", "videos"),
                ("n_captions", "captions"),
                ("n_videos_left_out", "videos left out"),
                ("n_captions_left_out", "captions left out"),
            )
            if key in of
        ]
        rule = record.protocols.get(name, "")
        found += (
            f"<h3>{escape(name)}</h3>"
            + table(["", *columns], rows)
            + f'<p class="soft">{escape(", ".join(counts))}</p>'
            + (f'<p class="soft">{escape(rule)}</p>' if rule else "")
        )
    return found


def loss_curves(record: Record) -> str:
    """One chart per loss term: training, and validation if it was measured."""
    names = [k.removeprefix("train/") for k in record.curves if k.startswith("train/loss")]
    charts = []
    for name in sorted(names, key=lambda n: [*LOSSES, n].index(n)):
        lines = {"training": record.curves[f"train/{name}"]}
        for key, points in record.curves.items():
            if re.fullmatch(rf"eval/[^/]+/{name}", key):
                lines[key.split("/")[1]] = points
        charts.append(chart(LOSSES.get(name, name), lines))
    return grid(charts)


def recall_curves(record: Record) -> str:
    """R@k over steps with the chance level, one chart per direction."""
    charts = []
    for name in evaluators(record):
        size = chance(record, name)
        for way, text in (("t2v", "captions find videos"), ("v2t", "videos find captions")):
            lines = {
                f"R@{k}": [(s, 100 * v) for s, v in record.curves[f"eval/{name}/{way}_r{k}"]]
                for k in recalls(record, name)
                if f"eval/{name}/{way}_r{k}" in record.curves
            }
            level = {"chance of R@1": 100 / size} if size else {}
            charts.append(chart(f"{name}: {text}, %", lines, level, top=100.0))
    return grid(charts)


def reconstructions(record: Record) -> str:
    """Storyboards and animations, with the statistics used to make them."""
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
        return ""
    note = f"Statistics: {record.pictures['statistics']} ({record.pictures['note']})."
    return f'<p class="soft">{escape(note)}</p>' + "".join(figures)


def gallery(record: Record) -> str:
    """The videos retrieved for single captions; failures come first."""
    shown = record.pictures.get("retrieval", [])
    if not shown:
        return ""
    failed = sum(one["rank"] > 1 for one in shown)
    note = (
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
    """Seconds by stage as bars."""
    stages = record.summary.get("seconds") or {}
    if not stages:
        return ""
    longest = max(stages.values()) or 1
    whole = record.summary.get("seconds_total", sum(stages.values()))
    rows = "".join(
        f"<tr><td>{escape(str(stage))}</td><td>{escape(metrics.duration(float(value)))}</td>"
        f'<td class="bar"><i style="width:{100 * value / longest:.1f}%"></i></td></tr>'
        for stage, value in stages.items()
    )
    foot = f"<tr><th>total</th><th>{escape(metrics.duration(float(whole)))}</th><th></th></tr>"
    return f'<table class="bars">{rows}{foot}</table>'


def other_curves(record: Record) -> str:
    """All other training curves, except the data counts."""
    names = [
        key
        for key in record.curves
        if key.startswith("train/") and not key.startswith("train/loss")
    ]
    return grid([chart(key.removeprefix("train/"), {key: record.curves[key]}) for key in names])


def settings(record: Record) -> str:
    """Versions, rows read, the resolved config and the table of parameters."""
    rows: list[list[Any]] = [[name, version] for name, version in versions()]
    for key in record.curves:
        if key.startswith("data/"):
            name = key.removeprefix("data/")
            rows.append(["rows read" if name == "rows" else f"rows {name}", record.last(key)])
    body = table(["", ""], rows)
    if record.config:
        text = json.dumps(record.config, indent=2, sort_keys=True)
        body += f"<details><summary>Resolved config</summary><pre>{escape(text)}</pre></details>"
    if record.parameters:
        text = escape(record.parameters)
        body += f"<details><summary>Parameters</summary><pre>{text}</pre></details>"
    return body


# Parts.


def evaluators(record: Record) -> list[str]:
    """The names of the retrieval evaluators."""
    return sorted({m[1] for key in record.curves if (m := RECALL.fullmatch(key))})


def recalls(record: Record, name: str) -> list[int]:
    """The values of k for which an evaluator reports R@k."""
    found = (RECALL.fullmatch(key) for key in record.curves)
    return sorted({int(m[3]) for m in found if m and m[1] == name})


def last_recall(record: Record, way: str, k: int) -> float | None:
    """R@k of the first retrieval evaluator."""
    names = evaluators(record)
    return record.last(f"eval/{names[0]}/{way}_r{k}") if names else None


def chance(record: Record, name: str | None = None) -> float | None:
    """The number of videos to choose from, whose inverse is R@1 by chance."""
    names = [name] if name else evaluators(record)
    return record.last(f"eval/{names[0]}/n_videos") if names else None


def versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; the first column is text, the others are numbers."""
    top = "".join(f"<th>{escape(str(c))}</th>" for c in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape(c if isinstance(c, str) else metrics.number(c))}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


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
    return f'<img src="{source}" alt="{escape(text)}" loading="lazy">'


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
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:12px;
margin-bottom:18px}
.tile{background:#fff;border:1px solid var(--line);border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:24px;line-height:1.3}.tile span{color:var(--soft);font-size:14px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 14px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
th{font-weight:600;font-size:14px}
.bars{width:100%}.bars .bar{width:65%;padding-right:0}
.bar i{display:block;height:14px;background:var(--blue);border-radius:2px;min-width:1px}
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
