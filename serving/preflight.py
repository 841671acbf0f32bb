"""Checks before vLLM is imported, so that a mistake costs a second and one line, never a half-started server."""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.ffn_fusion import KEY, PLACE, FusionPlan, fuse, read_fusion, requested_plan
from vllm_puzzle.model_configs.formats import FAMILIES, is_described, read_model
from vllm_puzzle.model_configs.fused_tensors import SAME, Place, fuse_quantization, places, unequal
from vllm_puzzle.model_configs.json_values import mapping, read_object, shown
from vllm_puzzle.model_configs.quantization import check_cpu_kernels
from vllm_puzzle.model_configs.quantization_formats import LEGACY_FILE, load_quantization, quantization_entry
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, check_tensor_parallel
from vllm_puzzle.serving.cpu_defaults import has_exact_int8, has_packed_int, is_cpu_engine
from vllm_puzzle.serving.fusion_flags import asked_fusion
from vllm_puzzle.serving.overrides import DISABLE_OVERRIDES, keeps_stock
from vllm_puzzle.serving.servable import check_servable, is_ours
from vllm_puzzle.serving.weights import TensorAccount, WeightsError

POCKET = Path(__file__).resolve().parent.parent / "model_configs" / "pocket"
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for, as far as it can be checked without vLLM."""

    model: str
    host: str
    port: int
    dtype: str
    tokenizer: str | None
    load_format: str
    num_ranks: int
    num_stages: int
    tensor_parallel_size: int
    is_expert_parallel: bool
    needs_tokenizer: bool
    fusion: Any = None  # of --puzzle-ffn-fusion; see model_configs/ffn_fusion.py
    hf_overrides: str | None = None

    @property
    def is_single_process(self) -> bool:
        """Whether one worker does all the work (no tensor, pipeline or data parallelism)."""
        return self.num_ranks == 1

    @property
    def defaults(self) -> dict[str, Any]:
        """vLLM flags that follow from the model: the served name of the packaged models, a reasoning parser."""
        path = Path(self.model)
        found: dict[str, Any] = {}
        if path.parent == POCKET:
            found["served_model_name"] = [f"pocket-{path.name}"]
        if _thinks(path):
            found["reasoning_parser"] = "nemotron_v3"
        return found


def read_request(argv: Sequence[str], fusion: Any = None) -> Request:
    """Read the few flags that are checked here; all others are vLLM's business. `fusion` is what take_fusion took."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokenizer")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--hf-overrides")
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--enable-expert-parallel", "-ep", action="store_true")
    for size in ("tensor", "pipeline", "data"):
        parser.add_argument(f"--{size}-parallel-size", f"-{size[0]}p", default="1")
    # The model comes first, as in `vllm serve MODEL`; a later bare word may be the value of a flag we do not know.
    has_model = bool(argv) and not argv[0].startswith("-")
    flags = [dashed(argument) for argument in (argv[1:] if has_model else argv)]
    found, _ = parser.parse_known_args(_config_file_flags(flags) + flags)
    sizes = [
        _integer(f"--{s}-parallel-size", getattr(found, f"{s}_parallel_size"), 1)
        for s in ("tensor", "pipeline", "data")
    ]
    return Request(
        model=argv[0] if has_model else found.model or str(POCKET / "puzzle"),
        host=found.host,
        port=_integer("--port", found.port, 0),
        dtype=found.dtype,
        tokenizer=found.tokenizer,
        load_format=found.load_format,
        num_ranks=sizes[0] * sizes[1] * sizes[2],
        num_stages=sizes[1],
        tensor_parallel_size=sizes[0],
        is_expert_parallel=found.enable_expert_parallel,
        needs_tokenizer=not found.skip_tokenizer_init,
        fusion=fusion,
        hf_overrides=found.hf_overrides,
    )


