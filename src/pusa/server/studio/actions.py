"""Handle the page's events: submit jobs, and keep the fields and the timeline in step.

No handler waits for a video: ``assets/stage.js`` polls the job.
"""

import itertools
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from pusa import media
from pusa.request import preset_noise
from pusa.server.jobs.housekeeping import check_space
from pusa.server.jobs.queue import Job, QueueUnavailable
from pusa.server.jobs.store import StorageFullError
from pusa.server.service import ServiceError, Upload, VideoService, in_thread
from pusa.server.studio import examples, views
from pusa.server.studio.files.uploads import VisitorFiles
from pusa.server.studio.forms import (
    TABS,
    Form,
    FormDefaults,
    FormError,
    build_request,
    format_list,
    read_positions,
    sized_request,
    spread_positions,
    with_fast,
    with_preset,
)
from pusa.server.studio.routes import owner_of
from pusa.server.studio.texts import t
from pusa.server.studio.timeline import field_texts, timeline_value

logger = logging.getLogger(__name__)

_FILES = ("image", "video", "second_video", "loop_image")
_PLACES = ("positions", "multipliers", "video_positions", "video_multipliers")
_PRESET = ("noise", "multipliers", "video_multipliers", "alpha", "alpha_2")  # the fields that a preset sets
_FAST = ("steps", "guidance", "shift")  # the fields that the fast mode sets
_FIELDS = tuple(Form.__dataclass_fields__)

Values = Mapping[Any, Any]  # component -> its value
Updates = dict[Any, Any]
Parts = dict[str, Any]  # name -> component; those named like a field of `Form` are that field


