"""Write the model card of a run from the run's own files."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pusa import zoo
from pusa.data.format import CLIPS_FILE, read_manifest
from pusa.fsutil import replacing
from pusa.markdown import markdown_table
from pusa.training.config import TrainConfig, load_config, public_name
from pusa.training.export import result_path
from pusa.training.reports import read_metrics
from pusa.training.reports.charts import panels_of, write_chart
from pusa.training.reports.validation import VALIDATION_FOLDER
from pusa.training.run import RUN_FILE

CARD_FILE, CURVES_FILE = "README.md", "curves.png"
_PAPER = "[arXiv 2507.16116](https://arxiv.org/abs/2507.16116)"

Facts = dict[str, Any]  # the contents of `run.json`, of one expert


def write_card(run_folder: str | Path) -> Path:
    """Write ``README.md`` and ``curves.png`` into a run's folder, replacing earlier ones.

    Configuration, facts, metrics, the adapter's size and validation videos are read from the folder. Paths of the
    machine that trained the model are left out.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: the folder holds no run, or one that has not begun.
        RuntimeError: matplotlib, which draws the curves, is not installed.
    """
    folder = Path(run_folder)
    config = load_config(folder)
    facts: dict[str, Facts] = {
        expert: _read_facts(config.expert_folder(folder, expert)) for expert in config.model.experts
    }
    text = "\n".join(_card(folder, config, facts)) + "\n"
    path = folder / CARD_FILE
    with replacing(path) as part:
        part.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    return path


def _read_facts(folder: Path) -> Facts:
    path = folder / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {RUN_FILE}: the run has not begun, or this is no run's folder")
    return json.loads(path.read_text(encoding="utf-8"))


def _card(folder: Path, config: TrainConfig, facts: Mapping[str, Facts]) -> Iterator[str]:
    first = next(iter(facts.values()))
    yield from _front_matter(config)
    yield from (f"# {config.name}", "", _summary(config, first), "")
    yield from ("## Files", "", *_files(folder, config), "")
    yield from ("## Use", "", *_use(folder, config), "")
    yield from ("## Training", "", *_training(folder, config, facts), "")
    for expert, fact in facts.items():
        yield from _curves(folder, config, expert, fact)
    yield from _samples(folder, config)
    yield from ("## Limits", "", *(f"- {limit}" for limit in _limits(folder, config, first)), "")
    yield from ("## Configuration", "", *_configuration(config))


def _front_matter(config: TrainConfig) -> Iterator[str]:
    relation = "adapter" if config.method.kind == "lora" else "finetune"
    base = _hub_id(config.model.source)
    tags = ["pusa", "vectorised-timesteps", "video", *(["lora"] if config.method.kind == "lora" else [])]
    yield "---"
    if base is not None:
        yield from (f"base_model: {base}", f"base_model_relation: {relation}")
    yield from ("library_name: diffusers", "pipeline_tag: image-to-video", f"tags: [{', '.join(tags)}]", "---", "")


def _hub_id(source: str) -> str | None:
    """Return the model's id on the Hub; None for one that is not there, such as the embedded one."""
    zoo_model = zoo.find(source)
    name = (zoo_model.hub_id if zoo_model else None) or public_name(source)
    return name if "/" in name else None


def _summary(config: TrainConfig, facts: Facts) -> str:
    base = public_name(config.model.source)
    trained = _count(facts["trained_parameters"])
    method = config.method
    if method.kind == "lora":
        what = f"A LoRA of rank {method.rank} ({trained} parameters) for {base}"
    else:
        what = f"All {trained} parameters of {base}, fine-tuned"
    return (
        f"{what}: the video model learns one time per latent frame (vectorised timestep adaptation, as in Pusa V1.0, "
        f"{_PAPER}), so that any frames can be kept while the others are generated. Image-to-video, keyframes, start "
        "and end frames, completion and extension need no training of their own."
    )


# ---- files and use ---------------------------------------------------------------------------------------------------


