"""Nemotron Puzzle configurations in the published shape: a toy, and one of the 75B's size.

The 75B's per-layer list is not public. Published are its ranges (MoE width 1280–2688, 4–18 experts per token, 40 such
layers), its constants and Super's layer order, from which it was cut; the list here is made up within them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUPER = Path(__file__).resolve().parents[2] / "model_configs" / "published" / "nemotron-3-super-120b-a12b-fp8.json"
KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
# NVIDIA's class takes these from the blocks and leaves them out of the model's own keys.
PER_LAYER = ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "moe_intermediate_size", "num_experts_per_tok")
# Width and experts per token, in turn; the widths' mean is that of a 75B.
SIZES_75B = [
    (1280, 4),
    (1536, 8),
    (1280, 6),
    (2048, 12),
    (1280, 4),
    (1536, 8),
    (1280, 10),
    (2688, 18),
    (1280, 6),
    (1792, 8),
]


def puzzle(pattern: str, sizes: list[tuple[int, int]], experts: int, latent: int, shared: int) -> dict[str, Any]:
    """`nemotron_h_puzzle` over Super's other keys; its MoE layers take `sizes` in turn."""
    own = {key: value for key, value in json.loads(SUPER.read_text()).items() if key not in PER_LAYER}
    constants = {
        "n_routed_experts": experts,
        "moe_shared_expert_intermediate_size": shared,
        "moe_latent_size": latent,
    }

    def block(symbol: str, width: int, top: int) -> dict[str, Any]:
        sizes = {"moe_intermediate_size": width, "num_experts_per_tok": top} if symbol == "E" else {}
        return {"block_type": KINDS[symbol]} | (constants | sizes if symbol == "E" else {})

    blocks, count = [], 0
    for symbol in pattern:
        blocks.append(block(symbol, *sizes[count % len(sizes)]))
        count += symbol == "E"
    return own | {
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "model_type": "nemotron_h_puzzle",
        "auto_map": {"AutoConfig": "configuration_nemotron_h_puzzle.NemotronHPuzzleConfig"},
        "num_hidden_layers": len(pattern),
        "block_configs": blocks,
        "mtp_block_configs": [{"block_type": "attention"}, block("E", 2688, min(22, experts))],
        "mtp_n_routed_experts": experts,
        "ssm_state_size": 96,
    }


def puzzle_75b() -> dict[str, Any]:
    pattern = json.loads(SUPER.read_text())["hybrid_override_pattern"]
    return puzzle(pattern, SIZES_75B, experts=512, latent=1024, shared=5376)


def toy() -> dict[str, Any]:
    """Every kind of layer, three sizes of experts, one sliding window."""
    small = {
        "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "intermediate_size": 48, "ssm_state_size": 32,
        "max_position_embeddings": 512,
    }  # fmt: skip
    config = puzzle("ME*EM-*E", [(32, 2), (48, 3), (32, 4)], experts=8, latent=32, shared=40) | small
    config["block_configs"][5]["intermediate_size"] = 96
    config["block_configs"][6]["sliding_window"] = 24
    return config
