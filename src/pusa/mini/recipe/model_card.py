"""Write the model card of the embedded model from the files of its recipe: data, licences, curves, measurements."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pusa.mini.world.pictures import CREDITS
from pusa.mini.world.scenery import PLACES
from pusa.mini.world.vocabulary import MOTIONS
from pusa.training.reports import read_metrics
from pusa.training.reports.charts import Panel, Series, loss_series, points_of, write_chart
from pusa.training.reports.model_card import markdown_table

CARD_FILE, CURVES_FILE = "README.md", "curves.png"


def write_card(work: Path, target: Path) -> None:
    """Write ``README.md`` and ``curves.png`` into `target` from what the recipe has left in `work`."""
    report = json.loads((work / "report.json").read_text())
    stages = {
        name: [Series("training", points_of(_read_lines(work / f"{name}.jsonl"), "loss"), smooth=True)]
        for name in ("vae", "base")
    }
    stages["VTA"] = loss_series(read_metrics(work / "vta"))
    write_chart([Panel(f"{name}: loss", "step", series) for name, series in stages.items()], target / CURVES_FILE)
    steps = {name.lower(): int(series[0].points[-1][0]) for name, series in stages.items()}
    (target / CARD_FILE).write_text("\n".join(_card(report, steps)) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _card(report: Mapping[str, Any], steps: Mapping[str, int]) -> Iterator[str]:
    yield from _model_and_data(report["budget"])
    yield from _recipe(report["budget"], steps)
    yield from _measurements(report)
    yield from (
        "",
        "## Limits",
        "",
        "- Words outside its list mean nothing to it; it knows no people, no letters, no numbers.",
        "- A photograph of yours can be panned and zoomed; what is in it will not move by itself.",
        "- Fast motion blurs: four frames share a latent frame.",
        "- Clips longer than it was trained on are made by chaining.",
    )


def _model_and_data(budget: Mapping[str, Any]) -> Iterator[str]:
    size, frames = budget["size"], budget["frames"]
    yield from (
        "# The embedded model",
        "",
        f"A text-to-video model of {budget['things']} things, {len(MOTIONS)} motions and {len(PLACES)} places, at "
        f"{size} x {size} pixels and {frames} frames ({(frames - 1) // 4 + 1} latent frames), 16 per second. It is "
        "made of the classes of the large models (`AutoencoderKLWan`, `WanTransformer3DModel`, `UMT5EncoderModel`, a "
        "Pusa LoRA) and was trained from nothing by the recipe in `pusa.mini.recipe`, so that everything in this "
        "package can be tried, tested and shown on a laptop. `pusa models show mini --words` lists its words.",
        "",
        "## Data",
        "",
        "Clips are drawn as they are needed: sprites that move before painted places or photographs, filmed by a "
        "camera that pans and zooms, with captions from a grammar. One combination of thing, motion and place in "
        "twelve is never drawn for training. The VAE saw all hundred things of `pusa.mini.world.vocabulary`, the "
        f"transformer the first {budget['things']}. Its pictures:",
        "",
        *markdown_table(("what", "source", "licence"), CREDITS),
        "",
        "The weights are under the licence of this package. Third-party notices are in `THIRD_PARTY.md`.",
        "",
    )


def _recipe(budget: Mapping[str, Any], steps: Mapping[str, int]) -> Iterator[str]:
    yield from (
        "## Recipe",
        "",
        "`pusa mini train FOLDER`. The stages of these weights:",
        "",
        *markdown_table(
            ("stage", "minutes", "steps", "what"),
            (
                (
                    "VAE",
                    f"{budget['vae_minutes']:g}",
                    steps["vae"],
                    "single frames, then windows of 5 and 9 frames; Muon",
                ),
                (
                    "base",
                    f"{budget['base_minutes']:g}",
                    steps["base"],
                    "text-to-video with one time for the whole clip, "
                    f"{budget['small_size']} then {budget['size']} pixels; Muon; {budget['layers']} layers of width "
                    f"{32 * budget['heads']}, text encoder trained along",
                ),
                (
                    "VTA",
                    f"{budget['vta_minutes']:g}",
                    steps["vta"],
                    "LoRA of rank 16 beside the frozen base, every latent frame its own time (p = 1, as in the paper), "
                    "one caption in five left out; configuration `mini-vta`",
                ),
            ),
        ),
        "",
        f"![Losses of the three stages]({CURVES_FILE})",
        "",
    )


def _measurements(report: Mapping[str, Any]) -> Iterator[str]:
    vae, strength = report["vae"], report["strength"]
    yield from (
        "## Measured",
        "",
        *markdown_table(
            ("", "all frames", "first frame"),
            (
                ("VAE, PSNR on combinations never drawn", *_decibels(vae, "held_out")),
                ("VAE, PSNR on photographs (of the training set)", *_decibels(vae, "photographs")),
            ),
        ),
        "",
        f"Velocity loss of the base on combinations never drawn: {report['base']['held_out_loss']:.3f}.",
        "",
        "Strength of the adapter, image to video without a caption on combinations never drawn (`find_alpha` of "
        "`pusa.mini.recipe.samples`). The smallest strength within half a decibel of the most faithful first frames "
        f"is {strength['best']:g} of what was trained; the exported LoRA is scaled by {strength['factor']:.3f}, so "
        "that this is alpha 1.4:",
        "",
        *_strengths(strength["sweep"]),
        "",
        "`pusa eval mini` measures how good it is at every task, on clips that were never drawn for training.",
    )


def _decibels(vae: Mapping[str, float], name: str) -> tuple[str, str]:
    return f"{vae[f'{name}_db']:.1f} dB", f"{vae[f'{name}_first_frame_db']:.1f} dB"


def _strengths(sweep: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = list(next(iter(sweep.values())))
    rows = ((strength, *(f"{scores[name]:.2f}" for name in names)) for strength, scores in sweep.items())
    yield from markdown_table(("strength", *(name.replace("_", " ") for name in names)), rows)
