"""What can be wrong with a model directory that somebody else made."""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be served; the message names the file and the field or tensor."""


class UnsupportedModelError(ModelError):
    """The configuration asks for something that this executor does not do."""


class WeightsError(ModelError):
    """A weight file is missing, damaged, or does not match the configuration."""
