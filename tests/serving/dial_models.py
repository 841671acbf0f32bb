"""Small chat templates in the shape of each family's, written for these tests, and the dials that follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.profile import profile_of
from vllm_puzzle.serving.dial.request import ReasoningRequest
from vllm_puzzle.serving.dial.resolve import ModelDial

ROOT = Path(__file__).resolve().parent.parent.parent
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
HEAD = "{% if add_generation_prompt %}[assistant]{% endif %}"

LINE = f"{TURNS}{HEAD}"
LINE_BY_DEFAULT = "{% if messages[0].role != 'system' %}[system]detailed thinking on{% endif %}" + LINE
SYSTEM_TAG = (
    "{% set enable_thinking = true %}{% set text = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if '/no_think' in text %}{% set enable_thinking = false %}{% endif %}"
    "[system]{{ text.replace('/no_think', '').replace('/think', '') | trim }}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    + HEAD
    + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
MESSAGE_TAG = (
    "{% set ns = namespace(on=true) %}{% for m in messages %}{% if m.role in ('user', 'system') %}"
    "{% if '/think' in m.content %}{% set ns.on = true %}"
    "{% elif '/no_think' in m.content %}{% set ns.on = false %}{% endif %}{% endif %}"
    "<SPECIAL_11>{{ m.role }} {{ m.content.replace('/think', '').replace('/no_think', '') | trim }}{% endfor %}"
    + HEAD
    + "{{ '<think>\n' if ns.on else '<think></think>' }}"
)
SWITCHED = (
    TURNS + HEAD + "{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' }}"
)
NANO_3 = "{% if truncate_history_thinking | default(true) %}[cut]{% endif %}" + SWITCHED
SUPER_3 = NANO_3.replace("[cut]", "[cut]{% if low_effort %}{reasoning effort: low}{% endif %}")
ULTRA_3 = NANO_3.replace(
    "[cut]", "[cut]{% if medium_effort %}{effort}{% endif %}{% if reasoning_budget %}{{ reasoning_budget }}{% endif %}"
)
OSS = "Reasoning: {{ reasoning_effort | default('medium') }}\n" + TURNS + "<|start|>assistant"
QWEN = (
    TURNS + HEAD + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
KIMI = (
    "{% if thinking is defined and not thinking %}{% set tail = '</think>' %}{% else %}{% set tail = '<think>' %}"
    "{% endif %}{% if thinking_effort %}Think: {{ thinking_effort }}{% endif %}" + TURNS + HEAD + "{{ tail }}"
)
# Thinks on demand only, as DeepSeek V3.1 and Granite do.
ON_DEMAND = TURNS + HEAD + "{{ '<think>' if thinking else '</think>' }}"
BY_LEVEL = (
    "{% if reasoning_effort is defined and reasoning_effort not in (none, 'none', 'high') %}"
    "{{ raise_exception('no such level') }}{% endif %}"
    "[settings {{ reasoning_effort | default('high', true) }}]" + TURNS + HEAD
)
THREE_LEVELS = (
    "{% if reasoning_effort %}{% if reasoning_effort in ('low', 'medium', 'xhigh') %}{effort {{ reasoning_effort }}}"
    "{% else %}{{ raise_exception('unknown effort') }}{% endif %}{% endif %}" + SWITCHED
)
HIGH_OR_MAX = "{{ 'High' if reasoning_effort == 'high' else 'Max' }}" + SWITCHED
NO_SWITCH = TURNS + HEAD
POCKETS = [
    (ROOT / "model_configs" / "pocket" / name / "chat_template.jinja").read_text() for name in ("parent", "puzzle")
]

# family → (config.json's model_type, name, template)
FAMILIES: dict[str, tuple[str, str, str]] = {
    "49B v1": ("nemotron-nas", "nvidia/Llama-3_3-Nemotron-Super-49B-v1", LINE),
    "253B": ("nemotron-nas", "nvidia/Llama-3_1-Nemotron-Ultra-253B-v1", LINE_BY_DEFAULT),
    "Nano 8B": ("llama", "nvidia/Llama-3.1-Nemotron-Nano-8B-v1", LINE),
    "49B v1.5": ("nemotron-nas", "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5", SYSTEM_TAG),
    "Nano v2": ("nemotron_h", "nvidia/NVIDIA-Nemotron-Nano-9B-v2", MESSAGE_TAG),
    "3 Nano": ("nemotron_h", "nvidia/Nemotron-3-Nano", NANO_3),
    "3 Super": ("nemotron_h", "nvidia/Nemotron-3-Super", SUPER_3),
    "3 Ultra": ("nemotron_h", "nvidia/Nemotron-3-Ultra", ULTRA_3),
    "Puzzle 75B": ("nemotron_h_puzzle", "nvidia/Nemotron-Puzzle-75B", SUPER_3),
    "gpt-oss": ("gpt_oss", "openai/gpt-oss-120b", OSS),
    "gpt-oss-puzzle": ("gpt_oss_puzzle", "gpt-oss-puzzle-88B", OSS),
    "pocket": ("nemotron-nas", "pocket-puzzle", POCKETS[1]),
    "Qwen": ("qwen3", "Qwen/Qwen3-8B", QWEN),
    "Kimi": ("kimi", "kimi", KIMI),
    "on demand": ("deepseek_v3", "deepseek", ON_DEMAND),
    "by level": ("mistral3", "mistral", BY_LEVEL),
    "three levels": ("qwen3_8", "qwen", THREE_LEVELS),
    "no switch": ("llama", "some", NO_SWITCH),
}


def dial(family: str, policy: ReasoningPolicy | None = None, has_budget: bool = True) -> ModelDial:
    """The dial of a family's model; its served name is the family's here."""
    return ModelDial(profile_of(*FAMILIES[family]), policy or ReasoningPolicy(), has_budget, family)


def wish(**fields: Any) -> ReasoningRequest:
    """What a client asks for, each said by a field of its own name."""
    return ReasoningRequest(**fields, sources={name: name for name in fields})
