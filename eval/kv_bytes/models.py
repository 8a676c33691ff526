"""The cache of a model from its config.json alone, or of a trained run from its record.

Cache bytes of one sequence, all exact: what each token adds, what does not grow, what is stored at a context, and what
one decode step reads there. Numbers have the cache's data type: 16 bits, unless the config quantises its cache.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from eval.kv_bytes import hybrids, special  # noqa: F401, they register their model types
from eval.kv_bytes.fields import Config, Part
from eval.kv_bytes.layers import FAMILIES
from train.errors import InputError

# Bits of a number; nvfp4 has a scale of 8 bits for 16 of them. The other scales are too few to count.
DTYPES = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "nvfp4": Fraction(9, 2), "int4": 4, "int2": 2}
TORCH_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# The model type of a nested config that does not name its own.
TEXT_TYPES = {
    "aya_vision": "cohere2",
    "deepseek_vl_v2": "deepseek_v2",
    "idefics3": "llama",
    "internvl": "qwen2",
    "kimi_k25": "deepseek_v3",
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "smolvlm": "llama",
    "step3_vl": "step3",
    "step3p7": "step3p5",
}
NESTED = "thinker_config", "text_config", "language_config", "llm_config"
# Fields that change a cache. One that is set and that the rule for a model type does not look at is refused.
TELLING = (
    "attention_k_eq_v attention_types attn_layer_indices attn_layer_period attn_type_list block_configs block_types "
    "compress_rates compress_ratios cross_attention_layers full_attention_interval full_attn_idxs global_head_dim "
    "hybrid_layer_pattern hybrid_override_pattern index_head_dim index_topk kv_lora_rank layer_types layers_block_type "
    "linear_attn_config multi_query multi_query_group_num num_attention_groups num_global_key_value_heads "
    "num_key_value_heads_per_layer num_kv_shared_layers kv_source_layers per_layer_config sliding_window "
    "sliding_window_pattern sparse_attention_config swa_head_dim swa_num_key_value_heads use_cla"
)

# Names under which other model types list the kinds of their layers.
KINDS = re.compile(
    r"(layers?|blocks?|attn|attention|(token_)?mixer|hybrid)_(types?|patterns?|kinds?|layout|pattern_str)"
)


@dataclass
class ModelCache:
    """The cache of one sequence by formula."""

    name: str
    model_type: str
    dtype: str
    max_tokens: int | None  # the longest context that the config states
    parts: list[Part]

    def _bytes(self, parts: list[Part], entries: Callable[[Part], int | Fraction | None]) -> Fraction:
        bits = DTYPES[self.dtype]
        each = {part: Fraction(part.elements * max(part.bits, bits)) / 8 * entries(part) for part in set(parts)}
        return sum((each[part] for part in parts), Fraction())

    @property
    def stored_parts(self) -> list[Part]:
        """Those that no other layer stores."""
        return [part for part in self.parts if not part.shared]

    @property
    def bytes_per_token(self) -> int | float:
        """What each further token adds once all windows are full."""
        growing = [part for part in self.stored_parts if part.grows]
        slope = self._bytes(growing, lambda part: Fraction(1, part.per))
        return int(slope) if slope.denominator == 1 else float(slope)

    @property
    def constant_bytes(self) -> int:
        """What a sequence holds whatever its length: full windows, states, caches of an encoder."""
        return -(-self._bytes([part for part in self.stored_parts if not part.grows], lambda part: part.limit) // 1)

    def stored_bytes(self, tokens: int) -> int:
        return -(-self._bytes(self.stored_parts, lambda part: part.entries(tokens)) // 1)

    def read_bytes(self, tokens: int) -> int:
        """What one decode step reads with `tokens` in the cache. A cache counts once for each layer that reads it."""
        return -(-self._bytes(self.parts, lambda part: part.read_entries(tokens)) // 1)

    @property
    def summary(self) -> str:
        """Such as "12 full, 12 window 128": the number of layers that have each kind of part."""
        sized = {"window", "chunk", "cross"}
        kinds = Counter(
            part.kind + (f" {part.limit}" if part.kind in sized else "") + (" shared" if part.shared else "")
            for part in self.parts
        )
        return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


@dataclass
class TrainedCache:
    """The cache of one sequence as the record of a trained run has it, measured and by formula."""

    name: str
    model_type: str
    dtype: str
    kv: dict

    def __post_init__(self):
        self.bytes_per_token, self.constant_bytes = self.kv["bytes_per_token"], self.kv["constant_bytes"]
        self._stored = {int(tokens): count for tokens, count in self.kv["stored_bytes"].items()}
        self._read = {int(tokens): count for tokens, count in self.kv["read_bytes"].items()}
        linear = self.bytes_per_token, self.constant_bytes
        self._full = [n for n, count in sorted(self._stored.items()) if count == n * linear[0] + linear[1]]
        self.max_tokens, self.summary = min(self._stored), f"trained {self.model_type}"

    def stored_bytes(self, tokens: int) -> int:
        return self._at(self._stored, tokens)

    def read_bytes(self, tokens: int) -> int:
        return self._at(self._read, tokens)

    def _at(self, counts: dict[int, int], tokens: int) -> int:
        """From the first context on at which all windows are full, both are straight lines."""
        if tokens in counts:
            return counts[tokens]
        if len(self._full) < 2 or tokens < self._full[0]:
            known = ", ".join(map(str, sorted(counts)))
            raise InputError(f"{self.name} was not measured at a context of {tokens}; give one of {known}")
        first, last = self._full[0], self._full[-1]
        return counts[first] + (tokens - first) * (counts[last] - counts[first]) // (last - first)


def parts_of(fields: dict, where: str) -> tuple[list[Part], Config]:
    """The parts of the cache of one config.json, and the config of its language model. InputError for anything that is
    not understood."""
    model_type, outer = None, {}
    while True:
        named = fields.get("model_type")
        if named is not None and not isinstance(named, str):
            raise InputError(f"{where}: model_type={named!r} must be a string")
        model_type = named or TEXT_TYPES.get(model_type, model_type)
        nested = next((name for name in NESTED if isinstance(fields.get(name), dict)), None)
        if nested is None:
            break
        where, outer, fields = f"{where}: {nested}", outer | fields, fields[nested]
    if model_type is None:
        raise InputError(f"{where} has no model_type: what its fields mean is not known")
    plain = model_type.removesuffix("_model").removesuffix("_text")
    if plain not in FAMILIES:
        near = difflib.get_close_matches(plain, FAMILIES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        remote = ", which has code of its own (auto_map)," if "auto_map" in fields else ""
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{where}: model_type={model_type!r}{remote} is not understood{hint}; understood: {known}")
    rule, defaults = FAMILIES[plain]
    config = Config(fields, where, plain, defaults, outer)
    try:
        layers = rule(config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{where}: not in the form that model_type={plain} has ({e!r})") from None
    telling = set(TELLING.split())
    if fields.get("use_sliding_window") is False:
        telling -= {"sliding_window"}
    for name in fields.keys() - config.asked:
        if fields[name] and (name in telling or KINDS.fullmatch(name)):
            raise config.refuse(name, fields[name], sorted(telling & config.asked))
    return [part for layer in layers for part in layer], config


def cache_dtype(config: Config) -> str:
    """The data type of the cache that the config asks for, bf16 if it asks for none."""
    for fields in (config.fields, config.outer):
        for holder in (fields.get("quantization_config"), fields.get("quantization")):
            if not isinstance(holder, dict):
                continue
            where = f"{config.where}: quantization_config"
            match scheme := holder.get("kv_cache_scheme") or None:
                case None:
                    pass
                case {"num_bits": 8, "type": "float"}:
                    return "fp8"
                case {"num_bits": 8 | 4 | 2 as bits, "type": "int"}:
                    return f"int{bits}"
                case _:
                    raise InputError(f"{where}: kv_cache_scheme={scheme} is not understood; say --dtype instead")
            algorithm = holder.get("kv_cache_quant_algo")
            if isinstance(algorithm, str) and algorithm.lower() in DTYPES:
                return algorithm.lower()
            if algorithm is not None and str(algorithm).lower() != "none":
                known = ", ".join(DTYPES)
                raise InputError(f"{where}: kv_cache_quant_algo={algorithm!r} is not understood; understood: {known}")
    return "bf16"


def read_caches(source: str, dtype: str | None = None) -> list[ModelCache | TrainedCache]:
    """The caches of a config.json, of a directory with one, of a trained run, or of all variants of a study's
    results.json. InputError says what is wrong with it."""
    path = Path(source)
    if path.is_dir():
        if (path / "record.json").exists():
            record = read_object(path / "record.json")
            return [trained_cache(record, f"{path / 'record.json'}")]
        if (path / "results.json").exists():
            runs = read_object(path / "results.json").get("runs")
            if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
                raise InputError(f"{path / 'results.json'} has no finished runs")
            caches = {run.get("label"): run for run in reversed(runs)}  # seeds do not differ
            return [trained_cache(run, f"{path / 'results.json'}") for run in reversed(caches.values())]
        path = path / "config.json"
    name = path.resolve().parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    fields = read_object(path)
    if path.name == "config.json" and (beside := path.with_name("hf_quant_config.json")).exists():
        fields.setdefault("quantization", read_object(beside).get("quantization"))
    return [model_cache(fields, str(path), name, dtype)]


def model_cache(fields: dict, where: str = "config.json", name: str = "model", dtype: str | None = None) -> ModelCache:
    """The cache that the fields of a config.json describe; `where` names it in messages."""
    parts, config = parts_of(fields, where)
    return ModelCache(name, config.model_type, dtype or cache_dtype(config), config.max_tokens, parts)


def trained_cache(record: dict, where: str) -> TrainedCache:
    kv = record.get("kv")
    if not isinstance(kv, dict) or "stored_bytes" not in kv:
        raise InputError(f"{where} has no cache bytes: the run is not evaluated yet; kvfrontier eval does that")
    try:
        return TrainedCache(str(record["label"]), str(record["arch"]), TORCH_DTYPES.get(kv["dtype"], kv["dtype"]), kv)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{where} is not in the form that a run writes ({e!r})") from None


def read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a config.json or a directory that holds one") from None
    except ValueError as e:
        raise InputError(f"{path} is not JSON: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(fields).__name__}")
    return fields
