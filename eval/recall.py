"""Recall: predicting what stood in the context before, which is what attention's memory is for.

In text, a recall hit is a token that ends a pair of tokens which already occurred in its context, as in the YOCO
paper's Table 5 after Zoology (arXiv 2312.04927, section 3); in the generated task, a query is answered right or wrong.
"""

import torch
from torch import Tensor

from eval.subject import EvalContext


def measure(subject: EvalContext) -> dict:
    """loss: for text {hit_nats, hit_tokens, rest_nats, rest_tokens}; for the generated task `answers` and
    accuracy_at_distance, by how far back the pair stands: "8" has those of 5 to 8 tokens."""
    p = subject.predictions
    if not p.predicted_NT.all():
        found = answers(p.right_NT, p.predicted_NT, p.predicted_NT.sum(1))
        subject.show(f"{found['accuracy']:.1%} of the queries right")
        distances_Q, right_Q = distances(p.inputs_NT, p.predicted_NT), p.right_NT[p.predicted_NT]
        upper_Q = 2 ** distances_Q.double().log2().ceil().long()
        at_distance = {str(n): right_Q[upper_Q == n].double().mean().item() for n in upper_Q.unique().tolist()}
        return {"loss": found | {"accuracy_at_distance": at_distance}}
    loss = {}
    hits_NT = recall_hits(p.inputs_NT, p.targets_NT)
    for name, mask_NT in (("hit", hits_NT), ("rest", ~hits_NT)):
        loss[f"{name}_tokens"] = int(mask_NT.sum())
        if loss[f"{name}_tokens"]:
            loss[f"{name}_nats"] = p.mean_nats(mask_NT)
    return {"loss": loss}


def answers(right_NT: Tensor, asked_NT: Tensor, pairs_N: Tensor) -> dict:
    """{accuracy, accuracy_at: {pairs: accuracy}}: the share of the queries that are right, over all sequences and over
    those with as many key-value pairs."""
    right_NT = right_NT & asked_NT
    counts = {str(n): (right_NT[pairs_N == n].sum(), asked_NT[pairs_N == n].sum()) for n in pairs_N.unique().tolist()}
    at = {n: (right / asked).item() for n, (right, asked) in counts.items() if asked}
    return {"accuracy": (right_NT.sum() / asked_NT.sum()).item(), "accuracy_at": at}


def distances(inputs_NT: Tensor, asked_NT: Tensor) -> Tensor:
    """For each query, in the order of `asked_NT.nonzero()`, the number of tokens since its key stood in its pair."""
    sequence_Q, place_Q = asked_NT.nonzero(as_tuple=True)
    same_QT = inputs_NT[sequence_Q] == inputs_NT[sequence_Q, place_Q][:, None]
    return place_Q - same_QT.int().argmax(1)


def recall_hits(inputs_NT: Tensor, targets_NT: Tensor) -> Tensor:
    """Bool (N, T): whether the pair (input, target) of a place stood at an earlier place of the same sequence."""
    pairs_NT = inputs_NT * (int(targets_NT.max()) + 1) + targets_NT
    ordered_NT, places_NT = pairs_NT.sort(dim=1, stable=True)  # equal pairs side by side, the earliest first
    repeated_NT = torch.zeros_like(ordered_NT, dtype=torch.bool)
    repeated_NT[:, 1:] = ordered_NT[:, 1:] == ordered_NT[:, :-1]
    return torch.zeros_like(repeated_NT).scatter(1, places_NT, repeated_NT)
