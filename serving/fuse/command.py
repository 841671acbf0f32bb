"""`vllm-puzzle fuse plan`: flags, the run, the files."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from vllm_puzzle.model_configs.ffn_fusion import DEFAULT_CAP_BYTES, NORMS
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord

DTYPES = ("float32", "bfloat16")
SECONDS_BETWEEN_LINES = 10.0


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere in vllm-puzzle."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"fuse plan: found a command line where {message}, allowed: see --help")


def make_parser() -> argparse.ArgumentParser:
    """The flags of `fuse plan`; numbers are read later, so that a bad one is said in our words."""
    parser = _Parser(
        prog="vllm-puzzle fuse plan",
        allow_abbrev=False,
        description="Measure what each block of a model needs of each earlier one (FFN Fusion, arXiv 2503.18908), "
        "choose the FFNs to fuse, and print the flag for `vllm-puzzle serve`. On a CPU, one layer in memory at a time.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model directory")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="text to measure on: plain, or JSONL with text, messages or prompt"
    )
    parser.add_argument("--max-tokens", default="4096", help="tokens of it to use (default: 4096)")
    parser.add_argument("--sequence-length", default="1024", help="longest piece of text (default: 1024)")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16, faster and coarser")
    parser.add_argument(
        "--max-gib", default=f"{DEFAULT_CAP_BYTES / 2**30:g}", help="most GiB of one fused FFN (default: %(default)s)"
    )
    parser.add_argument("--norm", default="own", help="norm rule of the plan: own (default) or last")
    parser.add_argument("--tensor-parallel-size", default="1", help="GPUs that share a step, for the estimate")
    parser.add_argument("--bandwidth-gbs", help="memory bandwidth of one GPU in GB/s: adds an estimate")
    parser.add_argument("--launch-us", help="cost of one kernel launch in µs: adds an estimate")
    parser.add_argument("--all-reduce-us", help="cost of one all-reduce in µs: adds an estimate")
    parser.add_argument(
        "--matrix", type=Path, metavar="PLAN", help="take the matrix of an earlier plan instead of measuring"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("fusion-plan.json"), metavar="JSON",
        help="the file to write (default: fusion-plan.json); the heat map goes beside it as .png",
    )  # fmt: skip
    return parser


def fuse(argv: Sequence[str]) -> int:
    """Run `fuse plan …`; returns the exit status. Raises ConfigError for a user's mistake."""
    if argv and argv[0] in ("-h", "--help"):
        make_parser().print_help()
        return 0
    if not argv or argv[0] != "plan":
        raise ConfigError(f"fuse: found {repr(argv[0]) if argv else 'nothing'}, allowed: plan")
    return _plan(make_parser().parse_args(argv[1:]))


def _plan(options: argparse.Namespace) -> int:
    record, config = _read_model(options.model)
    _choice("--dtype", options.dtype, DTYPES)
    _choice("--norm", options.norm, NORMS)
    cap_bytes = int(_number("--max-gib", options.max_gib) * 2**30)
    if options.out.suffix != ".json" or not os.access(options.out.parent, os.W_OK):
        raise ConfigError(f"flag --out: found {options.out}, allowed: a .json file in a folder that can be written")
    # Late: torch and Pillow take a second, and every check above is done without them.
    from vllm_puzzle.serving.fuse.checkpoint import CheckpointTensors
    from vllm_puzzle.serving.fuse.heat_map import write_heat_map
    from vllm_puzzle.serving.fuse.plan import gain, plan
    from vllm_puzzle.serving.fuse.report import Report, format_report, read_matrix

    rates = _rates(options)
    checkpoint = CheckpointTensors(options.model, record, config)
    config_sha256 = hashlib.sha256((options.model / "config.json").read_bytes()).hexdigest()
    if options.matrix is not None:
        matrix, provenance = read_matrix(options.matrix, len(record.layers), config_sha256)
    else:
        matrix, provenance = _measure(options, record, checkpoint)
        provenance["config_sha256"] = config_sha256
    _check_finite(matrix)
    fusion = plan(record, matrix, cap_bytes, options.norm)
    counts = gain(record, fusion, checkpoint.stored_bytes)
    report = Report(record, matrix, fusion, options.norm, cap_bytes, counts, rates, provenance)
    options.out.write_text(json.dumps(report.to_json()) + "\n")
    picture = options.out.with_suffix(".png")
    groups = [ffn.layers for ffn in fusion.ffns]
    write_heat_map(picture, matrix, groups, f"{provenance['model']}, {provenance['num_tokens']:,} tokens")
    print(format_report(report))
    print(f"[vllm-puzzle] wrote {options.out} and {picture}", file=sys.stderr)
    return 0


