"""A paged cache: sequences of different lengths in one batch decode as each alone, and blocks go round among them."""

import math

import pytest
import torch
from helpers import assert_near, each_attending, make

from archs import VARIANTS
from archs.cache import FullCache, State
from archs.paged import PagedCache

GQA = "gqa", VARIANTS["gqa"].examples[0]
BLOCK, LATER = 4, 6
PROMPTS = 3, 17, 8, 1


def alone(model, tokens_T, prompt):
    """Logits (1 + later, V) after the prompt and after each later token, in a cache of its own."""
    cache = model.new_cache(1, len(tokens_T))
    logits = [model.prefill(tokens_T[None, :prompt], cache)]
    return torch.cat(logits + [model.decode(token[None], cache) for token in tokens_T[prompt:]])


def together(model, cache, sequences, texts, prompts=PROMPTS):
    """The same for each of the sequences (B, 1 + later, V), prefilled one by one and decoded as one batch."""
    pairs = list(zip(sequences, texts, prompts, strict=True))
    logits = [torch.cat([model.prefill(text[None, :prompt], cache.batch([s])) for s, text, prompt in pairs])]
    for step in range(LATER):
        tokens = torch.stack([text[prompt + step] for _, text, prompt in pairs])
        logits.append(model.decode(tokens, cache.batch(sequences)))
    return torch.stack(logits, dim=1)


def random_texts(prompts=PROMPTS):
    return [torch.randint(97, (prompt + LATER,)) for prompt in prompts]


def poison(cache, sequence):
    """Makes NaN of all that a sequence has, as a model that diverged would."""
    for layer in cache.storages:
        for tensor in [layer.state] if isinstance(layer, State) else layer.tensors:
            tensor[sequence.blocks if type(layer) is FullCache else sequence.row] = math.nan


@pytest.mark.parametrize(("block_size", "dtype"), [(1, torch.float32), (16, torch.float32), (64, torch.bfloat16)])
@each_attending
def test_sequences_of_different_lengths_decode_as_each_alone(arch, options, block_size, dtype):
    model, texts = make(arch, options, layers=4).to(dtype), random_texts()
    cache = PagedCache(model, sequences=4, blocks=64, block_size=block_size)
    for _ in range(2):
        sequences = [cache.admit() for _ in PROMPTS]
        logits = together(model, cache, sequences, texts)
        for row, text, prompt in zip(logits, texts, PROMPTS, strict=True):
            expected = alone(model, text, prompt)
            assert (row - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * expected.abs().max()
        for sequence in sequences:
            poison(cache, sequence)
            cache.free(sequence)
    assert sorted(cache.free_blocks) == list(range(64))


@each_attending
def test_freed_blocks_serve_others_and_what_was_in_them_is_never_read(arch, options):
    """One stays while others come and go, in a pool that is too small for all of them."""
    model, (long, *texts) = make(arch, options, layers=4), random_texts((12, 9, 20, 3))
    cache = PagedCache(model, sequences=2, blocks=12, block_size=BLOCK)
    stays, used = cache.admit(), set()
    logits = [model.prefill(long[None, :12], cache.batch([stays]))]
    for text, token in zip(texts, long[12:], strict=False):
        comes = cache.admit()
        prefilled = model.prefill(text[None, :-1], cache.batch([comes]))
        both = model.decode(torch.stack((text[-1], token)), cache.batch([comes, stays]))
        logits.append(both[1:])
        assert_near(torch.cat((prefilled, both[:1])), alone(model, text, len(text) - 1))
        assert not used or used & set(comes.blocks)
        used |= set(comes.blocks)
        poison(cache, comes)
        cache.free(comes)
    assert_near(torch.cat(logits), alone(model, long[:15], 12))


@each_attending
def test_bytes_are_those_of_whole_blocks_and_no_block_is_in_two_tables(arch, options):
    model = make(arch, options, layers=4)
    cache = PagedCache(model, sequences=4, blocks=30, block_size=BLOCK)
    token, constant = model.kv_bytes_per_token(torch.float32), model.kv_constant_bytes(torch.float32)
    assert cache.nbytes == 30 * BLOCK * token + 4 * constant
    sequences = [cache.admit() for _ in PROMPTS]
    together(model, cache, sequences, random_texts())
    lengths = [prompt + LATER for prompt in PROMPTS]
    assert [sequence.length for sequence in sequences] == lengths
    held = sum(math.ceil(length / BLOCK) for length in lengths)
    assert cache.used_nbytes == held * BLOCK * token
    assert cache.wasted_nbytes == (held * BLOCK - sum(lengths)) * token < len(lengths) * BLOCK * token
    assert cache.free_nbytes == (30 - held) * BLOCK * token
    blocks = [block for sequence in sequences for block in sequence.blocks]
    assert sorted(blocks + cache.free_blocks) == list(range(30))
    assert all(len(sequence.blocks) == math.ceil(sequence.length / BLOCK) for sequence in sequences)


@each_attending
def test_equal_lengths_are_prefilled_together_and_piece_by_piece(arch, options):
    model, tokens_BT = make(arch, options, layers=4), torch.randint(97, (3, 26))
    cache, whole = PagedCache(model, 3, 21, BLOCK), model.new_cache(3, 26)
    batch = cache.batch([cache.admit() for _ in range(3)])
    for piece in tokens_BT.split((11, 9, 1, 1, 4), dim=1):
        assert_near(model.prefill(piece, batch), model.prefill(piece, whole))
    assert batch.length == 26
    batch.reset()
    assert batch.length == cache.used_nbytes == 0


def test_a_full_pool_says_so_and_nothing_changes():
    model = make(*GQA)
    cache = PagedCache(model, sequences=2, blocks=5, block_size=BLOCK)
    a, b = cache.admit(), cache.admit()
    model.prefill(torch.randint(97, (1, 8)), cache.batch([a]))
    model.prefill(torch.randint(97, (1, 7)), cache.batch([b]))
    both = cache.batch([a, b])
    model.decode(torch.tensor([1, 2]), both)

    def state():
        storages = [tensor.clone() for layer in cache.storages for tensor in layer.tensors]
        return a.length, b.length, [a.blocks[:], b.blocks[:]], cache.free_blocks[:], storages

    before = state()
    message = "^1 blocks of 4 tokens are needed and 0 of 5 are free; free a sequence, or use blocks=6$"
    with pytest.raises(ValueError, match=message):
        model.decode(torch.tensor([1]), cache.batch([b]))
    with pytest.raises(ValueError, match=message):
        model.prefill(torch.randint(97, (1, 5)), cache.batch([a]))
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="all 2 sequences are there; free one, or make the cache with sequences=3"):
        cache.admit()
    cache.free(b)
    model.prefill(torch.randint(97, (1, 5)), cache.batch([a]))
    assert a.length == 14


def test_wrong_batches_are_named():
    model = make(*GQA)
    cache = PagedCache(model, sequences=3, blocks=9, block_size=BLOCK)
    a, b = cache.admit(), cache.admit()
    model.prefill(torch.randint(97, (1, 3)), cache.batch([a]))
    batch = cache.batch([a, b])
    gone = "a sequence is not in this cache; it was freed, or is another cache's"
    for wrong, message in (
        (lambda: model.prefill(torch.randint(97, (2, 2)), batch), "one token at a time; prefill them one by one"),
        (lambda: model.decode(torch.tensor([1, 2, 3]), batch), "tokens for 3 sequences, but the cache was made for 2"),
        (lambda: cache.batch([a, a]), "a sequence is twice in the batch"),
        (lambda: cache.batch([]), "a batch of no sequences"),
        (lambda: PagedCache(model, 1, 1, 0), "block_size=0: must be at least 1"),
        (lambda: cache.free(b) or cache.free(b), gone),
        (lambda: cache.batch([b]), gone),
        (lambda: model.decode(torch.tensor([1, 2]), batch), gone),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
