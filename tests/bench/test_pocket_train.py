"""The pocket recipe: tokenizer, template, batches, decoding, training that resumes, surgery, exported folders."""

import json
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from vllm_puzzle.bench import pocket_train
from vllm_puzzle.bench.pocket_data import draw_sample, step_batches
from vllm_puzzle.bench.pocket_decode import PocketModel, answer, greedy
from vllm_puzzle.bench.pocket_export import PARENT, PUZZLE, config_of, export, load
from vllm_puzzle.bench.pocket_optim import orthogonalise
from vllm_puzzle.bench.pocket_surgery import derive, fit_linear, layer_inputs, pool_kv_heads
from vllm_puzzle.bench.pocket_tokenizer import END_THINK, decode, encode, render, write_tokenizer
from vllm_puzzle.model_configs.schema import Attention, GatedFFN, LinearMap
from vllm_puzzle.serving.reference_model import ReferenceModel

PLAN = pocket_train.Plan(steps=4, step_tokens=256, lr=0.005, seed=0, probe_every=1000, checkpoint_seconds=1e9)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def parent() -> PocketModel:
    torch.manual_seed(1)
    model = PocketModel(PARENT)
    for tensor in model.named_tensors().values():
        if tensor.ndim == 2:
            tensor.data.mul_(4)  # far enough from zero for activations to differ
    return model


@pytest.mark.parametrize(
    "text", ["3+4-2", "Hello!", "naïve 日本 🙂\n\t", "<think>3+4=7</think>7<|end|>", "a<b>c </thin"]
)
def test_any_text_survives_the_tokenizer(tokenizer: AutoTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == encode(text)
    assert tokenizer.decode(ids) == text == decode(ids)


def test_the_think_marks_are_single_tokens_that_decoding_keeps(tokenizer: AutoTokenizer) -> None:
    ids = tokenizer.encode("<think>1</think>2<|end|>", add_special_tokens=False)
    assert len(ids) == 5
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>2"


TURNS = [
    [("user", "3+4-2")],
    [("system", "Be brief."), ("user", "hi")],
    [("user", "3+4"), ("assistant", "7"), ("user", "7-2?")],
]


@pytest.mark.parametrize(("turns", "thinking"), list(product(TURNS, (True, False))))
def test_training_text_equals_the_chat_template(
    tokenizer: AutoTokenizer, turns: list[tuple[str, str]], thinking: bool
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert rendered == render(turns, thinking)


ON, OFF = "<|user|>hi<|end|><|assistant|><think>", "<|user|>hi<|end|><|assistant|><think></think>"


@pytest.mark.parametrize(
    ("system", "switch", "expected"),
    [
        (None, {}, ON),
        ("", {}, ON),
        ("detailed thinking off", {}, OFF),
        (" Detailed Thinking OFF ", {}, OFF),
        ("detailed thinking on", {}, ON),
        ("detailed thinking off", {"enable_thinking": None}, OFF),
        ("detailed thinking off", {"enable_thinking": True}, ON),
        ("detailed thinking on", {"enable_thinking": False}, OFF),
        ("Be brief.\ndetailed thinking off", {}, "<|system|>Be brief.<|end|>" + OFF),
        ("never use detailed thinking off", {}, "<|system|>never use detailed thinking off<|end|>" + ON),
    ],
)
def test_the_keyword_outranks_the_system_line_which_outranks_the_default(
    tokenizer: AutoTokenizer, system: str | None, switch: dict[str, bool | None], expected: str
) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": "hi"})
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch) == expected


def test_history_keeps_only_what_followed_the_thought(tokenizer: AutoTokenizer) -> None:
    messages = [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "<think>3+4=7</think>7"}]
    expected = "<|user|>3+4<|end|><|assistant|><think></think>7<|end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_content_may_come_in_text_parts(tokenizer: AutoTokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ON


