"""`blockyard models`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from blockyard.cli.errors import CommandError
from blockyard.models import store
from blockyard.models.errors import ModelImportError


@click.group()
def command() -> None:
    """Import models into the local store, and list them.

    The store is $BLOCKYARD_HOME/models, by default ~/.cache/blockyard/models.
    """


@command.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", help="Name in the store; by default made from SOURCE.")
def import_(source: Path, name: str | None) -> None:
    """Import SOURCE: a .gguf file, or a Hugging Face model directory with safetensors."""
    with errors_explained():
        model = store.add(source, name)
    click.echo(f"{model.name}: {model.path}")


@command.command("list")
def list_() -> None:
    """List the stored models."""
    models = store.models()
    if not models:
        click.echo("no models yet; the default one is imported on first use", err=True)
    for model in models:
        num_bytes = sum(file.stat().st_size for file in model.weight_files)
        kind = model.config.get("model_type")
        digest = model.digest[:12]
        click.echo(f"{model.name:40} {kind:8} {num_bytes / 2**20:8.0f} MiB  {digest}")


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """Turn a bad model source into one line on stderr and exit code 2."""
    try:
        yield
    except ModelImportError as error:
        raise CommandError(str(error), 2) from error
