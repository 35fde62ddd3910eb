"""What cannot be probed is one clear error, before anything is sent."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from calitrace.cli import probe
from calitrace.errors import UsageError
from calitrace.packet import TCP
from calitrace.probes.run import ProbeRun, Settings


@pytest.mark.parametrize(
    "target", ["10.0.0.1", "10.0.0.1:", ":80", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:-1", "10.0.0.1:\u00b2"]
)
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        probe.endpoint(target)


@pytest.mark.parametrize("host", ["a..b", f"{64 * 'a'}.example"])
def test_hosts_that_no_resolver_can_be_asked_for(host: str) -> None:
    with pytest.raises(UsageError, match="is no host name"):
        ProbeRun(Settings(host, 80, TCP))


@pytest.mark.parametrize("option", ["--vxlan-port=0", "--vxlan-port=65536", "--stories=-1"])
def test_numbers_out_of_range(option: str) -> None:
    result = CliRunner().invoke(probe.command, ["nodeport", "192.0.2.1:80", "--trace", option])
    assert result.exit_code == 2
    assert "is not in the range" in result.output
