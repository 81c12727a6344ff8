"""Define `pusa serve`, `pusa worker` and `pusa jobs`: a server, workers for its queue, and what it has to do.

The options of the first two are the fields of `ServerSettings`, which is imported when one of the two commands is used.
"""

import errno
import gc
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from pusa.cli.groups import Command, Group, json_option

if TYPE_CHECKING:
    from pusa.client import PusaClient
    from pusa.fields import FieldSpec
    from pusa.server.settings import ServerSettings

_SERVER_ONLY = re.compile(
    "host|port|api_.*|insecure|allowed_.*|root_path|trusted_.*|studio|docs|metrics|.*_limit|max_(?!failures).*|"
    "key_file.*|cut_.*|prompt_.*|probe_.*|head_.*|silent_.*|retry_.*|shutdown_.*|image_.*|min_free.*|orphan.*|housekeeping.*"
)
_SECRETS = frozenset({"api_keys", "prompt_key"})  # everyone on a machine can read its command lines
_HEAD_START_SECONDS = 1.5  # of the studio's page before the model is loaded
_SINGULAR = {"allowed_hosts": "allowed-host", "allowed_origins": "allowed-origin", "trusted_proxies": "trusted-proxy"}


class SettingsCommand(Command):
    """Give a command an option for each setting, made when its help or its arguments are read."""

    is_worker = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from pusa.fields import field_specs
        from pusa.server.settings import ServerSettings

        wanted = (field for field in field_specs(ServerSettings) if field.name not in _SECRETS)
        options = [_option(field) for field in wanted if not (self.is_worker and _SERVER_ONLY.fullmatch(field.name))]
        return [_CONFIG, *options, *super().get_params(ctx)]


class WorkerCommand(SettingsCommand):
    """Give a command an option for each setting that concerns a worker."""

    is_worker = True


_CONFIG = click.Option(
    ["--config"], type=click.Path(dir_okay=False), metavar="FILE", help="Settings in TOML. [default: $PUSA_CONFIG]"
)


def _option(field: "FieldSpec") -> click.Option:
    flag = "--" + _SINGULAR.get(field.name, field.name.replace("_", "-"))
    facts = [" ".join(filter(None, (field.range, field.unit)))]
    if field.unset or field.default not in (None, (), [], "", False, True):
        facts.append(f"default: {field.unset or field.default}")
    if field.type == "list":
        facts.append("may be repeated")
    hint = "; ".join(filter(None, facts))
    help = f"{field.help} [{hint}]" if hint else field.help
    if field.type == "boolean":
        names = [f"{flag}/--no-{flag[2:]}"] if field.default else [flag]
        return click.Option([*names, field.name], is_flag=True, default=None, help=help)
    types: dict[str, Any] = {"integer": click.INT, "number": click.FLOAT}
    return click.Option(
        [flag, field.name],
        type=click.Choice(field.choices) if field.choices else types.get(field.type, click.STRING),
        multiple=field.type == "list",
        help=help,
    )


@click.command(cls=SettingsCommand)
def serve(config: str | None, **options: Any) -> None:
    """Start the server: the API, a durable queue and a worker, and the studio where it is installed.

    Every option can also be set as PUSA_NAME in the environment, or in a TOML file; API keys only there
    (PUSA_API_KEYS=key,key).
    """
    settings = load_settings_from(config, options)
    listener = bind_listener(settings)
    run_server(settings, listener)


@click.command(cls=WorkerCommand)
def worker(config: str | None, **options: Any) -> None:
    """Run jobs of a server's queue, on this machine or another: give it the server's --database and --files."""
    settings = load_settings_from(config, options)

    from pusa.server.worker.worker import run_worker

    stop = threading.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: stop.set())
    logging.getLogger("pusa.server.worker.worker").info("working for %s", settings.model)
    _close_new_files(settings)
    run_worker(settings, stop)


def load_settings_from(config: str | None, options: dict[str, Any]) -> "ServerSettings":
    """Load settings from options, environment and file, and configure logging by them."""
    from pusa.server.logs import configure_logging
    from pusa.server.settings_sources import load_settings

    settings = load_settings(config, options=options)
    configure_logging(settings.log_format, settings.log_level)
    if settings.workers:  # what no job could be made with is an error now, not after the first job
        from pusa.cli.info import check_model

        check_model(settings.model)
        settings.marks.check()
    return settings


