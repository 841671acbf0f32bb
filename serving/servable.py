"""Which models our class serves, and what it cannot: one answer for `serve`'s early check and for vLLM's start.

Imports nothing but the records, so that `serve` can ask before vLLM is imported.
"""

from __future__ import annotations

from vllm_puzzle.model_configs.per_layer import GPT_OSS
from vllm_puzzle.model_configs.schema import Attention, ConfigError, LayerRecord, Mamba2, ModelRecord, MoE, PlainFFN
from vllm_puzzle.serving.window_attention_mode import FLAG, ON, serves_sink_tokens

OUR_ARCHITECTURES = ("AnyModel", "DeciLMForCausalLM", "GptOssPuzzleForCausalLM", "PuzzleForCausalLM")

# Those that the reference model defines, so that what vLLM computes with them is tested.
ROPE_TYPES = ("default", "llama3", "yarn")


def is_ours(record: ModelRecord) -> bool:
    """Whether our class serves the model, and not vLLM's own."""
    return record.is_heterogeneous or record.architecture in OUR_ARCHITECTURES or _has_unusual_windows(record)


def check_servable(record: ModelRecord) -> None:
    """Raise ConfigError for a block that our class cannot build, naming the layer."""
    for index, layer in enumerate(record.layers):
        for block in layer.blocks:
            check_block(block, f"layer {index}")
    if record.rope.rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"model, key `rope_type`: found {record.rope.rope_type!r}, allowed: {', '.join(ROPE_TYPES)} "
            "(the others are untested with layers that differ)"
        )
    if record.model_type in GPT_OSS and record.rope.rope_type != "yarn":
        found = record.rope.rope_type
        raise ConfigError(
            f"model, key `rope_scaling`: found rope_type {found!r}, allowed: 'yarn' with its factor (gpt-oss; "
            "gpt-oss-puzzle changes the factor, so there is no default)"
        )


def check_block(block: LayerRecord, where: str) -> None:
    """Raise ConfigError for a sub-block that vLLM 0.32 has nothing for."""
    if isinstance(block.attention, Mamba2):
        raise ConfigError(f"{where}, attention: found mamba, allowed: attention, a linear map or nothing")
    if isinstance(block.attention, Attention) and block.attention.num_sink_tokens and not serves_sink_tokens():
        raise ConfigError(
            f"{where}, attention, key `num_sink_tokens`: found {block.attention.num_sink_tokens}, allowed: null "
            f"(no attention backend of vLLM keeps the first tokens in view; on a GPU ours does: {FLAG} {ON})"
        )
    if isinstance(block.ffn, PlainFFN) or (isinstance(block.ffn, MoE) and block.ffn.latent_size):
        raise ConfigError(f"{where}, ffn: found {block.ffn}, allowed: gated FFN, experts, linear map or nothing")
    if isinstance(block.ffn, MoE) and block.ffn.routing == "sigmoid_on_input" and block.ffn.num_experts_per_tok != 1:
        raise ConfigError(
            f"{where}, moe, key `num_experts_per_tok`: found {block.ffn.num_experts_per_tok}, allowed: 1 "
            "(vLLM's kernels scale an expert's input for one expert per token only)"
        )


def _has_unusual_windows(record: ModelRecord) -> bool:
    """vLLM's gpt-oss class gives the window to every even layer, whatever `layer_types` says."""
    windows = [attention.sliding_window for attention in record.attentions]
    is_usual = all((window is not None) == (index % 2 == 0) for index, window in enumerate(windows))
    return record.model_type in GPT_OSS and not is_usual
