"""Types of arguments that several commands take."""

from __future__ import annotations

from argparse import ArgumentTypeError


def numbers(text: str) -> list[int]:
    """Comma-separated integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,1") from None


def texts(text: str) -> list[str]:
    """Comma-separated texts, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]
