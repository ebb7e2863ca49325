"""Backends by name and stores by URL: built in, registered at run time, entry points, import paths.

The one place that knows where the built-in backends and stores lie: they are loaded by these texts alone, so
that neither the engine nor the reader imports one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from .errors import BackendError, ConfigError, ReadError, nearest
from .storage import Location, Store

if TYPE_CHECKING:
    from .protocols import LocationOf, Sink, SinkFactory, Source, SourceFactory
    from .record import Json, RunInfo

StoreFactory = Callable[[Location], Store]
Origin = Literal["built-in", "registered", "entry point", "import path"]

ENTRY_POINT_GROUP = "tlcore.backends"
STORE_GROUP = "tlcore.stores"
# Of each built-in backend its sink, its source and its location; None where the default does.
_BUILT_IN: dict[str, tuple[str, str | None, str | None]] = {
    "pt": ("tlcore_backends.pt.sink:PtSink", "tlcore_backends.pt.source:PtSource", None),
    "safetensors": (
        "tlcore_backends.safetensors.versions:make_sink",
        "tlcore_backends.safetensors.versions:open_source",
        None,
    ),
    "fsspec": ("tlcore_backends.fsspec:make_sink", None, "tlcore_backends.fsspec:location"),
}
# Dumps of other tools, which are only read. The first that recognises a place has it.
_FOREIGN = {
    "transformers-debugger": "tlcore_backends.foreign.transformers_debugger:TransformersDebugger",
    "hidden-states": "tlcore_backends.foreign.hidden_states:HiddenStates",
    "sglang-dumper": "tlcore_backends.foreign.sglang_dumper:SglangDumper",
    "sglang-folder": "tlcore_backends.foreign.sglang_folder:SglangFolder",
    "msprobe": "tlcore_backends.foreign.msprobe:Msprobe",
    "polygraphy": "tlcore_backends.foreign.polygraphy:Polygraphy",
    "saelens": "tlcore_backends.foreign.saelens:Saelens",
    "nxd-capture": "tlcore_backends.foreign.nxd:NeuronCapture",
    "transformer-engine": "tlcore_backends.foreign.transformer_engine:TransformerEngine",
    "plain": "tlcore_backends.foreign.plain:PlainSource",
}
# By scheme, "" for a path; every other scheme is fsspec's.
_BUILT_IN_STORES = dict.fromkeys(("", "file", "local"), "tlcore_backends.storage.local:open_local")
_FSSPEC_STORE = "tlcore_backends.storage.remote:open_remote"
_SPILL_STORE = "tlcore_backends.storage.spill.store:SpillStore"
_DUMP_FILES = "tlcore_backends.foreign.files:DumpFiles"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")
_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*\Z")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_registered: dict[str, NamedBackend] = {}
# Import paths that this process was configured with; those in a run's files are never followed.
_followed: dict[str, NamedBackend] = {}
_stores: dict[str, StoreFactory] = {}


@dataclass(frozen=True, slots=True)
class NamedBackend:
    """A resolved backend; its sides are factories, or import paths that are followed when needed.

    ``options_schema`` is the JSON Schema of the sink factory's keyword arguments; None accepts any.
    """

    name: str
    sink: SinkFactory | str
    options_schema: Mapping[str, Any] | None
    origin: Origin
    source: SourceFactory | str | None = None
    location: LocationOf | str | None = None

    @property
    def factory(self) -> SinkFactory:
        """``factory(**options)`` makes the sink. Raises ConfigError when it cannot be loaded."""
        return _import_callable(self.sink) if isinstance(self.sink, str) else self.sink

    @property
    def portable(self) -> bool:
        """Whether another process, such as a vLLM worker, can resolve the same name."""
        return self.origin != "registered"

    def written_as(self, options: Mapping[str, Any]) -> str:
        """The name by which the run's reader is found: a backend may only be a spelling of another one."""
        # Only `fsspec` is one: it reaches a place, and the format is an option.
        return str(options.get("format", "pt")) if self.name == "fsspec" else self.name

    def located(self, options: Mapping[str, Any], output_dir: str) -> Location:
        """Where this backend's runs lie. Raises ConfigError when it cannot be loaded or says nonsense."""
        if self.location is None:
            return Location(output_dir)
        found = (_import_callable(self.location) if isinstance(self.location, str) else self.location)(
            options, output_dir
        )
        if isinstance(found, Location):
            return found
        if isinstance(found, (str, os.PathLike)):
            return Location(os.fspath(found))
        kind = type(found).__name__
        raise ConfigError(
            "$.backend", f"the location of {self.name!r} is a {kind}, neither text nor Location."
        )

    def open_source(self, store: Store, run: Json) -> Source:
        """A reader of the run in ``store``. Raises ReadError where this backend has none."""
        if self.source is None:
            raise _no_reader(self.name, "it was registered without a source.")
        return (_import_callable(self.source) if isinstance(self.source, str) else self.source)(store, run)


