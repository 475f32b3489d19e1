"""Certificates and keys in PEM files, checked before anybody depends on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from blockyard.common.reloading import FileError, read_bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and the chain of certificates that goes with it, own one first; both PEM."""

    chain: bytes
    key: bytes = field(repr=False)


def load_identity(cert_path: Path, key_path: Path) -> Identity:
    """A pair that can be used now. Raises FileError: unreadable, expired, or not a pair."""
    chain, key = read_bytes(cert_path), read_bytes(key_path)
    certificates = _certificates(cert_path, chain)
    for certificate in certificates:
        if (problem := _validity_problem(certificate)) is not None:
            raise FileError(f"{cert_path}: {problem}")
    try:
        public_key = serialization.load_pem_private_key(key, password=None).public_key()
    except TypeError as error:
        raise FileError(f"{key_path}: the key is encrypted; it must not be") from error
    except ValueError as error:
        raise FileError(f"{key_path}: holds no private key in PEM form") from error
    if public_key != certificates[0].public_key():
        raise FileError(f"{key_path}: is not the key of the certificate in {cert_path}")
    return Identity(chain, key)


def load_authorities(path: Path) -> bytes:
    """Certificates of whom to trust, PEM. Raises FileError: unreadable, or all have expired."""
    data = read_bytes(path)
    problems = [_validity_problem(certificate) for certificate in _certificates(path, data)]
    if all(problems):
        raise FileError(f"{path}: {problems[0]}")
    return data


def _certificates(path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise FileError(f"{path}: holds no certificate in PEM form") from error


def _validity_problem(certificate: x509.Certificate) -> str | None:
    """Why the certificate cannot be used now; None if it can."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(UTC)
    if now < begin:
        return f"the certificate is not valid before {begin:%Y-%m-%d %H:%M:%S} UTC"
    if now > end:
        return f"the certificate expired on {end:%Y-%m-%d %H:%M:%S} UTC"
    return None
