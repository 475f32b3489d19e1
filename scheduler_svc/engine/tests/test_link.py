import asyncio

import numpy as np

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.engine.link import FrontendLink


def push(link: FrontendLink, ids: list[int], tokens: list[int]) -> None:
    link.push_tokens(np.array(ids, np.uint64), np.array(tokens, np.int32))


async def next_output(link: FrontendLink) -> pb.OutputBatch:
    frame = await asyncio.wait_for(anext(link.frames()), 5)
    return frame.output


async def test_one_step_needs_no_counts() -> None:
    link = FrontendLink(1, "f")
    push(link, [4, 2], [40, 20])
    output = await next_output(link)
    assert list(output.request_ids) == [4, 2]
    assert list(output.token_ids) == [40, 20]
    assert not output.token_counts


async def test_a_slow_front_end_gets_steps_merged_by_request_in_order() -> None:
    link = FrontendLink(1, "f")
    push(link, [4, 2], [40, 20])
    push(link, [2, 9, 4], [21, 90, 41])
    push(link, [2], [22])
    link.push_finish(pb.Finish(request_id=2))
    output = await next_output(link)
    tokens = iter(output.token_ids)
    per_request = {
        request_id: [next(tokens) for _ in range(count)]
        for request_id, count in zip(output.request_ids, output.token_counts, strict=True)
    }
    assert per_request == {2: [20, 21, 22], 4: [40, 41], 9: [90]}
    assert [finish.request_id for finish in output.finishes] == [2]


async def test_only_the_newest_state_is_sent_and_close_ends() -> None:
    link = FrontendLink(1, "f")
    link.push_state(pb.EngineState(ready=False))
    link.push_state(pb.EngineState(ready=True))
    frames = link.frames()
    assert (await anext(frames)).state.ready
    link.close()
    assert [frame async for frame in frames] == []
