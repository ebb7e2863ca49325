"""Dumps of other tools, read in place: a source for each. Private."""