def register_backend(
    name: str,
    *,
    sink: SinkFactory,
    source: SourceFactory | None = None,
    location: LocationOf | None = None,
    options_schema: Mapping[str, Any] | None = None,
) -> None:
    """Make ``backend: name`` work in this process; a second registration of a name replaces the first.

    The arguments are those of `tlcore.Backend`. Raises BackendError for a name that is built in or badly
    formed, a side that cannot be called, or a schema that is not a JSON Schema.
    """
    if not isinstance(name, str) or not _NAME.match(name):
        raise BackendError(f"A backend name has letters, digits, '_', '.' and '-' only, not {name!r}.")
    if name in _BUILT_IN:
        raise BackendError(f"The backend name {name!r} is built in; register yours under another name.")
    _registered[name] = _of_sides(name, sink, source, location, options_schema, "registered")


def register_sink(name: str, factory: SinkFactory, options_schema: Mapping[str, Any] | None = None) -> None:
    """`register_backend` for a backend that only writes: its runs are listed, and cannot be read."""
    register_backend(name, sink=factory, options_schema=options_schema)


def register_store(scheme: str, factory: StoreFactory) -> None:
    """Make URLs of ``scheme`` open with ``factory(location)``, in this process, whatever the backend.

    Raises BackendError for a scheme that is built in or badly formed, or a factory that cannot be called.
    """
    if not isinstance(scheme, str) or not _SCHEME.match(scheme):
        raise BackendError(
            f"A URL scheme has lower-case letters, digits, '+', '.' and '-' only, not {scheme!r}."
        )
    if scheme in _BUILT_IN_STORES:
        raise BackendError(f"The scheme {scheme!r} is built in; register yours under another one.")
    if not callable(factory):
        raise BackendError(f"The factory of the store {scheme!r} is not callable: {factory!r}.")
    _stores[scheme] = factory


def available() -> list[str]:
    """All names that resolve here, sorted."""
    return sorted({*_BUILT_IN, *_registered, *(point.name for point in _entry_points(ENTRY_POINT_GROUP))})


def resolve(name: str, *, portable: bool = False) -> NamedBackend:
    """The backend called ``name``; built-in names win, then registered ones, then entry points.

    ``portable`` rejects names that a worker process could not resolve. Raises ConfigError at
    ``$.backend`` with the nearest name and the list of available ones.
    """
    backend = _find(name)
    if backend is None and ":" in name:
        backend = _followed[name] = _loaded(name, name, "import path")
    if backend is None:
        names = available()
        close = nearest(name.lower(), names)
        hint = f"Available: {', '.join(names)}, or an import path pkg.mod:Sink."
        hint = f'Did you mean "{close[0]}"? {hint}' if close else hint
        raise ConfigError("$.backend", f"there is no backend {name!r}.", hint)
    if portable and not backend.portable:
        problem = f"the backend {name!r} is registered in this process only, and workers cannot see it."
        hint = (
            f"Give an import path such as pkg.mod:Sink, or declare an entry point in {ENTRY_POINT_GROUP!r}."
        )
        raise ConfigError("$.backend", problem, hint)
    return backend


def open_source(store: Store, run: Json) -> Source:
    """A reader of the run in ``store``, by the backend's name in its ``run.json``. Raises ReadError.

    A run may come from anybody, so an import path in it is not followed.
    """
    name = run.get("backend")
    if not isinstance(name, str):
        raise ReadError(f"{store.url}/run.json: damaged, 'backend' is missing or no str")
    try:
        if name in _FOREIGN:
            foreign: Source = _import_callable(_FOREIGN[name])(store, run)
            return foreign
        backend = _find(name) or _followed.get(name)
        if backend is None:
            why = "an import path in a run is not followed." if ":" in name else "it is not installed here."
            raise _no_reader(name, why)
        return backend.open_source(store, run)
    except ConfigError as error:
        raise ReadError(f"{store.url}: {error.problem}") from error


def recognise(store: Store) -> tuple[Json | None, list[str], list[str], list[str]]:
    """The run document of another tool's dump in ``store``, and what is missing where one is nearly there.

    The document is None where no format knows the place. The last ones are other formats that know it, too,
    and files that are not read. Raises ReadError where it cannot be looked at.
    """
    near: list[str] = []
    files: Any = _import_target(_DUMP_FILES)(store)
    for name, target in _FOREIGN.items():
        source: Any = _import_target(target)
        found = source.recognise(files)
        if isinstance(found, str):
            # Two formats may say the same of a damaged file.
            near += [] if found in near else [found]
        elif found is not None:
            others, passed_over = list(_also_there(files, name)), source.passed_over(files)
            files.hand_over()
            return {**found, "backend": name}, near, others, passed_over
    return None, near, [], []


