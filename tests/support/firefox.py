"""Drive the Firefox of the system over WebDriver BiDi, as Playwright drives none but its own build."""

import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from needs import missing
from ports import free_port
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("firefox-esr", "firefox")
_START_SECONDS = 120.0
_ANSWER_SECONDS = 60.0


class Firefox:
    """A tab of Firefox, with real keys and clicks; `errors` are those of its pages."""

    def __init__(self, connection: ClientConnection) -> None:
        self.errors: list[str] = []
        self._connection, self._numbers = connection, itertools.count(1)
        self._call("session.new", capabilities={})
        self._call("session.subscribe", events=["log.entryAdded"])
        self._tab = self._call("browsingContext.create", type="tab")["context"]
        self._call("browsingContext.setViewport", context=self._tab, viewport={"width": 1366, "height": 768})

    def open(self, url: str) -> None:
        self._call("browsingContext.navigate", context=self._tab, url=url, wait="complete")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript, which must be JSON."""
        expression = f"Promise.resolve({expression}).then(JSON.stringify)"
        target = {"context": self._tab}
        answer = self._call("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert answer["type"] == "success", answer
        return json.loads(answer["result"]["value"])

    def until(self, expression: str, seconds: float = 60.0) -> None:
        """Wait for an expression in JavaScript to be true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never: {expression}; errors: {self.errors}"
            time.sleep(0.05)

    def middle_of(self, selector: str) -> tuple[int, int]:
        """Scroll to an element, and return where its middle is."""
        box = f"(e => (e.scrollIntoView({{block: 'nearest'}}), e.getBoundingClientRect()))({_element(selector)})"
        x, y = self.evaluate(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        return round(x), round(y)

    def click(self, selector: str) -> None:
        self.until(_element(selector))
        self.drag(self.middle_of(selector))

    def drag(self, *points: tuple[int, int]) -> None:
        """Press at the first point, move over the others, and let go at the last one."""
        moves = [{"type": "pointerMove", "x": x, "y": y, "duration": 50} for x, y in points]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        self._act({"type": "pointer", "id": "mouse", "actions": actions})

    def write(self, text: str) -> None:
        """Press the keys of a text where the focus is."""
        keys = [{"type": kind, "value": letter} for letter in text for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": keys})

    def _act(self, source: dict[str, Any]) -> None:
        self._call("input.performActions", context=self._tab, actions=[source])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=_ANSWER_SECONDS))
            if message.get("method") == "log.entryAdded" and message["params"]["level"] == "error":
                self.errors.append(message["params"]["text"])
            if message.get("id") == number:
                assert message["type"] == "success", message
                return message["result"]


def _element(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"


@contextmanager
def firefox() -> Iterator[Firefox]:
    """A tab of a Firefox of its own; skips, or fails as `needs.missing` says, where none is installed."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        missing("firefox", "it is not on the PATH: apt-get install firefox-esr")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [program, "--headless", "--no-remote", "--profile", folder, "--remote-debugging-port", str(port)]
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                with _connect(f"ws://127.0.0.1:{port}/session", process, log) as connection:
                    yield Firefox(connection)
            finally:
                process.terminate()


def _connect(url: str, process: subprocess.Popen[bytes], log: Path) -> ClientConnection:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            return connect(url, max_size=None, proxy=None)
        except (OSError, WebSocketException):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < end, f"Firefox does not listen: {log.read_text(errors='replace')}"
            time.sleep(0.2)
