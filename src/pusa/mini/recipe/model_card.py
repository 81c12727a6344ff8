"""Write the model card of the embedded model from the files of its recipe: data, licences, curves, measurements."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pusa.markdown import markdown_table
from pusa.mini.world.pictures import CREDITS
from pusa.mini.world.vocabulary import MOTIONS
from pusa.training.reports import read_metrics
from pusa.training.reports.charts import Panel, Series, loss_series, points_of, write_chart

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


def write_further_card(work: Path, run: Path, target: Path) -> None:
    """Write ``README.md`` and ``curves.png`` of a model that was trained further into `target`.

    Args:
        work: what `pusa.mini.recipe.more` has left.
        run: the folder of the adapter's training.
    """
    report = json.loads((work / "report.json").read_text())
    progress = _read_lines(work / "progress.jsonl")
    losses = points_of(_read_lines(work / "base.jsonl"), "loss")
    held_out = [Series(name, points_of(progress, key)) for name, key in _HELD_OUT.items()]
    panels = [
        Panel("base: loss", "step", [Series("training", losses, smooth=True)]),
        Panel("base: loss on combinations never drawn", "step", held_out),
        Panel("VTA: loss", "step", loss_series(read_metrics(run))),
    ]
    write_chart(panels, target / CURVES_FILE)
    steps = int(read_metrics(run)[-1]["step"])
    (target / CARD_FILE).write_text("\n".join(_further_card(report, steps)) + "\n")


_HELD_OUT = {"text to video": "held_out_loss", "image to video, no captions": "held_out_picture_loss"}


def _further_card(report: Mapping[str, Any], vta_steps: int) -> Iterator[str]:
    budget, base, strength = report["budget"], report["base"], report["strength"]
    objective, vta = budget["objective"], budget["vta"]
    yield from _model_and_data(budget, "was trained from the first edition's weights")
    yield from (
        "## Recipe",
        "",
        "`pusa mini train FOLDER --budget more --until base`, stopped after as many steps as there was time for, and "
        "then the same without `--until`. The VAE is the first edition's.",
        "",
        *markdown_table(
            ("stage", "steps", "what"),
            (
                (
                    "base",
                    base["steps"],
                    f"{budget['small_size']} and {budget['size']} pixels, from step {budget['small_steps']} on "
                    f"{budget['size']}; a timestep per latent frame in {objective['vector_share']:.0%} of clips, the "
                    f"first frame clean in {objective['clean_start_share']:.0%} of these; errors on things count "
                    f"{1 + objective['thing_weight']:g} times; {objective['caption_dropout']:.0%} without a caption",
                ),
                (
                    "VTA",
                    vta_steps,
                    f"LoRA of rank {vta['rank']} beside the frozen base, every latent frame its own timestep, as in "
                    "the paper; configuration `mini-vta`",
                ),
            ),
        ),
        "",
        f"![Losses]({CURVES_FILE})",
        "",
        "## Measured",
        "",
        f"Velocity loss of the base on combinations never drawn: {base['held_out_loss']:.3f}; of image-to-video "
        f"without captions, before the adapter: {base['held_out_picture_loss']:.3f}.",
        "",
        *_strength_of_the_adapter(strength),
        *_LIMITS,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _card(report: Mapping[str, Any], steps: Mapping[str, int]) -> Iterator[str]:
    yield from _model_and_data(report["budget"], "was trained from nothing")
    yield from _recipe(report["budget"], steps)
    yield from _measurements(report)
    yield from _LIMITS


_LIMITS = (
    "",
    "## Limits",
    "",
    "- Words outside its list mean nothing to it; it knows no people, no letters, no numbers.",
    "- A photograph of yours can be panned and zoomed; what is in it will not move by itself.",
    "- Fast motion blurs: four frames share a latent frame.",
    "- Clips longer than it was trained on are made by chaining.",
)


def _model_and_data(budget: Mapping[str, Any], origin: str) -> Iterator[str]:
    size, frames, edition = budget["size"], budget["frames"], budget["edition"]
    places = len(edition["places"])
    yield from (
        "# The embedded model",
        "",
        f"A text-to-video model of {budget['things']} things, {len(MOTIONS)} motions and {places} places, at "
        f"{size} x {size} pixels and {frames} frames ({(frames - 1) // 4 + 1} latent frames), 16 per second. It is "
        "made of the classes of the large models (`AutoencoderKLWan`, `WanTransformer3DModel`, `UMT5EncoderModel`, a "
        f"Pusa LoRA) and {origin} by the recipe in `pusa.mini.recipe`, so that everything in this "
        "package can be tried, tested and shown on a laptop. `pusa models show mini --words` lists its words.",
        "",
        "## Data",
        "",
        "Clips are drawn as they are needed: sprites that move before painted places or photographs, filmed by a "
        "camera that pans and zooms, with captions from a grammar. One combination of thing, motion and place in "
        "twelve is never drawn for training. The VAE saw all hundred things of `pusa.mini.world.vocabulary`, the "
        f"transformer {budget['things']} of them. Its pictures:",
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
        *_strength_of_the_adapter(strength),
    )


def _strength_of_the_adapter(strength: Mapping[str, Any]) -> Iterator[str]:
    yield from (
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
