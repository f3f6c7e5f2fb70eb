"""Opens a GGUF file: its config in Hugging Face's words, and its tensors, dequantised.

llama.cpp's converter (convert_hf_to_gguf.py) writes such files. It renames fields and tensors,
leaves out what its own code knows of a family, and changes some weights: it interleaves the rows of
queries and keys of Llama, adds 1 to the norms of Gemma and Nemotron, and stacks experts. Here all
of that is undone, so `models.families` remains the only place that knows what a family computes.
"""

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.families import FAMILIES
from deltapref_jax.models.host_arrays import finite, not_finite
from deltapref_jax.models.stored import Stored
from deltapref_jax.text.gguf_file import GgufTensor, gguf_parts, open_gguf

TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "MXFP4",
)
"""Types of tensors that are read, by llama.cpp's names."""

_FAMILIES = {family.gguf: family for family in FAMILIES.values() if family.gguf}
"""Families by the name of their architecture in GGUF."""

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Fields that every architecture has, with their names in config.json."""

_COMMON = (
    *_SIZES,
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
    "tensor_data_layout",
)
"""Fields that are read for every architecture, or that change nothing."""

_WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"
_SWA_BASE = "rope.freq_base_swa"
_OWN: Mapping[str, Mapping[str, str]] = {
    "llama": {_WINDOW: "sliding_window"},
    "phi3": {
        _WINDOW: "sliding_window",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    "olmo2": {_WINDOW: "sliding_window", _PATTERN: "", _SWA_BASE: ""},
    "gemma2": {
        _WINDOW: "sliding_window",
        _PATTERN: "",
        "attention.scale": "",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {
        _WINDOW: "sliding_window",
        _PATTERN: "",
        _SWA_BASE: "",
        "attention.scale": "",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "qwen3moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_weights_norm": "norm_topk_prob",
    },
    "nemotron": {"attention.layer_norm_epsilon": "norm_eps"},
    "gpt-oss": {
        _WINDOW: "sliding_window",
        _PATTERN: "",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
}
"""Further fields of an architecture, with their names in config.json where they have one."""

_EPSILONS = {"nemotron": "layer_norm_epsilon"}
"""The field of an architecture's epsilon, where it is not layer_norm_rms_epsilon."""
_PERIODS = {"gemma2": 2, "gemma3": 6, "olmo2": 4, "gpt-oss": 2}
"""Every so many layers the last one has full attention, and the others a window."""
_WIDE_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose scores llama.cpp scales by (D / N)^-0.5 instead of H^-0.5."""
_INTERLEAVED = ("llama", "smollm3")
"""Architectures whose rotary embeddings pair neighbours in llama.cpp."""
_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_CHUNK = 2**22  # numbers
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
"""Values with which a field that is not read changes nothing; 0, or 1 for a scale, of others."""


def open_gguf_model(path: Path) -> Stored:
    """Opens a GGUF file, or all parts of a split one; tensors are dequantised as they are read.

    Raises:
      FileNotFoundError: a part is missing.
      ValueError: the file is damaged, or describes a model that is not supported.
    """
    fields, tensors = _open_parts(path)
    arch = str(fields.get("general.architecture"))
    if arch not in _FAMILIES:
        raise ValueError(
            f"{path} has the general.architecture {arch!r}; supported: {', '.join(_FAMILIES)}."
        )
    for name, tensor in tensors.items():
        if tensor.type.name not in TYPES:
            raise ValueError(
                f"Tensor {name} of {path} is stored as {tensor.type.name}; supported: "
                f"{', '.join(TYPES)}. Give the model in one of them."
            )
    if fields.get("tokenizer.ggml.tokens") is None:
        raise ValueError(f"{path} has no tokenizer.ggml.tokens; give a whole model.")
    _check_fields(path, fields, arch, tensors)

    def numbers(name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        array = _dequantised(tensors[name], index)
        if not finite(array):
            raise ValueError(not_finite(name, str(path)))
        return array

    config = _config(fields, arch, tensors)
    config["rope_parameters"] = _rope_parameters(fields, arch, config, tensors, numbers)
    spec = spec_from_hf(config)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        kind = name.split(".")[-2]
        heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}.get(kind)
        if arch in _INTERLEAVED and heads:
            return _halved(lambda rows: numbers(name, (rows, *index[1:])), index, spec.head_width)
        array = numbers(name, index)
        plus_one = spec.norm.endswith("plus_one") and name.endswith("norm.weight")
        return array - 1 if plus_one else array

    shapes = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if name not in (_FREQUENCIES, _LONG, _SHORT)
    }
    dtypes = dict.fromkeys(shapes, np.dtype(np.float32))
    return Stored(spec, config, shapes, dtypes, read, gguf=True)


def _dequantised(tensor: GgufTensor, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, float32: `_CHUNK` numbers at a time, for the steps between are as large.

    Of a row those blocks are read in which its part lies.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    axes = len(tensor.shape) - 1
    data, last = tensor.data[index[:axes]], slice(0, tensor.shape[-1])
    if len(index) > axes:
        last = slice(*index[axes].indices(tensor.shape[-1])[:2])
    block, size = GGML_QUANT_SIZES[tensor.type]
    first, end = last.start // block, -(-last.stop // block)
    data, width = data[..., first * size : end * size], (end - first) * block
    flat = data.reshape(-1, data.shape[-1])
    out = np.empty((len(flat), width), np.float32)
    step = max(1, _CHUNK // max(1, width))
    for row in range(0, len(flat), step):
        out[row : row + step] = dequantize(flat[row : row + step], tensor.type)
    cut = out[:, last.start - first * block : last.stop - first * block]
    return cut.reshape(*data.shape[:-1], last.stop - last.start)


def _halved(
    numbers: Callable[[slice], np.ndarray], index: tuple[slice, ...], width: int
) -> np.ndarray:
    """Rows of queries or keys with the two halves of every head, which the converter interleaves.

    Args:
      numbers: rows to their numbers, as they are stored.
      index: of the rows that are wanted, in their own order.
      width: rows of a head.
    """
    rows = index[0] if index else slice(None)
    start, stop = rows.start or 0, rows.stop
    whole = slice(start // width * width, None if stop is None else -(-stop // width) * width)
    array = numbers(whole)
    pairs = array.reshape(-1, width // 2, 2, *array.shape[1:])
    array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array[start - whole.start :][: None if stop is None else stop - start]


def _open_parts(path: Path) -> tuple[Mapping[str, Any], dict[str, GgufTensor]]:
    """Returns the metadata, which the first part has, and the tensors of all parts.

    Raises:
      FileNotFoundError: a part is missing.
      ValueError: a part is damaged or of another model, or the parts are not named as such.
    """
    parts = gguf_parts(str(path))
    files = [open_gguf(part) for part in parts]
    tensors: dict[str, GgufTensor] = {}
    for number, (part, file) in enumerate(zip(parts, files, strict=True)):
        count = file.fields.get("split.count", 0)
        if max(count, 1) != len(parts):
            raise ValueError(
                f"{part} is one of {count} parts of a model (split.count); name the parts "
                f"NAME-00001-of-{count:05d}.gguf and so on, or merge them with llama-gguf-split "
                "--merge."
            )
        own = file.fields.get("split.no", number)
        if own != number:
            raise ValueError(
                f"{part} is part {own + 1} by its split.no, and {number + 1} by its name; give the "
                "file the name that it had."
            )
        for name in file.tensors.keys() & tensors.keys():
            raise ValueError(
                f"Tensor {name} is in two parts of {path}; the parts are of different models: "
                "fetch them again."
            )
        tensors |= file.tensors
    wanted = files[0].fields.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ValueError(
            f"The {len(parts)} parts of {path} hold {len(tensors)} tensors, and their "
            f"split.tensors.count is {wanted}; fetch them again."
        )
    return files[0].fields, tensors


def _value(fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A metadata field; the shortest decimal of a float32, which is 1e-5 and not 9.99e-6."""
    value = fields.get(name, default)
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_width(fields: Mapping[str, Any], arch: str) -> int:
    """Width of a head: without a field it is the model's width over the number of heads."""
    width = fields[f"{arch}.embedding_length"] // fields[f"{arch}.attention.head_count"]
    return int(fields.get(f"{arch}.attention.key_length", width))


