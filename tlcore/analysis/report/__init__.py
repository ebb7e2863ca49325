"""Reports as one self-contained HTML file each."""

from __future__ import annotations

from .page import page
from .stats_page import survey_page

__all__ = ["page", "survey_page"]
