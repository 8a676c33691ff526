"""Dynamic Memory Compression (DMC; Nawrot et al. 2024, arXiv 2403.09636, section 3): a model that was trained further
decides, in each KV head for each token, whether its key and value get a slot or are merged into the last one.

The first element of a key decides (above 0 after a bias: merge), that of the group's first query weighs; keys are then
attended without theirs. A slot is the mean, by weight, of the keys (before their rotation) and values merged into it,
and stands at the position of the last. In training the decision is a Gumbel sigmoid, and a slot that merges is as much
masked for later queries as it merges.

Shapes: B batch, T tokens, H query heads, G KV heads, D head size, O = B G owners.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from archs.decoder import Chunk, Decoder
from archs.grouped import GroupedAttention
from archs.kv import KV, Training, Uncached
from archs.ops import masked_attention, merge_heads, split_heads
from archs.techniques.quantised import Quantisation
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

    def validate_options(self) -> None:
        is_share = isinstance(self.budget, float)
        self.check(is_share, f"budget={self.budget!r}: must be a share, as 0.5 for a compression ratio of 2")

    def validate_model(self, model: Decoder) -> None:
        layers = model.new_layers(Training())
        own = len({id(kv) for kv in layers if isinstance(kv, Uncached) and not kv.window}) == len(model.blocks)
        if not own or any(type(b.attention) not in (GroupedAttention, MergingAttention) for b in model.blocks):
            name = type(model).__name__
            raise ValueError(f"DMC merges keys and values of KV heads (MHA, GQA, MQA), which {name} does not keep")

    def validate_quantisation(self) -> None:
        raise ValueError("dmc can't be quantised, as what is merged into changes with each token: leave out bits")

    @property
    def is_full(self) -> bool:
        return self.budget == 1.0

    def slots_for(self, model: Decoder, quantisation: Quantisation | None) -> Callable[..., Slots]:
        if not self.is_full and any(type(block.attention) is not MergingAttention for block in model.blocks):
            raise ValueError("DMC works on models that were trained further to merge (DMC.retrofit)")
        return super().slots_for(model, quantisation) if self.is_full else MergedSlots

    def select(self, slots: Slots, after_prompt: bool) -> None:
        """Keeps all: tokens were merged before."""

    def retrofit(self, model: Decoder) -> Decoder:
        self.validate_model(model)
        for block in model.blocks if not self.is_full else ():
            block.attention = MergingAttention(block.attention)
        return model

    def before_step(self, model: Decoder, done: float) -> None:
        for block in model.blocks if not self.is_full else ():
            block.attention.attended_D[0] = max(0.0, 1 - done / FADED)

    def penalty(self, model: Decoder, done: float) -> Tensor | float:
        """max(0, what must merge - what would merge), as a share of the tokens."""
        if self.is_full:
            return 0.0
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
        # In training the share of the last batch that hard decisions merge, with the gradient of the relaxed ones: the
        # hard decisions are what must reach the target.
        self.merged: Tensor | None = None

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        """The output of all T tokens. ValueError for a cache of any other kind."""
        if not isinstance(kv, MergedSlots | Uncached):
            raise ValueError("a model that merges needs the cache that compressed_cache(model, DMC(...)) makes")
        q_BHTD, k_BGTD, v_BGTD = split_heads(self.qkv(x_BTW), self.heads, self.kv_heads, self.kv_heads)
        decision_BGT = k_BGTD[..., 0].float() + BIAS
        weight_BGT = q_BHTD[:, :: self.heads // self.kv_heads, :, 0].float().sigmoid()
        q_BHTD, k_BGTD = chunk.rotate(q_BHTD), k_BGTD * self.attended_D.to(k_BGTD.dtype)
        if chunk.start:
            kv.merge(chunk.start, k_BGTD, v_BGTD, weight_BGT, decision_BGT > 0)
            return self.out(merge_heads(kv.attend(q_BHTD, self.head_dim**-0.5)))
        if self.training:
            noise = torch.rand_like(decision_BGT).clamp(1e-6, 1 - 1e-6).logit()
            relaxed = (decision_BGT + noise) / TEMPERATURE
            log_merge_BGT, log_append_BGT = F.logsigmoid(relaxed), F.logsigmoid(-relaxed)
            share, hard = relaxed[..., 1:].sigmoid().mean(), (decision_BGT[..., 1:] > 0).float().mean()
            self.merged = hard + share - share.detach()
        else:
            merge = decision_BGT > 0
            log_merge_BGT, log_append_BGT = (
                torch.zeros_like(weight_BGT).masked_fill(never, -torch.inf) for never in (~merge, merge)
            )
        share_BGTT, total_BGT = merged_shares(log_merge_BGT, weight_BGT)
        with torch.autocast(x_BTW.device.type, enabled=False):
            k_BGTD, v_BGTD = ((share_BGTT @ x.float()).to(x.dtype) for x in (k_BGTD, v_BGTD))
        if isinstance(kv, MergedSlots):
            kv.fill(k_BGTD, v_BGTD, total_BGT, F.pad(log_append_BGT[..., 1:] == 0, (0, 1), value=True))
        gone_BGT = F.pad(log_append_BGT[..., 1:], (0, 1))  # the slot that the next token merges into is as much hidden
        T = x_BTW.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x_BTW.device).triu(1)
        diagonal = torch.eye(T, dtype=torch.bool, device=x_BTW.device)
        mask_BGTT = gone_BGT[:, :, None].masked_fill(diagonal, 0.0).masked_fill(future, -torch.inf)
        mask_BHTT = mask_BGTT.repeat_interleave(self.heads // self.kv_heads, 1)
        q, k, v = (x.float() for x in (q_BHTD, chunk.rotate(k_BGTD), v_BGTD))
        return self.out(merge_heads(masked_attention(q, k, v, self.head_dim**-0.5, mask_BHTT).to(q_BHTD.dtype)))


def merged_shares(log_merge_BGT: Tensor, weight_BGT: Tensor) -> tuple[Tensor, Tensor]:
    """(share of each token j in the slot as it is after token i, (B, G, T, T); weight of that slot, (B, G, T)).

    Token j's part of it is its weight times all decisions to merge from j + 1 to i; the first token opens a slot.
    """
    log_BGT = log_merge_BGT.double().clamp(min=-50.0)
    log_BGT = F.pad(log_BGT[..., 1:], (1, 0)).cumsum(-1)
    T = log_BGT.shape[-1]
    future = torch.ones(T, T, dtype=torch.bool, device=log_BGT.device).triu(1)
    part_BGTT = (log_BGT[..., :, None] - log_BGT[..., None, :]).masked_fill(future, -torch.inf).float().exp()
    part_BGTT = part_BGTT * weight_BGT[..., None, :]
    total_BGT = part_BGTT.sum(-1)
    return part_BGTT / total_BGT[..., None], total_BGT


class MergedSlots(Slots):
    """Slots whose keys are not rotated; `score_N` is the weight that was merged into each."""

    def fill(self, k_BGTD: Tensor, v_BGTD: Tensor, total_BGT: Tensor, ends_BGT: Tensor) -> None:
        """A prompt's slots as they were after each token, of which those at the `ends` stay."""
        self.append(0, k_BGTD, v_BGTD)
        self.score_N = total_BGT.flatten().float()
        self.keep(ends_BGT.flatten())

    def merge(self, start: int, k_BG1D: Tensor, v_BG1D: Tensor, weight_BG1: Tensor, merge_BG1: Tensor) -> None:
        """One token of each sequence, merged into the last slot of a KV head or put after it."""
        self.append(start, k_BG1D, v_BG1D)
        last = self.count_O.cumsum(0) - 1
        self.score_N[last] = weight_BG1.flatten()
        into = last[merge_BG1.flatten()]
        before, after = self.score_N[into - 1, None], self.score_N[into, None]
        for x in self.tensors:
            x[into - 1] = ((x[into - 1] * before + x[into] * after) / (before + after)).to(x.dtype)
        self.score_N[into - 1] += self.score_N[into]
        self.position_N[into - 1] = self.position_N[into]
        self.keep(torch.ones_like(self.position_N, dtype=torch.bool).index_fill(0, into, False))

    def positioned(self, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        return q_ORD, self.moved(self.keys_ND, self.position_N)
