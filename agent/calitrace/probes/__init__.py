"""The edge that sends probes and hears their replies."""
