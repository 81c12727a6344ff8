"""Make the videos of a run as durable jobs of a `pusa serve`."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pusa.client import JobFailedError, Keyframe, PusaClient, PusaError, ServerUnreachableError, Video
from pusa.evaluation.runs.folder import RunFolder
from pusa.evaluation.runs.items import Item
from pusa.evaluation.runs.progress import NotesOnce
from pusa.events import Note, Report
from pusa.request import ConditionSpec, GenerationRequest

_POLL_SECONDS = 1.0
_OUTAGE_SECONDS = 3600.0  # that a server may be away, as while it is updated
_FULL, _AWAY = 429, (502, 503, 504)
_NAMES = {  # of the API, where they are others
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2",
    "shift": "flow_shift",
    "alpha": "lora_alpha",
    "alpha_2": "lora_alpha_2",
}


class ServerMaker:
    """Make videos as jobs of a server: each item is one job, whatever happens to this process or the server.

    A job's idempotency key is made of the run's id and the item's: a run that goes on finds the jobs of its items.
    When the run is stopped, jobs that the server has accepted go on; the run finds them when it goes on itself.

    Args:
        client: of the server; threads may share one.
        poll_seconds: time between two looks at a job.
        outage_seconds: how long the server may be away.
        report: called with a note for a job that goes on after the run has been stopped.
    """

    survives_crashes = True  # a dead process says nothing of the item it waited for

    def __init__(
        self,
        client: PusaClient,
        run: RunFolder,
        *,
        poll_seconds: float = _POLL_SECONDS,
        outage_seconds: float = _OUTAGE_SECONDS,
        report: Report = lambda event: None,
    ) -> None:
        self._client, self._run, self._report = client, run, report
        self._poll_seconds, self._outage_seconds = poll_seconds, outage_seconds
        self._seen = time.monotonic()

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        """Create the item's job, or find it, wait for its end, and download its video.

        Raises:
            JobFailedError: the job has failed.
            PusaError: the server refuses it, or is away for too long.
            ValueError: the API has no words for the request.
        """
        self._seen = time.monotonic()
        creation = creation_of(item.request)
        key = f"{self._run.id}-{item.id}"
        video = self._patiently(stop, lambda: _create(self._client, creation, key))
        if video is not None and video.status == "failed":  # in an earlier attempt
            self._patiently(stop, lambda: self._client.retry(video.id))
        if video is None:
            return
        job = video.id
        while (now := self._patiently(stop, lambda: self._client.retrieve(job))) is not None:
            if now.status == "completed":
                self._patiently(stop, lambda: self._client.download(job, to=output))
                return
            if now.ended:
                raise JobFailedError(now)
            self._wait(stop)
        self._report(Note("jobs that the server has accepted go on there, and the same command finds them"))

    def _patiently(self, stop: Callable[[], bool], call: Callable[[], Any]) -> Any:
        """Call the server, again while it is away or full; None if the run is stopped."""
        while not stop():
            try:
                found = call()
            except PusaError as error:
                is_away = isinstance(error, ServerUnreachableError) or error.status in _AWAY
                if not is_away and error.status != _FULL:
                    raise
                if is_away and time.monotonic() - self._seen > self._outage_seconds:
                    raise
                self._wait(stop)
            else:
                self._seen = time.monotonic()
                return found
        return None

    def _wait(self, stop: Callable[[], bool]) -> None:
        end = time.monotonic() + self._poll_seconds
        while not stop() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def server_makers(
    url: str, key: str | None, run: RunFolder, jobs: int, *, report: Report = lambda event: None
) -> list[ServerMaker]:
    """Make so many makers that share a client, after a look at what the server offers.

    Raises:
        ValueError: `url` is no address, the server does not offer a model of the run, or it refuses the key.
        RuntimeError: it does not answer.
    """
    client = PusaClient(url, key, max_retries=2)
    try:
        offered = {str(model["id"]) for model in client.models()}
    except ServerUnreachableError as error:
        raise RuntimeError(f"{error}: start `pusa serve` there, or check --server") from error
    except PusaError as error:
        raise ValueError(f"{url}: {error}") from error
    for model in dict.fromkeys(item.request.model for item in run.items):
        if model not in offered:
            raise ValueError(f"{url} does not offer {model}: it has {', '.join(sorted(offered))}")
    notes = NotesOnce(report)
    return [ServerMaker(client, run, report=notes) for _ in range(jobs)]


def creation_of(request: GenerationRequest) -> dict[str, Any]:
    """Return the arguments of `PusaClient.create` for a request; with two ``videos`` those of `PusaClient.edit`.

    Raises:
        ValueError: the API has no words for it: its conditions have several fits or encodings, a draft, or more videos.
    """
    values = request.model_dump(mode="json", exclude_defaults=True)
    conditions = values.pop("conditions", [])
    creation: dict[str, Any] = {_NAMES.get(name, name): value for name, value in values.items()}
    creation["model"] = request.model
    images = [spec for spec in request.conditions if spec.kind == "image"]
    videos = [spec for spec in request.conditions if spec.kind == "video"]
    if len(images) + len(videos) < len(conditions):
        raise ValueError("a server makes the final of a draft by its own call: make it on this machine")
    creation |= _shared(request.conditions)
    if images:
        creation["keyframes"] = [_keyframe(spec) for spec in images]
    if len(videos) == 1:
        creation["video"] = Path(videos[0].file)
        creation |= _places(videos[0])
    elif videos:
        if request.task != "transition" or any(spec.noise for spec in videos):
            raise ValueError(f"a server takes one video, or the two of a transition, not {len(videos)}")
        del creation["task"]
        creation["videos"] = [Path(spec.file) for spec in videos]
    return creation


def _create(client: PusaClient, creation: Mapping[str, Any], key: str) -> Video:
    values = dict(creation)
    if "videos" not in values:
        return client.create(idempotency_key=key, **values)
    return client.edit(values.pop("videos"), values.pop("prompt", ""), idempotency_key=key, **values)


def _shared(conditions: list[ConditionSpec]) -> dict[str, Any]:
    """Return what the API takes for all conditions at once."""
    found = {}
    for name in ("fit", "encode"):
        values = {getattr(spec, name) for spec in conditions}
        if len(values) > 1:
            raise ValueError(f"a server takes one {name} for all conditions, not {', '.join(map(str, values))}")
        if values and (value := values.pop()) is not None:
            found[name] = value
    return found


def _keyframe(spec: ConditionSpec) -> Keyframe:
    position = str(spec.positions[0]) if spec.positions else "0"
    return Keyframe(Path(spec.file), position, spec.noise[0] if spec.noise else None)


def _places(spec: ConditionSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if spec.positions:
        found["cond_positions"] = ",".join(map(str, spec.positions))
    if spec.noise is not None:
        found["noise_multipliers"] = list(spec.noise)
    return found
