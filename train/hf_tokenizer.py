"""The `tokenizers` library: it trains vocabularies, our own become its, and a tokenizer.json of others becomes ours."""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tiktoken

from train.errors import InputError


class HFTokenizer:
    """What a model's tokenizer.json says, with those methods of `tiktoken.Encoding` that are used here. Ids up to
    `vocab_size` that it does not have stand for no text; `end_of_text` is its token between documents."""

    def __init__(self, content: bytes, vocab_size: int | None, end_of_text: str):
        from tokenizers import Tokenizer

        self._tokenizer, about = read_tokenizer(content)
        special, plain = special_tokens(about), _without_first_blank(about)
        self._piece_tokenizer = self._tokenizer if plain == about else Tokenizer.from_str(json.dumps(plain))
        for tokenizer in (self._tokenizer, self._piece_tokenizer):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True  # as the characters that they are
        if end_of_text not in special:
            known = ", ".join(special) or "none"
            raise InputError(f"tokenizer: end_of_text: {end_of_text!r} is no special token; there are {known}")
        spell, added = _spelling(about), {entry["content"]: entry["id"] for entry in about.get("added_tokens") or []}
        #: id -> bytes, of all tokens but the special ones
        self.tokens = {id_: spell(token) for token, id_ in self._tokenizer.get_vocab(False).items()}
        self.tokens |= {id_: token.encode() for token, id_ in added.items()}
        self._special = {id_: token.encode() for token, id_ in special.items()}
        self.tokens = {id_: token for id_, token in self.tokens.items() if id_ not in self._special}
        least = max(*self.tokens, special[end_of_text]) + 1  # other special tokens may lie beyond a model's vocabulary
        if vocab_size is not None and vocab_size < least:
            raise InputError(f"tokenizer: vocab_size={vocab_size} is less than the {least} ids of its file")
        self.content, self.eot_token = content, special[end_of_text]
        self.n_vocab = vocab_size or max(*self.tokens, *self._special) + 1
        self.special_tokens_set = {token for token, id_ in special.items() if id_ < self.n_vocab}
        self.name = f"json-{hashlib.sha256(content).hexdigest()[:16]}"
        with_text, text = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        at = next(n for n in range(len(with_text)) if with_text[n:][: len(text)] == text)
        #: what a text begins with, such as the token <s>
        self.prefix = with_text[:at]

    def encode(self, text: str, allowed_special: str | Iterable[str] = ()) -> list[int]:
        self._tokenizer.encode_special_tokens = not allowed_special
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = True
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text: str, disallowed_special: Sequence[str] = ()) -> np.ndarray:
        """Of a piece of a document, without the blank that some tokenizers put before a text."""
        return np.array(self._piece_tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_single_token(self, token: str) -> int:
        return self._tokenizer.token_to_id(token)

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.tokens.get(token) or self._special.get(token, b"")

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.decode_single_token_bytes, tokens)).decode("utf-8", "replace")


def read_tokenizer(content: bytes) -> tuple[Any, dict]:
    """The library's tokenizer and what the file says. InputError if it is no tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content), json.loads(content)
    except Exception as e:  # the library raises nothing more special
        raise InputError(f"tokenizer: not a tokenizer.json that the tokenizers library reads: {e}") from None


def special_tokens(about: dict) -> dict[str, int]:
    """The special tokens of a tokenizer.json and their ids."""
    return {entry["content"]: entry["id"] for entry in about.get("added_tokens") or [] if entry["special"]}


def _without_first_blank(about: Any) -> Any:
    """A tokenizer that puts no blank before a text (SentencePiece's dummy prefix)."""
    if isinstance(about, list):
        return [_without_first_blank(each) for each in about if not _is_prepend(each)]
    if not isinstance(about, dict):
        return about
    scheme = {"prepend_scheme": "never"} if about.get("type") == "Metaspace" else {}
    return {key: None if _is_prepend(value) else _without_first_blank(value) for key, value in about.items()} | scheme


def _is_prepend(about: Any) -> bool:
    return isinstance(about, dict) and about.get("type") == "Prepend"


def _spelling(about: dict) -> Callable[[str], bytes]:
    """The function from a vocabulary's word to the bytes that it stands for. InputError for an unknown spelling."""
    decoder = json.dumps(about.get("decoder"))
    if '"ByteLevel"' in decoder:
        value = {character: byte for byte, character in enumerate(byte_characters())}
        return lambda word: bytes(value[c] for c in word) if all(c in value for c in word) else word.encode()
    if "\\u2581" in decoder:  # as SentencePiece writes a blank; bytes that have no token are <0x0A>

        def spell(word: str) -> bytes:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", word)
            return bytes.fromhex(byte[1]) if byte else word.replace("\u2581", " ").encode()

        return spell
    raise InputError("tokenizer: its words are spelled neither by bytes, as GPT-2's, nor as SentencePiece's")


def train_hf(sample: Sequence[str], vocab_size: int, pattern: str):
    """The `tokenizers.Tokenizer` behind `bpe`, without the end of text. Pairs that occur once get no entry."""
    # Without it the library warns at every later fork that it has used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _hf(models.BPE(), pattern)
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
    characters = byte_characters()
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


def byte_characters() -> list[str]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    substitute = {byte: 0x100 + index for index, byte in enumerate(others)}
    return [chr(substitute.get(byte, byte)) for byte in range(256)]
