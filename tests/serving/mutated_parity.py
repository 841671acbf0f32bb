"""Accepted random edits of every format, served by vLLM in one process and compared with the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import checkpoints
import mutations
from parity import Jobs, assert_equal_to
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, MoE
from vllm_puzzle.model_configs.tensors import num_parameters
from vllm_puzzle.serving.reference_model import ReferenceModel
from vllm_puzzle.serving.servable import is_ours

# Of vLLM's CPU attention; other sizes are refused by it, on a CPU.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
MAX_PARAMETERS, MAX_LAYERS, MIN_LENGTH, MAX_LENGTH = 2_000_000, 16, 8, 96


def length(record: ModelRecord) -> int:
    """The longest sequence that vLLM lets this model have, or the test needs."""
    rope = record.rope
    own = record.max_position_embeddings
    if rope.rope_type == "yarn":
        own = min(own, int((rope.original_max_position_embeddings or 0) * (rope.factor or 1)))
    return min(own, MAX_LENGTH)


def runs_here(record: ModelRecord) -> bool:
    """Whether our class serves the model, small and with sizes that vLLM's CPU kernels have."""
    experts = [block.ffn for layer in record.layers for block in layer.blocks if isinstance(block.ffn, MoE)]
    return (
        is_ours(record)
        and num_parameters(record) <= MAX_PARAMETERS
        and len(record.layers) <= MAX_LAYERS
        and record.hidden_size % 32 == 0
        and length(record) >= MIN_LENGTH
        and all(moe.intermediate_size % 32 == 0 for moe in experts)
        and all(attention.head_dim in HEAD_SIZES for attention in record.attentions)
    )


def accepted_edits(config: dict[str, Any], seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was edited, configuration), each of another record than those before and the unedited one."""
    rng, seen = Random(seed), {mutations.serve_record(config)}
    while True:
        edited, note = mutations.mutate(config, rng)
        try:
            record = mutations.serve_record(edited)
        except ConfigError:
            continue
        if record not in seen and runs_here(record) and not edited.get("quantization_config"):
            seen.add(record)
            yield note, edited


def serve_edits(folder: Path, names: Iterable[str], count: int, seed: str) -> dict[str, tuple[ReferenceModel, Any]]:
    """Per edit its reference and vLLM's results: `count` edits of each of these formats, in one process."""
    jobs, references = Jobs(folder), {}
    for name in names:
        edits = accepted_edits(mutations.FORMATS[name], f"{seed}/{name}")
        for index in range(count):
            note, edited = next(edits)
            model = folder / f"{name}-{index}"
            reference = checkpoints.write_checkpoint(model, edited)
            limit, vocabulary = length(reference.record), reference.record.vocab_size
            rounds = [[[7 * i % vocabulary for i in range(n)] for n in (limit // 3, limit - 4)]]
            jobs.add(model.name, model, {"max_model_len": limit}, rounds=rounds, max_tokens=4)
            references[model.name] = (f"{name}: {note}", reference)
    outcomes = jobs.run()
    return {note: (reference, outcomes[name]) for name, (note, reference) in references.items()}


def unlike_reference(served: dict[str, tuple[ReferenceModel, Any]]) -> list[str]:
    """What was edited, and what went wrong, of each model that vLLM did not serve as the reference does."""
    wrong = []
    for note, (reference, results) in served.items():
        try:
            assert_equal_to(reference, results)
        except AssertionError as error:
            wrong.append(f"{note}: {str(error)[:3000]}")
    return wrong


def main(count: int) -> None:
    """Serve and compare `count` edits of every format, and say how many held."""
    for name in mutations.FORMATS:
        with TemporaryDirectory() as folder:
            served = serve_edits(Path(folder), [name], count, "long")
            wrong = unlike_reference(served)
        print(f"{name}: {len(served)} edited models served, {len(wrong)} unlike the reference", *wrong, flush=True)
