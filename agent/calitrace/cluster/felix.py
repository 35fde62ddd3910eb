"""Calico's Debug level on one node, for a while: FelixConfiguration ``node.NAME``, and back.

Felix takes each field from its environment, else from ``node.NAME``, else from ``default`` (felix/config); so a
resource for this node changes no other node. Changing it makes Felix load all programs anew.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calitrace.calico.debug_filter import COST, has_filters, log_filters, preconditions
from calitrace.cluster.kubernetes import ApiRefused
from calitrace.cluster.undo import DIRECTORY, Outcome, Record, Watchdog, replacing
from calitrace.errors import EnvironmentUnfit, NotCalico, UsageError
from calitrace.kernel import discover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calitrace.cluster.kubernetes import Cluster

    Programs = Mapping[tuple[str, str], tuple[int, ...]]

APIS = ("projectcalico.org/v3", "crd.projectcalico.org/v1")
RELOAD_S = 90.0
_POLL_S = 0.5
_CONFLICTS = 10
_ENVIRONMENT = {"felix_bpfloglevel": "bpfLogLevel", "felix_bpflogfilters": "bpfLogFilters"}
_DAEMONSETS = "/apis/apps/v1/daemonsets"


@dataclass(frozen=True)
class Change:
    """What would be changed, read from the cluster; nothing has been done yet.

    *path*: the FelixConfiguration of this node. *exists*: it is there already. *ours*: the fields to set; empty when
    all is as wanted. *now*: what is in effect today, field by field. *warnings*: what is not known or will be missing.
    """

    node: str
    path: str
    exists: bool
    ours: dict[str, Any]
    now: dict[str, Any]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people: what is changed, from what, and what it costs."""
        name = self.path.rpartition("/")[2]
        verb = "change" if self.exists else "create"
        found = [f"{verb} FelixConfiguration {name} (this node only); Felix then loads its programs anew:"]
        for field, value in self.ours.items():
            found.append(f"  {field}: {_shown(self.now.get(field))} -> {_shown(value)}")
        return [*found, COST] if self.ours else ["Debug is on already as wanted; nothing to change"]


def lockdown(path: Path = Path("/sys/kernel/security/lockdown")) -> str:
    """The active word of the kernel's lockdown, "" without it."""
    try:
        words = path.read_text().split()
    except OSError:
        return ""
    return next((word.strip("[]") for word in words if word.startswith("[")), "")


def calico_release(cluster: Cluster) -> str:
    """Calico's release as ClusterInformation has it: ``v3.28.1``; "" when it does not say."""
    found = cluster.find(f"/apis/{_api(cluster)}/clusterinformations/default") or {}
    return str((found.get("spec") or {}).get("calicoVersion", ""))


def change(
    cluster: Cluster, node: str, filters: dict[str, str], kernel: str, locked: str = "", force: bool = False
) -> Change:
    """What has to be changed for Debug with *filters* (see calico.debug_filter) on *node*.

    *kernel*: ``uname -r`` of that node; *locked*: its lockdown. Raises EnvironmentUnfit where Debug is known to cut
    the network or to show nothing (*force* makes that a warning) and where the environment of Felix decides;
    UsageError when there is no such node.
    """
    try:
        if cluster.find(f"/api/v1/nodes/{node}") is None:
            raise UsageError(f"{cluster.server} has no node {node!r}", "say which one this is with --node")
    except ApiRefused as refused:
        if refused.status != 403:  # without that permission a wrong name shows later: no program is loaded anew
            raise
    calico = calico_release(cluster)
    found = preconditions(calico, kernel, locked)
    refusals = [each.text for each in found if each.refuse]
    if refusals and not force:
        raise EnvironmentUnfit(
            f"Debug stays off: {'; '.join(refusals)}", "use calitrace without Calico's log: `calitrace probe --trace`"
        )
    warnings = [each.text for each in found]
    warnings += _environment(cluster)
    collection = f"/apis/{_api(cluster)}/felixconfigurations"
    path = f"{collection}/node.{node}"
    default = (cluster.find(f"{collection}/default") or {}).get("spec") or {}
    own = cluster.find(path)
    now = default | ((own or {}).get("spec") or {})
    wanted: dict[str, Any] = {"bpfLogLevel": "Debug"}
    if has_filters(calico):
        if filters or now.get("bpfLogFilters"):
            wanted["bpfLogFilters"] = filters or log_filters("", ["all"])  # an empty map would not win over default's
    elif filters:
        warnings.append("without bpfLogFilters the filter is applied by calitrace only, after the cost")
    ours = {name: value for name, value in wanted.items() if now.get(name) != value}
    return Change(node, path, own is not None, ours, now, tuple(warnings))


def _api(cluster: Cluster) -> str:
    """The API to write to: Calico's own where it is served, else its stored resources. Raises NotCalico."""
    versions = cluster.api_versions()
    for api in APIS:
        if api in versions:
            return api
    raise NotCalico(f"{cluster.server} has no FelixConfiguration", "is it the right cluster, and is Calico there?")


