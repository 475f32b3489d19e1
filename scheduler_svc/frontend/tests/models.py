"""Small tokenizers and model directories, made in the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ["<|start|>", "<|end|>", "<|bos|>"]
START_ID, END_ID, BOS_ID = range(3)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Naïve café, 12345 and more!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "快速的棕色狐狸跳过懒狗。これは日本語の文章です。",
    "नमस्ते दुनिया, यह एक परीक्षण है। مرحبا بالعالم، هذا اختبار.",
    "👩‍👩‍👧‍👦 families, 🇺🇳 flags, 🏴‍☠️ and \U0001d518\U0001d52b \t tabs\n\n  newlines  ",
]

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['content'] == 'forbidden' %}{{ raise_exception('no such content') }}{% endif %}
{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif -%}
"""


def byte_level_tokenizer(*, adds_bos: bool = False) -> Tokenizer:
    """Byte-level BPE over all bytes with some merges; optionally a post-processor writes BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:2] * 3, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "<a b>")])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", BOS_ID)]
        )
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece style: a few pieces, byte tokens for all else, one leading space stripped."""
    pieces = ["<unk>", *SPECIALS, "▁", "▁the", "the", "▁quick", "fox", "a", "b", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def write_model_dir(
    path: Path,
    tokenizer: Tokenizer | None = None,
    template: str | None = TEMPLATE,
    **config: Any,
) -> Path:
    """A model directory with the byte-level tokenizer; `config` overrides config.json."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or byte_level_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True) + 5,
        "max_position_embeddings": 512,
        "bos_token_id": BOS_ID,
        "eos_token_id": END_ID,
    }
    (path / "config.json").write_text(json.dumps(settings | config))
    manifest = {"format_version": 1, "name": "tiny", "digest": "d1", "source": "test"}
    (path / "blockyard.json").write_text(json.dumps(manifest))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path
