"""Validation loss on the held-out text, each token predicted once with at most `context` tokens before it."""

import torch
from torch import nn

from train.data import ValidationBatches
from train.module import bits_per_byte, token_nats
from train.tokens import TokenSet

TOKENS_AT_ONCE = 8192


@torch.inference_mode()
def measure_loss(model: nn.Module, data: TokenSet, limit: int, device: torch.device) -> dict:
    """{val_nats: a token, val_bpb: a byte of text, tokens} over about `limit` held-out tokens, in fp32."""
    context = model.options.context
    nats, tokens, n_bytes = 0.0, 0, 0
    for batch, batch_bytes in ValidationBatches(data, context, max(1, TOKENS_AT_ONCE // context), limit):
        loss = token_nats(model, batch.to(device))
        nats, tokens, n_bytes = nats + loss.double().sum().item(), tokens + loss.numel(), n_bytes + batch_bytes
    return {"val_nats": nats / tokens, "val_bpb": bits_per_byte(nats, n_bytes), "tokens": tokens}
