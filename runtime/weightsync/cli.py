"""`weightsync`: finds the command that is asked for and imports that one alone, so that `--help` needs no torch.

An error of ours is one line with its cure: exit code 2 when the question is wrong, 1 for all else.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from weightsync.errors import ConfigError, UnsupportedLayout, WeightSyncError

COMMANDS = {
    "bench": "measure wire and conversion between two processes or two nodes",
    "inspect": "plan a push from a model's config and two meshes, and count it",
    "push": "send a checkpoint into running engines, with no trainer",
    "verify": "have engines measure their live memory again",
}
"""Each has a module of its name in `weightsync.commands`, with a click command called `command`."""


class _WrongQuestion(click.ClickException):
    exit_code = 2


class _Lazy(click.Group):
    """A group that lists what it has without importing it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"weightsync.commands.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WeightSyncError as error:
            wrong_question = isinstance(error, ConfigError | UnsupportedLayout)
            raise (_WrongQuestion if wrong_question else click.ClickException)(str(error)) from error


@click.group(cls=_Lazy)
def main() -> None:
    """Push a trainer's weights into live vLLM engines, and find out beforehand what that takes.

    `weightsync COMMAND --help` explains a command with an example.
    """


if __name__ == "__main__":
    main()
