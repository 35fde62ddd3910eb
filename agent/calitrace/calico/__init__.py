"""Calico's own formats: one table per format, each with its source."""

WORKLOAD_PREFIX = "cali"  # how the names of pods' interfaces begin: Felix's interfacePrefix, where it is not set
