"""Where tensors are captured: one side of one module call, and how it is named and described."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..layout import names
from ..layout.names import PathKey
from ..layout.structure import Scalar, TreeSpec, count_leaves, describe
from ..layout.templates import HOLE, STEP_DIR, Template
from ..record import Counts, Direction, Json, Origin
from ..statistics.summary import KEYS
from .filters.tensors import TensorSpec

# Shapes change from step to step in a busy server; more than these are described anew.
_REMEMBERED = 8


class Scene(NamedTuple):
    """What a side looks like with certain tensors in it, ready for any step.

    ``stored`` has, for each tensor to be stored, its position among the side's tensors, its name
    without the step's directory, its origin and its form's kind. ``counts`` books all of the side's
    tensors but the stored ones' success.
    """

    stored: tuple[tuple[int, str, Origin, int], ...]
    template: Template
    counts: Counts


class CallSide:
    """One side (inputs, outputs, inputs afterwards) of one call, for one structure of its values.

    ``file`` is the name of its structure document in the step. ``keywords`` is the tree spec of keyword
    arguments, None for a result.
    """

    __slots__ = (
        "_keywords",
        "_scenes",
        "_sketch",
        "call",
        "direction",
        "directory",
        "file",
        "module",
        "scalars",
        "tensors",
    )

    def __init__(
        self,
        module: str,
        call: int,
        directory: str,
        direction: Direction,
        treespec: TreeSpec,
        keywords: TreeSpec | None = None,
    ) -> None:
        self.module = module
        self.call = call
        self.direction: Direction = direction
        self.file = f"{directory}/{direction}.json"
        both = [count_leaves(each) for each in (treespec, keywords) if each is not None]
        self.tensors = sum(tensors for tensors, _ in both)
        self.scalars = sum(scalars for _, scalars in both)
        self.directory = directory
        self._sketch = treespec
        self._keywords = keywords
        self._scenes: dict[Any, Scene] = {}

    def scene(self, specs: Sequence[TensorSpec], scalars: Sequence[Scalar], rank: int) -> Scene:
        """The scene with these tensors and scalars, in order."""
        # 1, 1.0 and True are equal, but not the same in JSON.
        key = (tuple(specs), repr(scalars)) if scalars else tuple(specs)
        scene = self._scenes.get(key)
        if scene is None:
            if len(self._scenes) >= _REMEMBERED:
                self._scenes.clear()
            scene = self._scenes[key] = self._describe(specs, scalars, rank)
        return scene

    def _describe(self, specs: Sequence[TensorSpec], scalars: Sequence[Scalar], rank: int) -> Scene:
        pending = iter(enumerate(specs))
        taken: set[str] = set()
        stored: list[tuple[int, str, Origin, int]] = []

        def tensor(path: tuple[PathKey, ...]) -> Json:
            index, spec = next(pending)
            document = _describe_form(spec)
            if spec.outcome is not None:
                document["skipped"] = spec.outcome.reason
            if spec.outcome is not None and not spec.measured:
                return document
            stem = names.unique(names.stem(self.direction, path, spec.device, rank), taken)
            name = f"/{self.directory}/{stem}"
            if spec.outcome is None:
                document["file"] = f"{STEP_DIR}{name}.pt"
                stored.append((index, name, self._origin(spec, path, rank), spec.kind))
            else:
                document["name"] = f"{STEP_DIR}{name}"
            if spec.measured:
                document["stats"] = dict.fromkeys(KEYS, HOLE)
            return document

        values = iter(scalars)
        document = describe(self._sketch, (), tensor, values)
        if self._keywords is not None:
            document["kwargs"] = describe(self._keywords, (), tensor, values)
        return Scene(tuple(stored), Template(document), count_forms(specs))

    def _origin(self, spec: TensorSpec, path: tuple[PathKey, ...], rank: int) -> Origin:
        return Origin(rank, self.module, self.call, self.direction, path, spec.dtype, spec.shape, spec.device)


def _describe_form(spec: TensorSpec) -> Json:
    return {
        "type": "tensor",
        "shape": list(spec.shape),
        "dtype": str(spec.dtype),
        "numel": math.prod(spec.shape),
        "device": spec.device,
    }


def count_forms(specs: Sequence[TensorSpec]) -> Counts:
    """The ledger of tensors with these specs, without the stored ones' success."""
    counts = Counts(reasons=Counter())
    for spec in specs:
        outcome = spec.outcome
        if outcome is not None and outcome.column is None:
            continue
        counts.captured += 1
        counts.bytes_captured += spec.nbytes
        if outcome is not None and outcome.column is not None:
            setattr(counts, outcome.column, getattr(counts, outcome.column) + 1)
            counts.reasons[f"{outcome.column}: {outcome.reason}"] += 1
    return counts
