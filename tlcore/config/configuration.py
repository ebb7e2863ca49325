"""The configuration: one frozen object, read from JSON or keywords and checked by the JSON Schema."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import ConfigError
from ..layout.jsontext import parse_json
from ..layout.windows import Window, window_of
from ..locations import REDACTED, is_url, redact_url
from ..registry import NamedBackend, resolve
from .patterns import check_regex, parse_pattern
from .validation import coerce, plain, problems, unknown_key

# What is kept of a tensor.
Captured = Literal["tensor", "stats", "both", "channels"]


class Inject(NamedTuple):
    """The run whose results stand in for those of modules, which patterns select.

    ``serve`` says that a server may answer its clients with what comes of that.
    """

    run: str
    modules: tuple[str, ...]
    serve: bool = False

    def to_json(self, redact: bool) -> dict[str, Any]:
        """JSON data; with ``redact`` without credentials in the URL."""
        run = redact_url(self.run) if redact else self.run
        return {"run": run, "modules": list(self.modules), "serve": self.serve}


@dataclass(frozen=True, repr=False)
class Config:
    """A valid configuration in its normal form; made by `load_config`, described in the JSON Schema."""

    enabled: bool
    output_dir: str
    module_call_match: tuple[str, ...] | None
    log_step_ids: tuple[int, ...]
    max_tensor_size: int | None
    device_names: tuple[str, ...]
    log_post_fwd_inputs: bool
    log_gradients: bool
    ops: tuple[str, ...]
    inject: Inject | None
    capture_objects: tuple[Literal["cache"], ...]
    backend: str
    compiled: Literal["eager-steps", "taps"]
    step: str
    rows: Literal["last"] | Window
    log_token_ids: bool
    request_ids: tuple[str, ...] | None
    sample_rate: float
    sample_seed: int
    request_overrides: tuple[str, ...]
    delivery: bool
    capture: Captured
    store_dtype: Literal["bfloat16", "float16", "float8_e4m3fn", "int8"] | None
    on_condition: Literal["nonfinite"] | None
    max_run_bytes: int | None
    queue_bytes: int
    on_full: Literal["block", "drop"]
    block_s: float
    fsync: bool
    on_error: Literal["warn", "raise"]
    spill_dir: str | None
    backend_options: dict[str, Any] = field(default_factory=dict, hash=False)
    # Names of the options whose value may be shown; a backend's schema marks the others writeOnly.
    public_options: frozenset[str] = field(default=frozenset(), compare=False)

    def __repr__(self) -> str:
        return f"Config({json.dumps(self.to_json(redact=True))})"

    def to_json(self, redact: bool) -> dict[str, Any]:
        """The configuration as JSON data with every key; without ``redact`` it loads back to an equal one.

        With ``redact``, every secret is replaced: credentials in URLs, and all backend options save
        those that the backend's schema declares public.
        """
        document: dict[str, Any] = {}
        for item in fields(self):
            if item.name not in ("backend_options", "public_options"):
                value = getattr(self, item.name)
                if isinstance(value, Window):
                    value = value.to_json()
                if isinstance(value, Inject):
                    value = value.to_json(redact)
                document[item.name] = list(value) if isinstance(value, tuple) else value
        options = json.loads(json.dumps(self.backend_options))
        if redact:
            document["output_dir"] = redact_url(self.output_dir)
            options = {key: self._redacted(key, value) for key, value in options.items()}
        if options:
            document["backend"] = {"name": self.backend, **options}
        return document

    @property
    def cuts_rows(self) -> bool:
        """Whether rows of tensors are left out, which takes knowing whose they are."""
        chosen = self.request_ids is not None or self.sample_rate < 1
        return chosen or self.rows != Window()

    @property
    def last_only(self) -> bool:
        """Whether only the last row of each request in a step is kept."""
        return self.rows == "last"

    @property
    def window(self) -> Window:
        """Which positions of a request are kept."""
        return self.rows if isinstance(self.rows, Window) else Window()

    @property
    def keeps_token_ids(self) -> bool:
        """Whether the requests' token ids are stored."""
        return self.log_token_ids and self.capture in ("tensor", "both")

    @property
    def requests_ask(self) -> bool:
        """Whether a request may ask to be captured."""
        return bool(self.request_overrides) or self.delivery

    @property
    def selects_all(self) -> bool:
        """Whether every step is to be captured."""
        return self.enabled and not self._steps

    def selects_step(self, step: int) -> bool:
        """Whether step ``step`` (0-based) is to be captured."""
        return self.enabled and (not self._steps or step in self._steps)

    def selects_any_after(self, step: int) -> bool:
        """Whether any step later than ``step`` (0-based) is to be captured."""
        return self.enabled and (not self._steps or max(self._steps) > step)

    @cached_property
    def _steps(self) -> frozenset[int]:
        return frozenset(self.log_step_ids)

    def _redacted(self, key: str, value: Any) -> Any:
        if key not in self.public_options or isinstance(value, (dict, list)):
            return dict.fromkeys(value, REDACTED) if isinstance(value, dict) else REDACTED
        return redact_url(value) if isinstance(value, str) else value


