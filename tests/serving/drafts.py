"""A small EAGLE-3 draft head for a target checkpoint, in the shape of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from checkpoints import BASE
from safetensors.torch import save_file
from vllm_puzzle.serving.reference_model import ReferenceModel

DRAFT_VOCABULARY = 60


def write_draft(folder: Path, target: ReferenceModel, layers: list[int]) -> Path:
    """Write a draft that sees the target's hidden states at `layers`; the last one is the target's final state.

    It passes that state on, nearly unchanged, to the target's own norm and a part of its output matrix. So it guesses
    the target's last token again, which is right now and then: some drafts are accepted, most are not.
    """
    hidden, width, heads, head_dim = target.record.hidden_size, 96, BASE["num_attention_heads"], BASE["head_dim"]
    generator = torch.Generator().manual_seed(5)

    def small(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    theirs = target.named_tensors()
    vocabulary = target.record.vocab_size
    ids = torch.randperm(vocabulary, generator=generator)[:DRAFT_VOCABULARY].sort().values
    tensors = {
        "fc.weight": torch.cat([torch.zeros(hidden, (len(layers) - 1) * hidden), torch.eye(hidden)], dim=1),
        "norm.weight": theirs["model.norm.weight"].detach().clone(),
        "lm_head.weight": theirs["lm_head.weight"].detach()[ids],
        "d2t": ids - torch.arange(DRAFT_VOCABULARY),  # draft id → distance to the target's id
        "t2d": torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True),
    }
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = torch.ones(hidden)
    rows = {"q": heads * head_dim, "k": 2 * head_dim, "v": 2 * head_dim}
    tensors |= {f"midlayer.self_attn.{name}_proj.weight": small(size, 2 * hidden) for name, size in rows.items()}
    tensors["midlayer.self_attn.o_proj.weight"] = small(hidden, heads * head_dim)
    tensors |= {f"midlayer.mlp.{name}_proj.weight": small(width, hidden) for name in ("gate", "up")}
    tensors["midlayer.mlp.down_proj.weight"] = small(hidden, width)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = BASE | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "intermediate_size": width,
        "draft_vocab_size": DRAFT_VOCABULARY,
        "eagle_aux_hidden_state_layer_ids": layers,
        "num_aux_hidden_states": len(layers),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
