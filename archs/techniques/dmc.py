"""Dynamic Memory Compression (DMC; Nawrot et al. 2024, arXiv 2403.09636, section 3): a model that was trained further
decides, in each KV head for each token, whether its key and value get a slot or are merged into the last one.

The first element of a key decides (above 0 after a bias: merge), that of the group's first query weighs; keys are then
attended without theirs. A slot is the mean, by weight, of the keys (before their rotation) and values merged into it,
and stands at the position of the last. In training the decision is a Gumbel sigmoid, and a slot that merges is as much
masked for later queries as it merges.

Shapes: B batch, T tokens, H query heads, G KV heads, D head size, O = B G owners, N slots.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from archs.decoder import Chunk, Decoder
from archs.grouped import GroupedAttention
from archs.kv import KV, Training, Uncached
from archs.ops import masked_attention, split_heads
from archs.techniques.slots import Slots
from archs.techniques.technique import Technique

BIAS = -3.0  # of the decision: at first hardly a token merges
TEMPERATURE = 0.1  # of the Gumbel sigmoid
FADED, RISEN = 0.1, 0.7  # shares of the training budget


class DMC(Technique):
    """`budget` is one over the compression ratio, for which a model is trained further on `train_tokens` at a peak rate
    of `lr`; with a budget of 1.0 it is trained as much and nothing merges.

    The decisions' element fades out of the keys over the first tenth of the training; from then on the share of tokens
    that must merge rises, and reaches its target at seven tenths (section 3.2).
    """

    train_tokens: int = Field(1_000_000, ge=1)
    lr: float = Field(1e-3, gt=0, lt=1)
    trains: ClassVar[bool] = True
    quantisable: ClassVar[bool] = False  # what is merged into changes with each token

    def validate_options(self, capacity: float) -> None:
        is_share = isinstance(self.budget, float)
        self.check(is_share, f"budget={self.budget!r}: must be a share, as 0.5 for a compression ratio of 2")

    def validate_model(self, model: Decoder) -> None:
        super().validate_model(model)
        full = {id(kv) for kv in model.new_layers(Training()) if isinstance(kv, Uncached) and not kv.window}
        suited = all(type(block.attention) in (GroupedAttention, MergingAttention) for block in model.blocks)
        if model.options.qk_norm:
            raise ValueError("DMC merges keys and values of KV heads by elements of them, unnormed: leave out qk_norm")
        if not suited or len(full) < len(model.blocks):
            name = type(model).__name__
            raise ValueError(f"DMC merges keys and values of KV heads, and {name} does not keep them in every layer")

    @property
    def is_full(self) -> bool:
        return self.budget == 1.0

    def select(self, slots: Slots) -> None:
        """Keeps all: tokens were merged before."""

    def positioned(self, slots: Slots, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        return q_ORD, slots.keys_ND if self.is_full else slots.moved(slots.keys_ND, slots.position_N)

    # Training further

    def retrofit(self, model: Decoder) -> Decoder:
        """The model with layers that merge, in place; unchanged with a budget of 1.0."""
        self.validate_model(model)
        if not self.is_full:
            model.trained_for = type(self)
            for block in model.blocks:
                block.attention = MergingAttention(block.attention)
        return model

    def before_step(self, model: Decoder, done: float) -> None:
        """To be called before each training step, with the share of the training that is done."""
        for block in model.blocks:
            block.attention.attended_D[0] = max(0.0, 1 - done / FADED)

    def penalty(self, model: Decoder, done: float) -> Tensor:
        """To be added to a step's loss: max(0, what must merge - what would merge), as a share of the tokens."""
        must_merge = (1 - self.budget) * min(1.0, max(0.0, (done - FADED) / (RISEN - FADED)))
        return (must_merge - torch.stack([block.attention.merged for block in model.blocks]).mean()).clamp(min=0)


