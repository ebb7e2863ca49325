"""Making the module that a call is replayed with: from its class and weights, or out of a checkpoint."""

from __future__ import annotations

import json
import sysconfig
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, ReadError
from .checkpoints import ADAPTER, base_of, loading_code, pretrained
from .given import on_each, tensors_of

# Weights up to here go into the file beside a script.
_MOST_SAVED = 256 << 20
_VERSIONS = "_metadata"


@dataclass
class Recipe:
    """How a module is made: ``module`` is ``pkg.mod:Class`` or a function, called with ``init``.

    Else ``model`` is a checkpoint that transformers loads, as the class ``of`` that the run names, of which
    the submodule ``name`` is taken. It is on the ``device`` and in the ``dtype`` that are given.
    """

    name: str
    module: str | None = None
    init: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    prefix: str | None = None
    model: str | None = None
    of: str | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    made: nn.Module | None = field(default=None, repr=False)

    def make(self) -> nn.Module:
        """The module, in evaluation mode.

        Raises ConfigError for a name that leads nowhere, ReadError for weights that do not fit or cannot be
        read.
        """
        if self.model is not None:
            self.made = _submodule(_pretrained(self.model, self.of), self.name, self.model)
        else:
            self.made = _constructed(self.module or "", self.init)
            if self.weights is not None:
                _load(
                    self.made, _state(Path(self.weights)), self.name if self.prefix is None else self.prefix
                )
        self.made.to(device=self.device, dtype=self.dtype).eval()
        return self.made

    def saved(self) -> dict[str, Any]:
        """What the code of `code` reads beside the arguments."""
        weights = self._weights()
        return {} if weights is None else {"weights": weights}

    def _weights(self) -> dict[str, Any] | None:
        if self.made is None or self.model is not None:
            return None
        state = self.made.state_dict()
        for key in [key for key, each in state.items() if not _is_plain(each)]:
            del state[key]
        tensors = tensors_of(tuple(state.values())).values()
        size = sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))
        if size > _MOST_SAVED:
            text = f"its weights ({size >> 20} MiB) are too large for a file beside a script"
            raise ReadError(f"{self.name}: {text}; --model names a checkpoint that has them")
        for key, each in state.items():
            state[key] = on_each(each, torch.Tensor.cpu)
        return state

    def code(self) -> str:
        """Lines of Python that make ``module`` again."""
        lines = self._making()
        if self.device is not None or self.dtype is not None:
            lines.append(f"module.to(device={self.device!r}, dtype={self.dtype!r})")
        return "\n".join([*lines, "module.eval()"])

    def _making(self) -> list[str]:
        if self.model is not None:
            return [*loading_code(self.model, self.of), f"module = model.get_submodule({self.name!r})"]
        package, _, name = (self.module or "").partition(":")
        lines = [
            *_found_again(package),
            f"from {package} import {name}\n",
            f"module = {name}(**{dict(self.init)!r})",
        ]
        if self._weights() is not None:
            lines.append('module.load_state_dict(saved["weights"], assign=True)')
        return lines


def _is_plain(value: Any) -> bool:
    """Whether a script can load it as a part of a state: a tensor, or what quantised modules have beside."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (torch.Tensor, torch.dtype, bool, int, float, str))


def _found_again(package: str) -> list[str]:
    """Lines that let a module be imported which is not installed."""
    file = getattr(import_module(package), "__file__", None)
    if file is None or "site-packages" in file:
        return []
    home = Path(file).resolve()
    for _ in package.split("."):
        home = home.parent
    home = home.parent if Path(file).name == "__init__.py" else home
    if sysconfig.get_path("stdlib") in str(home):
        return []
    return ["import sys\n", f"sys.path.insert(0, {str(home)!r})  # where {package.partition('.')[0]} lies"]


def _constructed(spec: str, init: Mapping[str, Any]) -> nn.Module:
    package, _, name = spec.partition(":")
    if not package or not name.isidentifier():
        raise ConfigError("--module", f"{spec!r} is no pkg.mod:Class.", "Such as my_model.layers:Mixer.")
    try:
        made = getattr(import_module(package), name)(**init)
    except (ImportError, AttributeError) as error:
        raise ConfigError("--module", f"{spec!r} cannot be imported: {error}") from error
    except TypeError as error:
        hint = "Give its arguments with --init, or name a function that makes it."
        raise ConfigError(
            "--module", f"{spec!r} cannot be called with {dict(init)}: {error}", hint
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError("--module", f"{spec!r} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


def _pretrained(model: str, of: str | None) -> nn.Module:
    if not Path(model).is_dir():
        # Transformers would look for it in the network, for a long time.
        raise ConfigError("--model", f"{model!r} is no directory.", "Give that of a checkpoint.")
    try:
        base = base_of(model)
        if base is not None and not Path(base[0]).is_dir():
            problem = f"{model!r} is an adapter of {base[0]!r}, which is no directory."
            raise ConfigError("--model", problem, f"Name it in base_model_name_or_path of {ADAPTER}.")
        # Also refused when transformers finds nothing there, by whichever error.
        return pretrained(model, of, {"dtype": "auto"})
    except ImportError as error:
        package = str(error.name or "transformers").partition(".")[0]
        raise ConfigError("--model", f"{package} is not installed", f"pip install {package}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            "--model", f"{model!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error


def _submodule(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError("--model", f"{where!r} has no module {name!r}: {error}") from error


def _state(path: Path) -> OrderedDict[str, Any]:
    """The weights of a file, or of all safetensors files of a checkpoint; torch's have modules' versions."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ReadError(f"{path}: there is no .safetensors file in it")
    found: OrderedDict[str, Any] = OrderedDict()
    for file in files:
        try:
            state = _read(file)
            found.update(state)
            _keep_versions(found, getattr(state, _VERSIONS, None))
        except Exception as error:
            raise ReadError(f"{file}: no weights can be read from it: {error}") from error
    return found


def _keep_versions(state: OrderedDict[str, Any], versions: Any, begin: str = "") -> None:
    """Let a state dict have the versions of the modules below a name, by which these know how to load it."""
    if isinstance(versions, Mapping):
        within = {
            f"{key}."[len(begin) :].rstrip("."): each
            for key, each in versions.items()
            if f"{key}.".startswith(begin)
        }
        setattr(state, _VERSIONS, within)


def _read(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ReadError(f"it holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _load(module: nn.Module, state: OrderedDict[str, Any], prefix: str) -> None:
    begin = f"{prefix.rstrip('.')}." if prefix else ""
    wanted = OrderedDict((key[len(begin) :], each) for key, each in state.items() if key.startswith(begin))
    _keep_versions(wanted, getattr(state, _VERSIONS, None), begin)
    try:
        # In the dtype of the weights, as in the model that had them.
        module.load_state_dict(wanted or state, assign=True)
    except Exception as error:
        # Modules with a state of their own kind raise what they like.
        said = " ".join(str(error).split())[:400]
        raise ReadError(f"the weights do not fit {type(module).__name__}: {said}") from error


def init_of(text: str) -> dict[str, Any]:
    """Keyword arguments from JSON text. Raises ConfigError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("--init", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--init", 'must be a JSON object, such as {"size": 8}')
    return value