def bind_listener(settings: "ServerSettings") -> socket.socket:
    """Bind the server's socket, so that a wrong address is an error before anything starts.

    Raises:
        ValueError: the host is no address of this machine.
        RuntimeError: the port is taken, or not for this user.
    """
    host = settings.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise ValueError(f"--host {host!r} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {settings.port} is taken by another program: stop it, or give --port 0 for a free one"
        elif error.errno in (errno.EACCES, errno.EPERM):
            message = f"port {settings.port} is not for this user: give one above 1023"
        else:
            message = f"{host} port {settings.port} cannot be listened on: {error.strerror}"
        raise RuntimeError(message) from error
    listener.set_inheritable(False)
    return listener


def _close_new_files(settings: "ServerSettings") -> None:
    """Let only this user read new files, unless they go to a folder of their own, which machines may share."""
    if settings.files is None:
        os.umask(0o077)


@contextmanager
def _collection_put_off() -> Iterator[None]:
    """Look for unreachable objects neither while modules are loaded nor, later, among what they hold: it stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_server(settings: "ServerSettings", listener: socket.socket) -> None:
    """Serve until a signal ends it."""
    with _collection_put_off():
        import uvicorn

        from pusa.server.app import create_app
        from pusa.server.connections import raise_file_limit, uvicorn_options

        _close_new_files(settings)
        options = uvicorn_options(settings, raise_file_limit())
        app = create_app(settings, head_start_seconds=_HEAD_START_SECONDS if settings.studio else 0.0)

    class Server(uvicorn.Server):
        """Stop workers and open streams at the first signal, not only after the last request."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.stop()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(app, **options)
    host, port = listener.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    click.echo(f"pusa: http://{shown_host}:{port}{settings.root_path}/  (Ctrl-C stops)", err=True)
    server = Server(config)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when all is done
        server.run(sockets=[listener])
    if not server.started:
        raise RuntimeError("the server could not be started: its log says why")
    sys.stdout.flush()
    if threading.active_count() > 1:
        os._exit(0)  # a thread that waits for something outside must not hold the process up


# --- jobs of a server

_server = click.option(
    "--server", default="http://127.0.0.1:7860", metavar="URL", help="Of `pusa serve`.", show_default=True
)
_STATUSES = ("queued", "in_progress", "completed", "failed")


@click.group("jobs", cls=Group)
def jobs() -> None:
    """List a server's jobs, and have failed ones made once more. The API key is read from PUSA_API_KEY."""


@contextmanager
def _client(server: str) -> Iterator["PusaClient"]:
    from pusa.client import PusaClient, PusaError

    with PusaClient(server, max_retries=1) as client:  # a person waits, and can try again
        try:
            yield client
        except PusaError as error:
            raise RuntimeError(str(error)) from error


@jobs.command("list")
@click.option("--status", type=click.Choice(_STATUSES), help="Only jobs in this status.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Jobs to list, newest first.")
@_server
@json_option
def list_jobs(status: str | None, limit: int, server: str, as_json: bool) -> None:
    """List the newest jobs, with the reason where one has failed."""
    with _client(server) as client:
        for number, video in enumerate(client.list(page_size=min(limit, 100), status=status)):
            if number == limit:
                break
            if as_json:
                click.echo(json.dumps(video.details, ensure_ascii=False))
                continue
            reason = f"  {video.error['code']}: {video.error['message']}" if video.error else ""
            click.echo(f"{video.id}  {video.status:11}  {video.size:9}  {(video.prompt or '')[:40]}{reason}")


@jobs.command()
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--all-failed", is_flag=True, help="All that have failed or were cancelled.")
@_server
def retry(ids: tuple[str, ...], all_failed: bool, server: str) -> None:
    """Have failed or cancelled jobs made once more, from the beginning, with the same inputs and seed."""
    if bool(ids) == all_failed:
        raise click.UsageError("give the ids of jobs, or --all-failed")
    with _client(server) as client:
        for id in ids or [video.id for video in client.list(page_size=100, status="failed")]:
            click.echo(f"{id}  {client.retry(id).status}")
