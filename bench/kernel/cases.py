"""What is measured: one FFN or attention problem each, named in full, with its floor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vllm_puzzle.bench.kernel.batch import Batch, format_batch, parse_batch, parse_number, short
from vllm_puzzle.kernels import cost
from vllm_puzzle.kernels.cost import Cost
from vllm_puzzle.model_configs.schema import ConfigError

FFN_OPS = ("gate_up", "down", "ffn")
ATTENTION_OPS = ("decode", "verify", "prefill", "kv_write", "rope_kv_write", "fused_decode")
OPS = (*FFN_OPS, *ATTENTION_OPS)
# How FP8 weights are scaled: one number for gate and one for up, one a row, one for each 128×128.
PRECISIONS = ("bf16", "fp8_tensor", "fp8_channel", "fp8_block")


@dataclass(frozen=True, slots=True)
class FfnCase:
    """`count` parallel FFNs of one width, M tokens: gate_up alone, down alone, or both ("ffn").

    `width` is one FFN's (one tensor-parallel shard's) intermediate size. FP8 activations go with FP8 weights. gate_up
    gives bf16, but e4m3 where one static scale can be: "fp8_tensor".
    """

    op: str
    num_tokens: int
    hidden: int
    width: int
    precision: str = "bf16"
    count: int = 1

    def __post_init__(self) -> None:
        if self.op not in FFN_OPS or self.precision not in (PRECISIONS if self.op != "ffn" else ("bf16",)):
            raise ConfigError(
                f"FFN case: found {self.op} in {self.precision}, allowed: gate_up and down in "
                f"{', '.join(PRECISIONS)}; ffn in bf16"
            )

    @property
    def intermediate(self) -> int:
        """Width of all FFNs together."""
        return self.count * self.width

    @property
    def name(self) -> str:
        """For example gate_up-m16-d8192-i17920-bf16, ffn-m1-d8192-i4x2816-bf16."""
        width = f"{self.count}x{self.width}" if self.op == "ffn" else f"{self.intermediate}"
        return f"{self.op}-m{self.num_tokens}-d{self.hidden}-i{width}-{self.precision}"

    @property
    def matmul(self) -> str:
        """Which matrix rate bounds it."""
        return "bf16" if self.precision == "bf16" else "fp8"

    @property
    def cost(self) -> Cost:
        """The floor."""
        floor = {"gate_up": cost.gate_up, "down": cost.down, "ffn": cost.ffn}[self.op]
        sizes = self.num_tokens, self.hidden, self.intermediate
        if self.precision == "bf16":
            return floor(*sizes)
        output = cost.FP8 if (self.op, self.precision) == ("gate_up", "fp8_tensor") else cost.BF16
        return floor(*sizes, cost.FP8, cost.FP8, output, self.precision.removeprefix("fp8_"))


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Attention over a paged cache, or the write to it. `window` None: full attention. `cache`: "fp8" or "bf16".

    `sinks`: a learned logit per head; `num_sink_tokens`: first tokens seen beside the window; `per_head`: K and V
    scales of each KV head, else one for all.
    """

    op: str
    batch: Batch
    window: int | None
    head_dim: int = 128
    cache: str = "fp8"
    num_heads: int = 64
    num_kv_heads: int = 8
    page: int = 16
    sinks: bool = False
    num_sink_tokens: int = 0
    per_head: bool = False

    @property
    def name(self) -> str:
        """For example decode-64q1s4k-w1k-h64kv8d128-fp8, with -page64, -sinks, -sink4, -perhead where it is so."""
        window = "full" if self.window is None else f"w{short(self.window)}"
        heads = f"h{self.num_heads}kv{self.num_kv_heads}d{self.head_dim}"
        parts = [self.op, format_batch(self.batch)]
        parts += [heads] if self.op in ("kv_write", "rope_kv_write") else [window, heads]
        parts += [self.cache]
        parts += [f"page{self.page}"] if self.page != 16 else []
        parts += ["sinks"] if self.sinks else []
        parts += [f"sink{self.num_sink_tokens}"] if self.num_sink_tokens else []
        parts += ["perhead"] if self.per_head else []
        return "-".join(parts)

    @property
    def num_tokens(self) -> int:
        """Query tokens, all sequences together."""
        return sum(query for query, _ in self.batch)

    @property
    def matmul(self) -> str:
        """Which matrix rate bounds it: bf16, since P·V runs in 16 bits whatever the cache holds."""
        return "bf16"

    @property
    def cost(self) -> Cost:
        """The floor."""
        cache_bytes = cost.FP8 if self.cache == "fp8" else cost.BF16
        if self.op == "kv_write":
            return cost.kv_write(self.num_tokens, self.num_kv_heads, self.head_dim, cache_bytes)
        heads = (self.num_heads, self.num_kv_heads, self.head_dim, cache_bytes)
        if self.op == "rope_kv_write":
            return cost.rope_and_write_kv(self.num_tokens, *heads)
        if self.op == "fused_decode":
            lengths = [seq for _, seq in self.batch]
            return cost.fused_decode(lengths, self.window, *heads, self.page, self.num_sink_tokens)
        return cost.attention(self.batch, self.window, *heads, self.page, self.num_sink_tokens)

    @property
    def live_bytes(self) -> int:
        """Bytes of K and V that are read."""
        keys = sum(cost.live_keys(query, seq, self.window, self.num_sink_tokens) for query, seq in self.batch)
        return 2 * self.num_kv_heads * keys * self.head_dim * (cost.FP8 if self.cache == "fp8" else cost.BF16)


