import dataclasses

import jax
import pytest

from deltapref_jax.models.spec import ModelSpec, spec_from_hf, spec_to_hf
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
        {"head_width": 32, "heads": 6, "kv_heads": 3},
        {"rope_theta": 5e5, "norm_eps": 1e-6, "max_positions": 9},
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
    assert spec_from_hf(SMALL | {"rope_theta": 5e5}).rope_theta == 5e5
    assert (
        spec_from_hf(
            SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        ).rope_theta
        == 1e6
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba' in config.json; supported: llama."),
        (
            {"attention_bias": True},
            "attention_bias is true in config.json; a llama decoder with biases is not supported.",
        ),
        (
            {"mlp_bias": True},
            "mlp_bias is true in config.json; a llama decoder with biases is not supported.",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in config.json; only 'silu' is supported."),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            "rope_type is 'llama3' in config.json; only 'default' is supported.",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_type is 'linear' in config.json; only 'default' is supported.",
        ),
        ({"num_key_value_heads": 3}, "heads is 4; it must be a multiple of kv_heads, 3."),
        ({"head_dim": 7}, "head_width is 7; rotary embeddings need an even number."),
        (
            {"hidden_size": None, "vocab_size": None},
            "config.json has no vocab_size, hidden_size; give the config of a whole llama model.",
        ),
    ],
)
def test_what_is_not_supported_is_one_sentence(changes, sentence):
    config = {k: v for k, v in (SMALL | changes).items() if v is not None}
    with pytest.raises(ValueError) as error:
        spec_from_hf(config)
    assert str(error.value) == sentence
