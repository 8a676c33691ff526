"""DSA, DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2): MLA on the tokens that an index selects.

A small indexer scores every earlier token s for a query t, I = sum_j w_j relu(q_j . k_s) over its heads j (eq. 1), and
attention sees the `index_topk` of the highest scores. A token keeps the indexer's key besides MLA's latent and rotary
key: more is stored, but of the latents no more than `index_topk` are read. The indexer learns from a loss of its own,
the divergence of its softmax from what attention's heads do together (section 2.1), and nothing else gets gradients
from it; all gradients are clipped by their norm together. For the first `dense_tokens` of training attention sees
everything. Training and prefill take memory for each pair of tokens.

Shapes: B batch, T tokens, S cached tokens, H heads, J index heads, I index_dim, K index_topk, X latent and rotary key.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from archs.costs import mean_seen
from archs.decoder import Chunk
from archs.indexer import Indexer, selected
from archs.kv import KV, View
from archs.mla import LatentAttention, MLAOptions, OneLatent
from archs.ops import at_least_fp32
from archs.settings import Size


class DSAOptions(MLAOptions):
    index_topk: Size = 2048
    index_heads: Size = 4
    index_dim: Size = 32
    dense_tokens: int = Field(0, ge=0, lt=2**63)

    def complete(self) -> None:
        super().complete()
        fits = self.index_dim >= self.rope_dim
        self.check(fits, f"index_dim={self.index_dim} must be at least rope_dim={self.rope_dim}, which is rotated")


class SparseLatentAttention(LatentAttention):
    def __init__(self, o: DSAOptions):
        super().__init__(o)
        self.indexer = Indexer(o.width, o.q_rank or o.width, o.index_heads, o.index_dim, o.rope_dim)
        self.sees_all = False  # no selection: at the beginning of training
        self.loss: Tensor | None = None  # of the last forward pass in training

    def forward(self, x_BTW: Tensor, chunk: Chunk, kv: KV) -> Tensor:
        o, x_q_BTW, self.loss = self.o, x_BTW[:, -chunk.queries :], None
        kv.append(chunk.start, self.row(x_BTW, chunk), self.indexer.key(x_BTW.detach(), chunk))
        q_input = self.q_input(x_q_BTW)
        queries, view = self.queries(q_input, chunk), kv.view
        score_BTS = self.indexer(x_q_BTW.detach(), q_input.detach(), view.v[:, 0], chunk)
        score_BTS = score_BTS.masked_fill(~view.visible(chunk.queries), -math.inf)
        top_BTK = score_BTS.topk(min(o.index_topk, score_BTS.shape[2]))
        if chunk.queries == 1:  # scores are sorted: tokens that cannot be seen, if any, come last
            row_B1KX, chosen = selected(view.k[:, 0], top_BTK.indices[:, 0])[:, None], KV()
            last = None if view.position is None else view.position.clamp(max=row_B1KX.shape[2] - 1)
            chosen.view = View(row_B1KX, row_B1KX[..., : o.latent_size], position=last)
            return self.out(self.absorbed(*queries, chosen), x_BTW)
        mask_BTS = score_BTS > -math.inf
        if not (self.training and self.sees_all):
            mask_BTS = mask_BTS & torch.zeros_like(mask_BTS).scatter(2, top_BTK.indices, True)
        made = self.by_head(view._replace(mask=mask_BTS[:, None]), queries[0].dtype)
        q_BHTD = torch.cat(queries, dim=-1)
        out_BHTE = made.attend(q_BHTD, self.scale)
        if self.training and torch.is_grad_enabled():
            self.loss = self.divergence(score_BTS, q_BHTD.detach(), made)
        return self.out(out_BHTE, x_BTW)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"loss": None}  # a tensor with a history cannot be copied

    def divergence(self, score_BTS: Tensor, q_BHTD: Tensor, made: View) -> Tensor:
        """The KL divergence, in nats, of the indexer's distribution from the mean of all heads' attention, over the
        tokens that attention saw; summed over queries."""
        with torch.no_grad(), torch.autocast(q_BHTD.device.type, enabled=False):
            dots_BHTS = at_least_fp32(q_BHTD) @ at_least_fp32(made.k).mT * self.scale
            p_BTS = dots_BHTS.masked_fill(~made.mask, -math.inf).softmax(-1).mean(1)
        log_BTS = score_BTS.masked_fill(~made.mask[:, 0], -math.inf).log_softmax(-1)
        nats_BTS = torch.xlogy(p_BTS, p_BTS) - p_BTS * log_BTS.masked_fill(~made.mask[:, 0], 0.0)
        return nats_BTS.sum()


class DSA(OneLatent):
    """DeepSeek sparse attention: a latent, a rotary key and the indexer's key in every layer."""

    Options = DSAOptions
    examples = ({"kv_rank": 16, "rope_dim": 8, "q_rank": 20, "index_topk": 13, "index_heads": 8, "index_dim": 12},)
    attends_itself = True
    hf_type = "deepseek_v32", "DeepseekV32ForCausalLM"

    def layer_attention(self, layer: int) -> nn.Module:
        return SparseLatentAttention(self.options)

    def begin_step(self, tokens_seen: int) -> None:
        for block in self.blocks:
            block.attention.sees_all = tokens_seen < self.options.dense_tokens

    def own_loss(self) -> Tensor | None:
        losses = [block.attention.loss for block in self.blocks]
        return None if any(loss is None for loss in losses) else torch.stack(losses).sum()

    def new_layers(self, make: Any) -> list:
        o = self.options
        return [make.full(1, o.kv_rank + o.rope_dim, o.index_dim) for _ in range(o.layers)]

    def kv_stored_elements(self, context: int) -> int:
        """(kv_rank + rope_dim + index_dim) L a token."""
        return super().kv_stored_elements(context) + self.options.index_dim * self.options.layers * context

    def kv_read_elements(self, context: int) -> int:
        """Every index key, and the latents that are selected."""
        o = self.options
        return super().kv_stored_elements(min(context, o.index_topk)) + o.index_dim * o.layers * context

    def score_flops(self, context: int) -> float:
        o = self.options
        attended = 2 * o.heads * (o.nope_dim + o.rope_dim + o.v_dim) * o.layers * mean_seen(context, o.index_topk)
        return attended + self.index_flops(mean_seen(context))

    def decode_score_flops(self, context: float) -> float:
        return super().decode_score_flops(min(context, self.options.index_topk)) + self.index_flops(context)

    def index_flops(self, context: float) -> float:
        o = self.options
        return 2 * o.index_heads * (o.index_dim + 1) * o.layers * context

    @classmethod
    def hf_options(cls, config: dict) -> dict | None:
        names = {"index_topk": "index_topk", "index_heads": "index_n_heads", "index_dim": "index_head_dim"}
        own = super().hf_options(config)
        return None if own is None else own | {ours: config[theirs] for ours, theirs in names.items()}

    def hf_class(self) -> tuple[str, str, dict]:
        o = self.options
        if not o.q_rank:
            raise ValueError("transformers has no class with an index and without a latent of queries: give q_rank")
        *names, special = super().hf_class()
        index = {"index_n_heads": o.index_heads, "index_head_dim": o.index_dim, "index_topk": o.index_topk}
        return *names, special | index

    def hf_attention(self, attention: SparseLatentAttention) -> dict[str, Tensor]:
        i = attention.indexer
        weights = {"wq_b": i.q.weight, "wk": i.k.weight, "weights_proj": i.weights.weight}
        weights |= {"k_norm": i.k_norm.weight, "k_norm.bias": i.k_norm.bias}
        return super().hf_attention(attention) | {f"indexer.{name}": weight for name, weight in weights.items()}
