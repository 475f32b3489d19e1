"""Where models are kept."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class StoreSettings(BaseSettings):
    """Settings of the model store; from the environment: BLOCKYARD_HOME."""

    model_config = SettingsConfigDict(env_prefix="BLOCKYARD_", frozen=True)

    home: Path = Field(default_factory=lambda: Path.home() / ".cache" / "blockyard")

    @property
    def models_dir(self) -> Path:
        """One folder per model, named after it."""
        return self.home.expanduser().absolute() / "models"
