"""Opens a GGUF file: its config in Hugging Face's words, and its tensors, dequantised."""

import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.stored import Stored
from deltapref_jax.text.gguf_tokenizer import field, open_gguf


def open_gguf_model(path: Path) -> Stored:
    """Opens a GGUF file; tensors are dequantised as they are read.

    Raises:
      ValueError: the file is damaged or a part of a model, or describes a model that is not
        supported.
    """
    from gguf.quants import dequantize

    reader = open_gguf(str(path))
    kind = field(reader, "general.architecture")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def metadata(name: str, default: Any = None) -> Any:
        return field(reader, f"{kind}.{name}", default)

    _check_gguf(path, reader, str(kind))
    heads, width = metadata("attention.head_count"), metadata("embedding_length")
    epsilon = metadata("attention.layer_norm_rms_epsilon", 1e-5)
    # Llama 3's scaling of frequencies is a tensor in GGUF, other scalings are a name.
    scaling = "llama3" if "rope_freqs.weight" in tensors else metadata("rope.scaling.type", "none")
    config = {
        "model_type": kind,
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "num_hidden_layers": metadata("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata("attention.head_count_kv", heads),
        "head_dim": metadata("attention.key_length"),
        "intermediate_size": metadata("feed_forward_length"),
        "rope_theta": metadata("rope.freq_base", 1e4),
        # GGUF stores float32: the shortest decimal gives 1e-5 and not 9.99e-6.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": metadata("context_length"),
        "rope_parameters": {"rope_type": "default" if scaling == "none" else scaling},
    }
    spec = spec_from_hf(config)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in (("attn_q", spec.heads), ("attn_k", spec.kv_heads)):
            # llama.cpp interleaves the two halves of every head of a Llama; this inverts it.
            if part in name:
                pairs = array.reshape(count, -1, 2, array.shape[-1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array[index]

    # GGUF lists the axes of a tensor from the innermost to the outermost.
    shapes = {name: tuple(map(int, t.shape[::-1])) for name, t in tensors.items()}
    return Stored(spec, config, shapes, read, gguf=True)


_GGUF_FIELDS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "vocab_size",
    "tensor_data_layout",
)
"""Fields of a GGUF file's architecture that are read, or that change nothing."""


def _check_gguf(path: Path, reader: Any, kind: str) -> None:
    """Refuses a part of a model, and fields that change what a decoder computes.

    Raises:
      ValueError: it names the field.
    """
    parts = field(reader, "split.count", 0)
    if parts > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model (split.count); merge them with "
            "llama-gguf-split --merge."
        )
    if field(reader, "tokenizer.ggml.tokens") is None:
        raise ValueError(f"{path} has no tokenizer.ggml.tokens; give a whole model.")
    heads, width = (
        field(reader, f"{kind}.{name}") for name in ("attention.head_count", "embedding_length")
    )
    whole = field(reader, f"{kind}.attention.key_length")
    # Without the field a head is as wide as the model's width over its heads.
    if whole is None and isinstance(heads, int) and isinstance(width, int) and heads:
        whole = width // heads
    # Rotary embeddings of a part of a head, and values of another width, are not implemented.
    for name in ("rope.dimension_count", "attention.value_length"):
        value = field(reader, f"{kind}.{name}", whole)
        if value != whole:
            raise ValueError(
                f"{path} has the {kind}.{name} {value} and heads of {whole}; only equal ones are "
                "supported."
            )
    # A field that is not known is refused unless its value says that it does nothing: 0, or 1 for a
    # scale.
    for key in reader.fields:
        name = key.removeprefix(f"{kind}.")
        if name == key or name in _GGUF_FIELDS:
            continue
        value = field(reader, key)
        neutral = (True,) if name == "attention.causal" else (0, 1) if "scal" in name else (0,)
        if value not in neutral:
            raise ValueError(
                f"{path} has the {key} {reprlib.repr(value)}, and a decoder with that option is "
                "not supported; give a model without it."
            )
