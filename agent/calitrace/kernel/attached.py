"""Which of Calico's programs hang where on this node, by id: a reload gives each another id."""

from __future__ import annotations

from typing import Any

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import discover, netns, syscall, tc

_ATTEMPTS = 10


def calico_programs(namespace: str = "") -> dict[tuple[str, str], tuple[int, ...]]:
    """Ids of Calico's tc and tcx programs at each (interface, hook) of *namespace*, "" for ours.

    Each interface has both its hooks here, with an empty tuple where no program of Calico's is.
    Raises EnvironmentUnfit without the privilege, and when programs change too fast to be read.
    """
    from pyroute2 import IPRoute

    with netns.inside(namespace), IPRoute() as route:
        return _look(route)


def _look(route: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    from pyroute2.netlink.exceptions import NetlinkError

    for _ in range(_ATTEMPTS):
        try:
            hooks = tc.hooks(route)
            return {
                (tc.interface_name(message), hook): tuple(each for each in ids if _is_calico(each))
                for message in route.get_links()
                for hook, ids in tc.program_ids(route, message["index"], hooks.get(message["index"], ())).items()
            }
        except (FileNotFoundError, NetlinkError):
            continue  # program or interface went between the list and the look: the next list knows what came instead
        except PermissionError as refused:
            raise EnvironmentUnfit("may not look at BPF programs", "run as root") from refused
    raise EnvironmentUnfit("the BPF programs on this node change faster than they can be read", "try again")


def _is_calico(identifier: int) -> bool:
    return discover.is_calico(syscall.program_by_id(identifier).name)
