"""What a new user sees first: the default model is imported, served, and answers."""

from __future__ import annotations

import sys
import time

import pytest

from blockyard.client import AsyncClient, Message
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store

pytestmark = pytest.mark.model

MAX_FIRST_TOKEN_S = 20.0


async def test_a_chat_answer_streams(capsys: pytest.CaptureFixture[str]) -> None:
    store.resolve(store.DEFAULT_MODEL, is_quiet=True)
    begin = time.monotonic()
    question: Message = {"role": "user", "content": "What is the capital of France?"}
    texts: list[str] = []
    arrivals: list[float] = []
    async with (
        LocalServer(ServeSettings(listen="127.0.0.1:0")) as server,
        AsyncClient(server.address, timeout=60) as client,
    ):
        model = await client.model()
        asked = time.monotonic()
        async for chunk in client.generate(messages=[question], temperature=0, max_tokens=48):
            arrivals.append(time.monotonic())
            texts.append(chunk.text)
    with capsys.disabled():
        sys.stdout.write(
            f"\nserver ready after {server.ready_s:.1f} s, first token {arrivals[0] - asked:.2f} s "
            f"after the question and {arrivals[0] - begin:.1f} s after the start\n"
        )
    assert model.name == store.DEFAULT_MODEL
    assert model.has_chat_template
    assert "Paris" in "".join(texts)
    assert chunk.finish_reason == "stop", "the answer is short and ends by itself"
    assert chunk.usage is not None
    assert chunk.usage.output_tokens <= 48
    assert len(arrivals) > 3, "it came in one piece"
    assert arrivals[-1] > arrivals[0]
    assert arrivals[0] - begin < MAX_FIRST_TOKEN_S
