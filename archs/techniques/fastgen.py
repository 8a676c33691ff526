"""FastGen (Ge et al. 2023, arXiv 2310.01801, sections 3 and 4): each KV head gets the policy that suits it.

On the prompt one sees how much of a head's attention each policy recovers: special tokens; with punctuation; with the
most attended; with the nearest; everything. A head takes the cheapest that recovers a threshold, and stays with it. The
first token counts as special: it stands where others have a token for the beginning of text.

Shapes: P policies, O owners (KV heads of sequences) = B G, T prompt tokens, N slots.
"""

import itertools
from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from archs.techniques.slots import Slots
from archs.techniques.technique import Technique, first_and_last, share, top

SPECIAL, PUNCTUATION = 1, 2  # kinds of tokens; all others are 0
Share = Annotated[float, Field(gt=0, le=1)]


class FastGen(Technique):
    """With a `threshold` (0.95 in the paper) the attention decides what is kept. With a `budget` the threshold is, in
    each layer of a sequence, the highest at which its heads together keep no more than that share of the prompt.

    `frequent`, `local`: how many of the most attended and of the nearest tokens, as shares of the tokens seen.
    """

    threshold: Share | None = None
    frequent: Share = 0.3
    local: Share = 0.3
    observes: ClassVar[bool] = True

    def validate_options(self) -> None:
        one = self.threshold is None or self.budget == 1.0
        self.check(one, f"threshold={self.threshold} and budget={self.budget}: give one of them")

    def select(self, slots: Slots, after_prompt: bool) -> Tensor:
        policies_PN = self.policies(slots)
        return policies_PN.gather(0, slots.policy_O[slots.owner_N][None])[0]

    def policies(self, slots: Slots) -> Tensor:
        """The slots that each policy keeps, bool (P, N); each keeps all that the one before it does."""
        special = (slots.kind_N == SPECIAL) | (slots.position_N == 0)
        punctuation = slots.kind_N == PUNCTUATION
        frequent = top(slots, slots.score_N, share(self.frequent, slots.length))
        local = first_and_last(slots, 0, share(self.local, slots.length))
        adds = special, punctuation, frequent, local, torch.ones_like(special)
        return torch.stack(list(itertools.accumulate(adds, torch.bitwise_or)))

    def observe_prompt(self, slots: Slots, weights: Iterable[tuple[int, Tensor]]) -> None:
        slots.score_N += sum(weight.sum((2, 3)) for _, weight in weights).flatten()
        T, owners = slots.length, len(slots.count_O)
        policies_PN = self.policies(slots)
        cost_PO = policies_PN.view(-1, owners, T).sum(2)
        recovered_PO = self.recovered(policies_PN, T, weights)
        recovered_PO = recovered_PO.clamp(max=1 - 1e-9).where(cost_PO < T, 1.0)  # rounding errors are not attention
        threshold_O = recovered_PO.new_full((owners,), self.threshold or 1.0)
        if self.threshold is None:
            threshold_O = self.affordable(recovered_PO, cost_PO, slots.kv_heads, self.capacity(T))
        if self.threshold is None and self.capacity(T) >= T:
            threshold_O, recovered_PO[:-1] = 1.0, 0.0  # all fits: keep everything, and all that follows
        slots.policy_O = (recovered_PO >= threshold_O).int().argmax(0)  # the cheapest that does

    def recovered(self, policies_PN: Tensor, T: int, weights: Iterable[tuple[int, Tensor]]) -> Tensor:
        """The share of a query's attention that each policy recovers, mean over the prompt and a KV head's query heads,
        float64 (P, O). The nearest tokens are those before each query."""
        near, positions = share(self.local, T), torch.arange(T, device=policies_PN.device)
        total_PO: Tensor | float = 0.0
        for first, weight_BGRTS in weights:
            B, G, R, queries, _ = weight_BGRTS.shape
            age_TS = positions[first : first + queries, None] - positions
            local_TS = (age_TS < near) & (age_TS >= 0)
            kept_PBGTS = policies_PN.view(-1, B, G, 1, T).repeat(1, 1, 1, queries, 1)
            kept_PBGTS[3] = kept_PBGTS[2] | local_TS
            attention_BGTS = weight_BGRTS.sum(2)
            total_PO += torch.stack([(attention_BGTS * kept).sum((2, 3), dtype=torch.float64) for kept in kept_PBGTS])
        return total_PO.flatten(1) / (R * T)

    @staticmethod
    def affordable(recovered_PO: Tensor, cost_PO: Tensor, kv_heads: int, capacity: int) -> Tensor:
        """(O,): for each sequence the highest threshold whose policies keep at most capacity x kv_heads slots, or the
        lowest there is."""
        policies = len(recovered_PO)
        recovered_PBG, cost_PBG = (x.view(policies, -1, kv_heads) for x in (recovered_PO, cost_PO))
        B = recovered_PBG.shape[1]
        thresholds_BK = recovered_PBG.transpose(0, 1).reshape(B, -1)  # what each policy of each head recovers
        chosen_BKG = (recovered_PBG[:, :, None] >= thresholds_BK[..., None]).int().argmax(0)
        cost_BK = cost_PBG.permute(1, 0, 2).gather(1, chosen_BKG).sum(2)
        fits_BK = (cost_BK <= capacity * kv_heads) | (thresholds_BK == thresholds_BK.amin(1, keepdim=True))
        return thresholds_BK.where(fits_BK, -1.0).amax(1).repeat_interleave(kv_heads)

    def observe_step(self, slots: Slots, weight_NR: Tensor) -> None:
        slots.score_N += weight_NR.sum(1)
