"""The fake runner behind the real executor: in process without I/O, or as a process of its own."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import deque

import uvloop

from blockyard.common import logs
from blockyard.common.listen_address import ListenError
from blockyard.common.process import exit_with_parent
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner, fake_info
from executor_svc.plan import PlanError, decode
from executor_svc.row_state import RowState
from executor_svc.runner import FatalDeviceError, Runner
from executor_svc.server import serve
from executor_svc.step_ledger import StepLedger
from executor_svc.step_worker import LaunchedStep, launch

log = logging.getLogger(__name__)


class SyncExecutor:
    """An executor as a function: plan in, result out. Same checks, same order, no threads.

    `launch` and `complete` apart play a window larger than one.
    """

    def __init__(self, runner: Runner) -> None:
        """Begins the first epoch."""
        self.runner = runner
        self.state = RowState(runner.info)
        self.ledger = StepLedger()
        self._launched: deque[LaunchedStep] = deque()
        self.begin_epoch()

    @property
    def epoch(self) -> int:
        """The current epoch, to be carried by plans."""
        return self.ledger.epoch

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not completed."""
        return len(self._launched)

    def begin_epoch(self) -> int:
        """Drop all rows, blocks and steps in flight; returns the new epoch."""
        self._launched.clear()
        self.state.reset()
        self.runner.reset()
        return self.ledger.begin_epoch()

    def launch(self, plan: pb.StepPlan) -> bool:
        """Apply and launch the next plan; False if it was applied before, which changes nothing.

        Raises PlanError where the wire has PlanRejected.
        """
        if not self.ledger.accept(plan.epoch, plan.step_id):
            return False
        try:
            step = launch(decode(plan), self.state, self.runner, time.monotonic_ns())
        except PlanError:
            self.ledger.withdraw(plan.step_id)
            raise
        self._launched.append(step)
        return True

    def complete(self) -> pb.StepResult:
        """Result of the oldest step in flight."""
        result, _ = self._launched.popleft().complete()
        self.ledger.complete(result)
        return result

    def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """One step with nothing else in flight. Raises PlanError."""
        assert not self._launched
        assert self.launch(plan), "a plan that was applied before"
        return self.complete()


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Flags of `python -m integration_tests.fake_executor`."""
    parser = argparse.ArgumentParser(prog="python -m integration_tests.fake_executor")
    parser.add_argument("--listen", required=True, help="unix:/path or host:port")
    parser.add_argument("--num-device-blocks", type=int, default=1024)
    parser.add_argument("--num-host-blocks", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-rows", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--busy-ms", type=float, default=0.0, help="Python time of a launch")
    parser.add_argument("--step-ms", type=float, default=0.0, help="device time of a step")
    parser.add_argument("--order-seed", type=int, default=0, help="for the order of block moves")
    parser.add_argument("--fail-at", type=int, help="this launch is a fault")
    parser.add_argument("--fatal-at", type=int, help="this launch loses the device")
    parser.add_argument("--nan-seeds", type=int, nargs="*", default=[], help="rows that fail alone")
    parser.add_argument(
        "--fatal-seeds", type=int, nargs="*", default=[], help="rows that lose the device"
    )
    parser.add_argument("--no-check-content", action="store_true", help="tokens without any KV")
    parser.add_argument("--drain-grace-s", type=float, default=0.0)
    parser.add_argument("--exit-with-parent", action="store_true")
    return parser.parse_args(arguments)


def make_runner(flags: argparse.Namespace) -> FakeRunner:
    """The runner that the flags describe."""
    info = fake_info(
        flags.num_device_blocks,
        flags.num_host_blocks,
        block_size=flags.block_size,
        max_rows=flags.max_rows,
        max_model_len=flags.max_model_len,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        vocab_size=flags.vocab_size,
    )
    failures: dict[int, Exception] = {}
    if flags.fail_at is not None:
        failures[flags.fail_at] = RuntimeError("asked to fail here")
    if flags.fatal_at is not None:
        failures[flags.fatal_at] = FatalDeviceError("asked to lose the device here")
    options = FakeOptions(
        check_content=not flags.no_check_content,
        order_seed=flags.order_seed,
        busy_s=flags.busy_ms / 1e3,
        step_s=flags.step_ms / 1e3,
        failures=failures,
        nan_seeds=frozenset(flags.nan_seeds),
        fatal_seeds=frozenset(flags.fatal_seeds),
    )
    return FakeRunner(info, options)


def main(arguments: list[str]) -> int:
    """Serve until a signal. Exit codes as those of executor_svc."""
    flags = parse_arguments(arguments)
    logs.configure("executor")
    if flags.exit_with_parent:
        exit_with_parent()
    try:
        uvloop.run(serve(make_runner(flags), flags.listen, flags.drain_grace_s))
    except ListenError as error:
        log.error("%s", error)
        return 2
    except FatalDeviceError as error:
        log.error("device lost: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
