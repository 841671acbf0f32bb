"""The regular list that describes an irregular model: one frozen, checked record per layer.

Every published format is read into these records (`formats.py`); the vLLM model class, the plain-PyTorch
reference, the weight accounting and `vllm-puzzle inspect` all work from them and from nothing else.
Not here: anything that needs torch, vLLM or a file. Standard library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

Shape = tuple[int, ...]

# Beyond any published model; a larger number is a mistake, and would only exhaust memory.
MAX_SIZE, MAX_LAYERS, MAX_EXPERTS, MAX_CONTEXT = 2**31 - 1, 10_000, 10_000, 2**26


class ConfigError(ValueError):
    """A model description that cannot be served; the message says what, where, found and allowed."""


def _require_positive(owner: str, **sizes: int) -> None:
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise ConfigError(f"{owner}, key `{key}`: found {value!r}, allowed: an integer from 1 to {MAX_SIZE}")


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal self-attention with rotary positions.

    `sliding_window` counts the tokens a query sees, itself included; None sees all. With `num_sink_tokens` it sees the
    first tokens of the sequence too (StreamingLLM, at their own positions). `has_sinks`: one learned logit per query
    head joins the softmax and adds nothing (gpt-oss).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    has_sinks: bool = False
    num_sink_tokens: int = 0

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def __post_init__(self) -> None:
        _require_positive("attention", num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"attention, key `num_key_value_heads`: found {self.num_kv_heads}, "
                f"allowed: a divisor of the {self.num_heads} attention heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"attention, key `head_dim`: found {self.head_dim}, allowed: an even number (rotary)")
        if self.sliding_window is not None:
            _require_positive("attention", sliding_window=self.sliding_window)
        if self.num_sink_tokens and self.sliding_window is None:
            raise ConfigError(
                f"attention, key `num_sink_tokens`: found {self.num_sink_tokens} without a window, allowed: null"
            )


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One hidden × hidden matrix without bias in place of a sub-block; keeps its norm and its residual."""


@dataclass(frozen=True, slots=True)
class GatedFFN:
    """`down(silu(gate(x)) · up(x))` with `intermediate_size` columns in gate and up."""

    intermediate_size: int

    def __post_init__(self) -> None:
        _require_positive("ffn", intermediate_size=self.intermediate_size)


@dataclass(frozen=True, slots=True)
class PlainFFN:
    """`down(relu(up(x))²)` with `intermediate_size` columns (NemotronH)."""

    intermediate_size: int

    def __post_init__(self) -> None:
        _require_positive("ffn", intermediate_size=self.intermediate_size)


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A Mamba-2 mixer: `num_heads` heads of `head_dim`, a state of `state_size` per channel (NemotronH)."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed FFNs: `num_experts` of width `intermediate_size`, `num_experts_per_tok` of them per token.

    A shared expert of its own width sees every token (0: none); with `latent_size` the routed ones work in that size.
    `routing` says how the router's logits become weights (see the constants below).
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    latent_size: int | None = None
    routing: str = "renormalize"

    def __post_init__(self) -> None:
        _require_positive(
            "moe",
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            moe_intermediate_size=self.intermediate_size,
        )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"moe, key `num_experts_per_tok`: found {self.num_experts_per_tok}, "
                f"allowed: at most the {self.num_experts} experts"
            )


# Softmax over all experts; the chosen ones' weights are used as they are, or divided by their sum (which equals a
# softmax over the chosen logits); or the sigmoid of each chosen logit, which scales the expert's input (DeciLM).
ROUTINGS = ("softmax", "renormalize", "sigmoid_on_input")

