"""One captured call again: from its stored inputs, with a live module, held against what was stored."""

from __future__ import annotations

from .again import Replayed, replay

__all__ = ["Replayed", "replay"]
