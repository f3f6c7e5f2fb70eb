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
from deltapref_jax.models.families.family import positive, size
from deltapref_jax.models.rope_config import read_rope
from deltapref_jax.models.spec import ModelSpec, Rope

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
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "model_type",
    "architectures",
)
"""Fields that are read for every family, besides its own: `Family.reads` and names of fields."""
_NO_EFFECT = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",  # where version 4 had read the model
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "neftune_noise_alpha",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_flash_attn",
    # What version 4 saved of its base class: generation, and other tasks than this.
    "bad_words_ids",
    "begin_suppress_tokens",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
)
"""Fields of any config that change no logit, whatever their value."""
_DROPOUT = r".*dropout(_prob)?|.*_pdrop"
"""Names of further ones: nothing drops out here."""
_IMAGES = r"vision_config|mm_tokens_per_image|(boi|eoi|image)_token_(index|id)"
"""Fields beside a text_config that have no part in its text."""
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
_OPTIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    # `transformers` reads these of any config, though hardly a class declares them.
    (r"is_causal", (True,)),
    (r"transformers_weights|per_layer_config|sliding_window|attention_chunk_size", (None,)),
    (r"layer_types|kv_sharing_modes|fusion_config|text_config", (None,)),
    (r"partial_rotary_factor", (None, 1)),
    (r".*soft_?cap(ping)?", _OFF),
    (r"(.*_)?(multiplier|scaling|scale|scalar)|scale_(emb|depth)", (None, False, 1)),
    (r"use_sliding_window|use_mrope|num_nextn_predict_layers", _OFF),
    (r"(use_)?qk_(norm|layernorm)|clip_qkv|alibi|use_alibi|no_rope_layer.*", _OFF),
    (r"(num|n)_(local_|routed_|shared_)?experts|.*experts_per_tok", _OFF),
    (r"output_router_logits|norm_topk_prob|router_aux_loss_coef", (*_OFF, True)),
    (r"is_encoder_decoder|add_cross_attention|use_bidirectional_attention", _OFF),
    (r"parallel_attn|(use_)?parallel_residual|use_parallel_block", _OFF),
    (r"position_embedding_type", (None, "rope", "rotary")),
    (r"(rope|rotary)_.*", (None, False, 1, "default")),
    (r".*bias", _OFF),
)
"""Options of other decoders: a pattern of names, and the values with which they change nothing.
Configs of supported families hold some of them."""


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a spec from the contents of a `config.json`.

    Raises:
      ValueError: the architecture or one of its options is not supported, or a field is missing or
        has a value that it cannot have.
    """
    family, text = family_of(config)
    if missing := [name for name in _REQUIRED if text.get(name) is None]:
        raise ValueError(
            f"config.json has no {', '.join(missing)}; give the config of a whole "
            f"{family.model_type} model."
        )
    _check_types(text)
    _check_quantisation(family, config, text)
    _check_architectures(family, config)
    hf = _complete(family, text)
    _check_unread(family, text, type(hf))
    if config["model_type"] == "gemma3":
        _check_outer(config, hf)
    heads, width = hf.num_attention_heads, hf.hidden_size
    head_width = size("head_dim", getattr(hf, "head_dim", width // heads))
    activation = getattr(hf, family.activation)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"{family.activation} is {reprlib.repr(activation)} in config.json; supported: "
            f"{', '.join(map(repr, _ACTIVATIONS))}."
        )
    _check_original(family, hf)
    return ModelSpec(
        vocab=size("vocab_size", hf.vocab_size),
        width=width,
        layers=hf.num_hidden_layers,
        heads=heads,
        kv_heads=size("num_key_value_heads", hf.num_key_value_heads),
        head_width=head_width,
        mlp=hf.intermediate_size,
        norm_eps=positive(family.epsilon, getattr(hf, family.epsilon)),
        tied=hf.tie_word_embeddings,
        max_positions=size("max_position_embeddings", hf.max_position_embeddings),
        family=family.model_type,
        ropes=_ropes(family, hf, head_width),
        **({"activation": _ACTIVATIONS[activation]} | _of_family(family, hf)),
    )


def _of_family(family: Family, hf: Any) -> dict[str, Any]:
    """The fields of a spec that differ from Llama's.

    Raises:
      ValueError: a value is not supported, or of a type that nothing can be computed from.
    """
    try:
        return dict(family.read(hf))
    except (TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(
            f"A value of config.json cannot be used for a {family.model_type} model ({e}); give "
            "the config that the model was published with."
        ) from e


def _check_original(family: Family, hf: Any) -> None:
    """Refuses two lengths of pretraining, of which versions of `transformers` read different ones.

    Raises:
      ValueError: the config and its rotary embeddings name different lengths.
    """
    name = "original_max_position_embeddings"
    outer = getattr(hf, name, None)
    options = hf.rope_parameters or {}
    if outer is None or family.model_type == "phi3" or not isinstance(options, Mapping):
        return
    for inner in (options, *(v for v in options.values() if isinstance(v, Mapping))):
        scaled = inner.get("rope_type", "default") in ("llama3", "yarn", "longrope")
        if scaled and inner.get(name, outer) != outer:
            raise ValueError(
                f"{name} is {reprlib.repr(outer)} in config.json and {inner[name]} in its "
                "rope_parameters; transformers 5 reads the first and 4 the second: give one."
            )


def family_of(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Returns the family of a config.json, and the part of it that describes the decoder.

    The config of a model that reads images too holds that part as its text_config.

    Raises:
      ValueError: the family is not supported.
    """
    kind = config.get("model_type", "")
    if kind == "gemma3":
        if not isinstance(config.get("text_config"), Mapping):
            raise ValueError(
                f"text_config is {reprlib.repr(config.get('text_config'))} in config.json; a "
                "gemma3 model has its decoder there: give the config that it was published with."
            )
        return FAMILIES["gemma3_text"], config["text_config"] | {"model_type": "gemma3_text"}
    # The automatic class of `transformers` reads a Mistral with layer_types like this.
    if kind == "mistral" and "layer_types" in config:
        return FAMILIES["ministral"], dict(config) | {"model_type": "ministral"}
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type is {reprlib.repr(kind)} in config.json; supported: "
            f"{', '.join([*FAMILIES, 'gemma3'])}."
        )
    return FAMILIES[kind], config


