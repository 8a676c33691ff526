"""Rows of owners (KV heads of sequences) that have different numbers of them, one owner's after another's.

Shapes: O owners, N rows of all, S the most rows of an owner, T new rows of each.
"""

import torch
from torch import Tensor


def mask(count_O: Tensor) -> Tensor:
    """True (O, S) for rows, False for padding."""
    return torch.arange(int(count_O.max()), device=count_O.device) < count_O[:, None]


def pad(rows: Tensor, count_O: Tensor) -> Tensor:
    """(N, ...) to (O, S, ...), padded with other rows; a view where all owners have the same number."""
    S = int(count_O.max())
    if len(rows) == len(count_O) * S:
        return rows.unflatten(0, (len(count_O), S))
    places_OS = (count_O.cumsum(0) - count_O)[:, None] + torch.arange(S, device=rows.device)
    return rows[places_OS.clamp(max=len(rows) - 1)]


def flatten(padded_OS: Tensor, count_O: Tensor) -> Tensor:
    """The inverse of `pad`."""
    return padded_OS[mask(count_O)]


def count(true_N: Tensor, count_O: Tensor) -> Tensor:
    """How many of each owner's rows are True, (O,)."""
    return (pad(true_N, count_O) & mask(count_O)).sum(1)


def grow(rows: Tensor, count_O: Tensor, new: Tensor) -> Tensor:
    """The rows with new ones (O, T, ...) at the end of each owner's."""
    new = new.to(rows.dtype)
    if len(rows) == len(count_O) * int(count_O.max()):
        return torch.cat((pad(rows, count_O), new), 1).flatten(0, 1)
    T = new.shape[1]
    grown = rows.new_empty(len(rows) + len(count_O) * T, *rows.shape[1:])
    places_OT = (count_O + T).cumsum(0)[:, None] - T + torch.arange(T, device=rows.device)
    old_N = torch.ones(len(grown), dtype=torch.bool, device=rows.device).index_fill(0, places_OT.flatten(), False)
    grown[old_N], grown[places_OT] = rows, new
    return grown
