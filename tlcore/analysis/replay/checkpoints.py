"""A checkpoint that transformers loads, as the class of model that a run was captured of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_DEFAULT = "AutoModelForCausalLM"


def pretrained(checkpoint: str, of: str | None, arguments: Mapping[str, Any]) -> nn.Module:
    """The model in a checkpoint, as the class ``of`` that a run names; ``arguments`` go to transformers.

    Raises what transformers raises.
    """
    import transformers

    kind = class_name(checkpoint, of, bool(arguments.get("trust_remote_code")))
    loaded: nn.Module = getattr(transformers, kind).from_pretrained(checkpoint, **arguments)
    return loaded


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
