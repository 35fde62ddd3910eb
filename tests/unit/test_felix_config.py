"""Felix's settings: where a value comes from, and when it cannot be known."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from calitrace.calico import felix_config, felix_log, reasons, release
from calitrace.calico.felix_config import Setting, Unset


def configuration(name: str, **spec: Any) -> dict[str, Any]:
    return {"kind": "FelixConfiguration", "metadata": {"name": name}, "spec": spec}


BOTH = [configuration("default", bpfLogLevel="Info"), configuration("node.worker-1", bpfLogLevel="Debug")]


def test_precedence() -> None:
    get = felix_config.resolve(BOTH, {"FELIX_BPFLOGLEVEL": "Off"}, "worker-1", None).get
    assert get("bpfLogLevel") == Setting("bpfLogLevel", "Off", "FELIX_BPFLOGLEVEL")
    get = felix_config.resolve(BOTH, {}, "worker-1", None).get
    assert get("bpfLogLevel") == Setting("bpfLogLevel", "Debug", "FelixConfiguration node.worker-1")
    get = felix_config.resolve(BOTH, {}, "worker-2", None).get
    assert str(get("bpfLogLevel")) == "bpfLogLevel: Info (FelixConfiguration default)"
    get = felix_config.resolve([], {}, "worker-2", None).get
    assert get("bpfLogLevel") == Setting("bpfLogLevel", "Off", "default")


@pytest.mark.parametrize(
    ("variable", "name", "text", "value"),
    [
        ("FELIX_BPFENABLED", "bpfEnabled", "true", True),
        ("FELIX_BPFENABLED", "bpfEnabled", "No", False),
        ("FELIX_BPFENABLED", "bpfEnabled", "perhaps", None),
        ("FELIX_VXLANPORT", "vxlanPort", "4790", 4790),
        ("FELIX_VXLANPORT", "vxlanPort", "many", None),
        ("FELIX_IPINIPENABLED", "ipipEnabled", "1", True),
        ("FELIX_BPFEXTERNALSERVICEMODE", "bpfExternalServiceMode", "DSR", "DSR"),
    ],
)
def test_environment(variable: str, name: str, text: str, value: object) -> None:
    found = felix_config.resolve([], {variable: text}, "n", None).get(name)
    if value is None:
        assert isinstance(found, Unset)
        assert variable in found.why
    else:
        assert found == Setting(name, value, variable)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("v3.13", "bpfDataIfacePattern", "^(en.*|eth.*|tunl0$)"),
        ("v3.31", "bpfDataIfacePattern", "^((en|wl|ww|sl|ib)[Popsx].*|(eth|wlan|wwan|bond).*)"),
        ("v3.22", "bpfKubeProxyEndpointSlicesEnabled", False),
        ("v3.23", "bpfKubeProxyEndpointSlicesEnabled", True),
        ("v3.32", "bpfKubeProxyEndpointSlicesEnabled", None),
        ("v3.14", "bpfKubeProxyEndpointSlicesEnabled", None),
        ("v3.25", "bpfEnforceRPF", "Strict"),
        ("master", "bpfEnforceRPF", "Loose"),
    ],
)
def test_defaults_by_release(text: str, name: str, value: object) -> None:
    found = felix_config.resolve([], {}, "n", release.parse(text, "a test")).get(name)
    assert isinstance(found, Setting)
    assert found.value == value


def test_a_default_that_changed_within_the_range_is_unknown() -> None:
    between = release.Release((3, 26), (3, 29), "map")
    found = felix_config.resolve([], {}, "n", between).get("bpfDataIfacePattern")
    assert isinstance(found, Unset)
    assert "v3.26 to v3.29" in found.why
    assert isinstance(felix_config.resolve([], {}, "n", between).get("bpfEnforceRPF"), Setting)
    assert isinstance(felix_config.resolve([], {}, "n", None).get("bpfEnforceRPF"), Unset)


def test_without_configurations_only_the_environment_is_sure() -> None:
    settings = felix_config.resolve(None, {"FELIX_BPFENABLED": "true"}, "n", None)
    assert settings.get("bpfEnabled") == Setting("bpfEnabled", True, "FELIX_BPFENABLED")
    assert isinstance(settings.get("bpfLogLevel"), Unset)


def test_quoted_numbers_and_the_page_s_name_of_ipip() -> None:
    get = felix_config.resolve([configuration("default", vxlanPort="4790", ipInIpEnabled=True)], {}, "n", None).get
    assert get("vxlanPort") == Setting("vxlanPort", 4790, "FelixConfiguration default")
    assert get("ipipEnabled") == Setting("ipipEnabled", True, "FelixConfiguration default")
    odd = felix_config.resolve([configuration("default", vxlanPort="many")], {}, "n", None).get("vxlanPort")
    assert odd == Unset("vxlanPort: 'many' in FelixConfiguration default is no int")


def test_a_quoted_bool_and_words_in_any_case() -> None:
    get = felix_config.resolve([configuration("default", bpfEnabled="false", bpfLogLevel="debug")], {}, "n", None).get
    assert get("bpfEnabled") == Setting("bpfEnabled", False, "FelixConfiguration default")
    level = get("bpfLogLevel")
    assert isinstance(level, Setting)
    assert level.says("Debug")


def test_objects_without_name_or_spec_are_no_configuration_of_ours() -> None:
    odd: list[dict[str, Any]] = [{}, {"metadata": None}, {"metadata": {"name": "default"}, "spec": None}]
    assert felix_config.resolve(odd, {}, "n", None).get("bpfEnabled") == Setting("bpfEnabled", False, "default")


def test_what_calicoctl_and_kubectl_print() -> None:
    one, two = BOTH
    documents: list[Any] = [
        one,
        {"kind": "FelixConfigurationList", "items": [two, {"kind": "Node"}, None]},
        "text",
        None,
    ]
    assert felix_config.configurations(documents) == [one, two]
    assert felix_config.configurations([documents]) == [one, two]
    raw = {"kind": "FelixConfigurationList", "items": [{"metadata": one["metadata"], "spec": one["spec"]}]}
    assert felix_config.configurations([raw]) == [one]
    assert felix_config.configurations([{"kind": "FelixConfiguration", "spec": "odd"}]) == []
    empty = {"kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": None}
    assert felix_config.configurations([empty]) == [configuration("default")]


def test_what_yaml_makes_of_unquoted_words_is_plain_again() -> None:
    spec = {"since": datetime.date(2026, 11, 23), 1: [True, None, {"a": 2.5}], "bpfLogFilters": {"all": "tcp"}}
    (found,) = felix_config.configurations([configuration("default") | {"spec": spec}])
    assert found["spec"] == {"since": "2026-11-23", "1": [True, None, {"a": 2.5}], "bpfLogFilters": {"all": "tcp"}}


@pytest.mark.parametrize(("text", "shown"), [("v3.28.1", "v3.28"), ("3.31", "v3.31"), ("v3.30.0-0.dev-1", "v3.30")])
def test_releases(text: str, shown: str) -> None:
    assert str(release.parse(text, "")) == shown


@pytest.mark.parametrize("text", ["latest", "", "v3", "sha256"])
def test_no_releases(text: str) -> None:
    assert release.parse(text, "") is None


def test_lines_of_a_container_runtime() -> None:
    plain = "2026-11-23 10:00:00.000 [WARNING][57] felix/bpf_ep_mgr.go 1234: Failed to set rp_filter for cali1. error=x"
    wrapped = [
        f"2026-11-23T10:00:00.123456789Z stdout F {plain}",
        plain,
        plain.replace(" 10:", "T10:").replace(".000", ".000123+01:00"),
        f"[pod/calico-node-x7z2p/calico-node] {plain}",
        json.dumps({"log": f"{plain}\n", "stream": "stdout", "time": "2026-11-23T10:00:00Z"}),
        json.dumps({"MESSAGE": plain, "PRIORITY": "6"}),
    ]
    others = ["bird: x", "", "  ", "{", '{"log": 3}', json.dumps({"log": "bird: x"})]
    others.append('I1123 10:00:00.123456       1 proxier.go:822] "SyncProxyRules complete" elapsed="1ms"')
    lines = list(felix_log.parse([*wrapped, *others]))
    assert [(each.level, each.file, each.text) for each in lines] == [
        ("WARNING", "bpf_ep_mgr.go", "Failed to set rp_filter for cali1. error=x")
    ] * len(wrapped)
    assert all("\\n" not in each.raw for each in lines)


def test_what_is_kept_of_a_log_is_what_checks_look_at() -> None:
    def line(text: str) -> str:
        return f"2026-11-23 10:00:00.000 [INFO][57] felix/x.go 1: {text}"

    wanted = ["first", "Felix starting up", felix_log.STARTED, "new state written", "Failed to mount bpffs"]
    wanted.append("Failed to apply policy to endpoint, leaving it dirty error=x")
    lines = [
        "bird: x",
        *map(line, wanted[:3]),
        line("Summarising 3 loops"),
        f"bird: {felix_log.STARTED}",
        *map(line, wanted[3:]),
        line("Summarising 4 loops"),
        line("Summarising 5 loops"),
        "bird: y",
    ]
    wanted.append("Summarising 5 loops")
    assert [each.text for each in felix_log.telling(lines)] == wanted


def test_the_interface_that_a_line_names() -> None:
    for field in ('iface="eth0"', 'name="eth0"', "ifaceName=eth0"):
        (found,) = felix_log.parse([f"2026-11-23 10:00:00.000 [INFO][57] felix/x.go 1: failed {field} error=x"])
        assert felix_log.interface(found) == "eth0"
    (found,) = felix_log.parse(["2026-11-23 10:00:00.000 [INFO][57] felix/x.go 1: failed"])
    assert felix_log.interface(found) == ""


def test_every_known_line_is_a_pattern_with_a_meaning() -> None:
    assert len({row.check for row in felix_log.KNOWN}) == len(felix_log.KNOWN)
    assert all(row.meaning and row.fix for row in felix_log.KNOWN)
    assert reasons.name(99, 0) == "reason 99"
