"""Damaged weights of every family are refused with one sentence that names the tensor or the file.

What a header shows is refused when the folder is opened; a number that is not finite when its part
is read, before it is on a device.
"""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, place
from deltapref_jax.models import export as exporting
from deltapref_jax.models.export import write_folder
from deltapref_jax.models.gguf import open_gguf_model
from deltapref_jax.models.sharding import shardings
from deltapref_jax.models.stored import check_tensors, open_folder
from deltapref_jax.models.weights import assemble
from tests.models.test_gguf_families import ARCHITECTURES, write

HERE = Path(__file__).parent / "families"
CASES = sorted(folder.name for folder in HERE.iterdir())


@pytest.fixture(params=CASES)
def folder(request, tmp_path):
    """A copy of a fixture."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(HERE / request.param / name, tmp_path)
    return tmp_path


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(use):
    with pytest.raises(ValueError) as error:
        use()
    sentence = str(error.value)
    assert sentence.count("\n") == 0
    assert sentence.endswith(".")
    return sentence


def opened(folder):
    return check_tensors(open_folder(folder), str(folder))


def last_matrix(tensors):
    """A matrix of the last layer, which is read late."""
    return sorted(name for name, array in tensors.items() if "layers." in name and array.ndim > 1)[
        -1
    ]


@pytest.fixture
def sharded(folder, monkeypatch):
    """The fixture as several files and their index."""
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 20_000)
    stored = open_folder(folder)
    _, state = assemble(stored, str(folder))
    write_folder(state, stored.spec, folder / "cut", "float32", stored.config)
    assert (folder / "cut" / "model.safetensors.index.json").exists()
    return folder / "cut"


def test_a_cut_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    data = file.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 20, 5, 0):
        file.write_bytes(data[:size])
        sentence = refusal(lambda: opened(sharded))
        assert sentence.startswith(f"The model in {sharded} cannot be read ({file.name}: ")
    file.write_bytes(data + b"x")
    assert file.name in refusal(lambda: opened(sharded))


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int32, "I32"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.uint8, "U8")]
)
def test_a_tensor_of_another_dtype_is_named(folder, dtype, name):
    tensor = last_matrix(load_file(folder / "model.safetensors"))
    edit(folder, lambda tensors: tensors.update({tensor: tensors[tensor].astype(dtype)}))
    sentence = refusal(lambda: opened(folder))
    assert sentence.startswith(f"Tensor {tensor} of {folder} is stored as {name}, ")


def test_a_shard_that_the_index_leaves_out_is_missed_by_its_tensors(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = sorted(set(index["weight_map"].values()))[-1]
    names = {name for name, file in index["weight_map"].items() if file == lost}
    for name in names:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    sentence = refusal(lambda: opened(sharded))
    assert any(sentence.startswith(f"{sharded} has no tensor {name!r}; ") for name in names)


def test_a_tensor_too_many_is_named(folder):
    name = "model.layers.0.self_attn.extra.weight"
    edit(folder, lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)}))
    assert repr(name) in refusal(lambda: opened(folder))


def test_a_tensor_of_another_shape_is_named(folder):
    for name, array in load_file(folder / "model.safetensors").items():
        if name == "lm_head.weight" and open_folder(folder).spec.tied:
            continue
        cut = np.ascontiguousarray(array[:-1])
        edit(folder, lambda tensors, name=name, cut=cut: tensors.update({name: cut}))
        sentence = refusal(lambda: opened(folder))
        if name.endswith(("_blocks", "_scales")):  # MXFP4 names both tensors of a matrix
            assert f"{name} " in sentence
            assert str(cut.shape) in sentence
        else:
            assert sentence.startswith(f"Tensor {name} of {folder} has the shape {cut.shape}; ")
        edit(folder, lambda tensors, name=name, array=array: tensors.update({name: array}))


def placed(stored, path):
    _, state = assemble(stored, str(path), params=None)
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2, context=2))
    return place(state, shardings(state, mesh))


# `test_content.py` has every number in every dtype.
@pytest.mark.parametrize(
    ("dtype", "number"), [("float32", np.nan), ("bfloat16", -np.nan), ("float16", -np.inf)]
)
def test_a_number_that_is_not_finite_is_named(folder, dtype, number):
    tensor = last_matrix(load_file(folder / "model.safetensors"))

    def change(tensors):
        for name in tensors:
            if tensors[name].dtype != np.uint8:  # MXFP4
                tensors[name] = tensors[name].astype(dtype)
        tensors[tensor][-1, -1] = number

    edit(folder, change)
    assert refusal(lambda: placed(open_folder(folder), folder)) == (
        f"Tensor {tensor} in model.safetensors of {folder} holds NaN or infinity; fetch it again, "
        "or choose another model."
    )


@pytest.mark.parametrize("folder", ["llama", "qwen3-moe", "gpt-oss"], indirect=True)
def test_finite_numbers_of_any_size_are_read(folder):
    """The largest and smallest numbers of a dtype have bits that are nearly those of infinity."""
    tensor = last_matrix(load_file(folder / "model.safetensors"))
    largest = float(ml_dtypes.finfo(load_file(folder / "model.safetensors")[tensor].dtype).max)

    def change(tensors):
        tensors[tensor][-1, :2] = largest, -largest

    edit(folder, change)
    leaves = jax.tree.leaves(placed(open_folder(folder), folder))
    assert max(float(abs(leaf).max()) for leaf in leaves) == largest


def test_numbers_beyond_float32_are_named(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(HERE / "llama" / name, tmp_path)
    tensor = last_matrix(load_file(tmp_path / "model.safetensors"))

    def change(tensors):
        tensors[tensor] = tensors[tensor].astype(np.float64) * factor

    factor = 1.0
    edit(tmp_path, change)
    placed(open_folder(tmp_path), tmp_path)
    factor = 1e300
    edit(tmp_path, change)
    assert refusal(lambda: placed(open_folder(tmp_path), tmp_path)).startswith(
        f"Tensor {tensor} in model.safetensors of {tmp_path} holds NaN or infinity; "
    )


@pytest.mark.parametrize("name", ["llama-tied-biases", "gemma2", "gemma3", "phi3-longrope"])
def test_a_tied_model_with_another_output_projection_is_refused(name, tmp_path):
    """Version 5 of `transformers` would compute with it, and version 4 with the embedding."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(HERE / name / file, tmp_path)
    assert open_folder(tmp_path).spec.tied
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assemble(open_folder(tmp_path), str(tmp_path))
    other = embedding.copy()
    other[-1, -1] += 1
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    assert refusal(lambda: assemble(open_folder(tmp_path), str(tmp_path))) == (
        f"Tensor lm_head.weight of {tmp_path} differs from model.embed_tokens.weight, and "
        "config.json says that they are one (tie_word_embeddings); set it to false, or leave the "
        "tensor out."
    )


