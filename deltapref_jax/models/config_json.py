"""Reads a decoder's spec from a Hugging Face config.json, and writes the config of an export.

The config classes of `transformers` fill in what a file omits, and read the options of either
generation, so a file means here what it means there. What a class declares and nothing here reads
must have its default value, and an option of another decoder is refused by its name: a model whose
logits would differ never loads.
"""

import copy
import logging
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from deltapref_jax.models.families import FAMILIES, Family
from deltapref_jax.models.rope_config import read_rope
from deltapref_jax.models.spec import ModelSpec, Rope

_LARGEST = 2**24
"""A larger size is a damaged or mistyped config: no decoder is that wide, deep or long."""
_QUANTISED = ("quantization_config", "compression_config", "quantization")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu_squared",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "intermediate_size")
"""Fields that no config of a hub omits; some of them omit others."""
_READ = (
    *_REQUIRED,
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "max_position_embeddings",
    "rms_norm_eps",
    "norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_type",
    "model_type",
)
"""Fields that are read for every family that has them."""
_NO_EFFECT = (
    "_name_or_path",  # where version 4 had read the model
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Fields of any config that change no logit."""
_OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r".*soft_?cap(ping)?", ()),
    (r"(.*_)?(multiplier|scaling|scale|scalar)|scale_(emb|depth)", (1,)),
    (r"sliding_window|use_sliding_window|attention_chunk_size|layer_types", ()),
    (r"(use_)?qk_(norm|layernorm)|clip_qkv|alibi|use_alibi|no_rope_layer.*", ()),
    (r"(num|n)_(local_|routed_|shared_)?experts|.*experts_per_tok", ()),
    (r"is_encoder_decoder|add_cross_attention|use_bidirectional_attention", ()),
    (r"parallel_attn|(use_)?parallel_residual|use_parallel_block", ()),
    (r"position_embedding_type", ("rope", "rotary")),
    (r"(rope|rotary|partial_rotary)_.*", (1,)),
    (r".*bias", ()),
)
"""Options of other decoders: a pattern of names, and the values, besides null, false and 0, with
which they change nothing. Configs of supported families hold some of them."""


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a spec from the contents of a `config.json`.

    Raises:
      ValueError: the architecture or one of its options is not supported, or a field is missing or
        has a value that it cannot have.
    """
    family, text = family_of(config)
    for option in _QUANTISED:
        if config.get(option) or text.get(option):
            raise ValueError(
                f"config.json has a {option}, and quantised weights are not supported; give the "
                "model in float32, bfloat16 or float16 (dequantise it with the tool that made it)."
            )
    if missing := [name for name in _REQUIRED if text.get(name) is None]:
        raise ValueError(
            f"config.json has no {', '.join(missing)}; give the config of a whole "
            f"{family.model_type} model."
        )
    _check_types(text)
    hf = _complete(family, text)
    _check_unread(family, text, type(hf))
    heads, width = hf.num_attention_heads, hf.hidden_size
    head_width = getattr(hf, "head_dim", None) or width // heads
    activation = getattr(hf, "hidden_act", None) or hf.hidden_activation
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act is {activation!r} in config.json; supported: "
            f"{', '.join(map(repr, _ACTIVATIONS))}."
        )
    epsilon = hf.norm_eps if family.model_type == "nemotron" else hf.rms_norm_eps
    return ModelSpec(
        vocab=_size("vocab_size", hf.vocab_size),
        width=width,
        layers=hf.num_hidden_layers,
        heads=heads,
        kv_heads=_size("num_key_value_heads", hf.num_key_value_heads or heads),
        head_width=_size("head_dim", head_width),
        mlp=hf.intermediate_size,
        norm_eps=_positive("norm_eps", epsilon),
        tied=hf.tie_word_embeddings,
        max_positions=_size("max_position_embeddings", hf.max_position_embeddings),
        family=family.model_type,
        ropes=_ropes(family, hf, head_width),
        **({"activation": _ACTIVATIONS[activation]} | dict(family.read(hf))),
    )


