"""Capture in a compiled engine. Private."""
