"""No field of a config.json is passed over: it is read, without effect, or refused by its name."""

import json

import pytest
from transformers import CONFIG_MAPPING

from deltapref_jax.models.config_json import _NO_EFFECT, fields_of, portable, spec_from_hf
from deltapref_jax.models.families import FAMILIES

BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def base(family):
    config = BASE | {"model_type": family}
    if family == "phi3":  # it has no head_dim
        config.pop("head_dim")
    if family in ("mistral", "phi3", "ministral", "gemma2", "gemma3_text", "olmo3"):
        config["sliding_window"] = 16
    return config


def others(value):
    """Values of the type of `value` that differ from it."""
    if isinstance(value, bool) or value is None:
        return [not value, 3, 0.5, "other"]
    if isinstance(value, int):
        return [value + 1, 2 * value + 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.25]
    if isinstance(value, str):
        return ["gelu", "relu"]
    if isinstance(value, list):
        return [value[:-1], value[::-1], []]
    if isinstance(value, dict):
        return [{"rope_type": "linear", "factor": 2.0}, {"rope_theta": 77.0}]
    return []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_declares_is_read_refused_or_without_effect(family):
    config = base(family)
    spec = spec_from_hf(config)
    declared = CONFIG_MAPPING[family].from_dict(dict(config)).to_dict()
    without_effect = {*_NO_EFFECT, *FAMILIES[family].unused}
    tried = 0
    for field, default in declared.items():
        now = config.get(field, default)
        for value in (value for value in others(now) if value != now):
            tried += 1
            try:
                changed = spec_from_hf(config | {field: value})
            except ValueError as e:
                # The sentence names the field, or the fields that it no longer agrees with.
                words = (
                    "layer_types",
                    "heads is",
                    "head_width",
                    "experts",
                    "rope",
                    "act",
                    "hidden size",
                )
                named = (field, *words)
                assert any(name in str(e) for name in named), (field, value, str(e))
                continue
            if changed == spec and field not in without_effect:
                # The rest: fields that say what the model's other fields say already.
                assert field in ALLOWED.get(family, ()), (field, value)
    assert tried > 30


ALLOWED = {
    # Read by what fills in layer_types or no_rope_layers, which need not change.
    "qwen2": ("max_window_layers", "sliding_window", "use_sliding_window"),
    "qwen3": ("max_window_layers", "sliding_window", "use_sliding_window"),
    "qwen3_moe": ("sliding_window", "mlp_only_layers"),
    "smollm3": ("sliding_window", "use_sliding_window", "no_rope_layer_interval"),
    "gemma3_text": ("sliding_window_pattern",),
    # Read with the factors of long sequences alone.
    "phi3": ("original_max_position_embeddings",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_of_another_decoder_is_refused_by_its_name(family):
    for field in ("clip_qkv", "residual_multiplier", "use_parallel_residual", "logits_scaling"):
        with pytest.raises(ValueError, match=rf"^{field} is "):
            spec_from_hf(base(family) | {field: 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_config_came_from_changes_nothing(family):
    """Version 4 saved the path of the model that it had read, as most files of the hub show."""
    assert spec_from_hf(base(family) | {"_name_or_path": "/a/b"}) == spec_from_hf(base(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_weights_are_refused_for_every_family(family):
    with pytest.raises(ValueError, match="quantised weights are not supported"):
        spec_from_hf(base(family) | {"quantization_config": {"quant_method": "awq"}})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_has_the_meaning_of_what_was_read(family):
    """Also after version 5 has saved it, and in the form of version 4."""
    config = base(family)
    spec = spec_from_hf(config)
    written = json.loads(json.dumps(portable(config)))
    assert spec_from_hf(written) == spec
    assert portable(written) == written
    saved = CONFIG_MAPPING[family].from_dict(dict(written)).to_dict()
    assert spec_from_hf({k: v for k, v in saved.items() if v is not None}) == spec
    version_4 = {k: v for k, v in written.items() if k != "rope_parameters"}
    assert spec_from_hf(version_4) == spec


def test_a_model_that_reads_images_gives_its_text():
    text = {k: v for k, v in base("gemma3_text").items() if k != "model_type"}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    assert spec_from_hf(whole) == spec_from_hf(base("gemma3_text"))


def test_a_mistral_with_kinds_of_layers_is_a_ministral():
    kinds = ["sliding_attention", "full_attention"] * 4
    spec = spec_from_hf(base("mistral") | {"layer_types": kinds})
    assert spec.family == "ministral"
    assert [layer.window for layer in spec.kinds] == [16, 0] * 4


def test_fields_are_named_by_what_became_of_them():
    fields = fields_of(base("llama") | {"attention_dropout": 0.1, "unsloth_version": "1"})
    assert fields["without effect"] == ["attention_dropout"]
    assert fields["not read"] == ["unsloth_version"]
    assert {"hidden_size", "head_dim"} <= set(fields["read"])


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        # The paper's student and the base of its s1 generators, as their hub files are.
        (
            {
                "model_type": "llama",
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
            },
            8_030_261_248,
        ),
        (
            {
                "model_type": "qwen2",
                "vocab_size": 152064,
                "hidden_size": 5120,
                "intermediate_size": 27648,
                "num_hidden_layers": 64,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0,
                "max_position_embeddings": 32768,
                "max_window_layers": 64,
                "sliding_window": 131072,
                "use_sliding_window": False,
            },
            32_763_876_352,
        ),
        (
            {
                "model_type": "qwen3_moe",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0,
                "max_position_embeddings": 40960,
                "router_aux_loss_coef": 0.001,
                "output_router_logits": False,
            },
            30_532_122_624,
        ),
    ],
    ids=["Llama-3.1-8B", "Qwen2.5-32B", "Qwen3-30B-A3B"],
)
def test_published_models_have_their_published_number_of_parameters(config, layers):
    assert spec_from_hf(config).parameters == layers
