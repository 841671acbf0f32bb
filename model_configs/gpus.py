"""GPUs by name: the memory that vLLM takes its share of. Standard library only.

What counts is the total that the driver gives programs (`torch.cuda.mem_get_info`), 0.5 to 5 GiB less than what
`nvidia-smi` shows (81,559 MiB for an H100, 143,771 for an H200, 183,359 for a B200): the driver keeps the rest. It
differs a little between drivers; the figures are those of torch's `_CudaDeviceProperties` and of its out-of-memory
messages ("has a total capacity of …") in public logs, the smaller where there are two.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card.

    memory_bytes: what torch reports as its total. mxfp4_multiples: what the hidden size and the width of MXFP4 experts
    are rounded up to on it (vLLM 0.32, fused_moe/oracle/mxfp4.py: Triton's kernels on Hopper pad the width only,
    Marlin's on older cards and TRT-LLM's on Blackwell both).
    """

    name: str
    memory_bytes: int
    mxfp4_multiples: tuple[int, int] = (256, 128)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("L40S-48", int(44.39 * GIB)),
        Gpu("A100-80", int(79.14 * GIB)),
        Gpu("H100-80", 81_090 * MIB, mxfp4_multiples=(1, 64)),
        Gpu("H200-141", 143_156 * MIB, mxfp4_multiples=(1, 64)),
        Gpu("B200-192", 182_631 * MIB),
    )
}
