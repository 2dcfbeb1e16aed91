"""Devices, signals, and everything that a run writes."""
