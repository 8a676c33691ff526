"""What a trained model loses, and what its cache holds, under the techniques that a study lists in `eval.techniques`.

The first half of a held-out sequence is the prompt; the second half is decoded token by token, each step being given
the true token, with the technique active. `full` without `bits` is what all others are measured against.
"""

import time
from typing import TYPE_CHECKING

import torch

from archs import Decoder
from archs.techniques import Quantisation, Technique, compressed_cache, from_settings
from archs.techniques.dmc import DMC
from train.batches import IGNORED
from train.module import bits_per_byte, token_nats
from train.mqar import RecallTask

TOKENS_AT_ONCE = 32_768  # of all sequences that are decoded together

if TYPE_CHECKING:
    from eval.subject import Subject


def measure(subject: "Subject") -> dict:
    """techniques: for each, with each combination of the values in its lists, loss and accuracy on the second halves
    and the bytes that one sequence's cache holds at the end; or `skipped`, why it does not apply."""
    measured = []
    prompt = max(1, subject.model.options.context // 2)
    for options in subject.config.technique_settings():
        try:
            technique, quantisation = from_settings(options, prompt)
            model = subject.retrofit(technique) if isinstance(technique, DMC) else subject.model
            compressed_cache(model, technique, 1, 1, quantisation=quantisation)
        except ValueError as e:
            measured.append(options | {"skipped": str(e)})
            continue
        model = model.to(subject.model.embed.weight.device)
        found = under(subject, model, technique, quantisation, prompt)
        subject.show(f"{options['technique']}: {found['bytes_held']:,.0f} bytes held")
        measured.append(options | found)
    return {"techniques": measured} if measured else {}


@torch.inference_mode()
def under(
    subject: "Subject", model: Decoder, technique: Technique, quantisation: Quantisation | None, prompt: int
) -> dict:
    kinds = torch.from_numpy(subject.data.token_kinds).to(model.embed.weight.device)
    nats, right, nbytes, notes, seconds = 0.0, 0, 0, 0, 0.0
    context = model.options.context
    given = subject.predictions.inputs_NT, subject.predictions.targets_NT
    sequences = min(len(given[0]), -(-subject.config.technique_tokens // context))
    if isinstance(subject.data, RecallTask):  # its sequences are of each number of pairs in turn
        turns = len(subject.data.pairs)
        sequences = min(len(given[0]), -(-sequences // turns) * turns)
        spread = torch.arange(sequences)
    else:
        spread = torch.linspace(0, len(given[0]) - 1, sequences).long()
    inputs_NT, targets_NT = (x_NT[spread] for x_NT in given)
    rows = max(1, TOKENS_AT_ONCE // context)
    for inputs, targets in zip(inputs_NT.split(rows), targets_NT.split(rows), strict=True):
        inputs, wanted = inputs.to(model.embed.weight.device), targets[:, prompt - 1 :].to(model.embed.weight.device)
        size = len(inputs), context, subject.dtype
        cache = compressed_cache(model, technique, *size, quantisation=quantisation, kind_V=kinds)
        logits = [model.prefill(inputs[:, :prompt], cache)]
        start = time.perf_counter()
        logits += [model.decode(token, cache) for token in inputs[:, prompt:].T]
        if wanted.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        logits_BTV = torch.stack(logits, 1)
        nats += token_nats(logits_BTV, wanted).double().sum().item()
        right += ((logits_BTV.argmax(-1) == wanted) & (wanted != IGNORED)).sum().item()
        nbytes, notes = nbytes + cache.nbytes, notes + cache.notes_nbytes
    wanted_NT = targets_NT[:, prompt - 1 :]
    wanted_N = wanted_NT[wanted_NT != IGNORED]
    per_token = subject.data.token_bytes
    text_bytes = len(wanted_N) * per_token if isinstance(per_token, int) else int(per_token[wanted_N].sum())
    return {
        "prompt": prompt,
        "tokens": context,
        "val_nats": nats / len(wanted_N) if len(wanted_N) else None,  # nothing is predicted in these second halves
        "val_bpb": bits_per_byte(nats, text_bytes) if text_bytes else None,
        "accuracy": right / len(wanted_N) if len(wanted_N) else None,
        "bytes_held": nbytes / sequences,
        "notes_bytes": notes / sequences,
        "tokens_per_s": sequences * (context - prompt) / seconds,
    }
