"""Write docs/man/*.1 from the commands' own help, so that they cannot drift apart; --check only compares."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calitrace import __version__
from calitrace.cli.main import COMMANDS, cli

WIDTH = 71  # of a line that stays as it is: man indents it, and a backslash may follow
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TARGET = Path(__file__).resolve().parent.parent / "docs" / "man"

EXIT_STATUS = {
    "0": "done.",
    "2": "the command line is wrong.",
    "3": "this machine lacks something.",
    "4": "there is no Calico eBPF dataplane where one was needed.",
}
# What 1 means, and which of the others a command has.
EXITS: dict[str, tuple[str, str]] = {
    "": ("findings, as the command's own page says.", "01234"),
    "check": ("there are findings.", "0123"),
    "counters": ("", "023"),
    "doctor": ("something is lacking without which the rest works.", "0123"),
    "drops": ("", "023"),
    "lab": ("status: the lab is incomplete. exec has the status of its command.", "0123"),
    "log": ("", "0234"),
    "maps": (
        "nothing has what get was asked for, walk found something broken, diff --check a difference.",
        "01234",
    ),
    "probe": ("a probe was not answered.", "0123"),
    "report": ("a probe was not answered, with --check.", "012"),
}

_TRACED = """\
root (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN), BCC and a kernel with BTF; calitrace doctor names what is
missing."""
_MEASURED = (
    "2 cores, Linux 6.18, the kernel's run-time statistics over the flood of make bench; an empty program has 65 ns"
)

# FIELDS are pairs, all else is prose.
FIELDS: dict[str, dict[str, str]] = {
    "probe": {
        "ms": "since the probe was sent, milliseconds",
        "where": "network namespace; the prefix that all share is left out",
        "interface": "or, for a line of Calico's, its tag: -I towards the endpoint, -E away from it",
        "what": (
            "in (netif_receive_skb, before tc ingress), out (net_dev_queue, after tc egress), DROP with the kernel's "
            "reason, Calico with its verdict; the packet where it changed"
        ),
        "VERDICT": (
            "what follows from it, with its evidence. confidence: proven where the kernel or Calico said it, or "
            "where nothing was lost and the place at which the packet did not arrive was looked at; else likely. "
            "next: a command that shows more, for root on the machine that recorded; it only reads"
        ),
    },
    "maps": {
        "dump": "as calico-node -bpf prints it; of conntrack, behind it, when Felix will remove the entry",
        "Active ago, expires in": "since the last packet; until the removal, with Felix's default timeouts",
        "walk": "ok or BROKEN, the lookup, its key, what was found; what suffers; last what becomes of the packet",
        "-o json": "docs/json.md",
    },
    "report": {"all": "as in calitrace-probe(1)", "-o json": "docs/json.md"},
    "check": {
        "ERROR, WARNING, INFO": "traffic is lost; can be lost, or is slow; worth knowing",
        "id, subject": "the check, and the interface, map or service it is about",
        "saw": "the very line, counter, bytes or object",
        "means": "what that does to traffic",
        "fix": "a command to run, or what to change",
        "page": 'the section of Calico\'s page "Troubleshoot eBPF mode"',
        "NOT RUN": "checks that could not look, by reason; never passed",
    },
    "counters": {
        "SOURCE calico": (
            "Calico's counters map: packets by reason. TOTAL_PACKETS, ACCEPTED_, BYPASS and REDIRECT are no drops. "
            "Some of Calico's drops have no reason: they are in clsact's count only"
        ),
        "SOURCE clsact": "what programs at the interface's tc hooks dropped, both together (tc -s qdisc)",
        "SOURCE tcx": (
            "the kernel has no such counter. With --tcx, all drops by programs at that hook (drop reason TC_INGRESS "
            "or TC_EGRESS), counted from the start of the run by a BPF program of ours"
        ),
        "SOURCE interface": (
            "drops and errors, as ip -s link has them. tx_dropped may also have packets that a program redirected to "
            "the interface and its own egress program dropped"
        ),
        "SOURCE qdisc": "other qdiscs (tc -s qdisc)",
        "SOURCE softnet": (
            "of a CPU and the whole machine: dropped, the backlog was full; time_squeeze, packets had to wait (no drop)"
        ),
        "PLACE": "tc hook, ingress, egress or both; XDP; the qdisc as tc names it; the CPU",
        "COUNTED": "within the time that is measured and printed above the table",
        "PER S": "the same, divided by that time",
        "TOTAL": "since boot, or since the map, interface or qdisc was made",
        "behind it": (
            "made anew, new, went backwards (somebody cleared it, or its 32 bits are full: clsact, qdisc, softnet), "
            "first read: nothing can be subtracted, so there is no rate"
        ),
    },
    "drops": {
        "TIME": "of day, from the kernel's clock at the drop",
        "INTERFACE HOOK": "in and out are tc ingress and egress; xdp is generic XDP; none where no hook dropped",
        "PACKET": "five-tuple, of the packet inside a tunnel",
        "CAUSE": (
            "calico with its reason and rules, or what it does for which it keeps no reason; else the kernel's "
            "reason and function"
        ),
        "EVIDENCE": (
            "what carries the cause: log, state, counters, maps, routes, hook (which programs are there), kernel"
        ),
        "DROPS, REASON, FUNCTION": (
            "with --top: exact totals of the kernel program, unfiltered. DETAILED counts those that were looked at, "
            "by cause"
        ),
        "the closing line": (
            "seen is the sum of the others: shown, harmless (only with --all), filtered, rate-limited, not sampled, "
            "not decoded, not looked at (after -c), lost; and what our program cost for each drop"
        ),
    },
    "log": {
        "TIME": "of the trace clock, seconds: since boot, not of the day",
        "PROCESS": "the task that happened to run on that CPU, seldom the packet's owner",
        "INTERFACE": (
            "with Calico's policy direction: -I to the endpoint, -E from it (on a pod's interface the opposite of "
            "the tc hook), -X XDP"
        ),
        "VERDICT": "ALLOW, DENY, or ? where no last line was seen",
        "EXEC": "time in the program, with the time that printing took",
        "PACKET": "five-tuple, with the one around it in a tunnel; in brackets why, NAT, tunnel, conntrack, policy",
    },
    "doctor": {
        "ok, lacking, MISSING": "nothing is lost, something is, or nothing works without it",
        "name": "what was looked at",
        "found": "what is there; below it what is lost without, and what to do",
    },
}
CACHE = {"/var/cache/calitrace": "our programs as BCC compiled them, for the next start; may be removed at any time"}
FILES = {
    **CACHE,
    "/var/lib/calitrace/undo": "what an interrupted run changed on this machine, for the next start to put back",
    "/run/calitrace": "what calitrace lab made, for calitrace lab down; and the names of its policies",
}
COMPILES = ("probe", "check", "counters", "drops", "log")
EXTRA: dict[str, dict[str, str]] = {
    "probe": {
        "OVERHEAD": (
            "Without --trace none. With it our programs take 80 to 140 ns at each of four tracepoints for a packet "
            f"that is not a probe's, and 220 to 370 ns for one that is ({_MEASURED}). Calico's debug log is read, "
            "never switched on."
        ),
        "REQUIREMENTS": f"Without --trace root (CAP_NET_RAW, CAP_SYS_ADMIN with --from). With it {_TRACED}",
    },
    "maps": {
        "OVERHEAD": (
            "A million conntrack entries take 2 to 3 s of a CPU to dump as JSON, and 1 to 1.5 s to sum up (make "
            "bench). Nothing is changed but by clean, remove and flush, which need --allow-system-changes."
        ),
        "REQUIREMENTS": "root (CAP_BPF, CAP_SYS_ADMIN) for the maps of this node; none with -r and --bpftool.",
    },
    "report": {
        "OVERHEAD": "None on any node: it reads the journal alone.",
        "REQUIREMENTS": "Neither root nor BCC nor Calico.",
    },
    "check": {
        "OVERHEAD": (
            "2.5 to 3 s on a node with 200 interfaces and 10,000 services (make bench), one of them between two "
            "measurements (--interval). For that second the kernel times each run of a BPF program (20 to 30 ns "
            "each); nothing else is changed. From the API server each list is read once, in pages of 500; Secrets "
            "are never read. Packets are sent only with --probe."
        ),
        "REQUIREMENTS": (
            "root for programs, maps and other processes; what cannot be read is NOT RUN. For the cluster, the "
            "Python package kubernetes and an account that may get and list nodes, services, endpointslices, "
            "daemonsets, configmaps, pods and pods/log, and Calico's felixconfigurations and ippools."
        ),
    },
    "counters": {
        "OVERHEAD": (
            "None in the kernel, but with --tcx: a count of each drop on the machine. The closing line says what a "
            "reading took."
        ),
        "REQUIREMENTS": (
            "root (CAP_BPF, CAP_SYS_ADMIN) for Calico's counters and to see tcx programs; the others need nothing. "
            "--tcx needs BCC and a kernel with BTF."
        ),
    },
    "drops": {
        "OVERHEAD": (
            "None for a packet that is not dropped. For each that is: counted 100 ns, held back by --rate-limit 135 "
            f"ns, sent with Calico's state 420 ns ({_MEASURED}). 100,000 drops a second with -w took 17 % of a "
            "CPU. The closing line says what this run cost."
        ),
        "REQUIREMENTS": f"Live {_TRACED} With -r nothing.",
    },
    "log": {
        "OVERHEAD": (
            f"A line recorded 210 to 240 ns, sent 320 to 360 ns ({_MEASURED}); nothing while Calico prints nothing. "
            "Calico's Debug level itself, which --enable-debug sets, costs 12 to 28 microseconds for each packet and "
            "program."
        ),
        "REQUIREMENTS": (
            "Live root; BCC and a kernel with BTF for --source bpf, tracefs for the others. With -r nothing. For "
            "--enable-debug the Python package kubernetes and the rights in docs/debug-level.md."
        ),
    },
    "lab": {
        "OVERHEAD": "Nothing outside its namespaces is changed but, while it is up, a bpffs mount.",
        "REQUIREMENTS": "root, BCC, and a kernel with BTF, veth, bridge and cls_bpf.",
    },
    "doctor": {
        "OVERHEAD": "It looks once and changes nothing.",
        "REQUIREMENTS": "None: without root it says what root would have.",
    },
}


def roff(text: str) -> str:
    """Text that troff takes literally."""
    lines = (line.replace("\\", "\\e").replace("-", "\\-") for line in text.splitlines())
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in lines)


def literal(text: str) -> str:
    """A block whose lines stay as they are, but for those of commands that are too long for 80 columns."""
    lines = []
    for line in textwrap.dedent(text).splitlines():
        folded = textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        lines += [f"{each} \\" for each in folded[:-1]] + (folded[-1:] or [""])
    return "\n".join([".nf", roff("\n".join(lines)), ".fi"])


def pairs(items: Mapping[str, str]) -> str:
    """A list of terms and what they are."""
    return "\n".join(f".TP\n.B {roff(term)}\n{roff(text)}" for term, text in items.items())


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
    """The OPTIONS of a command; of a group those that most of its commands have, once, and then each one's own."""
    if not isinstance(command, click.Group):
        return [pairs(dict(_records(command, path)))]
    leaves = dict(_leaves(command, path))
    counted = Counter(record for each, leaf in leaves.items() for record in _records(leaf, each))
    common = {record: number for record, number in counted.items() if 2 * number > len(leaves) and len(leaves) > 2}
    parts = []
    if common:
        without = [
            each.removeprefix(f"{path} ")
            for each, leaf in leaves.items()
            if not common.keys() <= set(_records(leaf, each))
        ]
        not_all = f"Of all commands, but that {', '.join(without)} have fewer." if without else "Of all commands."
        parts += [roff(not_all), pairs(dict(list(common)))]
    said = set(_repeated(command, path).values())
    for each, leaf in leaves.items():
        own = [record for record in _records(leaf, each) if record not in common]
        if own or _prose(leaf) not in said:
            parts += [f".SS {roff(each)}", paragraphs(_prose(leaf)), pairs(dict(own))]
    return parts


