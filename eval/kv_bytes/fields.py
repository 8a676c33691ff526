"""The fields of a Hugging Face config.json, and the parts of the cache that follow from them.

What a layer keeps is one or more parts: keys and values of all tokens, those of a window, a latent, an index, a
recurrent state. A part knows how many entries it holds after T tokens and how many of them one decode step reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.errors import InputError


@dataclass(frozen=True)
class Part:
    """Entries of `elements` numbers: one for every `per` tokens, `limit` at most. A `fixed` part holds `limit` entries
    from the first token on."""

    kind: str
    elements: int
    limit: int | None = None
    per: int = 1
    fixed: bool = False
    chunked: bool = False  # attention begins anew every `limit` tokens
    read: int | None = None  # entries that one decode step reads at most
    bits: int = 0  # of a number, at least: states are wider than a quantised cache
    shared: bool = False  # stored by another layer: this one only reads it

    def entries(self, tokens: int) -> int:
        if self.fixed:
            return self.limit or 0
        made = tokens // self.per
        return made if self.limit is None else min(made, self.limit)

    def read_entries(self, tokens: int) -> int:
        if self.chunked and tokens:
            return (tokens - 1) % self.limit + 1
        return self.entries(tokens) if self.read is None else min(self.entries(tokens), self.read)

    @property
    def grows(self) -> bool:
        return self.limit is None and not self.fixed


@dataclass
class Config:
    """The fields of one config, with the defaults of its model type. `where` names it in messages. Look-ups are noted
    in `asked`: a field about the cache that nobody asked for is refused."""

    fields: Mapping[str, Any]
    where: str
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    outer: Mapping[str, Any] = field(default_factory=dict)  # the config that holds this one as its text_config
    asked: set[str] = field(default_factory=set)

    def value(self, *names: str) -> tuple[str, Any]:
        """The first of these fields that is given and not null, else the default; with its name."""
        self.asked.update(names)
        given = [name for name in names if name in self.fields]
        for name in given:
            if self.fields[name] is not None:
                return name, self.fields[name]
        return (
            (given[0], None)
            if given
            else (names[0], next((self.defaults[n] for n in names if n in self.defaults), None))
        )

    def size(self, *names: str) -> int | None:
        """A whole number above zero, or None: null, 0 and a missing field mean that there is none."""
        name, value = self.value(*names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{self.where}: {name}={_short(value)} must be a whole number, 0 or more")
        return value or None

    def need(self, *names: str) -> int:
        size = self.size(*names)
        if size is None:
            or_so = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise InputError(f"{self.where}: model_type={self.model_type} needs the field {names[0]}{or_so}")
        return size

    def flag(self, name: str) -> bool:
        _, value = self.value(name)
        if not isinstance(value, bool | None):
            raise InputError(f"{self.where}: {name}={_short(value)} must be true or false")
        return bool(value)

    def items(self, name: str, count: int | None = None) -> list:
        """The list `name`, empty if it is not given. With `count`: one entry for each layer. Entries that follow are
        of the layers for multi-token prediction, which plain decoding does not run."""
        _, value = self.value(name)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise InputError(f"{self.where}: {name}={_short(value)} must be a list")
        extra = self.size("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers") or 0
        if value and count is not None and not count <= len(value) <= count + extra:
            raise InputError(f"{self.where}: {name} has {len(value)} entries for {count} layers")
        return list(value[:count])

    def indices(self, name: str, count: int, first: int = 0) -> set[int]:
        """Numbers of layers, counted from `first`."""
        for index in (numbers := self.items(name)):
            if isinstance(index, bool) or not isinstance(index, int) or not first <= index < first + count:
                last = first + count - 1
                raise InputError(f"{self.where}: {name} has {_short(index)}; layers count from {first} to {last}")
        return {index - first for index in numbers}

    def part(self, name: str) -> "Config":
        """The fields of the object `name`, none if it is not given."""
        _, value = self.value(name)
        if not isinstance(value, dict | None):
            raise InputError(f"{self.where}: {name}={_short(value)} must be an object")
        default = self.defaults.get(name) if name not in self.fields else None
        return Config(value or {}, f"{self.where}: {name}", self.model_type, default or {})

    def refuse(self, name: str, value: Any, understood: Any) -> InputError:
        known = ", ".join(str(each) for each in understood)
        what = f"{name}={_short(value)} is not understood for model_type={self.model_type}"
        return InputError(f"{self.where}: {what}; understood: {known}")

    @property
    def heads(self) -> int:
        return self.need("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")

    @property
    def width(self) -> int:
        return self.need("hidden_size", "n_embd", "d_model", "n_embed")

    @property
    def layers(self) -> int:
        count = self.need("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
        if count > 10_000:
            raise InputError(f"{self.where}: {count} layers are more than any model has")
        return count

    @property
    def kv_heads(self) -> int:
        """Without any of these fields each query head has a KV head of its own, as in all model types known here."""
        return self.size("num_key_value_heads", "num_attention_groups", "num_kv_heads", "n_head_kv") or self.heads

    @property
    def head_dim(self) -> int:
        names = "head_dim", "attention_head_dim", "kv_channels", "d_kv", "hidden_size_per_head"
        size = self.size(*names)
        if size is None and self.width % self.heads:
            what = f"hidden_size={self.width} is no multiple of {self.heads} heads"
            raise InputError(f"{self.where}: model_type={self.model_type} needs the field head_dim: {what}")
        return size or self.width // self.heads

    @property
    def max_tokens(self) -> int | None:
        names = "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"
        return self.size(*names, "max_context_length", "model_max_length", "max_target_positions")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
