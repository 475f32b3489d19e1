"""Certificates and keys that can be used, and all the ways in which they cannot."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from blockyard.common.certificates import load_authorities, load_identity
from blockyard.common.reloading import FileError
from blockyard.common.tests.authority import DAY, Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def refused(pair: Pair) -> str:
    """What is said of a pair that cannot be used: one line."""
    with pytest.raises(FileError) as caught:
        load_identity(pair.cert, pair.key)
    message = str(caught.value)
    assert "\n" not in message
    assert "PRIVATE KEY--" not in message
    return message


def test_a_good_pair_shows_nothing_of_its_key(authority: Authority) -> None:
    pair = authority.issue("server", "localhost")
    identity = load_identity(pair.cert, pair.key)
    assert (identity.chain, identity.key) == (pair.cert.read_bytes(), pair.key.read_bytes())
    assert "PRIVATE" not in repr(identity)


def test_certificates_out_of_their_time(authority: Authority) -> None:
    old = authority.issue("old", "localhost", begin=-2 * DAY, end=-DAY)
    assert re.fullmatch(rf"{old.cert}: the certificate expired on .* UTC", refused(old))
    new = authority.issue("new", "localhost", begin=DAY, end=2 * DAY)
    assert re.fullmatch(rf"{new.cert}: the certificate is not valid before .* UTC", refused(new))


def test_an_expired_certificate_further_up_the_chain(authority: Authority) -> None:
    pair = authority.issue("server", "localhost")
    old = authority.issue("old", "localhost", begin=-2 * DAY, end=-DAY)
    pair.cert.write_bytes(pair.cert.read_bytes() + old.cert.read_bytes())
    assert "expired" in refused(pair)


def test_a_key_of_another_certificate(authority: Authority) -> None:
    one, other = authority.issue("one", "localhost"), authority.issue("other", "localhost")
    message = refused(Pair(one.cert, other.key))
    assert message == f"{other.key}: is not the key of the certificate in {one.cert}"


def test_files_that_are_something_else(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("server", "localhost")
    assert refused(Pair(pair.key, pair.key)) == f"{pair.key}: holds no certificate in PEM form"
    assert refused(Pair(pair.cert, pair.cert)) == f"{pair.cert}: holds no private key in PEM form"
    cut = tmp_path / "cut"
    cut.write_bytes(pair.cert.read_bytes()[:200])
    assert refused(Pair(cut, pair.key)) == f"{cut}: holds no certificate in PEM form"
    empty = tmp_path / "empty"
    empty.touch()
    assert refused(Pair(empty, pair.key)) == f"{empty}: holds no certificate in PEM form"
    with pytest.raises(FileError, match="holds no certificate"):
        load_authorities(empty)


def test_an_encrypted_key(authority: Authority) -> None:
    pair = authority.issue("server", "localhost")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(b"a passphrase")
    pair.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    assert refused(pair) == f"{pair.key}: the key is encrypted; it must not be"


def test_files_that_cannot_be_read(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("server", "localhost")
    missing = tmp_path / "missing"
    assert refused(Pair(missing, pair.key)) == (
        f"{missing}: cannot be read (No such file or directory)"
    )
    assert refused(Pair(tmp_path, pair.key)) == f"{tmp_path}: cannot be read (Is a directory)"


def test_files_that_may_not_be_read(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised here by hand: tests may run as root, who may read everything."""
    pair = authority.issue("server", "localhost")

    def read_bytes(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert refused(pair) == f"{pair.cert}: cannot be read (Permission denied)"


def test_a_bundle_of_authorities_may_hold_some_that_have_expired(
    authority: Authority, tmp_path: Path
) -> None:
    old = authority.issue("old", "localhost", begin=-2 * DAY, end=-DAY)
    bundle = tmp_path / "bundle"
    bundle.write_bytes(old.cert.read_bytes() + authority.ca.read_bytes())
    assert load_authorities(bundle) == bundle.read_bytes()
    with pytest.raises(FileError, match="expired on"):
        load_authorities(old.cert)
