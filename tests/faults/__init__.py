"""Runs with injected faults."""
