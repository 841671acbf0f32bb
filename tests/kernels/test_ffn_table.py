"""The table decides as measured, and says stock wherever it was not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import triton
from vllm_puzzle.kernels import ffn, ffn_table
from vllm_puzzle.kernels.ffn_table import KINDS, OPS, Config, Entry, Table, candidates, choose, default_config

DEVICE = "NVIDIA H100 80GB HBM3"
FAST, SPLIT, WIDE = Config("skinny-16"), Config("skinny-64", 4), Config("wide")


def entry(m: int, config: Config, ours: float, n: int = 5632, k: int = 8192, fallback: float = 100) -> Entry:
    return Entry("gate_up", "bf16", m, n, k, config, ours, 100, fallback)


TABLE = Table(
    DEVICE,
    {"triton": triton.__version__},
    (
        *(entry(m, *rest) for m, *rest in ((1, FAST, 80), (16, SPLIT, 97), (64, WIDE, 99), (256, WIDE, 120))),
        *(entry(m, *rest, n=17920) for m, *rest in ((1, SPLIT, 90), (16, SPLIT, 96))),
    ),
)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ffn_table, "FOLDER", tmp_path)
    ffn_table.table_of.cache_clear()
    ffn_table.write_table(ffn_table.table_path(DEVICE), TABLE)
    yield tmp_path
    ffn_table.table_of.cache_clear()


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (1, 5632, 8192, FAST),
        (2, 5632, 8192, SPLIT),  # the next larger M
        (16, 5632, 8192, SPLIT),
        (17, 5632, 8192, None),  # measured at 0.99 of stock: too close
        (200, 5632, 8192, None),  # slower than stock
        (257, 5632, 8192, None),  # more tokens than measured
        (1, 7168, 8192, FAST),  # a neighbour, by a factor of 1.27
        (16, 7168, 8192, None),  # a neighbour must gain more
        (1, 8500, 8192, None),  # too far from both
        (1, 16000, 8192, SPLIT),
        (1, 5632, 4096, None),
    ],
)
def test_it_takes_the_next_larger_m_of_the_nearest_shape_where_ours_was_faster(
    shipped: Path, m: int, n: int, k: int, expected: Config | None
) -> None:
    assert choose("gate_up", DEVICE, "bf16", m, n, k) == expected


@pytest.mark.parametrize(
    ("op", "device", "kind"),
    [("down", DEVICE, "bf16"), ("gate_up", "NVIDIA H200", "bf16"), ("gate_up", DEVICE, "fp8"), ("gate_up", "", "bf16")],
)
def test_what_was_not_measured_is_stocks(shipped: Path, op: str, device: str, kind: str) -> None:
    assert choose(op, device, kind, 1, 5632, 8192) is None


def test_another_triton_is_not_the_one_measured(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = triton.__version__.split(".")[:2]
    monkeypatch.setattr(triton, "__version__", f"{major}.{minor}.99")
    assert choose("gate_up", DEVICE, "bf16", 1, 5632, 8192) == FAST
    ffn_table.table_of.cache_clear()
    monkeypatch.setattr(triton, "__version__", f"{major}.{int(minor) + 1}.0")
    assert choose("gate_up", DEVICE, "bf16", 1, 5632, 8192) is None


def test_a_layer_must_gain_somewhere_and_lose_nowhere() -> None:
    def layer(*fallbacks: float) -> Table:
        entries = [
            entry(m, FAST, 80 if m == 1 else 120, fallback=f) for m, f in zip((1, 16, 64), fallbacks, strict=True)
        ]
        return Table(DEVICE, {}, tuple(entries))

    assert layer(150, 100, 102).is_never_slower("gate_up", "bf16", 5632, 8192)
    assert not layer(100, 100, 103).is_never_slower("gate_up", "bf16", 5632, 8192), (
        "stock inside the operator is slower"
    )
    assert not layer(100, 100, 100).is_never_slower("down", "bf16", 5632, 8192)
    only_losses = Table(DEVICE, {}, (entry(1, FAST, 120), entry(16, FAST, 120)))
    assert not only_losses.is_never_slower("gate_up", "bf16", 5632, 8192)


def test_a_table_is_read_as_it_was_written(shipped: Path) -> None:
    (path,) = shipped.iterdir()
    assert path.name == "ffn-nvidia-h100-80gb-hbm3.json"
    assert ffn_table.read_table(path) == TABLE


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("op", "up", "entry 0, op: found 'up', allowed: gate_up, down"),
        ("kind", None, "entry 0, kind: found None, allowed: bf16, fp8, fp8-token, fp8-block"),
        ("tile", "huge", "entry 0, tile: found 'huge', allowed: skinny-16"),
        ("speed", 3, "entry 0: .*unexpected keyword argument 'speed'"),
    ],
)
def test_a_wrong_entry_is_named(shipped: Path, key: str, value: object, message: str) -> None:
    (path,) = shipped.iterdir()
    document = json.loads(path.read_text())
    document["entries"][0][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        ffn_table.read_table(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="found no 'device', allowed: device, versions and entries"):
        ffn_table.read_table(path)


def test_every_default_and_every_candidate_can_be_launched() -> None:
    """On aligned matrices of the published widths and their shards, and on narrow ones."""
    widths, sizes = (704, 2816, 5632, 7168, 17920, 37632, 301056, 425984, 176), (64, 4096, 16384)
    for op, kind, m, width, size in itertools.product(OPS, KINDS, (1, 16, 17, 64, 65, 300, 8192), widths, sizes):
        n, k = (width, size) if op == "gate_up" else (size, width)
        found = default_config(op, kind, m, n, k, num_sms=132)
        assert 1 <= found.splits <= min(ffn_table.MAX_SPLITS, max(1, -(-k // 128)))
        assert found.splits == 1 or m <= ffn_table.MAX_SPLIT_TOKENS
        out = torch.float8_e4m3fn if (op, kind) == ("gate_up", "fp8") else torch.bfloat16
        x, weight = (
            torch.empty(rows, k, dtype=torch.bfloat16, device="meta") for rows in (m, n * (1 + (op == "gate_up")))
        )
        if kind != "bf16":
            x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        assert ffn.is_usable(ffn.default_for(x, weight, op == "gate_up", out, kind), x, weight, op == "gate_up", out)
        for config in candidates(op, kind, m, k):
            assert ffn.is_usable(config, x, weight, op == "gate_up", out) or config.tile == "wide-exact"


def test_shipped_tables_read_and_name_their_device() -> None:
    for path in ffn_table.FOLDER.glob("ffn-*.json"):
        table = ffn_table.read_table(path)
        assert ffn_table.table_path(table.device) == path
        assert {"torch", "triton", "cuda"} <= set(table.versions) and table.entries
