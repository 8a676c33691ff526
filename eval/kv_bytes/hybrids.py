"""Model types with recurrent or convolutional layers, whose states do not grow with the context."""

from eval.kv_bytes.fields import Config, Part
from eval.kv_bytes.layers import (
    FULL,
    LINEAR,
    SAME,
    WINDOW,
    Layers,
    assemble,
    attention,
    family,
    keys_and_values,
    layer_types,
    recurrent,
)
from train.errors import InputError


def gated_delta(config: Config) -> list[Part]:
    keys = config.size("linear_num_key_heads") or config.heads
    values = config.size("linear_num_value_heads") or config.heads
    key = config.size("linear_key_head_dim") or int(0.75 * config.width / keys)
    value = config.size("linear_value_head_dim") or 2 * key
    kernel = config.size("linear_conv_kernel_dim") or 4
    return recurrent(config, values * key * value, 2 * keys * key + values * value, kernel)


DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16}
DELTA |= {"linear_num_value_heads": 32, "full_attention_interval": 4}


@family("qwen3_next qwen3_5 qwen3_5_moe", **DELTA)
@family("olmo_hybrid", full_attention_interval=4)
def delta_hybrid(config: Config) -> Layers:
    """Gated DeltaNet layers (arXiv 2412.06464), and attention in every fourth layer."""
    every = config.need("full_attention_interval")
    kinds = layer_types(config, config.layers, lambda layer: LINEAR if (layer + 1) % every else FULL)
    return assemble(config, kinds, attention(keys_and_values(config)) | {LINEAR: gated_delta(config)})


@family("minimax minimax_text_01 minimax_m1")
def lightning(config: Config) -> Layers:
    """Lightning attention (arXiv 2501.08313): a state of head size squared for each head."""
    count, head_dim = config.layers, config.head_dim
    pattern = config.items("attn_type_list", count)
    for each in pattern:
        if each not in (0, 1):
            raise config.refuse("attn_type_list", each, ["0 (linear)", "1 (full)"])
    if config.model_type != "minimax" and not pattern and not config.items("layer_types"):
        raise InputError(f"{config.where}: model_type={config.model_type} needs the field attn_type_list")
    linear = [not kind for kind in pattern] or [layer % 2 == 1 for layer in range(count)]
    kinds = layer_types(config, count, lambda layer: LINEAR if linear[layer] else FULL)
    state = {LINEAR: recurrent(config, config.heads * head_dim**2)}
    return assemble(config, kinds, attention(keys_and_values(config)) | state)


def mamba1(config: Config) -> list[Part]:
    """Mamba (arXiv 2312.00752)."""
    inner = config.size("intermediate_size") if config.model_type in ("mamba", "falcon_mamba") else None
    inner = inner or (config.size("mamba_expand", "expand") or 2) * config.width
    state = config.size("mamba_d_state", "state_size") or 16
    return recurrent(config, inner * state, inner, config.size("mamba_d_conv", "conv_kernel") or 4)


def mamba2(config: Config) -> list[Part]:
    """Mamba-2 (arXiv 2405.21060): a state for each head, and convolutions of inputs and of both projections."""
    heads = config.need("mamba_n_heads", "n_mamba_heads", "mamba_num_heads")
    inner = config.size("mamba_d_ssm") or (config.size("mamba_expand", "expand") or 2) * config.width
    size = None if config.value("mamba_d_head")[1] == "auto" else config.size("mamba_d_head", "mamba_head_dim")
    inner = heads * size if size else inner
    state = config.need("mamba_d_state", "ssm_state_size")
    groups = config.size("mamba_n_groups", "mamba_ngroups", "n_groups") or 1
    return recurrent(config, inner * state, inner + 2 * groups * state, config.size("mamba_d_conv", "conv_kernel") or 4)


@family("mamba falcon_mamba")
def mamba(config: Config) -> Layers:
    return [mamba1(config)] * config.layers


@family("mamba2", num_heads=128, head_dim=64, state_size=128, n_groups=8)
def pure_mamba2(config: Config) -> Layers:
    inner, state = config.need("num_heads") * config.need("head_dim"), config.need("state_size")
    conv = inner + 2 * config.need("n_groups") * state
    return [recurrent(config, inner * state, conv, config.size("conv_kernel") or 4)] * config.layers


@family("jamba", attn_layer_period=8, attn_layer_offset=4)
def jamba(config: Config) -> Layers:
    period, offset = config.need("attn_layer_period"), config.size("attn_layer_offset") or 0
    kinds = layer_types(config, config.layers, lambda layer: FULL if layer % period == offset else LINEAR)
    return assemble(config, kinds, attention(keys_and_values(config)) | {LINEAR: mamba1(config)})