def _leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _records(command: click.Command, path: str) -> list[tuple[str, str]]:
    """Option and help."""
    context = click.Context(command, info_name=path)
    found = [each.get_help_record(context) for each in command.get_params(context) if "--help" not in each.opts]
    return [(record[0], " ".join(record[1].split())) for record in found if record and record[1]]


def _prose(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "")


def paragraphs(text: str) -> str:
    """Prose, filled by troff."""
    return "\n.PP\n".join(roff(" ".join(each.split())) for each in text.split("\n\n"))


def description(command: click.Command, path: str) -> str:
    """The help of a command; of a group also what its groups are, and the commands that these share."""
    parts = [paragraphs(_prose(command))]
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path)
        inner = {name: command.get_command(context, name) for name in command.list_commands(context)}
        groups = {name: _prose(each) for name, each in inner.items() if isinstance(each, click.Group)}
        if groups:
            shared = {path.rpartition(" ")[2]: text for path, text in _repeated(command, path).items()}
            parts += [pairs(groups), ".PP\nMost of these have", pairs(shared)]
    return "\n".join(parts)


def _repeated(command: click.Group, path: str) -> dict[str, str]:
    """The commands below groups that are described in the same words everywhere, and those words."""
    leaves = {each: _prose(leaf) for each, leaf in _leaves(command, path)}
    counted = Counter(leaves.values())
    return {each: text for each, text in leaves.items() if counted[text] > 2}