class Actions:
    """Handle the events of a page's parts; `connect` registers the handlers."""

    def __init__(self, service: VideoService, defaults: FormDefaults, files: VisitorFiles) -> None:
        self.service, self.defaults, self.files = service, defaults, files
        self._count = itertools.count(1)
        self.parts: Parts = {}

    def connect(self, parts: Parts) -> None:
        self.parts = parts
        fields = {parts[name] for name in _FIELDS if name in parts}
        changing = [
            parts[name] for name in (*_FIELDS, "timeline", "stage", "problem", "tabs", "video_places") if name in parts
        ]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        parts["generate"].click(self.generate, fields, [parts["stage"], parts["problem"]], **quiet)
        for name in TABS:
            # In the browser alone, with no round trip: a click on Generate right after it finds the right tab.
            opened = f"() => {{ pusa.fieldsChanged(); return 'tab_{name}' }}"
            parts[f"tab_{name}"].select(None, None, parts["tab"], js=opened, **quiet)
            parts[f"examples_{name}"].run(self.run_example, None, changing, **quiet)
        parts["stage"].run(self.run_example, None, changing, **quiet)
        parts["stage"].last_frame(self.use_last_frame, fields, changing, **quiet)
        parts["stage"].extend_it(self.extend, fields, changing, **quiet)

        latest: dict[str, Any] = {**quiet, "trigger_mode": "always_last"}
        # Gradio would call a handler for each of many fields that change at once, in any order: instead the timeline's
        # script waits for all of them and calls once. Pasted text raises no `input` in Gradio, hence `change`.
        triggers = [parts[name].input for name in ("noise", "frames", "fps", "overlap", "steps", "guidance")]
        triggers += [parts[name].input for name in ("draft", "schedule") if name in parts]
        triggers += [parts[name].change for name in (*_PLACES, *_FILES, "mode", "size")]
        gr.on(triggers, None, js="() => pusa.fieldsChanged()", api_visibility="private", show_progress="hidden")
        parts["timeline"].refresh(self.redraw, {*fields, parts["timeline"]}, parts["timeline"], **latest)
        parts["images"].change(
            self.pictures_changed, fields, [parts["positions"], parts["multipliers"], parts["timeline"]], **latest
        )
        parts["mode"].input(self.mode_changed, fields, self._mode_parts(), **latest)
        presettable = [parts[name] for name in _PRESET if name in parts]
        parts["preset"].input(self.preset_changed, fields, [*presettable, parts["timeline"]], **latest)
        if "fast" in parts:
            settings = [parts[name] for name in _FAST]
            parts["fast"].input(self.fast_changed, fields, [*settings, parts["timeline"]], **latest)
        parts["timeline"].edit(
            self.timeline_edited,
            {*fields, parts["timeline"]},
            [parts["noise"], *(parts[name] for name in _PLACES)],
            **latest,
        )

    # ---- jobs ----

    async def generate(self, values: Values, request: gr.Request) -> Updates:
        return await self._submit(self.form(values), request)

    async def run_example(self, request: gr.Request, event: gr.EventData) -> Updates:
        """Fill the form with an example and submit it."""
        try:
            example = examples.find(_event_value(event, "name"))
        except KeyError:
            return gr.skip()
        try:
            await in_thread(self._check_space)
        except ServiceError as error:
            return {self.parts["problem"]: self._problem({"text": error.message})}
        owner = owner_of(request.request)
        form = await in_thread(self._with_own_files, examples.form_of(example, self.defaults), owner)
        return {**self._fill(form), **await self._submit(form, request)}

    def _with_own_files(self, form: Form, owner: str) -> Form:
        """Replace the form's files by copies that belong to the visitor."""
        files: dict[str, Any] = {name: self._copy(getattr(form, name), owner) for name in _FILES if getattr(form, name)}
        return replace(form, images=[self._copy(file, owner) for file in form.images], **files)

    async def _submit(self, form: Form, request: gr.Request) -> Updates:
        stage, problem = self.parts["stage"], self.parts["problem"]
        try:
            job = await self._create(form, owner_of(request.request))
        except FormError as error:
            return {problem: self._problem(error.as_json())}
        except ServiceError as error:
            return {problem: self._problem({"text": error.message})}
        except Exception:
            logger.exception("a job could not be put into the queue")
            return {problem: self._problem({"key": "error.internal"})}
        return {stage: {"job": job.id, "count": next(self._count)}, problem: None}

    async def _create(self, form: Form, owner: str) -> Job:
        request, files = await in_thread(build_request, form, self.service.settings.model)
        for path in files.values():
            self.files.check(owner, str(path))  # again, just before it is read
        if missing := next((path for path in files.values() if not path.is_file()), None):
            logger.info("%s is not in Gradio's cache any more", missing.name)
            raise FormError("error.upload_gone")
        uploads = {name: Upload(name=path.name, path=path, size=path.stat().st_size) for name, path in files.items()}
        return await self.service.create(request, uploads, owner=owner, source="studio")

    def _problem(self, error: dict[str, Any]) -> dict[str, Any]:
        return {**error, "count": next(self._count)}  # the count makes the same error again a change

    # ---- a result as an input ----

    async def use_last_frame(self, values: Values, request: gr.Request, event: gr.EventData) -> Updates:
        """Put the last frame of a finished video into the first tab."""

        def last_frame(video: Path) -> Path:
            picture = video.with_name("last-frame.png")
            Image.fromarray(media.read_video(video, last_frames=1)[-1]).save(picture)
            return picture

        async def fill(job: Job, video: Path) -> Updates:
            picture = await in_thread(last_frame, video)
            copy = await in_thread(self._copy, picture, owner_of(request.request))
            form = replace(self.form(values), tab="image", image=copy, prompt=job.prompt)
            return self._fill(form, only=("image", "prompt"))

        return await self._with_video(event, request, fill)

    async def extend(self, values: Values, request: gr.Request, event: gr.EventData) -> Updates:
        """Put a finished video into the video tab, to be extended."""

        async def fill(job: Job, video: Path) -> Updates:
            copy = await in_thread(self._copy, video, owner_of(request.request))
            form = replace(self.form(values), tab="video", mode="extend", video=copy, prompt=job.prompt)
            return self._fill(form, only=("video", "prompt"))

        return await self._with_video(event, request, fill)

    async def _with_video(
        self, event: gr.EventData, request: gr.Request, fill: Callable[[Job, Path], Awaitable[Updates]]
    ) -> Updates:
        """Call `fill` with the job that an event names and a copy of its video."""
        owner, name = owner_of(request.request), _event_value(event, "job")
        try:
            await in_thread(self._check_space)
            job = await self.service.get(name, owner)
            content = await self.service.content(name, "video", owner)
        except ServiceError as error:
            return {self.parts["problem"]: self._problem({"text": error.message})}

        def copy_to(folder: str) -> Path:
            video = Path(folder) / "video.mp4"
            with content.open() as source, video.open("wb") as target:
                shutil.copyfileobj(source, target)
            return video

        with tempfile.TemporaryDirectory(prefix="pusa-studio-") as folder:
            return await fill(job, await in_thread(copy_to, folder))

    def _check_space(self) -> None:
        """Raise ServiceError (507) if a copy would take the last free bytes of a disk."""
        try:
            check_space(self.service.files, self.service.settings.min_free_bytes, self.files.disk)
        except StorageFullError:
            logger.error("the disk is full: no file is given to the page")
            message = "the server's disk is full: delete videos that are not needed, or tell its operator"
            raise ServiceError(507, "disk_full", message) from None

    def _copy(self, path: str | Path, owner: str) -> str:
        """Copy a file to a folder that this visitor's browser may read."""
        return str(self.files.copy(owner, Path(path)))

    # ---- the fields and the timeline ----

    def form(self, values: Values) -> Form:
        """Read the form from the values of the page's parts."""
        parts = self.parts
        fields = {name: values[parts[name]] for name in _FIELDS if name in parts and parts[name] in values}
        open_tab = str(fields["tab"]).removeprefix("tab_")
        fields["tab"] = open_tab if open_tab in TABS else TABS[0]
        fields["images"] = [file for file, _ in fields.get("images") or []]
        for name in ("prompt", "prompts", "seed", "size", *_PLACES):
            fields[name] = fields.get(name) or ""
        return Form(**fields)

    def redraw(self, values: Values) -> dict[str, Any]:
        """Draw the timeline from the fields, and estimate what the video would need.

        The answer holds the call's number, by which the page drops outdated ones.
        """
        number = (values[self.parts["timeline"]] or {}).get("asked")
        form = self.form(values)
        return {**timeline_value(form, self.defaults), "asked": number, "estimate": self._estimate(form)}

    def _estimate(self, form: Form) -> dict[str, Any] | None:
        """Estimate what a video of the form's size and length would need; None if a field is not understood."""
        try:
            request = sized_request(form, self.defaults.generation).resolved(self.defaults.generation)
            return views.estimate(self.service.planner.estimate(request))
        except (ValueError, QueueUnavailable):
            return None

    def pictures_changed(self, values: Values) -> Updates:
        """Spread the positions over the clip anew if the number of images has changed."""
        form, parts = self.form(values), self.parts
        count = len(form.images)
        updates: Updates = {}
        try:
            places = len(read_positions(form.positions))
        except FormError:
            places = -1
        if count and count != places:
            spread = spread_positions(count, self.defaults.latents_of(int(form.frames or 1)))
            positions = self.defaults.positions if count == 2 else format_list(spread)
            noise = format_list(preset_noise(form.preset, "image", count, self.defaults.generation))
            form = replace(form, positions=positions, multipliers=noise)
            updates = {parts["positions"]: form.positions, parts["multipliers"]: form.multipliers}
        return {**updates, parts["timeline"]: timeline_value(form, self.defaults)}

    def preset_changed(self, values: Values) -> Updates:
        form, parts = self.form(values), self.parts
        form = with_preset(form, self.defaults)
        fields = {parts[name]: getattr(form, name) for name in _PRESET if name in parts}
        return {**fields, parts["timeline"]: timeline_value(form, self.defaults)}

    def fast_changed(self, values: Values) -> Updates:
        form, parts = with_fast(self.form(values), self.defaults), self.parts
        fields = {parts[name]: getattr(form, name) for name in _FAST}
        return {**fields, parts["timeline"]: {**timeline_value(form, self.defaults), "estimate": self._estimate(form)}}

    def mode_changed(self, values: Values) -> Updates:
        return self._mode_updates(self.form(values))

    def timeline_edited(self, values: Values) -> Updates:
        form, parts = self.form(values), self.parts
        value = values[parts["timeline"]]
        match value["mode"]:
            case "image" if value["marks"]:
                return {parts["noise"]: float(value["marks"][0]["noise"])}
            case "images":
                positions, multipliers = field_texts(value)
                return {parts["positions"]: positions, parts["multipliers"]: multipliers}
            case "video":
                positions, multipliers = field_texts(value)
                return {parts["video_positions"]: positions, parts["video_multipliers"]: multipliers}
        logger.warning("the timeline of tab %s was edited in a mode that has nothing to edit", form.tab)
        return gr.skip()

    def _mode_parts(self) -> list[Any]:
        return [self.parts[name] for name in ("mode", "video", "second_video", "loop_image", "video_places")]

    def _mode_updates(self, form: Form) -> Updates:
        parts, mode = self.parts, form.mode
        return {
            parts["mode"]: gr.update(info=t(f"mode.{mode}.info"), value=mode),
            parts["video"]: gr.update(visible=mode != "loop"),
            parts["second_video"]: gr.update(visible=mode == "transition"),
            parts["loop_image"]: gr.update(visible=mode == "loop"),
            parts["video_places"]: gr.update(visible=mode == "complete"),
        }

    def _fill(self, form: Form, only: tuple[str, ...] = ()) -> Updates:
        """Set the page's fields, or `only` some of them, to those of a form, and open its tab."""
        parts = self.parts
        defaults = {} if only else self._default_values()
        updates: Updates = {}
        for name in only or _FIELDS:
            if name in parts and name not in ("tab", "mode"):
                value = getattr(form, name)
                value = list(value) or None if name == "images" else value
                updates[parts[name]] = defaults.get(name) if value is None else value
        for part, shape in self._mode_updates(form).items():
            updates[part] = {**shape, "value": updates[part]} if part in updates else shape
        return {
            **updates,
            parts["tabs"]: gr.update(selected=form.tab),
            parts["tab"]: f"tab_{form.tab}",
            parts["timeline"]: timeline_value(form, self.defaults),
            parts["problem"]: None,
        }

    def _default_values(self) -> dict[str, Any]:
        generation = self.defaults.generation
        return {
            "alpha_2": self.defaults.alpha_2,
            "steps": generation.steps,
            "negative_prompt": generation.negative_prompt,
            "frames": generation.num_frames,
            "fps": generation.fps,
            "guidance": generation.guidance,
            "shift": generation.shift,
            "overlap": 0,
            "metadata": self.service.settings.metadata,
        }


def _event_value(event: gr.EventData, name: str) -> str:
    """Return a value of an event as text; empty if the event has none."""
    data = event._data if isinstance(event._data, dict) else {}
    return str(data.get(name) or "")
