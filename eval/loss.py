"""Validation loss on the held-out text, each token predicted once with at most `context` tokens before it."""

import torch

from eval.subject import EvalContext
from train.module import bits_per_byte


def measure(subject: EvalContext) -> dict:
    """loss: {val_nats: a token, val_bpb: a byte of text, tokens}; text_bpb: val_bpb without what the ends of documents
    cost, as nanochat counts; and nats_at: the mean over the tokens with so many tokens of context before them, in bins
    from the key to before the next one."""
    p = subject.predictions
    nats, tokens = p.nats_NT.double().sum().item(), int(p.predicted_NT.sum())
    loss = {"val_nats": nats / tokens, "val_bpb": bits_per_byte(nats, p.n_bytes), "tokens": tokens}
    is_text_V = torch.from_numpy(subject.data.token_bytes > 0)
    text_NT = p.predicted_NT & is_text_V[p.targets_NT.clamp(min=0)]
    loss["text_bpb"] = bits_per_byte(p.nats_NT[text_NT].double().sum().item(), p.n_bytes)
    if p.predicted_NT.all():
        context = p.nats_NT.shape[1]
        bins = [2**n for n in range(context.bit_length()) if 2**n <= context]
        of_bin = zip(bins, [*bins[1:], context + 1], strict=True)
        # The target in column t has t + 1 tokens before it.
        loss["nats_at"] = {str(a): p.nats_NT[:, a - 1 : b - 1].double().mean().item() for a, b in of_bin}
    subject.show(f"{loss['val_bpb']:.3f} bits per byte")
    return {"loss": loss}
