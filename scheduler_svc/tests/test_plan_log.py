from __future__ import annotations

import logging
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockyard.common.protocol import EXECUTOR_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2
from blockyard.engine.v1 import plan_log_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc.limits import Limits
from scheduler_svc.plan_log import (
    FORMAT_VERSION,
    MAGIC,
    PlanLog,
    PlanLogPathError,
    limits_of,
    policy_of,
)
from scheduler_svc.plan_log_reader import (
    CorruptError,
    Event,
    MissingFileError,
    NotAPlanLogError,
    PlanLogError,
    PlanLogReader,
    TruncatedError,
    VersionError,
)
from scheduler_svc.policy import Policy, PreemptionMode
from scheduler_svc.request import Request

LIMITS = Limits(
    num_device_blocks=9,
    block_size=4,
    max_num_seqs=2,
    max_num_batched_tokens=16,
    max_model_len=24,
    vocab_size=100,
    watermark_blocks=1,
    num_host_blocks=3,
    block_bytes=32,
)
EXECUTOR = executor_pb2.DescribeResponse(num_device_blocks=9, block_size=4, device="somewhere")
PREFIX_BYTES = len(MAGIC) + 4


def begun(path: Path, max_file_bytes: int = 1 << 20) -> PlanLog:
    log = PlanLog(path, Policy(PreemptionMode.SWAP, is_caching=False), max_file_bytes)
    log.begin_epoch(77, EXECUTOR, LIMITS)
    return log


def plan(step_id: int, num_appends: int = 0) -> executor_pb2.StepPlan:
    appends = executor_pb2.BlockAppends(rows=range(num_appends), block_ids=range(num_appends))
    return executor_pb2.StepPlan(epoch=77, step_id=step_id, appends=appends)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plans.log"


@pytest.fixture
def whole(path: Path) -> bytes:
    """The bytes of a small log at `path`: header, epoch, one call and its plan."""
    log = begun(path)
    log.plan_call(5)
    log.plan(plan(1, num_appends=3))
    log.close()
    return path.read_bytes()


def record(kind: int, body: bytes) -> bytes:
    data = bytes((kind,)) + body
    return struct.pack("<II", len(data), zlib.crc32(data)) + data


def header(**changes: object) -> bytes:
    fields: dict[str, object] = {"executor_protocol_version": EXECUTOR_PROTOCOL_VERSION}
    message = pb.LogHeader(**(fields | changes))  # type: ignore[arg-type]  # any of its fields
    return record(pb.LOG_RECORD_KIND_HEADER, message.SerializeToString())


def offsets_of_records(data: bytes) -> list[int]:
    offsets = []
    offset = PREFIX_BYTES
    while offset < len(data):
        offsets.append(offset)
        offset += 8 + int.from_bytes(data[offset : offset + 4], "little")
    return offsets


def read(*paths: Path) -> list[Event]:
    return list(PlanLogReader(paths))


def read_until_error(path: Path) -> tuple[list[Event], PlanLogError]:
    events: list[Event] = []
    try:
        for event in PlanLogReader([path]):
            events.append(event)  # noqa: PERF402 - those before the error count
    except PlanLogError as error:
        return events, error
    pytest.fail("no error")


