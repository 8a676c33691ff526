"""`kvfrontier check`: whether kernels compute on this machine what their formulas say, in the models of a study.

Each variant, with weights that make attention far from uniform, goes through the cache and through a training step with
all kernels, and is compared with a full forward pass, and its gradient, of formulas alone in fp32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from archs import Decoder, ops
from eval.subject import DTYPES
from train.machine import find_device, resolve_dtype, resolve_precision
from train.module import LanguageModel
from train.study import Study
from train.variants import Variant, resolve_variants

TOKENS = 384  # a window of 256 wraps around
DECODED = 4  # of them: as it comes, recorded, replayed twice
LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # of the largest number


class Check(NamedTuple):
    label: str
    what: str
    dtype: torch.dtype
    kernels: str  # of attention
    error: float  # as a share of the largest number

    @property
    def passed(self) -> bool:
        return self.error <= LIMIT[self.dtype]


def checks(study: Study, study_file: Path) -> Iterator[Check]:
    vocabulary = study.tokenizer.vocab_size or 512
    for variant in resolve_variants(study, vocabulary, study_file.parent):
        yield from check_variant(variant, study)


def check_variant(variant: Variant, study: Study) -> Iterator[Check]:
    device, decoding = find_device(), DTYPES[resolve_dtype(study.eval.dtype)]
    module = LanguageModel(variant.arch, variant.options | {"dropout": 0.0}, tokens=1).to(device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(variant.options["vocab_size"], (2, TOKENS + 1), generator=generator).to(device)
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
    with ops.formulas():
        with torch.no_grad():
            logits_BTV = module.model.eval()(inputs)
        gradients = torch.autograd.grad(module.train().mean_nats(inputs, targets), list(module.parameters()))
    for dtype in dict.fromkeys((torch.float32, DTYPES[resolve_precision(study.train.precision)])):
        yield check_training(variant.label, module, dtype, inputs, targets, gradients)
    for dtype in dict.fromkeys((torch.float32, decoding)):
        yield check_cache(variant.label, module.model.eval().to(dtype), inputs, logits_BTV)


def check_training(
    label: str,
    module: LanguageModel,
    dtype: torch.dtype,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    gradients: list[Tensor],
) -> Check:
    """A loss and its gradients, as autocast to `dtype` computes them."""
    found: list[Tensor] = []

    def step() -> None:
        with torch.autocast(inputs_BT.device.type, dtype, enabled=dtype != torch.float32):
            loss = module.mean_nats(inputs_BT, targets_BT)
        found.extend(torch.autograd.grad(loss, list(module.parameters())))

    kernels = ops.attention_kernels(step)
    return Check(label, "training", dtype, kernels, max(map(ops.difference, found, gradients)))


@torch.no_grad()
def check_cache(label: str, model: Decoder, tokens_BT: Tensor, logits_BTV: Tensor) -> Check:
    """A prefill and some decode steps."""
    prompt = TOKENS - DECODED
    cache = model.new_cache(len(tokens_BT), TOKENS)
    found = [model.prefill(tokens_BT[:, :prompt], cache)]
    found += [model.decode(token_B, cache) for token_B in tokens_BT[:, prompt:].T]
    error = max(ops.difference(x, logits_BTV[:, prompt - 1 + n]) for n, x in enumerate(found))
    if cache.step:
        kernels = cache.step.backend
    else:
        cache = model.new_cache(len(tokens_BT), TOKENS)
        model.prefill(tokens_BT[:, :prompt], cache)
        kernels = ops.attention_kernels(lambda: model.decode(tokens_BT[:, prompt], cache))
    return Check(label, "decode", model.embed.weight.dtype, kernels, error)
