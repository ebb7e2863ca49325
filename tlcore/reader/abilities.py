"""What the source of a stored run can do beyond what every source can, looked up once."""

from __future__ import annotations

from functools import cached_property

from ..protocols import (
    Source,
    SupportsArraysInto,
    SupportsIdentity,
    SupportsKinds,
    SupportsMoveSound,
    SupportsOwnBytes,
    SupportsReadSound,
    SupportsSizes,
    SupportsStructures,
)


class Abilities:
    """Each is the source itself where it can do that, else None."""

    def __init__(self, source: Source, is_local: bool) -> None:
        self._source = source
        self._is_local = is_local

    @cached_property
    def structured(self) -> SupportsStructures | None:
        """What tells structures apart from the steps."""
        source = self._source
        return source if isinstance(source, SupportsStructures) else None

    @cached_property
    def identifying(self) -> SupportsIdentity | None:
        """What knows which records share bytes."""
        source = self._source
        return source if isinstance(source, SupportsIdentity) else None

    @cached_property
    def sizing(self) -> SupportsSizes | None:
        """What knows sizes without reading."""
        source = self._source
        return source if isinstance(source, SupportsSizes) else None

    @cached_property
    def reading_into(self) -> SupportsArraysInto | None:
        """What reads arrays of this machine into memory that is given."""
        source = self._source
        return source if self._is_local and isinstance(source, SupportsArraysInto) else None

    @cached_property
    def proving(self) -> SupportsReadSound | None:
        """What proves tensors of this machine sound while it reads them."""
        source = self._source
        return source if self._is_local and isinstance(source, SupportsReadSound) else None

    @cached_property
    def moving(self) -> SupportsMoveSound | None:
        """What proves them while it writes them into a file."""
        source = self._source
        return source if self._is_local and isinstance(source, SupportsMoveSound) else None

    @cached_property
    def owning(self) -> SupportsOwnBytes | None:
        """What reads into memory of its own."""
        source = self._source
        return source if isinstance(source, SupportsOwnBytes) else None

    @cached_property
    def knowing(self) -> SupportsKinds | None:
        """What knows which steps' documents are alike."""
        source = self._source
        return source if isinstance(source, SupportsKinds) else None
