"""tokenizer.json from GGUF metadata.

A GGUF file holds the vocabulary and the merges, and names the rule that splits text before they
apply (`tokenizer.ggml.pre`). Those rules are llama.cpp's (`llm_tokenizer_bpe`): each pattern splits
what the one before left, and both matches and the text between them stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from blockyard.models.errors import ModelImportError
from blockyard.models.gguf_source import GgufSource

_WORDS_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_CL100K: Final = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _SplitRule:
    """How text is cut before merges apply, and what goes with it."""

    patterns: tuple[str, ...]
    is_nfc: bool = False
    # A piece that is in the vocabulary is taken whole, whatever the merges say.
    has_whole_words: bool = False
    # What the file means when it does not say whether the first token is the BOS.
    adds_bos: bool = False


_DEFAULT: Final = _SplitRule((r"[\p{P}\$\+<=>\^~\|]+", _WORDS_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_GPT2: Final = _SplitRule((_WORDS_GPT2,))
_SMOLLM: Final = _SplitRule((r"\p{N}", _WORDS_GPT2))
_LLAMA3: Final = _SplitRule((_WORDS_CL100K % "{1,3}",), has_whole_words=True, adds_bos=True)
_QWEN2: Final = _SplitRule((_WORDS_CL100K % "",), is_nfc=True)

_SPLIT_RULES: Final = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}

# llama.cpp's token types.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def build_tokenizer(source: GgufSource) -> Tokenizer:
    """The tokenizer the file describes. Raises ModelImportError if it is missing or unknown."""
    kind = source.get("tokenizer.ggml.model", str)
    if kind is None:
        raise ModelImportError(f"{source.path}: the file holds no tokenizer")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(source), _split_rule(source).adds_bos
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(source), True
    else:
        raise ModelImportError(f"{source.path}: tokenizer model {kind!r} is not supported")
    _add_special_tokens(tokenizer, source)
    _add_template(tokenizer, source, adds_bos=adds_bos)
    return tokenizer


def special_token_strings(source: GgufSource) -> dict[str, str]:
    """E.g. {"bos_token": "<s>"}: what tokenizer_config.json says of them."""
    tokens = _tokens(source)
    strings = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = source.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            strings[f"{name}_token"] = _token(source, tokens, token_id)
    return strings


def _byte_level(source: GgufSource) -> Tokenizer:
    rule = _split_rule(source)
    vocabulary = _vocabulary(source)
    merges = []
    for merge in source.require("tokenizer.ggml.merges", list):
        left, _, right = str(merge).partition(" ")
        if not all(piece in vocabulary for piece in (left, right, left + right)):
            raise ModelImportError(f"{source.path}: merge {merge!r} names unknown tokens")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.has_whole_words))
    if rule.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_rule(source: GgufSource) -> _SplitRule:
    name = source.get("tokenizer.ggml.pre", str) or "default"
    if name not in _SPLIT_RULES:
        raise ModelImportError(
            f"{source.path}: pre-tokenizer {name!r} is not supported "
            f"(supported: {', '.join(_SPLIT_RULES)})"
        )
    return _SPLIT_RULES[name]


def _sentencepiece(source: GgufSource) -> Tokenizer:
    """SentencePiece BPE: pieces with scores; the best-scored piece is merged first."""
    tokens = _tokens(source)
    scores = source.require("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ModelImportError(f"{source.path}: {len(tokens)} tokens but {len(scores)} scores")
    vocabulary = _vocabulary(source)
    unknown = _token(source, tokens, source.get("tokenizer.ggml.unknown_token_id", int) or 0)
    merges = _score_merges(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    strips = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if source.get("tokenizer.ggml.add_space_prefix", bool) is False:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(strips)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        tokenizer.decoder = decoders.Sequence([*strips, decoders.Strip(" ", 1, 0)])
    return tokenizer


def _score_merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best-scored piece first."""
    merges = []
    for piece, token_id in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[token_id], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _tokens(source: GgufSource) -> list[str]:
    tokens = source.require("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ModelImportError(f"{source.path}: the vocabulary is empty or not text")
    return tokens


def _types(source: GgufSource, num_tokens: int) -> list[int]:
    types = source.get("tokenizer.ggml.token_type", list)
    if types is not None and len(types) != num_tokens:
        raise ModelImportError(f"{source.path}: {num_tokens} tokens but {len(types)} token types")
    return types if types is not None else [1] * num_tokens


def _vocabulary(source: GgufSource) -> dict[str, int]:
    """Token -> id, without the padding up to a round size. Of equal tokens the first counts."""
    tokens = _tokens(source)
    vocabulary: dict[str, int] = {}
    for token_id, kind in enumerate(_types(source, len(tokens))):
        if kind != _UNUSED:
            vocabulary.setdefault(tokens[token_id], token_id)
    return vocabulary


def _token(source: GgufSource, tokens: list[str], token_id: int) -> str:
    if not 0 <= token_id < len(tokens):
        raise ModelImportError(f"{source.path}: token id {token_id} is not in the vocabulary")
    return tokens[token_id]


def _add_special_tokens(tokenizer: Tokenizer, source: GgufSource) -> None:
    tokens = _tokens(source)
    types = _types(source, len(tokens))
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token, token_kind in zip(tokens, types, strict=True)
            if token_kind == kind and token
        ]
        tokenizer.add_special_tokens(added) if is_special else tokenizer.add_tokens(added)


def _add_template(tokenizer: Tokenizer, source: GgufSource, *, adds_bos: bool) -> None:
    """Put BOS before and EOS after a text, if the file says so."""
    tokens = _tokens(source)
    ends: dict[str, tuple[str, int]] = {}
    for name, default in (("bos", adds_bos), ("eos", False)):
        flag = source.get(f"tokenizer.ggml.add_{name}_token", bool)
        token_id = source.get(f"tokenizer.ggml.{name}_token_id", int)
        if (default if flag is None else flag) and token_id is not None:
            ends[name] = (_token(source, tokens, token_id), token_id)
    if not ends:
        return
    single = [*([ends["bos"][0]] if "bos" in ends else []), "$A"]
    single += [ends["eos"][0]] if "eos" in ends else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *(p.replace("$A", "$B") for p in single)],
        special_tokens=list(ends.values()),
    )
