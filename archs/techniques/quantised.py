"""A cache in 8, 4 or 2 bits (KIVI, Liu et al. 2024, arXiv 2402.02750, section 3.2), alone or under another technique.

Keys, whose outliers lie in few channels, are quantised by channel over groups of tokens; values by token over groups of
channels; both asymmetrically, x = zero + scale q. The newest tokens of each KV head stay in full precision until there
is a group more than `residual` of them. MLA's latent, which is keys and values in one, is quantised as keys.

Shapes: O owners (KV heads of sequences), N slots, Q quantised ones, g slots or channels of a group, D channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archs.techniques.slots import Slots, counted, flat, grown


@dataclass(frozen=True)
class Quantisation:
    """`bits` of an element, in groups of `group`; the newest `residual` tokens are left as they are."""

    bits: int = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (2, 4, 8):
            raise ValueError(f"bits={self.bits!r}: must be 8, 4 or 2")
        for name, least in (("group", 1), ("residual", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")


class QuantisedSlots(Slots):
    """`streams` has the slots in full precision; those that are packed lie in `codes`, with their scales and zeros."""

    def __init__(self, quantisation: Quantisation, *args):
        super().__init__(*args)
        self.quantisation, first = quantisation, self.streams[0]
        device = first.device
        self.packed_N = torch.zeros(0, dtype=torch.bool, device=device)
        self.codes = [
            torch.zeros(0, _bytes(s.shape[1], quantisation.bits), dtype=torch.uint8, device=device)
            for s in self.streams
        ]
        self.group_Q = torch.zeros(0, dtype=torch.long, device=device)  # which group of keys a slot is in
        self.key_scales = [first.new_zeros(0, first.shape[1]) for _ in range(2)]  # scale and zero: (groups, D)
        self.value_scales = [
            s.new_zeros(0, -(-s.shape[1] // quantisation.group)) for s in self.streams[1:] for _ in range(2)
        ]

    @property
    def notes_nbytes(self) -> int:
        return super().notes_nbytes + self.packed_N.nbytes + self.group_Q.nbytes

    @property
    def keys_ND(self) -> Tensor:
        scale, zero = (each[self.group_Q] for each in self.key_scales)
        return self._joined(0, lambda q: zero + scale * q)

    def values_NE(self, value_size: int | None = None) -> Tensor:
        if len(self.streams) == 1:
            return self.keys_ND[:, :value_size]
        width = self.streams[1].shape[1]
        scale, zero = (each.repeat_interleave(self.quantisation.group, 1)[:, :width] for each in self.value_scales)
        return self._joined(1, lambda q: zero + scale * q)

    def _joined(self, stream: int, of_codes) -> Tensor:
        full, codes = self.streams[stream], self.codes[stream]
        both = full.new_empty(len(self.packed_N), full.shape[1])
        both[self.packed_N] = of_codes(unpack(codes, self.quantisation.bits, full.shape[1]).to(full.dtype))
        both[~self.packed_N] = full
        return both

    def store(self, new: list[Tensor], T: int) -> None:
        full_O = counted(~self.packed_N, self.count_O)
        self.streams = [grown(s, full_O, n, T) for s, n in zip(self.streams, new, strict=True)]
        self.packed_N = grown(self.packed_N, self.count_O, torch.zeros(len(new[0]), dtype=torch.bool), T)

    def free(self, keep_N: Tensor) -> None:
        keep_Q = keep_N[self.packed_N]
        self.streams = [stream[keep_N[~self.packed_N]] for stream in self.streams]
        self.codes = [codes[keep_Q] for codes in self.codes]
        self.value_scales = [each[keep_Q] for each in self.value_scales]
        used, self.group_Q = self.group_Q[keep_Q].unique(return_inverse=True)
        self.key_scales = [each[used] for each in self.key_scales]
        self.packed_N = self.packed_N[keep_N]

    def evict(self, prompt: bool) -> None:
        """What the technique lets go of, and then packs what has become old: whole groups of each owner's oldest."""
        super().evict(prompt)
        q, full_N = self.quantisation, ~self.packed_N
        full_O = counted(full_N, self.count_O)
        packs_O = (full_O - q.residual).clamp(min=0) // q.group * q.group
        if not packs_O.any():
            return
        oldest = torch.arange(int(full_O.max()), device=full_O.device) < packs_O[:, None]
        now = flat(oldest, full_O)  # of the slots in full precision
        rows = [stream[now] for stream in self.streams]
        key_codes, *key_scales = quantise(rows[0].view(-1, q.group, rows[0].shape[1]), 1, q.bits)
        new = [pack(key_codes.flatten(0, 1), q.bits)]
        new_scales = []
        for values in rows[1:]:
            whole = torch.nn.functional.pad(values, (0, -values.shape[1] % q.group), mode="replicate")
            codes, *scales = quantise(whole.view(len(values), -1, q.group), 2, q.bits)
            new.append(pack(codes.flatten(1)[:, : values.shape[1]], q.bits))
            new_scales += [scale[:, :, 0] for scale in scales]
        groups = torch.arange(len(key_codes), device=full_O.device).repeat_interleave(q.group) + len(self.key_scales[0])
        before = self.packed_N.clone()
        self.packed_N[full_N.nonzero()[now, 0]] = True
        was = before[self.packed_N]  # of the packed slots, in their order

        def merged(old: Tensor, added: Tensor) -> Tensor:
            both = old.new_empty(len(was), *old.shape[1:])
            both[was], both[~was] = old, added.to(old.dtype)
            return both

        self.codes = [merged(old, added) for old, added in zip(self.codes, new, strict=True)]
        self.value_scales = [merged(old, added) for old, added in zip(self.value_scales, new_scales, strict=True)]
        self.group_Q = merged(self.group_Q, groups)
        self.key_scales = [
            torch.cat((old, added[:, 0].to(old.dtype))) for old, added in zip(self.key_scales, key_scales, strict=True)
        ]
        self.streams = [stream[~now] for stream in self.streams]


def quantise(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) with x near zero + scale codes; one scale and zero along `dim`."""
    zero, top = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (top - zero) / (2**bits - 1)
    codes = ((x - zero) / scale.where(scale > 0, 1)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def _bytes(width: int, bits: int) -> int:
    return -(-width * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(N, D) codes as (N, bytes), the first in the lowest bits."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """(N, bytes) to (N, width)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, :width]
