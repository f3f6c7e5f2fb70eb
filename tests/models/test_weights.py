"""Folders are exported and loaded without change; damaged ones are refused with one sentence."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deltapref_jax.models import export as exporting
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import resolve, weights_hash
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import inspect_model, load

TOKENS = 3, 14, 15, 92, 65, 35


def spec(text, **changes):
    return ModelSpec(
        **{
            "vocab": len(text.tokenizer),
            "width": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_width": 8,
            "mlp": 48,
            "tied": False,
            "max_positions": 64,
        }
        | changes
    )


def write(text, folder, seed=0, dtype="float32", **changes):
    """Exports a random decoder to `folder` and returns its state."""
    s = spec(text, **changes)
    state = jax.tree.map(lambda x: x * 5, nnx.state(Decoder(s, rngs=nnx.Rngs(seed))))
    export(state, s, text, folder, dtype)
    return state


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(a), nnx.to_pure_dict(b))


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def reference_hidden(folder, tokens):
    """A Llama in float64 NumPy, in the layout of `transformers`, without this project's code."""
    config, w = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    w = {name: array.astype(np.float64) for name, array in w.items()}
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    T = len(tokens)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[name]

    angle = np.outer(np.arange(T), config["rope_theta"] ** (-np.arange(0, H, 2) / H))
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def turn(x):
        return x * cos + np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][list(tokens)]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = ((h @ w[f"{p}self_attn.{c}_proj.weight"].T).reshape(T, -1, H) for c in "qkv")
        q, k, v = turn(q), np.repeat(turn(k), N // K, 1), np.repeat(v, N // K, 1)
        scores = np.einsum("tnh,snh->nts", q, k) / H**0.5 + np.triu(np.full((T, T), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v).reshape(
            T, -1
        )
        x = x + attended @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = (
            x
            + (gate / (1 + np.exp(-gate)) * (h @ w[p + "mlp.up_proj.weight"].T))
            @ w[p + "mlp.down_proj.weight"].T
        )
    return norm(x, "model.norm.weight")


def test_hidden_states_are_those_of_the_reference(text, tmp_path):
    write(text, tmp_path, head_width=16)  # heads * head width is not width
    model = load(str(tmp_path))
    tokens = jnp.asarray(TOKENS)[None]
    hidden = nnx.merge(model.graphdef, model.state).hidden(
        tokens, jnp.arange(6)[None], jnp.ones_like(tokens)
    )[0]
    np.testing.assert_allclose(hidden, reference_hidden(tmp_path, TOKENS), atol=2e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_is_read_back(text, tmp_path, tied, dtype):
    state = write(text, tmp_path, dtype=dtype, tied=tied)
    model = load(str(tmp_path))
    assert model.spec == spec(text, tied=tied)
    equal(model.state, jax.tree.map(lambda x: x.astype(dtype).astype("float32"), state))
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    assert model.text.prompt_ids([{"role": "user", "content": "1 + 2"}]) == text.prompt_ids(
        [{"role": "user", "content": "1 + 2"}]
    )
    if dtype == "bfloat16":
        assert {a.dtype for a in load_file(tmp_path / "model.safetensors").values()} == {
            np.dtype(ml_dtypes.bfloat16)
        }
        kept = load(str(tmp_path), dtype, params=dtype)
        norms = {"blocks.attention_norm", "blocks.mlp_norm", "final_norm"}
        for path, x in nnx.to_flat_state(kept.state):
            assert x[...].dtype == (jnp.float32 if ".".join(path) in norms else dtype), path
        export(kept.state, kept.spec, kept.text, tmp_path / "again", dtype)
        equal(load(str(tmp_path / "again")).state, model.state)


def test_big_models_are_written_in_shards_with_an_index(text, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 20_000)
    state = write(text, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    held = {}
    for file in files:
        with safe_open(tmp_path / file, "numpy") as handle:
            held |= dict.fromkeys(handle.keys(), file)
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(state))
    equal(load(str(tmp_path)).state, state)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(str(tmp_path))
    assert str(error.value) == (
        f"The folder {tmp_path} has no {files[1]}, which model.safetensors.index.json names; "
        "give a complete Hugging Face folder."
    )


def test_transposed_tensors_are_not_taken_for_right_ones(folder, tiny):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ascontiguousarray(
            tensors["model.layers.1.mlp.up_proj.weight"].T
        )

    edit(folder, change)
    with pytest.raises(ValueError) as error:
        load(str(folder))
    assert str(error.value) == (
        f"Tensor model.layers.1.mlp.up_proj.weight of {folder} has the shape (32, 64); its "
        "config.json calls for (64, 32)."
    )


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        (
            "model.layers.0.self_attn.o_proj.weight",
            np.zeros((32, 24), np.float32),
            "Tensor model.layers.0.self_attn.o_proj.weight of {} has the shape (32, 24); its "
            "config.json calls for (32, 32).",
        ),
        (
            "model.norm.weight",
            np.zeros(31, np.float32),
            "Tensor model.norm.weight of {} has the shape (31,); its config.json calls for (32,).",
        ),
        (
            "model.layers.1.input_layernorm.weight",
            None,
            "{} has no tensor 'model.layers.1.input_layernorm.weight'; its config.json does not "
            "describe its weights.",
        ),
        (
            "lm_head.weight",
            None,
            "{} has no tensor 'lm_head.weight'; its config.json does not describe its weights.",
        ),
        (
            "model.layers.0.self_attn.q_proj.bias",
            np.zeros(32, np.float32),
            "{} holds 1 tensors that its config.json does not call for, such as "
            "'model.layers.0.self_attn.q_proj.bias'.",
        ),
        (
            "model.layers.2.mlp.up_proj.weight",
            np.zeros((64, 32), np.float32),
            "{} holds 1 tensors that its config.json does not call for, such as "
            "'model.layers.2.mlp.up_proj.weight'.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, name, array, sentence):
    edit(
        folder,
        lambda tensors: tensors.pop(name) if array is None else tensors.update({name: array}),
    )
    with pytest.raises(ValueError) as error:
        load(str(folder))
    assert str(error.value) == sentence.format(folder)


def test_a_tied_model_may_store_its_head_too(text, tmp_path):
    state = write(text, tmp_path, tied=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    equal(load(str(tmp_path)).state, state)


def test_a_folder_in_the_place_of_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ValueError) as error:
        load(str(folder))
    assert str(error.value) == (
        f"The model in {folder} cannot be read (model.safetensors is a folder and no file); fetch "
        "it again."
    )


def test_a_config_that_is_refused_names_the_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ValueError) as error:
        load(str(folder))
    assert str(error.value).startswith(
        f"The model {folder} cannot be used: model_type is 'mamba' in config.json; supported: "
    )


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_cut_file_is_one_sentence(folder, file):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ValueError, match=rf"^The model in {folder} cannot be read \(.*\); fetch it again\.$"
    ):
        load(str(folder))


@pytest.mark.parametrize(
    ("lost", "error", "sentence"),
    [
        (
            "config.json",
            FileNotFoundError,
            "The folder {} has no config.json; give a complete Hugging Face folder.",
        ),
        (
            "model.safetensors",
            FileNotFoundError,
            "The folder {} has no safetensors; give a complete Hugging Face folder.",
        ),
        (
            "tokenizer*",
            ValueError,
            "The folder {} has no tokenizer.json; copy the model's tokenizer files there.",
        ),
    ],
)
def test_what_a_folder_lacks_is_named(folder, lost, error, sentence):
    for file in folder.glob(lost):
        file.unlink()
    with pytest.raises(error) as raised:
        load(str(folder))
    assert str(raised.value) == sentence.format(folder)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "/nowhere",
            "There is no model at /nowhere; give a Hugging Face folder, a hub name or a .gguf "
            "file.",
        ),
        (
            "a/b.gguf",
            "There is no model at a/b.gguf; give a Hugging Face folder, a hub name or a .gguf "
            "file.",
        ),
        (
            "someone/nothing",
            "Nothing of the hub's model 'someone/nothing' is in this machine's cache, and "
            "HF_HUB_OFFLINE is set; unset it to fetch it, or give a folder or file that exists.",
        ),
    ],
)
def test_a_missing_model_is_named(path, sentence):
    with pytest.raises(FileNotFoundError) as error:
        resolve(path)
    assert str(error.value) == sentence