def _files(folder: Path, config: TrainConfig) -> Iterator[str]:
    rows = []
    for expert, (low, high) in config.model.experts.items():
        path = result_path(folder, config, expert)
        name = path.relative_to(folder).as_posix()
        noise = "" if len(config.model.experts) == 1 else f", for noise levels {low:g} to {high:g}"
        if not path.exists():
            rows.append((f"`{name}`", f"not written yet: the run is not finished{noise}"))
        elif path.is_dir():
            rows.append((f"`{name}/`", f"the transformer in diffusers layout{noise}"))
        else:
            rows.append((f"`{name}`", f"the adapter, {path.stat().st_size / 1e6:,.1f} MB{noise}"))
    rows.append(("`config.json`", "the configuration: `pusa train config.json` trains it again"))
    yield from markdown_table(("file", "what"), rows)


def _use(folder: Path, config: TrainConfig) -> Iterator[str]:
    base = public_name(config.model.source)
    names = {e: result_path(folder, config, e).relative_to(folder).as_posix() for e in config.model.experts}
    if config.method.kind == "full":
        (name, *others) = names.values()
        kind = zoo.base_of(config.model.source).transformer_classes[-1]
        yield from ("In Python, with pusa:", "", "```python", f"from pusa import {kind}, PusaPipeline", "")
        yield f'transformer = {kind}.from_pretrained("{name}")'
        second = ""
        if others:
            yield f'transformer_2 = {kind}.from_pretrained("{others[0]}")'
            second = ", transformer_2=transformer_2"
        yield from (f'pipe = PusaPipeline.from_pretrained("{base}", transformer=transformer{second})', "```")
        return
    recommended = zoo.defaults_of(config.model.source).alpha
    alpha = 1.4 if isinstance(recommended, Mapping) else recommended
    if len(names) > 1:
        source = "{" + ", ".join(f'"{expert}": "{name}"' for expert, name in names.items()) + "}"
        option = " ".join(f"--lora {name}" for name in names.values())
    else:
        (file,) = names.values()
        source, option = f'"{file}"', f"--lora {file}"
    if alpha != 1:
        yield (
            "The adapter was trained at strength (alpha) 1. Pusa V1.0 is best at 1.4: more follows the kept frames "
            "better and moves less. Try 1.0 to 1.7."
        )
        yield ""
    yield from (
        "In Python, with pusa:",
        "",
        "```python",
        "from PIL import Image",
        "from pusa import PusaCondition, PusaPipeline",
        "",
        f'pipe = PusaPipeline.from_pretrained("{base}")',
        f"pipe.load_pusa({source}, alpha={alpha:g})",
        'start = Image.new("RGB", (832, 480), "orange")  # or Image.open("start.png")',
        'video = pipe("the sun sets", conditions=[PusaCondition(image=start, noise_multiplier=0.2)]).frames',
        "```",
    )
    if len(names) == 1:
        yield from ("", "On the command line:", "", "```bash")
        yield f'pusa generate "the sun sets" --model {base} {option} --alpha {alpha:g} --image start.png -o sunset.mp4'
        yield "```"
    yield from ("", *_use_in_other_tools(config, base, list(names.values()), alpha))


def _use_in_other_tools(config: TrainConfig, base: str, files: list[str], alpha: float) -> Iterator[str]:
    zoo_model = zoo.find(config.model.source)
    if zoo_model is not None and zoo_model.is_ours:
        yield f"`{base}` is part of the package pusa: there is nothing to load in diffusers or ComfyUI alone."
        return
    kind = zoo.base_of(config.model.source)
    if "comfyui" not in kind.lora_layouts:
        yield f"No other program has been tried with this adapter of {kind.name}."
        return
    hub_id = _hub_id(config.model.source) or base
    yield from (
        "In diffusers, whose own pipeline has one time for all frames: text-to-video works, kept frames do not.",
        "",
        "```py",
        "import torch",
        "from diffusers import WanPipeline",
        "",
        f'pipe = WanPipeline.from_pretrained("{hub_id}", torch_dtype=torch.bfloat16)',
        f'pipe.load_lora_weights("{files[0]}", adapter_name="pusa")',
    )
    if len(files) > 1:
        yield f'pipe.load_lora_weights("{files[1]}", adapter_name="pusa", load_into_transformer_2=True)'
    yield from (f'pipe.set_adapters("pusa", {alpha:g})', "```", "")
    yield (
        "In ComfyUI the files go to `models/loras`, over a text-to-video Wan model. A sampler that gives each frame "
        "its own time is needed (WanVideoWrapper's `flowmatch_pusa`); as an ordinary LoRA it does nothing useful. Not "
        "tried by the run that wrote this card."
    )


