"""Text to token ids: plain prompts, and chats through the model's template.

Text that clients write never becomes a control token:
- a plain prompt is encoded as the model library would (post-processor's BOS included), except that
  special tokens written in it stay text;
- in a chat, only the template's special tokens are recognised. If a message contains the text of
  one, the rendered prompt is cut at the template's special tokens and the pieces between are
  encoded as plain text. Nothing is added to a rendered chat, so BOS is there once if the template
  writes it, whatever the post-processor does.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from tokenizers import Tokenizer

from blockyard.common.model_dir import ModelDir, ModelDirError
from scheduler_svc.frontend.chat_template import ChatTemplate, ChatTemplateError
from scheduler_svc.frontend.vocabulary import (
    UnsupportedDecoderError,
    Vocabulary,
    load_vocabulary,
)

_NUM_THREADS: Final = 2
_NORMALISER_MARGIN: Final = 2
"""A normaliser may shorten text before it is cut into tokens."""

Message = dict[str, str]
"""{"role": ..., "content": ...}"""


class PromptTokenizer:
    """Encodes prompts in a small thread pool, so that long ones do not block the event loop."""

    def __init__(self, model: ModelDir) -> None:
        """Read tokenizer.json and compile the chat template. Raises ModelDirError."""
        self._recognising = _load(model)
        self._literal = _load(model)
        self._literal.encode_special_tokens = True
        specials = {
            token.content: token_id
            for token_id, token in self._recognising.get_added_tokens_decoder().items()
            if token.special
        }
        self._special_ids = specials
        # Longest first, as alternatives are tried in order.
        self._special_text = _alternatives(sorted(specials, key=len, reverse=True))
        self._template = self._compile_template(model)
        self._longest_token_chars = max(map(len, self._recognising.get_vocab()), default=1)
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenizer")
        try:
            self.vocabulary: Vocabulary = load_vocabulary(self._recognising, model.vocab_size)
        except UnsupportedDecoderError as error:
            raise ModelDirError(f"{model.tokenizer_path}: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` may be called."""
        return self._template is not None

    def max_text_chars(self, max_tokens: int) -> int:
        """Longer texts surely have more than `max_tokens` tokens, whatever they say."""
        return max_tokens * self._longest_token_chars * _NORMALISER_MARGIN

    async def encode_prompt(self, text: str) -> list[int]:
        """Ids of a plain prompt."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._encode_prompt, text)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a rendered chat. Raises ChatTemplateError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._encode_chat, messages)

    def close(self) -> None:
        """Release the threads; encodings under way are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile_template(self, model: ModelDir) -> ChatTemplate | None:
        if model.chat_template is None:
            return None
        bos = None if model.bos_token_id is None else self._token_text(model.bos_token_id)
        eos = self._token_text(model.eos_token_ids[0]) if model.eos_token_ids else None
        try:
            return ChatTemplate(model.chat_template, bos or "", eos or "")
        except ChatTemplateError as error:
            raise ModelDirError(f"{model.path}: {error}") from error

    def _token_text(self, token_id: int) -> str | None:
        text: str | None = self._recognising.id_to_token(token_id)
        return text

    def _encode_prompt(self, text: str) -> list[int]:
        return _encode(self._literal, text, add_special_tokens=True)

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        assert self._template is not None
        if not any(self._special_text.search(message["content"]) for message in messages):
            text = self._template.render(messages)
            return _encode(self._recognising, text, add_special_tokens=False)
        return self._encode_masked(self._template, messages)

    def _encode_masked(self, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
        """Hide special text in messages behind unguessable marks while the template renders."""
        hidden: list[str] = []
        nonce = secrets.token_hex(16)

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{nonce}-{len(hidden) - 1}-"

        masked = [
            {**message, "content": self._special_text.sub(hide, message["content"])}
            for message in messages
        ]
        mark = re.compile(f"{nonce}-([0-9]+)-")
        ids: list[int] = []
        for piece in self._special_text.split(template.render(masked)):
            if piece in self._special_ids:
                ids.append(self._special_ids[piece])
            elif piece:
                text = mark.sub(lambda match: hidden[int(match[1])], piece)
                ids += _encode(self._literal, text, add_special_tokens=False)
        return ids


def _load(model: ModelDir) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(model.tokenizer_path))
    # The library raises plain Exception for whatever is wrong with the file.
    except Exception as error:
        raise ModelDirError(f"{model.tokenizer_path}: cannot be used ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _alternatives(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the texts, as a group so that `split` keeps it; nothing if there are none."""
    return re.compile(f"({'|'.join(map(re.escape, texts))})" if texts else "((?!))")


def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # Only the batch call releases the GIL while it encodes.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids
