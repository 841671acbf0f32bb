"""Models whose FFNs compute with our kernels give the reference's log-probabilities; who keeps vLLM's path keeps it.

The kernels run under Triton's interpreter (ffn_run.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import parity
import pytest
import quantized_checkpoints as quantized
from parity import Jobs, assert_equal_to, assert_equal_up_to_flips, errors, rms
from safetensors.torch import load_file
from vllm_puzzle.kernels.ffn_table import KINDS, Config, Entry, Table, write_table
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving import kernel_flags, serve
from vllm_puzzle.serving.kernel_flags import FFN_KERNEL, take_kernel_flags
from vllm_puzzle.serving.reference_model import ReferenceModel

POCKET = Path(__file__).parents[2] / "model_configs" / "pocket" / "puzzle"
NUM_PROMPT_TOKENS = sum(len(prompt) for prompt in parity.PROMPTS)
FP8 = ("fp8 static", "fp8 dynamic", "modelopt fp8")
INSPECTED = ("on", "fp8 static", "fp8 dynamic")
OURS_UP_TO = 16  # tokens, in the table below


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ffn")


@pytest.fixture(scope="module")
def pocket() -> ReferenceModel:
    model = ReferenceModel(load_record(POCKET))
    model.load_tensors({name: tensor.float() for name, tensor in load_file(POCKET / "model.safetensors").items()})
    return model


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, quantized.QuantizedReference]:
    return {name: quantized.write(folder / name, name) for name in FP8}


@pytest.fixture(scope="module")
def small(folder: Path) -> ReferenceModel:
    """Two layers: what vLLM's compiler takes is their number times some seconds."""
    blocks = [checkpoints.deci_block(2, 48), checkpoints.deci_block(4, 80)]
    return checkpoints.write_checkpoint(folder / "small", checkpoints.deci_config(blocks))


def write_half_table(path: Path, models: Sequence[Path]) -> None:
    """A table in which ours is faster for few tokens, on a device that is this CPU."""
    records = [load_record(model) for model in models]
    sizes = {
        (block.ffn.intermediate_size, record.hidden_size)
        for record in records for layer in record.layers for block in layer.blocks
        if hasattr(block.ffn, "intermediate_size")
    }  # fmt: skip
    entries = [
        Entry(op, kind, m, *shape, Config("skinny-16"), 9 if m <= OURS_UP_TO else 11, stock_us=10, fallback_us=10)
        for width, hidden in sorted(sizes)
        for op, shape in (("gate_up", (width, hidden)), ("down", (hidden, width)))
        for kind in KINDS
        for m in (OURS_UP_TO, 8192)
    ]  # fmt: skip
    import triton

    write_table(path / "ffn-cpu.json", Table("cpu", {"triton": triton.__version__}, tuple(entries)))


@pytest.fixture(scope="module")
def outcomes(
    folder: Path, references: dict[str, quantized.QuantizedReference], small: ReferenceModel
) -> tuple[dict[str, Any], str]:
    """All runs, in one process, and its log."""
    write_half_table(folder / "tables", [POCKET, folder / "fp8 static"])
    on, table = {FFN_KERNEL.variable: "on"}, {"table": str(folder / "tables")}
    jobs = Jobs(folder, runner=Path(__file__).with_name("ffn_run.py"))
    jobs.add("auto", POCKET, rounds=[parity.PROMPTS[:2]])
    jobs.add("on", POCKET, environment=on, describe_layers=True)
    # A run of as many tokens as fit a batch comes before the first request.
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}, "max_num_batched_tokens": 320}
    jobs.add("compiled", folder / "small", compiled, environment=on)
    jobs.add("auto, table", POCKET, **table)
    adapters = {"environment": on, "rounds": [parity.PROMPTS[:2]], "prompt_logprobs": None}
    jobs.add("adapters", POCKET, {"enable_lora": True}, **adapters)
    for name in FP8:
        llm = {"dtype": quantized.KINDS[name].dtype}
        jobs.add(name, folder / name, llm, environment=on, describe_layers=name in INSPECTED)
    jobs.add("off", folder / "modelopt fp8", {"dtype": "bfloat16"}, environment={FFN_KERNEL.variable: "off"})
    jobs.add("fp8 static, table", folder / "fp8 static", **table)
    return jobs.run(), jobs.log