def _config(
    fields: Mapping[str, Any], arch: str, tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """The fields of a config.json, without those of rotary embeddings.

    What llama.cpp's code knows of an architecture, and its files leave out, is filled in.
    """

    def get(name: str, default: Any = None) -> Any:
        return _value(fields, f"{arch}.{name}", default)

    window = get(_WINDOW) or 0
    family = _FAMILIES[arch].model_type
    # Mistral is converted to llama, and OLMo 3 to olmo2.
    family = {"llama": "mistral", "olmo2": "olmo3"}.get(arch, family) if window else family
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "head_dim": _head_width(fields, arch),
    }
    named = {name: hf for name, hf in {**_SIZES, **_OWN.get(arch, {})}.items() if hf}
    config |= {hf: get(name) for name, hf in named.items() if get(name) is not None}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if arch in _PERIODS and (window or family != "olmo2"):
        # Without the field Gemma 2 has windows of 4096 tokens, and Gemma 3 has none.
        windows = window or arch == "gemma2"
        pattern = get(_PATTERN, _PERIODS[arch]) if windows else 1
        config["layer_types"] = _layer_types(pattern, config.get("num_hidden_layers", 0))
        config["sliding_window"] = window or 4096
    elif arch in _OWN and _WINDOW in _OWN[arch]:
        config["sliding_window"] = window or None
    reads = FAMILIES[family].reads
    for option, bias in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if option in reads:
            config[option] = f"blk.0.{bias}.bias" in tensors
    if arch == "qwen3moe":
        config.setdefault("norm_topk_prob", True)
    if arch in _WIDE_LAYERS:
        config["query_pre_attn_scalar"] = _scalar(get("attention.scale"), arch, config)
    return {name: value for name, value in config.items() if value is not None}


