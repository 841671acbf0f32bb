"""Writing new tokens' K and V into a paged cache, rotated and quantised on the way: one launch.

The cache is vLLM's: K and V are two views of `[num_blocks, num_kv_heads, page_size, head_dim]` with any strides, the
last dimension contiguous (vLLM 0.32 keeps them as halves of one last axis). Slot s of a token is page s // page_size,
row s % page_size; slot −1 is padding. e4m3 caches hold x / scale, to nearest even, ±448 at most; a NaN stays one.
Others hold x as they are, and their scales are not looked at. Definitions: `reference.write_kv`, `rope_and_write_kv`.
"""

from __future__ import annotations

import triton
from torch import Tensor
from vllm_puzzle.kernels.cache_layout import as_e4m3, check, scale_step
from vllm_puzzle.kernels.kv_write_triton import UNFUSED, kv_write_kernel
from vllm_puzzle.kernels.variant import Variant

# 32 tokens by 32 dimensions of each half: 16-byte loads of 16-bit numbers in every lane of 4 warps, and a stored row
# of an e4m3 cache is one 32-byte sector.
BLOCK_T, BLOCK_D, NUM_WARPS = 32, 32, 4


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Store k and v as they are. k, v: [T, KH, D], strided as they like but for D; slot_mapping: [T] int64.

    k_scale, v_scale: float32 on the device, [1] or [KH]; required by an e4m3 cache (or uint8, read as e4m3).
    ValueError for tensors that do not fit each other.
    """
    _launch(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor,
) -> None:
    """Rotate q into `q_out`, rotate k, and store k and v; arguments as in `write_kv`.

    q, q_out: [T, H, D], positions: [T], cos_sin_cache: [max_position, D], the cosines of D / 2 angles before their
    sines. NeoX halves, in float32; k is quantised from float32. A token of slot −1 is not stored, its q still rotated.
    `q_out` may be q itself.
    """
    _launch(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, (q, q_out, positions, cos_sin_cache))


def _launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    rotation: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    k_cache, v_cache = as_e4m3(k_cache), as_e4m3(v_cache)
    quantises = check("KV write", k, v, k_cache, v_cache, k_scale, v_scale)
    num_tokens, num_kv_heads, head_dim = k.shape
    q, q_out, positions, cos_sin_cache = rotation or (None, None, None, None)
    strides = (0, 0, k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0, 0)
    num_heads = cos_sin_row = 0
    if q is not None and q_out is not None and cos_sin_cache is not None:
        if q.shape != q_out.shape or q.shape[0] != num_tokens or q.shape[2] != head_dim:
            raise ValueError(f"KV write, q: found {[*q.shape]} into {[*q_out.shape]}, allowed: two of [T, H, D] as k")
        if cos_sin_cache.shape[-1] != head_dim or q.stride(2) != 1 or q_out.stride(2) != 1:
            found = [*cos_sin_cache.shape], q.stride(2), q_out.stride(2)
            raise ValueError(f"KV write, rotation: found {found}, allowed: [max_position, {head_dim}], strides of 1")
        num_heads, cos_sin_row = q.shape[1], cos_sin_cache.stride(0)
        strides = (q.stride(0), q.stride(1), *strides[2:6], q_out.stride(0), q_out.stride(1))
    if num_tokens == 0:
        return
    half = head_dim // 2
    grid = (triton.cdiv(num_tokens, BLOCK_T), 2 * num_kv_heads + num_heads, triton.cdiv(half, BLOCK_D))
    kv_write_kernel[grid](
        q, k, v, q_out, k_cache, v_cache, slot_mapping, positions, cos_sin_cache,
        k_scale if quantises else None, v_scale if quantises else None,
        num_tokens, num_kv_heads, half, k_cache.shape[2], *strides, *k_cache.stride()[:3], *v_cache.stride()[:3],
        cos_sin_row, scale_step(k_scale), scale_step(v_scale),
        ROTATE=q is not None, QUANTISE=quantises, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, **UNFUSED,
    )  # fmt: skip


def variants() -> tuple[Variant, ...]:
    """With and without rotation, bfloat16 into e4m3. Other dtypes take the same program."""
    names = kv_write_kernel.arg_names
    pointers = dict.fromkeys(("q", "k", "v", "q_out", "cos_sin"), "*bf16") | {"k_cache": "*fp8e4nv"}
    pointers |= dict.fromkeys(("slots", "positions"), "*i64") | dict.fromkeys(("k_scale", "v_scale"), "*fp32")
    pointers["v_cache"] = pointers["k_cache"]
    constants = {"QUANTISE": True, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}
    numbers = [name for name in names if name not in pointers and not name.isupper()]
    # Head counts, tokens and steps of scales are anything; every stride and half a head are multiples of 16.
    odd = ("num_tokens", "num_kv_heads", "k_scale_step", "v_scale_step")
    found = []
    for rotates in (True, False):
        absent = () if rotates else ("q", "q_out", "positions", "cos_sin")
        signature = {name: pointers[name] for name in pointers if name not in absent} | dict.fromkeys(numbers, "i32")
        found.append(
            Variant(
                name=f"kv_write{'_rope' if rotates else ''}_bf16_e4m3",
                kernel=kv_write_kernel,
                signature=signature,
                constexprs=constants | {"ROTATE": rotates} | dict.fromkeys(absent),
                num_warps=NUM_WARPS,
                num_stages=3,
                aligned=tuple(name for name in signature if name not in odd),
                options=UNFUSED,
            )
        )
    return tuple(found)
