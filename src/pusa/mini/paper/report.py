"""Write the results of `pusa eval paper` as verdicts, tables and plots, for the terminal and for a page."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pusa.evaluation.metrics import EQUAL_DB, Figure, rate
from pusa.markdown import markdown_table
from pusa.mini.paper.claims import (
    PAPER,
    REAL,
    REFERENCES,
    Results,
    SeveralSeeds,
    WeightChanges,
    format_difference,
    judge_claims,
)
from pusa.mini.paper.points import KINDS, STEPS, relative_weight_changes
from pusa.mini.paper.training import BATCH, CURVE, REGIMES, Plan, adapter_path, load_base
from pusa.training.reports.charts import Panel, Series, write_chart

BEGIN, END = "<!-- results: written by pusa eval paper -->", "<!-- /results -->"
_CLAIM_HEAD = ["claim", "compared", "found", "verdict"]
_ORDER = ("independent", "p 0.8", "p 0.5", "p 0.2", "image-to-video")


def collect(work: Path, outs: Sequence[Path], plans: Sequence[Plan], left_out: Sequence[str]) -> dict[str, Any]:
    """Collect the report, the content of ``paper.json``, of one run or of several that differ in their seed alone."""
    for out in outs:
        if not (out / "points" / "references.json").exists():
            raise RuntimeError(f"{out}: the time was too short to measure anything; the same command goes on")
    base, plan = load_base(work), plans[0]
    results = Results(outs[0], plan) if len(outs) == 1 else SeveralSeeds(outs, plans)
    weight_changes: WeightChanges = {regime: {} for regime in REGIMES}
    for regime in REGIMES:
        for step in (round(plan.steps * k / CURVE) for k in range(1, CURVE + 1)):
            paths = [adapter_path(out, regime, step) for out in outs]
            if all(path.exists() for path in paths):
                found = [relative_weight_changes(base, path) for path in paths]
                weight_changes[regime][str(step)] = {
                    kind: fmean(changes[kind] for changes in found) for kind in found[0]
                }
    report = {
        "plan": asdict(plan),
        "seeds": [one.seed for one in plans],
        "still_clips": int(results.still.sum()),
        "moving_clips": int((~results.still).sum()),
        "left_out": list(left_out),
        "moved": weight_changes,
        "claims": [asdict(finding) for finding in judge_claims(results, weight_changes)],
        "tables": make_tables(results, weight_changes),
        "panels": {name: [asdict(panel) for panel in panels] for name, panels in make_panels(results).items()},
        "points": [run.points for run in results.runs] if isinstance(results, SeveralSeeds) else results.points,
    }
    return json.loads(json.dumps(report))  # the same from the file


# ---- tables --------------------------------------------------------------------------------------------------------

Table = list[list[str]]  # the first row is the header


def make_tables(results: Results, weight_changes: WeightChanges) -> dict[str, Table]:
    """Make all tables, by title in the order of the page."""
    rows = [("no adaptation", "base"), *((regime, results.final(regime)) for regime in _ORDER)]
    references = [(name, name) for name in REFERENCES]
    without, with_caption = [("image", f) for f in _IMAGE], [("caption", f) for f in _IMAGE]
    losses = [("losses", name) for name in ("image, no caption", "image", "independent", "text")]
    sweep = [("image", "likeness"), ("image", "jump"), ("image", "change"), ("image", "kept")]
    sweep += [("caption", "likeness"), ("caption", "change"), ("caption", "kept")]
    alphas = [("0.5", "alpha 0.5"), ("1", results.final(PAPER)), *((a, f"alpha {a}") for a in ("1.4", "2", "3"))]
    steps = [
        *((s, f"steps {s}") for s in ("1", "2", "4")),
        (str(STEPS), results.final(PAPER)),
        *((s, f"steps {s}") for s in ("20", "50")),
    ]
    noises = [("0", results.final(PAPER)), *((m, f"noise {m}") for m in ("0.1", "0.2", "0.4", "0.7", "1"))]
    return {
        "Image-to-video without a caption": _table(results, "times in training", [*rows, *references], without),
        "Image-to-video with a caption": _table(results, "times in training", [*rows, *references], with_caption),
        "Held-out losses": _table(results, "times in training", rows, losses),
        "Likeness without a caption by alpha": _likeness_by_alpha(results, "image"),
        "Likeness with a caption by alpha": _likeness_by_alpha(results, "caption"),
        "Inference steps": _table(results, "steps", steps, sweep),
        "Alpha": _table(results, "alpha", alphas, sweep),
        "Noise multiplier of the picture": _table(
            results,
            "noise",
            noises,
            [("image", "first"), ("image", "likeness"), ("image", "jump"), ("image", "change")],
        ),
        "Text-to-video": _table(
            results,
            "times in training",
            [*rows, references[0]],
            [("text", "thing"), ("text", "place"), ("text", "change"), ("losses", "text")],
        ),
        "How far weights moved": _moved_table(weight_changes, results.plan),
    }


def _likeness_by_alpha(results: Results, measure: str) -> Table:
    table: Table = [["times in training", *(f"{alpha:g}" for alpha in results.alphas(PAPER))]]
    for regime in _ORDER:
        points = results.alphas(regime).values()
        table.append([regime, *(_format_figure(results.figure(point, measure, "likeness")) for point in points)])
    return table


_IMAGE = ("likeness", "jump", "kept", "change")
_SHARES = ("kept", "thing", "place")
_HEADS = {
    "likeness": "likeness, dB",
    "first": "first frame, dB",
    "jump": "jump",
    "kept": "thing kept",
    "change": "change",
    "thing": "thing shown",
    "place": "place shown",
}
_MEASURES = {"image": "no caption", "caption": "caption"}


def _table(results: Results, head: str, rows: Sequence[tuple[str, str]], columns: Sequence[tuple[str, str]]) -> Table:
    several = len({measure for measure, _ in columns if measure in _MEASURES}) > 1
    heads = []
    for measure, figure in columns:
        name = f"loss: {figure}" if measure == "losses" else _HEADS[figure]
        heads.append(f"{_MEASURES[measure]}: {name}" if several else name)
    cells = [[_cell(results, point, measure, figure) for measure, figure in columns] for _, point in rows]
    return [[head, *heads], *([label, *row] for (label, _), row in zip(rows, cells, strict=True))]


def _cell(results: Results, point: str, measure: str, figure: str) -> str:
    """Format a figure: shares with their interval, losses with their difference from the base, others with an error."""
    values = results.values(point, measure, figure)
    is_itself = point == REAL and figure == "likeness"
    if is_itself or (values is None and point in REFERENCES):
        return ""
    if values is None:
        return "not measured"
    if figure in _SHARES:
        share = rate(values)
        return f"{share['value']:.2f} ({share['low']:.2f}-{share['high']:.2f})"
    if measure == "losses":
        gain = None if point == "base" else results.gain(point, "base", measure, figure)
        return f"{float(values.mean()):.4f}" + (f" ({format_difference(gain, 4)})" if gain else "")
    return _format_figure(results.figure(point, measure, figure))


def _moved_table(weight_changes: WeightChanges, plan: Plan) -> Table:
    table: Table = [["times in training", "steps", *KINDS]]
    for regime in _ORDER:
        for step in (str(round(plan.steps / 4)), str(plan.steps)):
            if step in weight_changes[regime]:
                table.append([regime, step, *(f"{weight_changes[regime][step][kind]:.4f}" for kind in KINDS)])
    return table


def _format_figure(figure: Figure | None) -> str:
    if figure is None:
        return "not measured"
    if figure["value"] >= EQUAL_DB:
        return "equal"
    error = figure.get("error")
    return f"{figure['value']:.2f}" + (f" ±{error:.2f}" if error is not None else "")


# ---- plots ---------------------------------------------------------------------------------------------------------


def make_panels(results: Results) -> dict[str, list[Panel]]:
    """Make the panels of each plot, by file name."""
    curves = [
        _curves(results, "Image-to-video, no caption, still clips", "image", "likeness", "likeness gained, dB"),
        _curves(results, "Image-to-video loss, no caption", "losses", "image, no caption", "loss less the base's"),
        _curves(results, "Loss at independent times", "losses", "independent", "loss less the base's"),
        _curves(results, "Text-to-video loss", "losses", "text", "loss less the base's"),
    ]
    steps = [(s, f"steps {s}") for s in (1, 2, 4, 20, 50)] + [(STEPS, results.final(PAPER))]
    alphas = [(a, f"alpha {a:g}") for a in (0.5, 1.4, 2.0, 3.0)] + [(1.0, results.final(PAPER))]
    noises = [(m, f"noise {m:g}") for m in (0.1, 0.2, 0.4, 0.7, 1.0)] + [(0.0, results.final(PAPER))]
    sweeps = [
        _sweep(results, "Inference steps", "steps", steps, "likeness", "likeness, dB", log_x=True),
        _sweep(results, "Alpha", "alpha", alphas, "likeness", "likeness, dB"),
        _sweep(results, "Alpha", "alpha", alphas, "change", "change, 1 is real"),
        _sweep(results, "Noise multiplier", "noise multiplier", noises, "jump", "first jump, 1 is real"),
    ]
    figures = {"curves": curves, "sweeps": sweeps}
    drawn = {name: [panel for panel in panels if panel is not None] for name, panels in figures.items()}
    return {name: panels for name, panels in drawn.items() if panels}


def _curves(results: Results, title: str, measure: str, figure: str, label: str) -> Panel | None:
    """Plot differences from the base, clip by clip: most of a figure's spread is that between clips."""
    lines = []
    for regime in _ORDER:
        found = [
            (step, gain)
            for step, point in results.curve(regime)
            if (gain := results.gain(point, "base", measure, figure)) is not None
        ]
        if len(found) > 1:
            lines.append(_line(regime, found))
    return Panel(title, "training steps", lines, label) if lines else None