# ---- training ------------------------------------------------------------------------------------------------------


def _training(folder: Path, config: TrainConfig, facts: Mapping[str, Facts]) -> Iterator[str]:
    first = next(iter(facts.values()))
    method, objective, optimizer = config.method, config.objective, config.optimizer
    rows = {"base model": f"`{public_name(config.model.source)}`, {_count(first['parameters'])} parameters in all"}
    if method.kind == "lora":
        rows["LoRA"] = f"rank {method.rank}, alpha {method.alpha:g}, on {', '.join(method.targets)}"
    rows |= {
        "data": f"{first['clips']:,} clips{_extent(config)}; {first['held_out_clips']:,} more held out",
        "data hash": f"`{first['data_hash']}`",
        "times of frames": _times(config),
        "loss": f"squared error of the {zoo.base_of(config.model.source).predicts}, weighting {objective.weighting}",
        "caption dropout": f"{objective.caption_dropout:g}",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}, {_schedule(config)}",
        "precision": f"{config.model.dtype} with trained weights in fp32" if config.model.dtype == "bf16" else "fp32",
        "moving average": f"{config.ema_decay:g}" if config.ema_decay else "none",
        "clips per step": _clips_per_step(folder, config, first),
    }
    for expert, fact in facts.items():
        metrics = read_metrics(config.expert_folder(folder, expert))
        label = (
            ""
            if len(facts) == 1
            else f" of `{expert}` (noise {fact['noise_range'][0]:g} to {fact['noise_range'][1]:g})"
        )
        rows[f"training{label}"] = _spent(metrics, fact)
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    rows["made with"] = f"{versions}, Python {first['python']}"
    yield from markdown_table(("", ""), rows.items())
    yield ""


def _clips_per_step(folder: Path, config: TrainConfig, facts: Facts) -> str:
    if config.batch_frames is None:
        return f"{facts['clips_per_step']}"
    logged = [entry for entry in read_metrics(config.expert_folder(folder, facts["expert"])) if entry.get("clips")]
    mean = f", {logged[-1]['clips'] / logged[-1]['step']:.3g} in the mean" if logged else ""
    return f"as many as have {config.batch_frames} latent frames on each process{mean}"


def _schedule(config: TrainConfig) -> str:
    schedule = config.schedule
    warm_up = f", warm-up over {schedule.warmup_steps} steps" if schedule.warmup_steps else ""
    cool_down = ""
    if schedule.shape == "constant" and schedule.cooldown_share:
        cool_down = f", down to {schedule.floor:g} of it over the last {schedule.cooldown_share:.0%}"
    return f"{schedule.shape}{warm_up}{cool_down}"


def _times(config: TrainConfig) -> str:
    objective = config.objective
    words = {
        "independent": f"each its own, with probability {objective.asynchronous:g}; else shared",
        "image_to_video": "the first clean, the others share one",
        "scalar": "all share one",
    }[objective.times]
    if objective.times == "independent" and objective.asynchronous == 1:
        words = "each its own"
    grid = f"from the grid with shift {objective.shift:g}" if objective.distribution == "shifted" else "uniform"
    clean = f"; {objective.clean_frames:.0%} of frames clean" if objective.clean_frames else ""
    return f"{words}, {grid}{clean}"


def _extent(config: TrainConfig) -> str:
    """Describe sizes and lengths of the clips if the datasets still exist."""
    clips = []
    for name in config.data.folders:
        if (Path(name) / CLIPS_FILE).is_file():
            clips += list(read_manifest(Path(name))[0].values())
    if not clips:
        return ""
    sizes = Counter((clip.width, clip.height, clip.frames) for clip in clips)
    shown = ", ".join(f"{w}x{h} x {n} frames" for (w, h, n), _ in sizes.most_common(4))
    more = f" and {len(sizes) - 4} other shapes" if len(sizes) > 4 else ""
    return f" ({shown}{more}; {math.fsum(clip.seconds for clip in clips) / 60:,.1f} minutes with those held out)"