def calls(outcomes: tuple[dict[str, Any], str], name: str) -> dict[str, int]:
    results = outcomes[0][name]
    assert isinstance(results, list), results
    return results[0]["calls"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on", "auto, table"])
def test_log_probabilities_are_the_references_on_every_path(
    outcomes: tuple[dict[str, Any], str], pocket: ReferenceModel, name: str
) -> None:
    assert_equal_to(pocket, outcomes[0][name])


@pytest.mark.slow
def test_a_compiled_model_gives_the_references_too(outcomes: tuple[dict[str, Any], str], small: ReferenceModel) -> None:
    assert_equal_to(small, outcomes[0]["compiled"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_ffns"), [("on", 7), ("compiled", 2)])
def test_on_computes_every_ffn_of_every_step_with_our_kernels(
    outcomes: tuple[dict[str, Any], str], name: str, num_ffns: int
) -> None:
    found = calls(outcomes, name)
    for op in ("gate_up", "down"):
        assert (
            found[f"{op} {NUM_PROMPT_TOKENS}"] % num_ffns == 0 and found[f"{op} {len(parity.PROMPTS)}"] >= 8 * num_ffns
        )
    assert f"FFN kernels: {num_ffns} of {num_ffns} layers" in outcomes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["off", "auto", "adapters"])
def test_vllms_path_is_kept_without_a_table_when_off_and_beside_adapters(
    outcomes: tuple[dict[str, Any], str], name: str
) -> None:
    assert calls(outcomes, name) == {}
    assert "--puzzle-ffn-kernel on: model.layers.0.mlp, model.layers.1.mlp" in outcomes[1]
    assert "keep vLLM's path: LoRA is enabled" in outcomes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto, table", "fp8 static, table"])
def test_the_table_decides_for_each_number_of_tokens(outcomes: tuple[dict[str, Any], str], name: str) -> None:
    tokens = {int(call.rpartition(" ")[2]) for call in calls(outcomes, name)}
    assert tokens and max(tokens) <= OURS_UP_TO, "prompts of 296 tokens are vLLM's, inside our operators"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8 static", "fp8 dynamic", "fp8 static, table"])
def test_fp8_layers_equal_the_reference_that_rounds_inputs(
    outcomes: tuple[dict[str, Any], str], references: dict[str, quantized.QuantizedReference], name: str
) -> None:
    assert calls(outcomes, name)
    assert_equal_up_to_flips(references[name.partition(",")[0]], outcomes[0][name])


@pytest.mark.slow
def test_fp8_in_bfloat16_is_as_accurate_as_vllms_own_path(
    outcomes: tuple[dict[str, Any], str], references: dict[str, quantized.QuantizedReference]
) -> None:
    """Both round one computation; over some 30,000 values the RMS of what rounding changes agrees within a tenth."""
    assert calls(outcomes, "modelopt fp8")
    ours, stock = (rms(errors(references["modelopt fp8"], outcomes[0][name])) for name in ("modelopt fp8", "off"))
    assert ours <= 1.1 * stock


@pytest.mark.slow
@pytest.mark.parametrize("name", INSPECTED)
def test_a_compiler_takes_each_operator_as_one_node(outcomes: tuple[dict[str, Any], str], name: str) -> None:
    found = outcomes[0][name][0]["layers"]
    for op in ("gate_up", "down"):
        assert set(found[op].values()) == {"SUCCESS"} and len(found[op]) >= 3
    assert found["compiled"] == [True] * 3
    assert found["hashes differ"], "vLLM would load a compiled model of another choice from its cache"
    # Two roundings more on one side; sums of 128 products differ by √128 · 2⁻²⁴. In FP8 a token's scale takes the row's
    # with it, but for flips between codes, 2⁻⁴ apart; a fixed scale does not.
    bounds = {"on": 4 * 128**0.5 * 2**-24, "fp8 dynamic": 2**-4}
    assert found["row scale error"] <= bounds.get(name, 1.0)


@pytest.mark.parametrize(
    "spelling", [["--puzzle-ffn-kernel", "off"], ["--puzzle-ffn-kernel=off"], ["--puzzle_ffn_kernel", "off"]]
)
def test_the_flag_goes_into_the_environment_and_not_to_vllm(
    monkeypatch: pytest.MonkeyPatch, spelling: list[str]
) -> None:
    monkeypatch.setenv(FFN_KERNEL.variable, "auto")
    assert take_kernel_flags(["model", *spelling, "--port", "1"]) == ["model", "--port", "1"]
    assert FFN_KERNEL.read() == "off"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--puzzle-ffn-kernel", "fast"], "flag --puzzle-ffn-kernel: found 'fast', allowed: auto, on, off"),
        (["--puzzle-ffn-kernel"], "flag --puzzle-ffn-kernel: found '', allowed: auto, on, off"),
        (["--puzzle-ffn-kernel=on"], "flag --puzzle-ffn-kernel: found on with a CPU build of vLLM, allowed: auto, off"),
    ],
)
def test_a_wrong_choice_is_one_line_before_vllm_is_imported(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.setenv(FFN_KERNEL.variable, "")
    monkeypatch.setattr(kernel_flags, "is_cpu_engine", lambda: True)
    with pytest.raises(ConfigError, match=message):
        serve.serve(argv)


def test_another_word_in_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FFN_KERNEL.variable, "yes")
    with pytest.raises(ConfigError, match="variable VLLM_PUZZLE_FFN_KERNEL: found 'yes', allowed: auto, on, off"):
        FFN_KERNEL.read()
