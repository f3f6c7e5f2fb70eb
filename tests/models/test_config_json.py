"""No field of a config.json is passed over: it is read, without effect, or refused by its name."""

import json
import re
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING

from deltapref_jax.models.config_json import _OPTIONS, _kind, fields_of, portable, spec_from_hf
from deltapref_jax.models.families import FAMILIES
from tests.models.make_version4_configs import HERE, forms_of

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
    if family in ("mistral", "phi3", "ministral", "gemma2", "gemma3_text", "olmo3", "gpt_oss"):
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
            if changed == spec and _kind(FAMILIES[family], field) != "without effect":
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


@pytest.mark.parametrize("name", sorted(file.stem for file in (HERE / "version4").iterdir()))
def test_the_config_that_version_4_saves_has_the_meaning_of_version_5s(name):
    """`make_version4_configs` had 4.57 load and save the export of every fixture."""
    config = json.loads((HERE / "families" / name / "config.json").read_text())
    spec = spec_from_hf(config)
    version_4 = json.loads((HERE / "version4" / f"{name}.json").read_text())
    assert version_4["transformers_version"].startswith("4.57.")
    assert "rope_parameters" not in version_4
    assert spec_from_hf(version_4) == spec
    # What is exported of either has the meaning in the form of version 4, which reads that alone.
    for form in forms_of(config).values():
        assert spec_from_hf(form) == spec
        written = {k: v for k, v in portable(form).items() if k != "rope_parameters"}
        assert spec_from_hf(written) == spec
        for field in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
            if version_4.get(field) is not None:
                assert written[field] == version_4[field]


def test_version_4_finds_the_long_factors_of_an_export():
    """Its Phi-3 refuses a rope_scaling with other fields, or with rope_type in place of type."""
    config = json.loads((HERE / "families" / "phi3-longrope" / "config.json").read_text())
    for form in forms_of(config).values():
        written = portable(form)
        assert written["rope_scaling"] == {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.0, 2.5, 4.0],
        }
        assert written["partial_rotary_factor"] == 0.75
        assert written["original_max_position_embeddings"] == 32


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
    fields = fields_of(base("llama") | {"attention_dropout": 0.1, "maker": "A"})
    assert fields["without effect"] == ["attention_dropout"]
    assert fields["not read"] == ["maker"]
    assert {"hidden_size", "head_dim"} <= set(fields["read"])
    # Each family reads its own names alone.
    names = {"norm_eps": 1e-5, "rms_norm_eps": 1e-5, "hidden_act": "silu", "hidden_activation": "x"}
    read = {"nemotron": ["norm_eps", "hidden_act"], "gemma2": ["rms_norm_eps", "hidden_activation"]}
    for family, own in (read | {"llama": ["rms_norm_eps", "hidden_act"]}).items():
        assert names.keys() & set(fields_of(base(family) | names)["read"]) == set(own)


def test_fields_beside_the_text_of_a_model_with_images_are_named():
    outer = {"model_type": "gemma3", "text_config": base("gemma3_text"), "vision_config": {"a": 1}}
    outer |= {"mm_tokens_per_image": 256, "tie_word_embeddings": True, "maker": "A"}
    spec_from_hf(outer)
    fields = fields_of(outer)
    assert {"vision_config", "mm_tokens_per_image"} <= set(fields["without effect"])
    assert fields["not read"] == ["maker"] and "tie_word_embeddings" in fields["read"]
    with pytest.raises(ValueError, match="^tie_word_embeddings is False in .* True in its text"):
        spec_from_hf(outer | {"tie_word_embeddings": False})
    with pytest.raises(
        ValueError, match=r"^is_causal is False in config\.json beside its text_con"
    ):
        spec_from_hf(outer | {"is_causal": False})
    with pytest.raises(ValueError, match="^text_config is None in .*its decoder there"):
        spec_from_hf({"model_type": "gemma3"})