def check(request: Request) -> ModelRecord | None:
    """Everything that can be known now. Returns the record that is served where the configuration is one we read."""
    if request.dtype not in DTYPES:
        raise ConfigError(f"flag --dtype: found {request.dtype!r}, allowed: {', '.join(DTYPES)}")
    _check_port(request.host, request.port)
    path = Path(request.model)
    if not path.is_dir():
        if _is_hub_name(request.model):
            _check_hub(request.model)
            if request.fusion is not None:
                config = _hub_config(request.model)
                config[KEY] = request.fusion
                _read_plan(config, _read_record(config))
            return None
        raise ConfigError(f"model {request.model}: found no such directory, allowed: a model directory or a hub name")
    if not (path / "config.json").is_file():
        raise ConfigError(f"model {path}: found no config.json, allowed: a Hugging Face model directory")
    config = read_object(path / "config.json")
    config[KEY] = asked_fusion(request.fusion, request.hf_overrides, config)
    if request.needs_tokenizer and request.tokenizer is None:
        _check_tokenizer(path)
    record = _read_record(config)
    plan = _read_plan(config, record)
    served = record
    if record is not None:
        if is_ours(record):
            check_servable(record)
        served = fuse(record, plan)
        check_tensor_parallel(served, request.tensor_parallel_size, request.is_expert_parallel)
    if request.load_format in ("auto", "safetensors"):
        _check_weights(path, config, record, plan)
    return served


def check_with_transformers(request: Request) -> None:
    """What only transformers can tell, of a request that `check` has passed.

    Apart, because it imports torch: OpenMP reads the number of threads once, when torch loads it.
    """
    path = Path(request.model)
    if not path.is_dir():
        return
    config = read_object(path / "config.json")
    config[KEY] = asked_fusion(request.fusion, request.hf_overrides, config)
    record = _read_record(config)
    if record is not None and (is_described(config) or is_ours(record)):
        from vllm_puzzle.serving.hf_config import check_transformers_agrees  # late: transformers takes seconds

        check_transformers_agrees(config, record)


def _read_record(config: dict[str, Any]) -> ModelRecord | None:
    """The model's record; None where the file is not one of ours to judge: another family, or a homogeneous model with
    something that our readers do not know and vLLM's own class may.
    """
    if config.get("model_type") not in FAMILIES:
        return None
    try:
        return read_model(config)
    except ConfigError:
        if is_described(config):
            raise
        return None


def _read_plan(config: dict[str, Any], record: ModelRecord | None) -> FusionPlan:
    """What FFN Fusion will do, said in one line; an empty plan, and nothing said, when it is off."""
    if read_fusion(config[KEY]) is None:
        return FusionPlan()
    if record is None:
        found = shown(config.get("model_type"))
        raise ConfigError(f"{PLACE}: found on model_type {found}, allowed: off, or on one of {', '.join(FAMILIES)}")
    plan = requested_plan(record, config)
    if plan.ffns and keeps_stock():
        raise ConfigError(f"{PLACE}: found with {DISABLE_OVERRIDES}, allowed: off (vLLM's own class fuses nothing)")
    print(f"[vllm-puzzle]   {plan.sentence}", file=sys.stderr)
    return plan


def _config_file_flags(flags: Sequence[str]) -> list[str]:
    """The flags that `--config FILE` stands for; the command line's own come after them and win, as in vLLM."""
    import yaml

    if "--config" not in flags[:-1]:
        return []
    file = Path(flags[flags.index("--config") + 1])
    try:
        entries = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"flag --config: found {' '.join(str(error).split())}, allowed: a YAML file") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"flag --config: found a YAML {type(entries).__name__} in {file}, allowed: key: value lines")
    return [dashed(f"--{key}={value}") for key, value in entries.items() if isinstance(value, str | int)]


def dashed(argument: str) -> str:
    """A flag in vLLM's one spelling: `--max_model_len=9` → `--max-model-len=9`."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _integer(flag: str, text: str, minimum: int) -> int:
    if not text.isdigit() or int(text) < minimum:
        raise ConfigError(f"flag {flag}: found {text!r}, allowed: an integer of at least {minimum}")
    return int(text)


def _check_port(host: str, port: int) -> None:
    if port > 65535:
        raise ConfigError(f"flag --port: found {port}, allowed: 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(f"address {host}:{port}: found {reason!r}, allowed: a free port (--port)") from None


def _is_hub_name(model: str) -> bool:
    return model.count("/") <= 1 and not model.startswith((".", "/", "~")) and not os.path.exists(model)


def _check_hub(model: str) -> None:
    """Without network (HF_HUB_OFFLINE) a hub name works only from the local cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(model, "config.json"), str):
        raise ConfigError(
            f"model {model}: found no copy in the local cache and HF_HUB_OFFLINE is set, allowed: a model directory, "
            "a cached hub name, or network access"
        )


