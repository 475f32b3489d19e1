"""The gRPC face of the engine: front ends' streams, the supervisor's watch, snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.engine.v1 import engine_pb2_grpc
from scheduler_svc.engine.link import FrontendLink
from scheduler_svc.engine.loop import Engine
from scheduler_svc.engine.metrics.frontends import MetricsReportError

Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Translates streams into calls on the engine; holds no state of its own."""

    def __init__(self, engine: Engine) -> None:
        """Serve this engine."""
        self._engine = engine

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        """One front end's stream; its end aborts what the front end still had."""
        hello = await self._hello(request_iterator, context)
        link = self._engine.attach(hello)
        reader = asyncio.create_task(self._read(request_iterator, link))
        try:
            async for frame in link.frames():
                yield frame
            if (problem := await reader) is not None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        finally:
            reader.cancel()
            self._engine.detach(link)

    async def _hello(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> pb.Hello:
        frame = await anext(request_iterator, None)
        if frame is None or frame.WhichOneof("frame") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must be hello")
        assert frame is not None
        if frame.hello.protocol_version != ENGINE_PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the front end speaks protocol {frame.hello.protocol_version}, "
                f"this engine {ENGINE_PROTOCOL_VERSION}",
            )
        served = self._engine.state().model_digest
        if frame.hello.model_digest and served and frame.hello.model_digest != served:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the front end's tokenizer is of model digest {frame.hello.model_digest}, "
                f"the executor serves {served}",
            )
        return frame.hello

    async def _read(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], link: FrontendLink
    ) -> str | None:
        """Take frames until the front end ends the stream; returns what it did wrong, if so."""
        try:
            async for frame in request_iterator:
                kind = frame.WhichOneof("frame")
                if kind == "submit":
                    self._engine.submit(link, frame.submit)
                elif kind == "stop":
                    stop = frame.stop
                    for column in (stop.num_output_tokens, stop.branches):
                        if len(column) not in (0, len(stop.request_ids)):
                            return "stop: a column is not parallel to request_ids"
                    self._engine.stop(link, stop)
                elif kind == "metrics":
                    try:
                        self._engine.frontends.add(link.index, frame.metrics)
                    except MetricsReportError as error:
                        return f"metrics: {error}"
                else:
                    return f"frame {kind} inside a stream"
        finally:
            link.close()
        return None

    async def WatchExecutor(
        self, request: pb.WatchExecutorRequest, context: Context
    ) -> AsyncIterator[pb.WatchExecutorResponse]:
        """The executor link's state, now and after every change."""
        async for state in self._engine.watch():
            yield state

    async def Snapshot(self, request: pb.SnapshotRequest, context: Context) -> pb.SnapshotResponse:
        """Queues and pools between two steps."""
        return self._engine.snapshot()

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: Context
    ) -> pb.FlushCacheResponse:
        """Forget every cached block that nobody holds."""
        return self._engine.flush_cache()