def _scalar(scale: float | None, arch: str, config: Mapping[str, Any]) -> int:
    """Gemma's query_pre_attn_scalar, the power -0.5 of which multiplies the scores.

    Raises:
      ValueError: it is no whole number.
    """
    if scale:
        scalar = scale**-2
        if abs(scalar - round(scalar)) > 1e-5 * scalar:
            raise ValueError(
                f"{arch}.attention.scale is {scale}; only the power -0.5 of a whole number is "
                f"supported for {arch}."
            )
        return round(scalar)
    if config.get("num_hidden_layers") == _WIDE_LAYERS[arch]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(pattern: Any, layers: int) -> list[str]:
    """Kinds of layers, from one flag per layer (true for a window) or from the period."""
    if isinstance(pattern, list):
        sliding = [bool(flag) for flag in pattern]
    else:
        sliding = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def _rope_parameters(
    fields: Mapping[str, Any],
    arch: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    numbers: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """The rotary embeddings in the words of config.json."""
    base = _value(fields, f"{arch}.rope.freq_base", 1e4)
    options = {"rope_type": "default", "rope_theta": base}
    if _FREQUENCIES in tensors or _LONG in tensors:
        options |= _divisors(fields, arch, config, tensors, numbers)
    else:
        options |= _scaling(fields, arch, config)
    whole = config["head_dim"]
    if FAMILIES[config["model_type"]].partial_rotary:
        rotated = fields.get(f"{arch}.rope.dimension_count", whole)
        options["partial_rotary_factor"] = _share(rotated, whole)
    options = {name: value for name, value in options.items() if value is not None}
    if config["model_type"] not in ("gemma3_text", "olmo3"):
        return options
    # Layers with a window are not scaled, and Gemma 3's have a base of their own.
    local = _value(fields, f"{arch}.{_SWA_BASE}", 1e4 if arch == "gemma3" else base)
    return {
        "full_attention": options,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _divisors(
    fields: Mapping[str, Any],
    arch: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    numbers: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """A scaling that the file holds as tensors: a divisor of every frequency.

    Llama 3's is one list, whatever it was made from. LongRoPE with the same list for short and long
    sequences says exactly that.
    """
    short, long = (_FREQUENCIES,) * 2 if _FREQUENCIES in tensors else (_SHORT, _LONG)
    original = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    return {
        "rope_type": "longrope",
        "short_factor": [float(str(value)) for value in numbers(short)],
        "long_factor": [float(str(value)) for value in numbers(long)],
        "attention_factor": _value(fields, f"{arch}.rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }


def _scaling(fields: Mapping[str, Any], arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling that the metadata describe; without a name a factor is linear."""

    def get(name: str) -> Any:
        return _value(fields, f"{arch}.rope.scaling.{name}")

    kind, factor = get("type"), get("factor")
    if kind == "yarn":
        original = get("original_context_length") or config.get("max_position_embeddings")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": get("yarn_attn_factor"),
            "beta_fast": get("yarn_beta_fast"),
            "beta_slow": get("yarn_beta_slow"),
            # No file says this of gpt-oss, whose config.json does.
            "truncate": False if arch == "gpt-oss" else None,
        }
    if kind in (None, "linear") and factor:
        return {"rope_type": "linear", "factor": factor}
    return {} if kind in (None, "linear", "none") else {"rope_type": kind}  # refused by its name


def _share(part: int, whole: int) -> float:
    """A factor f for which int(whole * f), the width that transformers rotates, is `part`."""
    share = part / whole
    return share if int(whole * share) == part else float(np.nextafter(share, 2))


def _check_fields(
    path: Path, fields: Mapping[str, Any], arch: str, tensors: Mapping[str, GgufTensor]
) -> None:
    """Refuses fields that change what a decoder computes and that nothing here reads.

    Raises:
      ValueError: it names the field.
    """
    if fields.get("general.type", "model") != "model":
        raise ValueError(
            f"{path} has the general.type {fields['general.type']!r}; give the file of a model."
        )
    sizes = (
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "context_length",
    )
    for name in sizes:
        value = fields.get(f"{arch}.{name}")
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{path} has the {arch}.{name} {reprlib.repr(value)}; it must be a whole number "
                "above 0: give a whole model."
            )
    epsilon = f"{arch}.attention.{_EPSILONS.get(arch, 'layer_norm_rms_epsilon')}"
    if epsilon not in fields:
        raise ValueError(f"{path} has no {epsilon}; give a whole model.")
    tokens = len(fields.get("tokenizer.ggml.tokens", []))
    if fields.get(f"{arch}.vocab_size", tokens) != tokens:
        raise ValueError(
            f"{path} has the {arch}.vocab_size {fields[f'{arch}.vocab_size']} and {tokens} tokens "
            "(tokenizer.ggml.tokens); fetch it again."
        )
    whole = _head_width(fields, arch)
    partial = _FAMILIES[arch].partial_rotary
    # Values of another width are not implemented, and rotary embeddings of a part of a head only
    # for some families.
    for name in ("rope.dimension_count", "attention.value_length"):
        value = fields.get(f"{arch}.{name}", whole)
        if value != whole and not (partial and name == "rope.dimension_count"):
            raise ValueError(
                f"{path} has the {arch}.{name} {value} and heads of {whole}; only equal ones are "
                "supported."
            )
    kind = fields.get(f"{arch}.rope.scaling.type")
    read = {*_COMMON, *_OWN.get(arch, {})}
    for tensor in (_FREQUENCIES, _LONG):
        if tensor in tensors and kind not in (None, "none", "longrope"):
            raise ValueError(
                f"{path} has the {arch}.rope.scaling.type {kind!r} and a tensor {tensor}; a model "
                "with both is not supported."
            )
    if kind == "longrope" or _LONG in tensors:
        read.add("rope.scaling.attn_factor")
        for tensor in (_LONG, _SHORT):
            if tensor not in tensors:
                raise ValueError(
                    f"{path} has no tensor {tensor}, which LongRoPE needs; fetch it again."
                )
    for key in fields:
        name = key.removeprefix(f"{arch}.")
        if name == key or name in read:
            continue
        value = fields.get(key)
        if value not in _NEUTRAL.get(name, (0, 1) if "scal" in name else (0,)):
            raise ValueError(
                f"{path} has the {key} {reprlib.repr(value)}, and a decoder with that option is "
                "not supported; give a model without it."
            )
