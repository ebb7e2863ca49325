"""Where tensors are captured: one side of one module call, and how it is named and described."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import names
from .forms import Form
from .names import PathKey
from .record import Counts, Direction, Json, Origin
from .rendering import HOLE, STEP_DIR, Template
from .statistics import KEYS
from .structure import Scalar, Sketch, count_leaves, describe

# Shapes change from step to step in a busy server; more than these are described anew.
_REMEMBERED = 8


class Scene(NamedTuple):
    """What a site looks like with certain tensors in it, ready for any step.

    ``stored`` has, for each tensor to be stored, its position among the site's tensors, its name
    without the step's directory, its origin and its form's kind. ``counts`` books all of the site's
    tensors but the stored ones' success.
    """

    stored: tuple[tuple[int, str, Origin, int], ...]
    template: Template
    counts: Counts


class Site:
    """One side (inputs, outputs, inputs afterwards) of one call, for one structure of its values.

    ``file`` is the name of its structure document in the step. ``keywords`` is the sketch of keyword
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
        sketch: Sketch,
        keywords: Sketch | None = None,
    ) -> None:
        self.module = module
        self.call = call
        self.direction: Direction = direction
        self.file = f"{directory}/{direction}.json"
        both = [count_leaves(each) for each in (sketch, keywords) if each is not None]
        self.tensors = sum(tensors for tensors, _ in both)
        self.scalars = sum(scalars for _, scalars in both)
        self.directory = directory
        self._sketch = sketch
        self._keywords = keywords
        self._scenes: dict[Any, Scene] = {}

    def scene(self, forms: Sequence[Form], scalars: Sequence[Scalar], rank: int) -> Scene:
        """The scene with these tensors and scalars, in order."""
        # 1, 1.0 and True are equal, but not the same in JSON.
        key = (tuple(forms), repr(scalars)) if scalars else tuple(forms)
        scene = self._scenes.get(key)
        if scene is None:
            if len(self._scenes) >= _REMEMBERED:
                self._scenes.clear()
            scene = self._scenes[key] = self._describe(forms, scalars, rank)
        return scene

    def _describe(self, forms: Sequence[Form], scalars: Sequence[Scalar], rank: int) -> Scene:
        pending = iter(enumerate(forms))
        taken: set[str] = set()
        stored: list[tuple[int, str, Origin, int]] = []

        def tensor(path: tuple[PathKey, ...]) -> Json:
            index, form = next(pending)
            document = _describe_form(form)
            if form.outcome is not None:
                document["skipped"] = form.outcome.reason
            if form.outcome is not None and not form.measured:
                return document
            stem = names.unique(names.stem(self.direction, path, form.device, rank), taken)
            name = f"/{self.directory}/{stem}"
            if form.outcome is None:
                document["file"] = f"{STEP_DIR}{name}.pt"
                stored.append((index, name, self._origin(form, path, rank), form.kind))
            else:
                document["name"] = f"{STEP_DIR}{name}"
            if form.measured:
                document["stats"] = dict.fromkeys(KEYS, HOLE)
            return document

        values = iter(scalars)
        document = describe(self._sketch, (), tensor, values)
        if self._keywords is not None:
            document["kwargs"] = describe(self._keywords, (), tensor, values)
        return Scene(tuple(stored), Template(document), count_forms(forms))

    def _origin(self, form: Form, path: tuple[PathKey, ...], rank: int) -> Origin:
        return Origin(rank, self.module, self.call, self.direction, path, form.dtype, form.shape, form.device)


def _describe_form(form: Form) -> Json:
    return {
        "type": "tensor",
        "shape": list(form.shape),
        "dtype": str(form.dtype),
        "numel": math.prod(form.shape),
        "device": form.device,
    }


def count_forms(forms: Sequence[Form]) -> Counts:
    """The ledger of tensors with these forms, without the stored ones' success."""
    counts = Counts(reasons=Counter())
    for form in forms:
        outcome = form.outcome
        if outcome is not None and outcome.column is None:
            continue
        counts.captured += 1
        counts.bytes_captured += form.nbytes
        if outcome is not None and outcome.column is not None:
            setattr(counts, outcome.column, getattr(counts, outcome.column) + 1)
            counts.reasons[f"{outcome.column}: {outcome.reason}"] += 1
    return counts
