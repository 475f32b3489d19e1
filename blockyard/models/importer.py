"""Turning a source into a model directory: written beside its place, then renamed into it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from blockyard.common import model_dir
from blockyard.models import gguf_config, gguf_tokenizer, hf_source, safetensors_file
from blockyard.models.errors import ModelImportError
from blockyard.models.gguf_source import GgufSource
from blockyard.models.gguf_weights import GgufWeights

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

NamedTensor = tuple[str, npt.NDArray[np.float32]]

_CHUNK_BYTES: Final = 1 << 22
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class ImportJob:
    """What to import, where to, and whether to draw a progress bar on stderr."""

    source: Path
    target: Path
    is_quiet: bool = False
    # Entries of generation_config.json for a GGUF file, which cannot name them.
    default_sampling: Mapping[str, float | bool] = field(default_factory=dict)


def import_model(job: ImportJob) -> model_dir.ModelDir:
    """Import `job.source` as `job.target`, which must not exist.

    Safe to run twice at once: the first to finish wins, and the other takes its result if it is
    the same model. Raises ModelImportError.
    """
    with _staging(job.target) as staging:
        if job.source.is_dir():
            digest = _import_directory(job, staging)
        elif job.source.is_file():
            digest = _import_gguf(job, staging)
        else:
            raise ModelImportError(f"{job.source}: no such file or directory")
        digest = _with_texts(digest, staging)
        _write_manifest(job, staging, digest)
        _loaded(staging)
        _publish(staging, job.target, digest)
    return _loaded(job.target)


def _with_texts(digest: str, folder: Path) -> str:
    """The digest of config and weights, extended by all that text is made and read with."""
    names = (
        model_dir.TOKENIZER_FILE,
        model_dir.GENERATION_CONFIG_FILE,
        model_dir.CHAT_TEMPLATE_FILE,
    )
    total = hashlib.sha256(digest.encode())
    for name in names:
        path = folder / name
        total.update(path.read_bytes() if path.exists() else b"")
        total.update(b"\0")
    return total.hexdigest()


def checked_name(name: str) -> str:
    """`name` if it can be a folder of the store. Raises ModelImportError."""
    if not _NAME.fullmatch(name):
        raise ModelImportError(
            f"{name!r} is not a model name (lower-case letters, digits, '.', '_', '-')"
        )
    return name


def default_name(source: Path) -> str:
    """A model name from a file or folder name, e.g. "smollm2-135m-instruct.q4_1"."""
    stem = source.resolve().name.lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:100] or "model"


def source_stamp(source: Path) -> str:
    """Changes when the source does: its real path, and size and time of its files."""
    real = source.resolve()
    kinds = ("*.safetensors", "*.json", "*.jinja")
    files = [real] if real.is_file() else sorted(f for kind in kinds for f in real.glob(kind))
    parts = [str(real)]
    for file in files:
        stat = file.stat()
        parts.append(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelImportError(f"{target.parent}: cannot be written ({error})") from error
    try:
        yield staging
    except OSError as error:
        raise ModelImportError(f"import failed: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path, digest: str) -> None:
    staging.chmod(0o755)
    try:
        staging.rename(target)
    except OSError:
        if not (target / model_dir.MANIFEST_FILE).exists() or _loaded(target).digest != digest:
            raise ModelImportError(
                f"{target} exists and is another model; choose another --name, or remove it"
            ) from None


def _import_gguf(job: ImportJob, staging: Path) -> str:
    source = GgufSource(job.source)
    config = gguf_config.model_config(source)
    weights = GgufWeights(source, config)
    gguf_tokenizer.build_tokenizer(source).save(str(staging / model_dir.TOKENIZER_FILE))
    _write_json(staging / model_dir.CONFIG_FILE, config)
    generation = {**gguf_config.generation_config(source), **job.default_sampling}
    _write_json(staging / model_dir.GENERATION_CONFIG_FILE, generation)
    strings = gguf_tokenizer.special_token_strings(source)
    _write_json(staging / "tokenizer_config.json", strings)
    template = source.get("tokenizer.chat_template", str)
    if template is not None:
        (staging / model_dir.CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    _write_codes(staging / model_dir.CODES_FILE, weights)
    return _write_weights(job, staging, weights, _new_hash(config))


def add_codes(source: Path, target: Path) -> None:
    """Write the codes into `target`, imported from the same GGUF file without them.

    Safe to run twice at once. Raises ModelImportError, or OSError if nothing can be written there.
    """
    gguf = GgufSource(source)
    weights = GgufWeights(gguf, gguf_config.model_config(gguf))
    with tempfile.TemporaryDirectory(prefix=".codes.", dir=target) as folder:
        path = Path(folder) / model_dir.CODES_FILE
        _write_codes(path, weights)
        path.replace(target / model_dir.CODES_FILE)


def _write_codes(path: Path, weights: GgufWeights) -> None:
    """Always a file, with no tensor in it if none is stored in a format that is kept.

    Not part of the digest: it says nothing that the weights do not.
    """
    coded = weights.coded
    shapes = {name: shape for name, (_, shape) in coded.items()}
    formats = {name: found for name, (found, _) in coded.items()}
    with path.open("wb") as file:
        safetensors_file.write_bytes(file, shapes, weights.codes(), formats)


def _write_weights(job: ImportJob, staging: Path, weights: GgufWeights, digest: Hash) -> str:
    shapes = weights.shapes
    num_bytes = sum(4 * math.prod(shape) for shape in shapes.values())
    with (staging / model_dir.WEIGHTS_FILE).open("wb") as file, _progress(job, num_bytes) as bar:
        sink = _HashedFile(file, digest)
        safetensors_file.write_float32(sink, shapes, _counted(weights.tensors(), bar))
    return digest.hexdigest()


def _counted(tensors: Iterable[NamedTensor], bar: tqdm[NoReturn]) -> Iterator[NamedTensor]:
    for name, tensor in tensors:
        yield name, tensor
        bar.update(tensor.nbytes)


def _import_directory(job: ImportJob, staging: Path) -> str:
    config = hf_source.read_config(job.source)
    files = hf_source.weight_files(job.source)
    hf_source.copy_rest(job.source, staging, config)
    hf_source.link_weights(files, staging)
    digest = _new_hash(config)
    with _progress(job, sum(file.stat().st_size for file in files)) as bar:
        for file in files:
            with (staging / file.name).open("rb") as data:
                while chunk := data.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()


class _HashedFile:
    """A file whose content is hashed as it is written."""

    def __init__(self, file: BinaryIO, digest: Hash) -> None:
        self._file = file
        self._digest = digest

    def write(self, data: bytes | memoryview, /) -> None:
        self._file.write(data)
        self._digest.update(data)


def _new_hash(config: dict[str, Any]) -> Hash:
    """Starts a model's digest: sha256 over the configuration, then the weight files."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode())


def _progress(job: ImportJob, num_bytes: int) -> tqdm[NoReturn]:
    return tqdm(
        total=num_bytes,
        desc=f"importing {job.target.name}",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=job.is_quiet,
    )


def _write_manifest(job: ImportJob, staging: Path, digest: str) -> None:
    manifest = {
        "format_version": model_dir.FORMAT_VERSION,
        "name": job.target.name,
        "digest": digest,
        "source": str(job.source.resolve()),
        "source_stamp": source_stamp(job.source),
    }
    _write_json(staging / model_dir.MANIFEST_FILE, manifest)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _loaded(path: Path) -> model_dir.ModelDir:
    try:
        return model_dir.load(path)
    except model_dir.ModelDirError as error:
        raise ModelImportError(str(error)) from error
