"""A cache in 8, 4 or 2 bits (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3.2), alone or under another technique.

Keys, whose outliers lie in few channels, are quantised by channel over groups of tokens; values by token over groups of
channels; both asymmetrically, x = zero + scale q. The newest tokens of each KV head stay in full precision until there
is a group more than `residual` of them. MLA's latent, which is keys and values in one, is quantised as keys.

Shapes: O owners (KV heads of sequences), N slots, Q packed slots, D channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from archs.settings import Settings
from archs.techniques import ragged
from archs.techniques.slots import CompressedCache, Slots


class Quantisation(Settings):
    """`bits` of an element, in groups of `group`; the newest `residual` tokens are left as they are."""

    model_config = ConfigDict(frozen=True)
    bits: Literal[8, 4, 2] = 4
    group: int = Field(32, ge=1)
    residual: int = Field(128, ge=0)


class QuantisedSlots(Slots):
    """Each owner's oldest `packed_O` slots are packed; `tensors` has the others, in full precision.

    `packed` has codes of keys and the group that each is in, and codes of values and their scales and zeros, a row for
    a slot; `key_scales` have a row (D) for a group.
    """

    def __init__(self, quantisation: Quantisation, *args, **options):
        super().__init__(*args, **options)
        self.quantisation, self.packed_O = quantisation, torch.zeros_like(self.count_O)
        self.packed, self.key_scales = self.pack(self.tensors)

    @property
    def full_O(self) -> Tensor:
        return self.count_O - self.packed_O

    @property
    def metadata(self) -> list[Tensor]:
        return [*super().metadata, self.packed_O, self.packed[1]]

    @property
    def keys_ND(self) -> Tensor:
        codes, group_Q, *_ = self.packed
        return self.unpack(self.tensors[0], codes, *(rows[group_Q] for rows in self.key_scales))

    @property
    def values_NE(self) -> Tensor:
        if len(self.tensors) == 1:
            return self.keys_ND[:, : self.value_size]
        codes, *scales = self.packed[2:]
        width = self.tensors[1].shape[1]
        scales = [rows.repeat_interleave(self.quantisation.group, 1)[:, :width] for rows in scales]
        return self.unpack(self.tensors[1], codes, *scales)

    def unpack(self, full: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        packed = zero + scale * unpack(codes, self.quantisation.bits, full.shape[1]).to(full.dtype)
        return ragged.join(packed, self.packed_O, full, self.full_O)

    def pack(self, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Whole groups of keys' and values' rows as what `packed` and `key_scales` have of them."""
        q, (keys, *values) = self.quantisation, rows
        groups = len(keys) // q.group
        codes, *key_scales = quantise(keys.unflatten(0, (groups, q.group)), 1, q.bits)
        packed = [pack(codes.flatten(0, 1), q.bits), torch.arange(len(keys), device=keys.device) // q.group]
        for x in values:
            width = x.shape[1]
            last_repeated = torch.arange(-(-width // q.group) * q.group, device=x.device).clamp(max=width - 1)
            codes, *scales = quantise(x[:, last_repeated].unflatten(1, (-1, q.group)), 2, q.bits)
            packed += [pack(codes.flatten(1)[:, :width], q.bits), *(scale[:, :, 0] for scale in scales)]
        return packed, [scale[:, 0] for scale in key_scales]

    def free(self, keep_N: Tensor) -> None:
        is_packed_N = ragged.rank(self.count_O) < self.packed_O.repeat_interleave(self.count_O)
        keep_Q = keep_N[is_packed_N]
        self.tensors = [x[keep_N[~is_packed_N]] for x in self.tensors]
        self.packed = [x[keep_Q] for x in self.packed]
        used, self.packed[1] = self.packed[1].unique(return_inverse=True)
        self.key_scales = [x[used] for x in self.key_scales]
        self.packed_O = ragged.count(keep_Q, self.packed_O)

    def evict(self) -> None:
        """Frees what the technique does not keep, and then packs whole groups of each owner's oldest slots."""
        super().evict()
        q, full_O = self.quantisation, self.full_O
        new_O = (full_O - q.residual).clamp(min=0) // q.group * q.group
        if not new_O.any():
            return
        is_new = ragged.rank(full_O) < new_O.repeat_interleave(full_O)
        packed, key_scales = self.pack([x[is_new] for x in self.tensors])
        packed[1] += len(self.key_scales[0])
        pairs = zip(self.packed, packed, strict=True)
        self.packed = [ragged.join(old, self.packed_O, new, new_O) for old, new in pairs]
        self.key_scales = [torch.cat(pair) for pair in zip(self.key_scales, key_scales, strict=True)]
        self.tensors, self.packed_O = [x[~is_new] for x in self.tensors], self.packed_O + new_O


def is_packed(cache: CompressedCache) -> bool:
    """True if a slot of the cache is quantised: a sequence shorter than `residual` and a group stays as it is."""
    return any(bool(slots.packed_O.any()) for slots in cache.slots)


def nothing_packed(quantisation: Quantisation, tokens: int) -> str:
    q = quantisation
    kept = f"no group of group={q.group} slots is older than the newest residual={q.residual}, which stay as they are"
    return f"bits={q.bits} quantised nothing of {tokens} tokens: {kept}; give a smaller residual"


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