def _hub_config(model: str) -> dict[str, Any]:
    """A hub model's config.json, which vLLM will read too: a wish for fusion that it cannot have must not pass."""
    from huggingface_hub import hf_hub_download

    try:
        return read_object(Path(hf_hub_download(model, "config.json")))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model {model}: found {reason!r}, allowed: a hub model with a config.json") from None


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"model {path}: found no tokenizer, allowed: one of {', '.join(TOKENIZER_FILES)} "
            "(or --tokenizer, or --skip-tokenizer-init)"
        )


def _thinks(path: Path) -> bool:
    """Whether the model's own files name the thinking markers that the default reasoning parser reads."""
    files = (path / "tokenizer_config.json", path / "chat_template.jinja")
    return any("</think>" in file.read_text() for file in files if file.is_file())


def precision_limits(model: str) -> tuple[bool, bool]:
    """(whether vLLM serves the checkpoint in float32, whether it asks for an FP8 KV cache).

    Quantized ones run in 16 bits, compressed-tensors' alone in either unless packed; an FP8 cache needs 16 bits beside
    it.
    """
    path = Path(model)
    if not (path / "config.json").is_file():
        return True, False
    legacy = path / LEGACY_FILE
    entry = quantization_entry(read_object(path / "config.json")) or (read_object(legacy) if legacy.is_file() else {})
    body = mapping("quantization", entry, "quantization") or entry
    has_fp8_cache = bool(body.get("kv_cache_scheme") or body.get("kv_cache_quant_algo"))
    groups = [entry, *(entry.get("config_groups") or {}).values()] if entry else []
    is_packed = any(isinstance(group, dict) and group.get("format") == "pack-quantized" for group in groups)
    is_either = entry.get("quant_method") == "compressed-tensors" and not has_fp8_cache and not is_packed
    return not entry or is_either, has_fp8_cache


# --- weights -----------------------------------------------------------------------------------------------------


def _check_weights(path: Path, config: dict[str, Any], record: ModelRecord | None, plan: FusionPlan) -> None:
    """Headers of all safetensors files: whole, and (for the models our class serves) exactly the right tensors."""
    files = weight_files(path)
    account = quantization = None
    if record is not None and is_ours(record):
        quantization = load_quantization(record, path, config)
        if quantization is not None and is_cpu_engine():
            check_cpu_kernels(quantization, has_exact_int8, has_packed_int)
        if quantization is not None:
            fuse_quantization(plan, quantization)
        account = TensorAccount(record, quantization)
    for file in files:
        for name, entry in read_safetensors_header(file):
            if account is not None:
                account.see(name, tuple(entry["shape"]), entry["dtype"])
    if account is not None and record is not None:
        account.close()
        _check_shared_numbers(files, places(record, plan, quantization))


def _check_shared_numbers(files: Sequence[Path], table: Mapping[str, Place]) -> None:
    """Numbers that a fused FFN holds once must be the same in all its parts; their bytes are compared."""
    first: dict[str, bytes] = {}
    for file in files:
        for name, entry in read_safetensors_header(file) if table else ():
            place = table.get(name)
            if place is not None and place.join == SAME:
                begin, end = entry["data_offsets"]
                with file.open("rb") as stream:
                    stream.seek(8 + struct.unpack("<Q", stream.read(8))[0] + begin)
                    number = stream.read(end - begin)
                if number != first.setdefault(place.target, number):
                    raise unequal(place)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, none where its weights are in another format. Raises WeightsError."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            if not (path / name).is_file():
                raise WeightsError(f"{index}: found no file {name} beside it, allowed: every shard it names")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files and not any(path.glob("*.bin")) and not any(path.glob("*.pt")):
        raise WeightsError(f"model {path}: found no weights, allowed: *.safetensors (or --load-format dummy)")
    return files


def read_safetensors_header(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {dtype, shape, data_offsets}) of a safetensors file; raises WeightsError when it is cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise WeightsError(f"{file}: found {size} bytes, allowed: at least its header (the file is truncated)")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != needed:
        raise WeightsError(f"{file}: found {size} bytes, allowed: the {needed} that its header names (truncated?)")
    yield from header.items()