def _environment(cluster: Cluster) -> list[str]:
    """Warnings; raises EnvironmentUnfit when an environment variable of calico-node wins over what we could set."""
    try:
        sets = list(cluster.iter_list(_DAEMONSETS, labelSelector="k8s-app=calico-node"))
    except ApiRefused as refused:
        if refused.status not in (401, 403, 404):
            raise
        return ["the DaemonSet calico-node cannot be read: if it sets FELIX_BPFLOGLEVEL, Debug will not come on"]
    for each in sets:
        for container in each["spec"]["template"]["spec"]["containers"]:
            for variable in container.get("env") or ():
                if variable["name"].casefold() in _ENVIRONMENT:
                    value = variable.get("value", "a value from elsewhere")
                    raise EnvironmentUnfit(
                        f"DaemonSet {each['metadata']['namespace']}/{each['metadata']['name']} sets {variable['name']} "
                        f"to {value!r}, which wins over every FelixConfiguration",
                        "remove the variable from the DaemonSet; calitrace restarts no calico-node",
                    )
    return [] if sets else ["no DaemonSet calico-node found: whether FELIX_BPFLOGLEVEL is set is not known"]


class DebugLevel:
    """Debug on one node from the beginning of the ``with`` to its end; *seconds* at most.

    *programs*: gives, for each (interface, hook) of this node, the ids of Calico's programs there; an empty tuple
    where one should be is a missing program; an interface that is gone has no entry.
    Entering raises EnvironmentUnfit, with everything put back, when a program is missing after the change or is not
    loaded anew in *reload_s* seconds; NotCalico when there is none to begin with. Afterwards *outcome* says what became
    of it; its *pending* is true when the API does not answer: the watchdog goes on.
    """

    def __init__(
        self,
        cluster: Cluster,
        change: Change,
        programs: Callable[[], Programs],
        seconds: float,
        directory: Path = DIRECTORY,
        reload_s: float = RELOAD_S,
    ) -> None:
        self._cluster = cluster
        self._change = change
        self._programs = programs
        self._seconds = seconds
        self._directory = directory
        self._reload_s = reload_s
        self._before: Programs = {}
        self.watchdog: Watchdog | None = None
        self.outcome: Outcome | None = None

    def __enter__(self) -> DebugLevel:
        self._before = {place: ids for place, ids in self._programs().items() if ids}
        if not self._before:
            raise NotCalico(
                "no Calico program is attached here", "run it on a node whose Calico uses the eBPF dataplane"
            )
        if not self._change.ours:
            return self
        try:
            self._apply()
            self._wait_reloaded()
        except BaseException as failed:
            self.close()
            if isinstance(failed, EnvironmentUnfit) and self.outcome:
                raise EnvironmentUnfit(f"{failed.cause}; {self.outcome.text}", failed.hint) from failed
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put everything back; may be called again."""
        if self.watchdog:
            self.outcome = self.watchdog.close()
            self.watchdog = None

    def check(self) -> None:
        """Raise EnvironmentUnfit when a program went missing: leave the ``with`` then. To be called now and then."""
        self._require(self._programs())

    def _require(self, now: Programs) -> None:
        missing = [place for place in self._before if now.get(place) == ()]
        if missing:
            raise EnvironmentUnfit(
                f"Calico's program is missing at {_places(missing)} since Debug was turned on",
                "its Debug program was probably refused by the kernel's verifier: see the log of calico-node",
            )

    def _apply(self) -> None:
        """Record, watchdog, change; when somebody else changes the object at the same time, all again."""
        path, ours = self._change.path, self._change.ours
        for attempt in range(_CONFLICTS):
            current = self._cluster.find(path)
            spec = (current or {}).get("spec") or {}
            record = Record(
                server=self._cluster.server,
                kubeconfig=self._cluster.kubeconfig,
                context=self._cluster.context,
                path=path,
                created=current is None,
                previous={name: spec[name] for name in ours if name in spec},
                ours=ours,
                until=time.time() + self._seconds,
                boot_id=discover.boot_id(),
                owner=os.getpid(),
            )
            self.watchdog = Watchdog(record, self._seconds, self._directory)
            try:
                if current is None:
                    self._create(path, ours)
                else:
                    fields = {name: replacing(spec.get(name), value) for name, value in ours.items()}
                    version = {"resourceVersion": current["metadata"]["resourceVersion"]}
                    self._cluster.merge(path, {"metadata": version, "spec": fields})
            except ApiRefused as refused:
                if refused.status:
                    self.watchdog.applied()  # refused for certain: nothing is on its way
                if refused.status != 409 or attempt == _CONFLICTS - 1:
                    raise
                self.close()
                continue
            self.watchdog.applied()
            return

    def _create(self, path: str, spec: dict[str, Any]) -> None:
        collection, _, name = path.rpartition("/")
        self._cluster.create(
            collection,
            {
                "apiVersion": collection.removeprefix("/apis/").rpartition("/")[0],
                "kind": "FelixConfiguration",
                "metadata": {"name": name},
                "spec": spec,
            },
        )

    def _wait_reloaded(self) -> None:
        """Until each program that was attached is replaced by another."""
        end = time.monotonic() + self._reload_s
        while True:
            now = self._programs()
            self._require(now)
            old = [place for place, ids in self._before.items() if place in now and set(ids) & set(now[place])]
            if not old:
                return
            if time.monotonic() > end:
                raise EnvironmentUnfit(
                    f"Felix did not load the programs at {_places(old)} anew in {self._reload_s:.0f} s",
                    "is calico-node running on this node, and is the node's name right? See its log",
                )
            time.sleep(_POLL_S)


def _places(places: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{interface} {hook}" for interface, hook in sorted(places)[:5])
    return shown + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def _shown(value: Any) -> str:
    if not value:
        return "(not set)" if value is None else "(none)"
    return ", ".join(f"{key}: {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)
