"""Which tensors of a tensor-parallel model are only a rank's part, told from the types of its layers.

A part is described by ``dim`` (the dimension along which the ranks' parts are joined; negative ones
count from the end), ``parts`` (the sizes along it of what is joined separately, such as a merged gate
and up projection; without it the whole), ``copies`` (for each of the parts how many ranks in a row hold
the same) or, instead of all these, by ``sum`` where the ranks' tensors are to be added (with ``or_whole``
unless they are equal), or by ``unknown``, the reason why they cannot be joined.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ....record import Json
from ..module_names import plain_modules, without_adapters
from .expert_sharding import SUM, SUM_OR_WHOLE, expert_parts

_FIRST_OUTPUT = ("", "0")
# The class of norms that gather what the other ranks have, in transformers' code.
_OF_ALL_RANKS = "TPAwareNormMixin"
# As children of what attends.
_QUERY_NORMS, _KEY_NORMS = ("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")
_ACTIVATIONS = (
    "vllm.model_executor.layers.activation", "torch.nn.modules.activation", "transformers.activations"
)  # fmt: skip


def sharding_of(model: nn.Module, rank: int, size: int) -> Json | None:
    """What ``step.json`` says of a rank's sharded tensors; None where there are none.

    ``tensors`` maps a module's name to ``inputs`` and ``outputs``, and these a tensor's position or
    keyword (empty for a result that is a tensor, ``*`` for any) to the description of its part.
    """
    modules = {"": model, **plain_modules(model)}
    experts = expert_parts(modules)
    if size == 1:
        return {"tp_rank": rank, "tp_size": size, "tensors": experts} if experts else None
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    found: dict[str, Json] = {}
    for name, whole in modules.items():
        module = without_adapters(whole)
        described: Json = {}
        if isinstance(module, ColumnParallelLinear):
            described = _column(module)
        elif isinstance(module, RowParallelLinear):
            described = _row(module)
        elif isinstance(module, VocabParallelEmbedding):
            described = _embedding(module)
        elif isinstance(module, Attention):
            described = _attention(model, name, module, size)
        elif isinstance(module, MLAAttention):
            described = _latent_attention(model, module, size)
        elif any(map(_leaves_the_sum, module.children())):
            described = {"outputs": {"": SUM_OR_WHOLE}}
        if described:
            found[name] = described
    for name, whole in modules.items():
        # What a parent knows of its children goes before what their types alone tell.
        found |= _between(whole, name) | _states(whole, name)
    return {"tp_rank": rank, "tp_size": size, "tensors": found | experts}


def _column(layer: Any) -> Json:
    if layer.tp_size == 1 or layer.gather_output:
        return {}
    parts = [int(each) for each in layer.output_partition_sizes]
    part: Json = {"dim": -1}
    if len(parts) > 1:
        part["parts"] = parts
    copies = int(getattr(layer, "num_kv_head_replicas", 1))
    if copies > 1:
        # Query, key, value; with further parts their owners are not known here.
        part["copies"] = [1, copies, copies] if len(parts) == 3 else None
    return {"outputs": dict.fromkeys(_FIRST_OUTPUT, part)}


def _row(layer: Any) -> Json:
    if layer.tp_size == 1:
        return {}
    described: Json = {}
    if layer.input_is_parallel:
        described["inputs"] = {key: {"dim": -1} for key in ("0", "input_")}
    if not layer.reduce_results:
        described["outputs"] = dict.fromkeys(_FIRST_OUTPUT, SUM)
    return described


def _leaves_the_sum(child: nn.Module) -> bool:
    """Whether a module's last layer leaves adding up to the module, or to what comes after it."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    layer = without_adapters(child)
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and not layer.reduce_results


def _embedding(layer: Any) -> Json:
    """Each rank looks up its own part of the vocabulary, and the results are added."""
    if layer.tp_size == 1 or getattr(layer, "reduce_results", True):
        return {}
    return {"outputs": {"": SUM}}


def _attention(model: Any, name: str, layer: Any, size: int) -> Json:
    """A rank has its own heads; key and value heads fewer than ranks are held by several."""
    projection = _qkv(_parent(model, name))
    if projection is not None:
        query, key = _heads(1), _heads(projection.num_kv_head_replicas)
    else:
        heads = _text_config(model, "num_attention_heads")
        query = _held(int(layer.num_heads), heads, size)
        key = _held(int(layer.num_kv_heads), _text_config(model, "num_key_value_heads") or heads, size)
    inputs = {"0": query, "query": query, "1": key, "key": key, "2": key, "value": key}
    return {"inputs": inputs, "outputs": {"": query}}


def _latent_attention(model: Any, layer: Any, size: int) -> Json:
    """A rank has its own heads of queries and results; all have the one latent key and value."""
    if _text_config(model, "num_attention_heads") != int(layer.num_heads) * size:
        return {}
    return {"inputs": {"0": _heads(1), "q": _heads(1)}, "outputs": {"": {"dim": -1}}}


