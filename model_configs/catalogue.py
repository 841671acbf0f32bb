"""Published configurations, as data (`published/NAME.json`), each with its source. Standard library only.

The files are copies of public ones. One is not: gpt-oss-puzzle-88B's own config.json was not to be had, so that its
file is a reconstruction from what third parties tell of it; the file, its entry and `vllm-puzzle models` say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord

FOLDER = Path(__file__).with_name("published")
# ModelOpt's older file, which some repositories have beside config.json.
QUANTIZATION_SUFFIX = ".hf_quant_config.json"
# NVIDIA's tool that lists models for its planner: verbatim copies of the hub's files (aiconfigurator @095f58a5).
PLANNER = (
    "https://github.com/ai-dynamo/aiconfigurator/blob/095f58a5/aic-core/src/aiconfigurator_core/model_configs/"
    "{}_config.json"
)
# NVIDIA NeMo holds both DeciLM configurations as text (@8cfedd72); the 49B's equals the planner's, key for key.
NEMO = "https://github.com/NVIDIA/NeMo/blob/8cfedd72/nemo/collections/llm/gpt/model/llama_nemotron_config.py"

# How reasoning is switched, in the words of the dial's profiles (serving/dial/profiles; a test compares them).
SYSTEM_LINE = "system line `detailed thinking on|off`, default on"
ENABLE_THINKING = "chat_template_kwargs enable_thinking, default on"
EFFORT = "no off, reasoning_effort low|medium|high, default medium"


@dataclass(frozen=True, slots=True)
class Published:
    """One published model. `name` is its file's stem, `hub` its repository there, `source` where the file is from.

    served_as: its weights as published (bf16, fp8, mxfp4, nvfp4); kv: the KV cache that they were published for (bf16,
    fp8). reasoning: how it is switched. `note` says what is to be known about the file, a reconstruction above all.
    """

    name: str
    hub: str
    source: str
    reasoning: str
    served_as: str = "bf16"
    kv: str = "bf16"
    is_reconstructed: bool = False
    note: str = ""

    def config(self) -> dict[str, Any]:
        """config.json, parsed."""
        return read_object(FOLDER / f"{self.name}.json")

    def hf_quant_config(self) -> dict[str, Any] | None:
        """hf_quant_config.json, parsed, where the repository has one and it could be read."""
        file = FOLDER / f"{self.name}{QUANTIZATION_SUFFIX}"
        return read_object(file) if file.is_file() else None

    def record(self) -> ModelRecord:
        """The layers of the model."""
        return read_model(self.config())


PUBLISHED: tuple[Published, ...] = (
    Published("llama-3.3-nemotron-super-49b-v1", "nvidia/Llama-3_3-Nemotron-Super-49B-v1", NEMO, SYSTEM_LINE),
    Published(
        "llama-3.3-70b-instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
        "https://github.com/ai-dynamo/aiconfigurator/blob/f577ab8432dfc9970fea27853a24861a6d3076cf/"
        "src/aiconfigurator/model_configs/meta-llama--Llama-3.3-70B-Instruct_config.json",
        "none: it does not reason",
        note="the 49B's parent",
    ),
    Published("llama-3.1-nemotron-ultra-253b-v1", "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1", NEMO, SYSTEM_LINE),
    Published(
        "gpt-oss-puzzle-88b",
        "nvidia/gpt-oss-puzzle-88B",
        "https://github.com/fakoli/anvil-vllm/blob/3fbe020f/tests/models/test_gpt_oss_puzzle.py",
        EFFORT,
        served_as="mxfp4",
        kv="fp8",
        is_reconstructed=True,
        note="RECONSTRUCTED by third parties; rotary scaling, quantization entry and token ids were not found",
    ),
    Published(
        "gpt-oss-120b",
        "openai/gpt-oss-120b",
        PLANNER.format("openai--gpt-oss-120b"),
        EFFORT,
        served_as="mxfp4",
        note="gpt-oss-puzzle-88b's parent",
    ),
    Published(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        "https://huggingface.co/openai/gpt-oss-20b/blob/main/config.json",
        EFFORT,
        served_as="mxfp4",
    ),
    Published(
        "nemotron-3-nano-30b-a3b",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        PLANNER.format("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        ENABLE_THINKING,
    ),
    Published(
        "nemotron-3-nano-30b-a3b-nvfp4",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
        PLANNER.format("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4"),
        ENABLE_THINKING,
        served_as="nvfp4",
        kv="fp8",
    ),
    Published(
        "nemotron-3-super-120b-a12b-fp8",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
        PLANNER.format("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8"),
        f"{ENABLE_THINKING}, low by low_effort",
        served_as="fp8",
        kv="fp8",
    ),
    Published(
        "nemotron-3-super-120b-a12b-nvfp4",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4",
        PLANNER.format("nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4"),
        f"{ENABLE_THINKING}, low by low_effort",
        served_as="nvfp4",
        kv="fp8",
    ),
    Published(
        "nemotron-3-ultra-550b-a55b",
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
        PLANNER.format("nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16"),
        f"{ENABLE_THINKING}, medium by medium_effort",
    ),
    Published(
        "nemotron-3.5-lightning-30b-a3b-nvfp4",
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",
        PLANNER.format("nvidia--NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4"),
        f"{ENABLE_THINKING}, medium by medium_effort",
        served_as="nvfp4",
        kv="fp8",
    ),
    Published(
        "qwen3-30b-a3b-thinking-2507",
        "Qwen/Qwen3-30B-A3B-Thinking-2507",
        "https://huggingface.co/Qwen/Qwen3-30B-A3B-Thinking-2507/blob/main/config.json",
        "no off: it always reasons",
        note="as transformers 5.7 prints it in a public report: num_local_experts, rope_parameters for the older words",
    ),
)
NAMES = tuple(each.name for each in PUBLISHED)


def find(name: str) -> Published:
    """The published model of that name, in any case. Raises ConfigError with the allowed names."""
    for each in PUBLISHED:
        if each.name == name.lower():
            return each
    raise ConfigError(f"published model: found {name!r}, allowed: {', '.join(NAMES)}")