class MergingAttention(nn.Module):
    """A GroupedAttention (whose weights it takes over, under their names) with decisions; relaxed in training mode."""

    def __init__(self, attention: GroupedAttention):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.qkv, self.out = attention.qkv, attention.out
        attended = torch.ones(attention.head_dim)
        attended[0] = 0.0
        self.register_buffer("attended_D", attended, persistent=False)  # how much of each element of a key
        self.train(attention.training)
        self.merged: Tensor | None = None  # the share of the last training batch that merges

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        """The output of all T tokens. ValueError for a cache of any other kind."""
        if not isinstance(kv, Slots | Uncached):
            raise ValueError("a model that merges needs the cache that compressed_cache(model, DMC(...)) makes")
        if isinstance(kv, Uncached) and kv.mask is not None:
            raise ValueError("DMC merges tokens of different documents: train it further without a document mask")
        q_BHTD, k_BGTD, v_BGTD = split_heads(self.qkv(x_BTW), self.heads, self.kv_heads, self.kv_heads)
        decision_BGT = k_BGTD[..., 0].float() + BIAS
        weight_BGT = q_BHTD[:, :: self.heads // self.kv_heads, :, 0].float().sigmoid()
        q_BHTD, k_BGTD = chunk.rotate(q_BHTD), k_BGTD * self.attended_D.to(k_BGTD.dtype)
        if chunk.start:
            kv.append(chunk.start, k_BGTD, v_BGTD)
            merge_last(kv, weight_BGT.flatten(), decision_BGT.flatten() > 0)
            return self.out(kv.attend(q_BHTD, self.head_dim**-0.5), x_BTW)
        log_merge_BGT, log_append_BGT = self.decisions(decision_BGT)
        future_TT = torch.full((x_BTW.shape[1],) * 2, -torch.inf, device=x_BTW.device).triu(1)
        share_BGTT, weight_BGT = merged_shares(log_merge_BGT, weight_BGT, future_TT)
        with torch.autocast(x_BTW.device.type, enabled=False):
            k_BGTD, v_BGTD = ((share_BGTT @ x.float()).to(x.dtype) for x in (k_BGTD, v_BGTD))
        hidden_BGT = F.pad(log_append_BGT[..., 1:], (0, 1))  # a slot, as much as the next token merges into it
        if isinstance(kv, Slots):
            kv.append(0, k_BGTD, v_BGTD)
            kv.score_N = weight_BGT.flatten()
            kv.keep(hidden_BGT.flatten() == 0)
        mask_BGTT = hidden_BGT[:, :, None].expand_as(share_BGTT).tril(-1) + future_TT
        mask_BHTT = mask_BGTT.repeat_interleave(self.heads // self.kv_heads, 1)
        q, k, v = (x.float() for x in (q_BHTD, chunk.rotate(k_BGTD), v_BGTD))
        with torch.autocast(x_BTW.device.type, enabled=False):
            out_BHTD = masked_attention(q, k, v, self.head_dim**-0.5, mask_BHTT)
        return self.out(out_BHTD.to(q_BHTD.dtype), x_BTW)

    def decisions(self, decision_BGT: Tensor) -> tuple[Tensor, Tensor]:
        """How much each token merges into the last slot, and how much it opens one, as logarithms."""
        hard_BGT = decision_BGT > 0
        if not self.training:
            return hard_BGT.float().log(), (~hard_BGT).float().log()
        noise = torch.rand_like(decision_BGT).clamp(1e-6, 1 - 1e-6).logit()
        relaxed_BGT = (decision_BGT + noise) / TEMPERATURE
        # The hard decisions must reach the target, and the relaxed ones have a gradient.
        relaxed = relaxed_BGT[..., 1:].sigmoid().mean()
        self.merged = hard_BGT[..., 1:].float().mean() + relaxed - relaxed.detach()
        return F.logsigmoid(relaxed_BGT), F.logsigmoid(-relaxed_BGT)


def merged_shares(log_merge_BGT: Tensor, weight_BGT: Tensor, future_TT: Tensor) -> tuple[Tensor, Tensor]:
    """(share of each token j in the slot as it is after token i, (B, G, T, T); weight of that slot, (B, G, T)).

    Token j's part of it is its weight times all decisions to merge from j + 1 to i; the first token opens a slot.
    """
    log_BGT = F.pad(log_merge_BGT.double().clamp(min=-50.0)[..., 1:], (1, 0)).cumsum(-1)
    part_BGTT = (log_BGT[..., :, None] - log_BGT[..., None, :] + future_TT).float().exp() * weight_BGT[..., None, :]
    total_BGT = part_BGTT.sum(-1)
    return part_BGTT / total_BGT[..., None], total_BGT


def merge_last(slots: Slots, weight_O: Tensor, merge_O: Tensor) -> None:
    """Merges the last slot of some KV heads into the one before it; `score_N` has the weights of slots."""
    last_O = slots.count_O.cumsum(0) - 1
    slots.score_N[last_O] = weight_O
    last = last_O[merge_O]
    into, before, after = last - 1, slots.score_N[last - 1, None], slots.score_N[last, None]
    for x in slots.tensors:
        x[into] = ((x[into] * before + x[last] * after) / (before + after)).to(x.dtype)
    slots.score_N[into] += slots.score_N[last]
    slots.position_N[into] = slots.position_N[last]
    slots.keep(torch.ones_like(slots.position_N, dtype=torch.bool).index_fill(0, last, False))