UNDECLARED = {
    # `transformers` reads these of any config, and no class of a family declares them.
    "is_causal": (False, None, 0),
    "transformers_weights": ("other.safetensors",),
    "per_layer_config": ({"0": {"intermediate_size": 8}}, {}),
    "kv_sharing_modes": (["all"], []),
    "quantization_config": ({},),
    # Off is not what Llama computes, or nothing here knows what it is.
    "residual_multiplier": (0,),
    "partial_rotary_factor": (0, 0.0, False),
    "num_key_value_heads": (0,),
    "head_dim": (0, -2),
    "use_rope": (False, None, 0, "", [], {}),
    "architectures": (["LlamaForSequenceClassification"], "LlamaForCausalLM"),
}
"""Fields with values that change a logit, or that `transformers` refuses."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_a_field_that_no_class_declares_is_refused_by_its_name(family):
    for field, values in UNDECLARED.items():
        for value in values:
            with pytest.raises(ValueError, match=field):
                spec_from_hf(base(family) | {field: value})
    inert = {"is_causal": True, "use_cache": False, "pruned_heads": {}, "attn_pdrop": 0.0}
    assert spec_from_hf(base(family) | inert) == spec_from_hf(base(family))


def test_every_option_that_transformers_reads_of_any_config_is_known():
    """Those of its masks, which need no declaration."""
    source = (Path(transformers.__file__).parent / "masking_utils.py").read_text()
    names = set(re.findall(r'getattr\(config, "(\w+)"', source))
    assert "is_causal" in names
    for name in names:
        assert any(re.fullmatch(option, name) for option, _ in _OPTIONS), name


@pytest.mark.parametrize("name", ["nemotron", "llama"])
def test_null_is_no_default_where_transformers_has_none(name):
    field = {"nemotron": "num_key_value_heads", "llama": "rope__factor"}[name]
    name = {"llama": "llama-linear"}.get(name, name)
    with pytest.raises(ValueError, match=field.removeprefix("rope__")):
        spec_from_hf(changed(name, **{field: None}))
    if name == "nemotron":
        with pytest.raises(ValueError, match="partial_rotary_factor is None"):
            spec_from_hf(changed(name, partial_rotary_factor=None))


def test_an_export_names_no_code_and_no_file_of_the_model_that_was_read():
    written = portable(base("llama") | {"auto_map": {"AutoModel": "a.A"}, "_name_or_path": "/a"})
    assert not {"auto_map", "_name_or_path"} & written.keys()
    assert spec_from_hf(written) == spec_from_hf(base("llama"))


PUBLISHED = {
    # The paper's student, its s1 generators and their bases, and a mixture of experts.
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": 8_030_261_248,
    "simplescaling/s1.1-3B": 3_085_938_688,
    "simplescaling/s1.1-7B": 7_615_616_512,
    "simplescaling/s1.1-14B": 14_770_033_664,
    "simplescaling/s1.1-32B": 32_763_876_352,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    # The students of the configs by size.
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
}
"""Parameters of models whose config.json lies in `published/` by the model's name."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
    config = json.loads((HERE / "published" / name / "config.json").read_text())
    assert spec_from_hf(config).parameters == PUBLISHED[name]


def test_every_published_config_is_counted():
    root = HERE / "published"
    found = {file.parent.relative_to(root).as_posix() for file in root.rglob("config.json")}
    assert found == PUBLISHED.keys()


GPT_OSS_20B = json.loads((HERE / "published/openai/gpt-oss-20b/config.json").read_text())


def test_gpt_oss_has_windows_in_every_second_layer_sinks_and_experts():
    spec = spec_from_hf(GPT_OSS_20B)
    assert [layer.window for layer in spec.kinds] == [128, 0] * 12
    assert spec.sinks and spec.experts == (32, 4, 2880, True, 1.702, 7.0)
    assert not fields_of(GPT_OSS_20B)["not read"]
    # Weights are written dequantised, so the config of an export names no quantisation.
    written = portable(GPT_OSS_20B)
    assert "quantization_config" not in written and spec_from_hf(written) == spec


