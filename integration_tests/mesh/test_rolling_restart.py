"""The front ends of `blockyard serve` replaced under load: no client notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockyard.client import AsyncClient, BlockyardError
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.models.tests.tiny_gguf import TinyGguf

pytestmark = pytest.mark.timeout(60)

LENGTHS = (2, 30, 80)
NUM_STEADY = 12
NUM_FLEETING = 3


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalServer]:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKYARD_HOME", str(folder))
        model = store.resolve(str(TinyGguf().write(folder / "tiny.gguf")), is_quiet=True)
    settings = ServeSettings(
        model=str(model), listen="127.0.0.1:0", kv_memory="16MiB", num_threads=1, frontends=2
    )
    async with LocalServer(settings) as server:
        yield server


def _frontend_pids(server: LocalServer) -> set[int]:
    return {pid for name, pid in server.pids.items() if name.startswith("frontend")}


class Load:
    """Clients that ask and ask; what went wrong is kept."""

    def __init__(self, address: str) -> None:
        self.num_answers = 0
        self.failures: list[object] = []
        self._address = address
        self._expected: dict[int, tuple[int, ...]] = {}
        self._stop = asyncio.Event()

    async def learn(self) -> None:
        """Ask for the right answers before anything happens."""
        async with AsyncClient(self._address) as client:
            for length in LENGTHS:
                self._expected[length] = await self._answer(client, length)

    async def run(self) -> None:
        """Until `stop`."""
        steady = [self._steady(number) for number in range(NUM_STEADY)]
        fleeting = [self._fleeting() for _ in range(NUM_FLEETING)]
        await asyncio.gather(*steady, *fleeting)

    def stop(self) -> None:
        self._stop.set()

    async def _steady(self, number: int) -> None:
        """One connection for all requests."""
        async with AsyncClient(self._address) as client:
            while not self._stop.is_set():
                await self._ask(client, LENGTHS[number % len(LENGTHS)])

    async def _fleeting(self) -> None:
        """A connection of its own for each request."""
        while not self._stop.is_set():
            async with AsyncClient(self._address) as client:
                await self._ask(client, LENGTHS[0])

    async def _ask(self, client: AsyncClient, length: int) -> None:
        try:
            token_ids = await self._answer(client, length)
        except BlockyardError as error:
            self.failures.append(error)
        else:
            self.num_answers += 1
            if token_ids != self._expected[length]:
                self.failures.append(token_ids)

    async def _answer(self, client: AsyncClient, length: int) -> tuple[int, ...]:
        token_ids: list[int] = []
        async for chunk in client.generate(
            "the", temperature=0, max_tokens=length, ignore_eos=True, timeout=30
        ):
            token_ids += chunk.token_ids
        return tuple(token_ids)


async def test_no_request_fails_while_all_front_ends_are_replaced(server: LocalServer) -> None:
    load = Load(server.address)
    await load.learn()
    running = asyncio.create_task(load.run())
    before = _frontend_pids(server)
    await server.roll()
    after = _frontend_pids(server)
    assert len(after) == 2
    assert not before & after
    load.stop()
    await running
    assert load.failures == []
    assert load.num_answers >= 100


async def test_a_new_one_that_cannot_run_is_given_up_and_the_old_ones_go_on(
    server: LocalServer,
) -> None:
    before = _frontend_pids(server)
    template = Path(server.settings.model) / "chat_template.jinja"
    kept = template.read_bytes() if template.exists() else None
    template.write_text("{% if %}")
    try:
        with pytest.raises(ServeError, match=r"(?s)frontend-0 cannot run.*not compile"):
            await server.roll()
    finally:
        template.unlink()
        if kept is not None:
            template.write_bytes(kept)
    assert _frontend_pids(server) == before
    load = Load(server.address)
    await load.learn()
    await server.roll()  # and now it can
    assert not _frontend_pids(server) & before
