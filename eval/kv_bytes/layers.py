"""The parts that the layers of each model type keep: one function for each way to say it in a config.json.

A kind of layer that a model type does not have is refused, and nothing is assumed in its place.
"""

from collections.abc import Callable

from eval.kv_bytes.defaults import DEFAULTS, LATENT_TYPES
from eval.kv_bytes.fields import Config, Part
from train.errors import InputError

Layers = list[list[Part]]  # the parts of each layer
FULL, WINDOW, CHUNK, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
SAME = {  # other names of kinds of layers
    "attention": FULL,
    "mamba": LINEAR,
    "mamba2": LINEAR,
    "deepseek_sparse_attention": "indexed_attention",
}
STATE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
FAMILIES: dict[str, tuple[Callable[[Config], Layers], dict]] = {}  # model type -> its rule and its defaults


def family(names: str, **defaults) -> Callable:
    """Registers a function for these model types, with defaults besides those of the tables."""

    def register(rule: Callable[[Config], Layers]) -> Callable[[Config], Layers]:
        FAMILIES.update({name: (rule, DEFAULTS.get(name, {}) | defaults) for name in names.split()})
        return rule

    return register


def layer_types(config: Config, count: int, default: Callable[[int], str]) -> list[str]:
    """The kind of each layer: as the config lists them, else `default` of the layer's number."""
    given = config.items("layer_types", count) or config.items("layers_block_type", count)
    return [SAME.get(kind, kind) if isinstance(kind, str) else kind for kind in given] or [*map(default, range(count))]


def assemble(config: Config, kinds: list, parts: dict[str, list[Part]], name: str = "layer_types") -> Layers:
    """The parts of each layer by its kind. InputError for a kind that these model types do not have."""
    for kind in kinds:
        if not isinstance(kind, str) or kind not in parts:
            needs = [f"{WINDOW} with a sliding_window"] if kind == WINDOW else []
            raise config.refuse(name, kind, [*parts, *needs])
    return [parts[kind] for kind in kinds]


def attention(elements: int, window: int | None = None, window_elements: int | None = None) -> dict[str, list[Part]]:
    """Keys and values of all tokens, and of those in a window."""
    parts = {FULL: [Part("full", elements)]}
    return parts | ({WINDOW: [Part("window", window_elements or elements, limit=window)]} if window else {})


def keys_and_values(config: Config) -> int:
    return 2 * config.kv_heads * config.head_dim


def share(layers: Layers, count: int) -> Layers:
    """The last `count` layers read what earlier ones store."""
    own = len(layers) - count
    return layers[:own] + [shared(layer) for layer in layers[own:]]


def shared(layer: list[Part]) -> list[Part]:
    return [Part(**(vars(part) | {"shared": True})) for part in layer]


@family(" ".join(DEFAULTS))
def grouped(config: Config) -> Layers:
    """MHA, MQA and GQA, with or without windows."""
    count, windows = config.layers, config.defaults.get("windows")
    window = None
    if windows:
        used = not config.model_type.startswith(("qwen", "smollm3", "mimo"))
        used = config.flag("use_sliding_window") if "use_sliding_window" in config.fields else used
        config.value("sliding_window_pattern")  # it says nothing where there is no window
        window = config.size("sliding_window") if used else None
    kinds = windowed(config, count, windows) if window else [FULL] * count
    kinds = layer_types(config, count, kinds.__getitem__)
    return assemble(config, kinds, attention(keys_and_values(config), window))


def windowed(config: Config, count: int, windows: str | int) -> list[str]:
    """The kinds of layers of a config that does not list them."""
    if windows == "all":
        return [WINDOW] * count
    if windows == "late":
        config.size("max_window_layers")  # checks it; 0 is a number here
        _, first = config.value("max_window_layers")
        if first is None:
            first = {"qwen2_vl": 80, "qwen2_5_vl": 80, "dots1": 62}.get(config.model_type, 28)
        return [WINDOW if layer >= first else FULL for layer in range(count)]
    if windows == "list":
        if not config.items("layer_types"):
            raise InputError(f"{config.where}: model_type={config.model_type} with a sliding_window needs layer_types")
        return [FULL] * count
    name, pattern = config.value("sliding_window_pattern", "global_attn_every_n_layers")
    if isinstance(pattern, str):  # one letter for each of a few layers, over and over; the last layer has no window
        letters = {"L": WINDOW, "G": FULL}
        if not pattern or set(pattern) - set(letters):
            raise config.refuse(name, pattern, ["a whole number", "L (window)", "G (full)"])
        return [letters[pattern[layer % len(pattern)]] for layer in range(count - 1)] + [FULL]
    every = config.size(name) or windows
    return [WINDOW if (layer + 1) % every else FULL for layer in range(count)]