def _spent(metrics: list[dict[str, Any]], facts: Facts) -> str:
    logged = [entry for entry in metrics if "clips" in entry]
    if not logged:
        return "no step yet"
    last = logged[-1]
    processes, device = facts["layout"]["processes"], facts["layout"]["device"]
    hours = last["seconds"] / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    skipped = f", {last['skipped']} steps skipped as not finite" if last["skipped"] else ""
    return f"{last['step']:,} steps, {last['clips']:,} clips, {spent} on {processes} x {device}{skipped}"


def _curves(folder: Path, config: TrainConfig, expert: str, facts: Facts) -> Iterator[str]:
    metrics = read_metrics(config.expert_folder(folder, expert))
    if not any("loss" in entry for entry in metrics):
        return
    path = folder / CURVES_FILE
    title = "## Curves"
    if len(config.model.experts) > 1:
        path, title = path.with_stem(f"{path.stem}_{expert}"), f"## Curves of `{expert}`"
    write_chart(panels_of(metrics), path)
    yield from (title, "", f"![losses over steps, and held-out error by noise level]({path.name})", "")
    evaluated = [entry for entry in metrics if entry.get("held_out_loss") is not None]
    if len(evaluated) > 1:
        first, last = evaluated[0], evaluated[-1]
        rows = (
            (f"step {entry['step']:,}", f"{entry['held_out_loss']:.4f}", _number(entry["held_out_error"]))
            for entry in (first, last)
        )
        yield from markdown_table(("held out", "loss", "squared error"), rows)
        yield ""


def _samples(folder: Path, config: TrainConfig) -> Iterator[str]:
    place = folder / VALIDATION_FOLDER
    places = [place] if len(config.model.experts) == 1 else [place / expert for expert in config.model.experts]
    sheets = [sorted(one.glob("step-*.jpg")) for one in places]
    if not any(sheets):
        return
    yield from ("## Samples", "")
    yield (
        "Fixed prompts and clips that were not trained on, always from the same noise. Outlined frames were given."
        if config.data.held_out_share and config.report.validate_on is None
        else "Fixed prompts and clips, always from the same noise. Outlined frames were given."
    )
    yield ""
    for found in sheets:
        for sheet in found[-1:]:
            name = sheet.relative_to(folder).as_posix()
            yield from (f"![validation videos after {int(sheet.stem[5:])} steps]({name})", "")
            videos = sorted(sheet.with_suffix("").glob("*.mp4"))
            yield " ".join(f"[{video.stem}]({video.relative_to(folder).as_posix()})" for video in videos)
            yield ""


def _limits(folder: Path, config: TrainConfig, facts: Facts) -> Iterator[str]:
    yield "What the base model cannot draw, this cannot either; its licence holds for what is made with it."
    yield (
        f"It has seen {facts['clips']:,} clips. Other sizes, lengths and subjects than theirs were not looked at."
        if facts["clips"] >= 100
        else f"It has seen {facts['clips']:,} clips: too few for anything but trying the machinery."
    )
    yield (
        "Colours may shift between a kept frame and the generated ones; higher alpha follows it better and moves less, "
        "and collapses in the end (reported for Pusa V1.0)."
    )
    if config.objective.times != "independent":
        yield f"Times were `{config.objective.times}`, a baseline of the paper and not Pusa: kept frames may fail."
    if not facts["held_out_clips"]:
        yield "No clip was held out: nothing here tells whether it has learned its clips by heart."
    if any(not result_path(folder, config, expert).exists() for expert in config.model.experts):
        yield "**The run is not finished**: this card describes it so far."
    yield "No benchmark was run by the training itself."


def _configuration(config: TrainConfig) -> Iterator[str]:
    yield from (
        "<details><summary>All fields</summary>",
        "",
        "```json",
        json.dumps(config.shareable(), indent=2),
        "```",
    )
    yield from ("", "</details>")


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
