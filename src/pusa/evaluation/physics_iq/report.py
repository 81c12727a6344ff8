"""Report scores: JSON, Markdown, a page, a sheet of the worst scenes, and the table that the evaluator reads."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pusa import media
from pusa.evaluation.page import render_page
from pusa.evaluation.physics_iq.dataset import SCENES, SECONDS, Dataset
from pusa.evaluation.physics_iq.measure import ScoredItem
from pusa.evaluation.physics_iq.published import PUBLISHED, TABLE
from pusa.evaluation.physics_iq.scores import Comparison, total
from pusa.evaluation.runs import RunFolder
from pusa.evaluation.runs.files import write_json, write_whole
from pusa.markdown import markdown_table
from pusa.media.previews import Strip, strip_sheet, write_picture

MEASURES = {
    "spatial_iou": "spatial IoU",
    "spatiotemporal_iou": "spatiotemporal IoU",
    "weighted_spatial_iou": "weighted spatial IoU",
    "mse": "MSE",
}
_TEMPLATE = Path(__file__).parent / "templates" / "physics_iq.html"
_WORST = 6  # scenes of the sheet
_COLUMNS = 6  # frames of each
_SHEET_CELL = 200  # pixels


def summarise(run: RunFolder, scored: Sequence[ScoredItem]) -> dict[str, Any]:
    """Compute the score of all scenes, of each category and of each view, as JSON.

    Raises:
        ValueError: there is no scene.
    """
    everything = total([one.scores for one in scored])
    return {
        "suite": run.suite,
        "settings": run.settings,
        "seconds": SECONDS,
        "scenes": len(scored),
        "complete": len(scored) == SCENES,
        "score": asdict(everything),
        "categories": _by(scored, lambda one: one.scene.category),
        "views": _by(scored, lambda one: one.item.labels["view"]),
        "worst": [
            {"name": one.item.name, "shortfall": round(one.scores.shortfall, 4), "prompt": one.scene.prompt}
            for one in worst_scenes(scored)
        ],
    }


def _by(scored: Sequence[ScoredItem], group: Callable[[ScoredItem], str]) -> dict[str, dict[str, Any]]:
    names = sorted({group(one) for one in scored})
    return {name: asdict(total([one.scores for one in scored if group(one) == name])) for name in names}


def worst_scenes(scored: Sequence[ScoredItem], count: int = _WORST) -> list[ScoredItem]:
    """Return the scenes that are furthest from reality, the worst first."""
    return sorted(scored, key=lambda one: -one.scores.shortfall)[:count]


def write_report(run: RunFolder, dataset: Dataset, scored: Sequence[ScoredItem]) -> dict[str, Any]:
    """Write ``scores.json``, ``report.md``, ``report.html``, ``worst.jpg`` and ``metrics.csv``; return the summary.

    ``metrics.csv`` has the columns that the benchmark's ``calculate_iq_score.py`` reads.

    Raises:
        ValueError: there is no scene.
    """
    summary = summarise(run, scored)
    write_picture(worst_sheet(run, dataset, worst_scenes(scored)), run.folder / "worst.jpg")
    write_json(run.folder / "scores.json", summary)
    texts = {"report.md": as_markdown(summary), "report.html": page(summary), "metrics.csv": evaluator_csv(scored)}
    for name, text in texts.items():
        write_whole(run.folder / name, text)
    return summary


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(summary: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, head and rows of each table of a report."""
    head = ["", "scenes", "Physics-IQ", *MEASURES.values()]
    score = summary["score"]
    rows = [_row("against take 1", score["scenes"], score["physics_iq"], score["take_1"])]
    rows.append(_row("against take 2", score["scenes"], None, score["take_2"]))
    rows.append(_row("takes against each other", score["scenes"], None, score["physical_variance"]))
    found = [("Score", head, rows)]
    for title, key in (("Categories", "categories"), ("Views", "views")):
        groups = summary[key].items()
        found.append((title, head, [_row(name, g["scenes"], g["physics_iq"], g["take_1"]) for name, g in groups]))
    found.append(("Beside published scores", ["model", "given", "Physics-IQ", "source"], _published(summary)))
    return found


def _row(name: str, scenes: int, physics_iq: float | None, values: Mapping[str, float]) -> list[str]:
    score = "" if physics_iq is None else f"{physics_iq:.2f} %"
    return [name, str(scenes), score, *(f"{values[key]:.4f}" for key in MEASURES)]


