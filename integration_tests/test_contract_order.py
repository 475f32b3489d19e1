"""Order of service, deadlines and the bound of the queue, as the real engine keeps them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from executor_svc.backends.checking.runner import FakeOptions
from integration_tests.engine_client import Output
from integration_tests.stack import expected, prompt, stack

STEP: Final = FakeOptions(step_s=0.005)


def unix_ns(seconds: float) -> int:
    return time.time_ns() + int(seconds * 1e9)


async def test_class_then_slack_then_arrival(tmp_path: Path) -> None:
    async with stack(tmp_path, STEP, max_num_seqs=1) as system:
        client = system.client
        first = client.submit(prompt(1, 4), 10)
        await first.until(1)
        outputs = {
            "plain": client.submit(prompt(2, 4), 3),
            "a minute": client.submit(prompt(3, 4), 3, deadline_unix_ns=unix_ns(50)),
            "soon": client.submit(prompt(4, 4), 3, deadline_unix_ns=unix_ns(20)),
            "urgent": client.submit(prompt(5, 4), 3, priority=1),
        }
        ended: list[str] = []

        async def watch(name: str, output: Output) -> None:
            await output.finished()
            ended.append(name)

        await asyncio.gather(*(watch(name, output) for name, output in outputs.items()))
        assert ended == ["urgent", "soon", "a minute", "plain"]
        assert outputs["soon"].token_ids == expected(prompt(4, 4), 3)


async def test_a_deadline_that_passes_in_the_queue_costs_nothing(tmp_path: Path) -> None:
    async with stack(tmp_path, STEP, max_num_seqs=1) as system:
        client = system.client
        first = client.submit(prompt(1, 4), 40)
        await first.until(1)
        lost = client.submit(prompt(2, 4), 3, deadline_unix_ns=unix_ns(0.05))
        other = client.submit(prompt(3, 4), 3)
        assert (await lost.rejected()).reason == "DEADLINE_UNREACHABLE"
        assert not first.ended.is_set()
        await other.finished()
        shot = await client.idle()
        assert (shot.counters.num_expired, shot.counters.num_prompt_tokens) == (1, 12)
        plans = system.runner.plans
        assert sum(plan.new_rows.rows.size for plan in plans) == 2


async def test_prompt_tokens_that_wait_are_bounded(tmp_path: Path) -> None:
    async with stack(tmp_path, STEP, max_num_seqs=1, max_waiting_tokens=20) as system:
        client = system.client
        first = client.submit(prompt(1, 40), 20)  # nobody waits: any length is taken
        await first.until(1)
        kept = client.submit(prompt(2, 15), 2)
        refusal = await client.submit(prompt(3, 6), 2).rejected()
        assert (refusal.reason, refusal.subject) == ("QUEUE_FULL", "waiting prompt tokens")
        assert refusal.retry_delay_ns >= 1e8
        fits = client.submit(prompt(3, 5), 2)
        await asyncio.gather(kept.finished(), fits.finished())
        await client.submit(prompt(3, 6), 2).finished()


async def test_a_full_queue_gives_up_who_is_late_first(tmp_path: Path) -> None:
    async with stack(tmp_path, STEP, max_num_seqs=1, max_waiting=1) as system:
        client = system.client
        await client.submit(prompt(1, 4), 40).finished()  # such a one takes 0.2 s
        first = client.submit(prompt(2, 4), 40)
        await first.until(1)
        late = client.submit(prompt(3, 4), 40, deadline_unix_ns=unix_ns(0.15))
        await first.until(3)
        other = client.submit(prompt(4, 4), 3)
        refused = client.submit(prompt(5, 4), 3)
        assert (await late.rejected()).reason == "DEADLINE_UNREACHABLE"
        assert (await refused.rejected()).reason == "QUEUE_FULL"
        await other.finished()
        await first.finished()
        assert (await client.idle()).counters.num_expired == 1