def family_of(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Returns the family of a config.json, and the part of it that describes the decoder.

    The config of a model that reads images too holds that part as its text_config.

    Raises:
      ValueError: the family is not supported.
    """
    kind = config.get("model_type", "")
    if kind == "gemma3" and isinstance(config.get("text_config"), Mapping):
        return FAMILIES["gemma3_text"], config["text_config"] | {"model_type": "gemma3_text"}
    # The automatic class of `transformers` reads a Mistral with layer_types like this.
    if kind == "mistral" and "layer_types" in config:
        return FAMILIES["ministral"], dict(config) | {"model_type": "ministral"}
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type is {reprlib.repr(kind)} in config.json; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind], config


def fields_of(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the fields of a supported config.json: what is read, what changes no logit, the rest.

    The rest is what neither the family of `transformers` nor this project knows, and what has the
    value without effect.
    """
    family, text = family_of(config)
    read = {*_READ, *family.reads}
    without_effect = {*_NO_EFFECT, *family.unused}
    found: dict[str, list[str]] = {"read": [], "without effect": [], "not read": []}
    for name in text:
        kind = "read" if name in read else "without effect"
        found[kind if name in read | without_effect else "not read"].append(name)
    return found


def _check_types(config: Mapping[str, Any]) -> None:
    """Checks the values that the classes of `transformers` would take as they are.

    Raises:
      ValueError: it names the field.
    """
    for name in (*_REQUIRED, "vocab_size", "num_attention_heads", "max_position_embeddings"):
        if config.get(name) is not None:
            _size(name, config[name])
    for name in ("num_key_value_heads", "head_dim"):
        if config.get(name):
            _size(name, config[name])
    for name in ("rms_norm_eps", "norm_eps"):
        if config.get(name) is not None:
            _positive(name, config[name])
    for name in ("layer_types", "no_rope_layers"):
        entries, layers = config.get(name), config["num_hidden_layers"]
        if isinstance(entries, list) and len(entries) < layers:
            raise ValueError(
                f"{name} has {len(entries)} entries in config.json and num_hidden_layers is "
                f"{layers}; every layer needs one."
            )
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise ValueError(
            f"tie_word_embeddings is {reprlib.repr(config['tie_word_embeddings'])} in config.json; "
            "it must be true or false."
        )
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ValueError(
                f"{name} is {reprlib.repr(config[name])} in config.json; it must be a JSON object."
            )
    heads, width = config.get("num_attention_heads"), config["hidden_size"]
    groups, head_width = config.get("num_key_value_heads"), config.get("head_dim")
    if heads and groups and heads % groups:
        raise ValueError(f"heads is {heads}; it must be a multiple of kv_heads, {groups}.")
    if head_width and head_width % 2:
        raise ValueError(f"head_width is {head_width}; rotary embeddings need an even number.")
    if heads and not config.get("head_dim") and width % heads:
        raise ValueError(
            f"hidden_size is {width} and num_attention_heads {heads} in config.json; without a "
            "head_dim the first must be a multiple of the second."
        )


def _complete(family: Family, config: Mapping[str, Any]) -> Any:
    """Returns the config of `transformers`, with all defaults filled in.

    Raises:
      ValueError: the class does not accept the values.
    """
    from transformers import CONFIG_MAPPING

    # A head_dim of 0 means the default, as null does.
    fields = {
        name: value
        for name, value in copy.deepcopy(dict(config)).items()
        if name not in _NO_EFFECT and not (name == "head_dim" and not value)
    }
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # what it warns of is refused or read here
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(fields)
    except Exception as e:  # the classes raise types of their own, over several lines
        raise ValueError(
            f"config.json is not accepted by the {family.model_type} config of transformers: "
            f"{' '.join(str(e).split())}."
        ) from e
    finally:
        log.setLevel(level)


def _check_unread(family: Family, config: Mapping[str, Any], declared: type) -> None:
    """Refuses fields that change what a decoder computes and that nothing here reads.

    Raises:
      ValueError: it names the field.
    """
    defaults = declared()
    for option, value in config.items():
        if option in (*_READ, *_NO_EFFECT, *family.reads, *family.unused) or not value:
            continue
        if hasattr(declared, option) or option in vars(defaults):
            # A field of the class that has its default value is what the class computes without it.
            neutral = value == getattr(defaults, option, None)
        else:
            allowed = next((ok for names, ok in _OPTIONS if re.fullmatch(names, option)), None)
            neutral = allowed is None or (value in allowed and value is not True)
            # Some configs name a window and say that they do not use it.
            neutral |= option == "sliding_window" and config.get("use_sliding_window") is False
            neutral |= option == "layer_types" and all(kind == "full_attention" for kind in value)
        if not neutral:
            raise ValueError(
                f"{option} is {reprlib.repr(value)} in config.json, and a decoder with that option "
                f"is not supported; give a {family.model_type} model without it."
            )


def _ropes(family: Family, hf: Any, head_width: int) -> tuple[Rope, ...]:
    """The rotary embeddings of all layers, or of each kind of layers: first of full attention."""
    options = hf.rope_parameters or {}
    kinds = ("full_attention", "sliding_attention")
    by_kind = [(kind, options[kind]) for kind in kinds if options.get(kind) is not None]
    if family.model_type in ("gemma3_text", "olmo3"):
        # Beside the options of a kind of layers, `transformers` passes over others.
        for option, value in options.items():
            if option not in kinds and value and value != "default":
                raise ValueError(
                    f"rope_parameters.{option} is {reprlib.repr(value)} in config.json; a "
                    f"{family.model_type} model has options for each kind of layers: "
                    f"{', '.join(kinds)}."
                )
    else:
        for kind in (*kinds, "chunked_attention"):
            if kind in options:
                raise ValueError(
                    f"rope_parameters.{kind} is {reprlib.repr(options[kind])} in config.json; a "
                    f"{family.model_type} model has one kind of rotary embeddings."
                )
        by_kind = [("", options)]
    return tuple(
        read_rope(
            values,
            f"rope_parameters.{kind}".rstrip("."),
            head_width,
            hf.max_position_embeddings,
            family.partial_rotary,
            options,
        )
        for kind, values in by_kind
    )


def _size(name: str, value: Any) -> int:
    """A size.

    Raises:
      ValueError: it is no whole number from 1 to `_LARGEST`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a whole number from 1 to "
            f"{_LARGEST}."
        )
    return value


def _positive(name: str, value: Any) -> float:
    """A positive number.

    Raises:
      ValueError: it is no positive number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ValueError(
            f"{name} is {reprlib.repr(value)} in config.json; it must be a number above 0."
        )
    return float(value)


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """Returns the config.json of a plain Llama of these sizes, which has no file that it came from.

    Raises:
      ValueError: the spec is that of another family.
    """
    if spec.family != "llama" or spec.ropes != (Rope(spec.ropes[0].theta),):
        raise ValueError(f"A {spec.family} model is written with the config that it was read from.")
    theta = spec.ropes[0].theta
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
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "attention_bias": False,
        "mlp_bias": False,
    }


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the decoder's config in a form that `transformers` 4 and 5 and vLLM read alike.

    Version 5 saves rope_parameters alone, in which version 4 finds no rope_theta and takes its
    default without a word; a file of version 4 has no rope_parameters. The result has both forms.
    """
    family, text = family_of(config)
    out = dict(text) | {"architectures": [family.architecture], "model_type": family.model_type}
    options = _without_type(_complete(family, text).rope_parameters or {})
    full = options.get("full_attention", options)
    scaled = full.get("rope_type", "default") != "default"
    out["rope_parameters"] = options
    out["rope_theta"] = full.get("rope_theta")
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    out["rope_scaling"] = scaling if scaled else None
    if family.model_type == "gemma3_text":
        out["rope_local_base_freq"] = options["sliding_attention"]["rope_theta"]
    if family.model_type == "qwen3_moe":
        count = out.get("num_experts", out.get("num_local_experts"))
        out["num_experts"] = out["num_local_experts"] = count
    return {key: value for key, value in out.items() if value is not None or key in text}


def _without_type(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary options without `type`, the old name of rope_type, in one order."""
    return {
        key: _without_type(value) if isinstance(value, Mapping) else value
        for key, value in sorted(options.items())
        if key != "type"
    }
