"""The plan log: an engine writes down what it does, so that `blockyard replay` can do it again.

See plan_log.proto for the format. Each call here writes one record, before the scheduler acts on
what the record says. The log holds the prompts in full; only its owner can read the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from google.protobuf.message import Message

from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.common.version import software_version
from blockyard.engine.v1 import engine_pb2
from blockyard.engine.v1 import plan_log_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.limits import Limits
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Request, TokenIds

MAGIC: Final = b"BYPLANS\n"
FORMAT_VERSION: Final = 1
VERSION: Final = struct.Struct("<I")
FRAME: Final = struct.Struct("<II")
"""Length and CRC-32 of what follows: the kind, one byte, and the body."""
MAX_FILE_BYTES: Final = 1 << 30

_BUFFER_BYTES: Final = 1 << 18
_FLUSH_NS: Final = 1_000_000_000

logger = logging.getLogger(__name__)


class PlanLogPathError(Exception):
    """No plan log can be created there."""


class PlanLog:
    """Writes a log; never waits for anything but the page cache, and never fails its caller.

    What is written reaches the file when nothing is in flight, or a second later.
    """

    def __init__(
        self, path: Path | None, policy: Policy, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """Create the log's first file.

        Args:
            path: the first free name of PATH, PATH.1, PATH.2, ... is taken; None: log nothing.
            policy: the scheduler's; one that comes from settings.
            max_file_bytes: the log goes on in the next file when one has grown to this.

        Raises PlanLogPathError.
        """
        assert policy == Policy(policy.preemption, policy.is_caching), "not from settings"
        self._header = pb.LogHeader(
            software_version=software_version(),
            executor_protocol_version=EXECUTOR_PROTOCOL_VERSION,
            log_id=secrets.randbits(64),
            policy=pb.LogPolicy(preemption=policy.preemption.value, is_caching=policy.is_caching),
        )
        self._path = path
        self._max_file_bytes = max_file_bytes
        self._file: BinaryIO | None = None
        self._num_bytes = 0  # in the file
        self._num_in_flight = 0  # plans without a result
        self._flushed_ns = 0
        if path is not None:
            try:
                self._file = self._create(path)
            except OSError as error:
                raise PlanLogPathError(f"plan log {path}: {error.strerror}") from error

    def begin_epoch(
        self, epoch: int, executor: executor_pb2.DescribeResponse, limits: Limits
    ) -> None:
        """An empty executor has opened; the scheduler starts over on it."""
        log_limits = pb.LogLimits(**dataclasses.asdict(limits))
        self._num_in_flight = 0
        self._write(
            pb.LOG_RECORD_KIND_EPOCH_BEGIN,
            pb.EpochBegin(epoch=epoch, executor=executor, limits=log_limits),
        )

    def submit(self, submit: engine_pb2.Submit, request: Request) -> None:
        """A request, made of this submit, is queued.

        What its text check says from now on is written down as well.
        """
        if self._file is None:
            return
        if request.is_text_stopped is not None:
            request.is_text_stopped = self._logged(request.is_text_stopped)
        record = pb.LoggedSubmit(
            submit=submit,
            key=request.key,
            frontend=request.frontend,
            arrival_ns=request.arrival_ns,
            deadline_ns=request.deadline_ns,
        )
        self._write(pb.LOG_RECORD_KIND_SUBMIT, record)

    def _logged(self, is_text_stopped: Callable[[TokenIds], bool]) -> Callable[[TokenIds], bool]:
        def ask(token_ids: TokenIds) -> bool:
            is_stopped = is_text_stopped(token_ids)
            self._write(pb.LOG_RECORD_KIND_TEXT_STOP, pb.LoggedTextStop(is_stopped=is_stopped))
            return is_stopped

        return ask

    def stop(self, key: int, branch: int, num_output_tokens: int) -> None:
        """A branch ends because a stop string was found."""
        record = pb.LoggedStop(key=key, branch=branch, num_output_tokens=num_output_tokens)
        self._write(pb.LOG_RECORD_KIND_STOP, record)

    def abort(self, key: int) -> None:
        """A request ends because its client is gone."""
        self._write(pb.LOG_RECORD_KIND_STOP, pb.LoggedStop(key=key))

    def plan_call(self, now_ns: int) -> None:
        """The scheduler is asked for a plan."""
        if now_ns - self._flushed_ns >= _FLUSH_NS:
            self._flushed_ns = now_ns
            self._flush()
        self._write(pb.LOG_RECORD_KIND_PLAN_CALL, pb.PlanCall(now_ns=now_ns))

    def plan(self, plan: executor_pb2.StepPlan) -> None:
        """It decided this one."""
        self._num_in_flight += 1
        self._write(pb.LOG_RECORD_KIND_PLAN, plan)

    def result(self, result: executor_pb2.StepResult) -> None:
        """The oldest plan in flight has this result."""
        self._num_in_flight -= 1
        self._write(pb.LOG_RECORD_KIND_RESULT, result)
        if not self._num_in_flight:
            self._flush()

    def cost_model(self, cost_model: executor_pb2.CostModel) -> None:
        """The scheduler gets new prices."""
        self._write(pb.LOG_RECORD_KIND_COST_MODEL, cost_model)

    def flush_cache(self) -> None:
        """The scheduler forgets every cached block that nobody holds."""
        self._write(pb.LOG_RECORD_KIND_FLUSH_CACHE, engine_pb2.FlushCacheRequest())

    def close(self) -> None:
        """Write out what is buffered; later calls write nothing."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            self._give_up(error)

    def _write(self, kind: pb.LogRecordKind.ValueType, message: Message) -> None:
        if self._file is None or self._path is None:
            return
        record = _record(kind, message)
        try:
            if self._num_bytes >= self._max_file_bytes:
                self._file.close()
                self._header.index += 1
                self._file = self._create(self._path)
            self._file.write(record)
        except OSError as error:
            self._give_up(error)
        self._num_bytes += len(record)

    def _flush(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Serving goes on without a log."""
        logger.error("%s: %s; the plan log ends here", self._path, error.strerror)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _create(self, path: Path) -> BinaryIO:
        """A new file that begins with the header. Raises OSError."""
        for number in itertools.count():
            name = path.with_name(f"{path.name}.{number}") if number else path
            try:
                file = open(name, "xb", _BUFFER_BYTES, opener=_open_private)  # noqa: SIM115
            except FileExistsError:
                continue
            break
        header = _record(pb.LOG_RECORD_KIND_HEADER, self._header)
        file.write(MAGIC + VERSION.pack(FORMAT_VERSION) + header)
        self._num_bytes = file.tell()
        return file


def limits_of(message: pb.LogLimits) -> Limits:
    """The limits that `PlanLog.begin_epoch` wrote down."""
    names = (field.name for field in dataclasses.fields(Limits))
    return Limits(**{name: getattr(message, name) for name in names})


def policy_of(message: pb.LogPolicy) -> Policy:
    """The policy that `PlanLog` was made with."""
    return Policy(PreemptionMode(message.preemption), message.is_caching)


def _record(kind: pb.LogRecordKind.ValueType, message: Message) -> bytes:
    data = bytes((kind,)) + message.SerializeToString()
    return FRAME.pack(len(data), zlib.crc32(data)) + data


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
