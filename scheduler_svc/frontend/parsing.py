"""From bytes to messages, with an error that says what is wrong with the bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from scheduler_svc.errors import Reason, RequestError, invalid

_Message = TypeVar("_Message", bound=Message)


def parse(kind: type[_Message], data: bytes) -> _Message:
    """Decode a message. Raises RequestError, which names a text field that is not UTF-8."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        field = _field_not_utf8(kind.DESCRIPTOR, data)
        if field is None:
            message = f"not a valid {kind.DESCRIPTOR.name}: {error}"
            raise RequestError(Reason.INVALID_FIELD, message) from error
        raise invalid(field, "is not valid UTF-8") from error


def _field_not_utf8(kind: Any, data: bytes) -> str | None:
    """Path of the first such field; None: there is none, or this is no message at all.

    The library says only that decoding failed. A message without fields takes any well-formed
    bytes, and hands the fields back as they came.

    Args:
        kind: a Descriptor; the stubs know several classes of that name.
        data: a message of that kind.
    """
    try:
        fields = UnknownFieldSet(Empty.FromString(data))
    except DecodeError:
        return None
    num_seen: Counter[int] = Counter()
    for field in (fields[index] for index in range(len(fields))):
        descriptor = kind.fields_by_number.get(field.field_number)
        if descriptor is None or not isinstance(field.data, bytes):
            continue
        name: str = descriptor.name
        if descriptor.is_repeated:
            name += f"[{num_seen[field.field_number]}]"
            num_seen[field.field_number] += 1
        if descriptor.type == FieldDescriptor.TYPE_STRING and not _is_utf8(field.data):
            return name
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            inner = _field_not_utf8(descriptor.message_type, field.data)
            if inner is not None:
                return f"{name}.{inner}"
    return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
