"""Waiting for calls, and for whatever else, with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from blockyard.v1 import generate_pb2 as pb

StreamCall = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once `condition()` holds; TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition, not only events
            await asyncio.sleep(0.005)


async def messages_of(call: StreamCall) -> list[pb.GenerateResponse]:
    """All messages that are still to come; raises the call's error."""
    messages: list[pb.GenerateResponse] = []
    while isinstance(message := await call.read(), pb.GenerateResponse):
        messages.append(message)
    return messages


async def first_of(call: StreamCall) -> pb.GenerateResponse:
    message = await call.read()
    assert isinstance(message, pb.GenerateResponse)
    return message


async def expect_status(call: Awaitable[Any], code: grpc.StatusCode, text: str) -> None:
    """The call fails so."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code
    assert text in str(caught.value.details())
