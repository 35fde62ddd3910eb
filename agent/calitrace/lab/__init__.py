"""Two nodes, a client and a fabric in network namespaces of this machine."""