@family(" ".join(LATENT_TYPES))
def latent(config: Config) -> Layers:
    """MLA: a latent and a rotary key for each token; with an index, a key of it in the layers that select anew."""
    rank = config.size("kv_lora_rank")
    if rank is None or config.fields.get("use_mla") is False:
        return grouped(config)
    count = config.layers
    if config.model_type == "longcat_flash":  # a layer has two attention blocks
        count = 2 * config.need("num_layers", "num_hidden_layers")
    elements, topk = rank + (config.size("qk_rope_head_dim") or 0), config.size("index_topk")
    whole, selected = [Part("latent", elements)], [Part("latent", elements, read=topk)]
    parts = {FULL: selected if topk else whole}
    if topk:
        parts["indexed_attention"] = selected
    if config.model_type.startswith(("kimi_linear", "bailing_hybrid", "glm5_next")):
        parts[LINEAR] = delta_layer(config)
    layers = assemble(config, latent_kinds(config, count), parts)
    if not topk:
        return layers
    keys, own = [Part("index", config.need("index_head_dim"))], indexers(config, count)
    return [layer + keys if layer is selected and own[n] else layer for n, layer in enumerate(layers)]


def latent_kinds(config: Config, count: int) -> list[str]:
    linear = config.part("linear_attn_config")
    full, delta = (linear.indices(name, count, first=1) for name in ("full_attn_layers", "kda_layers"))
    if (full or delta) and not config.items("layer_types"):
        if len(full) + len(delta) != count or full & delta:
            raise InputError(f"{linear.where} must name each of {count} layers in full_attn_layers or in kda_layers")
        return [FULL if layer in full else LINEAR for layer in range(count)]
    every = config.size("layer_group_size") or 6
    defaults = {
        "kimi_linear": lambda layer: FULL if layer and layer % 4 == 0 else LINEAR,
        "bailing_hybrid": lambda layer: LINEAR if (layer + 1) % every else FULL,
        "glm5_next": lambda layer: LINEAR if layer % 4 != 3 else FULL,
    }
    return layer_types(config, count, defaults.get(config.model_type, lambda layer: FULL))


def recurrent(config: Config, state: int, conv: int = 0, kernel: int = 4) -> list[Part]:
    """A recurrent state, in fp32 unless the config says otherwise, and the inputs that a causal convolution needs."""
    name, dtype = config.value("mamba_ssm_cache_dtype", "mamba_ssm_dtype")
    if dtype not in (None, "auto", *STATE_BITS):
        raise config.refuse(name, dtype, ["auto", *STATE_BITS])
    parts = [Part("state", state, limit=1, fixed=True, bits=STATE_BITS.get(dtype, 32))]
    return parts + ([Part("conv", conv * kernel, limit=1, fixed=True, bits=16)] if conv else [])


def delta_layer(config: Config) -> list[Part]:
    """Kimi delta attention (arXiv 2510.26692): one state for each head, and convolutions of queries, keys, values."""
    linear = config.part("linear_attn_config")
    bailing = config.model_type == "bailing_hybrid"
    size = linear.size("head_dim") or config.size("head_dim" if bailing else "linear_head_dim") or 128
    heads = linear.size("num_heads") or config.size("num_attention_heads" if bailing else "linear_num_heads")
    heads = heads or (64 if config.model_type == "glm5_next" else 32)
    kernel = linear.size("short_conv_kernel_size")
    kernel = kernel or config.size("linear_conv_kernel_dim", "short_conv_kernel_size") or 4
    return recurrent(config, heads * size * size, 3 * heads * size, kernel)


def indexers(config: Config, count: int) -> list[bool]:
    """Whether each layer has an index of its own; the others select what the layer before them selected."""
    pattern = config.items("indexer_types", count)
    name, text = config.value("index_topk_pattern")
    if not pattern and isinstance(text, str):
        pattern = list(text)
    elif not pattern:
        pattern = config.items("index_topk_pattern", count)
    letters = {"full": True, "F": True, "shared": False, "S": False}
    for each in pattern:
        if each not in [*letters]:
            raise config.refuse("indexer_types" if "indexer_types" in config.fields else name, each, letters)
    every, offset = config.size("index_topk_freq") or 1, config.value("index_skip_topk_offset")[1]
    start = 2 if offset is None else offset
    default = [max(layer - start + 1, 0) % every == 0 for layer in range(count)]
    return [letters[each] for each in pattern] or default