def test_an_unknown_role_is_refused(tokenizer: AutoTokenizer) -> None:
    with pytest.raises(Exception, match="role 'tool' is not supported"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_loss_covers_the_reply_but_not_the_end_of_a_cut_thought() -> None:
    rng, num_cut = Random(0), 0
    for sample in (draw_sample(rng, 1.0) for _ in range(300)):
        prompt_length = sample.is_target.index(True)
        prompt, reply = decode(sample.ids[:prompt_length]), decode(sample.ids[prompt_length:])
        left_out = [i for i, is_target in enumerate(sample.is_target) if not is_target and i >= prompt_length]
        if prompt.endswith("</think>") and not prompt.endswith("<think></think>"):
            pytest.fail(f"a thought in the prompt: {prompt}")
        assert reply.endswith("<|end|>") and len(left_out) <= 1
        assert all(sample.ids[i] == END_THINK for i in left_out)
        num_cut += len(left_out)
    assert 10 < num_cut < 100


@pytest.mark.parametrize("record", [PARENT, PUZZLE], ids=["parent", "puzzle"])
def test_the_faster_model_equals_the_reference(record: object) -> None:
    torch.manual_seed(0)
    fast = PocketModel(record)  # type: ignore[arg-type]
    slow = ReferenceModel(fast.record)
    slow.load_tensors(fast.named_tensors())
    ids = torch.randint(0, 263, (3, 50))
    torch.testing.assert_close(fast(ids), slow(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("record", [PARENT, PUZZLE], ids=["parent", "puzzle"])
def test_cached_batched_decoding_equals_recomputing_each_prompt_alone(record: object) -> None:
    torch.manual_seed(2)
    model = PocketModel(record)  # type: ignore[arg-type]
    prompts = [encode("3+4"), encode("What is 7*8? " * 4), encode("sort 3 1 2")]
    replies = greedy(model, prompts, max_new_tokens=12)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = list(prompt)
        for _ in range(len(reply)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert reply == ids[len(prompt) :]


def test_a_thought_without_an_end_has_no_answer() -> None:
    assert answer(encode("3+4=7"), thinking=True) == ""
    assert answer(encode("3+4=7</think>7"), thinking=True) == "7"
    assert answer(encode("7"), thinking=False) == "7"


def test_newton_schulz_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 48), (2, 48, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_an_interrupted_run_that_resumes_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = pocket_train.make_trainer("parent", PLAN, tmp_path)
    for _ in range(4):
        whole.train_step()
    first = pocket_train.make_trainer("parent", PLAN, tmp_path)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "run" / "checkpoint.pt")
    second = pocket_train.make_trainer("parent", PLAN, tmp_path)
    pocket_train.train(second, tmp_path / "run", tmp_path / "out")
    assert second.step == 4 and second.tokens == whole.tokens
    for name, tensor in whole.model.named_tensors().items():
        assert tensor.equal(second.model.named_tensors()[name]), name


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = pocket_train.make_trainer("parent", PLAN, tmp_path)
    losses = [trainer.train_step() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_pooling_averages_the_heads_of_a_group() -> None:
    weight = torch.arange(4.0).repeat_interleave(32)[:, None].expand(128, 3)
    pooled = pool_kv_heads(weight.contiguous(), Attention(4, 2, 32))
    assert pooled.shape == (64, 3)
    assert pooled[:, 0].tolist() == [0.5] * 32 + [2.5] * 32


def test_surgery_makes_the_described_layers_from_the_parents(parent: PocketModel) -> None:
    sample = step_batches(0, 0, 1.0, 1024)
    child = derive(parent, PUZZLE, sample)
    own, source = child.named_tensors(), parent.named_tensors()
    layers = PUZZLE.layers
    assert own["model.layers.0.self_attn.k_proj.weight"].equal(source["model.layers.0.self_attn.k_proj.weight"])
    assert own["model.layers.0.mlp.up_proj.weight"].equal(source["model.layers.0.mlp.up_proj.weight"])
    for index, layer in enumerate(layers):
        if isinstance(layer.ffn, GatedFFN):
            kept = {tuple(row) for row in own[f"model.layers.{index}.mlp.gate_proj.weight"].tolist()}
            assert len(kept) == layer.ffn.intermediate_size
            assert kept <= {tuple(row) for row in source[f"model.layers.{index}.mlp.gate_proj.weight"].tolist()}
    assert not any(name.startswith("model.layers.5.") and "input_layernorm" in name for name in own)
    assert not any(name.startswith("model.layers.4.mlp") for name in own)


def test_the_linear_map_is_a_better_fit_than_leaving_the_attention_out(parent: PocketModel) -> None:
    sample = step_batches(0, 0, 1.0, 2048)
    inputs = layer_inputs(parent, sample)[3]
    matrix = fit_linear(parent, 3, inputs)
    wanted = torch.cat(
        [parent.attention_block("model.layers.3", PARENT.layers[3], hidden)[real] for hidden, real in inputs]
    )
    normed = torch.cat([parent._norm(hidden, "model.layers.3.input_layernorm.weight")[real] for hidden, real in inputs])
    assert (normed @ matrix.T - wanted).square().sum() < wanted.square().sum()


def test_the_puzzle_has_every_irregularity_it_is_there_to_show() -> None:
    attentions = [layer.attention for layer in PUZZLE.layers]
    live = [spec for spec in attentions if isinstance(spec, Attention)]
    assert {spec.num_kv_heads for spec in live} == {2, 4}
    assert any(spec.sliding_window for spec in live) and any(isinstance(spec, LinearMap) for spec in attentions)
    assert len({layer.ffn.intermediate_size for layer in PUZZLE.layers if isinstance(layer.ffn, GatedFFN)}) == 3
    assert any(layer.ffn is None for layer in PUZZLE.layers)
    assert [spec is None for spec in attentions][-3:] == [True] * 3


def test_distillation_runs_and_its_folder_loads_again(parent: PocketModel, tmp_path: Path) -> None:
    export(parent, tmp_path / "parent")
    trainer = pocket_train.make_trainer("puzzle", PLAN, tmp_path / "parent")
    assert trainer.train_step() > 0
    export(trainer.model, tmp_path / "child")
    loaded = load(tmp_path / "child").named_tensors()
    for name, tensor in trainer.model.named_tensors().items():
        assert loaded[name].equal(tensor.to(torch.bfloat16).float()), name


def test_the_smoke_command_leaves_a_complete_folder_and_reports_both_modes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pocket_train.main(["parent", "--smoke", "--out", str(tmp_path / "out"), "--run-dir", str(tmp_path / "run")])
    report = capsys.readouterr().out
    assert '"on"' in report and '"off"' in report
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_hugging_face_computes_the_exported_parent_alike(parent: PocketModel, tmp_path: Path) -> None:
    export(parent, tmp_path)
    # Not by AutoModel: a test before this one may have registered our configuration class for `llama`.
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 263, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load(tmp_path)(ids), rtol=1e-3, atol=1e-4)


def test_the_tokenizer_loads_from_the_puzzles_folder(parent: PocketModel, tmp_path: Path) -> None:
    export(PocketModel(PUZZLE), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("<think>7") == encode("<think>7")


def test_the_puzzles_configuration_spells_out_every_layer() -> None:
    config = json.loads(json.dumps(config_of(PUZZLE)))
    blocks = config["block_configs"]
    assert "auto_map" not in config and config["intermediate_size"] is None and config["num_key_value_heads"] is None
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [1, 2, 1, None, 2, None, None, None]
    assert [block["attention"]["window_length"] for block in blocks] == [None, None, 32] + [None] * 5
    assert [block["attention"]["replace_with_linear"] for block in blocks] == [False] * 3 + [True] + [False] * 4
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [384, 384, 256, 256, None, 384, 256, 128]