MAMBA2 = {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_d_state": 256}


@family("bamba granitemoehybrid", **MAMBA2)
def mamba2_hybrid(config: Config) -> Layers:
    count = config.layers
    full = config.indices("attn_layer_indices", count)
    kinds = layer_types(config, count, lambda layer: FULL if layer in full else LINEAR)
    linear = {LINEAR: mamba2(config)} if LINEAR in kinds else {}
    return assemble(config, kinds, attention(keys_and_values(config)) | linear)


@family("falcon_h1", **MAMBA2, mamba_d_ssm=1024)
def falcon_h1(config: Config) -> Layers:
    """Every layer has attention and Mamba-2, side by side."""
    both = attention(keys_and_values(config))[FULL] + mamba2(config)
    return assemble(config, layer_types(config, config.layers, lambda layer: "hybrid"), {"hybrid": both})


@family("nemotron_h", mamba_num_heads=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8)
def nemotron_h(config: Config) -> Layers:
    """Layers are attention, Mamba-2, or a feed-forward network alone, which keeps nothing."""
    name, pattern = config.value("hybrid_override_pattern")
    letters = {"M": LINEAR, "*": FULL, "E": "moe", "-": "mlp"}
    given = config.items("layers_block_type") or config.items("layer_types")
    if not given and isinstance(pattern, str) and pattern:
        for letter in pattern:
            if letter not in letters:
                raise config.refuse(name, letter, letters)
        given = [letters[letter] for letter in pattern]
    count = config.size("num_hidden_layers")
    if not given or count not in (None, len(given)):
        wrong = f"has {len(given)} entries for {count} layers" if given else "is missing"
        name = "layers_block_type" if "layers_block_type" in config.fields else name
        raise InputError(f"{config.where}: {name} {wrong}")
    kinds = [SAME.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    parts = attention(keys_and_values(config)) | {LINEAR: mamba2(config), "moe": [], "mlp": []}
    return assemble(config, kinds, parts, "layers_block_type")


@family("zamba2", n_mamba_heads=8, mamba_d_state=64)
@family("zamba", attn_layer_period=6, attn_layer_offset=4)
def zamba(config: Config) -> Layers:
    """Some layers run a shared attention block besides Mamba. Its weights are shared; its keys and values are not. It
    sees the embedding as well, and its heads are twice as wide."""
    count = config.layers
    elements = 2 * config.kv_heads * (config.size("attention_head_dim") or 2 * config.width // config.heads)
    period, offset = config.size("attn_layer_period"), config.size("attn_layer_offset") or 0
    if config.model_type == "zamba2":
        own, hybrid = mamba2(config), {6, 12, 18, 24, 30, 36, 42, 47, 51}  # of the 54 layers of Zamba2-2.7B
        if count != 54 and not config.items("layers_block_type") and not config.items("layer_types"):
            raise InputError(f"{config.where}: model_type=zamba2 with {count} layers needs layers_block_type")
    else:
        own = mamba1(config)
        hybrid = {2} | {layer for layer in range(3, count) if (layer - 3) % (period or 6) == offset}
    parts = {LINEAR: own, "hybrid": [*own, Part("full", elements)]}
    return assemble(config, layer_types(config, count, lambda n: "hybrid" if n in hybrid else LINEAR), parts)


@family("recurrent_gemma", conv1d_width=4, block_types=["recurrent", "recurrent", "attention"])
def recurrent_gemma(config: Config) -> Layers:
    """Griffin (arXiv 2402.19427): linear recurrences, and attention within a window."""
    count, cycle, width = config.layers, config.items("block_types"), config.size("lru_width") or config.width
    elements = 2 * config.kv_heads * (config.width // config.heads)
    own = recurrent(config, width, width, config.need("conv1d_width") - 1)
    kinds = [cycle[layer % len(cycle)] for layer in range(count)] if cycle else []
    window = Part("window", elements, limit=config.need("attention_window_size", "sliding_window"))
    parts = {"recurrent": own, "attention": [window]}
    return assemble(config, kinds, parts, "block_types")


@family("lfm2 lfm2_moe", conv_L_cache=3)
def lfm2(config: Config) -> Layers:
    """Gated short convolutions, and attention in some layers."""
    count, cached = config.layers, config.need("conv_L_cache")
    full = config.indices("full_attn_idxs", count) if config.items("full_attn_idxs") else set(range(count))
    if config.model_type == "lfm2_moe" and not config.items("layer_types") and not config.items("full_attn_idxs"):
        raise InputError(f"{config.where}: model_type=lfm2_moe needs the field layer_types")
    kinds = layer_types(config, count, lambda layer: FULL if layer in full else "conv")
    conv = [Part("conv", config.width * cached, limit=1, fixed=True, bits=16)]
    return assemble(config, kinds, attention(keys_and_values(config)) | {"conv": conv})


@family("plamo2", mamba_enabled=True, mamba_num_heads=64, mamba_step=2, mamba_d_state=64, mamba_d_conv=4)
def plamo2(config: Config) -> Layers:
    """Mamba, and attention in the middle of every `mamba_step` layers: within a window, except in the layers of
    `full_attention_idx`; without that list nowhere."""
    count, step, enabled = config.layers, config.need("mamba_step"), config.flag("mamba_enabled")
    inner, state = config.need("mamba_num_heads") * config.head_dim, config.need("mamba_d_state")
    window = config.need("attention_window_size", "sliding_window")
    listed = config.value("full_attention_idx")[1] is not None
    full = config.indices("full_attention_idx", count) if listed else set(range(count))
    middle = {layer for layer in range(count) if layer % step == step // 2} if count > step // 2 else {count - 1}
    parts = attention(keys_and_values(config), window)
    parts[LINEAR] = recurrent(config, inner * state, inner, config.need("mamba_d_conv"))
    attends = [FULL if layer in full else WINDOW for layer in range(count)]
    return assemble(config, [attends[n] if n in middle or not enabled else LINEAR for n in range(count)], parts)
