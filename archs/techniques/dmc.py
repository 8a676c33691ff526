"""Dynamic Memory Compression (DMC; Nawrot et al. 2024, arXiv 2403.09636, section 3): a model that was trained further
decides, in each KV head for each token, whether its key and value get a slot or are merged into the last one.

The first element of a key decides (above 0 after a bias: merge), that of the group's first query weighs; keys are then
attended without theirs. A slot is the mean, by weight, of the keys (before their rotation) and values merged into it,
and stands at the position of the last. In training the decision is a Gumbel sigmoid, and a slot that merges is as much
masked for later queries as it merges.

Shapes: B batch, T tokens, H query heads, G KV heads, D head size, O = B G owners.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.attention import Rope, merge_heads, rotate, sdpa, split_heads
from archs.decoder import Decoder
from archs.grouped import Grouped, GroupedAttention
from archs.techniques.slots import Slots
from archs.techniques.technique import Technique

BIAS = -3.0  # of the decision: at first hardly a token merges
TEMPERATURE = 0.1  # of the Gumbel sigmoid
FADED, RISEN = 0.1, 0.7  # shares of the budget


@dataclass(frozen=True)
class DMC(Technique):
    """`budget` is one over the compression ratio, for which a model is trained further on `train_tokens`, at a peak
    rate of `lr`; with a budget of 1.0 it is trained as much and nothing merges. ValueError for numbers that can't be.
    """

    trains = True
    train_tokens: int = 1_000_000
    lr: float = 1e-3

    def check(self) -> None:
        if not isinstance(self.budget, float):
            raise ValueError(f"budget={self.budget!r}: must be a share, as 0.5 for a compression ratio of 2")
        if self.train_tokens < 1:
            raise ValueError(f"train_tokens={self.train_tokens}: must be above 0")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr={self.lr!r}: must be a rate above 0 and below 1")

    @property
    def merges(self) -> bool:
        return self.budget < 1

    @property
    def is_full(self) -> bool:
        return not self.merges

    def validate_model(self, model: Decoder) -> None:
        if not isinstance(model, Grouped):
            raise ValueError(f"DMC merges keys and values of KV heads (MHA, GQA, MQA); {type(model).__name__} has none")

    def retrofit(self, model: Decoder) -> Decoder:
        return merging(model) if self.merges else model

    def before_step(self, model: Decoder, done: float) -> None:
        for block in model.blocks:
            block.attention.attended_D[0] = max(0.0, 1 - done / FADED)

    def penalty(self, model: Decoder, done: float) -> Tensor:
        must_merge = (1 - self.budget) * min(1.0, max(0.0, (done - FADED) / (RISEN - FADED)))
        merged = torch.stack([block.attention.merged for block in model.blocks]).mean()
        return (must_merge - merged).clamp(min=0)

    def keep(self, slots: Slots, prompt: bool) -> None:
        """Nothing is let go of: it was merged before it was kept."""


class MergingAttention(nn.Module):
    """A GroupedAttention (whose weights it takes over, under their names) with decisions; relaxed in training mode."""

    def __init__(self, attention: GroupedAttention):
        super().__init__()
        self.heads, self.kv_heads, self.qkv, self.out = (
            attention.heads,
            attention.kv_heads,
            attention.qkv,
            attention.out,
        )
        still = torch.ones(attention.head_dim)
        still[0] = 0.0
        self.register_buffer("attended_D", still, persistent=False)  # how much of each element of a key
        self.train(attention.training)
        # Of the last batch in training: the share that hard decisions merge, so that they are what reaches the target,
        # with the gradient of the relaxed ones.
        self.merged: Tensor | None = None

    def forward(
        self,
        x_BTW: Tensor,
        rope: Rope,
        cache: "MergedSlots | None" = None,
        start: int | Tensor = 0,
        only_last: bool = False,
    ) -> Tensor:
        """Of all T positions, even with `only_last`. ValueError for a cache of any other kind."""
        if cache is not None and not isinstance(cache, MergedSlots):
            raise ValueError("a model that merges needs the cache that compressed_cache(model, DMC(...)) makes")
        q_BHTD, k_BGTD, v_BGTD = split_heads(self.qkv(x_BTW), self.heads, self.kv_heads, self.kv_heads)
        decision_BGT = k_BGTD[..., 0].float() + BIAS
        weight_BGT = q_BHTD[:, :: self.heads // self.kv_heads, :, 0].float().sigmoid()
        q_BHTD, k_BGTD = rotate(q_BHTD, rope), k_BGTD * self.attended_D.to(k_BGTD.dtype)
        if cache and start:
            cache.merge(start, k_BGTD, v_BGTD, weight_BGT, decision_BGT > 0)
            return self.out(merge_heads(cache.attend(q_BHTD, None, None)))
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
        if cache:
            ends = F.pad(log_append_BGT[..., 1:] == 0, (0, 1), value=True)
            cache.fill(k_BGTD, v_BGTD, total_BGT, ends)
        gone_BGT = F.pad(log_append_BGT[..., 1:], (0, 1))  # what the next token merges into is as much hidden
        T = x_BTW.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x_BTW.device).triu(1)
        own = torch.eye(T, dtype=torch.bool, device=x_BTW.device)
        mask_BGTT = gone_BGT[:, :, None].masked_fill(own, 0.0).masked_fill(future, -torch.inf)
        mask_BHTT = mask_BGTT.repeat_interleave(self.heads // self.kv_heads, 1)
        q, k, v = (x.float() for x in (q_BHTD, rotate(k_BGTD, rope), v_BGTD))
        return self.out(merge_heads(sdpa(q, k, v, attn_mask=mask_BHTT, enable_gqa=True).to(q_BHTD.dtype)))


def merged_shares(log_merge_BGT: Tensor, weight_BGT: Tensor) -> tuple[Tensor, Tensor]:
    """(share of each token j in the slot as it is after token i, (B, G, T, T); weight of that slot, (B, G, T)).

    Token j's part in it is its weight times all decisions to merge from j + 1 to i; the first token opens a slot.
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
        """One token of each sequence into the last slot of a KV head, or behind it."""
        self.append(start, k_BG1D, v_BG1D)
        last = self.count_O.cumsum(0) - 1
        self.score_N[last] = weight_BG1.flatten()
        into = last[merge_BG1.flatten()]
        before, after = self.score_N[into - 1, None], self.score_N[into, None]
        for stream in self.streams:
            merged = (stream[into - 1] * before + stream[into] * after) / (before + after)
            stream[into - 1] = merged.to(stream.dtype)
        self.score_N[into - 1] += self.score_N[into]
        self.position_N[into - 1] = self.position_N[into]
        self.keep(torch.ones_like(self.position_N, dtype=torch.bool).index_fill(0, into, False))

    def place(self, q_ORD: Tensor) -> tuple[Tensor, Tensor]:
        return q_ORD, self.turned(self.keys_ND, self.position_N)


def merging(model: Decoder) -> Decoder:
    """The model, its attention layers changed to merge. ValueError where keys and values are not kept by KV head."""
    if not isinstance(model, Grouped):
        raise ValueError(f"DMC merges keys and values of KV heads (MHA, GQA, MQA); {type(model).__name__} has none")
    for block in model.blocks:
        block.attention = MergingAttention(block.attention)
    return model
