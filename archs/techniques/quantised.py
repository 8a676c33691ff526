"""A cache in 8, 4 or 2 bits (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3.2), alone or under another technique.

Keys, whose outliers lie in few channels, are quantised by channel over groups of tokens; values by token over groups of
channels; both asymmetrically, x = zero + scale q. The newest tokens of each KV head stay in full precision until there
is a group more than `residual` of them. MLA's latent, which is keys and values in one, is quantised as keys.

Shapes: O owners (KV heads of sequences), N slots, Q quantised slots, g slots or channels of a group, D channels.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from archs.settings import Settings
from archs.techniques import ragged
from archs.techniques.slots import Slots


class Quantisation(Settings):
    """`bits` of an element, in groups of `group`; the newest `residual` tokens are left as they are."""

    model_config = ConfigDict(frozen=True)
    bits: Literal[8, 4, 2] = 4
    group: int = Field(32, ge=1)
    residual: int = Field(128, ge=0)


class QuantisedSlots(Slots):
    """`tensors` has the slots in full precision; packed slots lie in `codes`, with their scales and zeros."""

    def __init__(self, quantisation: Quantisation, *args):
        super().__init__(*args)
        self.quantisation, keys = quantisation, self.tensors[0]
        self.packed_N = torch.zeros(0, dtype=torch.bool, device=keys.device)
        self.codes = [pack(x.new_zeros(0, x.shape[1], dtype=torch.uint8), quantisation.bits) for x in self.tensors]
        self.group_Q = torch.zeros(0, dtype=torch.long, device=keys.device)  # which group of keys a slot is in
        self.key_scales = [keys.new_zeros(0, keys.shape[1]) for _ in range(2)]  # scale and zero: (groups, D)
        widths = [-(-x.shape[1] // quantisation.group) for x in self.tensors[1:] for _ in range(2)]
        self.value_scales = [keys.new_zeros(0, width) for width in widths]

    @property
    def metadata_nbytes(self) -> int:
        return super().metadata_nbytes + self.packed_N.nbytes + self.group_Q.nbytes

    @property
    def keys_ND(self) -> Tensor:
        scale, zero = (each[self.group_Q] for each in self.key_scales)
        return self._joined(0, lambda q: zero + scale * q)

    @property
    def values_NE(self) -> Tensor:
        if len(self.tensors) == 1:
            return self.keys_ND[:, : self.value_size]
        width = self.tensors[1].shape[1]
        scale, zero = (each.repeat_interleave(self.quantisation.group, 1)[:, :width] for each in self.value_scales)
        return self._joined(1, lambda q: zero + scale * q)

    def _joined(self, index: int, dequantised: Callable[[Tensor], Tensor]) -> Tensor:
        full, codes = self.tensors[index], self.codes[index]
        both = full.new_empty(len(self.packed_N), full.shape[1])
        both[self.packed_N] = dequantised(unpack(codes, self.quantisation.bits, full.shape[1]).to(full.dtype))
        both[~self.packed_N] = full
        return both

    def store(self, new: list[Tensor]) -> None:
        full_O = ragged.count(~self.packed_N, self.count_O)
        self.tensors = [ragged.grow(x, full_O, rows) for x, rows in zip(self.tensors, new, strict=True)]
        self.packed_N = ragged.grow(self.packed_N, self.count_O, new[0].new_zeros(new[0].shape[:2]))

    def free(self, keep_N: Tensor) -> None:
        keep_Q = keep_N[self.packed_N]
        self.tensors = [x[keep_N[~self.packed_N]] for x in self.tensors]
        self.codes, self.value_scales = ([x[keep_Q] for x in rows] for rows in (self.codes, self.value_scales))
        used, self.group_Q = self.group_Q[keep_Q].unique(return_inverse=True)
        self.key_scales = [x[used] for x in self.key_scales]
        self.packed_N = self.packed_N[keep_N]

    def evict(self, after_prompt: bool) -> None:
        """Frees what the technique does not keep, and then packs whole groups of each owner's oldest slots."""
        super().evict(after_prompt)
        q, full_N = self.quantisation, ~self.packed_N
        full_O = ragged.count(full_N, self.count_O)
        packs_O = (full_O - q.residual).clamp(min=0) // q.group * q.group
        if not packs_O.any():
            return
        oldest_OS = torch.arange(int(full_O.max()), device=full_O.device) < packs_O[:, None]
        now = ragged.flatten(oldest_OS, full_O)  # which slots in full precision are packed now
        keys, *values = (x[now] for x in self.tensors)
        codes, *key_scales = quantise(keys.view(-1, q.group, keys.shape[1]), 1, q.bits)
        groups = torch.arange(len(codes), device=now.device).repeat_interleave(q.group) + len(self.key_scales[0])
        new_codes, value_scales = [pack(codes.flatten(0, 1), q.bits)], []
        for rows in values:
            whole = F.pad(rows, (0, -rows.shape[1] % q.group), mode="replicate")
            codes, *scales = quantise(whole.view(len(rows), -1, q.group), 2, q.bits)
            new_codes.append(pack(codes.flatten(1)[:, : rows.shape[1]], q.bits))
            value_scales += [scale[:, :, 0] for scale in scales]
        before_N = self.packed_N.clone()
        self.packed_N[full_N.nonzero()[now, 0]] = True
        before_Q = before_N[self.packed_N]  # which packed slots were packed before

        def merged(old: Tensor, new: Tensor) -> Tensor:
            both = old.new_empty(len(before_Q), *old.shape[1:])
            both[before_Q], both[~before_Q] = old, new.to(old.dtype)
            return both

        self.codes = list(map(merged, self.codes, new_codes))
        self.value_scales = list(map(merged, self.value_scales, value_scales))
        self.group_Q = merged(self.group_Q, groups)
        self.key_scales = [torch.cat((old, new[:, 0])) for old, new in zip(self.key_scales, key_scales, strict=True)]
        self.tensors = [x[~now] for x in self.tensors]


def quantise(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) with x near zero + scale codes; one scale and zero along `dim`."""
    zero, top = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (top - zero) / (2**bits - 1)
    codes = ((x - zero) / scale.where(scale > 0, 1)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """(N, D) codes as (N, bytes), the first in the lowest bits."""
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """(N, bytes) to (N, width)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, :width]
