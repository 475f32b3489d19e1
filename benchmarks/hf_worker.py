"""Hugging Face transformers in a process of its own: `python -m benchmarks.hf_worker DIR THREADS`.

Answers one JSON object per line on stdin with one on stdout; hf_peer.py is the other end. Float32
on the CPU, transformers' default attention, greedy, batches padded on the left.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.hf_beams import beam_search

Answer = dict[str, Any]
Sequences = list[list[int]]


class Worker:
    """A loaded model and the calls on it; each returns what goes back as JSON."""

    def __init__(
        self, model_dir: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        self._model = cast("Any", model)
        self._model.eval().to(device)
        self._device = device
        eos = self._model.generation_config.eos_token_id
        self._pad_token_id: Final[int] = eos[0] if isinstance(eos, list) else eos

    def describe(self) -> Answer:
        """Which attention transformers chose, and with how many threads."""
        return {
            "attention": self._model.config._attn_implementation,
            "dtype": str(self._model.dtype),
            "num_threads": torch.get_num_threads(),
        }

    def tokenize(self, prompts: list[Answer]) -> Answer:
        """Token ids of prompts that have `prompt`, `messages` or `token_ids`."""
        return {"token_ids": [self._ids_of(prompt) for prompt in prompts]}

    def _ids_of(self, prompt: Answer) -> list[int]:
        if "token_ids" in prompt:
            return list(prompt["token_ids"])
        if "prompt" in prompt:
            return list(self._tokenizer(prompt["prompt"])["input_ids"])
        rendered = self._tokenizer.apply_chat_template(
            prompt["messages"], add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def generate(self, token_ids: Sequences, num_output_tokens: int) -> Answer:
        """One static batch, all rows of it to the same forced length; with the time it took."""
        batch, mask = self._padded(token_ids)
        start_s = time.perf_counter()
        output = self._model.generate(
            batch,
            attention_mask=mask,
            min_new_tokens=num_output_tokens,
            max_new_tokens=num_output_tokens,
            do_sample=False,
            pad_token_id=self._pad_token_id,
        )
        seconds = time.perf_counter() - start_s
        return {"seconds": seconds, "token_ids": output[:, batch.shape[1] :].tolist()}

    def greedy(self, token_ids: Sequences, num_output_tokens: int) -> Answer:
        """What the model itself says at batch 1, with no token that ends it, per sequence.

        One batch of all proposes; then a pass over each whole sequence at batch 1 decides. An
        output whose every token is the likeliest after those before it is the greedy output;
        from the first token that is not, it is generated again, alone.
        """
        outputs = []
        for ids, proposed in zip(
            token_ids, self._continue(token_ids, num_output_tokens), strict=True
        ):
            logits = self.logits([ids + proposed], num_output_tokens + 1)[0, :-1]
            best = logits.argmax(-1).tolist()
            pairs = enumerate(zip(proposed, best, strict=True))
            first = next((index for index, (ours, alone) in pairs if ours != alone), None)
            if first is not None:
                kept = [*proposed[:first], best[first]]
                num_missing = num_output_tokens - len(kept)
                rest = self._continue([ids + kept], num_missing)[0] if num_missing else []
                proposed = kept + rest
            outputs.append(proposed)
        return {"token_ids": outputs}

    def _continue(self, token_ids: Sequences, num_output_tokens: int) -> Sequences:
        """Greedy continuations in one batch; end-of-sequence tokens do not end them."""
        batch, mask = self._padded(token_ids)
        config = self._model.generation_config
        config.eos_token_id, eos = None, config.eos_token_id
        try:
            output = self._model.generate(
                batch,
                attention_mask=mask,
                max_new_tokens=num_output_tokens,
                do_sample=False,
                pad_token_id=self._pad_token_id,
            )
        finally:
            config.eos_token_id = eos
        continuations: Sequences = output[:, batch.shape[1] :].tolist()
        return continuations

    def beams(
        self, token_ids: list[int], options: Answer, bound: float | None, nudges: list[Answer]
    ) -> Answer:
        """See beam_search."""
        return beam_search(self._model, token_ids, options, bound, nudges)

    def next_logits(self, token_ids: list[int], candidates: list[int]) -> Answer:
        """Logits of `candidates` as the token after `token_ids`, at batch 1."""
        logits = self.logits([token_ids], 1)[0, -1]
        return {"logits": logits[candidates].tolist()}

    def batch_noise(self, token_ids: Sequences, num_positions: int) -> Answer:
        """Largest difference of any logit between batch 1 and one batch of all.

        Compared at the last `num_positions` positions of each sequence.
        """
        together = self.logits(token_ids, num_positions)
        largest = 0.0
        for row, ids in zip(together, token_ids, strict=True):
            alone = self.logits([ids], num_positions)[0]
            largest = max(largest, float((row - alone).abs().max()))
        return {"largest_difference": largest, "batch_size": len(token_ids)}

    def logits(self, token_ids: Sequences, num_positions: int) -> torch.Tensor:
        """Logits [batch, num_positions, vocab_size] at the end of each sequence."""
        batch, mask = self._padded(token_ids)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self._model(
            batch, attention_mask=mask, position_ids=positions, logits_to_keep=num_positions
        )
        logits: torch.Tensor = output.logits
        return logits

    def _padded(self, token_ids: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both [batch, longest], padded on the left."""
        longest = max(map(len, token_ids))
        batch = torch.full((len(token_ids), longest), self._pad_token_id)
        mask = torch.zeros_like(batch)
        for row, ids in enumerate(token_ids):
            batch[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        return batch.to(self._device), mask.to(self._device)


def silence_transformers() -> None:
    """No warnings and no progress bars of its own."""
    library_log = cast("Any", transformers_logging)
    library_log.set_verbosity_error()
    library_log.disable_progress_bar()


def main() -> None:
    """Load, then answer until stdin ends."""
    model_dir, num_threads = sys.argv[1], int(sys.argv[2])
    # Whatever libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(num_threads)
    silence_transformers()
    worker = Worker(model_dir)
    calls: dict[str, Callable[..., Answer]] = {
        call.__name__: call
        for call in (
            *(worker.describe, worker.tokenize, worker.generate, worker.greedy),
            *(worker.beams, worker.next_logits, worker.batch_noise),
        )
    }
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer = calls[request.pop("call")](**request)
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