def _also_there(files: Any, first: str) -> Iterator[str]:
    """The formats behind the first one that know a place, too; plain tensors may lie beside anything."""
    names = list(_FOREIGN)
    for name in names[names.index(first) + 1 :]:
        source: Any = _import_target(_FOREIGN[name])
        with suppress(ReadError):
            if name != "plain" and isinstance(source.recognise(files), dict):
                yield name


def open_store(
    location: str | os.PathLike[str] | Location, storage_options: Mapping[str, Any] | None = None
) -> Store:
    """The store at a path or URL; ``storage_options`` go to whatever opens the URL.

    A store of the URL's scheme is looked for among the built-in ones, the registered ones, and the entry
    points in ``tlcore.stores``; every other scheme is fsspec's. Raises BackendError for a URL that cannot be
    opened.
    """
    if not isinstance(location, Location):
        location = Location(os.fspath(location), storage_options)
    found = _URL.match(location.url)
    scheme = found[1].lower() if found else ""
    factory: StoreFactory | str = _BUILT_IN_STORES.get(scheme) or _stores.get(scheme) or ""
    if not factory:
        points = _entry_points(STORE_GROUP)
        factory = next((point.value for point in points if point.name == scheme), _FSSPEC_STORE)
    try:
        return (_import_callable(factory) if isinstance(factory, str) else factory)(location)
    except ConfigError as error:
        raise BackendError(error.problem) from error


def spilling(store: Store, run: RunInfo) -> Store:
    """``store``, with a directory behind it for what it does not take (`RunInfo.spill`)."""
    spilling: Store = _import_callable(_SPILL_STORE)(store, run, run.spill)
    return spilling


def make_sink(backend: NamedBackend, options: Mapping[str, Any]) -> Sink:
    """The backend's sink, not yet opened. Raises ConfigError when it cannot be loaded."""
    return backend.factory(**options)


def _find(name: str) -> NamedBackend | None:
    """The backend called ``name``; import paths are left to the caller."""
    if name in _BUILT_IN:
        sink, source, location = _BUILT_IN[name]
        return NamedBackend(name, sink, _built_in_schema(name), "built-in", source, location)
    if name in _registered:
        return _registered[name]
    for point in _entry_points(ENTRY_POINT_GROUP):
        if point.name == name:
            return _loaded(name, point.value, "entry point")
    return None


def _no_reader(name: str, why: str) -> ReadError:
    text = f"no reader is registered for backend {name!r}: {why}"
    return ReadError(f"{text} Install the package that has it, or call tlcore.register_backend.")


def _built_in_schema(name: str) -> Mapping[str, Any]:
    import tlcore_schemas

    return tlcore_schemas.load(f"backend/{name}.v1")


def _entry_points(group: str) -> Sequence[EntryPoint]:
    return _points_of(group, tuple((place, _changed_at(place)) for place in sys.path))


@lru_cache(maxsize=8)
def _points_of(group: str, _places: Hashable) -> Sequence[EntryPoint]:
    """Kept for as long as nothing was installed: whoever looks opens a file of each package there is."""
    return tuple(sorted(entry_points(group=group), key=lambda point: (point.name, point.value)))


def _changed_at(place: str) -> int | None:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return None


def _loaded(name: str, target: str, origin: Origin) -> NamedBackend:
    """What ``target`` names: a `tlcore.Backend`, or a factory of sinks with an ``options_schema`` perhaps."""
    from .protocols import Backend

    found = _import_target(target)
    if isinstance(found, Backend):
        return _of_sides(name, found.sink, found.source, found.location, found.options_schema, origin)
    if not callable(found):
        kind = type(found).__name__
        raise ConfigError("$.backend", f"{target!r} is a {kind}, which cannot be called and is no Backend.")
    return _of_sides(name, found, None, None, getattr(found, "options_schema", None), origin)


def _of_sides(
    name: str,
    sink: SinkFactory,
    source: SourceFactory | None,
    location: LocationOf | None,
    options_schema: Any,
    origin: Origin,
) -> NamedBackend:
    for what, side in (("factory", sink), ("source", source), ("location", location)):
        if not callable(side) and (side is not None or what == "factory"):
            raise BackendError(f"The {what} of backend {name!r} is not callable: {side!r}.")
    return NamedBackend(name, sink, _checked(name, options_schema), origin, source, location)


def _import_callable(target: str) -> Callable[..., Any]:
    found = _import_target(target)
    if not callable(found):
        raise ConfigError("$.backend", f"{target!r} is a {type(found).__name__}, which cannot be called.")
    called: Callable[..., Any] = found
    return called


def _import_target(target: str) -> Any:
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
    return found


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
