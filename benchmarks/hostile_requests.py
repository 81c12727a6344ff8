"""Send some thousand damaged requests and uploads to a server: does any of them bring out a mistake of ours?

    python benchmarks/hostile_requests.py --count 3000
    python benchmarks/hostile_requests.py --load       # what large bodies and idle connections cost (hostile_load.py)

Valid requests of every route are damaged at random (seeded): values of the wrong kind, fields added, dropped and
nested, bytes flipped in bodies, paths and headers, uploads cut and spliced under names that look like paths, and bytes
that are no HTTP at all. The server is a process of its own with the fake engine; its home, its temporary folder and
its working folder are watched. The exit status is 0 only if every request was answered without an unhandled error,
every refusal came in the error envelope, the server that answers last is the one that was started, and no file was
written outside of its data folder, nor left in its scratch folder.
"""

import argparse
import base64
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hostile_load
import httpx
from _support import ServerProcess
from hostile_media import mutated, samples

DONE = json.dumps({"steps": 1, "step_seconds": 0.0})
SLOW_SECONDS = 60.0  # probing has a limit of its own; a machine may be busy
UNKNOWN = "video_" + "0" * 32
_LOGGED = re.compile(
    r"^.*(?:unexpected error|broke off|Exception in ASGI).*(?:\n.*){0,60}?^\w.*(?:Error|Exception).*$", re.MULTILINE
)
REFUSALS_THAT_ARE_MEANT = {501, 503, 507}

NAMES = (
    "../../../../evil.png", "/etc/evil.png", "..\\..\\evil.png", "a\0b.png", "\u202egnp.evil", "evil.png/", ".", "..",
    "%2e%2e%2fevil.png", "C:\\evil.png", "a" * 300, "con", "~/evil", "$(touch evil)", "evil;touch evil", "\r\nX: y",
)  # fmt: skip
ABSURD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0, 0.1, "", " ", "\0", "a" * 5000, "\ud800",
    "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "https://localhost/a", "data:,",
    "data:image/png;base64,",
    [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": {}}}}, [0] * 2000, "0,1,2", "last", "-1f", "1e9s", "NaN", "4x4",
    "99999x99999", UNKNOWN, "'; DROP TABLE jobs; --", "${7*7}", "\u202e", "𝔘", "true",
)  # fmt: skip
FIELDS = (
    "prompt", "model", "seconds", "size", "input_reference", "width", "height", "num_frames", "fps", "seed", "lora",
    "num_inference_steps", "guidance_scale", "flow_shift", "negative_prompt", "extra_params", "keyframes", "task",
    "cond_positions", "noise_multipliers", "noise_multiplier", "lora_alpha", "preset", "window", "overlap", "priority",
    "image_reference", "video_reference", "video", "unknown", "__proto__", "keyframes[0][file]", "a[b][c][d][e]", "[]",
)  # fmt: skip


@dataclass
class Sent:
    """A request as httpx takes it, and what kind of damage it has."""

    kind: str
    method: str = "POST"
    path: str = "/v1/videos"
    arguments: dict[str, Any] = field(default_factory=dict)