def _sweep(
    results: Results,
    title: str,
    x_label: str,
    points: Sequence[tuple[float, str]],
    figure: str,
    label: str,
    *,
    log_x: bool = False,
) -> Panel | None:
    lines = []
    for measure, name in _MEASURES.items():
        found = [(x, value) for x, point in sorted(points) if (value := results.figure(point, measure, figure))]
        if len(found) > 1:
            lines.append(_line(name, found))
    return Panel(title, x_label, lines, label, log_x) if lines else None


def _line(name: str, found: Sequence[tuple[float, Figure]]) -> Series:
    points = [(x, value["value"]) for x, value in found]
    return Series(name, points, [value["error"] for _, value in found], dots=True)


# ---- writing -------------------------------------------------------------------------------------------------------


def check_page(page: Path) -> None:
    """Raise ValueError unless the page has a place for results."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} needs the lines {BEGIN!r} and {END!r}, in this order, for the results between them")


def write(report: dict[str, Any], out: Path, page: Path | None) -> None:
    """Write plots and ``paper.md`` to `out`, and both into the page if one is given."""
    for name, panels in report["panels"].items():
        restored = [Panel(**{**panel, "series": [Series(**line) for line in panel["series"]]}) for panel in panels]
        write_chart(restored, out / f"{name}.svg", columns=2)
    (out / "paper.md").write_text(markdown(report, "."))
    if page is None:
        return
    check_page(page)
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name in report["panels"]:
        shutil.copy(out / f"{name}.svg", folder / f"{name}.svg")
    text = page.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}\n\n{markdown(report, folder.name)}\n{after}")


def markdown(report: dict[str, Any], pictures: str) -> str:
    """Format the results for a page, with plots in the folder `pictures`."""
    plan, seeds = report["plan"], report["seeds"]
    one = f"one training each, of seed {seeds[0]}" if len(seeds) == 1 else f"trained with the seeds {seeds}"
    over = "clips" if len(seeds) == 1 else "trainings (of real clips and of the base, over clips)"
    lines = [
        f"{plan['steps']} training steps of {BATCH} clips for each adapter, {one}; "
        f"{plan['clips']} clips per point, {report['still_clips']} of them still and {report['moving_clips']} moving; "
        f"losses over {plan['loss_clips']} other clips. ± is the standard error over {over}; shares have Wilson's "
        "interval of 95 %.",
        "",
        "### Does it agree?",
        "",
        *markdown_table(_CLAIM_HEAD, _claim_rows(report["claims"])),
        "",
        *(f"![{name}]({pictures}/{name}.svg)\n" for name in report["panels"]),
    ]
    for title, table in report["tables"].items():
        lines += [f"### {title}", "", *markdown_table(table[0], table[1:]), ""]
    if report["left_out"]:
        lines += [f"No time was left for: {', '.join(report['left_out'])}.", ""]
    return "\n".join(lines)


def as_text(report: dict[str, Any]) -> str:
    """Format all tables for a terminal."""
    claims = [_CLAIM_HEAD, *_claim_rows(report["claims"])]
    blocks = []
    for title, table in {"Claims": claims, **report["tables"]}.items():
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        blocks.append("\n".join([title, *rows]))
    return "\n\n".join(blocks)


def _claim_rows(claims: Sequence[dict[str, str]]) -> Table:
    rows, before = [], ""
    for finding in claims:
        claim = finding["claim"]
        rows.append(["" if claim == before else claim, finding["compared"], finding["found"], finding["verdict"]])
        before = claim
    return rows