def test_mxfp4_is_read_for_gpt_oss_alone():
    with pytest.raises(ValueError, match="quantised weights are not supported; give"):
        spec_from_hf(base("llama") | {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(ValueError, match="not supported but those of mxfp4; give"):
        spec_from_hf(base("gpt_oss") | {"quantization_config": {"quant_method": "fp8"}})


def changed(name, **fields):
    """The config of a fixture with some fields changed; those of rope_scaling by `rope_`."""
    config = json.loads((HERE / "families" / name / "config.json").read_text())
    rope = {key.removeprefix("rope__"): fields.pop(key) for key in [*fields] if "rope__" in key}
    for form in ("rope_parameters", "rope_scaling"):
        if rope and config.get(form):
            config[form] = config[form] | rope
    return config | fields


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_computes_with_hidden_activation_alone(name):
    spec = spec_from_hf(changed(name))
    for beside in ("silu", "gelu", "relu2"):
        assert spec_from_hf(changed(name, hidden_act=beside)) == spec
    assert spec_from_hf(changed(name, hidden_activation="silu")).activation == "silu"
    with pytest.raises(
        ValueError, match=r"^hidden_activation is 'gelu' in config\.json; supported"
    ):
        spec_from_hf(changed(name, hidden_activation="gelu"))


@pytest.mark.parametrize("name", ["llama-llama3", "llama-yarn", "gpt-oss"])
def test_two_lengths_of_pretraining_are_refused(name):
    """Version 5 of transformers takes the outer one, and version 4 the inner."""
    field = "original_max_position_embeddings"
    config = changed(name)
    inner = (config.get("rope_parameters") or config["rope_scaling"])[field]
    assert spec_from_hf(changed(name, **{field: inner})) == spec_from_hf(changed(name))
    with pytest.raises(ValueError, match=rf"^{field} is 7777 in config\.json and {inner} in its "):
        spec_from_hf(changed(name, **{field: 7777}))
    with pytest.raises(ValueError, match=rf"^{field} is 0 in config\.json; it must be a number"):
        spec_from_hf(changed(name, **{f"rope__{field}": 0}))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0 "),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1 "),
        ("gemma2", {"final_logit_softcapping": float("nan")}, "final_logit_softcapping is nan "),
        ("gemma2", {"attn_logit_softcapping": float("inf")}, "attn_logit_softcapping is inf "),
        ("llama-yarn", {"rope__rope_type": ["yarn"]}, "rope_type"),
        ("llama-linear", {"rope__factor": 1e-320}, "factor is 1e-320 "),
        ("llama-linear", {"rope__beta_fast": 0}, "rope_parameters.beta_fast is 0 "),
        ("llama-linear", {"rope__partial_rotary_factor": None}, "partial_rotary_factor is None "),
        ("llama-llama3", {"rope__low_freq_factor": 4.0}, "low_freq_factor is 4 "),
        ("llama-llama3", {"rope__low_freq_factor": 5.0}, "low_freq_factor is 5 "),
        (
            "phi3-longrope",
            {"original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1 ",
        ),
        (
            "phi3-longrope",
            {"original_max_position_embeddings": 0.5},
            "original_max_position_embeddings",
        ),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0 "),
        ("gemma3", {"layer_types": "full_attention"}, "layer_types"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters and rope_scaling lack 'full_attention'",
        ),
        ("llama-yarn", {"rope__rope_theta": 1.0, "rope_theta": 1.0}, "rope_theta is 1 "),
        ("gemma3", {"rope_scaling": 0}, "rope_scaling is 0 "),
        ("gpt-oss", {"quantization_config": 0}, "quantization_config is 0 "),
        ("qwen3-moe", {"moe_intermediate_size": -1}, "moe_intermediate_size is -1 "),
        ("qwen3-moe", {"num_local_experts": 10**27}, "num_local_experts is 1000"),
        ("mistral", {"sliding_window": 10**24}, "sliding_window"),
    ],
)
def test_a_value_that_nothing_can_be_computed_from_is_refused(name, fields, sentence):
    with pytest.raises(ValueError) as error:
        spec_from_hf(changed(name, **fields))
    assert sentence in str(error.value) and "\n" not in str(error.value)
