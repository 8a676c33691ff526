"""Rows of owners (KV heads of sequences) that have different numbers of them, one owner's after another's.

Shapes: O owners, N rows of all, S and T the most rows of an owner.
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


def rank(count_O: Tensor) -> Tensor:
    """The number (N,) of each row among its owner's."""
    first_O = count_O.cumsum(0) - count_O
    return torch.arange(int(count_O.sum()), device=count_O.device) - first_O.repeat_interleave(count_O)


def join(old: Tensor, old_O: Tensor, new: Tensor, new_O: Tensor) -> Tensor:
    """Each owner's old rows followed by its new ones, in the dtype of the old."""
    new, owners, S, T = new.to(old.dtype), len(old_O), int(old_O.max()), int(new_O.max())
    if len(old) == owners * S and len(new) == owners * T:
        return torch.cat((old.unflatten(0, (owners, S)), new.unflatten(0, (owners, T))), 1).flatten(0, 1)
    rows = old.new_empty(len(old) + len(new), *old.shape[1:])
    rows[torch.arange(len(old), device=old.device) + (new_O.cumsum(0) - new_O).repeat_interleave(old_O)] = old
    rows[torch.arange(len(new), device=old.device) + old_O.cumsum(0).repeat_interleave(new_O)] = new
    return rows
