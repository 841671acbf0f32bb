"""The suites: which engines, under which loads, and which papers' figures they answer (anchors.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_puzzle.bench.engine.case import DECODE, FIT, PREFILL, Case, EngineVariant, Load, Shape
from vllm_puzzle.model_configs.schema import ConfigError

SUPER, PARENT = "llama-3.3-nemotron-super-49b-v1", "llama-3.3-70b-instruct"
NANO, QWEN = "nemotron-3-nano-30b-a3b", "qwen3-30b-a3b-thinking-2507"
CPU, GPU = "cpu", "gpu"
# FFN Fusion's step 3 on the 49B (arXiv 2503.18908): 42-50 becomes one FFN, 53-69 two. Where it cuts is not said; here
# in halves of the columns. The shared norm of a run's last layer is the paper's, and all that FP8 weights allow.
STEP_3 = {"puzzle_ffn_fusion": {"runs": "42-50,53-61+62-69", "norm": "last"}}


@dataclass(frozen=True, slots=True)
class Suite:
    """Variants under loads. With `pairs` (a, b) both engines live at once and are visited in ABBA blocks, so that b is
    compared with a; `tolerance` is then the largest loss of b's speed that passes, None without a judgement. `routing`:
    the experts' load of MoE models is logged. `device`: where it runs (CPU, GPU).
    """

    name: str
    purpose: str
    variants: tuple[EngineVariant, ...]
    loads: tuple[Load, ...]
    device: str = GPU
    pairs: tuple[tuple[str, str], ...] = ()
    blocks: int = 1
    tolerance: float | None = None
    has_routing: bool = False

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ConfigError(f"suite {self.name}, key `variants`: found {names}, allowed: each name once")
        unknown = [name for pair in self.pairs for name in pair if name not in names]
        if unknown:
            raise ConfigError(f"suite {self.name}, key `pairs`: found {unknown}, allowed: {', '.join(names)}")

    def cases(self, variant: EngineVariant) -> list[Case]:
        """The cases of one variant, in the order in which they are run."""
        return [
            Case(variant, load.shape, batch, load.role, load.waves) for load in self.loads for batch in load.batches
        ]

    @property
    def longest(self) -> int:
        """Tokens of its longest request."""
        return max(load.shape.total for load in self.loads)

    def choose(self, only: tuple[str, ...], shapes: tuple[Shape, ...], batches: tuple[int, ...]) -> Suite:
        """The part of the suite that was asked for; empty is all. Raises ConfigError for what it does not have.

        The engines keep the settings of the whole, so that parts measured in several calls belong together.
        """
        names = tuple(variant.name for variant in self.variants)
        _check_known(self, "--only", only, names)
        _check_known(self, "--shapes", tuple(s.name for s in shapes), tuple(load.shape.name for load in self.loads))
        known = {batch for load in self.loads for batch in load.batches}
        _check_known(self, "--batches", tuple(map(batch_name, batches)), tuple(map(batch_name, sorted(known))))
        loads = [load for load in self.loads if not shapes or load.shape in shapes]
        if batches:
            kept = [(load, tuple(batch for batch in load.batches if batch in batches)) for load in loads]
            loads = [replace(load, batches=some) for load, some in kept if some]
        if not loads:
            raise ConfigError(f"suite {self.name}: found no case of these shapes and batches, allowed: see `--plan`")
        variants = tuple(variant for variant in self.variants if not only or variant.name in only)
        pairs = tuple(pair for pair in self.pairs if not only or set(pair) <= set(only))
        if self.pairs and not pairs:
            allowed = " or ".join(",".join(pair) for pair in self.pairs)
            raise ConfigError(f"suite {self.name}, `--only`: found {', '.join(only)}, allowed: both of {allowed}")
        return replace(self, variants=variants, loads=tuple(loads), pairs=pairs)


def batch_name(batch: int) -> str:
    """8, or `fit`."""
    return "fit" if batch == FIT else str(batch)


def _check_known(suite: Suite, flag: str, found: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for name in found:
        if name not in allowed:
            raise ConfigError(f"suite {suite.name}, `{flag}`: found {name!r}, allowed: {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class _Engine:
    """Settings that the variants of a suite share."""

    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float = 0.95
    max_num_batched_tokens: int = 8192
    more: Mapping[str, Any] = field(default_factory=dict)

    def flags(self, **own: Any) -> dict[str, Any]:
        return {
            "load_format": "dummy",
            "enable_prefix_caching": False,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            **self.more,
            **own,
        }


def _cpu_flags(**own: Any) -> dict[str, Any]:
    """As `vllm-puzzle serve` starts on a CPU without bfloat16 arithmetic."""
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    return settings | {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 28} | own


ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _overhead_cpu() -> Suite:
    """One Llama, served by vLLM's class and, described as DeciLM's, by ours."""
    variants = []
    for size in ("h512", "h1024"):
        flags = _cpu_flags(load_format="dummy")
        stock = EngineVariant(f"stock-{size}", f"llama-{size}", flags=flags, env=ONE_THREAD)
        variants += [stock, replace(stock, name=f"ours-{size}", as_decilm=True)]
    return Suite(
        "overhead",
        "the same homogeneous Llama through vLLM's class and through ours",
        tuple(variants),
        (Load(Shape(8, 32), (1, 16), waves=1), Load(Shape(128, 1), (2,), PREFILL, waves=4)),
        device=CPU,
        pairs=(("stock-h512", "ours-h512"), ("stock-h1024", "ours-h1024")),
        blocks=12,
        tolerance=0.01,
    )


def _overhead_gpu() -> Suite:
    # Both engines share the card: each gets less than half of it.
    engine = _Engine(max_num_seqs=256, max_model_len=4096, gpu_memory_utilization=0.44)
    stock = EngineVariant("stock-8b", "llama-8b", flags=engine.flags())
    return Suite(
        "overhead",
        "the same homogeneous Llama (8B's shape) through vLLM's class and through ours",
        (stock, replace(stock, name="ours-8b", as_decilm=True)),
        (Load(Shape(128, 128), (1, 32, 256), waves=1), Load(Shape(2048, 1), (8,), PREFILL, waves=1)),
        pairs=(("stock-8b", "ours-8b"),),
        blocks=8,
        tolerance=0.01,
    )


def _super49() -> Suite:
    engine = _Engine(max_num_seqs=256, max_model_len=2304)
    batches = (1, 16, 64, 128, 256)
    return Suite(
        "super49",
        "Nemotron-Super-49B against its parent Llama-3.3-70B, both FP8 with an FP8 KV cache, one GPU",
        (
            EngineVariant("49b-fp8", SUPER, "fp8", "fp8", engine.flags()),
            EngineVariant("70b-fp8", PARENT, "fp8", "fp8", engine.flags()),
        ),
        (Load(Shape(128, 128), batches), Load(Shape(128, 1024), (64, 256)), Load(Shape(2048, 128), batches)),
    )


def _fusion() -> Suite:
    engine = _Engine(max_num_seqs=32, max_model_len=512)
    return Suite(
        "fusion",
        "Nemotron-Super-49B (FP8) as it is, and with FFN Fusion at load time",
        (
            EngineVariant("49b-fp8", SUPER, "fp8", "fp8", engine.flags()),
            EngineVariant("49b-fp8-fused", SUPER, "fp8", "fp8", engine.flags(hf_overrides=STEP_3)),
        ),
        (Load(Shape(128, 128), (1, 2, 4, 8, 16, 32)),),
    )


def _gptoss() -> Suite:
    # 64K/64K takes hours: decoding is measured at its mean context of 96K, prefill at 64K (derived.py). 4K/4K is
    # derived likewise for as many as fit, and measured at 64 requests, which shows how far the derivation holds.
    engine = _Engine(max_num_seqs=256, max_model_len=131072)
    models = (("120b", "gpt-oss-120b"), ("88b", "gpt-oss-puzzle-88b"))
    variants = [
        EngineVariant(f"{name}-{kv}kv", model, kv_dtype=kv, flags=engine.flags(), is_evened=True)
        for name, model in models
        for kv in ("bf16", "fp8")
    ]
    stock_groups = {"VLLM_PUZZLE_DISABLE_KV_GROUPS": "1"}
    variants.append(replace(variants[-1], name="88b-fp8kv-stock-groups", env=stock_groups))
    return Suite(
        "gptoss",
        "gpt-oss-puzzle-88B (reconstructed configuration) against gpt-oss-120b, MXFP4, KV cache in bf16 and FP8",
        tuple(variants),
        (
            Load(Shape(65536, 1), (1,), PREFILL),
            Load(Shape(98304, 512), (1, FIT), DECODE),
            Load(Shape(4096, 1), (4,), PREFILL),
            Load(Shape(6144, 256), (64, FIT), DECODE),
            Load(Shape(4096, 4096), (64,)),
        ),
        has_routing=True,
    )


def _nano3() -> Suite:
    engine = _Engine(max_num_seqs=256, max_model_len=36864, more={"mamba_ssm_cache_dtype": "float32"})
    plain = replace(engine, more={})
    return Suite(
        "nano3",
        "Nemotron-3-Nano-30B-A3B against Qwen3-30B-A3B and gpt-oss-20b",
        (
            EngineVariant("nano-fp8", NANO, "fp8", "fp8", engine.flags(), is_evened=True),
            EngineVariant("qwen3-30b-fp8", QWEN, "fp8", "fp8", plain.flags(), is_evened=True),
            EngineVariant("gpt-oss-20b", "gpt-oss-20b", kv_dtype="bf16", flags=plain.flags(), is_evened=True),
            EngineVariant("nano-bf16", NANO, "bf16", "bf16", engine.flags(), is_evened=True),
            EngineVariant("nano-bf16-fp8kv", NANO, "bf16", "fp8", engine.flags(), is_evened=True),
        ),
        (
            Load(Shape(8192, 1), (4,), PREFILL),
            Load(Shape(16384, 256), (32, FIT), DECODE),
            Load(Shape(32768, 1024), (32,)),
        ),
        has_routing=True,
    )


def _cpu_smoke() -> Suite:
    """Both shipped models with their weights: every part of the benchmark runs, on two cores."""
    flags = _cpu_flags(load_format="auto")
    return Suite(
        "cpu-smoke",
        "the shipped models with their weights, on a CPU",
        tuple(EngineVariant(name, name, flags=flags, env=ONE_THREAD) for name in ("pocket-parent", "pocket-puzzle")),
        (Load(Shape(24, 48), (1, 16), waves=1), Load(Shape(400, 1), (2,), PREFILL, waves=2)),
        device=CPU,
        pairs=(("pocket-parent", "pocket-puzzle"),),
        blocks=4,
    )


SUITES = {
    "overhead": "our class against vLLM's own on the same Llama",
    "super49": "Nemotron-Super-49B against Llama-3.3-70B, FP8",
    "fusion": "the 49B with and without FFN Fusion",
    "gptoss": "gpt-oss-puzzle-88B against gpt-oss-120b",
    "nano3": "Nemotron-3-Nano against Qwen3-30B-A3B and gpt-oss-20b",
    "cpu-smoke": "the shipped pocket models, under a minute on two cores",
}


def find_suite(name: str, has_gpu: bool) -> Suite:
    """A suite by name; `overhead` is another on a GPU than on a CPU. Raises ConfigError for an unknown name."""
    makers = {
        "overhead": _overhead_gpu if has_gpu else _overhead_cpu,
        "super49": _super49,
        "fusion": _fusion,
        "gptoss": _gptoss,
        "nano3": _nano3,
        "cpu-smoke": _cpu_smoke,
    }
    if name not in makers:
        raise ConfigError(f"bench engine: found suite {name!r}, allowed: {', '.join(SUITES)}")
    return makers[name]()