# ---- files that cannot be read


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("data", [b"hello, world, I am a text file\n", b"BYPLANZ\n" + bytes(90)])
def test_another_file(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(NotAPlanLogError, match="byte 0: not a plan log"):
        read(path)


def test_cut_at_every_byte(whole: bytes, path: Path) -> None:
    """Whatever is cut off, all whole records before it are read, and the rest is told."""
    offsets = offsets_of_records(whole)
    events = read(path)
    assert len(events) == len(offsets) - 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length in offsets[1:]:
            assert read(path) == events[: offsets.index(length) - 1]
            continue
        got, error = read_until_error(path)
        assert isinstance(error, TruncatedError)
        assert error.offset == max((o for o in offsets if o <= length), default=length)
        assert got == events[: len(got)]
        assert len(got) == max(0, sum(offset <= length for offset in offsets) - 2)


def test_any_damaged_byte_is_noticed(whole: bytes, path: Path) -> None:
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(PlanLogError) as caught:
            read(path)
        begins = [0, len(MAGIC), *offsets_of_records(whole)]
        assert caught.value.offset == max(offset for offset in begins if offset <= index), index


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (struct.pack("<I", FORMAT_VERSION + 1), VersionError, "byte 8: format 2; this reads 1"),
        (
            struct.pack("<I", FORMAT_VERSION)
            + header(executor_protocol_version=99, software_version="9.9"),
            VersionError,
            r"byte 12: plans of executor protocol 99 \(blockyard 9.9\)",
        ),
        (struct.pack("<I", FORMAT_VERSION), TruncatedError, "byte 12: the header is missing"),
        (
            struct.pack("<I", FORMAT_VERSION) + record(pb.LOG_RECORD_KIND_PLAN_CALL, b""),
            CorruptError,
            "byte 12: the first record is of kind 5, not a header",
        ),
        (
            struct.pack("<I", FORMAT_VERSION) + record(pb.LOG_RECORD_KIND_HEADER, b"\xff\xff"),
            CorruptError,
            "byte 12: not a LogHeader",
        ),
        (struct.pack("<I", FORMAT_VERSION) + bytes(8), CorruptError, "byte 12: a record of 0 byte"),
    ],
)
def test_bad_beginning(data: bytes, error: type[Exception], message: str, path: Path) -> None:
    path.write_bytes(MAGIC + data)
    with pytest.raises(error, match=message):
        PlanLogReader([path])


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (99, b"", "a record of kind 99"),
        (pb.LOG_RECORD_KIND_HEADER, b"", "a record of kind 1"),
        (pb.LOG_RECORD_KIND_PLAN, b"\xff\xff", "not a StepPlan"),
    ],
)
def test_bad_record(kind: int, body: bytes, message: str, whole: bytes, path: Path) -> None:
    path.write_bytes(whole + record(kind, body))
    with pytest.raises(CorruptError, match=f"byte {len(whole)}: {message}"):
        read(path)


def test_a_log_begins_with_an_epoch(path: Path) -> None:
    log = PlanLog(path, Policy())
    log.plan_call(1)
    log.close()
    with pytest.raises(CorruptError, match="does not begin with an epoch"):
        read(path)


def test_files_that_are_not_one_log(path: Path) -> None:
    log = begun(path, max_file_bytes=1)
    for step_id in (1, 2):
        log.plan(plan(step_id))
    log.close()
    first, *later = sorted(path.parent.iterdir())
    assert len(read(first, *later)) == 3
    with pytest.raises(MissingFileError, match=r"plans.log.1, .*file 0 is not given"):
        read(later[0])
    with pytest.raises(MissingFileError, match=r"plans.log.2, .*file 1 is not given"):
        read(later[1], first)
    other = path.with_name("other.log")
    begun(other).close()
    with pytest.raises(MissingFileError, match="another log"):
        read(first, other)


# ---- what is written is read


def test_every_kind_of_event_comes_back_in_order(path: Path) -> None:
    log = begun(path)
    submit = engine_pb2.Submit(request_id=3, prompt_token_ids=b"\1\0\0\0", max_tokens=4)
    request = Request(12, 5, 3, np.array([1], np.int32), 5, arrival_ns=1000)
    cost_model = executor_pb2.CostModel(step_ns=1.5, swap_bytes_per_s=2e9)
    result = executor_pb2.StepResult(epoch=77, step_id=1, token_ids=[4])
    log.submit(submit, request)
    log.plan_call(2000)
    log.plan(plan(1))
    log.result(result)
    log.stop(12, 2, 7)
    log.abort(12)
    log.cost_model(cost_model)
    log.flush_cache()
    log.close()

    reader = PlanLogReader([path])
    epoch, *events = reader
    assert isinstance(epoch, pb.EpochBegin)
    assert (epoch.epoch, epoch.executor) == (77, EXECUTOR)
    assert limits_of(epoch.limits) == LIMITS
    assert policy_of(reader.header.policy) == Policy(PreemptionMode.SWAP, is_caching=False)
    assert events == [
        pb.LoggedSubmit(submit=submit, key=12, frontend=5, arrival_ns=1000),
        pb.PlanCall(now_ns=2000),
        plan(1),
        result,
        pb.LoggedStop(key=12, branch=2, num_output_tokens=7),
        pb.LoggedStop(key=12),
        cost_model,
        engine_pb2.FlushCacheRequest(),
    ]
    assert reader.num_bytes_read == reader.num_bytes == path.stat().st_size


