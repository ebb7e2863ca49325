"""Hearing a model's calls. Private."""
