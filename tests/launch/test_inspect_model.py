import json
import pathlib

import pytest

from deltapref_jax.config import ConfigError, MeshShape
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.parameters import weight_bytes
from launch.inspect_model import _active, describe, read_meshes, show


def test_a_model_is_described_without_its_weights(tiny_folder, tiny, capsys, monkeypatch):
    from absl import flags
    from rich.console import Console

    flags.FLAGS(["inspect", "--row_length=128", "--slots=4", "--length=64", "--model=x"])
    monkeypatch.setattr("deltapref_jax.models.stored.StoredParameter.__array__", None)
    model = describe(str(tiny_folder), read_meshes("fsdp=2,fsdp=3:tensor=2"))
    model = json.loads(json.dumps(model))
    assert model["parameters"] == tiny.spec.parameters
    assert model["layers_by_kind"] == {"full attention, rope 0": 2}
    assert model["matrices"]["q"] == [[32, 4, 8], ["fsdp", "tensor", None]]
    halves = model["meshes"]["fsdp=2"]
    assert halves["devices"] == 2
    assert halves["whole"] == {}
    assert "blocks.q" in model["meshes"]["fsdp=3:tensor=2"]["whole"]["fsdp"]
    show(Console(width=80), model)
    out = capsys.readouterr().out
    assert "LlamaForCausalLM (llama)" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_quantised_model_needs_fewer_bytes_in_decoding(tiny_folder, tiny):
    from absl import flags

    arguments = ["inspect", "--row_length=128", "--slots=4", "--length=64", "--model=x"]
    found = []
    for quantization in ("", "int8"):
        flags.FLAGS([*arguments, f"--quantization={quantization}"])
        found.append(describe(str(tiny_folder), read_meshes("fsdp=1,fsdp=2")))
    flags.FLAGS([*arguments, "--quantization="])
    for quantization, model in zip(("", "int8"), found, strict=True):
        spec = tiny.spec.quantised(quantization)
        assert model["quantization"] == quantization
        assert model["weight_bytes"] == weight_bytes(spec, "bfloat16")
    plain, int8 = found
    saved = plain["weight_bytes"] - int8["weight_bytes"]
    for mesh, devices in (("fsdp=1", 1), ("fsdp=2", 2)):
        plain_mesh, int8_mesh = plain["meshes"][mesh], int8["meshes"][mesh]
        assert plain_mesh["decoding"] - int8_mesh["decoding"] == saved / devices > 0
        assert plain_mesh["training"] == int8_mesh["training"]


PUBLISHED = {
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": (
        "LlamaForCausalLM (llama)",
        "8,030,261,248 parameters; vocabulary 128,256, width 4,096, 32 layers, 32 heads of 128, 8 "
        "for keys and values, MLP 14,336, untied embedding, at most 131,072 positions",
        "rope 0: base 500,000, frequencies scaled",
        "32 layers: full attention, rope 0",
        "adapters (LoRA) without named targets: q_proj, k_proj, v_proj, o_proj, gate_proj, "
        "up_proj, down_proj",
        "config.json, without effect: attention_dropout, bos_token_id",
    ),
    "Qwen/Qwen3-30B-A3B": (
        "30,532,122,624 parameters, 3,353,032,704 of them active in a token",
        "128 experts of 768 in place of the MLP, 8 of them for a token, untied embedding",
        "expert_gate  128 x 2,048 x 768  tensor, fsdp, -",
        "adapters (LoRA) without named targets: q_proj, k_proj, v_proj, o_proj ",
        "config.json, without effect: router_aux_loss_coef, output_router_logits",
    ),
    "../families/gemma3": (
        "Gemma3ForCausalLM (gemma3_text)",
        "7 layers: window 6, rope 1 ",
        "1 layer: full attention, rope 0 ",
        "config.json, read: vocab_size, hidden_size",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_said_of_a_model(name, capsys):
    """Two config.json files alone, and weights without a tokenizer."""
    from absl import flags
    from rich.console import Console

    flags.FLAGS(["inspect", "--model=x"])
    folder = pathlib.Path(__file__).parent.parent / "models" / "published" / name
    show(Console(width=100), describe(str(folder), read_meshes("fsdp=8,fsdp=4:tensor=2")))
    # Lines are joined, because the console has wrapped them.
    out = " ".join(line.strip() for line in capsys.readouterr().out.splitlines())
    for sentence in PUBLISHED[name]:
        assert sentence in out, sentence
    alone = "There are no weights beside config.json, so that no tensor was compared with it."
    assert (alone in out) == (name != "../families/gemma3")
    assert "fsdp=4:tensor=2  8" in out and "GiB per device by formula" in out


def test_the_active_parameters_of_gpt_oss_20b_are_those_of_its_report():
    """3.61 billion without the embedding (arXiv 2508.10925, table 1)."""
    fields = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}
    fields |= {"hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088}
    spec = spec_from_hf(fields)
    assert round((_active(spec) - spec.vocab * spec.width) / 1e9, 2) == 3.61


def test_meshes_are_read_from_a_flag():
    assert read_meshes("fsdp=4:tensor=2,data=2") == {
        "fsdp=4:tensor=2": MeshShape(fsdp=4, tensor=2),
        "data=2": MeshShape(data=2),
    }
    cases = (
        ("rows=4", "rows"),
        ("fsdp=x", "fsdp=x"),
        ("fsdp=0", "fsdp=0"),
        ("fsdp=4:fsdp=2", "fsdp twice in 'fsdp=4:fsdp=2'"),
        ("fsdp=8,fsdp=8", "'fsdp=8' twice"),
    )
    for text, word in cases:
        with pytest.raises(ConfigError, match=word):
            read_meshes(text)
