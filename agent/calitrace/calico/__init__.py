"""Calico's own formats: one table per format, each with its source."""
