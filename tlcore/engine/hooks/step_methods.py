"""Which methods of a model may be steps."""

from __future__ import annotations

import difflib
import inspect

from torch import nn

from ...errors import CaptureError

_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


def method_of(model: nn.Module, kind: str) -> str:
    """The method's name in ``method:NAME``. Raises CaptureError where its calls cannot be steps."""
    name = kind.partition(":")[2]
    found = getattr(model, name, None)
    if name in ("forward", "__call__"):
        raise CaptureError(f'step="{kind}": a call of the model is what step="root" means; write that')
    if not callable(found):
        near = difflib.get_close_matches(name, [each for each in dir(type(model)) if each[0] != "_"], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CaptureError(f"{type(model).__name__} has no method {name!r}, which step={kind!r} names{hint}")
    if any(kind_of(found) for kind_of in _LATER):
        raise CaptureError(
            f"{name!r} is a generator or coroutine: its code runs after the call that makes it; put"
            " `with capture.step():` around that code instead"
        )
    return name