def _text_config(model: Any, key: str) -> Any:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, key, None)


def _held(own: int, heads: Any, size: int) -> Json:
    """What a rank has that holds so many ``own`` ones of a model's heads, whatever projects them."""
    if heads == own * size:
        return _heads(1)
    if heads == own:
        return _heads(size)
    if own == 1 and type(heads) is int and heads and size % heads == 0:
        return _heads(size // heads)
    return {"unknown": "which heads of the model a rank has is not known"}


def _between(parent: nn.Module, name: str) -> dict[str, Json]:
    """What lies between a column- and a row-parallel layer of one parent, and works on the ranks' parts."""
    children = {child: without_adapters(module) for child, module in parent.named_children()}
    projection = _qkv(parent)
    prefix = f"{name}." if name else ""
    found: dict[str, Json] = {}
    for child, module in children.items():
        described = _rotary(parent, module, projection)
        if projection is None and not described:
            described = _activation(module, children)
        if projection is not None and child in (*_QUERY_NORMS, *_KEY_NORMS):
            described = _head_norm(module, projection, child)
        if described:
            found[prefix + child] = described
    return found


def _states(parent: Any, name: str) -> dict[str, Json]:
    """Mamba 2: of each rank's gate, input, B, C and time steps, which its projection puts together.

    All ranks hold the same B and C where there is but one group of them.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    if not isinstance(parent, MambaMixer2) or parent.tp_size == 1:
        return {}
    sizes = [parent.intermediate_size] * 2 + [parent.groups_ssm_state_size] * 2 + [parent.num_heads]
    projected: Json = {"dim": -1, "parts": [int(size) // parent.tp_size for size in sizes]}
    if type(without_adapters(parent.in_proj)) is ColumnParallelLinear:
        projected["copies"] = [1, 1, parent.tp_size, parent.tp_size, 1]
    own: Json = {"dim": -1}
    inputs = dict.fromkeys(("0", "x", "1", "gate"), own)
    return {
        f"{name}.in_proj": {"outputs": dict.fromkeys(_FIRST_OUTPUT, projected)},
        f"{name}.norm": {"inputs": inputs, "outputs": {"": own}},
    }


def _rotary(parent: nn.Module, module: nn.Module, projection: Any) -> Json:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    if not isinstance(module, RotaryEmbeddingBase):
        return {}
    query = _heads(1)
    if projection is None:
        # All ranks have the one latent key.
        inputs = {"1": query, "query": query}
        return {"inputs": inputs, "outputs": {"0": query}} if _is_latent(parent) else {}
    key = _heads(projection.num_kv_head_replicas)
    inputs = {"1": query, "query": query, "2": key, "key": key}
    return {"inputs": inputs, "outputs": {"0": query, "1": key}}


def _head_norm(module: Any, projection: Any, child: str) -> Json:
    """A norm of each head (..., heads, head size), or over all heads, of which each rank has its own.

    One that is given all ranks' heads is not told apart from others.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return {}
    part: Json = {"dim": -2}
    if weight.shape[-1] != projection.head_size:
        if all(each.__name__ != _OF_ALL_RANKS for each in type(module).__mro__):
            return {}
        part = {"dim": -1}
    if child in _KEY_NORMS and projection.num_kv_head_replicas > 1:
        part["copies"] = [projection.num_kv_head_replicas]
    return {"inputs": {"0": part, "x": part}, "outputs": {"": part}}


def _activation(module: nn.Module, siblings: dict[str, nn.Module]) -> Json:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    before = [each for each in siblings.values() if isinstance(each, ColumnParallelLinear)]
    after = [each for each in siblings.values() if isinstance(each, RowParallelLinear)]
    if len(before) != 1 or len(after) != 1 or not _is_activation(module):
        return {}
    column: Any = before[0]
    if column.tp_size == 1 or column.gather_output or not getattr(after[0], "input_is_parallel", False):
        return {}
    inside = _column(column)["outputs"]["0"]
    return {"inputs": {"0": inside, "x": inside}, "outputs": {"": {"dim": -1}}}


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith(_ACTIVATIONS)


def _heads(copies: int) -> Json:
    return {"dim": 1} if copies == 1 else {"dim": 1, "copies": [copies]}


def _qkv(parent: nn.Module) -> Any:
    """The query, key and value projection among a module's children."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    layers = map(without_adapters, parent.children())
    found = [each for each in layers if isinstance(each, QKVParallelLinear) and each.tp_size > 1]
    return found[0] if len(found) == 1 else None


def _is_latent(parent: nn.Module) -> bool:
    """Whether a module attends by latent keys and values, with its own of the heads of queries."""
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    split = [
        each for each in map(without_adapters, parent.children()) if isinstance(each, ColumnParallelLinear)
    ]
    return any(each.tp_size > 1 for each in split) and any(
        isinstance(each, MLAAttention) for each in parent.modules()
    )


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