def test_the_hash_is_of_the_content_and_not_of_the_path(folder, tiny_folder, tmp_path):
    assert (found := weights_hash(str(folder))) == weights_hash(str(tiny_folder))
    assert len(found) == 16
    (tmp_path / "link").symlink_to(folder)
    (folder / "README.md").write_text("unrelated")
    assert weights_hash(str(tmp_path / "link")) == found


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_the_hash_changes_with_every_file_that_counts(folder, file):
    before = weights_hash(str(folder))
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    assert weights_hash(str(folder)) != before


def test_an_edit_that_keeps_size_and_name_is_noticed_in_one_process(folder):
    before = weights_hash(str(folder))
    edit(folder, lambda t: t["model.norm.weight"].__setitem__(0, 2.0))
    assert weights_hash(str(folder)) != before


def split(folder, parts=2, indexed=True):
    """Moves the tensors of a folder to `parts` files, which an index names; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[i::parts]
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    if indexed:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(set(where.values()))


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("stray", ["model-00001-of-00009.safetensors", "a.safetensors"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "another.weight"])
def test_files_beside_the_model_are_left_aside(folder, tiny, indexed, stray, tensor):
    if indexed:
        split(folder)
    before = weights_hash(str(folder))
    save_file({tensor: np.zeros(32, np.float32)}, folder / stray)
    model = load(str(folder))
    equal(model.state, tiny.state)
    assert weights_hash(str(folder)) == before


def test_files_without_an_index_are_read_unless_they_collide(folder, tiny):
    first, _ = split(folder, indexed=False)
    equal(load(str(folder)).state, tiny.state)
    shutil.copy(folder / first, folder / "again.safetensors")
    with pytest.raises(ValueError) as error:
        inspect_model(str(folder))
    assert re.fullmatch(
        rf"Tensor \S+ of {folder} is in again.safetensors and in {first}; leave one of the two "
        r"files, or give the folder an index that names its shards\.",
        str(error.value),
    )


def test_an_index_names_no_file_elsewhere(folder):
    split(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": "../other/model.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map names something that is no file beside it"):
        load(str(folder))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(ml_dtypes.float8_e4m3fn, "F8_E4M3"), (ml_dtypes.float8_e5m2, "F8_E5M2"), (np.int8, "I8")],
)
@pytest.mark.parametrize("use", [inspect_model, load])
def test_quantised_tensors_are_refused(folder, dtype, name, use):
    tensor = "model.layers.0.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({tensor: tensors[tensor].astype(dtype)}))
    with pytest.raises(ValueError) as error:
        use(str(folder))
    assert str(error.value) == (
        f"Tensor {tensor} of {folder} is stored as {name}, and quantised weights are not "
        "supported; give the model in float32, bfloat16 or float16."
    )


def test_a_quantised_model_is_refused_by_its_config(folder):
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(
        ValueError, match=r"^The model \S+ cannot be used: config\.json has a quant"
    ):
        inspect_model(str(folder))


def test_end_tokens_are_exported_and_hashed(folder, tmp_path):
    before = weights_hash(str(folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9, 7]}')
    model = load(str(folder))
    assert {5, 9, 7} <= set(model.text.end_ids)
    assert weights_hash(str(folder)) != before
    export(model.state, model.spec, model.text, tmp_path / "out")
    for name in ("generation_config.json", "config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        assert ids == list(model.text.end_ids)
    assert load(str(tmp_path / "out")).text.end_ids == model.text.end_ids
