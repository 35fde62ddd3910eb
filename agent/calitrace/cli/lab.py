"""`calitrace lab`: two Calico-like nodes in network namespaces of this machine."""

from __future__ import annotations

import functools
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import click

from calitrace.cli.commands import Commands
from calitrace.errors import Exit, UsageError
from calitrace.kernel import netns
from calitrace.lab import faults, lifecycle, report
from calitrace.lab.topology import DEFAULT_NAME, PARTS, UNDERLAY_MTU, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

EPILOG = """\b
Examples:
  calitrace lab up
  calitrace lab exec client -- nc 10.10.0.1 30080
  calitrace lab fault vxlan-blocked
  calitrace lab heal
  calitrace lab down
"""


def _say(text: str) -> None:
    click.echo(text, err=True)


def _for_lab(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --name, and hand the lab it names to the command."""

    @click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which lab; several can be up.")
    @functools.wraps(function)
    def wrapped(name: str, **options: Any) -> Any:
        return function(Lab(name), **options)

    return wrapped


@click.group(cls=Commands, epilog=EPILOG)
def command() -> None:
    """Two Calico-like nodes, their pods and a client outside, on this machine.

    Every packet crosses real network namespaces and BPF programs that keep Calico's maps, marks and log
    lines. All of it is the lab's own: `down` removes it, also after a crash.
    """


@command.command(epilog="\b\nExamples:\n  calitrace lab up\n  calitrace lab up --name second --mtu 1400\n")
@click.option("--mtu", default=UNDERLAY_MTU, show_default=True, help="Of the underlay; pods get 50 less.")
@_for_lab
def up(lab: Lab, mtu: int) -> None:
    """Make the lab; undo everything if that fails."""
    try:
        lifecycle.up(lab, mtu=mtu, progress=_say)
    except lifecycle.Interrupted as stopped:
        _say(f"error: {stopped.cause}")
        # Ended by the signal itself: that is what the caller of a command expects to see.
        signal.signal(stopped.signal_number, signal.SIG_DFL)
        os.kill(os.getpid(), stopped.signal_number)
    _say(f"the lab is up; `{lab.command('status')}` shows its services")


@command.command(epilog="\b\nExamples:\n  calitrace lab status\n  calitrace lab status -o json | jq .services\n")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@_for_lab
def status(lab: Lab, output: str) -> int:
    """Show what there is. Exit status 1 when a lab is there but incomplete."""
    seen = report.inspect(lab)
    if output == "json":
        click.echo(json.dumps(seen, indent=1))
    else:
        click.echo("\n".join(report.lines(seen)))
    return Exit.DONE if seen["state"] in ("up", "absent") else Exit.FINDINGS


@command.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="\b\nExamples:\n"
    "  calitrace lab exec client -- nc 10.10.0.1 30080\n"
    "  calitrace lab exec node-a -- ip route\n",
)
@click.argument("node", metavar="NODE", type=click.Choice(PARTS))
@click.argument("words", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@_for_lab
def execute(lab: Lab, node: str, words: tuple[str, ...]) -> None:
    """Run a command in client, fabric, node-a, node-b, pod-a or pod-b.

    The exit status is the command's own.
    """
    faults.loaded(lab)
    words = words[1:] if words[0] == "--" else words
    if not words:
        raise UsageError("no command to run", f"try `calitrace lab exec {node} -- ip addr`")
    with netns.inside(lab.namespace(node)):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would pass that on
        try:
            os.execvp(words[0], words)
        except OSError as wrong:
            raise UsageError(
                f"cannot run {words[0]}: {wrong.strerror}", "the command is looked up in this machine's PATH"
            ) from None


_FAULTS = "\b\nFaults:\n" + "".join(f"  {name:14} {text}\n" for name, text in faults.FAULTS.items())


@command.command(epilog=_FAULTS + "\nExample: calitrace lab fault vxlan-blocked")
@click.argument("fault_name", metavar="NAME", type=click.Choice(list(faults.FAULTS)))
@_for_lab
def fault(lab: Lab, fault_name: str) -> None:
    """Break the lab in one known way, one at a time."""
    faults.inject(lab, fault_name)
    _say(f"{fault_name}: {faults.FAULTS[fault_name]}")


@command.command(epilog="Example: calitrace lab heal")
@_for_lab
def heal(lab: Lab) -> None:
    """Undo every fault."""
    was = faults.heal(lab)
    _say(f"healed: {was}" if was else "no fault was in")


@command.command("log-level", epilog="Example: calitrace lab log-level debug")
@click.argument("level", metavar="debug|off", type=click.Choice(["debug", "off"]))
@_for_lab
def log_level(lab: Lab, level: str) -> None:
    """Switch the debug log of the nodes' programs (bpfLogLevel)."""
    faults.set_log_level(lab, level)
    _say(f"log level {level}")


@command.command(epilog="Example: calitrace lab down")
@_for_lab
def down(lab: Lab) -> None:
    """Remove the lab, whole or half-made."""
    removed = lifecycle.down(lab, progress=_say)
    _say(f"lab {lab.name} is gone" if removed else f"there is no lab {lab.name}: nothing to do")