def test_what_a_text_check_says_is_written(path: Path) -> None:
    request = Request(1, 0, 1, np.array([1], np.int32), 5, arrival_ns=0)
    request.is_text_stopped = lambda token_ids: len(token_ids) > 1
    log = begun(path)
    log.submit(engine_pb2.Submit(), request)
    assert not request.is_text_stopped(np.array([1], np.int32))
    assert request.is_text_stopped(np.array([1, 2], np.int32))
    log.close()
    assert read(path)[2:] == [pb.LoggedTextStop(), pb.LoggedTextStop(is_stopped=True)]


def test_the_file_is_its_owners_and_takes_no_name_twice(path: Path) -> None:
    logs = [begun(path) for _ in range(3)]
    for log in logs:
        log.close()
    names = ["plans.log", "plans.log.1", "plans.log.2"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    for name in names:
        file = path.with_name(name)
        assert len(read(file)) == 1, "each is a log of its own"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_rotation_by_size(path: Path) -> None:
    log = begun(path, max_file_bytes=1000)
    plans = [plan(step_id, num_appends=20) for step_id in range(1, 101)]
    for message in plans:
        log.plan(message)
    log.close()
    files = sorted(path.parent.iterdir())
    assert len(files) > 5
    assert all(file.stat().st_size < 1100 for file in files)
    reader = PlanLogReader(files[::-1])
    assert list(reader)[1:] == plans
    assert reader.num_bytes_read == reader.num_bytes


def test_written_when_nothing_is_in_flight(path: Path) -> None:
    log = begun(path)
    log.plan_call(1)
    log.plan(plan(1))
    log.plan(plan(2))
    log.result(executor_pb2.StepResult(step_id=1))
    before = path.stat().st_size
    log.result(executor_pb2.StepResult(step_id=2))
    assert path.stat().st_size > before
    assert len(read(path)) == 6


def test_written_after_a_second(path: Path) -> None:
    log = begun(path)
    log.plan_call(10**9)
    log.plan(plan(1))
    size = path.stat().st_size
    log.plan_call(2 * 10**9 - 1)
    assert path.stat().st_size == size
    log.plan_call(2 * 10**9)
    assert path.stat().st_size > size


# ---- a log that cannot be written


def test_no_path_writes_nothing(tmp_path: Path) -> None:
    log = PlanLog(None, Policy())
    log.begin_epoch(1, EXECUTOR, LIMITS)
    request = Request(1, 0, 1, np.array([1], np.int32), 5, arrival_ns=0)
    log.submit(engine_pb2.Submit(), request)
    log.plan_call(1)
    log.plan(plan(1))
    log.result(executor_pb2.StepResult())
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_path_where_nothing_can_be_created(tmp_path: Path) -> None:
    with pytest.raises(PlanLogPathError, match=r"plan log .*/no/such: No such file or directory"):
        PlanLog(tmp_path / "no" / "such", Policy())


@pytest.mark.parametrize(
    "use",
    [
        lambda log: [log.plan(plan(1, num_appends=5000)) for _ in range(100)],
        lambda log: log.plan_call(10**10),
        lambda log: log.close(),
    ],
)
def test_a_full_disk_is_told_once(
    use: Callable[[PlanLog], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Creating /dev/full is refused, so the device takes the place of an open file."""
    log = PlanLog(None, Policy())
    log._path = Path("/dev/full")
    log._file = open("/dev/full", "wb", 1000)  # noqa: SIM115 - the log closes it
    log.begin_epoch(1, EXECUTOR, LIMITS)
    with caplog.at_level(logging.ERROR):
        use(log)
        log.plan_call(10**11)
        log.close()
    assert [r.getMessage() for r in caplog.records] == [
        "/dev/full: No space left on device; the plan log ends here"
    ]


def test_the_next_file_cannot_be_created(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = begun(path, max_file_bytes=1)
    log.plan_call(1)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    log.plan_call(2)
    log.plan_call(3)
    log.close()
    assert len(caplog.records) == 1
