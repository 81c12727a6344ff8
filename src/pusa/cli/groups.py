"""Define the classes of commands and groups, and the options that all of them share."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click


@dataclass
class Session:
    """Hold the options that concern how an error is reported, and which devices a video is made on."""

    debug: bool = False
    as_json: bool = False
    gpus: int | None = None
    ranks_on: str = "cuda"


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().obj.debug = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_debug,
        help="Show where an error comes from.",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Write lines of JSON, for scripts.")


class Command(click.Command):
    """Add ``--debug`` to a command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class Group(click.Group):
    """Add ``--debug`` to a group, and import some of its commands only when they are used.

    Args:
        lazy: ``"module:attribute"`` by the command's name.
    """

    command_class = Command
    group_class = type  # groups inside are of this class, too

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())
        self._lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in self._lazy:
            module, _, attribute = self._lazy[cmd_name].partition(":")
            self.add_command(getattr(import_module(module), attribute), cmd_name)
        return super().get_command(ctx, cmd_name)
