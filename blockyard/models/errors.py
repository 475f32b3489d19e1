"""What goes wrong with other people's model files."""

from __future__ import annotations


class ModelImportError(Exception):
    """A source cannot become a local model. The message is one line and says what to do."""
