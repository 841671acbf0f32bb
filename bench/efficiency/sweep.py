"""Arms × loads in interleaved blocks, so that a drift of the machine hits all arms alike; goes on after a crash.

Blocks go there and back (A B B A A B …). In every arm a block asks the same questions in the same order with the same
arrivals. A block's run is a folder of its own and stays when its manifest says complete; what is found otherwise, an
invalid one too, is put aside and done again. Afterwards the blocks of each arm and load are pooled into one folder,
which is what `compare` and `report` read.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from vllm_puzzle.bench.efficiency.arm import Arm, Load
from vllm_puzzle.bench.efficiency.facts import Window
from vllm_puzzle.bench.efficiency.manifest import DISK_FULL, INVALID, RUNNING, read_manifest, write_manifest
from vllm_puzzle.bench.efficiency.progress import Progress
from vllm_puzzle.bench.efficiency.question import Ask, Question, work_list
from vllm_puzzle.bench.efficiency.record import RequestRecord, read_records
from vllm_puzzle.bench.efficiency.run import Setup, run_arm
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE, MANIFEST, REQUESTS
from vllm_puzzle.bench.efficiency.summary import JSON_NAME, Deployment, summary_of, write_summary
from vllm_puzzle.model_configs.schema import ConfigError

PLAN_NAME, BLOCKS = "sweep.json", "blocks"
SCHEMA_VERSION = 1
MIN_BLOCKS = 3  # below, the spread between blocks says nothing
RETRIES = 2
_BLOCK_STRIDE = 10_007  # between the seeds of blocks
# Statuses after which the next arm can run all the same.
_GOES_ON = (COMPLETE, INVALID)


@dataclass(frozen=True, slots=True)
class Setting:
    """One arm under one load, with its warm-up prompts and what serves it."""

    arm: Arm
    load: Load
    warm_up: tuple[Question, ...]
    deployment: Deployment = field(default_factory=Deployment)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm.name}@{self.load.name}".replace("/", "-")


@dataclass(frozen=True, slots=True)
class Plan:
    """settings: in the order of the first block. questions: `num_prompts` places per block are filled with them.
    is_split: each block asks its share of the places instead of all.
    """

    settings: tuple[Setting, ...]
    questions: tuple[Question, ...]
    num_prompts: int
    seed: int
    blocks: int
    is_split: bool = False

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"sweep, arms: found {twice} more than once, allowed: different labels")
        if not names or self.blocks < 1 or not self.questions:
            raise ConfigError("sweep: found nothing to do, allowed: arms, loads, questions and blocks")

    def asks(self, block: int) -> tuple[Ask, ...]:
        """The work list of a block, the same in every arm."""
        if self.is_split:
            share = work_list(self.questions, self.num_prompts, self.seed)[block :: self.blocks]
            return tuple(replace(ask, order=order) for order, ask in enumerate(share))
        asks = work_list(self.questions, self.num_prompts, self.seed_of(block))
        repeats = max(ask.repeat for ask in asks) + 1
        return tuple(replace(ask, repeat=ask.repeat + block * repeats) for ask in asks)

    def seed_of(self, block: int) -> int:
        """Of a block's order and arrivals."""
        return self.seed + block * _BLOCK_STRIDE

    def order(self, block: int) -> tuple[Setting, ...]:
        """There and back."""
        return self.settings if block % 2 == 0 else self.settings[::-1]

    def described(self) -> dict[str, Any]:
        """What a resumed sweep must agree with."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "sweep",
            "settings": [
                {"name": s.name, "arm": s.arm.described(), "load": asdict(s.load), "warm_up": len(s.warm_up)}
                for s in self.settings
            ],
            "questions": [question.digest for question in self.questions],
            "num_prompts": self.num_prompts,
            "seed": self.seed,
            "blocks": self.blocks,
            "is_split": self.is_split,
        }


async def run_sweep(
    plan: Plan, out: Path, transport: httpx.AsyncBaseTransport, setup: Setup, show: Progress, retries: int = RETRIES
) -> str:
    """Do what is left of it; returns `complete`, `invalid`, or why it ended early. Raises ConfigError.

    retries: how often a block is done again at once when the client was too slow to measure it.
    """
    _keep_plan(plan, out)
    statuses = {COMPLETE}
    for block in range(plan.blocks):
        for setting in plan.order(block):
            folder = out / setting.name / BLOCKS / str(block)
            show.label = f"block {block + 1}/{plan.blocks} {setting.name}"
            if _found(folder) == COMPLETE:
                show.skip(len(plan.asks(block)))
                continue
            status = await _run_block(plan, setting, block, folder, transport, setup, show)
            for _ in range(retries if status == INVALID else 0):
                show.total += len(plan.asks(block))
                status = await _run_block(plan, setting, block, folder, transport, setup, show)
                if status != INVALID:
                    break
            statuses.add(status)
            if status not in _GOES_ON:
                return _pooled(plan, out, status)
    return _pooled(plan, out, INVALID if INVALID in statuses else COMPLETE)


async def _run_block(
    plan: Plan,
    setting: Setting,
    block: int,
    folder: Path,
    transport: httpx.AsyncBaseTransport,
    setup: Setup,
    show: Progress,
) -> str:
    _put_aside(folder)
    options = replace(setup.options, block=block, on_record=show.add)
    mine = replace(setup, seed=plan.seed_of(block), options=options, deployment=setting.deployment)
    summary = await run_arm(setting.arm, setting.load, plan.asks(block), setting.warm_up, folder, transport, mine)
    if summary["status"] != COMPLETE:
        errors = [f"{times} times {error}" for error, times in summary["errors"].items()]
        found = [f"{setting.name}, block {block + 1}: {summary['status']}", *summary["invalid_because"], *errors]
        show.note("  ".join(found))
    return str(summary["status"])


def _pooled(plan: Plan, out: Path, status: str) -> str:
    """Pool each setting's finished blocks; how the sweep ended, in the end."""
    try:
        for setting in plan.settings:
            pool(out / setting.name, plan.blocks, setting.deployment)
    except OSError:
        return DISK_FULL
    return status


