from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from scheduler_svc.frontend.config import FrontendSettings

REQUIRED = ["--engine", "unix:/e", "--model-dir", "/m"]


def test_flags_are_kebab_case_and_win_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKYARD_FRONTEND_MAX_BUFFERED_TOKENS", "7")
    monkeypatch.setenv("BLOCKYARD_FRONTEND_LISTEN", "0.0.0.0:1")
    settings = FrontendSettings.parse([*REQUIRED, "--listen", "127.0.0.1:2", "--reuse-port"])
    assert (settings.engine, settings.model_dir) == ("unix:/e", Path("/m"))
    assert (settings.listen, settings.max_buffered_tokens) == ("127.0.0.1:2", 7)
    assert settings.reuse_port
    assert not settings.exit_with_parent


def test_settings_are_frozen() -> None:
    settings = FrontendSettings.parse(REQUIRED)
    field = "listen"
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(settings, field, "x")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ([], "engine"),
        ([*REQUIRED, "--max-request-bytes", "1"], "max_request_bytes"),
        ([*REQUIRED, "--drain-grace-s", "-1"], "drain_grace_s"),
        ([*REQUIRED, "--log-format", "xml"], "log_format"),
    ],
)
def test_bad_values_name_the_field(flags: list[str], field: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=field):
        FrontendSettings.parse(flags)
