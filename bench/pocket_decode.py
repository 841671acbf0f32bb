"""The pocket models in training and evaluation: ReferenceModel with faster attention, and batched greedy decoding.

Same parameters and same mathematics as the reference (a test compares them); only the attention and the norm call
PyTorch's fused functions, and decoding keeps keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm_puzzle.bench.pocket_tasks import Item, is_correct
from vllm_puzzle.bench.pocket_tokenizer import END, END_THINK, PAD, decode, encode, render
from vllm_puzzle.model_configs.schema import Attention, LayerRecord, ModelRecord
from vllm_puzzle.serving.reference_model import ReferenceModel

MAX_NEW_TOKENS = 160


class PocketModel(ReferenceModel):
    """ReferenceModel for [B, T] batches padded on the right; between `start` and `stop` it caches keys and values."""

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(record)
        self._cache: dict[str, tuple[Tensor, Tensor]] | None = None
        self._key_is_real = torch.empty(0, dtype=torch.bool)  # [B, T], the left padding of a cached batch is False
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self, key_is_real: Tensor) -> None:
        """Begin cached decoding of a batch padded on the left. key_is_real: [B, T] bool."""
        self._cache, self._key_is_real = {}, key_is_real

    def stop(self) -> None:
        """Forget the cache."""
        self._cache = None

    def extend(self, key_is_real: Tensor) -> None:
        """Add the columns of the next cached call. key_is_real: [B, new] bool."""
        self._key_is_real = torch.cat((self._key_is_real, key_is_real), dim=1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self._tensor(name), self.record.rms_norm_eps)

    def attention_block(self, prefix: str, record: LayerRecord, hidden: Tensor) -> Tensor:
        """As in the reference. hidden: [B, T, hidden_size] → the same shape."""
        spec = record.attention
        if not isinstance(spec, Attention):
            return super().attention_block(prefix, record, hidden)
        x = self._norm(hidden, f"{prefix}.input_layernorm.weight")
        heads = ((spec.num_heads, "q"), (spec.num_kv_heads, "k"), (spec.num_kv_heads, "v"))
        q, k, v = (
            self._project(x, f"{prefix}.self_attn.{name}_proj").unflatten(-1, (count, spec.head_dim)).transpose(1, 2)
            for count, name in heads
        )
        past = self._cache[prefix][0].shape[2] if self._cache and prefix in self._cache else 0
        q, k = self._rotate(q, past), self._rotate(k, past)
        if self._cache is not None:
            if prefix in self._cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self._cache[prefix], (k, v), strict=True))
            self._cache[prefix] = (k, v)
        group = spec.num_heads // spec.num_kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mask = self._mask(x.shape[1], past, spec.sliding_window)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self._project(out.transpose(1, 2).flatten(-2), f"{prefix}.self_attn.o_proj")

    def _mask(self, num_queries: int, past: int, window: int | None) -> Tensor | None:
        """True where a key is seen: [T, past + T], or [B, 1, T, past + T] while caching; None: plain causal."""
        if self._cache is None and window is None:
            return None
        queries, keys = torch.arange(past, past + num_queries), torch.arange(past + num_queries)
        distance = queries[:, None] - keys[None, :]
        seen = (distance >= 0) & (distance < (window or past + num_queries))
        if self._cache is None:
            return seen
        # A padding query sees itself, or its softmax would have nothing to sum.
        return (seen & self._key_is_real[:, None, None, :]) | (distance == 0)

    def _rotate(self, x: Tensor, past: int) -> Tensor:
        """Rotary positions past, past + 1, … x: [B, H, T, D] → the same shape."""
        head_dim, num_tokens = x.shape[-1], x.shape[-2]
        if head_dim not in self._tables:
            positions = torch.arange(self.record.max_position_embeddings).float()
            angles = positions[:, None] * self._frequencies(head_dim)[0][None, :]
            self._tables[head_dim] = (angles.cos(), angles.sin())
        cos, sin = (table[past : past + num_tokens] for table in self._tables[head_dim])
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@torch.no_grad()
def greedy(model: PocketModel, prompts: list[list[int]], max_new_tokens: int = MAX_NEW_TOKENS) -> list[list[int]]:
    """Greedy continuations of a batch of prompts (token ids), without the final <|end|>."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    is_open = torch.ones(len(prompts), dtype=torch.bool)
    columns: list[Tensor] = []
    model.start(ids != PAD)
    for _ in range(max_new_tokens):
        hidden = model.embed(ids)
        for index in range(len(model.record.layers)):
            hidden = model.layer(index, hidden)
        token = model.logits(hidden[:, -1]).argmax(-1)
        token = torch.where(is_open, token, END)
        columns.append(token)
        is_open &= token != END
        if not is_open.any():
            break
        ids = token[:, None]
        model.extend(torch.ones_like(ids, dtype=torch.bool))
    model.stop()
    return [row[: row.index(END)] if END in row else row for row in torch.stack(columns, 1).tolist()]


def answer(tokens: list[int], thinking: bool) -> str:
    """The content of a reply: what follows `</think>`; empty when a thought never ends."""
    if not thinking:
        return decode(tokens)
    return decode(tokens[tokens.index(END_THINK) + 1 :]) if END_THINK in tokens else ""


def accuracy(model: PocketModel, items: list[Item], thinking: bool, batch: int = 128) -> dict[str, float]:
    """Share of right answers by task, over all (`all`) and by rung (`task/level`), decoded greedily."""
    order = sorted(items, key=lambda item: len(item.thought) + len(item.question))
    hits: dict[str, list[bool]] = {"all": []}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        prompts = [encode(render([("user", item.question)], thinking)) for item in part]
        for item, tokens in zip(part, greedy(model, prompts), strict=True):
            for key in ("all", item.task, f"{item.task}/{item.level}"):
                hits.setdefault(key, []).append(is_correct(item, answer(tokens, thinking)))
    return {key: sum(values) / len(values) for key, values in hits.items()}
