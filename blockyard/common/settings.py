"""Settings of a service process, and how it starts: the same for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, Literal, Self, TypeVar

import pydantic
from pydantic import Field
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from blockyard.common import logs
from blockyard.common.process import exit_with_parent

UNUSABLE: Final = 2
"""Exit code: settings, files or address cannot be used, so a restart would not help."""
CRASHED: Final = 1
"""Exit code: a bug."""

log = logging.getLogger(__name__)


def settings_config(service: str, module: str) -> SettingsConfigDict:
    """Flags first, then environment (BLOCKYARD_<SERVICE>_<FIELD>), then defaults; frozen."""
    return SettingsConfigDict(
        env_prefix=f"BLOCKYARD_{service.upper()}_",
        frozen=True,
        extra="forbid",
        cli_prog_name=f"python -m {module}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )


class ServiceSettings(BaseSettings):
    """What every service process has. One frozen object, validated once."""

    log_format: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_contents: bool = Field(
        False, description="Log the messages of unexpected exceptions, which may quote prompts."
    )
    exit_with_parent: bool = Field(
        False, description="Die with the process that started this one (Linux)."
    )

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """Read flags and environment.

        Exits with a usage message; raises pydantic.ValidationError.
        """
        return CliApp.run(cls, cli_args=list(arguments))


Settings = TypeVar("Settings", bound=ServiceSettings)


def run_service(
    service: str,
    settings_type: type[Settings],
    arguments: Sequence[str],
    serve: Callable[[Settings], int],
    unusable: tuple[type[Exception], ...],
) -> int:
    """Configure logs, read settings and run `serve`; returns the exit code.

    Args:
        service: name in the logs.
        settings_type: what to read.
        arguments: flags.
        serve: runs until the service is stopped; returns the exit code.
        unusable: errors that end the process with one line and exit code UNUSABLE; others are
            bugs, and end it with CRASHED.
    """
    logs.configure(service)
    try:
        settings = settings_type.parse(arguments)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            log.error("setting %s: %s", name, message) if name else log.error("%s", message)
        return UNUSABLE
    logs.configure(
        service, settings.log_format, settings.log_level, has_contents=settings.log_contents
    )
    if settings.exit_with_parent:
        exit_with_parent()
    logs.event(log, "settings", **settings.model_dump(mode="json", exclude_unset=True))
    try:
        return serve(settings)
    except unusable as error:
        log.error("%s", error)
        return UNUSABLE
    except Exception:
        # The process's edge. Python's own report would hold the exception's message.
        log.exception("crashed")
        return CRASHED
