import copy
import dataclasses
import re

import jax
import pytest

from deltapref_jax.models.config_json import spec_from_hf, spec_to_hf
from deltapref_jax.models.families import FAMILIES
from deltapref_jax.models.spec import ModelSpec, Rope
from deltapref_jax.models.weights import abstract

SMALL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False},
        {"head_width": 32, "heads": 8, "kv_heads": 2},
        {"ropes": (Rope(5e5),), "norm_eps": 1e-6, "max_positions": 9},
    ],
)
def test_what_is_written_is_read_back(changes):
    spec = dataclasses.replace(ModelSpec(100, 64, 2, 4, 2, 16, 96), **changes)
    assert spec_from_hf(spec_to_hf(spec)) == spec
    assert spec.parameters == sum(leaf.size for leaf in jax.tree.leaves(abstract(spec)[1]))


def test_defaults_are_those_of_transformers():
    from transformers import LlamaConfig

    theirs = LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"}).to_dict()
    assert spec_from_hf(SMALL) == spec_from_hf(theirs)


def test_rope_is_read_from_the_old_field_and_the_new_one():
    assert spec_from_hf(SMALL | {"rope_theta": 5e5}).ropes == (Rope(5e5),)
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert spec_from_hf(SMALL | new).ropes == (Rope(1e6),)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_scaling": {"rope_theta": 3e4}, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_scaling": {}, "rope_theta": 7},
    ],
)
def test_rope_options_are_read_as_transformers_reads_them(rope):
    from transformers import LlamaConfig

    theirs = LlamaConfig.from_dict(copy.deepcopy(SMALL | rope)).rope_parameters
    assert theirs["rope_type"] == "default"
    assert spec_from_hf(SMALL | rope).ropes == (Rope(theirs["rope_theta"]),)


def test_options_that_change_nothing_are_accepted():
    inert = {
        "attention_bias": False,
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
        "final_logit_softcapping": None,
        "logits_scaling": 1.0,
        "num_local_experts": 0,
        "rope_interleaved": False,
        "partial_rotary_factor": 1.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "transformers.js_config": {"dtype": "q4"},
    }
    assert spec_from_hf(SMALL | inert) == spec_from_hf(SMALL)
    unused = {"sliding_window": 64, "use_sliding_window": False}
    assert spec_from_hf(SMALL | unused) == spec_from_hf(SMALL)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sliding_window", 64),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scalar", 256),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("scale_depth", 1.4),
        ("use_qk_norm", True),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
        ("no_rope_layers", [1, 0]),
        ("is_encoder_decoder", True),
        ("position_embedding_type", "alibi"),
    ],
)
def test_an_option_of_another_decoder_is_named(option, value):
    with pytest.raises(ValueError) as error:
        spec_from_hf(SMALL | {option: value})
    assert str(error.value) == (
        f"{option} is {value!r} in config.json, and a decoder with that option is not supported; "
        "give a llama model without it, or take the field out if it changes no logit."
    )


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5 in config.json, and a decoder with that option is not "
            "supported; give a llama model without it, or take the field out if it changes no "
            "logit.",
        ),
        (
            {"rope_interleaved": True},
            "rope_interleaved is True in config.json, and a decoder with that option is not "
            "supported; give a llama model without it, or take the field out if it changes no "
            "logit.",
        ),
        (
            {"rotary_pct": 0.25},
            "rotary_pct is 0.25 in config.json, and a decoder with that option is not supported; "
            "give a llama model without it, or take the field out if it changes no logit.",
        ),
        (
            {"rope_scaling": {"factor": 8.0}},
            "rope_parameters.factor is 8.0 in config.json, and rotary embeddings of the kind "
            "'default' with it are not supported.",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5}}},
            "rope_parameters.full_attention is {'rope_theta': 5} in config.json; a llama model has "
            "one kind of rotary embeddings.",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic' in config.json; supported: 'default', 'linear', 'llama3', "
            "'yarn', 'longrope'.",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
            "factor is '8' in config.json; it must be a number above 0 that float32 holds.",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "short_factor is [1.0] in config.json; it must be a list of 8 numbers, one per pair of "
            "rotated dimensions.",
        ),
    ],
)
def test_a_rope_option_that_is_not_supported_is_named(rope, sentence):
    with pytest.raises(ValueError) as error:
        spec_from_hf(SMALL | rope)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rope_scaling": "linear"},
            "rope_scaling is 'linear' in config.json; it must be a JSON object.",
        ),
        (
            {"rope_parameters": {"rope_theta": "1e4"}},
            "rope_theta is '1e4' in config.json; it must be a number above 0 that float32 holds.",
        ),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings is 'false' in config.json; it must be true or false.",
        ),
        (
            {"qkv_bias": True},
            "qkv_bias is True in config.json, and a decoder with that option is not supported; "
            "give a llama model without it, or take the field out if it changes no logit.",
        ),
        (
            {"hidden_size": 66},
            "hidden_size is 66 and num_attention_heads 4 in config.json; without a head_dim the "
            "first must be a multiple of the second.",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "config.json has a quantization_config, and quantised weights are not supported; give "
            "the model in float32, bfloat16 or float16 (dequantise it with the tool that made it).",
        ),
        (
            {"model_type": "mamba"},
            f"model_type is 'mamba' in config.json; supported: {', '.join(FAMILIES)}, gemma3.",
        ),
        (
            {"hidden_act": "gelu"},
            "hidden_act is 'gelu' in config.json; supported: 'silu', 'swish', 'gelu_pytorch_tanh', "
            "'gelu_new', 'relu2'.",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            'config.json is not accepted by the llama config of transformers: "Missing required '
            "keys in `rope_parameters` for 'rope_type'='llama3': {keys}\".",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4 in config.json; it must be a multiple of "
            "num_key_value_heads, 3.",
        ),
        ({"head_dim": 7}, "head_dim is 7 in config.json; rotary embeddings need an even number."),
        (
            {"hidden_size": None, "num_hidden_layers": None},
            "config.json has no hidden_size, num_hidden_layers; give the config of a whole llama "
            "model.",
        ),
    ],
)
def test_what_is_not_supported_is_one_sentence(changes, sentence):
    config = {k: v for k, v in (SMALL | changes).items() if v is not None}
    with pytest.raises(ValueError) as error:
        spec_from_hf(config)
    # The order of a set in a message of transformers is no promise.
    said = re.sub(r"\{'[a-z_', ]+'\}", "{keys}", str(error.value))
    assert said == sentence
