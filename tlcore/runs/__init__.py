"""Whole runs: rewritten, shown as a file system, removed. Private."""
