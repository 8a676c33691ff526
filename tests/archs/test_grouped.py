"""MHA, GQA and MQA: one implementation with its ends. test_laws.py holds them against transformers' Llama."""

import pytest
import torch
from helpers import SHAPE, make

from archs import build
from train.export import hf_config


@pytest.mark.parametrize(("arch", "kv_heads"), [("mha", 4), ("gqa", 2), ("mqa", 1)])
def test_gqa_at_its_ends_is_mha_and_mqa_and_kv_heads_alone_are_cached(arch, kv_heads):
    one, gqa = make(arch, {"kv_heads": 2} if arch == "gqa" else {}), make("gqa", {"kv_heads": kv_heads})
    gqa.load_state_dict(one.state_dict())
    tokens = torch.randint(97, (2, 9))
    assert torch.equal(one(tokens), gqa(tokens))
    for layer in one.new_cache(3, 10).layers:
        assert [tuple(t.shape) for t in layer.tensors] == [(3, kv_heads, 10, SHAPE["width"] // SHAPE["heads"])] * 2


def test_a_subclass_with_other_layers_is_not_exported_as_its_parent(tmp_path):
    source = "from archs.grouped import MHA\n\n\nclass Windows(MHA):\n    def new_layers(self, make):\n"
    (tmp_path / "windows.py").write_text(f"{source}        return [make.ring(8, 4, 16)] * self.options.layers\n")
    with pytest.raises(ValueError, match="no class that computes Windows"):
        hf_config(build(f"{tmp_path}/windows.py:Windows", **SHAPE))
