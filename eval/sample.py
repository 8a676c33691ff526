"""Text from a trained run, through its cache or without one, written as it comes (`kvfrontier sample`)."""

import codecs
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archs import Cache
from archs.sampling import Sampler, stream
from archs.techniques import Quantisation, compressed_cache, from_settings
from archs.techniques.quantised import is_packed, nothing_packed
from train.errors import InputError
from train.machine import find_device, resolve_dtype
from train.tokenizer import token_kinds
from train.trained import TrainedRun, load

BETWEEN_WRITES = 0.02  # seconds


class Made(NamedTuple):
    """The tokens (N, B) of B samples, the seconds until the first of them, and those of `timed` tokens at the end: the
    second one's decode step, which is recorded, is left out, as warm-up is where `eval` measures."""

    tokens_NB: list[list[int]]
    first_s: float
    rest_s: float
    timed: int

    @property
    def tokens_per_s(self) -> float:
        return self.timed * len(self.tokens_NB[0]) / max(self.rest_s, 1e-9)

    def __str__(self) -> str:
        return f"{self.tokens_per_s:,.0f} tokens/s, the first after {1e3 * self.first_s:,.1f} ms"


@torch.inference_mode()
def sample(
    directory: Path, prompt: str, tokens: int, samples: int, how: dict[str, Any], acts: dict[str, Any], cached: bool
) -> None:
    """Writes continuations of the prompt to stdout, the first as it comes, then to stderr how fast it was.

    `how` has fields of `Sampler`, `acts` a technique with its options as in a study's `eval.techniques`. Not `cached`:
    all tokens go through the model for each further one. InputError if the run cannot be sampled from like that.
    """
    run = load(directory)
    dtype = torch.bfloat16 if resolve_dtype("auto") == "bf16" else torch.float32
    model, context = run.model.to(find_device(), dtype), run.model.options.context
    ids = encode(run, prompt)
    length = len(ids) + tokens
    try:
        sampler, (cache, quantisation) = Sampler(**how), new_cache(run, acts, samples, len(ids), length)
    except ValueError as e:
        raise InputError(str(e)) from None
    if length > context:
        _say(f"text gets worse beyond {context} tokens, the context that the model was trained with")
    prompt_BT = torch.tensor([ids] * samples, device=model.embed.weight.device)
    text = Text(run, prompt)
    made = make(stream(model, prompt_BT, sampler, cache if cached else None), tokens, text.write)
    text.end()
    for number, column in enumerate(list(zip(*made.tokens_NB, strict=True))[1:], 2):
        print(f"--- sample {number} ---")
        text = Text(run, prompt)
        text.write(column)
        text.end()
    if cached:
        full = samples * model.kv_stored_bytes(length, dtype)
        if quantisation and not is_packed(cache):
            _say(nothing_packed(quantisation, length))
        _say(f"{made}; the cache holds {cache.nbytes:,} bytes, a full one {full:,}")
    else:
        again = make(stream(model, prompt_BT, sampler, cache), tokens, lambda tokens: None)
        _say(f"without a cache: {made}")
        _say(f"with one: {again}")


def encode(run: TrainedRun, prompt: str) -> list[int]:
    """The prompt's tokens: of text; or ids, where these stand for no text. Without a prompt a new document begins."""
    if run.tokenizer:
        return [*run.prefix, *run.tokenizer.encode_ordinary(prompt)] or [run.tokenizer.eot_token]
    n_vocab = run.model.options.vocab_size
    ids = [int(word) if word.isdecimal() else n_vocab for word in prompt.split()]
    if not ids or max(ids) >= n_vocab:
        raise InputError(f"--prompt: tokens of this run stand for no text; give ids from 0 to {n_vocab - 1}, as '3 17'")
    return ids


def new_cache(
    run: TrainedRun, acts: dict[str, Any], samples: int, prompt: int, length: int
) -> tuple[Cache, Quantisation | None]:
    """An empty cache, under a technique if one acts or the model was trained further for one, and how it is quantised.
    ValueError says what is wrong."""
    model, (technique, quantisation) = run.model, (run.technique, None)
    if acts:
        technique, quantisation = from_settings({"technique": "full"} | acts, prompt)
    if technique is None:
        return model.new_cache(samples, length), None
    kind_V = torch.from_numpy(token_kinds(run.tokenizer, model.options.vocab_size)).to(model.embed.weight.device)
    cache = compressed_cache(model, technique, samples, length, quantisation=quantisation, kind_V=kind_V)
    return cache, quantisation


def make(stream: Iterator[Tensor], tokens: int, write: Callable[[list[int]], object]) -> Made:
    """The first `tokens` tokens of the stream; `write` gets those of the first sample, some milliseconds' worth at
    once: to look at each would make a GPU wait, and takes a tenth of a small model's step."""
    made: list[list[int]] = []
    waiting: list[Tensor] = []
    started = shown = time.perf_counter()
    for number in range(1, tokens + 1):
        waiting.append(next(stream))
        now = time.perf_counter()
        if number in (1, 2, tokens) or now - shown > BETWEEN_WRITES:
            rows = torch.stack(waiting).cpu().tolist()
            now = shown = time.perf_counter()
            write([row[0] for row in rows])
            made, waiting = made + rows, []
        if number == 1:
            first = warm = now
        if number == 2:
            warm = now
    return Made(made, first - started, now - warm, max(0, tokens - 2))


class Text:
    """Writes the prompt to stdout, then tokens as text, each character once all its bytes are there."""

    def __init__(self, run: TrainedRun, prompt: str):
        print(prompt, end="" if run.tokenizer else " ", flush=True)
        self.tokenizer, self.decoder = run.tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, tokens: Sequence[int]) -> None:
        if self.tokenizer:
            text = self.decoder.decode(b"".join(map(self.tokenizer.decode_single_token_bytes, tokens)))
        else:
            text = "".join(f"{token} " for token in tokens)
        print(text, end="", flush=True)

    def end(self) -> None:
        print(self.decoder.decode(b"", final=True), flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
