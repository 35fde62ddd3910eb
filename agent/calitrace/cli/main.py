"""Entry point: finds the command, runs it, and turns errors.Error into two lines and an exit code."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import logging
import os
import sys
import traceback
from pathlib import Path

import click

from calitrace import __version__
from calitrace.errors import EnvironmentUnfit, Error

UNDO = Path("/var/lib/calitrace/undo")  # what an earlier run changed; see cluster/undo.py, which is slow to import
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_COLLECT_EVERY = 50_000  # new objects: hardly any of ours is in a cycle, and a look for it at all of them takes time
COMMANDS = {
    "check": "Look through Calico's eBPF troubleshooting page and show the evidence.",
    "counters": "What Calico and the kernel count of lost packets: totals, then rates.",
    "doctor": "Say what this machine lacks, and what is lost without it.",
    "drops": "Every dropped packet with its cause: Calico's reason and rule, or the kernel's.",
    "lab": "Two Calico-like nodes in network namespaces of this machine.",
    "log": "Read Calico's debug log and put it together into packets.",
    "maps": "Read Calico's BPF maps: dump, get, summary, walk and diff.",
    "probe": "Send identified probes and say where they died.",
    "report": "Print the verdicts of a recorded journal.",
}


class Lazy(click.Group):
    """Loads the module of a command when that command is used: --help must stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(f"calitrace.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  calitrace lab up
  calitrace probe nodeport 10.10.0.1:30080 --from calitrace-client --trace -w a.calitrace
  calitrace report -r a.calitrace
""",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and the logs of clang and the verifier.")
@click.version_option(__version__, prog_name="calitrace")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Find where Calico's eBPF dataplane lost a packet, and why."""
    ctx.obj = debug
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if debug:  # not of pyroute2, which says every netlink message
        logging.getLogger("calitrace").setLevel(logging.DEBUG)
    if any(UNDO.glob("*.json")):
        from calitrace.cli.debug_level import put_back_leftovers

        put_back_leftovers()


def run() -> None:
    """The console script."""
    gc.set_threshold(_COLLECT_EVERY)
    _open_streams()
    try:
        # color: of the context, None for click to look at the terminal
        status = cli.main(standalone_mode=False, color=False if os.environ.get("NO_COLOR") else None)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(wrong.exit_code)
    except Error as failure:
        sys.exit(explain(failure, "--debug" in sys.argv))
    except OSError as failure:
        if failure.errno not in _NO_ROOM:
            raise
        with Path(os.devnull).open("w") as null:  # what is left to write fails no more at the end
            os.dup2(null.fileno(), 1)
        sys.exit(explain(EnvironmentUnfit(f"cannot write the output: {failure.strerror}"), "--debug" in sys.argv))
    except SystemExit:  # click's answer to a reader that has gone: `calitrace ... | head`
        sys.exit(141)
    sys.exit(status if isinstance(status, int) else 0)


def _open_streams() -> None:
    """See to it that stdin, stdout and stderr are open, and take any text.

    Python has None for one that was closed, and the next file that is opened would get its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an encoding may lack a character, a name may be no text


def explain(failure: Error, debug: bool) -> int:
    """Write ``error:`` and ``hint:`` to stderr; returns the exit status."""
    if debug:
        traceback.print_exception(failure)
        log = getattr(failure, "log", "")
        if log:
            click.echo(log, err=True)
    click.echo(f"error: {failure.cause}", err=True)
    if failure.hint:
        click.echo(f"hint: {failure.hint}", err=True)
    return int(failure.exit)
