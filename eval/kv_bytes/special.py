"""Model types that say in a way of their own which keys and values their layers keep."""

from eval.kv_bytes.fields import Config, Part
from eval.kv_bytes.layers import (
    CHUNK,
    FULL,
    WINDOW,
    Layers,
    assemble,
    attention,
    family,
    keys_and_values,
    layer_types,
    share,
    shared,
)
from train.errors import InputError


@family("gpt_bigcode", multi_query=True)
def gpt_bigcode(config: Config) -> Layers:
    heads = 1 if config.flag("multi_query") else config.heads
    return [[Part("full", 2 * heads * config.head_dim)]] * config.layers


@family("falcon RefinedWebModel", multi_query=True)
@family("RefinedWeb", new_decoder_architecture=True)
def falcon(config: Config) -> Layers:
    """The new architecture has its own number of KV heads; before it there was one, or one for each query head."""
    several = config.size("num_kv_heads", "n_head_kv") or config.heads
    new, multi_query = config.flag("new_decoder_architecture"), config.flag("multi_query")
    heads = several if new or not multi_query else 1
    return [[Part("full", 2 * heads * (config.width // config.heads))]] * config.layers


@family("mpt")
@family("dbrx", attn_config={"kv_n_heads": 1})
def nested_attention(config: Config) -> Layers:
    inner = config.part("attn_config")
    if config.model_type == "mpt":
        _, kind = inner.value("attn_type")
        match kind:
            case None | "multihead_attention":
                heads = config.heads
            case "multiquery_attention":
                heads = 1
            case "grouped_query_attention":
                heads = inner.need("kv_n_heads")
            case _:
                known = "multihead_attention", "multiquery_attention", "grouped_query_attention"
                raise inner.refuse("attn_type", kind, known)
    else:
        heads = inner.size("kv_n_heads") or 1
    return [[Part("full", 2 * heads * (config.width // config.heads))]] * config.layers


@family("chatglm", kv_channels=128, multi_query_group_num=1)
def chatglm(config: Config) -> Layers:
    groups = config.need("multi_query_group_num")
    heads = groups if config.flag("multi_query_attention") else config.heads
    return [[Part("full", 2 * heads * config.need("kv_channels"))]] * config.need("num_layers", "num_hidden_layers")


@family("openelm")
def openelm(config: Config) -> Layers:
    return heads_by_layer(config, "num_kv_heads")


@family("deci")
def deci(config: Config) -> Layers:
    return heads_by_layer(config, "num_key_value_heads_per_layer")


def heads_by_layer(config: Config, name: str) -> Layers:
    heads = config.items(name, config.layers)
    if not heads or not all(isinstance(number, int) and number > 0 for number in heads):
        raise InputError(f"{config.where}: model_type={config.model_type} needs {name}, a number for each layer")
    return [[Part("full", 2 * number * config.head_dim)] for number in heads]


@family("nemotron-nas")
def nemotron_nas(config: Config) -> Layers:
    """Each block has its own group size, a window, or no attention at all."""
    return [block_parts(config, block) for block in config.items("block_configs", config.layers) or [None]]


def block_parts(config: Config, block: object) -> list[Part]:
    where = f"{config.where}: block_configs"
    if not isinstance(block, dict) or not isinstance(block.get("attention"), dict):
        raise InputError(f"{where}: model_type=nemotron-nas needs an object with attention for each layer")
    inner = Config(block["attention"], f"{where}: attention", config.model_type)
    without = inner.flag("no_op") or inner.flag("replace_with_linear")
    heads, group = inner.size("num_key_value_heads"), inner.size("n_heads_in_group")
    window, sinks = inner.size("window_length"), inner.size("num_sink_tokens") or 0
    ignored = {"sparsify", "use_prefill_window_in_sink_attention", "unshifted_sink"}
    for name, value in inner.fields.items():
        if value and name not in inner.asked | ignored:
            raise inner.refuse(name, value, sorted(inner.asked))
    if without:
        return []
    elements = 2 * (heads or config.heads // (group or inner.need("n_heads_in_group"))) * config.head_dim
    return attention(elements, window + sinks)[WINDOW] if window else attention(elements)[FULL]


@family("hunyuan hunyuan_v1_dense hunyuan_v1_moe", cla_share_factor=1)
def hunyuan(config: Config) -> Layers:
    """Cross-layer attention (arXiv 2405.12981): the first of every `cla_share_factor` layers stores for all of them."""
    factor = config.need("cla_share_factor") if config.flag("use_cla") else 1
    layer = [Part("full", keys_and_values(config))]
    return [shared(layer) if n % factor else layer for n in range(config.layers)]


@family("plamo")
def plamo(config: Config) -> Layers:
    heads = config.heads // config.need("n_shared_head")
    return [[Part("full", 2 * heads * config.head_dim)]] * config.layers


@family("gpt_neo", window_size=256, attention_types=[[["global", "local"], 12]])
def gpt_neo(config: Config) -> Layers:
    kinds, count = [], config.layers
    for entry in config.items("attention_types"):
        match entry:
            case [list(names), int(times)]:
                kinds += names * times
            case _:
                raise config.refuse("attention_types", entry, ['[["global", "local"], 12]'])
    if len(kinds) != count:
        raise InputError(f"{config.where}: attention_types has {len(kinds)} entries for {count} layers")
    parts = attention(2 * config.width, config.need("window_size"))
    return assemble(config, kinds, {"global": parts[FULL], "local": parts[WINDOW]}, "attention_types")


@family("gemma3n", num_kv_shared_layers=15)
@family("gemma4 gemma4_unified", global_head_dim=512)
def gemma_shared(config: Config) -> Layers:
    """The last layers read the cache of the last layer before them that is of their kind. In Gemma 4 layers without a
    window have their own head size and number of KV heads, and the last layer has no window. Keys that are also values
    (`attention_k_eq_v`) are stored twice: keys are rotated and scaled by a learned norm, values are not."""
    count, own = config.layers, keys_and_values(config)
    four, every, full = config.model_type.startswith("gemma4"), 5, own
    if four:
        every, equal = 6, config.flag("attention_k_eq_v")
        few = config.size("num_global_key_value_heads")
        full = 2 * ((equal and few) or config.kv_heads) * (config.size("global_head_dim") or config.head_dim)
    every = config.size("sliding_window_pattern") or every
    kinds = layer_types(config, count, lambda layer: WINDOW if (layer + 1) % every else FULL)
    if four:
        kinds[-1] = FULL
        own_sizes = per_layer(
            config, [n for n, kind in enumerate(kinds) if kind == FULL], "head_dim num_key_value_heads"
        )
        if own_sizes:
            full = 2 * (own_sizes.size("num_key_value_heads") or config.kv_heads) * own_sizes.need("head_dim")
    layers = assemble(config, kinds, attention(full, config.size("sliding_window"), own))
    count_shared = config.size("num_kv_shared_layers") or 0
    if count_shared and not set(kinds[-count_shared:]) <= set(kinds[: max(0, count - count_shared)]):
        raise InputError(f"{config.where}: num_kv_shared_layers={count_shared} leaves a kind of layer without a cache")
    return share(layers, count_shared)


def per_layer(config: Config, layers: list[int], understood: str) -> Config | None:
    """The fields that `per_layer_config` sets for just these layers, alike for all; None if it is not given."""
    given = config.part("per_layer_config")
    if not given.fields:
        return None
    first = next(iter(given.fields.values()))
    alike = all(each == first for each in given.fields.values()) and isinstance(first, dict)
    if not alike or set(map(int, given.fields)) != set(layers) or set(first) - set(understood.split()):
        raise config.refuse("per_layer_config", dict(given.fields), [f"{understood}, alike in layers {layers}"])
    return Config(first, given.where, config.model_type)


@family("llama4", attention_chunk_size=8192, no_rope_layer_interval=4)
def llama4(config: Config) -> Layers:
    """Layers with rotary positions attend within chunks; the others to all tokens."""
    count, chunk, elements = config.layers, config.size("attention_chunk_size"), keys_and_values(config)
    rotary, every = config.items("no_rope_layers", count), config.need("no_rope_layer_interval")
    rotary = rotary or [int((layer + 1) % every != 0) for layer in range(count)]  # 1: rotary, whatever the name says
    kinds = layer_types(config, count, lambda layer: CHUNK if rotary[layer] and chunk else FULL)
    chunked = {CHUNK: [Part("chunk", elements, limit=chunk, chunked=True)]} if chunk else {}
    return assemble(config, kinds, attention(elements) | chunked)


@family("mimo_v2 mimo_v2_flash", v_head_dim=128)
def mimo(config: Config) -> Layers:
    """Layers with a window have their own numbers of KV heads; `attention_chunk_size` is set and not used."""
    count, head_dim, v_dim = config.layers, config.head_dim, config.need("v_head_dim")
    few = config.size("swa_num_key_value_heads") or 2 * config.kv_heads
    within = few * ((config.size("swa_head_dim") or head_dim) + (config.size("swa_v_head_dim") or v_dim))
    pattern = config.items("hybrid_layer_pattern", count)
    for each in pattern:
        if each not in (0, 1):
            raise config.refuse("hybrid_layer_pattern", each, ["0 (full)", "1 (window)"])
    default = [int(layer != 0 and (layer + 1) % 6 != 0) for layer in range(count)]
    kinds = layer_types(config, count, lambda layer: WINDOW if (pattern or default)[layer] else FULL)
    window = config.size("sliding_window", "sliding_window_size")
    return assemble(config, kinds, attention(config.kv_heads * (head_dim + v_dim), window, within))


@family("step3p5")
def step3p5(config: Config) -> Layers:
    other = config.part("attention_other_setting")
    heads = other.size("num_attention_groups", "num_key_value_heads") or config.kv_heads
    within = 2 * heads * (other.size("head_dim") or config.head_dim)
    parts = attention(keys_and_values(config), config.size("sliding_window"), within)
    kinds = layer_types(config, config.layers, lambda layer: FULL)
    per_layer(config, [n for n, kind in enumerate(kinds) if kind == WINDOW], "num_attention_heads")
    return assemble(config, kinds, parts)


@family("deepseek_v4", index_head_dim=128, index_topk=512)
def deepseek_v4(config: Config) -> Layers:
    """Every layer has a window of keys that are also its values. Some also keep an entry for every 4 tokens, of which
    an index selects (CSA), or for every 128 (HCA), and the tokens that are not in an entry yet."""
    count, size, index = config.layers, config.kv_heads * config.head_dim, config.need("index_head_dim")
    rates = config.part("compress_rates")
    csa, hca = "compressed_sparse_attention", "heavily_compressed_attention"
    sparse = rates.size(csa) or config.size("compress_rate_csa") or 4
    heavy = rates.size(hca) or config.size("compress_rate_hca") or 128
    window = Part("window", size, limit=config.need("sliding_window"))
    parts = {
        WINDOW: [window],
        csa: [
            window,
            Part("compressed", size, per=sparse, read=config.need("index_topk")),
            Part("index", index, per=sparse),
            # keys and gates: of the last group of tokens, and twice as wide of the one that is not full
            Part("tail", 6 * sparse * (size + index), limit=1, fixed=True, bits=16),
        ],
        hca: [
            window,
            Part("compressed", size, per=heavy),
            Part("tail", 2 * heavy * size, limit=1, fixed=True, bits=16),
        ],
    }
    by_ratio = {0: WINDOW, 4: csa, 128: hca}
    ratios = config.items("compress_ratios", count)
    for ratio in ratios:
        if ratio not in [*by_ratio]:
            raise config.refuse("compress_ratios", ratio, by_ratio)
    default = [hca if layer < 2 or layer % 2 == 0 else csa for layer in range(count)]
    kinds = layer_types(config, count, lambda layer: by_ratio[ratios[layer]] if ratios else default[layer])
    return assemble(config, kinds, parts)


@family("minimax_m2")
@family("minimax_m3 minimax_m3_vl", index_head_dim=128, index_block_size=128, index_topk_blocks=16)
def minimax_m(config: Config) -> Layers:
    """All tokens' keys and values; in sparse layers an index selects blocks of them."""
    count, sparse = config.layers, config.part("sparse_attention_config")
    for each in config.items("attn_type_list", count):
        if each != 1:
            raise config.refuse("attn_type_list", each, ["1 (full)"])
    dim = sparse.size("sparse_index_dim") or config.size("index_head_dim")
    block = sparse.size("sparse_block_size") or config.size("index_block_size")
    blocks = sparse.size("sparse_topk_blocks") or config.size("index_topk_blocks")
    used = "use_sparse_attention" not in sparse.fields or sparse.flag("use_sparse_attention")
    frequency = sparse.items("sparse_attention_freq", count) if used else []
    kind = "minimax_m3_sparse"
    kinds = layer_types(config, count, lambda layer: kind if frequency and frequency[layer] else FULL)
    parts = attention(keys_and_values(config))
    if dim and block and blocks:
        parts[kind] = [Part("full", keys_and_values(config), read=block * blocks), Part("index", dim)]
    return assemble(config, kinds, parts)


@family("t5 mt5 umt5 switch_transformers", d_kv=64, n_positions=512)
def t5(config: Config) -> Layers:
    """A decoder's own keys and values, and those of the encoder's `n_positions` tokens, which do not grow."""
    elements = 2 * config.heads * config.need("d_kv")
    count = config.need("num_decoder_layers", "num_layers", "num_hidden_layers")
    return encoder_decoder(count, elements, config.need("n_positions"))


WHISPER = {"decoder_layers": 4, "d_model": 384, "max_source_positions": 1500, "max_target_positions": 448}


@family("whisper", **WHISPER)
@family("bart mbart pegasus marian", decoder_layers=12, d_model=1024, max_position_embeddings=1024)
def bart(config: Config) -> Layers:
    source = config.need("max_source_positions", "max_position_embeddings")
    return encoder_decoder(config.need("decoder_layers"), 2 * config.need("d_model"), source)


@family("cohere_asr")
def cohere_asr(config: Config) -> Layers:
    source = config.part("encoder_config").size("max_position_embeddings") or 5000
    return encoder_decoder(config.layers, keys_and_values(config), source)


def encoder_decoder(layers: int, elements: int, source: int) -> Layers:
    return [[Part("full", elements), Part("cross", elements, limit=source, fixed=True)]] * layers


@family("mllama", cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38])
def mllama(config: Config) -> Layers:
    """Some layers attend to an image instead of the text; the largest image counts."""
    vision = Config(config.outer, config.where, config.model_type).part("vision_config")
    side = (vision.size("image_size") or 448) // (vision.size("patch_size") or 14)
    source, elements = (vision.size("max_num_tiles") or 4) * (side * side + 1), keys_and_values(config)
    cross = config.indices("cross_attention_layers", config.layers)
    image = [Part("cross", elements, limit=source, fixed=True)]
    return [image if layer in cross else [Part("full", elements)] for layer in range(config.layers)]