@pytest.mark.parametrize("end", ["_blocks", "_scales"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_mxfp4_in_another_dtype_is_named(end, dtype, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(HERE / "gpt-oss-mxfp4" / file, tmp_path)
    tensor = f"model.layers.0.mlp.experts.down_proj{end}"
    edit(tmp_path, lambda tensors: tensors.update({tensor: tensors[tensor].astype(dtype)}))
    assert refusal(lambda: opened(tmp_path)).startswith(f"Tensor {tensor} of {tmp_path} is stored ")


def test_plain_experts_beside_mxfp4_are_named(tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(HERE / "gpt-oss-mxfp4" / file, tmp_path)
    tensor = "model.layers.0.mlp.experts.down_proj"
    edit(tmp_path, lambda tensors: tensors.update({tensor: np.zeros((4, 32, 32), np.float32)}))
    assert refusal(lambda: opened(tmp_path)).startswith(
        f"{tmp_path} has a tensor {tensor} beside {tensor}_blocks, "
    )


TENSOR = "blk.1.attn_output.weight"


@pytest.fixture(params=sorted(name for name in ARCHITECTURES if "mxfp4" not in name))
def gguf_file(request, tmp_path):
    """A function that writes a fixture as a GGUF file, with a change of `TENSOR`."""

    def make(change=lambda array: array):
        tensors = load_file(HERE / request.param / "model.safetensors")
        array = change(tensors["model.layers.1.self_attn.o_proj.weight"].copy())
        return write(request.param, tmp_path / "model.gguf", extra={TENSOR: array})

    return make


def test_a_cut_gguf_file_is_named(gguf_file):
    path = gguf_file()
    data = path.read_bytes()
    for size in (len(data) - 1000, len(data) // 2, 20, 0):
        path.write_bytes(data[:size])
        assert str(path) in refusal(lambda: open_gguf_model(path))


def test_numbers_of_gguf_that_are_not_finite_are_named(gguf_file):
    def change(array):
        array[-1, -1] = np.inf
        return array

    path = gguf_file(change)
    assert refusal(lambda: placed(open_gguf_model(path), path)) == (
        f"Tensor {TENSOR} in {path} holds NaN or infinity; fetch it again, or choose another model."
    )


def test_a_gguf_tensor_of_another_shape_is_named(gguf_file):
    path = gguf_file(lambda array: array[:-1])
    sentence = refusal(lambda: check_tensors(open_gguf_model(path), str(path)))
    assert sentence.startswith(f"Tensor {TENSOR} of {path} has the shape ")
