"""Write docs/man/*.1 from the commands' own help, so that they cannot drift apart; --check only compares."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path

import click

from calitrace import __version__
from calitrace.cli.main import COMMANDS, cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "man"

EXIT_STATUS = """\
0  done.
1  findings: a probe was not answered, or something is lacking.
2  the command line is wrong.
3  this machine lacks something.
4  there is no Calico eBPF dataplane where one was needed."""

EXTRA: dict[str, dict[str, str]] = {
    "probe": {
        "FIELDS": """\
ms         since the probe was sent, milliseconds
where      network namespace; the prefix that all share is left out
interface  or, for a line of Calico's, its tag: -I towards the endpoint,
           -E away from it
what       in (netif_receive_skb, before tc ingress), out (net_dev_queue,
           after tc egress), DROP with the kernel's reason, Calico with its
           verdict; the packet where it changed""",
        "OVERHEAD": """\
Without --trace none. With it every packet of the node is looked at by four
BPF programs: 90 to 210 ns each, and 310 to 540 ns for each event of a probe
packet (make bench; 2 cores, Linux 6.18, kernel run-time statistics, of which
an empty program has 65 ns).
Calico's own debug log is read, never switched on.""",
        "REQUIREMENTS": """\
root (CAP_NET_RAW; with --trace CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and
CAP_SYS_ADMIN), for --trace BCC and a kernel with BTF. calitrace doctor names
what is missing.""",
    },
    "drops": {
        "FIELDS": """\
TIME       wall clock
INTERFACE  where it was dropped; in, out: at the tc ingress or egress hook
PACKET     as it was then: after NAT, out of its tunnel
CAUSE      calico, its reason, and the rule; of others the kernel's reason and
           the function that dropped, or the tc program
EVIDENCE   what names the cause: log, state (Calico's, of this very packet),
           counters, maps, routes, hook (who sits there), kernel
closing    seen = shown + harmless + filtered + limited + unsampled + lost; what
           our program took for each drop""",
        "OVERHEAD": """\
For each drop on the machine 150 ns, 190 where the rate limit holds it back, 600
to 800 for one that is sent with Calico's state; nothing for other packets. With
a journal 100,000 drops a second took 17 % of a CPU (make bench; 2 cores, Linux
6.18, kernel run-time statistics, of which an empty program has 65 ns).""",
        "REQUIREMENTS": """\
root (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN), BCC and a kernel with
BTF; reasons since Linux 5.17. None with -r.""",
    },
    "log": {
        "FIELDS": """\
TIME       of the trace's clock, when the packet left the program
PROCESS    in whose context the program ran: seldom the packet's owner
INTERFACE  with Calico's policy direction: -I to the endpoint, -E from it (on a
           pod's interface the opposite of the tc hook), -X XDP
VERDICT    ALLOW, DENY, or - where the program prints none
EXEC       its execution time, most of which is the cost of printing
PACKET     addresses and ports before NAT, [what the program did], (what is not
           whole about the lines)
docs/calico-log.md explains every line.""",
        "OVERHEAD": """\
Reading costs the node 600 ns for each line printed (make bench; 2 cores, Linux
6.18, kernel run-time statistics, of which an empty program has 65 ns), nothing
while no program prints. Printing is Calico's: 12 to 28 us for each packet and
program at level Debug.""",
        "REQUIREMENTS": """\
root and Linux 5.9 for the kernel's lines; none with -r. --enable-debug: the
Python package kubernetes, and an account that may change FelixConfigurations.""",
    },
    "maps": {
        "FIELDS": """\
The text of dump is that of calico-node -bpf, conntrack's with what follows
expires in; JSON keys in docs/json.md. Active ago, expires in: since the last
packet, and until Felix removes the entry with its default timeouts.""",
        "OVERHEAD": """\
Reading costs the node a batch of system calls: half a second of one CPU for a
million conntrack entries (make bench). Nothing is changed but by clean,
remove and flush, which need --allow-system-changes.""",
        "REQUIREMENTS": """\
root (CAP_BPF, CAP_SYS_ADMIN) for the maps of this node; none with -r and
--bpftool.""",
    },
    "report": {
        "FIELDS": "As in calitrace-probe(1); JSON keys in docs/json.md.",
        "OVERHEAD": "None: it reads the journal alone, on any machine, without root.",
    },
    "check": {
        "FIELDS": """\
ERROR, WARNING, INFO  traffic is lost; can be lost, or is slow; worth knowing
id, subject           the check, and the interface, map or service it is about
saw                   the very line, counter, bytes or object
means                 what that does to traffic
fix                   a command to run, or what to change
page                  the section of Calico's page "Troubleshoot eBPF mode"
NOT RUN               checks that could not look, by reason; never passed""",
        "OVERHEAD": """\
Two seconds on a node with 200 interfaces and 10,000 services (make bench), one of
them between two measurements (--interval). For that second the kernel times each
run of a BPF program (20 to 30 ns each); nothing else is changed. From the API
server each list is read once, in pages of 500; Secrets are never read. Packets
are sent only with --probe.""",
        "REQUIREMENTS": """\
root for programs, maps and other processes; what cannot be read is NOT RUN. For
the cluster, the Python package kubernetes and an account that may get and list
nodes, services, endpointslices, daemonsets, configmaps, pods and pods/log, and
Calico's felixconfigurations and ippools.""",
    },
    "counters": {
        "FIELDS": """\
SOURCE      calico     Calico's counters map: packets by reason. TOTAL_PACKETS,
                       ACCEPTED_ and REDIRECT are no drops. Some of Calico's
                       drops have no reason: they are in clsact's count only
            clsact     what programs at the interface's tc hooks dropped, both
                       together: tc -s qdisc
            tcx        the kernel has no such counter for tcx programs. With
                       --tcx, all drops by programs at that hook (the kernel's
                       drop reason TC_INGRESS or TC_EGRESS), counted from the
                       start of the run by a BPF program of ours
            interface  drops and errors, as ip -s link has them. tx_dropped may
                       also have packets that a program redirected to the
                       interface and its own egress program dropped
            qdisc      other qdiscs: tc -s qdisc
            softnet    of a CPU and the whole machine: dropped, the backlog was
                       full; time_squeeze, packets had to wait (no drop)
PLACE       hook, qdisc as tc names it, or CPU
COUNTED     within the time that is measured and printed above the table
PER SECOND  the same, divided by that time
TOTAL       since boot, or since the map, interface or qdisc was made
behind it   made anew, new, went backwards (somebody cleared it, or its 32 bits
            are full: clsact, qdisc, softnet), first read: nothing can be
            subtracted, so there is no rate""",
        "OVERHEAD": """\
None in the kernel, but with --tcx: a count of each drop on the machine. The
closing line says what a reading took.""",
        "REQUIREMENTS": """\
root (CAP_BPF, CAP_SYS_ADMIN) for Calico's counters and to see tcx programs; the
others need nothing. --tcx needs BCC and a kernel with BTF.""",
    },
    "lab": {
        "OVERHEAD": "Nothing outside its namespaces is changed but, while it is up, a bpffs mount.",
        "REQUIREMENTS": "root, BCC, and a kernel with BTF, veth, bridge and cls_bpf.",
    },
    "doctor": {
        "FIELDS": """\
ok, lacking, MISSING  whether something is lost, or all
name                  what was looked at
found                 what is there; below it what is lost without, and what to do""",
        "OVERHEAD": "It looks once and changes nothing.",
    },
}


