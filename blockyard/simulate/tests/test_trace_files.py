from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockyard.simulate.trace import TraceError
from blockyard.simulate.trace_files import read_trace

AZURE = "arrival_s,prompt_tokens,output_tokens\n0.0,374,44\n4.314579,396,109\n"
MOONCAKE: dict[str, Any] = {
    "timestamp": 0,
    "input_length": 600,
    "output_length": 5,
    "hash_ids": [0, 7],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.trace"


def mooncake(**changes: Any) -> str:
    return json.dumps({**MOONCAKE, **changes}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": the file is empty"),
        ("\n \n", ": the file is empty"),
        ("a,b,c\n1,2,3\n", ":1: neither the header"),
        ("arrival_s,prompt_tokens,output_tokens\n", ": no requests"),
        ("arrival_s,prompt_tokens\n0,1\n", ":1: no column output_tokens"),
        (AZURE + "5,1\n", ":4: 2 columns instead of 3"),
        (AZURE + "5,x,3\n", ":4: prompt_tokens 'x'"),
        (AZURE + "5,-1,3\n", ":4: prompt_tokens '-1': must be 1 to"),
        (AZURE + "5,1,0\n", ":4: output_tokens '0': must be 1 to"),
        (AZURE + "5,1,99999999999\n", ":4: output_tokens '99999999999': must be 1 to"),
        (AZURE + "5,1.5,3\n", ":4: prompt_tokens '1.5'"),
        (AZURE + "nan,1,3\n", ":4: arrival_s 'nan'"),
        (AZURE + "-5,1,3\n", ":4: arrival_s '-5'"),
        (AZURE + "\n1,1,3\n", ":5: arrives before the request above it"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nmonday,1,1\n", ":2: TIMESTAMP 'monday'"),
        (mooncake() + "{]\n", ":2: not a JSON object"),
        (mooncake() + "[1]\n", ":2: not a JSON object"),
        (mooncake() + "{" * 100_000 + "\n", ":2: not a JSON object"),
        ('{"timestamp": 0, "input_length": 5}\n', ":1: no field output_length, hash_ids"),
        (mooncake(output_length=-3), ":1: output_length -3: must be 1 to"),
        (mooncake(output_length=True), ":1: output_length True: must be an integer"),
        (mooncake(input_length="600"), ":1: input_length '600': must be an integer"),
        (mooncake(timestamp="soon"), ":1: timestamp 'soon'"),
        (mooncake(hash_ids=[1]), ":1: hash_ids must have 2 ids of 512 tokens"),
        (mooncake(hash_ids=[1, -1]), ":1: hash_ids [1, -1]: must be a list"),
        (mooncake(hash_ids=[1, 2**63]), ": must be a list"),
        (mooncake(hash_ids=7), ":1: hash_ids 7: must be a list"),
    ],
)
def test_bad_files_are_named_with_the_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(TraceError) as caught:
        read_trace(file)
    assert str(caught.value).startswith(f"{file}")
    assert message in str(caught.value)


def test_no_file_no_text_no_format(file: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_trace(file)
    with pytest.raises(TraceError, match="unknown trace format 'csv'"):
        read_trace(file, "csv")


def test_the_format_asked_for_is_not_guessed(file: Path) -> None:
    file.write_text(AZURE)
    with pytest.raises(TraceError, match=":1: not a JSON object"):
        read_trace(file, "mooncake")


def test_azure(file: Path) -> None:
    file.write_text(AZURE)
    trace = read_trace(file)
    assert trace.name == "some"
    assert trace.arrival_ns.tolist() == [0, 4_314_579_000]
    assert trace.num_prompt_tokens.tolist() == [374, 396]
    assert trace.num_output_tokens.tolist() == [44, 109]
    assert trace.prefixes is None


def test_azure_as_published(file: Path) -> None:
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,109\r\n"
    )
    trace = read_trace(file)
    assert trace.arrival_ns.tolist() == [0, 4_314_579_000]
    assert trace.num_output_tokens.tolist() == [44, 109]


def test_mooncake(file: Path) -> None:
    file.write_text(mooncake(timestamp=3000) + mooncake(timestamp=3001, hash_ids=[0, 9]))
    trace = read_trace(file)
    assert trace.arrival_ns.tolist() == [0, 1_000_000]
    assert trace.num_prompt_tokens.tolist() == [600, 600]
    assert trace.prefixes is not None
    np.testing.assert_array_equal(trace.prefixes.of(1), [0, 9])
