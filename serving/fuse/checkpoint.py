"""A model folder for the plain-PyTorch reference: one layer in memory at a time, quantized weights dequantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm_puzzle.kernels.reference import mxfp4_dequantize
from vllm_puzzle.model_configs.json_values import Json
from vllm_puzzle.model_configs.quantization import Scheme
from vllm_puzzle.model_configs.quantization_formats import load_quantization
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.model_configs.tensors import model_tensors
from vllm_puzzle.serving.preflight import read_safetensors_header, weight_files
from vllm_puzzle.serving.reference_model import ReferenceModel
from vllm_puzzle.serving.weights import TensorAccount, WeightsError, place

SCALES = ("tensor", "channel", "row", "block", "block4d")


class CheckpointTensors:
    """The tensors of a folder under the record's names, each read from its file when it is asked for.

    `stored_bytes` has the size of every tensor in the files, scales included. Raises ConfigError where the files do not
    hold exactly the tensors that the configuration implies, and for packed weights, which nothing here can unpack.
    """

    def __init__(self, folder: Path, record: ModelRecord, config: Json) -> None:
        self.record = record
        quantization = load_quantization(record, folder, config)
        self._schemes = quantization.schemes if quantization is not None else {}
        for module, scheme in self._schemes.items():
            if scheme.packing > 1 or scheme.has_zero_points or scheme.scale not in SCALES:
                raise ConfigError(
                    f"{place(module + '.weight')}: found {scheme.name}, allowed: unquantized, FP8 or INT8 with one "
                    "scale per tensor, row or block, MXFP4 experts"
                )
        account = TensorAccount(record, quantization)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.stored_bytes: dict[str, int] = {}
        files = weight_files(folder)
        if not files:
            raise WeightsError(f"model {folder}: found no safetensors file, allowed: *.safetensors")
        for file in files:
            for name, entry in read_safetensors_header(file):
                if account.see(name, tuple(entry["shape"]), entry["dtype"]):
                    start, end = entry["data_offsets"]
                    self._files[name], self.stored_bytes[name] = file, end - start
        account.close()

    def read(self, name: str) -> Tensor:
        """One tensor of `model_tensors(record)`, dequantized; plain ones in the dtype of the file."""
        if name not in self._files and f"{name}_blocks" in self._files:
            blocks, scales = self._stored(f"{name}_blocks"), self._stored(f"{name}_scales")
            return mxfp4_dequantize(blocks, scales, torch.bfloat16).transpose(1, 2)
        module = name.removesuffix(".weight")
        scheme = self._schemes.get(module)
        if scheme is None:
            return self._stored(name)
        return dequantize(self._stored(name), self._stored(f"{module}.weight_scale"), scheme)

    def _stored(self, name: str) -> Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file].get_tensor(name)


def dequantize(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """What 8-bit values stand for, in float32. weight: [out, in]; scale: the layouts of `Scheme.scale`."""
    scale = scale.float()
    if scheme.scale in ("tensor", "channel", "row"):
        return weight.float() * (scale[:, None] if scheme.scale == "row" else scale)
    blocks = scale.reshape(scale.shape[0], -1)  # [out / group, in / group], with or without two axes of one between
    full = blocks.repeat_interleave(scheme.group_size, 0).repeat_interleave(scheme.group_size, 1)
    return weight.float() * full[: weight.shape[0], : weight.shape[1]]


class LayerwiseModel(ReferenceModel):
    """The reference whose tensors are in memory only inside `loaded`; computes in `dtype`."""

    def __init__(self, record: ModelRecord, checkpoint: CheckpointTensors, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            super().__init__(record, dtype)
        self.requires_grad_(False)
        self._checkpoint, self._dtype = checkpoint, dtype

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Inside it, the tensors of these names are there."""
        keys = {name: name.replace(".", "/") for name in names}
        empty = {key: self.tensors[key] for key in keys.values()}
        for name, key in keys.items():
            tensor = self._checkpoint.read(name).to(self._dtype)
            self.tensors[key] = nn.Parameter(tensor, requires_grad=False)
        try:
            yield
        finally:
            for key, tensor in empty.items():
                self.tensors[key] = tensor

    def layer_names(self) -> list[list[str]]:
        """The names of each layer's tensors, in layer order; an empty layer has none."""
        names: list[list[str]] = [[] for _ in self.record.layers]
        for name in model_tensors(self.record):
            if name.startswith("model.layers."):
                names[int(name.split(".")[2])].append(name)
        return names
