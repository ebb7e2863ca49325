"""Capture, from a module's call to the sink. Private."""
