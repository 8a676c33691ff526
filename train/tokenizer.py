"""Tokenizers, all used through `tiktoken.Encoding`.

A small model would waste most of its parameters on a vocabulary made for the whole web, so the default, `bpe`, is
trained on the study's own text. The `tokenizers` library finds the merges, tiktoken applies them.
"""

import base64
import hashlib
import itertools
import json
import math
import os
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from train.errors import InputError
from train.files import write_atomic
from train.sections import TokenizerConfig

END_OF_TEXT = "<|endoftext|>"
NAMED = "gpt2", "cl100k_base", "o200k_base"
NAMES = "bpe", "bytes", *NAMED

# A word with the one sign or space before it, up to three digits, a run of signs, white space: GPT-2's idea. Runs end
# at 64 characters: without a bound, training on a long run of one character takes minutes.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}{1,64}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"

RANKS = "tokenizer.tiktoken"  # the file of a trained vocabulary


def load_tokenizer(
    config: TokenizerConfig, folder: Path, sample: Callable[[], Sequence[str]] | None = None
) -> tiktoken.Encoding:
    """The encoding that a study names; InputError if it is unknown, cannot be downloaded or cannot have this size.

    `bytes`: 256 byte values and the end of text. `bpe`: exactly `vocab_size` entries (byte values and end of text
    included), read from `folder` or trained on the text of `sample()` and stored there. `gpt2`, `cl100k_base`,
    `o200k_base`: tiktoken's, downloaded at their first use.
    """
    name, vocab_size = config.name, config.vocab_size
    if name not in NAMES:
        raise InputError(f"tokenizer: unknown name {name!r}; allowed are {', '.join(NAMES)}")
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


def vocabulary(encoding: tiktoken.Encoding) -> str:
    """The hash of a vocabulary that was trained here."""
    return encoding.name.rpartition("-")[2]


def save_vocabulary(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Writes a vocabulary that was trained here to `folder`, where `load_tokenizer` finds it. OSError if that fails."""
    content = _ranks_text(sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get))
    if not (folder / RANKS).is_file() or (folder / RANKS).read_bytes() != content:
        write_atomic(folder / RANKS, content)


def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """int64 (n_vocab,): bytes of text that each token stands for; 0 for the end of text and for ids not in use."""
    sizes = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token in encoding.token_byte_values():
        sizes[encoding.encode_single_token(token)] = len(token)
    return sizes


def token_kinds(encoding: tiktoken.Encoding | None, n_vocab: int) -> np.ndarray:
    """uint8 (n_vocab,): 1 for special tokens, 2 for punctuation with or without blanks around it, 0 for all others."""
    kinds = np.zeros(n_vocab, dtype=np.uint8)
    for token in encoding.token_byte_values() if encoding else []:
        text = token.strip()
        if text and all(chr(c) in string.punctuation for c in text):
            kinds[encoding.encode_single_token(token)] = 2
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
    trained = json.loads(train_hf(sample, min(vocab_size, most)).to_str())["model"]["vocab"]
    if len(trained) < vocab_size - 1:
        gives = f"the training text gives a bpe vocabulary of at most {len(trained) + 1} entries, not {vocab_size}"
        raise InputError(f"tokenizer: {gives}; lower vocab_size, give more text, or use the bytes tokenizer")
    # The library spells bytes as printable characters and numbers them in that order, before the merges.
    value = {character: bytes([byte]) for byte, character in enumerate(_byte_characters())}
    merged = [token for token in sorted(trained, key=trained.get) if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + [b"".join(value[c] for c in token) for token in merged]


def train_hf(sample: Sequence[str], vocab_size: int):
    """The `tokenizers.Tokenizer` behind `bpe`, without the end of text. Pairs that occur once get no entry."""
    # Without it the library warns at every later fork that it has used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _hf(models.BPE(), PATTERN)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    sizes = {"vocab_size": vocab_size - 1, "min_frequency": 2}
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(**sizes, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _hf(model, pattern: str):
    """A `tokenizers.Tokenizer` that splits by `pattern` and applies the model to the bytes of each piece."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    split, on_bytes = pre_tokenizers.Split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(Regex(pattern), "isolated"), on_bytes])
    return tokenizer


def as_hf(encoding: tiktoken.Encoding):
    """The `tokenizers.Tokenizer` that gives the same ids. Special tokens and unused ids are special tokens there."""
    from tokenizers import AddedToken, decoders, models

    ranks = encoding._mergeable_ranks
    characters = _byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [tuple(spelled[part] for part in _merged_from(token, ranks)) for token in ranks if len(token) > 1]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = _hf(models.BPE(vocab=vocabulary, merges=merges), encoding._pat_str)
    tokenizer.decoder = decoders.ByteLevel()
    special = {rank: token for token, rank in encoding._special_tokens.items()}
    names = [special.get(rank, f"<|unused {rank}|>") for rank in range(len(ranks), encoding.n_vocab)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _merged_from(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge into `token`: its bytes are merged, lowest rank first, until two parts are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=lambda n: ranks.get(pairs[n], math.inf))
        parts[best : best + 2] = [pairs[best]]
    return parts


def _byte_characters() -> list[str]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    substitute = {byte: 0x100 + index for index, byte in enumerate(others)}
    return [chr(substitute.get(byte, byte)) for byte in range(256)]


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
