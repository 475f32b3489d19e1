"""A runner driven by hand-made plans: decoded, checked and applied as the service does."""

from __future__ import annotations

from typing import Any

import numpy as np

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc import plan as plans
from executor_svc import plan_check
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, Runner, StepOutputs
from executor_svc.tests.plans import appends, batch, new_rows


class PlanDriver:
    """One epoch. Physical blocks are handed out from a shuffled list and never come back."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self.runner = runner
        self.state = RowState(runner.info)
        order = np.random.default_rng(seed).permutation(runner.info.num_device_blocks - 1)
        self.free = (order + 1).tolist()
        self.lengths: dict[int, int] = {}

    def launch(self, **parts: Any) -> PendingStep:
        """One plan from proto parts; its results are not waited for."""
        plan = plans.decode(pb.StepPlan(epoch=1, step_id=1, **parts))
        plan_check.check(plan, self.state, self.runner.info)
        step = self.state.apply(plan)
        return self.runner.launch(plan, self.state, step)

    def run(self, **parts: Any) -> StepOutputs:
        """One plan from proto parts."""
        return self.launch(**parts).wait()

    def take(self, num_tokens: int) -> list[int]:
        """Fresh blocks for so many tokens."""
        return [self.free.pop() for _ in range(-(-num_tokens // self.runner.info.block_size))]

    def begin(self, row: int, tokens: list[int], chunk: int = 0, **fields: Any) -> StepOutputs:
        """Begin a row and prefill it, at once or in chunks; the last chunk's outputs."""
        chunk = chunk or len(tokens)
        new = new_rows({"row": row, "tokens": tokens, "blocks": self.take(len(tokens)), **fields})
        outputs = self.run(new_rows=new, batch=batch((row, min(chunk, len(tokens)))))
        for begin in range(chunk, len(tokens), chunk):
            outputs = self.run(batch=batch((row, min(chunk, len(tokens) - begin))))
        self.lengths[row] = len(tokens)
        return outputs

    def decode(self, *rows: int, **parts: Any) -> StepOutputs:
        """One step of rows, each appending a block when it is full."""
        return self.launch_decode(*rows, **parts).wait()

    def launch_decode(self, *rows: int, **parts: Any) -> PendingStep:
        """As `decode`, without waiting."""
        block_size = self.runner.info.block_size
        full = [row for row in rows if self.lengths[row] % block_size == 0]
        grown = appends(*((row, self.take(1)) for row in full))
        for row in rows:
            self.lengths[row] += 1
        counts = [(row, 1) for row in rows]
        return self.launch(appends=grown, batch=batch(*counts, num_decode_rows=len(rows)), **parts)

    def generate(self, row: int, tokens: list[int], count: int, **fields: Any) -> list[int]:
        """Tokens sampled by one row alone, which is then freed."""
        sampled = [int(self.begin(row, tokens, **fields).token_ids[0])]
        sampled += [int(self.decode(row).token_ids[0]) for _ in range(count - 1)]
        self.run(freed_rows=[row])
        return sampled
