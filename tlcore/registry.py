"""Backends by name: the built-in table, names registered at run time, entry points, import paths."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from .config.validation import nearest
from .errors import BackendError, ConfigError

if TYPE_CHECKING:
    from .protocols import Sink

    Factory = Callable[..., Sink]

ENTRY_POINT_GROUP = "tlcore.backends"
Origin = Literal["built-in", "registered", "entry point", "import path"]

_BUILT_IN = {
    "pt": "tlcore_backends.pt.sink:PtSink",
    "safetensors": "tlcore_backends.safetensors.sink:SafetensorsSink",
    "fsspec": "tlcore_backends.storage.remote:make_sink",
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")
_registered: dict[str, Backend] = {}


@dataclass(frozen=True, slots=True)
class Backend:
    """A resolved backend. ``target`` is its factory, or an import path that is followed when needed.

    ``options_schema`` is the JSON Schema of the factory's keyword arguments; None accepts any.
    """

    name: str
    target: Factory | str
    options_schema: Mapping[str, Any] | None
    origin: Origin

    @property
    def factory(self) -> Factory:
        """``factory(**options)`` makes the sink. Raises ConfigError when it cannot be loaded."""
        return _import_target(self.target) if isinstance(self.target, str) else self.target

    @property
    def portable(self) -> bool:
        """Whether another process, such as a vLLM worker, can resolve the same name."""
        return self.origin != "registered"


def register_sink(name: str, factory: Factory, options_schema: Mapping[str, Any] | None = None) -> None:
    """Make ``backend: name`` work in this process; a second registration of a name replaces the first.

    ``factory(**options)`` returns a `Sink`. Raises BackendError for a name that is built in or badly
    formed, a factory that cannot be called, or a schema that is not a JSON Schema.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise BackendError(f"A backend name has letters, digits, '_', '.' and '-' only, not {name!r}.")
    if name in _BUILT_IN:
        raise BackendError(f"The backend name {name!r} is built in; register yours under another name.")
    if not callable(factory):
        raise BackendError(f"The factory of backend {name!r} is not callable: {factory!r}.")
    _registered[name] = Backend(name, factory, _checked(name, options_schema), "registered")


def available() -> list[str]:
    """All names that resolve here, sorted."""
    return sorted({*_BUILT_IN, *_registered, *(point.name for point in _entry_points())})


def resolve(name: str, *, portable: bool = False) -> Backend:
    """The backend called ``name``; built-in names win, then registered ones, then entry points.

    ``portable`` rejects names that a worker process could not resolve. Raises ConfigError at
    ``$.backend`` with the nearest name and the list of available ones.
    """
    backend = _find(name)
    if portable and not backend.portable:
        problem = f"the backend {name!r} is registered in this process only, and workers cannot see it."
        hint = (
            f"Give an import path such as pkg.mod:Sink, or declare an entry point in {ENTRY_POINT_GROUP!r}."
        )
        raise ConfigError("$.backend", problem, hint)
    return backend


def _find(name: str) -> Backend:
    if name in _BUILT_IN:
        return Backend(name, _BUILT_IN[name], _built_in_schema(name), "built-in")
    if name in _registered:
        return _registered[name]
    for point in _entry_points():
        if point.name == name:
            return _loaded(name, point.value, "entry point")
    if ":" in name:
        return _loaded(name, name, "import path")
    names = available()
    close = nearest(name, names)
    hint = f"Available: {', '.join(names)}, or an import path pkg.mod:Sink."
    raise ConfigError("$.backend", f"there is no backend {name!r}.", f"{close} {hint}" if close else hint)


def _built_in_schema(name: str) -> Mapping[str, Any]:
    import tlcore_schemas

    return tlcore_schemas.load(f"backend/{name}.v1")


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value))


def _loaded(name: str, target: str, origin: Origin) -> Backend:
    factory = _import_target(target)
    return Backend(name, factory, _checked(name, getattr(factory, "options_schema", None)), origin)


def _import_target(target: str) -> Factory:
    """Follow ``pkg.mod:attr``; whatever a foreign module raises while it loads becomes a ConfigError."""
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        problem = f"the backend {target!r} cannot be loaded: {type(error).__name__}: {error}."
        hint = "It must name a callable that can be imported, as pkg.mod:Sink."
        raise ConfigError("$.backend", problem, hint) from error
    if not callable(found):
        raise ConfigError("$.backend", f"{target!r} is a {type(found).__name__}, which cannot be called.")
    factory: Factory = found
    return factory


def _checked(name: str, schema: Any) -> Mapping[str, Any] | None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if schema is None:
        return None
    try:
        Draft202012Validator.check_schema(schema)
        own: dict[str, Any] = json.loads(json.dumps(dict(schema)))
    except (SchemaError, TypeError, ValueError) as error:
        reason = getattr(error, "message", error)
        raise BackendError(f"options_schema of backend {name!r} is not a JSON Schema: {reason}") from None
    if "name" in own.get("properties", {}):
        raise BackendError(f"options_schema of backend {name!r} may not have 'name': it selects the backend.")
    return own
