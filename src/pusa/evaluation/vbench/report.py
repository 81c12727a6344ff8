"""Write the scores of a run as a page that needs no other file, beside what others have published, and as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pusa import zoo
from pusa.evaluation.page import render_page
from pusa.evaluation.runs import RunFolder
from pusa.evaluation.runs.files import write_json, write_whole
from pusa.evaluation.vbench.description import COMPARED, notes_on, totals_as_json
from pusa.evaluation.vbench.published import ROWS, SOURCE, Row
from pusa.evaluation.vbench.scored import Scored, items_of, read_scored
from pusa.evaluation.vbench.totals import DIMENSIONS, Interval, total_of
from pusa.media import MediaError, read_video
from pusa.media.previews import Strip, as_data_uri, spread, strip_sheet

TEMPLATE = Path(__file__).with_name("report.html")

_COLUMNS, _CELL_WIDTH = 4, 136  # frames of a clip, and pixels of each: the page shows a sheet 550 pixels wide
_HIDDEN_SETTINGS = ("prompt", "prompts", "conditions", "seed", "task", "metadata", "preset", "negative_prompt")
_RADIUS, _LABEL_RADIUS, _CENTER = 160.0, 180.0, (280.0, 225.0)  # of the radar, in units of its view box
_INNER = 0.12  # of the radius: where an axis begins, so that the lowest score is no point in the middle
_RINGS = 4


def collect(run: RunFolder, *, clips: int = 3) -> dict[str, Any]:
    """Collect what the report shows, as JSON; scores are in percent.

    Args:
        clips: of the best and of the worst ones of each dimension.

    Raises:
        ValueError: no dimension is scored.
    """
    scored = {name: found for name in DIMENSIONS if (found := read_scored(run, name)) is not None}
    if not scored:
        raise ValueError(f"{run.folder} has no scores: run pusa eval vbench score {run.folder}")
    scores = {name: 100 * found.score for name, found in scored.items()}
    return {
        "name": run.folder.absolute().name,
        "model": run.items[0].request.model,
        "videos": len(run.items),
        "prompts": len({item.labels["prompt"] for item in run.items}),
        "notes": [*_warnings(run, scored), *_notes(run)],
        "totals": totals_as_json(scores, total_of(scores)),
        "dimensions": [_dimension_facts(run, name, scored.get(name), clips) for name in DIMENSIONS],
        "published": [_row_facts(row) for row in ROWS if row.is_full_set],
        "source": SOURCE,
        "settings": _settings(run),
        "base_seed": run.settings["seed"],
        "seeds": {item.name: item.request.seed for item in run.items},
    }


def _warnings(run: RunFolder, scored: Mapping[str, Scored]) -> Iterator[str]:
    if old := [DIMENSIONS[name].title for name, found in scored.items() if not found.is_current]:
        yield f"the videos have changed since {', '.join(old)} was scored: score again"
    if foreign := sorted({found.scorer for found in scored.values() if found.scorer != "vbench"}):
        yield f"scored by {', '.join(foreign)}, not by VBench's code: these scores compare with no published ones"
    if unscored := [DIMENSIONS[name].title for name in DIMENSIONS if name not in scored and items_of(run, name)]:
        yield f"{', '.join(unscored)}: videos are there, and no score yet"


def _notes(run: RunFolder) -> list[str]:
    try:
        return notes_on(run)
    except (ValueError, OSError):  # the model is not here, where the report is written
        return []


def _dimension_facts(run: RunFolder, name: str, found: Scored | None, clips: int) -> dict[str, Any]:
    dimension = DIMENSIONS[name]
    facts: dict[str, Any] = {
        "name": name,
        "title": dimension.title,
        "short": dimension.short,
        "group": dimension.group,
        "share": round(dimension.share, 4),
        "videos": len(items_of(run, name)),
        "score": None if found is None else round(100 * found.score, 4),
        "best": [],
        "worst": [],
    }
    if found is not None:
        ranked = sorted(found.videos, key=lambda video: (-found.videos[video], video))
        best, worst = ranked[: min(clips, math.ceil(len(ranked) / 2))], ranked[::-1][: min(clips, len(ranked) // 2)]
        for kind, videos in (("best", best), ("worst", worst)):
            facts[kind] = [{"name": video, "score": round(100 * found.videos[video], 2)} for video in videos]
    return facts


def _row_facts(row: Row) -> dict[str, Any]:
    values = {"total": row.total, "i2v": row.i2v, "quality": row.quality}
    return {"model": row.model, **values, "scores": dict(row.scores), "remark": row.remark}


def _settings(run: RunFolder) -> dict[str, Any]:
    """List the settings of all videos, filled in where the model is known here."""
    request = run.items[0].request
    try:
        values = request.resolved(zoo.defaults_of(request.model)).model_dump(mode="json")
    except (ValueError, OSError):
        values = request.model_dump(mode="json", exclude_defaults=True)
    kept = {name: value for name, value in values.items() if name not in _HIDDEN_SETTINGS and value not in (None, [])}
    run_settings = {"images": run.settings["ratio"], "first frame noise": run.settings["noise"]}
    return {**kept, **run_settings, "videos of each prompt": run.settings["per_prompt"]}


# ---- page ------------------------------------------------------------------------------------------------------------


def write_report(run: RunFolder, facts: Mapping[str, Any], page: Path) -> Path:
    """Write the page of what `collect` returns, and that as JSON beside it; return the page's path.

    Raises:
        ValueError: the page's name does not end in .html, or the JSON would be the run's own file.
    """
    data = page.with_suffix(".json")
    if page.suffix != ".html":
        raise ValueError(f"{page} is no name of a page: give one that ends in .html")
    if data.resolve() == (run.folder / "run.json").resolve():
        raise ValueError(f"{page}: the JSON beside it would replace the run's {data.name}: give another name")
    write_json(data, facts)
    write_whole(page, render(facts, _sheets(run, facts)))
    return page


def render(facts: Mapping[str, Any], sheets: Mapping[str, Mapping[str, str]]) -> str:
    """Render the page as one self-contained HTML file. The template escapes prompts and names.

    Args:
        sheets: contact sheets as ``data:`` URIs, by dimension and "best" or "worst".
    """
    totals = {name: _format_interval(Interval(*facts["totals"][name])) for name in ("total", "i2v", "quality")}
    titles = {name: dimension.title for name, dimension in DIMENSIONS.items()}
    rows, best = _table(facts)
    return render_page(
        TEMPLATE,
        totals_as_text=totals,
        titles=titles,
        rows=rows,
        best_values=best,
        radar=radar(facts),
        sheets=sheets,
        **facts,
    )


def _format_interval(found: Interval) -> str:
    return str(found) if found.is_known else f"{found.middle:.2f} ± {found.half:.2f}"


def _table(facts: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows of the table, the best total first, and the best value of each column."""
    columns = ("total", "i2v", "quality")
    this = {name: Interval(*facts["totals"][name]) for name in columns}
    own = {name: this[name].middle for name in columns}
    rows = [{**row, "is_this": False, "odd": bool(row["remark"]) and _is_odd(row)} for row in facts["published"]]
    this_row = {
        "model": facts["name"],
        "scores": facts["totals"]["scores"],
        "remark": "",
        "is_this": True,
        "odd": False,
    }
    rows.append({**this_row, **own})
    rows.sort(key=lambda row: (-(row["total"] or 0), row["model"]))
    sound = [row for row in rows if not row["odd"]]
    best = {name: max(row[name] for row in sound if row[name] is not None) for name in columns}
    for name in DIMENSIONS:
        best[name] = max(row["scores"][name] for row in sound if name in row["scores"])
    return rows, best


