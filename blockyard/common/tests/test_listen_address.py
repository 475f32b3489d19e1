"""Claiming an address: live sockets are left alone, dead ones removed."""

from __future__ import annotations

import os
import pathlib
import socket
import stat

import grpc.aio
import pytest

from blockyard.common.listen_address import (
    ListenError,
    bind,
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


def test_a_missing_directory_is_made_for_this_user_alone(tmp_path: pathlib.Path) -> None:
    claim(f"unix:{tmp_path}/new/s")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    with pytest.raises(ListenError, match=r"cannot make .* \(No such file or directory\)"):
        claim(f"unix:{tmp_path}/no/such/s")


def test_a_public_address_needs_its_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ListenError, match="does not exist"):
        claim(f"unix:{tmp_path}/no/s", is_private=False)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to(mode: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    with pytest.raises(ListenError, match="others may write to the directory"):
        claim(f"unix:{tmp_path}/shared/s")
    claim(f"unix:{tmp_path}/shared/s", is_private=False)
    (tmp_path / "shared").chmod(0o1777)  # as /tmp: nobody can replace what is not theirs
    claim(f"unix:{tmp_path}/shared/s")


def test_a_directory_that_is_somebody_elses(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.setattr("os.getuid", lambda: 4321)
    if (tmp_path / "d").stat().st_uid == 0:
        os.chown(tmp_path / "d", 1234, -1)
    with pytest.raises(ListenError, match="belongs to another user"):
        claim(f"unix:{tmp_path}/d/s")


@pytest.mark.parametrize(("is_private", "mode"), [(True, 0o600), (False, 0o644)])
async def test_sockets_are_for_this_user_alone_if_they_are_private(
    is_private: bool, mode: int, tmp_path: pathlib.Path
) -> None:
    before = os.umask(0o133)
    try:
        server = grpc.aio.server()
        bind(server, f"unix:{tmp_path}/s", is_private=is_private)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
        assert os.umask(0o133) == 0o133
        await server.stop(None)
    finally:
        os.umask(before)


async def test_a_port_in_use(tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(ListenError, match=f"{address}: cannot listen there"):
            bind(server, address, is_private=True)
        await server.stop(None)