def load_config(value: Config | Mapping[str, Any] | str | None = None, **keys: Any) -> Config:
    """The configuration of a JSON text, a mapping or another configuration, with ``keys`` over it.

    Strings are read as JSON where the schema asks for something else, as they come from command
    lines. Raises ConfigError with the first problem; `check_config` lists them all.
    """
    config, found = check_config(value, **keys)
    if config is None:
        raise found[0]
    return config


def given_keys(value: Config | Mapping[str, Any] | str | None = None, **keys: Any) -> frozenset[str]:
    """The keys that somebody has given, of what `load_config` takes. Raises ConfigError for what is none."""
    return frozenset({**_as_mapping(value), **keys})


def load_config_file(path: str | os.PathLike[str]) -> Config:
    """The configuration in a JSON file. Raises ConfigError when it cannot be read or is not valid."""
    return load_config(read_config_file(path))


def read_config_file(path: str | os.PathLike[str]) -> str:
    """The text of a configuration file. Raises ConfigError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            "$", f"the configuration file {os.fspath(path)!r} cannot be read: {reason}."
        ) from None
    except ValueError:
        raise ConfigError("$", f"the configuration file {os.fspath(path)!r} is not UTF-8 text.") from None


def check_config(
    value: Config | Mapping[str, Any] | str | None = None, **keys: Any
) -> tuple[Config | None, list[ConfigError]]:
    """The configuration and no problems, or None and every problem found."""
    import tlcore_schemas

    schema = tlcore_schemas.load("config.v1")
    known = schema["properties"]
    try:
        given = {**_as_mapping(value), **keys}
        found = [_unknown(key, schema) for key in given if key not in known]
        document = coerce(_plain({key: item for key, item in given.items() if key in known}), schema)
    except ConfigError as error:
        return None, [error]
    found += problems(document, schema, hidden={"backend"})
    sound = {key: entry["default"] for key, entry in known.items()}
    sound |= {key: item for key, item in document.items() if not _concerns(key, found)}
    found += _two_places(document)
    found += _bad_patterns("module_call_match", sound["module_call_match"], parse_pattern)
    found += _bad_patterns("ops", sound["ops"], parse_pattern)
    found += _bad_patterns("request_ids", sound["request_ids"], check_regex)
    found += _bad_rows(sound)
    found += _alone(sound)
    if isinstance(sound["inject"], dict):
        found += _bad_patterns("inject.modules", sound["inject"]["modules"], parse_pattern)
    try:
        config = _normal_form(sound, found)
    except ConfigError as error:
        found.append(error)
    return (None, found) if found else (config, [])


def _as_mapping(value: Config | Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    if value is None:
        return {}
    if isinstance(value, Config):
        return value.to_json(redact=False)
    document = parse_json(value) if isinstance(value, str) else value
    if not isinstance(document, Mapping):
        raise ConfigError("$", 'the configuration must be a JSON object, such as {"enabled": true}.')
    return document


def _plain(document: dict[str, Any]) -> Any:
    try:
        return plain(document)
    except ConfigError as error:
        if error.path != "$.backend":
            raise
        hint = "Give a name, an import path pkg.mod:Sink, or an object with a name and options."
        raise ConfigError(error.path, error.problem, hint) from None


def _unknown(key: Any, schema: Mapping[str, Any]) -> ConfigError:
    if not isinstance(key, str):
        return ConfigError("$", f"keys must be strings, not {type(key).__name__}.")
    return unknown_key((), key, list(schema["properties"]))


def _concerns(key: str, found: list[ConfigError]) -> bool:
    return any(re.match(re.escape(f"$.{key}") + r"(?![A-Za-z0-9_])", error.path) for error in found)


def _bad_patterns(
    key: str, patterns: str | list[str] | None, check: Callable[[str, str], object]
) -> list[ConfigError]:
    found = []
    for i, text in enumerate([patterns] if isinstance(patterns, str) else patterns or []):
        try:
            check(text, f"$.{key}" + ("" if isinstance(patterns, str) else f"[{i}]"))
        except ConfigError as error:
            found.append(error)
    return found


def _bad_rows(document: dict[str, Any]) -> list[ConfigError]:
    """Put the window that ``rows`` means in its place; the problem of one that holds nothing."""
    if document["rows"] == "last":
        return []
    try:
        document["rows"] = window_of(document["rows"])
    except ValueError as error:
        document["rows"] = Window()
        return [ConfigError("$.rows", f"{error}.")]
    return []


def _alone(document: Mapping[str, Any]) -> list[ConfigError]:
    """The problems of what takes eager steps, or does not go together."""
    problems, hint = [], "Leave one of the two out."
    if document["delivery"] and document["capture"] not in ("tensor", "both"):
        problem = f'of "capture": "{document["capture"]}" there are no tensors to fetch.'
        problems.append(ConfigError("$.delivery", problem, hint))
    if document["ops"] and document["compiled"] == "taps":
        problem = 'operators can be captured in eager steps only, not with "compiled": "taps".'
        problems.append(ConfigError("$.ops", problem, hint))
    if document["inject"] is not None and document["compiled"] == "taps":
        problem = 'results can be injected in eager steps only, not with "compiled": "taps".'
        problems.append(ConfigError("$.inject", problem, hint))
    return problems


def _normal_form(document: dict[str, Any], found: list[ConfigError]) -> Config:
    """The object for a sound document; problems of the backend and its place are added to ``found``."""
    given = document["backend"]
    options = dict(given) if isinstance(given, dict) else {"name": given}
    name = options.pop("name")
    backend = resolve(name)
    if backend.options_schema is not None:
        options = coerce(options, backend.options_schema)
        found += problems(options, backend.options_schema, ("backend",), hidden=None)
    output_dir = document["output_dir"]
    if backend.origin == "built-in" and not _concerns("backend", found):
        try:
            backend, options, output_dir = _normal_place(backend, options, output_dir)
        except ConfigError as error:
            found.append(error)
    if document["spill_dir"] is not None and backend.origin != "built-in":
        problem = f"only the built-in backends can spill, and {name!r} is none of them."
        found.append(ConfigError("$.spill_dir", problem, "Leave the key out."))
    return Config(
        **{
            **document,
            "output_dir": output_dir,
            "module_call_match": _tuple(document["module_call_match"]),
            "ops": tuple(document["ops"]),
            "inject": _inject(document["inject"]),
            "request_ids": _tuple(document["request_ids"]),
            "request_overrides": tuple(document["request_overrides"]),
            "log_step_ids": tuple(document["log_step_ids"]),
            "device_names": tuple(document["device_names"]),
            "capture_objects": tuple(document["capture_objects"]),
            "backend": backend.name,
            "backend_options": options,
            "public_options": _public(backend),
        }
    )


def _normal_place(
    backend: NamedBackend, options: dict[str, Any], output_dir: str
) -> tuple[NamedBackend, dict[str, Any], str]:
    """The one form of the three spellings of object storage; a local place is left as it is.

    That form is the backend ``fsspec`` with its ``format``, and the URL in ``output_dir``.
    """
    options = dict(options)
    place = "url" if "url" in options else None
    if backend.name == "fsspec":
        output_dir = options.pop("url", output_dir)
    elif is_url(output_dir):
        options = {"format": backend.name, **options}
        backend = resolve("fsspec")
    else:
        return backend, options, output_dir
    path = "$.backend.url" if place else "$.output_dir"
    if not is_url(output_dir):
        problem = f"{output_dir!r} is no URL, and the backend fsspec writes to one (s3://bucket/prefix)."
        raise ConfigError(path, problem, 'For a local directory the backend is "pt" or "safetensors".')
    output_dir = output_dir.rstrip("/")
    if not is_url(output_dir):
        raise ConfigError(path, f"{output_dir + '//'!r} names no bucket or directory.")
    options.setdefault("format", "pt")
    return backend, options, output_dir


def _two_places(document: Mapping[str, Any]) -> list[ConfigError]:
    """The problem of a document that says twice, and differently, where a run goes."""
    backend = document.get("backend")
    if not isinstance(backend, dict) or backend.get("name") != "fsspec":
        return []
    given = [document.get("output_dir"), backend.get("url")]
    places = {place.rstrip("/") for place in given if isinstance(place, str)}
    if len(places) < 2:
        return []
    problem = "the URL and $.output_dir name different places."
    return [ConfigError("$.backend.url", problem, "Leave one of them out.")]


def _tuple(patterns: str | list[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _inject(given: Mapping[str, Any] | None) -> Inject | None:
    return None if given is None else Inject(given["run"], tuple(given["modules"]), given.get("serve", False))


def _public(backend: NamedBackend) -> frozenset[str]:
    declared = (backend.options_schema or {}).get("properties", {})
    return frozenset(
        key for key, entry in declared.items() if isinstance(entry, dict) and not entry.get("writeOnly")
    )
