"""Sizes of a decoder, read from and written to a Hugging Face `config.json`."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

SUPPORTED = ("llama",)
"""Values of `model_type` that the decoder covers."""
_LARGEST = 2**24
"""A larger size is a damaged or mistyped config: no decoder is that wide, deep or long."""
_QUANTISED = ("quantization_config", "compression_config", "quantization")
_OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r".*soft_?cap(ping)?", ()),
    (r"(.*_)?(multiplier|scaling|scale|scalar)|scale_(emb|depth)", (1,)),
    (r"sliding_window|use_sliding_window|attention_chunk_size|layer_types", ()),
    (r"(use_)?qk_(norm|layernorm)|clip_qkv|alibi|use_alibi|no_rope_layer.*", ()),
    (r"(num|n)_(local_|routed_|shared_)?experts|.*experts_per_tok", ()),
    (r"is_encoder_decoder|add_cross_attention|use_bidirectional_attention", ()),
    (r"parallel_attn|(use_)?parallel_residual|use_parallel_block", ()),
    (r"position_embedding_type", ("rope", "rotary")),
)
"""Options of other decoders: a pattern of names, and the values, besides null, false and 0, with
which they change nothing. Some of them are found in configs of `SUPPORTED` models."""
_ROPE = (
    "rope_theta",
    "rope_type",
    "type",
    "rope_parameters",
    "rope_scaling",
    "original_max_position_embeddings",
)
"""Names of rotary options that are read, or that nothing reads where frequencies are not scaled."""
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes and constants of a decoder.

    It is hashable, so that models of one shape share their compiled functions.
    """

    vocab: int  # V
    width: int  # D
    layers: int
    heads: int  # N, query heads
    kv_heads: int  # K, key and value heads; divides `heads`
    head_width: int  # H, even; heads * head_width may differ from width
    mlp: int  # F
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5
    tied: bool = True  # whether the embedding is the output projection too
    max_positions: int = 2048  # the longest sequence, in tokens

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of kv_heads, {self.kv_heads}."
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width is {self.head_width}; rotary embeddings need an even number."
            )

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.width * self.mlp + 2 * self.width
        return self.vocab * self.width * (1 if self.tied else 2) + self.layers * block + self.width


class Adapters(NamedTuple):
    """Shape of a decoder's low-rank adapters (`models.lora`); hashable."""

    rank: int = 0  # 0 means no adapters
    targets: tuple[str, ...] = ()  # names of the adapted matrices in `decoder.Block`, such as "q"


NO_ADAPTERS = Adapters()
"""A decoder without adapters."""


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a spec from the contents of a `config.json`.

    Raises:
      ValueError: the architecture or one of its options is not supported, or a field is missing.
    """
    kind = config.get("model_type", "")
    if kind not in SUPPORTED:
        raise ValueError(
            f"model_type is {kind!r} in config.json; supported: {', '.join(SUPPORTED)}."
        )
    if missing := [name for name in _REQUIRED if name not in config]:
        raise ValueError(
            f"config.json has no {', '.join(missing)}; give the config of a whole {kind} model."
        )
    _check_options(config, kind)
    theta = _rope_theta(config)
    heads = _size(config, "num_attention_heads")
    width = _size(config, "hidden_size")
    if not config.get("head_dim") and width % heads:
        raise ValueError(
            f"hidden_size is {width} and num_attention_heads {heads} in config.json; without a "
            "head_dim the first must be a multiple of the second."
        )
    return ModelSpec(
        vocab=_size(config, "vocab_size"),
        width=width,
        layers=_size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", heads),
        head_width=_size(config, "head_dim", width // heads),
        mlp=_size(config, "intermediate_size"),
        rope_theta=theta,
        norm_eps=_constant("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings", 2048),
    )


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size in `config`; one that is missing, null or 0 is the default where there is one.

    Raises:
      ValueError: it is no whole number from 1 to `_LARGEST`.
    """
    value = config.get(name)
    if default is not None and not value:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a whole number from 1 to "
            f"{_LARGEST}."
        )
    return value


def _constant(name: str, value: Any) -> float:
    """A positive number.

    Raises:
      ValueError: it is no positive number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a number above 0."
        )
    return float(value)


def _check_options(config: Mapping[str, Any], kind: str) -> None:
    """Refuses options that change what a decoder computes and that this one does not have.

    `transformers` may pass over some of them, but a config that has them describes another model.

    Raises:
      ValueError: it names the option.
    """
    for option in _QUANTISED:
        if config.get(option):
            raise ValueError(
                f"config.json has a {option}, and quantised weights are not supported; give the "
                "model in float32, bfloat16 or float16 (dequantise it with the tool that made it)."
            )
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise ValueError(
            f"tie_word_embeddings is {reprlib.repr(config['tie_word_embeddings'])} in config.json; "
            "it must be true or false."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"hidden_act is {config['hidden_act']!r} in config.json; only 'silu' is supported."
        )
    for option, value in config.items():
        if option.endswith("bias") and value:
            raise ValueError(
                f"{option} is true in config.json; a {kind} decoder with biases is not supported."
            )
        inert = next((inert for names, inert in _OPTIONS if re.fullmatch(names, option)), None)
        if inert is None or not value or option in _ROPE:
            continue
        if value in inert and not isinstance(value, bool):  # True equals 1
            continue
        if option == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        if option == "layer_types" and all(each == "full_attention" for each in value):
            continue
        raise ValueError(
            f"{option} is {reprlib.repr(value)} in config.json, and a decoder with that option is "
            f"not supported; give a {kind} model without it."
        )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies, from the options of either generation.

    `transformers` 5 writes rope_parameters; 4 writes rope_scaling and a rope_theta of its own. The
    order of precedence is that of `transformers` 5: rope_scaling before rope_parameters, and a
    rope_theta in them before the one beside them.

    Raises:
      ValueError: the frequencies are scaled, or an option is not supported.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(
            f"{name} is {reprlib.repr(rope)} in config.json; it must be a JSON object."
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r} in config.json; only 'default' is supported.")
    others = {f"{name}.{key}": value for key, value in rope.items() if key not in _ROPE}
    others |= {
        key: value
        for key, value in config.items()
        if re.match("rope_|rotary_|partial_rotary", key) and key not in _ROPE
    }
    for option, value in others.items():
        if value and (isinstance(value, bool) or value != 1):  # a factor of 1 changes nothing
            raise ValueError(
                f"{option} is {reprlib.repr(value)} in config.json; only plain rotary embeddings "
                "of whole heads are supported."
            )
    return _constant("rope_theta", rope.get("rope_theta", config.get("rope_theta", 1e4)))


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """Returns the contents of a `config.json` that `transformers` (4 and 5) and vLLM read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_width,
        "intermediate_size": spec.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "attention_bias": False,
        "mlp_bias": False,
    }
