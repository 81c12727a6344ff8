"""Read the request inside a video of pusa as a body of ``POST /v1/videos``, with its inputs as files of a client."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from pusa.request import ConditionSpec, GenerationRequest, stored_request
from pusa.server.errors import ServiceError
from pusa.server.files import FileLibrary
from pusa.server.http.body import in_parser_thread
from pusa.server.http.from_request import body_of
from pusa.server.http.json_input import BodyBudget, parse_json
from pusa.server.http.to_request import decode_base64
from pusa.server.http.validation import validation_error
from pusa.server.settings import ServerSettings
from pusa.server.submit import in_thread
from pusa.server.transfers.uploads import Spool, Upload

_MOST_INPUTS = 64


@dataclass(frozen=True)
class FoundRequest:
    """Hold a request as a body, and the names of inputs that neither the video nor the owner's files hold."""

    body: dict[str, Any]
    missing: list[str]


class StoredRequests:
    """Read requests inside files, which are as untrusted as any body."""

    def __init__(self, settings: ServerSettings, library: FileLibrary, spool: Spool) -> None:
        self._settings, self._library, self._spool = settings, library, spool

    async def read(self, id: str, owner: str) -> FoundRequest:
        """Read the request inside an owner's file; its inputs become files of that owner.

        Raises:
            ServiceError: 404 without such a file or request, 400 for a request that cannot be understood, 507 if the
                inputs find no room.
        """
        stored = await in_parser_thread(_parse, await self._library.stored_request(id, owner))
        request = _validated(stored["request"])
        files: dict[str, str] = {}  # id of the file by the name of a condition's
        missing: dict[str, None] = {}
        kept: list[ConditionSpec] = []
        for number, spec in enumerate(request.conditions[:_MOST_INPUTS]):
            name = f"input_{number}"
            found = await self._file_of(spec, stored["inputs"], owner)
            if found is None:
                missing[spec.file] = None
                continue
            files[name] = found
            kept.append(spec.model_copy(update={"file": name, "sha256": None}))
        metadata = self._settings.limit_metadata(request.metadata)
        request = request.model_copy(update={"conditions": kept, "metadata": metadata})
        return FoundRequest(body_of(request, lambda name: {"file_id": files[name]}), list(missing))

    async def _file_of(self, spec: ConditionSpec, contents: dict[str, Any], owner: str) -> str | None:
        """Return the id of a condition's file; None if it is neither carried nor kept."""
        if spec.sha256 is None:
            return None
        content = contents.get(spec.sha256)
        if not isinstance(content, str):
            return await self._library.find(spec.sha256, owner)
        data = await in_thread(decode_base64, content, "the input inside the file")
        if hashlib.sha256(data).hexdigest() != spec.sha256:
            return None
        arrival = await in_thread(self._library.reserve, len(data))
        path = self._spool.new()
        try:
            await in_thread(path.write_bytes, data)
            kind: Literal["image", "video"] = "image" if spec.kind == "image" else "video"
            upload = Upload(name=spec.file, path=path, size=len(data), expected_kind=kind)
            return (await self._library.add(upload, owner, spec.file)).id
        finally:
            path.unlink(missing_ok=True)
            arrival.release()


def _parse(content: bytes) -> dict[str, Any]:
    values = parse_json(content, BodyBudget(), "the request inside the file")
    if not isinstance(values, dict) or not isinstance(values.get("request"), dict):
        raise ServiceError(400, "invalid_file", "the request inside the file is not understood", "file")
    inputs = values.get("inputs")
    return {"request": values["request"], "inputs": inputs if isinstance(inputs, dict) else {}}


def _validated(values: dict[str, Any]) -> GenerationRequest:
    try:
        return stored_request({"exact": True, **values})  # older versions computed every frame at every step
    except ValidationError as error:
        reason = validation_error(error).message
        message = f"the request inside the file is not understood: {reason}"
        raise ServiceError(400, "invalid_file", message, "file") from None