def _measure(options: argparse.Namespace, record: ModelRecord, checkpoint: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    from vllm_puzzle.serving.fuse.checkpoint import LayerwiseModel
    from vllm_puzzle.serving.fuse.data import read_data
    from vllm_puzzle.serving.fuse.dependency import dependency_matrix
    from vllm_puzzle.serving.tokenizer_folder import load_tokenizer

    if options.data is None:
        raise ConfigError("flag --data: found nothing, allowed: a JSONL or text file (or --matrix PLAN)")
    max_tokens = _integer("--max-tokens", options.max_tokens, 1)
    length = min(_integer("--sequence-length", options.sequence_length, 2), record.max_position_embeddings)
    model = LayerwiseModel(record, checkpoint, getattr(torch, options.dtype))
    data = read_data(
        options.data, load_tokenizer(options.model, f"model {options.model}"), max_tokens, length, record.vocab_size
    )
    matrix = dependency_matrix(model, data.sequences, _progress())
    return matrix, {
        "model": options.model.resolve().name,
        "data": data.name,
        "data_sha256": data.sha256,
        "num_tokens": data.num_tokens,
        "num_sequences": len(data.sequences),
        "sequence_length": length,
        "dtype": options.dtype,
        "vllm_puzzle": metadata.version("vllm-puzzle"),
        "torch": torch.__version__,
    }


def _progress() -> Any:
    """A line on stderr now and then, with what is left at the pace so far; early layers are the quick ones."""
    started = last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            print(f"[vllm-puzzle {now - started:5.0f} s] layer pass {done} of {total}", file=sys.stderr, flush=True)

    return say


def _read_model(folder: Path) -> tuple[ModelRecord, dict[str, Any]]:
    if not folder.is_dir():
        raise ConfigError(f"model {folder}: found no such directory, allowed: a model directory")
    config = read_object(folder / "config.json")
    return read_model(config), config


def _check_finite(matrix: Any) -> None:
    for i, row in enumerate(matrix):
        for j, distance in enumerate(row):
            if distance is not None and not math.isfinite(distance):
                raise ConfigError(f"layer {j} without layer {i}: found the distance {distance}, allowed: a number")


def _rates(options: argparse.Namespace) -> Any:
    from vllm_puzzle.serving.fuse.plan import Rates

    size = _integer("--tensor-parallel-size", options.tensor_parallel_size, 1)
    given = {
        name: None if getattr(options, name) is None else _number(f"--{name.replace('_', '-')}", getattr(options, name))
        for name in ("bandwidth_gbs", "launch_us", "all_reduce_us")
    }
    if given["all_reduce_us"] is not None and size == 1:
        raise ConfigError("flag --all-reduce-us: found with one GPU, allowed: beside --tensor-parallel-size 2 or more")
    return Rates(size, **given)


def _choice(flag: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"flag {flag}: found {value!r}, allowed: {', '.join(allowed)}")


def _integer(flag: str, value: str, minimum: int) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) < minimum:
        raise ConfigError(f"flag {flag}: found {value!r}, allowed: an integer of at least {minimum}")
    return int(value)


def _number(flag: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"flag {flag}: found {value!r}, allowed: a number above 0")
    return number