Case = FfnCase | AttentionCase


def decode(batch: str, window: int | None, head_dim: int = 128, cache: str = "fp8", **more: Any) -> AttentionCase:
    """A decode case of a batch in vLLM's grammar."""
    return AttentionCase("decode", parse_batch(batch), window, head_dim, cache, **more)


def attention(op: str, batch: str, window: int | None = None, head_dim: int = 128, cache: str = "fp8") -> AttentionCase:
    """Any attention case of a batch in vLLM's grammar, 64 query and 8 KV heads."""
    return AttentionCase(op, parse_batch(batch), window, head_dim, cache)


FFN_NAME = re.compile(
    r"(?P<op>gate_up|down|ffn)-m(?P<m>\d+)-d(?P<d>\d+)-i(?:(?P<count>\d+)x)?(?P<width>\d+)-(?P<precision>\w+)"
)
ATTENTION_NAME = re.compile(
    r"(?P<op>[a-z_]+)-(?P<batch>[\dqsk_]+)(?:-(?:w(?P<window>\d+k?)|full))?-h(?P<h>\d+)kv(?P<kv>\d+)d(?P<d>\d+)"
    r"-(?P<cache>fp8|bf16)(?:-page(?P<page>\d+))?(?P<sinks>-sinks)?(?:-sink(?P<first>\d+))?(?P<perhead>-perhead)?"
)


def parse_case(name: str) -> Case:
    """The case of a name, so that any size can be asked for. Raises ConfigError with two examples."""
    if match := FFN_NAME.fullmatch(name):
        sizes = int(match["m"]), int(match["d"]), int(match["width"])
        case = FfnCase(match["op"], *sizes, match["precision"], int(match["count"] or 1))
        if min(*sizes, case.intermediate) >= 1:
            return case
    elif (match := ATTENTION_NAME.fullmatch(name)) and match["op"] in ATTENTION_OPS:
        heads, kv_heads, head_dim = int(match["h"]), int(match["kv"]), int(match["d"])
        window, page = parse_number(match["window"]) if match["window"] else None, int(match["page"] or 16)
        batch = parse_batch(match["batch"])
        is_decode = match["op"] not in ("decode", "fused_decode") or all(query == 1 for query, _ in batch)
        if min(heads, kv_heads, head_dim, page) >= 1 and window != 0 and heads % kv_heads == 0 and is_decode:
            return AttentionCase(
                match["op"], batch, window, head_dim, match["cache"], heads, kv_heads, page,
                bool(match["sinks"]), int(match["first"] or 0), bool(match["perhead"]),
            )  # fmt: skip
    raise ConfigError(
        f"`--case`: found {name!r}, allowed: a name as gate_up-m16-d8192-i17920-bf16 or "
        "decode-64q1s4k-w1k-h64kv8d128-fp8 (heads divisible by KV heads), or a pattern with `*` over `--list`"
    )