AttentionKind = Attention | Mamba2 | LinearMap | None
FFNKind = GatedFFN | PlainFFN | MoE | LinearMap | None


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What one decoder layer computes: `x += attention(norm(x))`, then `x += ffn(norm(x))`.

    None leaves the sub-block out whole: no norm, no residual addition, no KV cache. A layer of `parallel` blocks has
    neither of its own: each block reads the same x, and what they add is summed (DeciLM `parallel_blocks`).
    """

    attention: AttentionKind
    ffn: FFNKind
    parallel: tuple[LayerRecord, ...] = ()

    @property
    def blocks(self) -> tuple[LayerRecord, ...]:
        """The blocks that hold sub-blocks: the parallel ones, or the layer itself."""
        return self.parallel or (self,)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position parameters in Hugging Face's words (`modeling_rope_utils.RopeParameters`)."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def parameters(self) -> dict[str, Any]:
        """Hugging Face's `rope_parameters`: what is set, under its name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A decoder-only language model: the sizes all layers share, and the list of layers."""

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerRecord, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    is_mxfp4: bool = False  # the experts are stored in MXFP4 blocks (gpt-oss)

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_position_embeddings,
        )
        if not self.layers:
            raise ConfigError("model, key `num_hidden_layers`: found 0, allowed: at least 1")

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention of every block that has one, in layer order."""
        blocks = (block for layer in self.layers for block in layer.blocks)
        return tuple(block.attention for block in blocks if isinstance(block.attention, Attention))

    @property
    def is_heterogeneous(self) -> bool:
        """Whether any two layers differ, or any sub-block is not plain attention, FFN or MoE."""
        first = self.layers[0]
        plain = isinstance(first.attention, Attention) and isinstance(first.ffn, GatedFFN | MoE)
        # A window on some layers only is ordinary for stock classes (`layer_types`); it does not count.
        return not plain or any(_without_window(layer) != _without_window(first) for layer in self.layers)


def check_tensor_parallel(model: ModelRecord, tp_size: int, is_expert_parallel: bool = False) -> None:
    """Raise ConfigError, naming the layer, when a sub-block cannot be split over `tp_size` ranks.

    Experts are cut in their width, or, with expert parallelism, dealt out whole.
    """
    for index, layer in enumerate(model.layers):
        for block in layer.blocks:
            _check_block(model, block, tp_size, f"layer {index}")
            if isinstance(block.ffn, MoE):
                check_experts(block.ffn, tp_size, is_expert_parallel, f"layer {index}, moe")


def _check_block(model: ModelRecord, block: LayerRecord, tp_size: int, where: str) -> None:
    if isinstance(block.attention, Attention):
        check_heads(block.attention, tp_size, f"{where}, attention")
    if LinearMap() in (block.attention, block.ffn):
        check_divides("hidden_size", model.hidden_size, tp_size, f"{where}, linear map")
    if isinstance(block.ffn, GatedFFN):
        check_divides("intermediate_size", block.ffn.intermediate_size, tp_size, f"{where}, ffn")


def check_heads(spec: Attention, tp_size: int, where: str) -> None:
    """Query heads are split over the ranks; KV heads are split, or repeated when there are fewer than ranks."""
    check_divides("num_attention_heads", spec.num_heads, tp_size, where)
    if max(spec.num_kv_heads, tp_size) % min(spec.num_kv_heads, tp_size):
        raise ConfigError(
            f"{where}, key `num_key_value_heads`: found {spec.num_kv_heads}, allowed: a multiple or a divisor of "
            f"--tensor-parallel-size {tp_size}"
        )


def check_experts(spec: MoE, num_ranks: int, is_expert_parallel: bool, where: str) -> None:
    """A layer's experts must be as many as the expert-parallel ranks, or as wide as to be cut for the tensor ones."""
    if not is_expert_parallel:
        check_divides("moe_intermediate_size", spec.intermediate_size, num_ranks, where)
    elif spec.num_experts < num_ranks:
        raise ConfigError(
            f"{where}, key `num_experts`: found {spec.num_experts}, allowed: at least the {num_ranks} "
            "expert-parallel ranks"
        )


def check_divides(key: str, value: int, tp_size: int, where: str) -> None:
    """Raise ConfigError unless `value` can be split evenly over `tp_size` ranks."""
    if value % tp_size:
        raise ConfigError(
            f"{where}, key `{key}`: found {value}, allowed: a multiple of --tensor-parallel-size {tp_size}"
        )


def _without_window(layer: LayerRecord) -> LayerRecord:
    if isinstance(layer.attention, Attention):
        return replace(layer, attention=replace(layer.attention, sliding_window=None, num_sink_tokens=0))
    return layer
