"""Claiming an address: live sockets are left alone, dead ones removed."""

from __future__ import annotations

import pathlib
import socket

import pytest

from blockyard.common.listen_address import (
    ListenError,
    claim,
    host_port_or_off,
    is_answered,
    socket_path,
    split_host_port,
)


@pytest.mark.parametrize(
    "address", ["", "9464", ":9464", "host", "host:", "host:x", "host:-1", "host:65536", "host:²"]
)
def test_what_is_not_host_port(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_host_port(address)


def test_host_port() -> None:
    assert split_host_port("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_host_port("[::1]:65535") == ("::1", 65535)


def test_an_optional_address_may_be_empty_but_not_malformed() -> None:
    assert host_port_or_off("") == ""
    assert host_port_or_off("localhost:1") == "localhost:1"
    with pytest.raises(ValueError, match="'9464' is not host:port"):
        host_port_or_off("9464")


def test_only_a_listening_socket_answers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    assert not is_answered(path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        assert not is_answered(path)
        bound.listen()
        assert is_answered(path)
    assert not is_answered(path)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("unix:/a/b", "/a/b"),
        ("unix:///a/b", "/a/b"),
        ("unix:a/b", "a/b"),
        ("127.0.0.1:80", None),
    ],
)
def test_socket_path(address: str, path: str | None) -> None:
    assert socket_path(address) == (None if path is None else pathlib.Path(path))


def test_a_free_address(tmp_path: pathlib.Path) -> None:
    claim(f"unix:{tmp_path}/s")
    claim("127.0.0.1:1")


def test_a_dead_socket_is_removed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    claim(f"unix:{path}")
    assert not path.exists()


def test_a_live_socket_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(ListenError, match="another process is listening"):
            claim(f"unix:{path}")
    assert path.exists()


def test_other_files_are_not_touched(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="not a socket"):
        claim(f"unix:{path}")
    assert path.read_text() == "data"


def test_a_missing_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ListenError, match="does not exist"):
        claim(f"unix:{tmp_path}/no/s")