def examples(command: click.Command, path: str) -> str:
    """The examples of a command and of a group's."""
    text = textwrap.dedent((command.epilog or "").replace("\b", "")).replace("Examples:", "").replace("Example: ", "  ")
    found = [textwrap.dedent(text.strip("\n"))]
    if isinstance(command, click.Group) and path != "calitrace":
        found += [examples(leaf, each) for each, leaf in _leaves(command, path)]
    return "\n".join(dict.fromkeys(line for part in found for line in part.splitlines() if line.strip()))


def exit_status(name: str) -> str:
    """What the exit statuses of a command mean."""
    findings, has = EXITS[name]
    return pairs({number: findings if number == "1" else EXIT_STATUS[number] for number in has})


def page(name: str, command: click.Command) -> str:
    """One man page."""
    title = f"calitrace-{name}" if name else "calitrace"
    path = f"calitrace {name}".strip()
    what = COMMANDS.get(name, "find where Calico's eBPF dataplane lost a packet").rstrip(".")
    shown = synopsis(path, command) if name else ["calitrace [--debug] COMMAND [ARGS]..."]
    sections = {
        "NAME": roff(f"{title} - {what[0].lower()}{what[1:]}"),
        "SYNOPSIS": literal("\n".join(shown)),
        "DESCRIPTION": description(command, path) if name else paragraphs(_prose(command)),
        "OPTIONS": "\n".join(options(command, path)) if name else pairs(dict(_records(command, path))),
        "COMMANDS": "" if name else pairs(COMMANDS),
        "FIELDS": pairs(FIELDS.get(name, {})),
        **{key: roff(text) for key, text in EXTRA.get(name, {}).items()},
        "FILES": pairs(CACHE if name in COMPILES else {} if name else FILES),
        "EXIT STATUS": exit_status(name),
        "EXAMPLES": literal(examples(command, path)),
        "SEE ALSO": roff(", ".join(f"calitrace-{other}(1)" for other in COMMANDS if other != name)),
    }
    body = "\n".join(f".SH {key}\n{text}" for key, text in sections.items() if text.strip())
    return f'.TH {title.upper()} 1 "" "calitrace {__version__}"\n{body}\n'


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
