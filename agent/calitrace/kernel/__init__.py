"""The privileged edge: BCC, bpf(2), netlink, namespaces, tracefs. Returns bytes and plain values."""