def _published(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [(row.physics_iq, [row.model, row.conditioning, f"{row.physics_iq:.1f} %", row.source]) for row in PUBLISHED]
    score, settings = summary["score"]["physics_iq"], summary["settings"]
    if score is not None:
        model = settings["request"]["model"]
        part = "" if summary["complete"] else f", {summary['scenes']} of {SCENES} scenes: not comparable"
        rows.append((score, [f"**{model}**", settings["conditioning"], f"{score:.2f} %", f"this run{part}"]))
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Format the summary of `summarise` as Markdown."""
    lines = [f"# Physics-IQ: {headline(summary)}", ""]
    for title, head, rows in tables(summary):
        lines += [f"## {title}", "", *markdown_table(head, rows), ""]
    lines += [f"Published scores: {TABLE}.", "", "## Worst scenes", ""]
    for one in summary["worst"]:
        lines.append(f"- `{one['name']}` ({one['shortfall']:.3f} below another take): {one['prompt']}")
    return "\n".join(lines) + "\n"


def headline(summary: Mapping[str, Any]) -> str:
    """Return the score, its scenes and its settings in one line."""
    score, settings = summary["score"]["physics_iq"], summary["settings"]
    what = "no score (the takes share no motion)" if score is None else f"{score:.2f} %"
    model = settings["request"]["model"]
    return f"{what}, {model}, {settings['conditioning']}, {settings['fps']} fps, {summary['scenes']} of {SCENES} scenes"


def page(summary: Mapping[str, Any]) -> str:
    """Render the report as an HTML page, which shows ``worst.jpg`` beside it."""
    values = {"headline": headline(summary), "tables": tables(summary), "source": TABLE, "worst": summary["worst"]}
    return render_page(_TEMPLATE, **values)


# ---- sheet and evaluator's table -------------------------------------------------------------------------------------


def worst_sheet(run: RunFolder, dataset: Dataset, scored: Sequence[ScoredItem]) -> Image.Image:
    """Draw each scene's generated frames above those of take 1, RGB."""
    fps, strips = int(run.settings["fps"]), []
    for one in scored:
        real = dataset.testing(one.scene, 1, fps)
        assert real is not None  # it has been scored against
        name = f"{one.scene.number} {one.item.labels['scenario']}, {one.item.labels['view']}"
        strips.append(
            Strip(f"{one.scores.shortfall:.3f} below another take", _frames(run.video_of(one.item)), title=name)
        )
        strips.append(Strip(one.scene.prompt, _frames(real), title="take 1"))
    return strip_sheet(strips, columns=_COLUMNS, cell_width=_SHEET_CELL, title="Worst scenes, generated and real")


def _frames(video: Path) -> np.ndarray:
    rate = _COLUMNS / SECONDS
    return media.read_video(video, fps=rate, start_seconds=0.5 / rate, max_frames=_COLUMNS, fit=(_SHEET_CELL, 1))


def evaluator_csv(scored: Sequence[ScoredItem]) -> str:
    """Write a row for each scenario all of whose views are scored, as the benchmark's evaluator does."""
    by_scenario: dict[str, dict[str, ScoredItem]] = {}
    for one in scored:
        by_scenario.setdefault(one.scene.scenario, {})[one.scene.view] = one
    views = sorted({one.scene.view for one in scored})
    rows = []
    for scenario, found in by_scenario.items():
        if len(found) == len(views):
            columns: dict[str, Any] = {"scenario": f"{scenario}.mp4"}
            for view in views:
                columns |= _evaluator_columns(found[view], view)
            rows.append(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["scenario"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _evaluator_columns(one: ScoredItem, view: str) -> dict[str, Any]:
    scores = one.scores
    columns: dict[str, Any] = {}
    takes: dict[str, Comparison] = {"v1": scores.take_1, "v2": scores.take_2}
    for take, comparison in takes.items():
        columns |= {
            f"{take}_mse_{view}": comparison.mse,
            f"spatiotemporal_iou_{take}_{view}": comparison.spatiotemporal_iou,
            f"spatial_iou_{take}_{view}": comparison.spatial_iou,
            f"weighted_spatial_iou_{take}_{view}": comparison.weighted_spatial_iou,
        }
    real = asdict(scores.between_takes)
    names = {"spatial_iou": "spatial", "weighted_spatial_iou": "weighted_spatial"}
    return columns | {f"variance_{names.get(name, name)}_{view}": value for name, value in real.items()}
