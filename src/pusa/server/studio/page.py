"""Serve the page and its files, which the browser loads as they are.

All files stand below a path that holds a hash of their content: a browser keeps them for ever, and a new version has
new addresses. Nothing here needs a key: the page is the same for everyone, what it shows comes from the API.
"""

import gzip
import hashlib
import html
import json
import mimetypes
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

from pusa.server.studio import examples

WEB = Path(__file__).parent / "web"
LANGUAGES = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))["name"] for path in sorted(WEB.glob("locales/*.json"))
}
"""Names of the page's languages, each in itself, by code."""

PATHS = ("/", "/studio/", "/favicon.ico")
"""What this module serves, below the last but one too; none of it needs a key."""

_STYLES = ("tokens", "base", "shell", "form", "timeline", "result", "gallery")
_LIBRARIES = {
    "preact": "preact.js",
    "preact/hooks": "preact-hooks.js",
    "htm": "htm.js",
    "@preact/signals-core": "signals-core.js",
    "@preact/signals": "signals.js",
    "intl-messageformat": "intl-messageformat.js",
}
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".webp": "image/webp", ".json": "application/json"}
_COMPRESSED = (".js", ".css", ".json", ".svg", ".html")
_FOR_EVER = {"cache-control": "public, max-age=31536000, immutable"}


@dataclass(frozen=True)
class _File:
    content: bytes
    compressed: bytes | None
    media_type: str

    @classmethod
    def of(cls, path: Path) -> "_File":
        content = path.read_bytes()
        kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return cls(content, gzip.compress(content, mtime=0) if path.suffix in _COMPRESSED else None, kind)

    @classmethod
    def of_text(cls, text: str, kind: str = "text/css") -> "_File":
        return cls(text.encode(), gzip.compress(text.encode(), mtime=0), kind)

    def response(self, request: Request, headers: dict[str, str]) -> Response:
        if self.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
            headers = {**headers, "content-encoding": "gzip", "vary": "accept-encoding"}
            return Response(self.compressed, media_type=self.media_type, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def router() -> APIRouter:
    """Build the routes of the page and its files."""
    routes = APIRouter(include_in_schema=False)
    paths = {str(path.relative_to(WEB).as_posix()): path for path in sorted(WEB.rglob("*")) if path.is_file()}
    paths |= {f"examples/{name}": path for name, path in examples.public_files().items()}
    files = {name: _File.of(path) for name, path in paths.items()}
    files["styles.css"] = _File.of_text("\n".join((WEB / f"styles/{name}.css").read_text("utf-8") for name in _STYLES))
    stamp = hashlib.sha256(b"".join(name.encode() + file.content for name, file in files.items())).hexdigest()[:16]
    text, policy = _page(f"studio/{stamp}", list(files))
    page = _File.of_text(text, "text/html; charset=utf-8")

    @routes.get("/")
    async def index(request: Request) -> Response:
        return page.response(request, {"cache-control": "no-cache", "content-security-policy": policy})

    @routes.get("/studio/{version}/{name:path}")
    async def file(request: Request, version: str, name: str) -> Response:
        if name not in files or version != stamp:
            raise HTTPException(404)
        return files[name].response(request, _FOR_EVER)

    @routes.get("/favicon.ico")
    async def favicon(request: Request) -> Response:
        return files["favicon.svg"].response(request, {"cache-control": "no-cache"})

    return routes


def _page(base: str, names: list[str]) -> tuple[str, str]:
    """Return the page, whose files are below `base`, and its content security policy."""
    first = (WEB / "first.js").read_text(encoding="utf-8").replace("LANGUAGES", json.dumps(list(LANGUAGES)))
    libraries = {name: f"./{base}/vendor/{file}" for name, file in _LIBRARIES.items()}
    imports = json.dumps({"imports": libraries})
    data = {"languages": LANGUAGES, "examples": examples.as_json()}
    modules = [name for name in names if name.endswith(".js") and name not in ("first.js", "app.js")]
    values = {
        "base": base,
        "first": first,
        "imports": imports,
        "data": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
        "styles": f'<link rel="stylesheet" href="{base}/styles.css">',  # one request instead of one for each file
        "preloads": "\n".join(f'<link rel="modulepreload" href="{base}/{html.escape(name)}">' for name in modules),
    }
    text = (WEB / "index.html").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (first, imports))
    policy = (
        f"default-src 'self'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; worker-src 'self'; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    )
    return text, policy
