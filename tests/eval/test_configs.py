"""Cache bytes from config.json: published models, every way in which a field may be written, and what is refused.

The configs have the fields that the published ones have, as far as the cache is concerned."""

import json
import re
import subprocess
import sys

import pytest

import kvfrontier
from eval.kv_bytes.command import parse_memory
from eval.kv_bytes.command import report as report_on
from eval.kv_bytes.models import FAMILIES, model_cache, read_caches
from train.errors import InputError


def config(model_type, layers=None, heads=None, kv=None, width=None, **fields):
    """A config.json with the most usual names; what is None is left out."""
    names = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": width}
    return {"model_type": model_type} | {name: value for name, value in names.items() if value is not None} | fields


GEMMA3_4B = {"hidden_size": 2560, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
GEMMA3_12B = config("gemma3_text", 48, 16, 8, 3840, sliding_window=1024)
DEEPSEEK = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": None}
GPT_OSS = config("gpt_oss", 24, 64, 8, 2880, head_dim=64, sliding_window=128)
GPT_OSS["layer_types"] = ["sliding_attention", "full_attention"] * 12
QWEN2 = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}

# name: (config, bytes per token once windows are full, and if all windows grew), at 2 bytes a number
PUBLISHED = {
    "GPT-2": ({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_ctx": 1024}, 36864, 36864),
    "GPT-3": ({"model_type": "gpt2", "n_layer": 96, "n_head": 96, "n_embd": 12288}, 4718592, 4718592),
    "pythia-160m": (config("gpt_neox", 12, 12, None, 768), 36864, 36864),
    "falcon-7b": (
        config("falcon", 32, 71, None, 4544, multi_query=True, new_decoder_architecture=False, num_kv_heads=71),
        8192,
        8192,
    ),
    "falcon-180B": (
        config("falcon", 80, 232, None, 14848, new_decoder_architecture=True, num_kv_heads=8),
        163840,
        163840,
    ),
    "Llama-2-7b": (config("llama", 32, 32, 32, 4096), 524288, 524288),
    "Llama-2-13b": (config("llama", 40, 40, 40, 5120), 819200, 819200),
    "Llama-3-8B": (config("llama", 32, 32, 8, 4096), 131072, 131072),
    "Llama-3-70B": (config("llama", 80, 64, 8, 8192), 327680, 327680),
    "Llama-3.2-3B": (config("llama", 28, 24, 8, 3072, head_dim=128), 114688, 114688),
    "Mistral-7B-v0.3": (config("mistral", 32, 32, 8, 4096, sliding_window=None), 131072, 131072),
    "Mixtral-8x7B": (config("mixtral", 32, 32, 8, 4096, sliding_window=None), 131072, 131072),
    "Mixtral-8x22B": (config("mixtral", 56, 48, 8, 6144, sliding_window=None), 229376, 229376),
    "Gemma-2b": (config("gemma", 18, 8, 1, 2048, head_dim=256), 18432, 18432),
    "Gemma-7b": (config("gemma", 28, 16, 16, 3072, head_dim=256), 458752, 458752),
    "Gemma-2-2b": (config("gemma2", 26, 8, 4, 2304, head_dim=256, sliding_window=4096), 53248, 106496),
    "Gemma-2-27b": (config("gemma2", 46, 32, 16, 4608, head_dim=128, sliding_window=4096), 188416, 376832),
    "Gemma-3-4b": ({"model_type": "gemma3", "text_config": GEMMA3_4B, "vision_config": {}}, 20480, 139264),
    "Gemma-3-12b": ({"model_type": "gemma3", "text_config": GEMMA3_12B}, 65536, 393216),
    "Qwen2-7B": (config("qwen2", 28, 28, 4, 3584, **QWEN2), 57344, 57344),
    "Qwen2.5-0.5B": (config("qwen2", 24, 14, 2, 896, **QWEN2), 12288, 12288),
    "Qwen2.5-7B": (config("qwen2", 28, 28, 4, 3584, **QWEN2), 57344, 57344),
    "Qwen3-0.6B": (config("qwen3", 28, 16, 8, 1024, head_dim=128, sliding_window=None), 114688, 114688),
    "Qwen3-32B": (config("qwen3", 64, 64, 8, 5120, head_dim=128), 262144, 262144),
    "Qwen3-30B-A3B": (config("qwen3_moe", 48, 32, 4, 2048, head_dim=128, use_sliding_window=False), 98304, 98304),
    "DeepSeek-V2": (config("deepseek_v2", 60, 128, 128, 5120, **DEEPSEEK), 69120, 69120),
    "Kimi-K2": (config("kimi_k2", 61, 64, 64, 7168, **DEEPSEEK), 70272, 70272),
    "gpt-oss-20b": (GPT_OSS, 24576, 49152),
    "phi-2": (config("phi", 32, 32, None, 2560), 327680, 327680),
    "SmolLM2-135M": (config("llama", 30, 9, 3, 576), 23040, 23040),
    "SmolLM2-1.7B": (config("llama", 24, 32, 32, 2048), 196608, 196608),
    "OLMo-2-7B": (config("olmo2", 32, 32, 32, 4096), 524288, 524288),
    "Command-R": (config("cohere", 40, 64, 64, 8192), 1310720, 1310720),
    "Command-R+": (config("cohere", 64, 96, 8, 12288), 262144, 262144),
    "TinyLlama": (config("llama", 22, 32, 4, 2048), 22528, 22528),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_known_bytes_per_token(name):
    fields, slope, all_layers = PUBLISHED[name]
    cache = model_cache(fields)
    assert cache.bytes_per_token == slope
    windows = [part for part in cache.parts if part.kind == "window"]
    assert slope + sum(2 * part.elements for part in windows) == all_layers
    assert cache.constant_bytes == sum(2 * part.elements * part.limit for part in windows)


MOE = dict.fromkeys(("num_experts", "moe_intermediate_size"), 8)
LINEAR = {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4}
FULL_KIMI, STEP = [4, 8, 12, 16, 20, 24, 27], {"num_attention_groups": 1, "share_q_dim": 2048, "max_seq_len": 65536}
LINEAR |= {"full_attn_layers": FULL_KIMI, "kda_layers": [n for n in range(1, 28) if n not in FULL_KIMI]}
GEMMA4 = {"sliding_window": 1024, "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True}
MIMO = {"head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128, "swa_num_key_value_heads": 8}
MIMO |= {"hybrid_layer_pattern": [0, 1, 1, 1, 1], "sliding_window": 128, "attention_chunk_size": 128}
NAS = [{"n_heads_in_group": 8}, {"no_op": True}, {"n_heads_in_group": 16}, {"replace_with_linear": True}]
V4 = {"head_dim": 512, "sliding_window": 128, "index_head_dim": 128, "index_topk": 512, "qk_rope_head_dim": 64}
SPARSE = {"sparse_index_dim": 128, "sparse_topk_blocks": 16, "sparse_block_size": 128, "sparse_attention_freq": [0, 1]}
MAMBA2 = 2 * 4 * (8192 + 2 * 256) + 4 * 8192 * 256  # Bamba-9B, a layer: 4 columns of the convolution, the state in fp32
DELTA = 2 * 4 * 8192 + 4 * 32 * 128 * 128  # Qwen3-Next, a layer: 2 * 16 * 128 + 32 * 128 convolved, 32 states

# number of the variant: (config, bytes per token, constant bytes), each worked out from the shapes
VARIANTS = {
    "1 missing KV heads": (config("llama", 2, 8, None, 512), 2 * 2 * 2 * 8 * 64, 0),
    "1 null KV heads": (config("mistral", 2, 8, None, 512, num_key_value_heads=None, sliding_window=None), 4096, 0),
    "1 missing where the class has 8": (config("mistral", 2, 32, None, 4096, sliding_window=None), 2 * 4 * 8 * 128, 0),
    "2 multi_query": ({"model_type": "gpt_bigcode", "n_layer": 40, "n_head": 48, "n_embd": 6144}, 40 * 4 * 128, 0),
    "2 no multi_query": (
        {"model_type": "gpt_bigcode", "n_layer": 2, "n_head": 4, "n_embd": 64, "multi_query": False},
        2 * 4 * 64,
        0,
    ),
    "3 Falcon-40B": (config("falcon", 60, 128, None, 8192, new_decoder_architecture=True, num_kv_heads=8), 122880, 0),
    "3 n_head_kv": (
        {"model_type": "RefinedWeb", "n_layer": 60, "n_head": 128, "n_head_kv": 8, "hidden_size": 8192},
        122880,
        0,
    ),
    "3 neither": (config("falcon", 24, 32, None, 2048, multi_query=False, new_decoder_architecture=False), 196608, 0),
    "4 DBRX": (
        {"model_type": "dbrx", "n_layers": 40, "n_heads": 48, "d_model": 6144, "attn_config": {"kv_n_heads": 8}},
        40 * 4 * 8 * 128,
        0,
    ),
    "4 MPT": (
        {
            "model_type": "mpt",
            "n_layers": 32,
            "n_heads": 32,
            "d_model": 4096,
            "attn_config": {"attn_type": "multihead_attention"},
        },
        524288,
        0,
    ),
    "5 multi_query_group_num": (
        config(
            "chatglm",
            None,
            32,
            None,
            4096,
            num_layers=28,
            multi_query_attention=True,
            multi_query_group_num=2,
            kv_channels=128,
        ),
        28 * 4 * 2 * 128,
        0,
    ),
    "6 num_attention_groups": (
        {"model_type": "step3_vl", "text_config": config("step3_text", 61, 64, None, 7168, head_dim=256, **STEP)},
        61 * 4 * 256,
        0,
    ),
    "7 a list": (
        {
            "model_type": "openelm",
            "num_transformer_layers": 3,
            "head_dim": 64,
            "num_kv_heads": [3, 3, 5],
            "model_dim": 1280,
        },
        4 * 64 * (3 + 3 + 5),
        0,
    ),
    "7 blocks": (
        config("nemotron-nas", 4, 64, None, 8192, block_configs=[{"attention": each} for each in NAS]),
        4 * 128 * (64 // 8 + 64 // 16),
        0,
    ),
    "8 no q_lora_rank": (config("deepseek_v3", 27, 16, 16, 2048, q_lora_rank=None, **DEEPSEEK), 27 * 2 * 576, 0),
    "8 MiniCPM3": (config("minicpm3", 62, 40, 40, 2560, kv_lora_rank=256, qk_rope_head_dim=32), 62 * 2 * 288, 0),
    "8 two attentions a layer": (
        {"model_type": "longcat_flash", "num_layers": 28, "kv_lora_rank": 512, "qk_rope_head_dim": 64},
        56 * 2 * 576,
        0,
    ),
    "8 GLM-4.7-Flash": (config("glm4_moe_lite", 47, 20, 20, 2048, **DEEPSEEK), 47 * 2 * 576, 0),
    "8 no latent after all": (
        config("deepseek_v2", 12, 10, 10, 1280, use_mla=False, kv_lora_rank=None, qk_rope_head_dim=0),
        12 * 4 * 1280,
        0,
    ),
    "9 a window everywhere": (config("mistral", 32, 32, 8, 4096, sliding_window=4096), 0, 131072 * 4096),
    "9 a window of 0": (config("mistral", 32, 32, 8, 4096, sliding_window=0), 131072, 0),
    "9 max_window_layers": (
        config("qwen2", 4, 4, 2, 256, use_sliding_window=True, sliding_window=64, max_window_layers=3),
        3 * 4 * 128,
        4 * 128 * 64,
    ),
    "9 all layers late": (
        config("qwen2", 4, 4, 2, 256, use_sliding_window=True, sliding_window=64, max_window_layers=0),
        0,
        4 * 4 * 128 * 64,
    ),
    "10 layer_types": (
        config("olmo3", 4, 4, 2, 256, sliding_window=64, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
        4 * 128,
        3 * 4 * 128 * 64,
    ),
    "10 SmolLM3": (
        config("smollm3", 2, 16, 4, 2048, use_sliding_window=False, layer_types=["full_attention"] * 2),
        4096,
        0,
    ),
    "11 an integer": (
        config("gemma3_text", 8, 4, 2, 256, sliding_window=64, head_dim=64, sliding_window_pattern=4),
        2 * 4 * 128,
        6 * 4 * 128 * 64,
    ),
    "11 letters, the last layer full": (
        config("exaone4", 6, 4, 2, 256, sliding_window=64, sliding_window_pattern="LLLG"),
        2 * 4 * 128,
        4 * 4 * 128 * 64,
    ),
    "11 Cohere2": (config("cohere2", 32, 32, 8, 4096, sliding_window=4096), 8 * 4096, 24 * 4096 * 4096),
    "11 the last layer forced full": (
        config(
            "gemma4_text", 4, 8, 4, 2304, sliding_window=64, layer_types=["sliding_attention"] * 4, global_head_dim=512
        ),
        4 * 4 * 512,
        3 * 4 * 4 * 256 * 64,
    ),
    # 35 layers, the last 15 without a cache: of the first 20 every fifth is full
    "12 num_kv_shared_layers": (config("gemma3n_text", 35, 8, 2, 2048), 4 * 4 * 512, 16 * 4 * 512 * 512),
    "13 keys as values": (
        config("gemma4_text", 60, 32, 16, 5376, num_global_key_value_heads=4, **GEMMA4),
        10 * 4 * 4 * 512,
        50 * 4 * 16 * 256 * 1024,
    ),
    "13 sizes by layer": (
        config("gemma4_text", 6, 8, 4, 2304, per_layer_config={"05": {"head_dim": 128, "num_key_value_heads": 1}}),
        4 * 128,
        5 * 4 * 4 * 256 * 512,
    ),
    "13 MiMo": (config("mimo_v2_flash", 5, 64, 4, 4096, **MIMO), 2 * 4 * 320, 4 * 2 * 8 * 320 * 128),
    "14 Hunyuan-Large": (config("hunyuan", 64, 80, 8, 6400, use_cla=True, cla_share_factor=2), 32 * 4 * 8 * 80, 0),
    "14 use_cla false": (
        config("hunyuan_v1_moe", 4, 32, 8, 4096, head_dim=128, use_cla=False, cla_share_factor=2),
        16384,
        0,
    ),
    # the state: 2 * 2560 inputs of 64 each; the convolution also has 2 projections of 64; heads are 2 * 2560 / 32 wide
    "15 Zamba2": (
        config("zamba2", 2, 32, 32, 2560, layers_block_type=["mamba", "hybrid"]),
        4 * 32 * 160,
        2 * (2 * 4 * (5120 + 128) + 4 * 5120 * 64),
    ),
    "15 Nemotron-H": (
        config("nemotron_h", 5, 32, 8, 4096, hybrid_override_pattern="M-M*E", head_dim=128),
        4 * 8 * 128,
        2 * (2 * 4 * (8192 + 2 * 8 * 128) + 4 * 8192 * 128),
    ),
    "15 Jamba": (
        config("jamba", 32, 32, 8, 4096, attn_layer_period=8, attn_layer_offset=4, **MOE),
        4 * 4 * 8 * 128,
        28 * (2 * 4 * 8192 + 4 * 8192 * 16),
    ),
    "15 Bamba": (config("bamba", 32, 32, 8, 4096, attn_layer_indices=[9, 18, 27]), 3 * 4 * 8 * 128, 29 * MAMBA2),
    "15 RecurrentGemma": (
        config("recurrent_gemma", 26, 10, 1, 2560, attention_window_size=2048, lru_width=2560),
        0,
        8 * 4 * 256 * 2048 + 18 * (2 * 3 * 2560 + 4 * 2560),
    ),
    "15 LFM2": (config("lfm2", 16, 32, 8, 2048, full_attn_idxs=[2, 5, 8, 10, 12, 14]), 6 * 4 * 512, 10 * 2 * 3 * 2048),
    "16 Qwen3-Next": (config("qwen3_next", 48, 16, 2, 2048), 12 * 4 * 512, 36 * DELTA),
    "16 Qwen3.5": (
        {"model_type": "qwen3_5", "text_config": config("qwen3_5_text", 8, 16, 4, 4096, full_attention_interval=2)},
        4 * 4 * 1024,
        4 * DELTA,
    ),
    "17 attn_type_list": (
        config("minimax_m1", 8, 64, 8, 6144, head_dim=128, attn_type_list=[0, 0, 0, 0, 0, 0, 0, 1]),
        4 * 8 * 128,
        7 * 4 * 64 * 128 * 128,
    ),
    "18 Kimi Linear": (
        config("kimi_linear", 27, 32, 32, 2304, linear_attn_config=LINEAR, **DEEPSEEK),
        7 * 2 * 576,
        20 * (2 * 4 * 3 * 32 * 128 + 4 * 32 * 128 * 128),
    ),
    "19 Llama-4": (
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "no_rope_layers": [], "head_dim": 128}},
        12 * 4 * 8 * 128,
        36 * 4 * 8 * 128 * 8192,
    ),
    "20 a thinker": (
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": config("qwen2_5_omni_text", 28, 28, 4, 3584)}},
        28 * 4 * 512,
        0,
    ),
    "20 a type that is left out": ({"model_type": "llava", "text_config": {"num_hidden_layers": 2}}, 2 * 4 * 4096, 0),
    "20 an encoder besides": (
        config("cohere_asr", 8, 8, None, 1024, encoder_config={"max_position_embeddings": 5000}),
        8 * 4 * 1024,
        8 * 4 * 1024 * 5000,
    ),
    "21 Mistral-Nemo": (config("mistral", 40, 32, 8, 5120, head_dim=128, sliding_window=None), 163840, 0),
    "21 null": (config("llama", 2, 4, 2, 256, head_dim=None), 2 * 4 * 128, 0),
    "21 zero": (config("hunyuan_v1_dense", 2, 4, 2, 256, head_dim=0), 2 * 4 * 128, 0),
    "21 the class's": (config("qwen3", 2, 16, 8, 1024), 2 * 4 * 8 * 128, 0),
    "21 PLaMo": (config("plamo", 40, 40, None, 5120, n_shared_head=8), 40 * 4 * 5 * 128, 0),
    # PLaMo-2: attention in every second layer, within a window; Mamba with 2 heads of 128
    "21 hidden_size_per_head": (
        config("plamo2", 2, 16, 1, 2048, hidden_size_per_head=128, mamba_num_heads=2, full_attention_idx=[]),
        0,
        4 * 128 * 2048 + 2 * 4 * 256 + 4 * 256 * 64,
    ),
    "21 kv_channels": (
        {"model_type": "jetmoe", "num_hidden_layers": 24, "num_key_value_heads": 16, "kv_channels": 128},
        24 * 8192,
        0,
    ),
    "22 kv_cache_scheme": (
        config("llama", 32, 32, 8, 4096, quantization_config={"kv_cache_scheme": {"num_bits": 8, "type": "float"}}),
        65536,
        0,
    ),
    "22 kv_cache_quant_algo": (
        config("llama", 32, 32, 8, 4096, quantization_config={"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}),
        65536,
        0,
    ),
    "23 DeepSeek-V3.2": (
        config("deepseek_v32", 61, 128, 128, 7168, index_head_dim=128, index_topk=2048, **DEEPSEEK),
        61 * 2 * (576 + 128),
        0,
    ),
    "23 an index in some layers": (
        config("glm_moe_dsa", 4, 64, 64, 6144, indexer_types=["full", "shared", "shared", "full"], **DEEPSEEK),
        4 * 2 * 576 + 2 * 2 * 128,
        0,
    ),
    "23 MiniMax-M3": (
        config("minimax_m3_vl_text", 2, 64, 4, 6144, head_dim=128, sparse_attention_config=SPARSE),
        2 * 4 * 512 + 2 * 128,
        0,
    ),
    # windows of 128; for every 4 tokens an entry and a key of the index, for every 128 an entry; and what is not in
    # an entry yet: keys and gates of 3 times 4, or of 128 tokens
    "24 compress_ratios": (
        config("deepseek_v4", 3, 64, 1, 4096, compress_ratios=[0, 4, 128, 0], num_nextn_predict_layers=1, **V4),
        2 * (512 + 128) // 4 + 2 * 512 // 128,
        3 * 2 * 512 * 128 + 2 * 2 * 4 * 3 * (512 + 128) + 2 * 2 * 128 * 512,
    ),
    "25 prediction layers": (
        config("deepseek_v3", 61, 128, 128, 7168, num_nextn_predict_layers=1, **DEEPSEEK),
        70272,
        0,
    ),
    "25 mtp_num_hidden_layers": (config("qwen3_next", 48, 16, 2, 2048, mtp_num_hidden_layers=1), 24576, 36 * DELTA),
    "26 attention_types": (
        {"model_type": "gpt_neo", "num_layers": 24, "hidden_size": 2048, "num_heads": 16, "window_size": 256}
        | {"attention_types": [[["global", "local"], 12]]},
        12 * 4 * 2048,
        12 * 4 * 2048 * 256,
    ),
    "27 T5": (
        {"model_type": "t5", "num_layers": 24, "num_decoder_layers": 6, "num_heads": 128, "d_kv": 128, "d_model": 1024}
        | {"n_positions": 512},
        6 * 4 * 128 * 128,
        6 * 4 * 128 * 128 * 512,
    ),
    "27 Whisper": (
        {"model_type": "whisper", "decoder_layers": 32, "decoder_attention_heads": 20, "d_model": 1280}
        | {"num_hidden_layers": 32, "max_source_positions": 1500},
        32 * 4 * 1280,
        32 * 4 * 1280 * 1500,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_way_to_write_a_field_is_understood(name):
    fields, slope, constant = VARIANTS[name]
    cache = model_cache(fields)
    assert (cache.bytes_per_token, cache.constant_bytes) == (slope, constant)


def test_all_27_ways_have_a_test():
    assert {int(name.split()[0]) for name in VARIANTS} == set(range(1, 28))


ALL = [fields for fields, *_ in [*PUBLISHED.values(), *VARIANTS.values()]]


@pytest.mark.parametrize("fields", ALL, ids=[*PUBLISHED, *VARIANTS])
def test_what_is_stored_grows_by_the_slope_once_windows_are_full(fields):
    cache = model_cache(fields)
    full = 2**20  # a multiple of every window, chunk and group of compressed tokens
    assert cache.stored_bytes(full) == cache.constant_bytes + full * cache.bytes_per_token
    step = 128 if any(part.per > 1 for part in cache.parts) else 1
    assert cache.stored_bytes(full + step) - cache.stored_bytes(full) == step * cache.bytes_per_token
    stored = [cache.stored_bytes(tokens) for tokens in (1, 2, 63, 64, 65, 127, 128, 129, 1000, 4096, 8192, full)]
    assert stored == sorted(stored)
    if not any(part.shared for part in cache.parts):
        assert all(cache.read_bytes(tokens) <= cache.stored_bytes(tokens) for tokens in (1, 100, 5000, full))


def test_a_cache_that_layers_share_is_stored_once_and_read_by_each():
    cache = model_cache(VARIANTS["14 Hunyuan-Large"][0])
    assert cache.read_bytes(1000) == 2 * cache.stored_bytes(1000)
    gemma = model_cache(VARIANTS["12 num_kv_shared_layers"][0])  # 3 of the 15 last layers have no window
    assert gemma.read_bytes(4096) - gemma.stored_bytes(4096) == 4 * 512 * (3 * 4096 + 12 * 512)


def test_an_index_reads_its_keys_and_the_tokens_that_it_selects():
    cache = model_cache(VARIANTS["23 DeepSeek-V3.2"][0])
    assert cache.read_bytes(100_000) == 61 * 2 * (576 * 2048 + 128 * 100_000)
    assert cache.read_bytes(1000) == cache.stored_bytes(1000)
    sparse = model_cache(VARIANTS["23 MiniMax-M3"][0])
    assert sparse.read_bytes(10_000) == 4 * 512 * (10_000 + 2048) + 2 * 128 * 10_000


def test_attention_in_chunks_begins_anew():
    cache = model_cache(VARIANTS["19 Llama-4"][0])
    assert cache.read_bytes(8192) == 48 * 4 * 1024 * 8192
    assert cache.read_bytes(8193) == 4 * 1024 * (12 * 8193 + 36)
    assert cache.stored_bytes(8193) == 4 * 1024 * (12 * 8193 + 36 * 8192)


def test_a_smaller_data_type_does_not_shrink_states():
    fields = VARIANTS["16 Qwen3-Next"][0]
    assert model_cache(fields, dtype="fp8").bytes_per_token == 12 * 2 * 512
    assert model_cache(fields, dtype="int4").constant_bytes == 36 * DELTA
    half = model_cache(fields | {"mamba_ssm_dtype": "bfloat16"})
    assert half.constant_bytes == 36 * (2 * 4 * 8192 + 2 * 32 * 128 * 128)
    assert model_cache(config("llama", 1, 2, 1, 128), dtype="nvfp4").bytes_per_token == 2 * 64 * 4.5 / 8


REFUSED = {
    "an unknown model type": (config("quantumlm", 2, 4, 2, 64), "model_type='quantumlm'.*understood: .*llama"),
    "a near miss": (config("qwen9", 2, 4, 2, 64), "did you mean qwen"),
    "remote code": (config("mystery", 2, 4, 2, 64, auto_map={"AutoConfig": "a.B"}), "auto_map"),
    "no model type": ({"num_hidden_layers": 2}, "no model_type"),
    "a model type that is no string": ({"model_type": 3}, "model_type=3 must be a string"),
    "an unknown kind of layer": (
        config("gpt_oss", 2, 4, 2, 64, layer_types=["full_attention", "warp_attention"]),
        "layer_types='warp_attention'.*gpt_oss; understood: full_attention, sliding_attention",
    ),
    "a kind of another model type": (
        config("llama", 2, 4, 2, 64, layer_types=["full_attention", "linear_attention"]),
        "layer_types='linear_attention'",
    ),
    "a window without a size": (
        config("qwen3", 2, 4, 2, 64, layer_types=["full_attention", "sliding_attention"]),
        "sliding_attention with a sliding_window",
    ),
    "a list of another length": (
        config("gpt_oss", 3, 4, 2, 64, layer_types=["full_attention"]),
        "1 entries for 3 layers",
    ),
    "a letter of a pattern": (config("nemotron_h", 3, 4, 2, 64, hybrid_override_pattern="M*Q"), "'Q'.*M, \\*, E, -"),
    "a letter of windows": (config("exaone4", 4, 4, 2, 64, sliding_window_pattern="LLX"), "'LLX'"),
    "a compression": (config("deepseek_v4", 2, 4, 1, 64, compress_ratios=[0, 16]), "compress_ratios=16.*0, 4, 128"),
    "a kind of attention": (config("minimax_m1", 2, 4, 2, 64, attn_type_list=[1, 2]), "attn_type_list=2"),
    "a field of another model type": (
        config("llama", 2, 4, 2, 64, kv_lora_rank=512),
        "kv_lora_rank=512.*understood: layer_types",
    ),
    "a field that lists kinds of layers": (config("llama", 2, 4, 2, 64, block_pattern="AB"), "block_pattern='AB'"),
    "windows where none are known": (config("llama", 2, 4, 2, 64, sliding_window=512), "sliding_window=512"),
    "a string for a number": (config("llama", "2", 4, 2, 64), "num_hidden_layers='2' must be a whole number"),
    "a negative number": (config("llama", 2, 4, -2, 64), "num_key_value_heads=-2"),
    "heads that do not divide the width": (
        config("llama", 2, 5, 1, 64),
        "needs the field head_dim: .*no multiple of 5 heads",
    ),
    "layers without end": (config("llama", 10**9, 4, 2, 64), "more than any model has"),
    "another form": (config("glm_moe_dsa", 2, 4, 4, 64, index_skip_topk_offset="2"), "not in the form"),
    "true for a number": (config("llama", True, 4, 2, 64), "num_hidden_layers=True"),
    "a number for a flag": (config("qwen2", 2, 4, 2, 64, use_sliding_window=1), "must be true or false"),
    "a string for a list": (config("gpt_oss", 2, 4, 2, 64, layer_types="full"), "layer_types='full' must be a list"),
    "a list for an object": ({"model_type": "dbrx", "attn_config": []}, "attn_config=\\[\\] must be an object"),
    "layers counted from 0": (
        config("kimi_linear", 2, 4, 4, 64, linear_attn_config={"full_attn_layers": [0], "kda_layers": [1]}),
        "layers count from 1 to 2",
    ),
    "what a model type needs": ({"model_type": "baichuan"}, "needs the field num_hidden_layers"),
    "sizes of other layers": (
        config("gemma4_text", 6, 8, 4, 2304, per_layer_config={"2": {"head_dim": 128}}),
        "per_layer_config=.* in layers \\[5\\]",
    ),
    "a kind of block": (
        config("nemotron-nas", 1, 4, None, 64, block_configs=[{"attention": {"mamba": {"state": 1}}}]),
        "mamba=",
    ),
    "a quantised cache": (
        config("llama", 2, 4, 2, 64, quantization_config={"kv_cache_quant_algo": "FP3"}),
        "kv_cache_quant_algo='FP3'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name):
    fields, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as refusal:
        model_cache(fields, where="some/config.json")
    assert str(refusal.value).startswith("some/config.json")
    assert "\n" not in str(refusal.value)


@pytest.fixture
def files(tmp_path):
    """Two configs, a trained run and a study's results."""
    (tmp_path / "Qwen3-0.6B").mkdir()
    (tmp_path / "Qwen3-0.6B" / "config.json").write_text(
        json.dumps(PUBLISHED["Qwen3-0.6B"][0] | {"max_position_embeddings": 40960})
    )
    (tmp_path / "gemma.json").write_text(json.dumps(PUBLISHED["Gemma-3-4b"][0]))
    contexts = [16, 1024, 2048, 4096]
    kv = {"dtype": "float32", "bytes_per_token": 256, "constant_bytes": 16384}
    kv["stored_bytes"] = {str(n): 256 * n + (16384 if n > 16 else 8192) for n in contexts}
    kv["read_bytes"] = {str(n): 512 * n + 16384 for n in contexts}
    record = {"label": "yoco-2", "arch": "yoco", "seed": 0, "kv": kv}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text(json.dumps({"runs": [record, record | {"seed": 1}]}))
    return tmp_path


def report(sources, **options):
    return report_on([cache for source in sources for cache in read_caches(source)], **options)


def test_json_lists_models_and_trained_runs_in_order(files):
    sources = [files / "Qwen3-0.6B", files / "gemma.json", files / "run", files / "study"]
    rows = json.loads(report([str(source) for source in sources], context=3000, batch=2, memory="1GiB", as_json=True))
    assert [row["name"] for row in rows] == ["Qwen3-0.6B", "gemma", "yoco-2", "yoco-2"]
    qwen, gemma, run, _ = rows
    assert (qwen["bytes_per_token"], qwen["constant_bytes"]) == (114688, 0)
    assert qwen["stored_bytes"] == qwen["read_bytes"] == 2 * 3000 * 114688
    assert qwen["largest_batch"] == 2**30 // (3000 * 114688)
    assert gemma["stored_bytes"] == 2 * 4096 * (5 * 3000 + 29 * 1024)
    assert (run["dtype"], run["stored_bytes"], run["read_bytes"]) == (
        "fp32",
        2 * (256 * 3000 + 16384),
        2 * (512 * 3000 + 16384),
    )


def test_the_context_is_the_longest_that_a_config_states(files):
    (row,) = json.loads(report([str(files / "Qwen3-0.6B" / "config.json")], as_json=True))
    assert (row["name"], row["context"]) == ("Qwen3-0.6B", 40960)
    text = report([str(files / "Qwen3-0.6B"), str(files / "run")], memory="80GiB")
    assert "40,960" in text
    assert "4.375 GiB" in text
    assert "28 full" in text


def test_a_quantised_cache_may_be_stated_in_a_file_besides(files):
    beside = files / "Qwen3-0.6B" / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}))
    (row,) = json.loads(report([str(files / "Qwen3-0.6B")], as_json=True))
    assert (row["dtype"], row["bytes_per_token"]) == ("fp8", 57344)


def test_a_run_is_not_asked_for_a_context_at_which_its_windows_are_not_full(files):
    with pytest.raises(InputError, match=r"context of 100; give one of 16, 1024"):
        report([str(files / "run")], context=100)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("{", "is not JSON"), ("[1]", "not a list"), ('{"model_type": null}', "no model_type")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    for source in (path, tmp_path):
        with pytest.raises(InputError, match=message):
            report([str(source)])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("record.json", '{"label": "mha", "arch": "mha"}', "not evaluated"),
        ("record.json", '{"label": "mha", "arch": "mha", "kv": {"stored_bytes": {}}}', "not in the form"),
        ("results.json", '{"runs": []}', "no finished runs"),
    ],
)
def test_a_run_without_measured_bytes_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        report([str(tmp_path)])


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("1.5ki", 1536), ("7", 7)])
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "lots", "-1GiB", "80 XiB"])
def test_other_sizes_of_memory_are_refused(text):
    with pytest.raises(InputError, match="must be a size"):
        parse_memory(text)


def test_the_figure_draws_models_beside_trained_runs(files, capsys):
    path = files / "bytes.svg"
    sources = [str(files / name) for name in ("Qwen3-0.6B", "gemma.json", "run", "study")]
    assert kvfrontier.main(["bytes", *sources, "--figure", str(path)]) == 0
    assert b"<svg" in path.read_bytes()
    assert "yoco-2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        kvfrontier.main(["bytes", *sources, "--figure", str(files / "bytes.gif")])


def test_the_command_loads_no_torch(files):
    code = (
        "import sys, kvfrontier; code = kvfrontier.main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "bytes"]
    done = subprocess.run([*command, str(files / "gemma.json")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (files / "bad.json").write_text(json.dumps(config("quantumlm")))
    done = subprocess.run([*command, str(files / "bad.json")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_type_has_defaults_or_says_what_it_needs(model_type):
    try:
        assert model_cache({"model_type": model_type}).parts
    except InputError as needs:
        assert re.search("needs|is missing", str(needs))  # noqa: PT017