def pool(folder: Path, blocks: int, deployment: Deployment) -> None:
    """Records, facts and summary of all finished blocks in the setting's own folder. Nothing where none is finished.

    Raises OSError.
    """
    parts = [folder / BLOCKS / str(block) for block in range(blocks)]
    done = [part for part in parts if _found(part) in _GOES_ON]
    if not done:
        return
    manifests = [read_manifest(part) for part in done]
    records: list[RequestRecord] = []
    fresh = folder / (REQUESTS + ".new")
    with fresh.open("wb") as file:
        for part in done:
            with (part / REQUESTS).open("rb") as source:
                shutil.copyfileobj(source, file)
            records += read_records(part / REQUESTS)
    fresh.replace(folder / REQUESTS)
    windows = [Window(**window) for manifest in manifests for window in manifest["facts"]["windows"]]
    facts = deployment.facts(windows) if windows else None
    statuses = {manifest["status"] for manifest in manifests}
    status = RUNNING if len(done) < blocks else INVALID if INVALID in statuses else COMPLETE
    labels = [manifest["stationarity"] for manifest in manifests]
    ends = {
        "status": status,
        "block": None,
        "blocks": [manifest["block"] for manifest in manifests],
        **{key: sum(manifest[key] for manifest in manifests) for key in ("planned", "issued", "ended", "abandoned")},
        "invalid_because": [reason for manifest in manifests for reason in manifest["invalid_because"]],
        "errors": dict(sum((Counter(manifest["errors"]) for manifest in manifests), Counter())),
        "facts": facts.to_object() if facts is not None else {"windows": []},
        "is_steady": all(manifest["is_steady"] for manifest in manifests),
        "stationarity": labels,
    }
    write_manifest(folder, _common(manifests) | ends)
    summaries = [json.loads((part / JSON_NAME).read_text(encoding="utf-8")) for part in done]
    rest = {"arm": manifests[0]["arm"], "load": manifests[0]["load"]["name"], **ends}
    rest["by_block"] = [{key: s[key] for key in ("block", "client", "cache", "speculation")} for s in summaries]
    write_summary(folder, summary_of(records, facts, rest))


def _common(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first block's manifest; tasks are those of all blocks."""
    first = dict(manifests[0])
    if any(manifest["tasks"] != first["tasks"] for manifest in manifests):
        first["tasks"] = [task for manifest in manifests for task in manifest["tasks"]]
    return first


def _found(folder: Path) -> str | None:
    """Status of a block's run; None where there is none to be read."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        return str(read_manifest(folder)["status"])
    except ConfigError:
        return None


def _put_aside(folder: Path) -> None:
    """What is left of an attempt that did not come to its end stays, under another name."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.partial-{number}")).exists():
        number += 1
    folder.rename(aside)


def _keep_plan(plan: Plan, out: Path) -> None:
    """Raises ConfigError when the folder holds another sweep."""
    described = json.loads(json.dumps(plan.described()))
    file = out / PLAN_NAME
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        differing = sorted(key for key in described if found.get(key) != described[key])
        if differing:
            raise ConfigError(
                f"{out}: found a sweep with other {', '.join(differing)}, allowed: the same, or a new folder"
            )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: found {error.strerror}, allowed: a folder that can be written") from None
