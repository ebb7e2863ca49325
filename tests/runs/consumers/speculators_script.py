"""Trains a draft model of speculators on an export, in a plain loop. Runs where speculators is installed.

``python speculators_script.py DIRECTORY HIDDEN LAYERS`` prints a JSON line: how many samples, and the losses.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(directory: str, hidden: int, layers: int) -> dict[str, Any]:
    """Read with the package's own data set and collate function, and take steps on the CPU."""
    import torch
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.losses.utils import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.models.eagle3.data import shift_batch
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from speculators.train.data import ArrowDataset, CollateFn
    from transformers import LlamaConfig

    torch.manual_seed(0)
    data = ArrowDataset(64, directory, on_missing="raise", hidden_states_dtype=torch.float32)
    samples = [data[number] for number in range(len(data))]
    collate = CollateFn(64, hidden, layers - 1, torch.float32, preprocess=shift_batch)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    # The attention that it uses otherwise has no backward on a CPU.
    llama._attn_implementation = "eager"
    proposal = GreedyTokenProposalConfig(speculative_tokens=3)
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=llama,
        draft_vocab_size=64,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    model: Any = Eagle3DraftModel(config).float()
    for weight in model.parameters():
        # Those of the verified model are not there to be loaded.
        torch.nn.init.normal_(weight, std=0.1)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-2)
    losses = []
    # The others want Triton.
    loss_config = resolve_loss_config("kl_div", "eager")
    for _ in range(5):
        batch = collate(samples[:4])
        loss = model(**batch, loss_config=loss_config)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    first = samples[0]
    return {
        "samples": len(samples),
        "losses": losses,
        "shape": list(first["hidden_states"].shape),
        "loss_mask": first["loss_mask"].tolist(),
    }


if __name__ == "__main__":
    sys.stdout.write("\nREPORT " + json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))) + "\n")
