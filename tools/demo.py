"""The main job on the built-in lab: healthy, then under each fault, one readable story and verdict.

Runs the installed program as a user would. Exit status 1 when a verdict is not the injected one.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(Path(sys.executable).parent / "calitrace")
OUTPUT = Path("build/demo")  # below ROOT, where everything is run
LAB = "demo"
_LOOK_S = 0.1
TARGET = "10.10.0.1:30080"


@dataclass(frozen=True)
class Scene:
    """*expected*: what the JSON verdict of every probe must say; dotted keys reach inside.

    *says*: words that its cause must contain.
    """

    title: str
    fault: str
    expected: dict[str, str]
    says: str = ""


SCENES = (
    Scene("healthy: a NodePort on node-a, its pod on node-b", "", {"verdict": "answered"}),
    Scene(
        "the network between the nodes drops UDP 4789",
        "vxlan-blocked",
        {
            "verdict": "underlay",
            "confidence": "proven",
            "place.namespace": f"{LAB}-node-a",
            "to.namespace": f"{LAB}-node-b",
        },
    ),
    Scene(
        "a network policy denies at the pod",
        "policy-deny",
        {
            "verdict": "dropped",
            "confidence": "proven",
            "place.namespace": f"{LAB}-node-b",
            "place.interface": "calif00dbeef012",
            "place.hook": "tc egress",
            "calico_reason": "DROPPED_BY_POLICY",
        },
        "denied by policy: default.deny-lab-clients rule 0",
    ),
    Scene(
        "the service has lost its endpoints",
        "no-backend",
        {"verdict": "no-backend", "confidence": "proven", "place.namespace": f"{LAB}-node-a"},
    ),
    Scene(
        "the way back to the client goes by another interface: strict reverse path check",
        "rpf",
        {
            "verdict": "dropped",
            "confidence": "proven",
            "place.namespace": f"{LAB}-node-a",
            "place.interface": "ens192",
            "place.hook": "tc ingress",
        },
        "the reverse path check of the source failed",
    ),
)


def calitrace(*arguments: str, quiet: bool = False) -> str:
    """Run the program; returns its stdout, which is also shown unless *quiet*."""
    if not quiet:
        print(f"$ calitrace {' '.join(arguments)}", flush=True)
    with subprocess.Popen([PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        output = None
        while output is None:
            try:
                output, _ = run.communicate(timeout=_LOOK_S)
            except subprocess.TimeoutExpired:
                if STOP.number:
                    run.terminate()  # it removes what it has begun, and we wait for that
    if not quiet:
        print(output, flush=True)
    if STOP.number:
        raise SystemExit(128 + STOP.number)
    if run.returncode not in (0, 1):
        raise SystemExit(run.returncode)
    return output


class Stop:
    """Ctrl-C and SIGTERM, which wait until the program that runs can be told. *number*: which came first."""

    number = 0

    def note(self, number: int, _frame: object) -> None:
        """As a handler."""
        self.number = self.number or number


STOP = Stop()


def value(verdict: dict[str, Any], key: str) -> object:
    """``place.hook`` of a verdict."""
    found: Any = verdict
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def differences(scene: Scene, journal: Path) -> list[str]:
    """What the journal's own report says otherwise than the scene."""
    objects = [
        json.loads(line) for line in calitrace("report", "-r", str(journal), "-o", "json", quiet=True).splitlines()
    ]
    probes = [each for each in objects if each["type"] == "probe"]
    if not probes:
        return ["no probe in the journal"]
    return [
        f"probe {probe['number']}: {key} is {value(probe, key)!r}, not {wanted!r}"
        for probe in probes
        for key, wanted in scene.expected.items()
        if value(probe, key) != wanted
    ] + [
        f"probe {probe['number']}: cause is {probe['cause']!r}, without {scene.says!r}"
        for probe in probes
        if scene.says not in probe["cause"]
    ]


def main() -> int:
    """Bring the lab up, play all scenes, take it down."""
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    (ROOT / OUTPUT).mkdir(parents=True)
    wrong: list[str] = []
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, STOP.note)
    calitrace("lab", "down", "--name", LAB, quiet=True)
    try:
        calitrace("lab", "up", "--name", LAB)
        calitrace("lab", "log-level", "debug", "--name", LAB)
        for number, scene in enumerate(SCENES, 1):
            print(f"--- {number} of {len(SCENES)}: {scene.title}\n", flush=True)
            if scene.fault:
                calitrace("lab", "fault", scene.fault, "--name", LAB)
            journal = OUTPUT / f"{scene.fault or 'healthy'}.calitrace"
            calitrace("probe", "nodeport", TARGET, "--from", f"{LAB}-client", "-c", "3", "--trace", "-w", str(journal))
            found = differences(scene, journal)
            wrong += [f"{scene.fault or 'healthy'}: {each}" for each in found]
            print("as injected\n" if not found else "NOT as injected\n", flush=True)
            if scene.fault:
                calitrace("lab", "heal", "--name", LAB, quiet=True)
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        STOP.number = 0
        calitrace("lab", "down", "--name", LAB)
    for difference in wrong:
        sys.stderr.write(f"error: {difference}\n")
    print(f"{len(SCENES)} scenes, {len(wrong)} differences; journals in {OUTPUT}/")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
