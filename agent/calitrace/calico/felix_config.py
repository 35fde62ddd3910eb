"""Felix's settings: parameters, defaults by release, and which of several sources wins.

Precedence: environment FELIX_* of calico-node, then FelixConfiguration ``node.<name>``, then ``default``, then the
built-in default. Source: felix/config/config_params.go, v3.13 to master. A default that changed is a table of
releases; where the release is not known well enough to choose, the setting is unknown, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from calitrace.calico import WORKLOAD_PREFIX
from calitrace.calico.release import OLDEST, Release, Version

Value = bool | int | str
_TRUE = frozenset({"true", "1", "yes", "y", "t"})
_FALSE = frozenset({"false", "0", "no", "n", "f"})


@dataclass(frozen=True)
class Parameter:
    """One field of FelixConfiguration's spec.

    *kind*: the type of its values. *defaults*: (first release with it, value), oldest first; a value of None means
    that Felix decides at run time. *until*: the last release that has it. *env*: its variable, where that is not
    FELIX_ and the name in capitals. *old*: the name that Calico's own page and Felix's configuration
    file have for it.
    """

    name: str
    kind: type
    defaults: tuple[tuple[Version, Value | None], ...]
    until: Version | None = None
    env: str = ""
    old: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that overrides it."""
        return self.env or f"FELIX_{self.name.upper()}"


def _always(name: str, default: Value | None, since: Version = OLDEST, **more: Any) -> Parameter:
    return Parameter(name, str if default is None else type(default), ((since, default),), **more)


