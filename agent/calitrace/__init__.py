"""calitrace: find where Calico's eBPF dataplane lost a packet, and why."""

__version__ = "0.1.0"
