"""Define `pusa studio`: start the server with its page and open it in the browser."""

import json
import os
import sys
import threading
import urllib.request
import webbrowser
from contextlib import suppress
from typing import Any

import click

from pusa.cli.serve import SettingsCommand, bind_listener, load_settings_from, run_server

_BROWSER_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


@click.command(cls=SettingsCommand)
@click.option("--browser/--no-browser", default=True, help="Open the page in the browser.")
def studio(config: str | None, browser: bool, **options: Any) -> None:
    """Open the studio: a page to make videos with.

    It is the page that `pusa serve` shows, with the same options. If a server of pusa already listens on the port, open
    its page.
    """
    settings = load_settings_from(config, {**options, "studio": True})
    try:
        listener = bind_listener(settings)
    except RuntimeError:
        address = _address(settings.host, settings.port, settings.root_path)
        if not _is_pusa(address):
            raise
        click.echo(f"pusa: a server is there already: {address}", err=True)
        if browser:
            _open(address)
        return
    listener.listen()  # the browser starts while the server does: its first request waits here
    if browser:
        address = _address(settings.host, listener.getsockname()[1], settings.root_path)
        threading.Thread(target=_open, args=(address,), name="open-browser", daemon=True).start()
    run_server(settings, listener)


def _address(host: str, port: int, root_path: str) -> str:
    host = host.strip("[]")
    host = _BROWSER_HOSTS.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}{root_path}/"


def _is_pusa(address: str) -> bool:
    """Return True if a server of pusa answers at the address."""
    with suppress(OSError, ValueError), urllib.request.urlopen(address + "health", timeout=2) as answer:
        return "version" in json.load(answer)
    return False


def _open(address: str) -> None:
    """Open a page in the browser; without a screen do nothing, since a text browser would take over the terminal."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    with suppress(webbrowser.Error):
        webbrowser.open(address)
