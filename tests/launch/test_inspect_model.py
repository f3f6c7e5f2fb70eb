import json

import pytest

from deltapref_jax.config import ConfigError, MeshShape
from launch.inspect_model import describe, read_meshes, show


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


def test_meshes_are_read_from_a_flag():
    assert read_meshes("fsdp=4:tensor=2,data=2") == {
        "fsdp=4:tensor=2": MeshShape(fsdp=4, tensor=2),
        "data=2": MeshShape(data=2),
    }
    for text, word in (("rows=4", "rows"), ("fsdp=x", "fsdp=x"), ("fsdp=0", "fsdp=0")):
        with pytest.raises(ConfigError, match=word):
            read_meshes(text)
