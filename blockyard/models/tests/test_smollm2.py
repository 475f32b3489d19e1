"""The real default model, imported and compared with transformers' GGUF loader."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from blockyard.models import store
from blockyard.models.tests.tiny_gguf import transformers_model, transformers_tensors

pytestmark = pytest.mark.model


def test_import_equals_transformers_tensor_by_tensor(home: Path) -> None:
    start = time.perf_counter()
    path = store.resolve(store.DEFAULT_MODEL, is_quiet=True)
    assert time.perf_counter() - start < 60
    assert path == home / "models" / store.DEFAULT_MODEL
    source = store._default_source()
    with torch.device("meta"):
        model = transformers_model(path)
    expected = transformers_tensors(source, model)
    with safe_open(path / "model.safetensors", framework="numpy") as ours:
        assert set(ours.keys()) == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(ours.get_tensor(name), tensor.numpy(), err_msg=name)
    assert store.resolve(store.DEFAULT_MODEL) == path
