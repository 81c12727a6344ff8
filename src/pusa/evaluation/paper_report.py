"""What `pusa eval paper` found: tables, plots, and a verdict on each claim of the paper by rules fixed beforehand."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pusa.evaluation import paper_points, paper_training, plots
from pusa.evaluation.metrics import EQUAL_DB, Figure, mean, ratio
from pusa.evaluation.paper_points import STEPS
from pusa.evaluation.paper_training import CURVE, REGIMES, Plan
from pusa.evaluation.plots import Panel, Series

BEGIN, END = "<!-- results: written by pusa eval paper -->", "<!-- /results -->"
_PAPER = "independent"
_REAL, _FROZEN = _REFERENCES = ("real clips", "first frame, frozen")
_ORDER = ("independent", "p 0.8", "p 0.5", "p 0.2", "image-to-video")
_SAME_DB, _SAME_LOSS = 0.3, 0.02  # what still counts as equal: dB, and the share of a loss
_ALMOST_ONLY, _HARDLY = 3.0, 1.5  # how much farther one kind of layer moves than any other
_FAR, _NOT_FAR = 10.0, 2.0  # how much farther weights move in one training than in the other


class Results:
    """Everything that has been measured so far, by point."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.plan = plan
        references = json.loads((out / "points" / "references.json").read_text())
        self.still = torch.tensor(references["still"])
        self.points: dict[str, dict[str, dict[str, list[float]]]] = {
            _REAL: references["real"],
            _FROZEN: references["frozen"],
        }
        for path in sorted((out / "points").glob("*.json")):
            if path.stem != "references":
                content = json.loads(path.read_text())
                self.points[content["point"]["name"]] = content["measured"]

    def values(self, point: str, measure: str, figure: str) -> torch.Tensor | None:
        """One value per clip, of those for which the figure means something; None if it was not measured.

        Likeness without a caption: of still clips. Change: of moving ones.
        """
        found = self.points.get(point, {})
        # The references are no generated clips: the same ones whether there is a caption or not.
        source = "image" if measure == "caption" and point in _REFERENCES else measure
        if figure not in found.get(source, {}):
            return None
        values = torch.tensor(found[source][figure])
        if measure == "image" and figure == "likeness":
            return values[self.still]
        if figure == "change" and not self.still.all():
            return values[~self.still]
        return values

    def figure(self, point: str, measure: str, figure: str) -> Figure | None:
        """The mean with its standard error; jump and change as shares of the real clips'."""
        values = self.values(point, measure, figure)
        if values is None:
            return None
        if figure in ("jump", "change"):
            real = self.values(_REAL, "text" if measure == "text" else "image", figure)
            assert real is not None
            return ratio(values, real)
        return mean(values)

    def final(self, regime: str) -> str:
        return f"{regime} {self.plan.steps}"

    def curve(self, regime: str) -> list[tuple[int, str]]:
        """Steps and points of a training that were measured, from the base on."""
        steps = [round(self.plan.steps * k / CURVE) for k in range(1, CURVE + 1)]
        found = [(step, f"{regime} {step}") for step in steps if f"{regime} {step}" in self.points]
        return [(0, "base"), *found] if "base" in self.points else found


def collect(work: Path, out: Path, plan: Plan, left_out: Sequence[str]) -> dict[str, Any]:
    """The report: what ``paper.json`` holds."""
    if not (out / "points" / "references.json").exists():
        raise RuntimeError(f"{out}: the time was too short to measure anything; the same command goes on")
    base = paper_training.load_base(work)
    results = Results(out, plan)
    moved = {
        regime: {
            str(step): paper_points.moved(base, path)
            for step in (round(plan.steps * k / CURVE) for k in range(1, CURVE + 1))
            if (path := paper_training.adapter_path(out, regime, step)).exists()
        }
        for regime in REGIMES
    }
    report = {
        "plan": asdict(plan),
        "still_clips": int(results.still.sum()),
        "moving_clips": int((~results.still).sum()),
        "left_out": list(left_out),
        "moved": moved,
        "claims": [asdict(finding) for finding in judge_claims(results, moved)],
        "tables": make_tables(results, moved),
        "panels": {name: [asdict(panel) for panel in panels] for name, panels in make_panels(results).items()},
        "points": results.points,
    }
    return json.loads(json.dumps(report))  # the same from the file


