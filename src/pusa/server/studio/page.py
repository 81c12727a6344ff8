"""Lay out the page's parts. `actions` handles their events, `theme` and ``assets`` style them."""

from typing import Any

import gradio as gr

from pusa.defaults import GenerationDefaults
from pusa.generate.prompt_hints import vocabulary
from pusa.positions import frames_of, nearest_of
from pusa.server.service import VideoService
from pusa.server.settings import ServerSettings
from pusa.server.studio import examples
from pusa.server.studio.actions import Actions, Parts
from pusa.server.studio.files.uploads import VisitorFiles
from pusa.server.studio.forms import TABS, Form, FormDefaults
from pusa.server.studio.texts import choice, t
from pusa.server.studio.timeline import timeline, timeline_value

_IMAGES = [".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".bmp"]


def build(service: VideoService, files: VisitorFiles) -> gr.Blocks:
    """Build the page for a service and the files of its visitors."""
    defaults = FormDefaults.of(service.settings.model)
    with gr.Blocks(title="pusa studio", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        # Gradio translates a value that is a key of its own texts, such as "image": hence "tab_image".
        parts: Parts = {"tab": gr.Textbox("tab_image", visible="hidden", elem_id="open-tab")}
        _custom_part("header", {"model": service.model})
        with gr.Row(elem_id="pusa-columns", equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="pusa-form"):
                _inputs(parts, defaults)
                parts["timeline"] = timeline(timeline_value(Form(tab="image"), defaults))
                _prompt(parts, service, defaults.generation)
                _preset(parts, defaults)
                _advanced(parts, defaults, service.settings)
                with gr.Column(elem_id="pusa-submit"):
                    _custom_part("estimate", None)
                    parts["draft"] = gr.Checkbox(label=t("draft.label"), info=t("draft.info"), elem_id="draft")
                    parts["generate"] = gr.Button(t("generate"), variant="primary", size="lg", elem_id="generate")
                    parts["problem"] = _custom_part("problem", None)
            with gr.Column(scale=7, min_width=320, elem_id="pusa-result"):
                parts["stage"] = _custom_part("stage", None, events=("last_frame", "extend_it", "run"))
        _custom_part("gallery", None)
        Actions(service, defaults, files).connect(parts)
    return page


def _custom_part(name: str, value: Any, events: tuple[str, ...] = (), **options: Any) -> gr.HTML:
    """Make a part that a script of ``assets`` draws: ``pusa.NAME(element, props, watch, tell, events)``.

    The script calls ``tell(event, data)`` to raise one of `events`.
    """
    names = ", ".join(f"'{event}'" for event in events)
    return gr.HTML(
        value,
        html_template=f'<div class="pusa-{name}"></div>',
        js_on_load=f"pusa.{name}(element, props, watch, (event, data) => trigger(event, data), [{names}])",
        apply_default_css=False,
        elem_id=f"pusa-{name}" if name != "examples" else None,
        elem_classes="pusa-own",
        **options,
    )


def _inputs(parts: Parts, defaults: FormDefaults) -> None:
    with gr.Tabs(selected="image", elem_id="pusa-tabs") as parts["tabs"]:
        for name in TABS:
            with gr.Tab(t(f"tab.{name}"), id=name, elem_id=f"tab-{name}") as parts[f"tab_{name}"]:
                fitting = filter(None, (example.for_model(defaults) for example in examples.EXAMPLES))
                shows = [_example_value(example) for example in fitting if example.tab == name]
                parts[f"examples_{name}"] = _custom_part("examples", {"tab": name, "examples": shows}, events=("run",))
                _TAB_INPUTS[name](parts, defaults)


def _example_value(example: examples.Example) -> dict[str, Any]:
    return {
        "name": example.name,
        "prompt": example.prompt,
        "mode": example.values.get("mode"),
        "shows": [f"studio/assets/{path.name}" for path in example.shows],
    }


def _image_inputs(parts: Parts, defaults: FormDefaults) -> None:
    parts["image"] = _picture("image.label", "image", height=240)
    parts["noise"] = _slider("noise", (0, 1, 0.05), defaults.noise, info="noise.info")


def _images_inputs(parts: Parts, defaults: FormDefaults) -> None:
    parts["images"] = gr.Gallery(
        label=t("images.label"),
        type="filepath",
        columns=4,
        height=200,
        object_fit="contain",
        file_types=_IMAGES,
        interactive=True,
        buttons=[],
        elem_id="images",
    )
    # Gradio raises an error for a file of another kind; the prober's message says which kind it is.
    parts["images"].preprocess = _paths_of
    with gr.Row():
        for name in ("positions", "multipliers"):
            parts[name] = _line(name, getattr(defaults, name))


def _video_inputs(parts: Parts, defaults: FormDefaults) -> None:
    modes = ("complete", "extend", "transition", "loop")
    parts["mode"] = gr.Radio(
        [(choice(f"mode.{mode}"), mode) for mode in modes],
        value="complete",
        label=t("mode.label"),
        info=t("mode.complete.info"),
        elem_id="mode",
        elem_classes="pusa-segments",
    )
    with gr.Row():
        parts["video"] = gr.Video(
            label=t("video.label"), sources=["upload"], height=240, buttons=[], elem_id="video", interactive=True
        )
        parts["second_video"] = gr.Video(
            label=t("video2.label"),
            sources=["upload"],
            height=240,
            buttons=[],
            visible=False,
            elem_id="second-video",
            interactive=True,
        )
        parts["loop_image"] = _picture("loop_image.label", "loop-image", height=240, visible=False)
    with gr.Row() as parts["video_places"]:
        for name in ("video_positions", "video_multipliers"):
            parts[name] = _line(name, getattr(defaults, name))


def _text_inputs(parts: Parts, defaults: FormDefaults) -> None:
    """Add no inputs: this tab uses the prompt alone."""


_TAB_INPUTS = {"image": _image_inputs, "images": _images_inputs, "video": _video_inputs, "text": _text_inputs}


def _line(name: str, value: str, *, info: str | None = None, **options: Any) -> gr.Textbox:
    """Make a text field of one line, explained by the text ``NAME.info`` or by the text that `info` names."""
    return gr.Textbox(
        value,
        label=t(f"{name}.label"),
        info=t(info or f"{name}.info"),
        max_lines=1,
        elem_id=name.replace("_", "-"),
        **options,
    )


def _slider(
    name: str,
    lowest_highest_step: tuple[float, float, float],
    value: float,
    *,
    info: str | None = None,
    visible: bool = True,
) -> gr.Slider:
    """Make a slider, explained by the request field's help or by the text that `info` names."""
    lowest, highest, step = lowest_highest_step
    return gr.Slider(
        lowest,
        highest,
        value,
        step=step,
        label=t(f"{name}.label"),
        info=t(info or f"help.{name}"),
        visible=visible,
        elem_id=name.replace("_", "-"),
    )


def _picture(label: str, elem_id: str, **options: Any) -> gr.Image:
    image = gr.Image(
        label=t(label),
        type="filepath",
        sources=["upload", "clipboard"],
        buttons=[],
        elem_id=elem_id,
        interactive=True,
        **options,
    )
    # Gradio would open the file with every decoder of Pillow: only the prober may (pusa.server.transfers.uploads).
    image.preprocess = _path_of  # type: ignore[assignment]
    return image


def _path_of(value: Any) -> str | None:
    return value.path if value else None


def _paths_of(value: Any) -> list[tuple[str, str | None]] | None:
    return [(one.image.path, one.caption) for one in value.root] if value else None


def _prompt(parts: Parts, service: VideoService, generation: GenerationDefaults) -> None:
    parts["prompt"] = gr.Textbox(
        label=t("prompt.label"),
        placeholder=t("prompt.placeholder" if generation.has_text else "prompt.class_placeholder"),
        visible=generation.classes != 0,
        lines=2,
        max_lines=8,
        max_length=10_000,
        elem_id="prompt",
    )
    words = {kind: [group[0] for group in groups] for kind, groups in vocabulary(service.settings.model).items()}
    _custom_part("words", {"model": service.model, "known": words})


def _preset(parts: Parts, defaults: FormDefaults) -> None:
    parts["preset"] = gr.Radio(
        [(choice(f"preset.{name}"), name) for name in ("faithful", "balanced", "creative")],
        value="balanced",
        label=t("preset.label"),
        info=t("preset.info"),
        elem_id="preset",
        elem_classes="pusa-segments",
    )
    with gr.Row():
        parts["alpha"] = _slider("alpha", (0.1, 5, 0.1), defaults.alpha)
        parts["steps"] = _slider("steps", (1, 50, 1), defaults.generation.steps)
    if defaults.generation.fast is not None:
        parts["fast"] = gr.Checkbox(False, label=t("fast.label"), info=t("help.fast"), elem_id="fast")
    if defaults.alpha_2 is not None:
        parts["alpha_2"] = _slider("alpha_2", (0.1, 5, 0.1), defaults.alpha_2)


def _advanced(parts: Parts, defaults: FormDefaults, settings: ServerSettings) -> None:
    generation = defaults.generation
    guides = generation.classes != 0
    with gr.Accordion(t("advanced"), open=False, elem_id="advanced"):
        parts["negative_prompt"] = gr.Textbox(
            generation.negative_prompt,
            label=t("negative_prompt.label"),
            visible=guides,
            info=t("help.negative_prompt"),
            lines=1,
            max_lines=4,
            elem_id="negative",
        )
        with gr.Row():
            parts["seed"] = _line("seed", "", info="help.seed", placeholder=t("seed.placeholder"))
            parts["size"] = gr.Dropdown(
                [(choice("size.auto"), ""), *((size, size) for size in defaults.sizes)],
                value="",
                allow_custom_value=True,
                label=t("size.label"),
                info=t("size.info"),
                elem_id="size",
            )
        with gr.Row():
            factor = generation.frames_per_latent
            longest = max(nearest_of(161, factor, 1), 4 * (generation.num_frames - 1) + 1)
            parts["frames"] = _slider("frames", (frames_of(2, factor), longest, factor), generation.num_frames)
            parts["fps"] = _slider("fps", (1, 60, 1), generation.fps)
        with gr.Row():
            parts["guidance"] = _slider("guidance", (1, 20, 0.5), generation.guidance, visible=guides)
            parts["shift"] = _slider("shift", (1, 20, 0.5), generation.shift, visible=generation.has_shift)
        with gr.Row():
            parts["overlap"] = _slider("overlap", (0, 81, 1), 0, info="overlap.info")
            parts["fit"] = gr.Radio(
                [(choice(f"fit.{fit}"), fit) for fit in ("crop", "letterbox", "stretch")],
                value="crop",
                label=t("fit.label"),
                info=t("help.fit"),
                elem_id="fit",
                elem_classes="pusa-segments",
            )
        parts["exact"] = gr.Checkbox(value=False, label=t("exact.label"), info=t("help.exact"), elem_id="exact")
        if generation.boundary_ratio is None:  # two experts cannot make one
            parts["schedule"] = gr.Radio(
                [(choice(f"schedule.{name}"), name) for name in ("even", "wave")],
                value="even",
                label=t("schedule.label"),
                info=t("schedule.info"),
                elem_id="schedule",
                elem_classes="pusa-segments",
            )
        parts["prompts"] = gr.Textbox(
            label=t("prompts.label"),
            visible=guides,
            info=t("prompts.info"),
            placeholder=t("prompts.placeholder"),
            lines=2,
            max_lines=12,
            max_length=100_000,
            elem_id="prompts",
        )
        parts["metadata"] = gr.Radio(
            [(choice(f"metadata.{name}"), name) for name in settings.metadata_choices],
            value=settings.metadata,
            label=t("metadata.label"),
            info=t("metadata.info"),
            elem_id="metadata",
            elem_classes="pusa-segments",
        )
