"""Types of arguments that several commands take."""

from __future__ import annotations

from argparse import ArgumentTypeError

from ..locations import is_url, redact_url


def numbers(text: str) -> list[int]:
    """Comma-separated integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,1") from None


def local_path(text: str) -> str:
    """A path of this machine, where something is written: of a URL it would be a directory `s3:` here."""
    if is_url(text):
        raise ArgumentTypeError(
            f"{redact_url(text)} is a URL, and this is written to a disk; copy it there then"
        )
    return text


def texts(text: str) -> list[str]:
    """Comma-separated texts, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]
