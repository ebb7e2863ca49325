"""Types of arguments that several commands take."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """Comma-separated integers."""
    return [int(part) for part in text.split(",")]


def texts(text: str) -> list[str]:
    """Comma-separated texts, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]
