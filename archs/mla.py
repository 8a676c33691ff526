"""MLA, multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a latent and a rotary key are cached.

Each token keeps one latent of `kv_rank`, normed before it is cached, and one rotary key of `rope_dim` shared by all
heads. Keys and values are linear in the latent, so decode never makes them: W_UK goes into the query and W_UV into the
output (the absorbed form), and attention runs on what is cached as on a single KV head. Training makes them (the
materialised form), which takes fewer FLOPs when many queries share them. RoPE acts on the rotary part alone: a rotated
up-projection could not be absorbed. Nor could a norm of the keys: `qk_norm` norms queries and the rotary key, and the
latent is normed anyway.

Shapes: B batch, T tokens, S cached tokens, H heads, N nope_dim, P rope_dim, E v_dim, R kv_rank, W width, X = R + P.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from archs.costs import mean_seen
from archs.decoder import Chunk, Decoder, Options, Output, RMSNorm, head_norm
from archs.kv import KV, View
from archs.ops import head_linear, split_heads
from archs.settings import Size


class MLAOptions(Options):
    kv_rank: Size
    rope_dim: Size
    q_rank: int = Field(0, ge=0, lt=2**31)  # 0: queries straight from the residual stream, as in DeepSeek-V2-Lite
    nope_dim: Size | None = None  # head_dim
    v_dim: Size | None = None  # head_dim
    latent_std: float = Field(0.02, gt=0, le=1)  # of the initial weights that make a latent; a norm follows them
    latent_scale: bool = False  # normed latents times sqrt(width / rank) (LongCat-Flash, arXiv 2509.01322, section 2.2)
    rotary: ClassVar[str] = "rope_dim"

    @property
    def latent_size(self) -> int:
        """Of what a token keeps besides the rotary key."""
        return self.kv_rank

    def complete(self) -> None:
        self.nope_dim = self.nope_dim or self.head_dim
        self.v_dim = self.v_dim or self.head_dim


class LatentAttention(nn.Module):
    def __init__(self, o: MLAOptions):
        super().__init__()
        self.o, self.scale = o, (o.nope_dim + o.rope_dim) ** -0.5
        if o.q_rank:
            self.q_down = nn.Linear(o.width, o.q_rank, bias=False)
            self.q_norm = RMSNorm(o.q_rank)
        self.q_up = nn.Linear(o.q_rank or o.width, o.heads * (o.nope_dim + o.rope_dim), bias=False)
        self.kv_down = nn.Linear(o.width, o.kv_rank + o.rope_dim, bias=False)
        self.kv_norm = RMSNorm(o.kv_rank)
        self.kv_up = nn.Linear(o.kv_rank, o.heads * (o.nope_dim + o.v_dim), bias=False)
        self.head_norm = head_norm(o, o.nope_dim + o.rope_dim, o.heads)
        self.rope_norm = head_norm(o, o.rope_dim, 1)
        self.out = Output(o, o.v_dim)

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        kv.append(chunk.start, self.row(x_BTW, chunk))
        queries = self.queries(self.q_input(x_BTW[:, -chunk.queries :]), chunk)
        materialised = kv.dense is not None and not self.absorbing_is_cheaper(chunk.queries, kv.dense.k.shape[2])
        out_BHTE = self.materialised(*queries, kv.dense) if materialised else self.absorbed(*queries, kv)
        return self.out(out_BHTE, x_BTW)

    def row(self, x_BTW: Tensor, chunk: Chunk) -> Tensor:
        """What is cached: latent and rotary key, (B, 1, T, X)."""
        latent_BTR, k_rope_BTP = self.kv_down(x_BTW).split((self.o.latent_size, self.o.rope_dim), dim=-1)
        k_rope_B1TP = chunk.rotate(self.rope_norm(k_rope_BTP[:, None])).to(latent_BTR.dtype)
        return torch.cat((self.normed(latent_BTR)[:, None], k_rope_B1TP), dim=-1)

    def q_input(self, x_BTW: Tensor) -> Tensor:
        """What queries are made from."""
        return self.scaled(self.q_norm(self.q_down(x_BTW))) if self.o.q_rank else x_BTW

    def queries(self, q_input: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Those without positions (B, H, T, N) and the rotary ones (B, H, T, P)."""
        (q_BHTX,) = split_heads(self.q_up(q_input), self.o.heads)
        q_nope_BHTN, q_rope_BHTP = self.head_norm(q_BHTX).split((self.o.nope_dim, self.o.rope_dim), dim=-1)
        return q_nope_BHTN, chunk.rotate(q_rope_BHTP)

    def scaled(self, latent_BTR: Tensor) -> Tensor:
        return latent_BTR * (self.o.width / latent_BTR.shape[-1]) ** 0.5 if self.o.latent_scale else latent_BTR

    def normed(self, latent_BTR: Tensor) -> Tensor:
        return self.scaled(self.kv_norm(latent_BTR))

    def made(self, latent_BSR: Tensor) -> Tensor:
        """Keys without positions and values of every head, (B, H, S, N + E)."""
        return split_heads(self.kv_up(latent_BSR), self.o.heads)[0]

    def placed(self, q_latent_BHTR: Tensor) -> Tensor:
        """Absorbed queries as those of the latent that is cached."""
        return q_latent_BHTR

    def own(self, latent_BHTR: Tensor) -> Tensor:
        """What a head reads of it."""
        return latent_BHTR

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Compares the FLOPs of both forms for T queries after a longer prefix; never where all S tokens have one."""
        o = self.o
        up = o.kv_rank * (o.nope_dim + o.v_dim)
        absorbed, materialised = 2 * o.latent_size + o.rope_dim, o.nope_dim + o.rope_dim + o.v_dim
        return T < S and T * up + T * S * absorbed < S * up + T * S * materialised

    def materialised(self, q_nope_BHTN: Tensor, q_rope_BHTP: Tensor, view: View) -> Tensor:
        """Attention on keys and values made from the latent for every head; (B, H, T, E)."""
        made = self.by_head(view, q_nope_BHTN.dtype)
        return made.attend(torch.cat((q_nope_BHTN, q_rope_BHTP), dim=-1), self.scale)

    def by_head(self, view: View, dtype: torch.dtype) -> View:
        """Keys and values of each head."""
        o = self.o
        latent_BSR, k_rope_BSP = view.k[:, 0].to(dtype).split((o.latent_size, o.rope_dim), dim=-1)
        k_nope_BHSN, v_BHSE = self.made(latent_BSR).split((o.nope_dim, o.v_dim), dim=-1)
        k_BHSD = torch.cat((k_nope_BHSN, k_rope_BSP[:, None].expand(-1, o.heads, -1, -1)), dim=-1)
        return view._replace(k=k_BHSD, v=v_BHSE)

    def absorbed(self, q_nope_BHTN: Tensor, q_rope_BHTP: Tensor, kv: KV) -> Tensor:
        """Attention on the latent itself, as keys and as values of one KV head; (B, H, T, E)."""
        o = self.o
        up_HXR = self.kv_up.weight.view(o.heads, o.nope_dim + o.v_dim, o.kv_rank)
        k_up_HNR, v_up_HER = up_HXR.split((o.nope_dim, o.v_dim), dim=1)
        q_latent_BHTR = self.placed(head_linear(q_nope_BHTN, k_up_HNR))
        latent_BHTR = kv.attend(torch.cat((q_latent_BHTR, q_rope_BHTP), dim=-1), self.scale)
        return head_linear(self.own(latent_BHTR), v_up_HER.mT)


class Latent(Decoder):
    """`options.latent_size` and a rotary key in every layer."""

    def __init__(self, options: MLAOptions):
        super().__init__(options)
        with torch.no_grad():
            for block in self.blocks:
                downs = [block.attention.kv_down.weight[: options.latent_size]]
                downs += [block.attention.q_down.weight] if options.q_rank else []
                for weight in downs:
                    weight.mul_(options.latent_std / 0.02)

    def layer_attention(self, layer: int) -> nn.Module:
        return LatentAttention(self.options)

    def new_layers(self, make: Any) -> list:
        o = self.options
        return [make.full(1, o.latent_size + o.rope_dim, o.latent_size, shared=True) for _ in range(o.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """(latent_size + rope_dim) L a token, DeepSeek-V2 Table 1."""
        return (self.options.latent_size + self.options.rope_dim) * self.options.layers * context

    def score_flops(self, context: int) -> float:
        """In the materialised form."""
        o = self.options
        return 2 * o.heads * (o.nope_dim + o.rope_dim + o.v_dim) * o.layers * mean_seen(context)

    def decode_score_flops(self, context: float) -> float:
        """In the absorbed form."""
        o = self.options
        return 2 * o.heads * (2 * o.latent_size + o.rope_dim) * o.layers * context


class OneLatent(Latent):
    """One latent for all heads, as transformers' classes of DeepSeek's models have it."""

    hf_type: ClassVar[tuple[str, str]] = "deepseek_v3", "DeepseekV3ForCausalLM"

    @classmethod
    def hf_options(cls, config: dict) -> dict | None:
        if config["model_type"] != cls.hf_type[0]:
            return None
        layers = config["num_hidden_layers"]
        if (dense := config.get("first_k_dense_replace", 3)) < layers:
            raise ValueError(f"{layers - dense} of {layers} layers are mixtures of experts")
        sizes = {"rope_dim": "qk_rope_head_dim", "nope_dim": "qk_nope_head_dim", "head_dim": "qk_nope_head_dim"}
        sizes |= {"kv_rank": "kv_lora_rank", "v_dim": "v_head_dim"}
        return {ours: config[theirs] for ours, theirs in sizes.items()} | {"q_rank": config["q_lora_rank"] or 0}

    def hf_class(self) -> tuple[str, str, dict]:
        o = self.options
        if o.qk_norm:
            raise ValueError("transformers has no class with a latent and qk_norm")
        latent = {
            "num_key_value_heads": o.heads,
            "kv_lora_rank": o.kv_rank,
            "q_lora_rank": o.q_rank or None,
            "qk_rope_head_dim": o.rope_dim,
            "qk_nope_head_dim": o.nope_dim,
            "v_head_dim": o.v_dim,
            "rope_interleave": True,
            "first_k_dense_replace": o.layers,  # no mixture of experts
            "num_nextn_predict_layers": 0,
        }
        return *self.hf_type, latent

    def hf_attention(self, attention: LatentAttention) -> dict[str, Tensor]:
        a = attention
        queries = {"q_a_proj": a.q_down, "q_a_layernorm": a.q_norm} if self.options.q_rank else {}
        queries["q_b_proj" if self.options.q_rank else "q_proj"] = a.q_up
        modules = queries | {"kv_a_proj_with_mqa": a.kv_down, "kv_a_layernorm": a.kv_norm, "kv_b_proj": a.kv_up}
        weights = {name: module.weight for name, module in modules.items()}
        o = self.options
        pairs = torch.arange(o.rope_dim).view(2, -1).T.flatten()  # neighbours, where ours are i and i + rope_dim / 2
        for name, size in (("q_b_proj", o.nope_dim), ("q_proj", o.nope_dim), ("kv_a_proj_with_mqa", o.kv_rank)):
            if name in weights:
                rows = weights[name].unflatten(0, (-1, size + o.rope_dim))
                weights[name] = torch.cat((rows[:, :size], rows[:, size:][:, pairs]), 1).flatten(0, 1)
        return weights | {name: a.scaled(weights[name]) for name in weights if name.endswith("layernorm")}


class MLA(OneLatent):
    """Multi-head latent attention."""

    Options = MLAOptions
    examples = (
        {"kv_rank": 32, "rope_dim": 8},
        {"kv_rank": 24, "rope_dim": 6, "q_rank": 20, "nope_dim": 12, "v_dim": 20, "latent_scale": True},
        {"kv_rank": 16, "rope_dim": 8, "latent_std": 0.1, "qk_norm": True, "gate": True},
    )
