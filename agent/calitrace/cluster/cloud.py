"""Which cloud this machine stands in, from DMI; and what its metadata service says of the instance, read-only.

Nothing is asked unless DMI names a cloud that we know. The address is link-local: no request leaves the machine's
link, proxies are not used.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path

from calitrace.checks.snapshot import Cloud, Missing

DMI = Path("/sys/class/dmi/id")
BASE = "http://169.254.169.254"
TIMEOUT_S = 1.0
_VENDORS = {"Amazon EC2": "aws", "Google": "gcp"}


def collect(dmi: Path = DMI, base: str = BASE, timeout_s: float = TIMEOUT_S) -> Cloud | Missing:
    """The cloud, or why it is not known. *base*: address of the metadata service."""
    try:
        vendor = (dmi / "sys_vendor").read_text().strip()
    except OSError:
        return Missing("the platform has no DMI: no cloud is known")
    provider = _VENDORS.get(vendor)
    if provider is None:
        return Missing(f"the platform's DMI names no cloud that we know: {vendor or 'nothing'}")
    try:
        return _aws(base, timeout_s) if provider == "aws" else _gcp(base, timeout_s)
    except (OSError, ValueError) as failed:
        return Missing(f"the metadata service of {provider} did not answer: {failed}")


def _aws(base: str, timeout_s: float) -> Cloud:
    lease = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = {"X-aws-ec2-metadata-token": _ask(f"{base}/latest/api/token", lease, timeout_s, "PUT")}

    def ask(name: str) -> str:
        return _ask(f"{base}/latest/meta-data/{name}", token, timeout_s)

    return Cloud("aws", ask("instance-id"), ask("placement/availability-zone"), ask("instance-type"))


def _gcp(base: str, timeout_s: float) -> Cloud:
    flavor = {"Metadata-Flavor": "Google"}

    def ask(name: str) -> str:
        return _ask(f"{base}/computeMetadata/v1/instance/{name}", flavor, timeout_s).rpartition("/")[2]

    return Cloud("gcp", ask("name"), ask("zone"), ask("machine-type"))


def _ask(url: str, headers: dict[str, str], timeout_s: float, method: str = "GET") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    with opener.open(request, timeout=timeout_s) as answer:
        return str(answer.read(4096).decode(errors="replace").strip())
