"""Write what a fidelity run found: JSON, Markdown, a page, and contact sheets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pusa.evaluation.fidelity.baselines import cross_fade
from pusa.evaluation.fidelity.measures import MEASURES, Values
from pusa.evaluation.fidelity.suite import MADE, REAL, Scored, Table, read_real, tables_of
from pusa.evaluation.fidelity.tasks import Layout
from pusa.evaluation.metrics import Figure, format_figure
from pusa.evaluation.page import render_page
from pusa.evaluation.runs.files import write_whole
from pusa.markdown import markdown_table
from pusa.media import read_video
from pusa.media.previews import Strip, strip_sheet, write_picture

REPORT_FILE, MARKDOWN_FILE, PAGE_FILE = "report.json", "report.md", "report.html"
_TEMPLATE = Path(__file__).parent / "templates" / "fidelity.html"
_SHEET_CLIPS = 4  # of each task: the worst two and the best two
_SHEET_COLUMNS = 9

TITLES = {
    "vae": "Through the VAE: all frames given",
    "i2v": "Image to video: the first frame given",
    "start-end": "Start and end: the first and the last frame given",
    "keyframes": "Keyframes: the first, the middle and the last frame given",
    "completion": "Completion: both ends of the clip given as latent frames",
    "transition": "Transition: both ends of the clip joined",
    "extension": "Extension: the beginning of the clip continued, window after window",
}


@dataclass
class Report:
    """Hold what a run found.

    Attributes:
        settings: of the run.
        tables: figures by task, row and measure.
        clips: values of every video, by its name.
        missing: names of videos that are not made, with the last error where there is one.
        sheets: contact sheets by task, relative to the report's folder.
        violations: figures outside their bounds, one a line; None: there were no bounds.
    """

    settings: Mapping[str, Any]
    tables: dict[str, Table]
    clips: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    sheets: dict[str, str] = field(default_factory=dict)
    violations: list[str] | None = None

    def as_json(self) -> dict[str, Any]:
        return {"suite": "fidelity", **asdict(self)}

    @property
    def made(self) -> dict[str, dict[str, Figure]]:
        """Figures of the made videos, by task and measure."""
        return {task: table[MADE] for task, table in self.tables.items()}


def make_report(settings: Mapping[str, Any], scored: Sequence[Scored], missing: Mapping[str, str]) -> Report:
    """Summarise values."""
    clips = {
        one.item.name: {"task": one.task, "prompt": one.item.labels["prompt"], "values": one.rows[MADE]}
        for one in scored
    }
    return Report(settings, tables_of(scored), clips, dict(missing))


def write_report(report: Report, scored: Sequence[Scored], folder: Path) -> Path:
    """Write JSON, Markdown, a page and a contact sheet of each task to a folder; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in report.tables:
        some = worst_and_best([one for one in scored if one.task == task])
        path = write_picture(_sheet(some), folder / "sheets" / f"{task}.webp")
        report.sheets[task] = path.relative_to(folder).as_posix()
    texts = {
        REPORT_FILE: json.dumps(report.as_json(), ensure_ascii=False, indent=1) + "\n",
        MARKDOWN_FILE: as_markdown(report),
        PAGE_FILE: as_page(report),
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return folder / PAGE_FILE


# ---- text ------------------------------------------------------------------------------------------------------------


def as_rows(table: Table) -> list[list[str]]:
    """Format a table; the first row is its head."""
    names = [name for name in MEASURES if any(name in row for row in table.values())]
    clips = [max((figure["n"] for figure in row.values()), default=0) for row in table.values()]
    head = ["", "clips", *(MEASURES[name].title for name in names)]
    rows = [
        [label, str(n), *(format_figure(row[name], name) if name in row else "" for name in names)]
        for n, (label, row) in zip(clips, table.items(), strict=True)
    ]
    return [head, *rows]


def as_markdown(report: Report) -> str:
    """Format all tables, with the contact sheets beside the text."""
    lines = ["# Fidelity", "", _about(report)]
    for task, table in report.tables.items():
        head, *rows = as_rows(table)
        lines += ["", f"## {TITLES[task]}", "", *markdown_table(head, rows)]
        if task in report.sheets:
            lines += ["", f"![{task}]({report.sheets[task]})"]
    lines += ["", "## Measures", "", *(f"- {m.title}: {m.help}; {_better(m.better)}" for m in MEASURES.values())]
    lines += ["", *_problems(report)] if _problems(report) else []
    return "\n".join(lines) + "\n"


def as_page(report: Report) -> str:
    """Format the page: tables with the contact sheets, and every video's values."""
    sections = [
        {"title": TITLES[task], "rows": as_rows(table), "sheet": report.sheets.get(task)}
        for task, table in report.tables.items()
    ]
    names = [name for name in MEASURES if any(name in clip["values"] for clip in report.clips.values())]
    videos = [
        [name, *(_plain(clip["values"].get(measure), measure) for measure in names)]
        for name, clip in report.clips.items()
    ]
    return render_page(
        _TEMPLATE,
        about=_about(report),
        sections=sections,
        measures=[(m.title, m.help, _better(m.better)) for m in MEASURES.values()],
        heads=["video", *(MEASURES[name].title for name in names)],
        videos=videos,
        problems=_problems(report),
    )


def _about(report: Report) -> str:
    request = report.settings.get("request", {})
    chosen = ", ".join(f"{name} {value}" for name, value in request.items() if name not in ("model", "prompt"))
    clips = len(report.settings.get("clips", {}))
    noise = report.settings.get("noise")
    extra = [chosen] if chosen else []
    extra += [f"noise {' '.join(f'{value:g}' for value in noise)}"] if noise is not None else []
    settings = f" with {', '.join(extra)}" if extra else " with its own settings"
    return (
        f"Model {request.get('model', 'mini')}{settings}; clips: {clips}, videos: {len(report.clips)}. "
        "± is the standard error over clips."
    )


def _better(better: str) -> str:
    return {"higher": "higher is better", "lower": "lower is better", "real": "near the real clips' is better"}[better]


def _problems(report: Report) -> list[str]:
    missing = [f"{name} is missing" + (f": {error}" if error else "") for name, error in report.missing.items()]
    return [*(report.violations or []), *missing]


def _plain(value: float | None, name: str) -> str:
    return "" if value is None else format_figure({"value": value}, name)


# ---- pictures --------------------------------------------------------------------------------------------------------


def worst_and_best(scored: Sequence[Scored]) -> list[Scored]:
    """Choose the videos whose held-out frames are least and most like the clip's; few are all shown, worst first."""
    ordered = sorted(scored, key=_likeness)
    if len(ordered) <= _SHEET_CLIPS:
        return ordered
    half = _SHEET_CLIPS // 2
    return [*ordered[:half], *ordered[-half:]]


def _likeness(one: Scored) -> float:
    values: Values = one.rows[MADE]
    return values.get("held_out_psnr_db", values.get("given_psnr_db", 0.0))


def _sheet(scored: Sequence[Scored]) -> Any:
    strips = []
    for one in scored:
        layout, labels = Layout.from_json(one.item.labels["layout"]), one.item.labels
        real, made = read_real(one.item)[: layout.frames], read_video(one.video)[: layout.frames]
        numbers = _numbers(layout)
        held = set(layout.given)
        shown = {MADE: made, REAL: real}
        if layout.middles:
            shown["cross-fade"] = cross_fade(real, layout.given, layout.frames)
        for name, frames in shown.items():
            some = [number for number in numbers if number < len(frames)]
            label = f"{labels['clip']}, {name}: {labels['prompt'] or 'no prompt'}"
            strips.append(Strip(label, frames[some], some, held))
    return strip_sheet(strips, columns=_SHEET_COLUMNS, cell_width=144)


def _numbers(layout: Layout) -> list[int]:
    """Choose frames evenly, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, layout.frames - 1, min(_SHEET_COLUMNS, layout.frames))})
