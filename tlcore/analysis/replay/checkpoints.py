"""A checkpoint that transformers loads, perhaps with an adapter, as the class that a run was captured of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

_DEFAULT = "AutoModelForCausalLM"
ADAPTER = "adapter_config.json"


def pretrained(checkpoint: str, of: str | None, arguments: Mapping[str, Any]) -> nn.Module:
    """The model in a checkpoint, as the class ``of`` that a run names; ``arguments`` go to transformers.

    A directory of peft's adapter gives the model that this is of, with it. Raises what transformers and peft
    raise.
    """
    base = base_of(checkpoint)
    if base is not None:
        import peft

        model = pretrained(base[0], base[1], arguments)
        adapted: nn.Module = peft.PeftModel.from_pretrained(model, checkpoint)
        return adapted
    import transformers

    kind = class_name(checkpoint, of, bool(arguments.get("trust_remote_code")))
    loaded: nn.Module = getattr(transformers, kind).from_pretrained(checkpoint, **arguments)
    return loaded


def base_of(checkpoint: str) -> tuple[str, str | None] | None:
    """Of which checkpoint a directory has an adapter, and of which class if it says; None for any other.

    Raises ValueError for an adapter that does not say.
    """
    file = os.path.join(checkpoint, ADAPTER)
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as opened:
        told = json.load(opened)
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{file} has no base_model_name_or_path, the checkpoint that the adapter is of")
    kind = (told.get("auto_mapping") or {}).get("base_model_class")
    return base, kind if isinstance(kind, str) else None


def loading_code(checkpoint: str, of: str | None) -> list[str]:
    """Lines of Python by which `pretrained` loads a checkpoint as ``model``."""
    base = base_of(checkpoint)
    kind = class_name(checkpoint if base is None else base[0], of if base is None else base[1])
    lines = [f"from transformers import {kind}\n"]
    whole = os.path.abspath(checkpoint) if base is None else base[0]
    lines += [f"path = {whole!r}", f'model = {kind}.from_pretrained(path, dtype="auto")']
    if base is not None:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained(model, {os.path.abspath(checkpoint)!r})")
    return lines


def class_name(checkpoint: str, of: str | None, remote_code: bool = False) -> str:
    """Which class of transformers loads a checkpoint as the run's model, else as its configuration says.

    A class that is for another kind of model than the checkpoint's is not taken.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=remote_code)
    wanted = (of or "").rpartition(".")[2]
    own = getattr(config, "auto_map", None) if remote_code else None
    automatic = [key for key in own or {} if key.startswith("AutoModel") and hasattr(transformers, key)]
    same = [key for key in automatic if str((own or {})[key]).rpartition(".")[2] == wanted]
    if automatic:
        return str((same or [key for key in automatic if key == _DEFAULT] or automatic)[0])
    for name in (wanted, *(config.architectures or ())):
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and getattr(found, "config_class", None) is type(config):
            return str(name)
    return _DEFAULT
