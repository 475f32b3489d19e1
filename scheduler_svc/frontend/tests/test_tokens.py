"""Token files: whose a token is, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockyard.common.reloading import FileError
from scheduler_svc.frontend.tokens import MIN_TOKEN_CHARACTERS, load_tokens

ALICE = "alice-0123456789abcdef"
BOB = "Ym9iLTAxMjM0NTY3ODlhYmNkZWY="


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_clients_and_their_tokens(tmp_path: Path) -> None:
    text = f"# the team\n\nalice {ALICE}\nbob\t{BOB}\r\nalice {ALICE}-next\nalice {ALICE}\n"
    tokens = load_tokens(write(tmp_path / "tokens", text))
    found = [tokens.client_of(token) for token in (ALICE, BOB, f"{ALICE}-next")]
    assert found == ["alice", "bob", "alice"]
    for token in ("", "alice", ALICE[:-1], ALICE + "0", ALICE.upper(), "\u00e9" * 20):
        assert tokens.client_of(token) is None
    assert ALICE not in repr(vars(tokens))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no token"),
        ("# none yet\n\n", "holds no token"),
        (f"{ALICE}\n", "line 1: must be a client's name and its token"),
        (f"\nalice {ALICE} x\n", "line 2: must be a client's name and its token"),
        (f"al/ice {ALICE}", "line 1: the name must be at most 64 letters, digits and . _ @ -"),
        (f"{'a' * 65} {ALICE}", "line 1: the name must be at most 64 letters"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2: two clients have the same token"),
        (f"alice {ALICE}!", "line 1: the token has characters that a bearer token cannot have"),
        ("alice secret", f"line 1: the token must have at least {MIN_TOKEN_CHARACTERS} characters"),
    ],
)
def test_what_is_wrong_with_a_file(text: str, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tokens", text)
    with pytest.raises(FileError) as caught:
        load_tokens(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert problem in message
    assert "\n" not in message
    for secret in (ALICE, "secret"):
        assert secret not in message.removeprefix(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"missing: cannot be read \(No such file or directory\)"):
        load_tokens(tmp_path / "missing")
    with pytest.raises(FileError, match=r"cannot be read \(Is a directory\)"):
        load_tokens(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="is not text in UTF-8"):
        load_tokens(tmp_path / "binary")
