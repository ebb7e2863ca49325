"""Which tensors of a mixture of experts are a rank's part: a share of each expert, or some experts whole.

Either way a rank computes its own part of a sum over all chosen experts, of every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ....record import Json

_HOME = "vllm.model_executor.layers.fused_moe"
SUM: Json = {"sum": True}
# Where a module may add the ranks' parts up itself: equal ones are the whole.
SUM_OR_WHOLE: Json = {"sum": True, "or_whole": True}


def expert_parts(modules: Mapping[str, nn.Module]) -> dict[str, Json]:
    """The descriptions of the parts in all mixtures of experts among a model's modules, by name."""
    found: dict[str, Json] = {}
    for name, module in modules.items():
        config = getattr(module, "moe_config", None)
        if config is None or not type(module).__module__.startswith(_HOME):
            continue
        around, problem = _unknown(name, config)
        if problem is not None:
            inside = [each for each in modules if each and (not around or each.startswith(f"{around}."))]
            found |= {each: _both({"unknown": problem}) for each in inside}
        elif max(_size(config, "tp_size"), _size(config, "ep_size")) > 1:
            found |= _summed(name, module, config)
    return found


def _summed(name: str, module: nn.Module, config: Any) -> dict[str, Json]:
    """The modules in whose results the parts are not yet added up."""
    found: dict[str, Json] = {}
    method = getattr(module, "quant_method", None)
    if isinstance(method, nn.Module) and not _reduces(method):
        found[f"{name}.quant_method"] = {"outputs": {"": SUM}}
    if getattr(config, "skip_final_all_reduce", False):
        found[name] = {"outputs": {"": SUM}}
    return found


def _reduces(method: Any) -> bool:
    """Whether the kernel itself adds the ranks' parts up."""
    kernel = getattr(method, "moe_kernel", None)
    return kernel is not None and bool(kernel.output_is_reduced())


def _unknown(name: str, config: Any) -> tuple[str, str | None]:
    """Within which module it is not known of which tokens a rank's tensors are, and why; None where it is."""
    if getattr(config, "is_sequence_parallel", False):
        # The block itself is given, and gives, the tokens of its own rank.
        return name.rpartition(".")[0], "sequence parallelism splits the tokens over ranks"
    if _size(config, "dp_size") > 1:
        return name, "the experts compute tokens of several data-parallel ranks together"
    return name, None


def _size(config: Any, name: str) -> int:
    return int(getattr(config, name, 1) or 1)


def _both(part: Json) -> Json:
    return {"inputs": {"*": part}, "outputs": {"*": part}}
