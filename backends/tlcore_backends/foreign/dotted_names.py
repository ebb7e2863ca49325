"""Names of modules whose dots became underscores in a file's name: where they were is guessed."""

from __future__ import annotations

import re
from functools import lru_cache

# Names with an underscore in them, of Megatron, TransformerEngine and transformers.
_NAMES = """
word_embeddings position_embeddings embed_tokens embed_positions rotary_emb lm_head output_layer
language_model final_layernorm input_layernorm pre_mlp_layernorm pre_cross_attn_layernorm
post_attention_layernorm post_self_attn_layernorm post_mlp_layernorm pre_feedforward_layernorm
post_feedforward_layernorm layer_norm self_attention cross_attention inter_attention self_attn
core_attention flash_attention fused_attention unfused_attention linear_qkv linear_q linear_kv linear_k
linear_v linear_proj linear_q_proj linear_q_down_proj linear_q_up_proj linear_kv_down_proj
linear_kv_up_proj linear_fc1 linear_fc2 layernorm_qkv layernorm_query layernorm_mlp layernorm_linear
q_layernorm k_layernorm kv_layernorm q_norm k_norm q_proj k_proj v_proj o_proj qkv_proj out_proj gate_proj
up_proj down_proj gate_up_proj local_experts shared_experts shared_expert block_sparse_moe in_proj
"""
_KNOWN = sorted((tuple(each.split("_")) for each in re.findall(r"\w+", _NAMES)), key=len, reverse=True)
# Single words that are mostly names of their own, where no word before them is unknown.
_ALONE = re.compile(
    r"model|module|decoder|encoder|layers?|blocks?|mlp|attention|attn|experts|router|norm|embeddings?|transformer|"
    r"proj|qkv|fc[12]|query|key|value|mixer|mtp|lm|h"
)
_NUMBERED = ("layers", "blocks", "experts", "h")


@lru_cache(4096)
def dotted(name: str) -> str:
    """A module's name each of whose dots was made an underscore; one that has dots is as it is.

    Different names stay different.
    """
    words = name.split("_")
    if "." in name or "" in words:
        return name
    parts: list[str] = []
    unknown: list[str] = []
    at = 0
    while at < len(words):
        count = _count_of_known(words, at, alone=not unknown)
        if not count:
            unknown.append(words[at])
        else:
            parts += ["_".join(unknown)] * bool(unknown) + ["_".join(words[at : at + count])]
            unknown = []
        at += max(count, 1)
    return ".".join([*parts, *["_".join(unknown)] * bool(unknown)])


def _count_of_known(words: list[str], at: int, alone: bool) -> int:
    """How many words from one on are a name; 0 where that is not known."""
    for each in _KNOWN:
        if tuple(words[at : at + len(each)]) == each:
            return len(each)
    if words[at].isdecimal():
        return 1
    numbered = words[at] in _NUMBERED and words[at + 1 : at + 2] != [] and words[at + 1].isdecimal()
    return int(numbered or (alone and _ALONE.fullmatch(words[at]) is not None))
