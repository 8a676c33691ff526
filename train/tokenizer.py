"""Tokenizers, all used as `tiktoken.Encoding`s.

A small model would waste most of its parameters on a vocabulary made for the whole web, so the default, `bpe`, is
trained on the study's own text. The `tokenizers` library finds the merges, tiktoken applies them.
"""

import base64
import hashlib
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from train.errors import InputError
from train.files import write_atomic
from train.hf_tokenizer import HFTokenizer, byte_characters, train_hf
from train.sections import TokenizerConfig

END_OF_TEXT = "<|endoftext|>"
NAMED = "gpt2", "cl100k_base", "o200k_base"
NAMES = "bpe", "bytes", *NAMED

# A word with the one sign or space before it, up to three digits, a run of signs, white space: GPT-2's idea. Runs end
# at 64 characters: without a bound, training on a long run of one character takes minutes.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}{1,64}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"

RANKS, JSON = FILES = "tokenizer.tiktoken", "tokenizer.json"  # of a trained vocabulary; of a model of others

Encoding = tiktoken.Encoding | HFTokenizer


def file_of(config: TokenizerConfig) -> str | None:
    """The name of the file that a tokenizer needs in the folder of its tokens; None if it needs none."""
    return JSON if config.name.endswith(".json") else RANKS if config.name == "bpe" else None


def load_tokenizer(
    config: TokenizerConfig, folder: Path, sample: Callable[[], Sequence[str]] | None = None
) -> Encoding:
    """The encoding that a study names; InputError if it is unknown, cannot be downloaded or cannot have this size.

    `bytes`: 256 byte values and the end of text. `bpe`: exactly `vocab_size` entries (byte values and end of text
    included), read from `folder` or trained on the text of `sample()` and stored there. `gpt2`, `cl100k_base`,
    `o200k_base`: tiktoken's, downloaded at their first use. A path of a tokenizer.json: `folder` has a copy of it.
    """
    name, vocab_size = config.name, config.vocab_size
    if file_of(config) == JSON:
        try:
            content = (folder / JSON).read_bytes()
        except OSError:
            raise InputError(f"tokenizer: {folder / JSON} is missing; delete its folder to make it again") from None
        return HFTokenizer(content, vocab_size, config.end_of_text or END_OF_TEXT)
    if config.end_of_text is not None:
        raise InputError(
            f"tokenizer: end_of_text only goes with the path of a tokenizer.json, not with {name}; remove it"
        )
    if name not in NAMES:
        allowed = f"{', '.join(NAMES)}, or the path of a tokenizer.json"
        raise InputError(f"tokenizer: unknown name {name!r}; allowed are {allowed}")
    if name == "bpe":
        return _bpe(vocab_size, folder / RANKS, sample)
    if vocab_size is not None:
        raise InputError(f"tokenizer: vocab_size only goes with bpe, {name} has its own; remove it")
    if name == "bytes":  # in long pieces, as tiktoken's cost is one regex match a piece
        return _encoding("bytes", r"[\s\S]{1,1024}", [bytes([value]) for value in range(256)])
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer: {name} has to be downloaded once, which failed ({type(error).__name__}); go online, point "
            "TIKTOKEN_CACHE_DIR at a folder that holds it, or use bpe or bytes, which need no network"
        ) from error


def vocabulary(encoding: Encoding) -> str:
    """The hash of a vocabulary that has a file."""
    return encoding.name.rpartition("-")[2]


def save_vocabulary(encoding: Encoding, folder: Path) -> None:
    """Writes a vocabulary that has a file to `folder`, where `load_tokenizer` finds it. OSError if that fails."""
    if isinstance(encoding, HFTokenizer):
        file, content = JSON, encoding.content
    else:
        file, content = RANKS, _ranks_text(sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get))
    if not (folder / file).is_file() or (folder / file).read_bytes() != content:
        write_atomic(folder / file, content)


def ordinary_tokens(encoding: Encoding) -> dict[int, bytes]:
    """The bytes of text that each id stands for, special tokens left out."""
    if isinstance(encoding, HFTokenizer):
        return encoding.tokens
    return {encoding.encode_single_token(token): token for token in encoding.token_byte_values()}


def token_bytes(encoding: Encoding) -> np.ndarray:
    """int64 (n_vocab,): bytes of text that each token stands for; 0 for the end of text and for ids not in use."""
    sizes = np.zeros(encoding.n_vocab, dtype=np.int64)
    for number, token in ordinary_tokens(encoding).items():
        sizes[number] = len(token)
    return sizes


def token_kinds(encoding: Encoding | None, n_vocab: int) -> np.ndarray:
    """uint8 (n_vocab,): 1 for special tokens, 2 for punctuation with or without blanks around it, 0 for all others."""
    kinds = np.zeros(n_vocab, dtype=np.uint8)
    for number, token in ordinary_tokens(encoding).items() if encoding else []:
        text = token.strip()
        if text and all(chr(c) in string.punctuation for c in text):
            kinds[number] = 2
    for special in encoding.special_tokens_set if encoding else []:
        kinds[encoding.encode_single_token(special)] = 1
    return kinds


def _bpe(vocab_size: int | None, path: Path, sample: Callable[[], Sequence[str]] | None) -> tiktoken.Encoding:
    if vocab_size is None or vocab_size < 258:
        least = "a vocab_size of at least 258 (256 byte values, one merge, end of text)"
        raise InputError(f"tokenizer: bpe needs {least}, got {vocab_size}; 1024 suits small models")
    tokens = _read_ranks(path, vocab_size)
    if tokens is None:
        if sample is None:
            raise InputError(f"tokenizer: {path} is missing or damaged; delete its folder to make it again")
        tokens = _train(sample(), vocab_size)
        write_atomic(path, _ranks_text(tokens))
    return _encoding(f"bpe-{vocab_size}-{hashlib.sha256(_ranks_text(tokens)).hexdigest()[:16]}", PATTERN, tokens)


def _encoding(name: str, pattern: str, tokens: list[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def _train(sample: Sequence[str], vocab_size: int) -> list[bytes]:
    """Tokens in the order of their ranks: the 256 byte values, then the result of each merge."""
    most = 257 + sum(len(piece.encode()) for piece in sample)  # each merge removes at least one byte's place
    trained = json.loads(train_hf(sample, min(vocab_size, most), PATTERN).to_str())["model"]["vocab"]
    if len(trained) < vocab_size - 1:
        gives = f"the training text gives a bpe vocabulary of at most {len(trained) + 1} entries, not {vocab_size}"
        raise InputError(f"tokenizer: {gives}; lower vocab_size, give more text, or use the bytes tokenizer")
    # The library spells bytes as printable characters and numbers them in that order, before the merges.
    value = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
    merged = [token for token in sorted(trained, key=trained.get) if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + [b"".join(value[c] for c in token) for token in merged]


def _ranks_text(tokens: Sequence[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def _read_ranks(path: Path, vocab_size: int) -> list[bytes] | None:
    """The tokens in a file; None if it is missing or damaged: then the vocabulary is trained again."""
    try:
        data = path.read_bytes()
        tokens = [base64.b64decode(line.split(b" ")[0], validate=True) for line in data.splitlines()]
    except (OSError, ValueError):
        return None
    whole = _ranks_text(tokens) == data and len(set(tokens)) == vocab_size - 1
    return tokens if whole and tokens[:256] == [bytes([byte]) for byte in range(256)] else None