# ---- claims --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One comparison that a claim of the paper implies: what is found, and whether that agrees."""

    claim: str
    compared: str
    found: str
    verdict: str


def verdict_of(difference: Figure) -> str:
    """On "the first is better": `difference` is its mean gain over clips; two standard errors settle it."""
    value, error = difference["value"], difference.get("error")
    if not error:
        return "not settled"
    if abs(value) < 2 * error:
        return "not settled"
    return "agrees" if value > 0 else "contradicts"


def verdict_of_equality(difference: Figure, tolerance: float) -> str:
    """On "they differ by no more than the tolerance"."""
    value, error = abs(difference["value"]), difference.get("error") or math.inf
    if value + 2 * error <= tolerance:
        return "agrees"
    return "contradicts" if value - 2 * error > tolerance else "not settled"


def judge_claims(results: Results, moved: dict[str, dict[str, dict[str, float]]]) -> list[Finding]:
    """Every claim with its comparisons, clip by clip, those that were not measured left out."""
    findings: list[Finding] = []
    paper = results.final(_PAPER)
    quarter = f"{_PAPER} {round(results.plan.steps / 4)}"

    def compare(
        claim: str,
        first: str,
        second: str,
        measure: str,
        figure: str,
        *,
        lower: bool = False,
        tolerance: float | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        a, b = results.values(first, measure, figure), results.values(second, measure, figure)
        if a is None or b is None:
            return
        gain = transform(a) - transform(b)
        difference = mean(-gain if lower else gain)
        verdict = verdict_of(difference) if tolerance is None else verdict_of_equality(difference, tolerance)
        what = _NAMES[measure, figure]
        findings.append(Finding(claim, f"{first} against {second}: {what}", _shown(mean(gain), signed=True), verdict))

    def beats(claim: str, first: str, second: str) -> None:
        compare(claim, first, second, "image", "likeness")
        compare(claim, first, second, "caption", "likeness")
        compare(claim, first, second, "losses", "image, no caption", lower=True)

    beats("Without adaptation the kept frame is ignored; adaptation cures it (figure 4)", paper, "base")
    for regime in ("p 0.8", "p 0.5", "p 0.2"):
        beats("Independent times beat partly synchronous ones (tables 2 and 5b)", paper, results.final(regime))
    beats("Training on image-to-video alone is far worse (tables 2 and 5b)", paper, results.final("image-to-video"))
    beats("More training steps help (table 4c)", paper, quarter)
    for measure in ("image", "caption"):
        compare("Two inference steps are too few (table 4b)", paper, "steps 2", measure, "likeness")
    for measure in ("image", "caption"):
        claim = f"Twice the {STEPS} inference steps add little (table 4b; here: within {_SAME_DB} dB)"
        compare(claim, "steps 20", paper, measure, "likeness", tolerance=_SAME_DB)
    for measure in ("image", "caption"):
        compare("Alpha 1.4 beats 1 (table 4c)", "alpha 1.4", paper, measure, "likeness")
    for measure in ("image", "caption"):
        claim = "A high alpha costs motion (table 4c: dynamic degree)"
        compare(claim, "alpha 2", "alpha 1.4", measure, "change", lower=True)
    real = results.values(_REAL, "image", "jump")
    assert real is not None
    real_jump = real.clamp(min=1e-6)
    compare(
        "A little noise on the picture makes the clip more coherent (appendix B)",
        "noise 0.2",
        paper,
        "image",
        "jump",
        lower=True,
        transform=lambda values: (values / real_jump).log().abs(),
    )
    base_loss = results.values("base", "losses", "text")
    if base_loss is not None:
        claim = f"Text-to-video is kept (here: its loss stays within {_SAME_LOSS:.0%})"
        tolerance = _SAME_LOSS * float(base_loss.mean())
        compare(claim, paper, "base", "losses", "text", tolerance=tolerance)
    return findings + _judge_moved(moved, results.plan)


def _judge_moved(moved: dict[str, dict[str, dict[str, float]]], plan: Plan) -> list[Finding]:
    findings = []
    last = str(plan.steps)
    ours, theirs = moved[_PAPER].get(last), moved["image-to-video"].get(last)
    if ours is not None:
        own = ours["self-attention"]
        factor = own / max(ours["cross-attention"], ours["feed-forward"])
        verdict = "agrees" if factor >= _ALMOST_ONLY else "contradicts" if factor < _HARDLY else "in part"
        claim = "Weights move almost only in self-attention (appendix)"
        compared = f"self-attention against the next kind (agrees from {_ALMOST_ONLY:g} times, not below {_HARDLY:g})"
        findings.append(Finding(claim, compared, f"{factor:.2f} times as far", verdict))
    if ours is not None and theirs is not None:
        factor = math.hypot(*theirs.values()) / math.hypot(*ours.values())
        verdict = "agrees" if factor >= _FAR else "contradicts" if factor < _NOT_FAR else "in part"
        claim = "Image-to-video training moves weights more than ten times as far (the paper: full training of Wan-I2V)"
        compared = f"image-to-video against {_PAPER} (agrees from {_FAR:g} times, not below {_NOT_FAR:g})"
        findings.append(Finding(claim, compared, f"{factor:.2f} times as far", verdict))
    return findings


_NAMES = {
    ("image", "likeness"): "likeness without caption, dB",
    ("caption", "likeness"): "likeness with caption, dB",
    ("losses", "image, no caption"): "image-to-video loss without caption",
    ("losses", "text"): "text-to-video loss",
    ("image", "change"): "change without caption",
    ("caption", "change"): "change with caption",
    ("image", "jump"): "distance of the first jump from the real one, as a log ratio",
}


# ---- tables --------------------------------------------------------------------------------------------------------

Table = list[list[str]]  # the first row is the header


def make_tables(results: Results, moved: dict[str, dict[str, dict[str, float]]]) -> dict[str, Table]:
    """By title, in the order of the page."""
    rows = [("no adaptation", "base"), *((regime, results.final(regime)) for regime in _ORDER)]
    references = [(name, name) for name in _REFERENCES]
    without, with_caption = [("image", f) for f in _IMAGE], [("caption", f) for f in _IMAGE]
    losses = [("losses", name) for name in ("image, no caption", "image", "independent", "text")]
    sweep = [("image", "likeness"), ("image", "jump"), ("image", "change"), ("image", "kept")]
    sweep += [("caption", "likeness"), ("caption", "change"), ("caption", "kept")]
    alphas = [("0.5", "alpha 0.5"), ("1", results.final(_PAPER)), *((a, f"alpha {a}") for a in ("1.4", "2", "3"))]
    steps = [
        *((s, f"steps {s}") for s in ("1", "2", "4")),
        (str(STEPS), results.final(_PAPER)),
        *((s, f"steps {s}") for s in ("20", "50")),
    ]
    noises = [("0", results.final(_PAPER)), *((m, f"noise {m}") for m in ("0.1", "0.2", "0.4", "0.7", "1"))]
    strengths: Table = [["times in training", "1", "1.4", "2"]]
    for regime in _ORDER:
        prefix = "" if regime == _PAPER else f"{regime} "
        points = [results.final(regime), f"{prefix}alpha 1.4", f"{prefix}alpha 2"]
        strengths.append([regime, *(_shown(results.figure(point, "image", "likeness")) for point in points)])
    return {
        "Image-to-video without a caption": _table(results, "times in training", [*rows, *references], without),
        "Image-to-video with a caption": _table(results, "times in training", [*rows, *references], with_caption),
        "Held-out losses": _table(results, "times in training", rows, losses),
        "Likeness without a caption by alpha": strengths,
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
        "How far weights moved": _moved_table(moved, results.plan),
    }


_IMAGE = ("likeness", "jump", "kept", "change")
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
    table: Table = [[head, *heads]]
    for label, point in rows:
        cells = []
        for measure, figure in columns:
            is_itself = point == _REAL and figure == "likeness"
            cells.append("" if is_itself else _shown(results.figure(point, measure, figure)))
        table.append([label, *cells])
    return table


def _moved_table(moved: dict[str, dict[str, dict[str, float]]], plan: Plan) -> Table:
    table: Table = [["times in training", "steps", *paper_points.KINDS]]
    for regime in _ORDER:
        for step in (str(round(plan.steps / 4)), str(plan.steps)):
            if step in moved[regime]:
                table.append([regime, step, *(f"{moved[regime][step][kind]:.4f}" for kind in paper_points.KINDS)])
    return table


def _shown(figure: Figure | None, *, signed: bool = False) -> str:
    if figure is None or figure["value"] is None:
        return "not measured"
    if figure["value"] >= EQUAL_DB:
        return "equal"
    value, error = figure["value"], figure.get("error")
    digits = 3 if abs(value) < 1 and (error or 0) < 0.02 else 2
    sign = "+" if signed else ""
    return f"{value:{sign}.{digits}f}" + (f" ±{error:.{digits}f}" if error is not None else "")


# ---- plots ---------------------------------------------------------------------------------------------------------


def make_panels(results: Results) -> dict[str, list[Panel]]:
    """By file name."""
    curves = [
        _curves(results, "Image-to-video, no caption, still", "image", "likeness", "likeness, dB"),
        _curves(results, "Image-to-video loss, no caption", "losses", "image, no caption", "loss"),
        _curves(results, "Loss at independent times", "losses", "independent", "loss"),
        _curves(results, "Text-to-video loss", "losses", "text", "loss"),
    ]
    steps = [(s, f"steps {s}") for s in (1, 2, 4, 20, 50)] + [(STEPS, results.final(_PAPER))]
    alphas = [(a, f"alpha {a:g}") for a in (0.5, 1.4, 2.0, 3.0)] + [(1.0, results.final(_PAPER))]
    noises = [(m, f"noise {m:g}") for m in (0.1, 0.2, 0.4, 0.7, 1.0)] + [(0.0, results.final(_PAPER))]
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
    lines = []
    for regime in _ORDER:
        found = [
            (step, value) for step, point in results.curve(regime) if (value := results.figure(point, measure, figure))
        ]
        if len(found) > 1:
            lines.append(_line(regime, found))
    if measure == "image" and (frozen := results.figure(_FROZEN, measure, figure)):
        lines.append(Series(_FROZEN, (), (frozen["value"],), (frozen["error"],), dashed=True))
    return Panel(title, "training steps", label, lines) if any(line.xs for line in lines) else None


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
    return Panel(title, x_label, label, lines, log_x) if lines else None


def _line(name: str, found: Sequence[tuple[float, Figure]]) -> Series:
    return Series(
        name,
        [x for x, _ in found],
        [value["value"] for _, value in found],
        [value["error"] for _, value in found],
    )


# ---- writing -------------------------------------------------------------------------------------------------------


def check_page(page: Path) -> None:
    """Raise ValueError unless the page has a place for results."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} needs the lines {BEGIN!r} and {END!r}, in this order, for the results between them")


def write(report: dict[str, Any], out: Path, page: Path | None) -> None:
    """Plots and ``paper.md`` into `out`, and both into the page."""
    for name, panels in report["panels"].items():
        restored = [Panel(**{**panel, "series": [Series(**line) for line in panel["series"]]}) for panel in panels]
        (out / f"{name}.svg").write_text(plots.figure(restored))
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
    """The part of a page that holds figures."""
    plan = report["plan"]
    lines = [
        f"{plan['steps']} training steps of {paper_training.BATCH} clips for each adapter, one training each; "
        f"{plan['clips']} clips per point, {report['still_clips']} of them still and {report['moving_clips']} moving; "
        f"losses over {plan['loss_clips']} other clips. ± is the standard error over clips.",
        "",
        "### Does it agree?",
        "",
        *_as_markdown([["claim", "compared", "found", "verdict"], *_claim_rows(report["claims"])]),
        "",
        *(f"![{name}]({pictures}/{name}.svg)\n" for name in report["panels"]),
    ]
    for title, table in report["tables"].items():
        lines += [f"### {title}", "", *_as_markdown(table), ""]
    if report["left_out"]:
        lines += [f"No time was left for: {', '.join(report['left_out'])}.", ""]
    return "\n".join(lines)


def as_text(report: dict[str, Any]) -> str:
    """All tables for a terminal."""
    claims = [["claim", "compared", "found", "verdict"], *_claim_rows(report["claims"])]
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


def _as_markdown(table: Table) -> list[str]:
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *rows]