def fields_of(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the fields of a supported config.json: what is read, what changes no logit, the rest.

    The rest is what neither the family of `transformers` nor this project knows, and what has the
    value without effect.
    """
    family, text = family_of(config)
    found: dict[str, list[str]] = {"read": [], "without effect": [], "not read": []}
    for name in dict.fromkeys([*config, *text]):
        found[_kind(family, name)].append(name)
    return found


def _kind(family: Family, name: str) -> str:
    """What becomes of a field: a key of `fields_of`."""
    if name in (*_READ, family.activation, family.epsilon, *family.reads):
        return "read"
    if name in (*_NO_EFFECT, *family.unused) or re.fullmatch(f"{_DROPOUT}|{_IMAGES}", name):
        return "without effect"
    return "not read"


def quantisation(config: Mapping[str, Any]) -> str:
    """Returns the quant_method of a config.json's quantization_config, or nothing."""
    options = config.get("quantization_config")
    return str(options.get("quant_method", "")) if isinstance(options, Mapping) else ""


def _check_quantisation(family: Family, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Refuses weights that need scales, except in the forms that a family is read in.

    Raises:
      ValueError: it names the field.
    """
    for option in _QUANTISED:
        known = option == "quantization_config" and quantisation(text) in family.quantised
        if not known and any(c.get(option) is not None for c in (config, text)):
            raise ValueError(
                f"config.json has a {option}, and quantised weights are not supported"
                + (f" but those of {', '.join(family.quantised)}" if family.quantised else "")
                + "; give the model in float32, bfloat16 or float16 (dequantise it with the tool "
                "that made it)."
            )


def _check_architectures(family: Family, config: Mapping[str, Any]) -> None:
    """Refuses a model of another task, such as a classifier.

    Raises:
      ValueError: it names the field.
    """
    named = config.get("architectures")
    images = config["model_type"] == "gemma3"
    ending = ("ForCausalLM", "ForConditionalGeneration") if images else "ForCausalLM"
    if named is None or isinstance(named, list) and any(str(n).endswith(ending) for n in named):
        return
    raise ValueError(
        f"architectures is {reprlib.repr(named)} in config.json; only models that predict the next "
        f"token are supported, such as {family.architecture}."
    )


def _check_types(config: Mapping[str, Any]) -> None:
    """Checks the values that the classes of `transformers` would take as they are.

    Raises:
      ValueError: it names the field.
    """
    sizes = (
        *_REQUIRED,
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window_pattern",
        "no_rope_layer_interval",
    )
    for name in sizes:
        if config.get(name) is not None:
            size(name, config[name])
    for name in ("rms_norm_eps", "norm_eps"):
        if config.get(name) is not None:
            positive(name, config[name])
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
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            raise ValueError(
                f"{name} is {reprlib.repr(config[name])} in config.json; it must be a JSON object."
            )
    for options in (config, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        if options.get("original_max_position_embeddings") is not None:
            positive(
                "original_max_position_embeddings", options["original_max_position_embeddings"]
            )
    heads, width = config.get("num_attention_heads"), config["hidden_size"]
    groups, head_width = config.get("num_key_value_heads"), config.get("head_dim")
    if heads and groups and heads % groups:
        raise ValueError(
            f"num_attention_heads is {heads} in config.json; it must be a multiple of "
            f"num_key_value_heads, {groups}."
        )
    if head_width and head_width % 2:
        raise ValueError(
            f"head_dim is {head_width} in config.json; rotary embeddings need an even number."
        )
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

    fields = {k: v for k, v in copy.deepcopy(dict(config)).items() if k not in _NO_EFFECT}
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # what it warns of is refused or read here
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(fields)
    except Exception as e:  # the classes raise types of their own, over several lines
        reason = " ".join(str(e).split())
        if isinstance(e, KeyError) and str(e.args[0]).isidentifier():
            named = (n for n in ("rope_parameters", "rope_scaling") if config.get(n) is not None)
            reason = f"{' and '.join(named)} lack {reason}"
        raise ValueError(
            f"config.json is not accepted by the {family.model_type} config of transformers: "
            f"{reason}."
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
        if _kind(family, option) != "not read":
            continue
        if hasattr(declared, option) or option in vars(defaults):
            # A field of the class that has its default value is what the class computes without it.
            neutral = value == getattr(defaults, option, None)
        else:
            neutral = _neutral(option, value)
            # Some configs name a window and say that they do not use it.
            neutral |= option == "sliding_window" and config.get("use_sliding_window") is False
            full = isinstance(value, list) and set(value) == {"full_attention"}
            neutral |= option == "layer_types" and full
        if not neutral:
            raise ValueError(
                f"{option} is {reprlib.repr(value)} in config.json, and a decoder with that option "
                f"is not supported; give a {family.model_type} model without it, or take the "
                "field out if it changes no logit."
            )


def _neutral(option: str, value: Any) -> bool:
    """Whether a field that no class declares changes nothing.

    What is off, and not known by its name, can be what a decoder has by default.
    """
    for names, allowed in _OPTIONS:
        if re.fullmatch(names, option):
            return any(
                value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in allowed
            )
    return value not in _OFF


def _check_outer(config: Mapping[str, Any], hf: Any) -> None:
    """Refuses fields beside a text_config that say something else of its decoder.

    Raises:
      ValueError: it names the field.
    """
    # `transformers` ties by the outer field, whose default is true.
    if config.get("tie_word_embeddings", True) != hf.tie_word_embeddings:
        raise ValueError(
            f"tie_word_embeddings is {config.get('tie_word_embeddings', True)} in config.json and "
            f"{hf.tie_word_embeddings} in its text_config; give one value."
        )
    for option, value in config.items():
        if _kind(FAMILIES[hf.model_type], option) == "not read" and not _neutral(option, value):
            raise ValueError(
                f"{option} is {reprlib.repr(value)} in config.json beside its text_config, and a "
                "decoder with that option is not supported; take the field out if it changes no "
                "logit."
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
    """Returns the decoder's config in a form that `transformers` 4 and 5 read alike.

    Version 5 saves rope_parameters alone, in which version 4 finds neither rope_theta nor
    partial_rotary_factor and takes its defaults without a word; a file of version 4 has no
    rope_parameters. The result has both forms.
    """
    family, text = family_of(config)
    out = dict(text) | {"architectures": [family.architecture], "model_type": family.model_type}
    options = _spelled_out(_complete(family, text).rope_parameters or {})
    full = options.get("full_attention", options)
    scaled = full.get("rope_type", "default") != "default"
    out["rope_parameters"] = options
    out["rope_theta"] = full.get("rope_theta")
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    out["rope_scaling"] = scaling if scaled else None
    if family.partial_rotary:
        out["partial_rotary_factor"] = full.get("partial_rotary_factor")
    if family.model_type == "phi3" and scaled:
        # Version 4 refuses any other field here, and the new name of `type`.
        lists = {key: full.get(key) for key in ("short_factor", "long_factor")}
        out["rope_scaling"] = {"type": "longrope"} | lists
        out["original_max_position_embeddings"] = full.get("original_max_position_embeddings")
    if family.model_type == "gemma3_text":
        out["rope_local_base_freq"] = options["sliding_attention"]["rope_theta"]
    # Weights are written dequantised, under names of their own, and without code beside them.
    for name in ("quantization_config", "transformers_weights", "auto_map", "_name_or_path"):
        out.pop(name, None)
    if family.model_type == "qwen3_moe":
        count = out.get("num_experts", out.get("num_local_experts"))
        out["num_experts"] = out["num_local_experts"] = count
    return {key: value for key, value in out.items() if value is not None or key in text}


def _spelled_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary options without `type`, the old name of rope_type, and with the bounds of yarn.

    vLLM has no default of the bounds for gpt-oss; these are those of `transformers`.
    """
    bounds = {"beta_fast": 32.0, "beta_slow": 1.0} if options.get("rope_type") == "yarn" else {}
    return {
        key: _spelled_out(value) if isinstance(value, Mapping) else value
        for key, value in sorted((bounds | dict(options)).items())
        if key != "type"
    }