class Mutator:
    """Requests without end, the same for the same seed."""

    def __init__(self, seed: int, files: dict[str, bytes]) -> None:
        self.rng = random.Random(seed)
        self.files = list(files.values())
        self.ids: list[str] = [UNKNOWN]
        self.kinds: dict[str, tuple[float, Callable[[], Sent]]] = {
            "fields of JSON": (0.28, self.json_fields),
            "bytes of JSON": (0.12, self.json_bytes),
            "fields of a form": (0.15, self.form_fields),
            "bytes of a form": (0.1, self.form_bytes),
            "uploads": (0.1, self.upload),
            "paths and queries": (0.15, self.path),
            "headers": (0.1, self.header),
        }

    def next(self) -> Sent:
        [kind] = self.rng.choices(list(self.kinds), [weight for weight, _ in self.kinds.values()])
        sent = self.kinds[kind][1]()
        sent.kind = kind
        return sent

    def small(self) -> bytes:
        return self.rng.choice(self.files)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a valid request, before the damage."""
        rng = self.rng
        values: dict[str, Any] = {"prompt": DONE, "seconds": "1", "size": "96x64", "num_inference_steps": 2, "seed": 1}
        image = "data:image/png;base64," + base64.b64encode(self.small()[:400]).decode()
        for name, value in (
            ("keyframes", [{"latent": 0, "image_url": image, "noise": 0.2}]),
            ("cond_positions", [0, "last"]),
            ("extra_params", {"seed": 2, "flow_shift": 3.0}),
            ("input_reference", {"image_url": image}),
            ("noise_multipliers", "0,0.2"),
            ("video", {"id": rng.choice(self.ids)}),
        ):
            if rng.random() < 0.15:
                values[name] = value
        return values

    def damaged(self, value: Any) -> Any:
        """The same with some places of it replaced, added or taken out, at any depth."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.9:
            result = dict(value)
            for _ in range(rng.choice((1, 1, 2, 3))):
                name = rng.choice([*result, *rng.sample(FIELDS, 2)])
                match rng.randrange(4):
                    case 0:
                        result.pop(name, None)
                    case 1 if name in result:
                        result[name] = self.damaged(result[name])
                    case _:
                        result[name] = rng.choice(ABSURD)
            return result
        if isinstance(value, list) and value and rng.random() < 0.7:
            return [self.damaged(part) for part in value] * rng.choice((1, 1, 2, 50))
        return rng.choice(ABSURD)

    def route(self) -> str:
        id = self.rng.choice(self.ids)
        return self.rng.choice(
            (
                "/v1/videos",
                "/v1/videos",
                "/v1/videos",
                "/v1/videos/extensions",
                "/v1/videos/edits",
                f"/v1/videos/{id}/remix",
            )
        )

    def json_fields(self) -> Sent:
        values = self.fields()
        body = json.dumps(values if self.rng.random() < 0.2 else self.damaged(values))
        return Sent("", path=self.route(), arguments={"content": body, "headers": {"content-type": "application/json"}})

    def json_bytes(self) -> Sent:
        body = mutated(json.dumps(self.fields()).encode(), self.small(), self.rng)
        return Sent("", path=self.route(), arguments={"content": body, "headers": {"content-type": "application/json"}})

    def form(self) -> list[tuple[str, Any]]:
        values = self.damaged(self.fields())
        values = values if isinstance(values, dict) else {"prompt": DONE}
        texts = [(n, v if isinstance(v, str) else json.dumps(v)) for n, v in values.items()]
        return [(name, (None, text.encode("utf-8", "replace"))) for name, text in texts]

    def form_fields(self) -> Sent:
        return Sent("", path=self.route(), arguments={"files": self.form()})

    def form_bytes(self) -> Sent:
        parts = [*self.form(), ("input_reference", ("a.png", self.small(), "image/png"))]
        request = httpx.Request("POST", "http://localhost/", files=parts)
        body = mutated(request.read(), self.small(), self.rng)
        kind = request.headers["content-type"]
        if self.rng.random() < 0.2:
            kind = mutated(kind.encode(), b"; boundary=--", self.rng).decode("latin-1")
        kind = "".join(c for c in kind if 32 <= ord(c) < 127)
        return Sent("", path=self.route(), arguments={"content": body, "headers": {"content-type": kind}})

    def upload(self) -> Sent:
        rng = self.rng
        parts: list[tuple[str, Any]] = [("prompt", (None, DONE.encode())), ("num_inference_steps", (None, b"2"))]
        for _ in range(rng.choice((1, 1, 2, 20))):
            content = mutated(self.small(), self.small(), rng) if rng.random() < 0.85 else self.small()
            name = rng.choice(NAMES).encode("utf-8", "replace").decode("utf-8", "replace")
            field_name = rng.choice(
                ("input_reference", "input_reference[]", "video", "video[]", "video_reference", "x")
            )
            parts.append((field_name, (name, content, rng.choice(("image/png", "video/mp4", "text/html", "")))))
        return Sent("", path=self.route(), arguments={"files": parts})

    def path(self) -> Sent:
        rng = self.rng
        id = rng.choice((*self.ids, *map(str, ABSURD[:12]), *NAMES))
        tail = rng.choice(
            ("", "/content", "/events", "/cancel", "/remix", "/content?variant=", "/content?variant=x", "/..")
        )
        base = rng.choice(
            ("/v1/videos/", "/v1/models/", "/v1/videos/characters/", "/", "/v1/", "//", "/studio/", "/docs/")
        )
        query = rng.choice(
            ("", "", "?limit=", "?limit=1e9", "?limit=-1", "?after=%00", "?order=[]", "?a=" + "b" * 3000)
        )
        quoted = quote((base + id)[:2000], safe="/.%\\", errors="replace")
        method = rng.choice(("GET", "GET", "GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD"))
        if method == "DELETE" and id in self.ids[1:]:
            self.ids.remove(id)
        return Sent("", method, quoted + tail + (query if "?" not in tail else ""))

    def header(self) -> Sent:
        rng = self.rng
        name, values = rng.choice(
            (
                (
                    "range",
                    ("bytes=-", "bytes=0-0,5-9", "bytes=99999999999999999999-", "bytes=-0", "x" * 500, "bytes=5-1"),
                ),
                ("idempotency-key", ("", "a" * 300, "k", "\xe4", "' OR 1=1")),
                ("x-stainless-retry-count", ("1", "-1", "9" * 50, "x")),
                ("host", ("evil.org", "", "[::1", "localhost:99999", "a" * 500, "127.0.0.1:x", "\xe4")),
                ("origin", ("null", "http://evil.org", "://", "https://[", "\xe4")),
                ("authorization", ("Bearer", "Basic !!!", "Bearer \xe4", "Basic " + "A" * 3000)),
                ("x-request-id", ("", "a" * 500, "{}", "\xe4")),
                ("accept", ("", "text/html", "*/*;q=9", "application/binary")),
                ("traceparent", ("x" * 55, "00-" + "0" * 52)),
                ("content-type", ("application/json; charset=utf-7", "multipart/form-data; boundary=", "/", "a" * 500)),
                ("if-none-match", ("*", '"', "a" * 500)),
                ("last-event-id", ("-1", "9" * 99)),
            )
        )
        value = rng.choice(values).encode("latin-1")
        body = {"content": json.dumps(self.fields())}
        method, path, more = rng.choice(
            (
                ("POST", "/v1/videos", body),
                ("GET", "/v1/videos", {}),
                ("GET", f"/v1/videos/{rng.choice(self.ids)}/content", {}),
            )
        )
        headers = {"content-type": b"application/json", name: value}
        return Sent("", method, path, {**more, "headers": headers})


