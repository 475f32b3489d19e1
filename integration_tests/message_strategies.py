"""Messages of any kind for hypothesis: all fields, ordinary and extreme values, or broken bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_Message = TypeVar("_Message", bound=Message)

_NUMBERS: Final = (0, 1, 2, 3, 5, 8, 31, 32, 99, 100, 2**31 - 1)
"""Small ones, that name something, and around powers of two; each kind adds its largest."""

_VALUES: Final[dict[int, st.SearchStrategy[Any]]] = {
    FieldDescriptor.TYPE_UINT32: st.sampled_from((*_NUMBERS, 2**32 - 1)),
    FieldDescriptor.TYPE_UINT64: st.sampled_from((*_NUMBERS, 2**64 - 1)),
    FieldDescriptor.TYPE_FIXED64: st.sampled_from((*_NUMBERS, 2**64 - 1)),
    FieldDescriptor.TYPE_INT32: st.sampled_from((*_NUMBERS, -1, -(2**31))),
    FieldDescriptor.TYPE_SINT32: st.sampled_from((*_NUMBERS, -1, -(2**31))),
    FieldDescriptor.TYPE_INT64: st.sampled_from((*_NUMBERS, -1, 2**63 - 1, -(2**63))),
    FieldDescriptor.TYPE_ENUM: st.sampled_from((0, 1, 2, 3, 77)),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32) | st.sampled_from((0.0, 0.5, 1.0)),
    FieldDescriptor.TYPE_DOUBLE: st.floats() | st.sampled_from((0.0, 0.5, 1.0)),
    FieldDescriptor.TYPE_STRING: st.text(max_size=8),
    # Whole uint32 columns are what most bytes of the internal links are.
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=9)
    | st.lists(st.sampled_from((0, 1, 2, 7, 99, 2**32 - 1)), max_size=6).map(
        lambda ids: b"".join(value.to_bytes(4, "little") for value in ids)
    ),
}


def messages(kind: type[_Message]) -> st.SearchStrategy[_Message]:
    """Messages of a kind, nested ones too: each field absent or not, lists of up to four."""
    return st.builds(lambda fields: kind(**fields), _fields(kind.DESCRIPTOR))


def varied(example: _Message) -> st.SearchStrategy[_Message]:
    """The example with one or two fields replaced, anywhere in it."""
    fields: Any = example.DESCRIPTOR.fields  # the stubs know several classes of descriptors
    names = st.lists(
        st.sampled_from(list(fields)), min_size=1, max_size=2, unique_by=lambda f: f.name
    )
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({f.name: _other(example, f) for f in chosen})
    ).map(lambda replaced: _with(example, replaced))


def encodings(kind: type[_Message], examples: Sequence[_Message] = ()) -> st.SearchStrategy[bytes]:
    """Bytes that are such a message, nearly one of the examples, or anything."""
    whole = messages(kind)
    if examples:
        whole |= st.sampled_from(examples) | st.sampled_from(examples).flatmap(varied)
    data = whole.map(lambda message: message.SerializeToString())
    return data | st.builds(_damaged, data, st.integers(0, 400), st.binary(max_size=6))


def _other(example: Message, field: Any) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
        return varied(getattr(example, field.name))
    return _field(field)


def _with(example: _Message, replaced: dict[str, Any]) -> _Message:
    message = type(example)()
    message.CopyFrom(example)
    for name in replaced:
        message.ClearField(name)
    message.MergeFrom(type(example)(**replaced))
    return message


def _fields(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    # Of a oneof the last one set stays.
    optional = {field.name: _field(field) for field in kind.fields}
    return st.fixed_dictionaries({}, optional=optional)


def _field(field: Any) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        value: st.SearchStrategy[Any] = st.deferred(lambda: _fields(field.message_type))
    else:
        value = _VALUES[field.type]
    return st.lists(value, max_size=4) if field.is_repeated else value


def _damaged(data: bytes, at: int, put_in: bytes) -> bytes:
    """Some bytes are overwritten, and what would be beyond the end is added there."""
    at = min(at, len(data))
    return data[:at] + put_in + data[at + len(put_in) :]
