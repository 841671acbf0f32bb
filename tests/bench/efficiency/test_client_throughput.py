"""The client keeps up: 2,000 streamed chunks/s on one core, stamped in time. Prints what was measured (-rP)."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass

from processes import served
from virtual_runs import question
from vllm_puzzle.bench.efficiency.account import to_record
from vllm_puzzle.bench.efficiency.arm import Arm
from vllm_puzzle.bench.efficiency.client import ask
from vllm_puzzle.bench.efficiency.lag import LagMonitor
from vllm_puzzle.bench.efficiency.mock_behaviour import ANSWER, FINISH, THINKING, Step
from vllm_puzzle.bench.efficiency.question import Ask
from vllm_puzzle.bench.efficiency.record import CORRECT, STEADY, RequestRecord
from vllm_puzzle.bench.efficiency.wire import WireTransport

STREAMS, GAP_S, TOKENS = 50, 0.025, 120  # 2,000 chunks/s for 3 s
START_S = 0.005  # from one stream's start to the next's
RATE = STREAMS / GAP_S
SCRIPT = [Step(GAP_S, THINKING, "t ", 1)] * (TOKENS - 1) + [Step(GAP_S, ANSWER, "ok", 2), Step(0.0, FINISH, "stop", 1)]


@dataclass
class Measured:
    """rate: chunks per second while all streams run, from the stamps."""

    chunks: int
    rate: float
    cpu_s: float
    lag: LagMonitor


async def stream(url: str) -> Measured:
    """All streams at once, read and booked as a run does, after one request of each to open the connections."""
    loop = asyncio.get_running_loop()
    transport, arm = WireTransport(loop.time), Arm("arm", url, "mock")
    warm, asked = question("w", SCRIPT[-2:]), question("q", SCRIPT)

    async def one(number: int) -> RequestRecord:
        await asyncio.sleep(number * START_S)
        reply = await ask(transport, arm, asked, loop.time)
        return to_record(reply, Ask(asked, 0, 0), arm, block=0, phase=STEADY, origin=0.0, scheduled=None)

    await asyncio.gather(*(ask(transport, arm, warm, loop.time) for _ in range(STREAMS)))
    gc.freeze()  # as a run does
    monitor = LagMonitor()
    monitor.start()
    used = time.process_time()
    records = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    cpu = time.process_time() - used
    monitor.stop()
    gc.unfreeze()
    await transport.aclose()
    chunks = sum(record.chunks for record in records)
    assert {record.outcome for record in records} == {CORRECT}
    assert {record.output_tokens for record in records} == {TOKENS + 2}
    spans = [record.last - record.first for record in records if record.last is not None and record.first is not None]
    rate = STREAMS * (TOKENS - 1) / (sum(spans) / len(spans))
    return Measured(chunks, rate, cpu, monitor)


def test_the_client_sustains_two_thousand_chunks_a_second_on_one_core() -> None:
    with served() as (url, _):
        found = asyncio.run(stream(url))
    per_chunk = found.cpu_s / found.chunks
    late = found.lag.quantile(0.99)
    assert late is not None
    print(
        f"{found.rate:.0f} chunks/s, {per_chunk * 1e6:.0f} µs of a core each (at most {1 / per_chunk:.0f} chunks/s), "
        f"event loop late by {late * 1000:.1f} ms at p99"
    )
    assert found.chunks == STREAMS * TOKENS
    # Time on the processor is this process's own, whatever else runs on the machine; one core is enough for the rate.
    assert per_chunk * RATE < 1.0
    # The wall clock is also the machine's and the mock's: half the rate is a client that failed, not a busy machine.
    assert found.rate > RATE / 2