# ---- bytes that are no HTTP ------------------------------------------------------------------------------------------


def raw(rng: random.Random) -> bytes:
    body = json.dumps({"prompt": DONE}).encode()
    head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    valid = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    return rng.choice(
        (
            mutated(valid, b"GET / HTTP/1.1\r\n\r\n", rng),
            rng.randbytes(200),
            head + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
            head + b"Content-Length: -1\r\n\r\n" + body,
            head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + body,
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
            head + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
            b"GET /v1/videos HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n",
            valid[: len(valid) // 2],
        )
    )


def send_raw(port: int, data: bytes) -> str:
    """The status of the answer, or "closed"."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
    except OSError:
        return "closed"
    return answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "closed"


# ---- the run ---------------------------------------------------------------------------------------------------------


def outcome(client: httpx.Client, sent: Sent) -> tuple[str, str, dict[str, Any]]:
    """("2xx" and so on | "unhandled" | "unclear", what came, the answer if it is an object)."""
    began = time.monotonic()
    try:
        with client.stream(sent.method, sent.path, **sent.arguments) as answer:
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return "2xx", "", {}
            answer.read()
    except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError):
        return "not sent", "", {}  # the client refuses to send it
    except httpx.TransportError as error:
        return "closed", repr(error), {}
    if time.monotonic() - began > SLOW_SECONDS:
        return "unclear", f"took {time.monotonic() - began:.0f} s", {}
    try:
        body = answer.json()
    except ValueError:
        body = None
    told = f"{answer.status_code} {answer.text[:300]}"
    if answer.status_code >= 500 and answer.status_code not in REFUSALS_THAT_ARE_MEANT:
        return "unhandled", told, {}
    if answer.status_code >= 400 and sent.method != "HEAD":
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code", "values"}:
            return "unclear", told, {}
    return f"{answer.status_code // 100}xx", "", body if isinstance(body, dict) else {}


def files_in(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def run(count: int, seed: int, root: Path) -> dict[str, Any]:
    """The figures of a run in the empty folder `root`."""
    watched = [root / name for name in ("home", "tmp", "cwd")]
    for folder in (*watched, root / "samples"):
        folder.mkdir()
    mutator = Mutator(seed, samples(root / "samples"))
    before = dict(os.environ), Path.cwd()
    os.environ |= {"HOME": str(watched[0]), "TMPDIR": str(watched[1]), "XDG_CACHE_HOME": str(watched[0])}
    os.chdir(watched[2])
    server = ServerProcess(
        root / "data",
        fake=True,
        model="fake",
        studio="false",
        queue_limit="1000000",
        max_body_bytes=str(2**20),
        probe_seconds="30",
        min_free_bytes="0",
    )
    table: dict[str, Counter[str]] = {kind: Counter() for kind in (*mutator.kinds, "no HTTP at all")}
    wrong: list[str] = []
    began = time.monotonic()
    try:
        with server, httpx.Client(base_url=server.url, timeout=SLOW_SECONDS * 2, trust_env=False) as client:
            for number in range(count):
                if number % 10 == 0:
                    status = send_raw(server.port, raw(mutator.rng))
                    kind, told = "no HTTP at all", status
                    result = "unhandled" if status.startswith("5") and status != "501" else status[:1] + "xx"
                    result = "closed" if status == "closed" else result
                else:
                    sent = mutator.next()
                    kind = sent.kind
                    result, told, body = outcome(client, sent)
                    if body.get("object") == "video" and len(mutator.ids) < 50:
                        mutator.ids.append(body["id"])
                    if result == "closed":  # mutated bytes may end a connection; the next request tells the rest
                        told = ""
                table[kind][result] += 1
                if result in ("unhandled", "unclear"):
                    wrong.append(f"{kind}: {told}")
            same = client.get("/health").is_success and server.is_running
            scratch = list((root / "data" / "scratch" / "uploads").glob("*"))
    finally:
        os.environ.clear()
        os.environ.update(before[0])
        os.chdir(before[1])
    log = server.log.read_text(errors="replace")
    outside = files_in(*watched) | {
        p for p in root.iterdir() if p.name not in ("data", "data.log", "samples", "home", "tmp", "cwd")
    }
    return {
        "count": count,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": {kind: dict(results) for kind, results in table.items()},
        "unhandled": sum(results["unhandled"] for results in table.values()),
        "unclear": sum(results["unclear"] for results in table.values()),
        "logged": len(re.findall("unexpected error|broke off|Exception in ASGI", log)),
        "outside": len(outside),
        "left_in_scratch": len(scratch),
        "same_process": same,
        "wrong": wrong[:20] + _LOGGED.findall(log)[:20],
    }


def is_good(figures: dict[str, Any]) -> bool:
    return figures["same_process"] and not any(
        figures[name] for name in ("unhandled", "unclear", "logged", "outside", "left_in_scratch")
    )


def report(figures: dict[str, Any]) -> None:
    columns = ("2xx", "3xx", "4xx", "5xx", "closed", "not sent", "unhandled", "unclear")
    print(f"{'requests with damaged':<22}" + "".join(f"{column:>10}" for column in columns))
    for kind, results in figures["outcomes"].items():
        print(f"{kind:<22}" + "".join(f"{results.get(column, 0):>10}" for column in columns))
    for line in figures["wrong"]:
        print(line)
    print(
        f"{figures['count']} requests in {figures['seconds']} s: {figures['unhandled']} unhandled errors, "
        f"{figures['unclear']} unclear answers, {figures['logged']} errors in the log, {figures['outside']} files "
        f"outside the data folder, {figures['left_in_scratch']} left in the scratch folder; "
        f"{'the same process answers' if figures['same_process'] else 'the process has ended'}"
    )
    print(json.dumps({name: value for name, value in figures.items() if name != "wrong"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", action="store_true", help="large bodies, idle and slow connections instead")
    arguments = parser.parse_args()
    if arguments.load:
        hostile_load.main([])
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = run(arguments.count, arguments.seed, Path(folder))
    report(figures)
    sys.exit(0 if is_good(figures) else 1)


if __name__ == "__main__":
    main()
