"""``--enable-debug``: ask, read the cluster, turn Debug on for this run, say what becomes of it."""

from __future__ import annotations

import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calitrace.cli.recording import say
from calitrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from calitrace.cluster.felix import DebugLevel


def put_back_leftovers(directory: Path | None = None) -> None:
    """Undo what an earlier run could not, because it and its watchdog were killed; cheap when there is nothing."""
    from calitrace.cluster import undo

    for outcome in undo.replay(directory or undo.DIRECTORY):
        say(f"{'warning' if outcome.pending else 'note'}: left by an earlier run: {outcome.text}")


@contextmanager
def enabled(
    *,
    allowed: bool,
    node: str,
    kubeconfig: str,
    ends: Sequence[tuple[str, int]],
    interfaces: Sequence[str],
    vxlan_port: int,
    seconds: float,
    force: bool,
    namespace: str = "",
    directory: Path | None = None,
) -> Iterator[DebugLevel]:
    """Debug for the time of the ``with``, *seconds* at most.

    *allowed*: --allow-system-changes; without it UsageError, after what would be changed has been said.
    *node*: its Kubernetes name, "" for our host's. *ends*: (address or "", port or 0) to which the log is limited;
    backends of services among them are added. *namespace*: where Calico's programs are, "" for ours.
    Raises what felix.change and DebugLevel raise.
    """
    from calitrace.calico import debug_filter
    from calitrace.cluster import felix, services, undo
    from calitrace.cluster.kubernetes import Cluster
    from calitrace.kernel.attached import calico_programs

    put_back_leftovers(directory)
    with Cluster(kubeconfig) as cluster:
        behind = [each for host, port in ends for each in services.backends(cluster, host, port)]
        text = debug_filter.expression([*ends, *behind], vxlan_port)
        filters = debug_filter.log_filters(text, interfaces)
        name = node or platform.node().lower()
        change = felix.change(cluster, name, filters, platform.release(), felix.lockdown(), force)
        for line in change.lines():
            say(line)
        for warning in change.warnings:
            say(f"warning: {warning}")
        if not allowed and change.ours:
            raise UsageError(
                "--enable-debug makes the changes above, and nothing allows it to", "--allow-system-changes does"
            )
        level = felix.DebugLevel(
            cluster, change, lambda: calico_programs(namespace), seconds, directory or undo.DIRECTORY
        )
        try:
            with level:
                yield level
        finally:
            if level.outcome:
                say(f"{'warning: ' if level.outcome.pending else ''}{level.outcome.text}")