_OLD_IFACES = "|wireguard.cali$"
PARAMETERS = {
    each.name: each
    for each in (
        _always("bpfEnabled", False),
        _always("bpfLogLevel", "Off"),
        _always("bpfLogFilters", None, (3, 27)),
        _always("bpfConntrackLogLevel", "Off", (3, 30)),
        Parameter(
            "bpfDataIfacePattern",
            str,
            (
                ((3, 13), "^(en.*|eth.*|tunl0$)"),
                ((3, 16), f"^(en.*|eth.*|tunl0${_OLD_IFACES})"),
                ((3, 17), f"^((en|wl|ww|sl|ib)[opsx].*|(eth|wlan|wwan).*|tunl0${_OLD_IFACES})"),
                ((3, 20), f"^((en|wl|ww|sl|ib)[opsx].*|(eth|wlan|wwan).*|tunl0$|vxlan.calico${_OLD_IFACES})"),
                (
                    (3, 24),
                    f"^((en|wl|ww|sl|ib)[opsx].*|(eth|wlan|wwan).*|tunl0$|vxlan.calico${_OLD_IFACES}|wg-v6.cali$)",
                ),
                (
                    (3, 25),
                    f"^((en|wl|ww|sl|ib)[Popsx].*|(eth|wlan|wwan).*|tunl0$|vxlan.calico${_OLD_IFACES}|wg-v6.cali$)",
                ),
                (
                    (3, 27),
                    "^((en|wl|ww|sl|ib)[Popsx].*|(eth|wlan|wwan).*|tunl0$|vxlan.calico$|vxlan-v6.calico$"
                    f"{_OLD_IFACES}|wg-v6.cali$)",
                ),
                (
                    (3, 29),
                    "^((en|wl|ww|sl|ib)[Popsx].*|(eth|wlan|wwan|bond).*|tunl0$|vxlan.calico$|vxlan-v6.calico$"
                    f"{_OLD_IFACES}|wg-v6.cali$)",
                ),
                ((3, 30), "^((en|wl|ww|sl|ib)[Popsx].*|(eth|wlan|wwan|bond).*)"),
            ),
        ),
        _always("bpfL3IfacePattern", "", (3, 25)),
        _always("bpfConnectTimeLoadBalancing", "TCP", (3, 27)),
        Parameter(
            "bpfConnectTimeLoadBalancingEnabled", bool, (((3, 13), True), ((3, 27), None))
        ),  # unset from v3.27 on: the newer name decides
        _always("bpfHostNetworkedNATWithoutCTLB", "Enabled", (3, 27)),
        _always("bpfExternalServiceMode", "Tunnel"),
        _always("bpfKubeProxyIptablesCleanupEnabled", True),
        _always("bpfKubeProxyMinSyncPeriod", "1s"),
        Parameter("bpfKubeProxyEndpointSlicesEnabled", bool, (((3, 16), False), ((3, 23), True)), until=(3, 31)),
        _always("bpfKubeProxyHealthzPort", 10256, (3, 31)),
        Parameter("bpfEnforceRPF", str, (((3, 23), "Strict"), ((3, 26), "Loose"))),
        Parameter("bpfHostConntrackBypass", bool, (((3, 23), True), ((3, 30), False))),
        _always("bpfExcludeCIDRsFromNAT", None, (3, 28)),
        _always("bpfMapSizeConntrack", 512000, (3, 23)),
        _always("bpfMapSizePerCpuConntrack", 0, (3, 30)),
        _always("bpfMapSizeIfState", 1000, (3, 24)),
        _always("bpfConntrackTimeouts", None, (3, 30)),
        _always("bpfDisableGROForIfaces", "", (3, 27)),
        Parameter(
            "ipipEnabled", bool, (((3, 13), False), ((3, 23), None)), env="FELIX_IPINIPENABLED", old="ipInIpEnabled"
        ),
        Parameter("vxlanEnabled", bool, (((3, 13), False), ((3, 23), None))),
        _always("vxlanPort", 4789),
        _always("vxlanMTU", 0),
        _always("wireguardEnabled", False, (3, 14)),
        _always("wireguardListeningPort", 51820, (3, 14)),
        _always("interfacePrefix", WORKLOAD_PREFIX),
        _always("logSeverityScreen", "Info"),
        _always("prometheusMetricsEnabled", False),
    )
}


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from: ``FELIX_BPFENABLED``, ``FelixConfiguration default``, ``default of v3.31``.

    *value*: None where Felix decides at run time, or where this release does not have the parameter.
    """

    name: str
    value: Value | list[Any] | dict[str, Any] | None
    origin: str

    def says(self, word: str) -> bool:
        """Whether the value is this word; Felix takes words in any case."""
        return str(self.value).lower() == word.lower()

    def __str__(self) -> str:
        value = self.value
        shown = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
        return f"{self.name}: {shown} ({self.origin})"


@dataclass(frozen=True)
class Unset:
    """A setting that cannot be known. *why*: what is missing."""

    why: str


@dataclass(frozen=True)
class Settings:
    """What is known of Felix's settings on one node.

    *env*: FELIX_* of calico-node; *specs*: (origin, spec) of the FelixConfigurations that apply, the winning one
    first. *complete*: False when the FelixConfigurations were not to be had, so that only *env* is sure.
    """

    env: Mapping[str, str]
    specs: tuple[tuple[str, Mapping[str, Any]], ...]
    release: Release | None
    complete: bool = True

    def get(self, name: str) -> Setting | Unset:
        """A setting by its name in FelixConfiguration. Raises KeyError for a name that is in no table."""
        parameter = PARAMETERS[name]
        if parameter.variable in self.env:
            value = _parsed(parameter, self.env[parameter.variable])
            if value is None:
                return Unset(f"{parameter.variable}={self.env[parameter.variable]!r} is no {parameter.kind.__name__}")
            return Setting(name, value, parameter.variable)
        for origin, spec in self.specs:
            written = next((each for each in (name, parameter.old) if spec.get(each) is not None), name)
            value = spec.get(written)
            if isinstance(value, str):  # a number or truth value quoted in somebody's YAML
                value = _parsed(parameter, value)
                if value is None:
                    return Unset(f"{written}: {spec[written]!r} in {origin} is no {parameter.kind.__name__}")
            if value is not None:
                return Setting(name, value, origin)
        if not self.complete:
            return Unset(f"{name} is not in calico-node's environment, and there is no FelixConfiguration to look at")
        return self._default(parameter)

    def _default(self, parameter: Parameter) -> Setting | Unset:
        if len(parameter.defaults) == 1 and parameter.until is None:
            return Setting(parameter.name, parameter.defaults[0][1], "default")
        if self.release is None:
            return Unset(f"the default of {parameter.name} depends on Calico's release: give --calico-version")
        first, last = _at(parameter, self.release.oldest), _at(parameter, self.release.newest)
        if first != last:
            return Unset(f"the default of {parameter.name} changed within {self.release}: give --calico-version")
        return Setting(parameter.name, first, f"default of {self.release}")


def _at(parameter: Parameter, version: Version) -> Value | None:
    if parameter.until is not None and version > parameter.until:
        return None
    value = None
    for since, default in parameter.defaults:
        if version >= since:
            value = default
    return value


def _parsed(parameter: Parameter, text: str) -> Value | None:
    if parameter.kind is bool:
        lower = text.lower()
        return True if lower in _TRUE else False if lower in _FALSE else None
    if parameter.kind is int:
        return int(text) if text.isdigit() else None
    return text


def resolve(
    objects: Iterable[Mapping[str, Any]] | None, env: Mapping[str, str], node: str, release: Release | None
) -> Settings:
    """The settings of *node*. *objects*: FelixConfigurations as the API has them; None when they are not known."""
    specs = []
    for name in (f"node.{node}", "default"):
        for each in objects or ():
            if _name(each) == name:
                specs.append((f"FelixConfiguration {name}", each.get("spec") or {}))
    return Settings(dict(env), tuple(specs), release, objects is not None)


def _name(thing: Mapping[str, Any]) -> str:
    metadata = thing.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, Mapping) else ""


def configurations(documents: Iterable[Any]) -> list[dict[str, Any]]:
    """The FelixConfigurations in what calicoctl or kubectl printed, lists included; other objects are left out.

    Of each its name and spec: that is all that settings come from, and plain JSON.
    """
    found: list[dict[str, Any]] = []
    for each in documents:
        if isinstance(each, list):
            found += configurations(each)
        elif isinstance(each, dict) and isinstance(each.get("items"), list):
            kind = str(each.get("kind", "")).removesuffix("List")
            found += configurations({"kind": kind} | one for one in each["items"] if isinstance(one, dict))
        elif isinstance(each, dict) and each.get("kind") == "FelixConfiguration":
            spec = each.get("spec") or {}
            if isinstance(spec, dict):
                found.append({"kind": each["kind"], "metadata": {"name": _name(each)}, "spec": _plain(spec)})
    return found


def _plain(value: Any) -> Any:
    """What YAML read, as JSON has it: a date or another word of YAML's is a string."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