def roff(text: str) -> str:
    """Text that troff takes literally."""
    lines = (line.replace("\\", "\\e").replace("-", "\\-") for line in text.splitlines())
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in lines)


def literal(text: str) -> str:
    """A block whose lines stay as they are."""
    return f".nf\n{roff(text)}\n.fi"


def synopsis(path: str, command: click.Command) -> list[str]:
    """``calitrace probe nodeport [OPTIONS] HOST:PORT`` for a command or each of a group's."""
    context = click.Context(command, info_name=path)
    if isinstance(command, click.Group):
        found = []
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found += synopsis(f"{path} {name}", inner)
        return found
    return [f"{path} {' '.join(command.collect_usage_pieces(context))}"]


def options(command: click.Command, path: str) -> list[str]:
    """The OPTIONS of a command, or of each of a group's."""
    context = click.Context(command, info_name=path)
    parts = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and record[1] and "--help" not in parameter.opts:
            parts.append(f".TP\n.B {roff(record[0])}\n{roff(' '.join(record[1].split()))}")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            parts += [f".SS {roff(f'{path} {name}')}", roff(_prose(inner)), *options(inner, f"{path} {name}")]
    return parts


def _prose(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "")


def examples(command: click.Command, path: str) -> str:
    """The examples of a command and of a group's."""
    found = [textwrap.dedent((command.epilog or "").replace("\b", "")).replace("Examples:", "").strip("\n")]
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path)
        found += [
            examples(command.get_command(context, name) or command, path) for name in command.list_commands(context)
        ]
    return "\n".join(part for part in found if part.strip())


def page(name: str, command: click.Command) -> str:
    """One man page."""
    title = f"calitrace-{name}" if name else "calitrace"
    path = f"calitrace {name}".strip()
    what = COMMANDS.get(name, "find where Calico's eBPF dataplane lost a packet").rstrip(".")
    shown = synopsis(path, command) if name else ["calitrace [--debug] COMMAND [ARGS]..."]
    sections = {
        "NAME": roff(f"{title} - {what[0].lower()}{what[1:]}"),
        "SYNOPSIS": literal("\n".join(shown)),
        "DESCRIPTION": roff(_prose(command)),
        "OPTIONS": "\n".join(options(command, path) if name else _commands()),
        **{key: literal(text) for key, text in EXTRA.get(name, {}).items()},
        "EXAMPLES": literal(
            examples(command, path) if name else textwrap.dedent((command.epilog or "").replace("\b", ""))
        ),
        "EXIT STATUS": literal(EXIT_STATUS),
        "SEE ALSO": roff(", ".join(f"calitrace-{other}(1)" for other in COMMANDS if other != name)),
    }
    body = "\n".join(f".SH {key}\n{text}" for key, text in sections.items() if text.strip())
    return f'.TH {title.upper()} 1 "" "calitrace {__version__}"\n{body}\n'


def _commands() -> list[str]:
    return [f".TP\n.B {roff(name)}\n{roff(what)}" for name, what in COMMANDS.items()]


def main() -> int:
    """Exit status 1 when --check finds a page out of date."""
    context = click.Context(cli, info_name="calitrace")
    pages = {"calitrace": page("", cli)}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        pages[f"calitrace-{name}"] = page(name, command)
    stale = [
        n for n, text in pages.items() if not (TARGET / f"{n}.1").exists() or (TARGET / f"{n}.1").read_text() != text
    ]
    if "--check" in sys.argv[1:]:
        for name in stale:
            sys.stderr.write(f"{name}.1 is out of date: run tools/gen_man.py\n")
        return int(bool(stale))
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (TARGET / f"{name}.1").write_text(pages[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
