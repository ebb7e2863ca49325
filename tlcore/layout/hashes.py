"""How hashes of content are kept: XXH3-128, as bytes in tables and as text with a prefix in documents."""

from __future__ import annotations

HASH_BYTES = 16
HASH_PREFIX = "xxh3-128:"
