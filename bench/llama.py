"""Prefill and decode step of whole models with a cache in fp16, against llama.cpp with the same weights.

    uv run --with llama-cpp-python --with gguf python bench/llama.py
    uv run --with llama-cpp-python --with gguf python bench/llama.py --batches 1 --contexts 8192 --variants mqa

llama.cpp (through the low-level calls of llama-cpp-python, which builds it for this processor) gets the exported
weights as a GGUF file in fp32, as many threads, and a stream of its own for each sequence. Both its ways to compute
attention are measured, and the faster one counts. Both logits must agree.
"""

from pairs import Report, model_of, model_parser, ratio, spread

import contextlib
import ctypes
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor

from archs import Decoder
from train.export import hf_config, hf_weights

STEPS = 8  # decode steps timed together, after which both caches are cut back
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(model: Decoder, path: Path) -> None:
    """The weights of `hf_weights` as llama.cpp names them; it rotates neighbouring dimensions, not i with i + D/2."""
    hf, writer = hf_config(model), gguf.GGUFWriter(path, "llama")
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, weight in hf_weights(model).items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.unflatten(0, (-1, 2, hf["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)
        for theirs, gguf_name in NAMES.items():
            name = name.replace(theirs, gguf_name)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A context of llama.cpp for some sequences of equal length."""

    def __init__(self, path: Path, sequences: int, max_tokens: int, flash: bool, cache=llama_cpp.GGML_TYPE_F16):
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_seq_max, how.n_batch = sequences * max_tokens, sequences, sequences * max_tokens
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        how.type_k = how.type_v = cache
        how.flash_attn_type, how.kv_unified, how.no_perf = int(flash), False, True
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(sequences * max_tokens, 0, 1)

    def append(self, tokens_BT: np.ndarray, start: int) -> None:
        """Appends tokens from position `start` on, and computes the logits after the last of each sequence."""
        B, T = tokens_BT.shape
        self.last, self.batch.n_tokens = [b * T + T - 1 for b in range(B)], B * T
        for i, token in enumerate(tokens_BT.flat):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, start + i % T, i % T == T - 1
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, i // T
        self.run()

    def run(self) -> None:
        if status := llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode: {status}")
        llama_cpp.llama_synchronize(self.context)

    def logits(self, vocab_size: int) -> Tensor:
        rows = [llama_cpp.llama_get_logits_ith(self.context, i)[:vocab_size] for i in self.last]
        return torch.tensor(rows)

    def cut(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, -1, length, -1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@contextlib.contextmanager
def llama_contexts(model: Decoder, sequences: int, max_tokens: int) -> Iterator[dict[str, LlamaCpp]]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path)
        peers = {}
        for name, flash in (("llama.cpp", False), ("llama.cpp flash", True)):
            peers[name] = LlamaCpp(path, sequences, max_tokens, flash)
            stack.callback(peers[name].close)
        yield peers


@llama_cpp.llama_log_callback
def no_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


@torch.inference_mode()
def main() -> int:
    defaults = {"decode_repeats": 7, "prefill_repeats": 3, "context": 16384}
    parser = model_parser(__doc__.splitlines()[0], **defaults)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help=" ")
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096, 8192], help=" ")
    parser.set_defaults(variants=["mha", "gqa kv_heads=2", "mqa"], device="cpu", dtype="fp32")
    args = parser.parse_args()
    llama_cpp.llama_log_set(no_log, None)
    title = f"prefill and decode, cache in fp16, llama-cpp-python {llama_cpp.__version__}"
    report = Report(title, args, ["what", "batch", "context", "ms", "peer", "peer ms", "ratio", "quartiles"])

    def compare(cell: str) -> None:
        variant, batch, context = cell.rsplit(" ", 2)
        batch, context = int(batch), int(context)
        model = model_of(variant, args)
        prompt = torch.randint(args.vocab_size, (batch, context))
        cache = model.new_cache(batch, context + STEPS, torch.float16)

        def add(what: str, times: dict[str, list[float]], steps: int) -> None:
            columns = {name: [t / steps for t in column] for name, column in times.items()}
            own = columns.pop(variant)
            peer = min(columns, key=lambda name: statistics.median(columns[name]))
            cell = f"{variant} {what}", str(batch), str(context), spread(own), peer, spread(columns[peer])
            report.add(*cell, *ratio(columns[peer], own))

        def prefill() -> None:
            cache.reset()
            model.prefill(prompt, cache)

        def decode() -> None:
            cache.length = context
            for _ in range(STEPS):
                model.decode(prompt[:, 0], cache)

        def prefill_of(peer: LlamaCpp):
            def step() -> None:
                peer.cut(0)
                peer.run()

            peer.append(prompt.numpy(), 0)
            return step

        def decode_of(peer: LlamaCpp):
            def step() -> None:
                peer.cut(context)
                for i in range(STEPS):
                    for b in range(batch):
                        peer.batch.pos[b] = context + i
                    peer.run()

            peer.append(prompt[:, :1].numpy(), context)
            return step

        with llama_contexts(model, batch, context + STEPS) as peers:
            steps = {variant: prefill} | {name: prefill_of(peer) for name, peer in peers.items()}
            add("prefill", report.in_turns(steps, args.prefill_repeats, 0), 1)
            steps = {variant: decode} | {name: decode_of(peer) for name, peer in peers.items()}
            add("decode step", report.in_turns(steps, args.decode_repeats, 1), STEPS)
            cache.length = context
            expected = model.decode(prompt[:, 0], cache)
            for name, peer in peers.items():
                peer.cut(context)
                peer.append(prompt[:, :1].numpy(), context)
                error = (peer.logits(args.vocab_size) - expected).abs().max() / expected.abs().max()
                if not error < 0.02:
                    raise RuntimeError(f"{name} has other logits, by {error:.1%} of the largest")

    cells = [f"{v} {b} {c}" for v in args.variants for b in args.batches for c in args.contexts]
    return report.measure(cells, compare)


if __name__ == "__main__":
    sys.exit(main())
