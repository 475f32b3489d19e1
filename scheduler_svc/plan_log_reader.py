"""Reads the files of a plan log: see plan_log.proto for the format."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from google.protobuf.message import DecodeError, Message

from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2
from blockyard.engine.v1 import plan_log_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.plan_log import FORMAT_VERSION, FRAME, MAGIC, VERSION

Event = (
    pb.EpochBegin
    | pb.LoggedSubmit
    | pb.LoggedStop
    | pb.PlanCall
    | executor_pb2.StepPlan
    | executor_pb2.StepResult
    | executor_pb2.CostModel
    | engine_pb2.FlushCacheRequest
    | pb.LoggedTextStop
)
"""What a record other than the header holds."""

AnyMessage = TypeVar("AnyMessage", bound=Message)

_MAX_RECORD_BYTES: Final = 1 << 28
"""Far above what gRPC lets through; a longer record is a damaged length."""

_EVENTS: Final[dict[int, type[Event]]] = {
    pb.LOG_RECORD_KIND_EPOCH_BEGIN: pb.EpochBegin,
    pb.LOG_RECORD_KIND_SUBMIT: pb.LoggedSubmit,
    pb.LOG_RECORD_KIND_STOP: pb.LoggedStop,
    pb.LOG_RECORD_KIND_PLAN_CALL: pb.PlanCall,
    pb.LOG_RECORD_KIND_PLAN: executor_pb2.StepPlan,
    pb.LOG_RECORD_KIND_RESULT: executor_pb2.StepResult,
    pb.LOG_RECORD_KIND_COST_MODEL: executor_pb2.CostModel,
    pb.LOG_RECORD_KIND_FLUSH_CACHE: engine_pb2.FlushCacheRequest,
    pb.LOG_RECORD_KIND_TEXT_STOP: pb.LoggedTextStop,
}


class PlanLogError(Exception):
    """A file cannot be read as part of a plan log; says which, and at which byte."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}, byte {offset}: {reason}")
        self.path = path
        self.offset = offset


class NotAPlanLogError(PlanLogError):
    """It is some other file."""


class VersionError(PlanLogError):
    """It was written in another format, or for another version of the executor protocol."""


class TruncatedError(PlanLogError):
    """It ends within a record: the engine was killed, or its disk was full."""


class CorruptError(PlanLogError):
    """What it holds is not what was written."""


class MissingFileError(PlanLogError):
    """It goes on where another file ends, and that is not the one before it."""


class PlanLogReader:
    """One log: its first file, or more of them. Iterate for the events, in order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the headers.

        Args:
            paths: files of one log, in any order; the first file of the log is among them, and
                none is missing in between.

        Raises PlanLogError and OSError, as iterating does.
        """
        headers = {path: _read_header(path) for path in paths}
        self._paths = sorted(headers, key=lambda path: headers[path].index)
        self.header = headers[self._paths[0]]
        for index, path in enumerate(self._paths):
            header = headers[path]
            if header.log_id != self.header.log_id:
                reason = f"part of another log than {self._paths[0]}"
                raise MissingFileError(path, 0, reason)
            if header.index != index:
                reason = f"file {header.index} of its log (from 0); file {index} is not given"
                raise MissingFileError(path, 0, reason)
        self.num_bytes_read = 0

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self._paths)

    def __iter__(self) -> Iterator[Event]:
        self.num_bytes_read = 0
        for path in self._paths:
            with path.open("rb") as file:
                _check_magic(path, file)
                _read_record(path, file)  # the header
                begin = 0
                while (record := _read_record(path, file)) is not None:
                    event = _parse(path, *record)
                    if not self.num_bytes_read and not isinstance(event, pb.EpochBegin):
                        raise CorruptError(path, record[0], "the log does not begin with an epoch")
                    yield event
                    self.num_bytes_read += file.tell() - begin
                    begin = file.tell()


def _read_header(path: Path) -> pb.LogHeader:
    with path.open("rb") as file:
        _check_magic(path, file)
        record = _read_record(path, file)
    if record is None:
        raise TruncatedError(path, len(MAGIC) + VERSION.size, "the header is missing")
    offset, data = record
    if data[0] != pb.LOG_RECORD_KIND_HEADER:
        raise CorruptError(path, offset, f"the first record is of kind {data[0]}, not a header")
    header = _decode(path, offset, pb.LogHeader, data)
    if header.executor_protocol_version != EXECUTOR_PROTOCOL_VERSION:
        raise VersionError(
            path,
            offset,
            f"plans of executor protocol {header.executor_protocol_version} "
            f"(blockyard {header.software_version}); this is {EXECUTOR_PROTOCOL_VERSION}",
        )
    return header


def _check_magic(path: Path, file: BinaryIO) -> None:
    magic = file.read(len(MAGIC))
    if not MAGIC.startswith(magic):
        raise NotAPlanLogError(path, 0, "not a plan log")
    version = file.read(VERSION.size)
    if len(version) < VERSION.size:
        raise TruncatedError(path, len(magic) + len(version), "the file ends here")
    if VERSION.unpack(version) != (FORMAT_VERSION,):
        reason = f"format {VERSION.unpack(version)[0]}; this reads {FORMAT_VERSION}"
        raise VersionError(path, len(MAGIC), reason)


def _read_record(path: Path, file: BinaryIO) -> tuple[int, bytes] | None:
    """Offset, and kind and body of the next record; None at the end."""
    offset = file.tell()
    frame = file.read(FRAME.size)
    if not frame:
        return None
    if len(frame) < FRAME.size:
        raise TruncatedError(path, offset, f"the file ends {len(frame)} bytes into a record")
    length, checksum = FRAME.unpack(frame)
    if not 0 < length <= _MAX_RECORD_BYTES:
        raise CorruptError(path, offset, f"a record of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        reason = f"a record of {length} bytes begins here, but only {len(data)} follow"
        raise TruncatedError(path, offset, reason)
    if zlib.crc32(data) != checksum:
        raise CorruptError(path, offset, "wrong checksum")
    return offset, data


def _parse(path: Path, offset: int, data: bytes) -> Event:
    event_type = _EVENTS.get(data[0])
    if event_type is None:
        raise CorruptError(path, offset, f"a record of kind {data[0]}")
    return _decode(path, offset, event_type, data)


def _decode(path: Path, offset: int, message_type: type[AnyMessage], data: bytes) -> AnyMessage:
    try:
        return message_type.FromString(data[1:])
    except DecodeError as error:
        raise CorruptError(path, offset, f"not a {message_type.__name__}") from error
