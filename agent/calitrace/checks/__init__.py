"""The eBPF troubleshooting page as checks: pure functions over a snapshot of a node and its cluster."""
