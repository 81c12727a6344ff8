"""What clicks do: read the form, put a job into the queue, keep the fields and the timeline in step.

No handler waits for a video. The stage follows the job by itself (``assets/stage.js``).
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
from pusa.positions import latent_frames
from pusa.request import preset_alpha
from pusa.server.jobs.housekeeping import check_space
from pusa.server.jobs.queue import Job
from pusa.server.jobs.store import StorageFullError
from pusa.server.service import ServiceError, Upload, VideoService, in_thread
from pusa.server.studio import examples
from pusa.server.studio.files.uploads import VisitorFiles
from pusa.server.studio.forms import (
    TABS,
    Form,
    FormDefaults,
    FormError,
    joined,
    parse_positions,
    preset_noise,
    request_of,
    spread,
)
from pusa.server.studio.routes import owner_of
from pusa.server.studio.texts import t
from pusa.server.studio.timeline import edited, shown

logger = logging.getLogger(__name__)

_FILES = ("image", "video", "second_video", "loop_image")
_PLACES = ("positions", "multipliers", "video_positions", "video_multipliers")
_PRESET = ("noise", "multipliers", "video_multipliers", "alpha", "alpha_2")  # what a preset sets
_FIELDS = tuple(Form.__dataclass_fields__)

Values = Mapping[Any, Any]  # component -> its value
Updates = dict[Any, Any]
Parts = dict[str, Any]  # name -> component; those named like a field of `Form` are that field


class Actions:
    """The handlers of a page. `connect` ties them to its parts."""

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
            # In the browser alone: nobody who clicks on Generate at once gets the tab that was open before.
            opened = f"() => {{ pusa.fieldsChanged(); return 'tab_{name}' }}"
            parts[f"tab_{name}"].select(None, None, parts["tab"], js=opened, **quiet)
            parts[f"examples_{name}"].run(self.run_example, None, changing, **quiet)
        parts["stage"].run(self.run_example, None, changing, **quiet)
        parts["stage"].last_frame(self.use_last_frame, fields, changing, **quiet)
        parts["stage"].extend_it(self.extend, fields, changing, **quiet)

        latest: dict[str, Any] = {**quiet, "trigger_mode": "always_last"}
        # Many fields may change at once, and Gradio would ask for each, in any order: the timeline's script waits until
        # all have, and asks once. Text that is pasted is no `input` for Gradio, hence `change`.
        triggers = [parts[name].input for name in ("noise", "frames", "fps", "overlap")]
        triggers += [parts[name].change for name in (*_PLACES, *_FILES, "mode")]
        gr.on(triggers, None, js="() => pusa.fieldsChanged()", api_visibility="private", show_progress="hidden")
        parts["timeline"].refresh(self.redraw, {*fields, parts["timeline"]}, parts["timeline"], **latest)
        parts["images"].change(
            self.pictures_changed, fields, [parts["positions"], parts["multipliers"], parts["timeline"]], **latest
        )
        parts["mode"].input(self.mode_changed, fields, self._mode_parts(), **latest)
        presettable = [parts[name] for name in _PRESET if name in parts]
        parts["preset"].input(self.preset_changed, fields, [*presettable, parts["timeline"]], **latest)
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
        """Fill the form with an example, and make it at once."""
        try:
            example = examples.find(_said(event, "name"))
        except KeyError:
            return gr.skip()
        try:
            await in_thread(self._check_space)
        except ServiceError as error:
            return {self.parts["problem"]: self._told({"text": error.message})}
        owner = owner_of(request.request)
        form = await in_thread(self._with_own_files, examples.form_of(example, self.defaults), owner)
        return {**self._filled(form), **await self._submit(form, request)}

    def _with_own_files(self, form: Form, owner: str) -> Form:
        """The form with copies of its files that belong to who fills it."""
        files: dict[str, Any] = {name: self._kept(getattr(form, name), owner) for name in _FILES if getattr(form, name)}
        return replace(form, images=[self._kept(file, owner) for file in form.images], **files)

    async def _submit(self, form: Form, request: gr.Request) -> Updates:
        stage, problem = self.parts["stage"], self.parts["problem"]
        try:
            job = await self._create(form, owner_of(request.request))
        except FormError as error:
            return {problem: self._told(error.as_json())}
        except ServiceError as error:
            return {problem: self._told({"text": error.message})}
        except Exception:
            logger.exception("a job could not be put into the queue")
            return {problem: self._told({"key": "error.internal"})}
        return {stage: {"job": job.id, "count": next(self._count)}, problem: None}

    async def _create(self, form: Form, owner: str) -> Job:
        request, files = await in_thread(request_of, form, self.service.settings.model)
        for path in files.values():
            self.files.check(owner, str(path))  # once more: here they are read
        if gone := next((path for path in files.values() if not path.is_file()), None):
            logger.info("%s is not in Gradio's cache any more", gone.name)
            raise FormError("error.upload_gone")
        uploads = {name: Upload(name=path.name, path=path, size=path.stat().st_size) for name, path in files.items()}
        return await self.service.create(request, uploads, owner=owner, source="studio")

    def _told(self, error: dict[str, Any]) -> dict[str, Any]:
        return {**error, "count": next(self._count)}  # so that the same error again is a change

    # ---- from a result back into the form ----

    async def use_last_frame(self, values: Values, request: gr.Request, event: gr.EventData) -> Updates:
        """The last frame of a video becomes the picture of the first tab."""

        def last_frame(video: Path) -> Path:
            picture = video.with_name("last-frame.png")
            Image.fromarray(media.read_video(video, last_frames=1)[-1]).save(picture)
            return picture

        async def filled(job: Job, video: Path) -> Updates:
            picture = await in_thread(last_frame, video)
            kept = await in_thread(self._kept, picture, owner_of(request.request))
            form = replace(self.form(values), tab="image", image=kept, prompt=job.prompt)
            return self._filled(form, only=("image", "prompt"))

        return await self._with_video(event, request, filled)

    async def extend(self, values: Values, request: gr.Request, event: gr.EventData) -> Updates:
        """A video that was made becomes the one to go on from."""

        async def filled(job: Job, video: Path) -> Updates:
            kept = await in_thread(self._kept, video, owner_of(request.request))
            form = replace(self.form(values), tab="video", mode="extend", video=kept, prompt=job.prompt)
            return self._filled(form, only=("video", "prompt"))

        return await self._with_video(event, request, filled)

    async def _with_video(
        self, event: gr.EventData, request: gr.Request, filled: Callable[[Job, Path], Awaitable[Updates]]
    ) -> Updates:
        """What `filled` makes of the job that an event names and of a copy of its video."""
        owner, name = owner_of(request.request), _said(event, "job")
        try:
            await in_thread(self._check_space)
            job = await self.service.get(name, owner)
            content = await self.service.content(name, "video", owner)
        except ServiceError as error:
            return {self.parts["problem"]: self._told({"text": error.message})}

        def copied(folder: str) -> Path:
            video = Path(folder) / "video.mp4"
            with content.open() as source, video.open("wb") as target:
                shutil.copyfileobj(source, target)
            return video

        with tempfile.TemporaryDirectory(prefix="pusa-studio-") as folder:
            return await filled(job, await in_thread(copied, folder))

    def _check_space(self) -> None:
        """Raise ServiceError (507) where a copy would take the last free bytes of a disk."""
        try:
            check_space(self.service.files, self.service.settings.min_free_bytes, self.files.disk)
        except StorageFullError:
            logger.error("the disk is full: no file is given to the page")
            told = "the server's disk is full: delete videos that are not needed, or tell its operator"
            raise ServiceError(507, "disk_full", told) from None

    def _kept(self, path: str | Path, owner: str) -> str:
        """A copy from where this visitor's browser may have it."""
        return str(self.files.copy(owner, Path(path)))

    # ---- the fields and the timeline ----

    def form(self, values: Values) -> Form:
        """What the page holds."""
        parts = self.parts
        held = {name: values[parts[name]] for name in _FIELDS if name in parts and parts[name] in values}
        open_tab = str(held["tab"]).removeprefix("tab_")
        held["tab"] = open_tab if open_tab in TABS else TABS[0]
        held["images"] = [file for file, _ in held.get("images") or []]
        for name in ("prompt", "seed", "size", "positions", "multipliers", "video_positions", "video_multipliers"):
            held[name] = held.get(name) or ""
        return Form(**held)

    def redraw(self, values: Values) -> dict[str, Any]:
        """The timeline as the fields say, with the number of the question, so that an old answer is known as one."""
        asked = (values[self.parts["timeline"]] or {}).get("asked")
        return {**shown(self.form(values), self.defaults), "asked": asked}

    def pictures_changed(self, values: Values) -> Updates:
        """As many places as pictures: where their number has changed, they are spread over the clip anew."""
        form, parts = self.form(values), self.parts
        count = len(form.images)
        updates: Updates = {}
        try:
            places = len(parse_positions(form.positions))
        except FormError:
            places = -1
        if count and count != places:
            positions = (
                self.defaults.positions if count == 2 else joined(spread(count, latent_frames(int(form.frames or 1))))
            )
            form = replace(form, positions=positions, multipliers=joined(preset_noise(form.preset, "image", count)))
            updates = {parts["positions"]: form.positions, parts["multipliers"]: form.multipliers}
        return {**updates, parts["timeline"]: shown(form, self.defaults)}

    def preset_changed(self, values: Values) -> Updates:
        form, parts = self.form(values), self.parts
        form = _with_preset(form, self.defaults)
        set_now = {parts[name]: getattr(form, name) for name in _PRESET if name in parts}
        return {**set_now, parts["timeline"]: shown(form, self.defaults)}

    def mode_changed(self, values: Values) -> Updates:
        return self._mode_updates(self.form(values))

    def timeline_edited(self, values: Values) -> Updates:
        form, parts = self.form(values), self.parts
        value = values[parts["timeline"]]
        match value["mode"]:
            case "image" if value["marks"]:
                return {parts["noise"]: float(value["marks"][0]["noise"])}
            case "images":
                positions, multipliers = edited(value)
                return {parts["positions"]: positions, parts["multipliers"]: multipliers}
            case "video":
                positions, multipliers = edited(value)
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

    def _filled(self, form: Form, only: tuple[str, ...] = ()) -> Updates:
        """The page's fields as `form` has them, its tab opened; `only` some of them."""
        parts = self.parts
        untouched = {} if only else self._untouched()
        updates: Updates = {}
        for name in only or _FIELDS:
            if name in parts and name not in ("tab", "mode"):
                value = getattr(form, name)
                value = list(value) or None if name == "images" else value
                updates[parts[name]] = untouched.get(name) if value is None else value
        for part, shape in self._mode_updates(form).items():
            updates[part] = {**shape, "value": updates[part]} if part in updates else shape
        return {
            **updates,
            parts["tabs"]: gr.update(selected=form.tab),
            parts["tab"]: f"tab_{form.tab}",
            parts["timeline"]: shown(form, self.defaults),
            parts["problem"]: None,
        }

    def _untouched(self) -> dict[str, Any]:
        known = self.defaults.known
        return {
            "alpha_2": self.defaults.alpha_2,
            "steps": known.steps,
            "negative_prompt": known.negative_prompt,
            "frames": known.num_frames,
            "fps": known.fps,
            "guidance": known.guidance,
            "shift": known.shift,
            "overlap": 0,
        }


def _said(event: gr.EventData, name: str) -> str:
    """A value that came with an event, as text; nothing where none did."""
    said = event._data if isinstance(event._data, dict) else {}
    return str(said.get(name) or "")


def _with_preset(form: Form, defaults: FormDefaults) -> Form:
    count = max(1, len(form.images) or 2)
    try:
        video_count = len(parse_positions(form.video_positions)) or 4
    except FormError:
        video_count = 4
    return replace(
        form,
        noise=preset_noise(form.preset, "image", 1)[0],
        multipliers=joined(preset_noise(form.preset, "image", count)),
        video_multipliers=joined(preset_noise(form.preset, "video", video_count)),
        alpha=preset_alpha(form.preset, defaults.alpha),
        alpha_2=None if defaults.alpha_2 is None else preset_alpha(form.preset, defaults.alpha_2),
    )
