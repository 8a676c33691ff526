"""Recall: predicting what stood in the context before, which is what attention's memory is for.

In text, a recall hit is a token that ends a pair of tokens which already occurred in its context, as in the YOCO
paper's Table 5 after Zoology (arXiv 2312.04927, section 3); in the generated task, a query is answered right or wrong.
"""

import torch
from torch import Tensor

from eval.subject import EvalContext


def measure(subject: EvalContext) -> dict:
    """loss: for text {hit_nats, hit_tokens, rest_nats, rest_tokens}; for the generated task {accuracy, accuracy_at:
    {pairs: accuracy}}."""
    p = subject.predictions
    if not p.predicted_NT.all():
        right_NT, asked_NT = p.right_NT & p.predicted_NT, p.predicted_NT
        pairs_N = asked_NT.sum(1)
        accuracy = {
            str(n): (right_NT[pairs_N == n].sum() / asked_NT[pairs_N == n].sum()).item()
            for n in pairs_N.unique().tolist()
        }
        overall = (right_NT.sum() / asked_NT.sum()).item()
        subject.show(f"{overall:.1%} of the queries right")
        return {"loss": {"accuracy": overall, "accuracy_at": accuracy}}
    loss = {}
    hits_NT = recall_hits(p.inputs_NT, p.targets_NT)
    for name, mask_NT in (("hit", hits_NT), ("rest", ~hits_NT)):
        loss[f"{name}_tokens"] = int(mask_NT.sum())
        if loss[f"{name}_tokens"]:
            loss[f"{name}_nats"] = p.mean_nats(mask_NT)
    return {"loss": loss}


def recall_hits(inputs_NT: Tensor, targets_NT: Tensor) -> Tensor:
    """Bool (N, T): whether the pair (input, target) of a place stood at an earlier place of the same sequence."""
    pairs_NT = inputs_NT * (int(targets_NT.max()) + 1) + targets_NT
    ordered_NT, places_NT = pairs_NT.sort(dim=1, stable=True)  # equal pairs side by side, the earliest first
    repeated_NT = torch.zeros_like(ordered_NT, dtype=torch.bool)
    repeated_NT[:, 1:] = ordered_NT[:, 1:] == ordered_NT[:, :-1]
    return torch.zeros_like(repeated_NT).scatter(1, places_NT, repeated_NT)
