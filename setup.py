"""Build calitrace: agent/ is the source root and bpf/ travels inside the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithBpf(build_py):
    """Copy bpf/ to calitrace/bpf/ so that an installed wheel finds its BPF sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # kernel/loader.py finds bpf/ beside agent/ in a checkout
        target = Path(self.build_lib) / "calitrace" / "bpf"
        shutil.copytree(ROOT / "bpf", target, dirs_exist_ok=True)


setup(
    name="calitrace",
    version="0.1.0",
    description="Find where Calico's eBPF dataplane lost a packet, and why",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND GPL-2.0-only",  # the Python, and bpf/
    license_files=["LICENSE", "bpf/LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "agent"},
    packages=find_packages("agent"),
    # BCC is the distribution's python3-bpfcc; "bcc" on PyPI is an unrelated package.
    install_requires=["click>=8.1", "msgpack>=1.0", "numpy>=1.24", "pyroute2>=0.7.12", "scapy>=2.5", "pyyaml>=6"],
    extras_require={"kubernetes": ["kubernetes>=37,<38"]},
    entry_points={"console_scripts": ["calitrace = calitrace.cli.main:run"]},
    cmdclass={"build_py": BuildWithBpf},
)
