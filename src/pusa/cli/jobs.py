"""Define `pusa jobs`: look at the jobs of a server, and have failed ones made once more."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from pusa.cli.groups import Group, json_option

if TYPE_CHECKING:
    from pusa.client import PusaClient

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

    with PusaClient(server) as client:
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
