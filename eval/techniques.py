"""Loss, accuracy and cache bytes of a trained model under the techniques that a study lists in `eval.techniques`.

The first half of a held-out sequence is the prompt. The second half is decoded token by token with the technique
active, and each step gets the true token. All others are compared with `full` without `bits`.
"""

import time
from typing import TYPE_CHECKING

import torch

from archs import Decoder
from archs.techniques import Quantisation, Technique, compressed_cache, from_settings
from archs.techniques.quantised import is_packed, nothing_packed
from eval.recall import answers
from train.batches import IGNORED
from train.module import bits_per_byte, token_nats
from train.tokenizer import token_kinds

TOKENS_AT_ONCE = 32_768  # of all sequences that are decoded together

if TYPE_CHECKING:
    from eval.subject import EvalContext


def measure(subject: "EvalContext") -> dict:
    """techniques: for each, with each combination of the values in its lists, loss and accuracy on the second halves
    and the bytes that one sequence's cache holds at the end; or `skipped`, why it does not apply."""
    measured = []
    prompt = max(1, subject.model.options.context // 2)
    for options in subject.config.technique_settings():
        try:
            technique, quantisation = from_settings(options, prompt)
            technique.validate_model(subject.model)
            model = subject.retrofit(technique) if technique.trains else subject.model
            compressed_cache(model, technique, 1, 1, quantisation=quantisation)
        except ValueError as e:
            measured.append(options | {"skipped": str(e)})
            continue
        model = model.to(subject.model.embed.weight.device)
        result = evaluate_with_technique(subject, model, technique, quantisation, prompt)
        if "bytes_held" in result:
            subject.show(f"{options['technique']}: {result['bytes_held']:,.0f} bytes held")
        measured.append(options | result)
    return {"techniques": measured} if measured else {}


@torch.inference_mode()
def evaluate_with_technique(
    subject: "EvalContext", model: Decoder, technique: Technique, quantisation: Quantisation | None, prompt: int
) -> dict:
    """The measured part of a technique's entry, or `skipped` where nothing was quantised; `prompt` is in tokens."""
    kinds = torch.from_numpy(token_kinds(subject.data.tokenizer, subject.data.n_vocab)).to(model.embed.weight.device)
    nats, right, nbytes, notes, seconds = 0.0, [], 0, 0, 0.0
    context = model.options.context
    p = subject.predictions
    numbers = subject.data.spread(-(-subject.config.technique_tokens // context), len(p.inputs_NT))
    inputs_NT, targets_NT = (x_NT[torch.tensor(numbers)] for x_NT in (p.inputs_NT, p.targets_NT))
    sequences = len(inputs_NT)
    rows = max(1, TOKENS_AT_ONCE // context)
    for inputs, targets in zip(inputs_NT.split(rows), targets_NT.split(rows), strict=True):
        inputs, targets = (x.to(model.embed.weight.device) for x in (inputs, targets[:, prompt - 1 :]))
        size = len(inputs), context, subject.dtype
        cache = compressed_cache(model, technique, *size, quantisation=quantisation, kind_V=kinds)
        logits = [model.prefill(inputs[:, :prompt], cache)]
        start = time.perf_counter()
        logits += [model.decode(token, cache) for token in inputs[:, prompt:].T]
        if targets.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        logits_BTV = torch.stack(logits, 1)
        nats += token_nats(logits_BTV, targets).double().sum().item()
        right.append((logits_BTV.argmax(-1) == targets).cpu())
        if quantisation and not is_packed(cache):
            return {"skipped": nothing_packed(quantisation, context)}
        nbytes, notes = nbytes + cache.nbytes, notes + cache.metadata_nbytes
    asked_NT, pairs_N = targets_NT[:, prompt - 1 :] != IGNORED, (targets_NT != IGNORED).sum(1)
    predicted_N = targets_NT[:, prompt - 1 :][asked_NT]
    text_bytes = int(subject.data.token_bytes[predicted_N].sum())
    found = answers(torch.cat(right), asked_NT, pairs_N) if len(predicted_N) else {"accuracy": None}
    if (targets_NT != IGNORED).all():  # text
        del found["accuracy_at"]
    return {
        "prompt": prompt,
        "tokens": context,
        "val_nats": nats / len(predicted_N) if len(predicted_N) else None,  # None: nothing is predicted there
        "val_bpb": bits_per_byte(nats, text_bytes) if text_bytes else None,
        **found,
        "bytes_held": nbytes / sequences,
        "notes_bytes": notes / sequences,
        "tokens_per_s": sequences * (context - prompt) / seconds,
    }