def _is_odd(row: Mapping[str, Any]) -> bool:
    """Tell if a published row cannot be right: its motion smoothness is below the range that the suite scales it by."""
    dimension = DIMENSIONS["motion_smoothness"]
    return row["scores"].get(dimension.name, dimension.minimum) < dimension.minimum


def radar(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Lay out the radar: an axis for each dimension, from the lowest to the highest score that is shown.

    Scores of dimensions differ so much in range (96 to 99 here, 10 to 70 there) that axes of one scale would show
    nothing.
    """
    shown = {row["model"]: row["scores"] for row in facts["published"] if not _is_odd(row)}
    own = facts["totals"]["scores"]
    names = list(DIMENSIONS)
    axes, ranges = [], {}
    for index, name in enumerate(names):
        values = [scores[name] for scores in (*shown.values(), own) if name in scores]
        ranges[name] = min(values), max(values)
        x, y = _point(index, len(names), _LABEL_RADIUS)
        dx = x - _CENTER[0]
        anchor = "middle" if abs(dx) < 20 else "start" if dx > 0 else "end"
        end = _point(index, len(names), _RADIUS)
        span = f"{ranges[name][0]:.1f} to {ranges[name][1]:.1f}"
        lines = [DIMENSIONS[name].title] if anchor == "middle" else DIMENSIONS[name].title.split()
        axes.append({"end": end, "label": (x, y), "anchor": anchor, "lines": lines, "range": span})
    rings = [
        " ".join(
            _text(_point(index, len(names), _RADIUS * (_INNER + (1 - _INNER) * ring / _RINGS)))
            for index in range(len(names))
        )
        for ring in range(_RINGS + 1)
    ]
    series = [(model, shown[model], f"model{number}") for number, model in enumerate(COMPARED, start=1)]
    shapes = [_shape(model, scores, ranges, kind) for model, scores, kind in [*series, (facts["name"], own, "this")]]
    return {"axes": axes, "rings": rings, "shapes": shapes, "center": _CENTER}


def _shape(
    model: str, scores: Mapping[str, float], ranges: Mapping[str, tuple[float, float]], kind: str
) -> dict[str, Any]:
    """Lay out one model's line; where a dimension is missing, it is open."""
    points: list[tuple[float, float] | None] = []
    for index, (name, (low, high)) in enumerate(ranges.items()):
        if name not in scores:
            points.append(None)
            continue
        part = (scores[name] - low) / (high - low) if high > low else 1.0
        points.append(_point(index, len(ranges), _RADIUS * (_INNER + (1 - _INNER) * part)))
    closed = all(points)
    pairs = zip(points, [*points[1:], points[0]], strict=True)
    lines = [] if closed else [f"{_text(a)} {_text(b)}" for a, b in pairs if a and b]
    dots = [point for point in points if point is not None]
    area = " ".join(map(_text, dots)) if closed else ""
    return {"model": model, "kind": kind, "area": area, "lines": lines, "dots": dots}


def _point(index: int, count: int, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * index / count - math.pi / 2
    return round(_CENTER[0] + radius * math.cos(angle), 1), round(_CENTER[1] + radius * math.sin(angle), 1)


def _text(point: Sequence[float]) -> str:
    return f"{point[0]},{point[1]}"


# ---- clips -----------------------------------------------------------------------------------------------------------


def _sheets(run: RunFolder, facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Draw the contact sheets of the best and worst clips; clips that cannot be read any more are left out."""
    labels = {item.name: item.labels for item in run.items}
    paths = {item.name: run.video_of(item) for item in run.items}

    @cache
    def frames_of(name: str) -> tuple[np.ndarray, list[int]] | None:
        try:
            frames = read_video(paths[name], fit=(_CELL_WIDTH, 1))
        except (MediaError, FileNotFoundError, KeyError):
            return None
        numbers = spread(len(frames), _COLUMNS)
        return frames[numbers].copy(), numbers

    sheets: dict[str, dict[str, str]] = {}
    for dimension in facts["dimensions"]:
        for kind in ("best", "worst"):
            strips = []
            for clip in dimension[kind]:
                if (found := frames_of(clip["name"])) is None:
                    continue
                label = labels[clip["name"]]
                title = f"{clip['score']:.2f}"
                strips.append(Strip(f"{label['prompt']} ({label['index']})", found[0], found[1], held=[0], title=title))
            if strips:
                sheets.setdefault(dimension["name"], {})[kind] = as_data_uri(
                    strip_sheet(strips, columns=_COLUMNS, cell_width=_CELL_WIDTH), quality=80
                )
    return sheets
