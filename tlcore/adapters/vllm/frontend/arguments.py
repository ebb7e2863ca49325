"""The flags and keyword arguments: what is patched in ``vllm.engine.arg_utils``."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ....config.configuration import read_config_file
from ....errors import ConfigError, TlcoreError
from ....layout.jsontext import parse_json
from ..carrier import KEY, GivenConfig, carried, is_carrier
from ..reports import share_directory
from . import check as frontend
from . import requests
from .shutdown import give_workers_time

PATH_KEY = f"{KEY}_path"
_MARK = "__tlcore__"
_HELP = (
    "Capture intermediate tensors as this JSON object says, for instance "
    '\'{"enabled": true, "module_call_match": "layers\\\\.0\\\\."}\'.'
)


def patch_arguments(module: ModuleType) -> None:
    """Teach ``EngineArgs`` and ``AsyncEngineArgs`` the configuration. Safe to repeat."""
    base = module.EngineArgs
    if hasattr(base, _MARK):
        return
    setattr(base, _MARK, True)
    base.add_cli_args = staticmethod(_with_flags(base.add_cli_args))
    base.from_cli_args = classmethod(_from_arguments(base.from_cli_args.__func__))
    base.create_engine_config = _checked_config(base.create_engine_config)
    for cls in (base, module.AsyncEngineArgs):
        cls.__init__ = _with_keywords(cls.__init__)


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> Any:
        parser = original(parser)
        group = parser.add_argument_group("IntermediateLogConfig", "Capture of intermediate tensors.")
        group.add_argument("--intermediate-log-config", type=_given, default=None, metavar="JSON", help=_HELP)
        group.add_argument(
            "--intermediate-log-config-path",
            type=_given_path,
            default=None,
            metavar="FILE",
            help="A JSON file with the value of --intermediate-log-config.",
        )
        _check_in_additional_config(parser)
        return parser

    return add_cli_args


def _given(text: str) -> GivenConfig:
    try:
        frontend.check(text)
    except TlcoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return GivenConfig(parse_json(text))


def _given_path(path: str) -> str:
    try:
        frontend.check(read_config_file(path))
    except TlcoreError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    return path


def _check_in_additional_config(parser: argparse.ArgumentParser) -> None:
    """Check a configuration inside ``--additional-config`` too, and keep its secrets out of the log."""
    for action in parser._actions:
        if action.dest == "additional_config" and callable(action.type):
            action.type = _checking(action.type)


def _checking(read: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(read)
    def parse(text: str) -> Any:
        value = read(text)
        given = value.get(KEY) if isinstance(value, dict) else None
        if given is not None and not is_carrier(given):
            value[KEY] = _given(given if isinstance(given, str) else json.dumps(given))
        return value

    return parse


def _from_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        given = getattr(args, KEY, None)
        path = getattr(args, PATH_KEY, None)
        try:
            copy = argparse.Namespace(**vars(args))
            copy.additional_config = _merged(getattr(args, "additional_config", None), given, path)
            return original(cls, copy)
        except TlcoreError as error:
            # A command line is answered as argparse does, not with a traceback.
            sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: --intermediate-log-config: {error}\n")
            raise SystemExit(2) from None

    return from_cli_args


def _with_keywords(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given, path = kwargs.pop(KEY, None), kwargs.pop(PATH_KEY, None)
        additional = _merged(kwargs.get("additional_config"), given, path)
        if additional:
            kwargs["additional_config"] = frontend.prepare(additional)
        original(self, *args, **kwargs)

    return init


def _merged(additional: Mapping[str, Any] | None, given: Any, path: str | None) -> dict[str, Any]:
    """``additional_config`` with the configuration in it, wherever it was given."""
    merged = dict(additional or {})
    if path is not None:
        if given is not None:
            problem = "both --intermediate-log-config and --intermediate-log-config-path are given."
            raise ConfigError("$", problem, "Give one of them.")
        given = read_config_file(path)
    if given is not None:
        if KEY in merged and not is_carrier(merged[KEY]):
            problem = f"both --intermediate-log-config and {KEY} in additional_config are given."
            raise ConfigError("$", problem, "Give one of them.")
        value = parse_json(given) if isinstance(given, str) else given
        merged[KEY] = GivenConfig(value) if isinstance(value, Mapping) else value
    return merged


def _checked_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        # An instance built before the plugin was loaded has not been prepared yet.
        if self.additional_config:
            self.additional_config = frontend.prepare(self.additional_config)
            usage = kwargs.get("usage_context", args[0] if args else None)
            frontend.check_served(self.additional_config, usage)
        # A capture may be asked for later, of workers that are running by then.
        share_directory()
        if frontend.serves_endpoint():
            give_workers_time()
        vllm_config = original(self, *args, **kwargs)
        frontend.check_engine_config(vllm_config)
        requests.remember(carried(vllm_config.additional_config))
        return vllm_config

    return create_engine_config
