"""FastGen (Ge et al. 2023, arXiv 2310.01801, sections 3 and 4): each KV head gets the policy that suits it.

On the prompt one sees how much of a head's attention each policy recovers: special tokens; with punctuation; with the
most attended; with the nearest; everything. A head takes the cheapest that recovers a threshold, and stays with it. The
first token counts as special: it stands where others have a token for the beginning of text.

Shapes: P policies, B sequences, G KV heads, R query heads of one, T prompt tokens, N slots, K thresholds.
"""

import itertools
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from archs.techniques.slots import Slots
from archs.techniques.technique import PromptWeights, Technique, first_and_last, share, top

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

    def validate_options(self, capacity: float) -> None:
        one = self.threshold is None or self.budget == 1.0
        self.check(one, f"threshold={self.threshold} and budget={self.budget}: give one of them")

    def select(self, slots: Slots) -> Tensor:
        return self.policies(slots).gather(0, slots.policy_O.repeat_interleave(slots.count_O)[None])[0]

    def policies(self, slots: Slots) -> Tensor:
        """The slots that each policy keeps, bool (P, N); each keeps all that the one before it does."""
        special = (slots.kind_N == SPECIAL) | (slots.position_N == 0)
        punctuation = slots.kind_N == PUNCTUATION
        frequent = top(slots, slots.score_N, share(self.frequent, slots.length))
        local = first_and_last(slots, 0, share(self.local, slots.length))
        adds = special, punctuation, frequent, local, torch.ones_like(special)
        return torch.stack(list(itertools.accumulate(adds, torch.bitwise_or)))

    def observe_prompt(self, slots: Slots, weights: PromptWeights) -> None:
        super().observe_prompt(slots, weights)
        T, G, capacity = slots.length, slots.kv_heads, self.capacity(slots.length)
        kept_PBGT = self.policies(slots).unflatten(1, (-1, G, T))
        cost_BGP = kept_PBGT.sum(3).permute(1, 2, 0)
        if self.threshold is None and capacity >= T:
            slots.policy_O[:] = len(kept_PBGT) - 1  # all fits: keep everything, and all that follows
            return
        recovered_BGP = self.recovered(kept_PBGT, weights).permute(1, 2, 0)
        recovered_BGP = recovered_BGP.clamp(max=1 - 1e-9).where(cost_BGP < T, 1.0)  # rounding errors are not attention
        threshold_BK = recovered_BGP.flatten(1)  # with a budget the best of what each policy of each head recovers
        if self.threshold is not None:
            threshold_BK = torch.full_like(threshold_BK[:, :1], self.threshold)
        reaches_BKGP = recovered_BGP[:, None] >= threshold_BK[:, :, None, None]
        policy_BKG = reaches_BKGP.int().argmax(3)  # the cheapest that does
        cost_BK = cost_BGP.mT.gather(1, policy_BKG).sum(2)
        fits_BK = (cost_BK <= capacity * G) | (threshold_BK == threshold_BK.amin(1, keepdim=True))
        best_B = threshold_BK.where(fits_BK, -1.0).argmax(1)
        slots.policy_O = policy_BKG[torch.arange(len(best_B), device=best_B.device), best_B].flatten()

    def recovered(self, kept_PBGT: Tensor, weights: PromptWeights) -> Tensor:
        """The share of a query's attention that each policy recovers, mean over the prompt and a KV head's query heads,
        float64 (P, B, G). The nearest tokens are those before each query."""
        T, total_PBG = kept_PBGT.shape[3], 0.0
        special, punctuation, frequent, _, everything = kept_PBGT[:, :, :, None]
        token_T = torch.arange(T, device=kept_PBGT.device)
        for first, weight_BGRtT in weights():
            R, queries = weight_BGRtT.shape[2:4]
            age_tT = token_T[first : first + queries, None] - token_T
            local = frequent | (age_tT < share(self.local, T)) & (age_tT >= 0)
            kept = special, punctuation, frequent, local, everything
            weight_BGtT = weight_BGRtT.sum(2)
            total_PBG += torch.stack([(weight_BGtT * each).sum((2, 3), dtype=torch.float64) for each in kept])
        return total_PBG / (R * T)
