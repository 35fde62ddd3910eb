"""Groups of commands whose help says of each command the whole first sentence."""

from __future__ import annotations

import click


class Commands(click.Group):
    """A group, and the groups within it; click alone cuts what is longer than a line."""

    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, each.get_short_help_str(10_000)) for name, each in found if each and not each.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
