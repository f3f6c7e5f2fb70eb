"""NaN and infinity are found while a file of weights is hashed."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltapref_jax.models import content
from deltapref_jax.models.content import read_content
from deltapref_jax.models.folder import weights_hash
from tests.models.test_gguf_families import write

HERE = Path(__file__).parent / "families"
DTYPES = ("float32", "float16", "bfloat16", "float64")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(content, "_BLOCK_BYTES", 64)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 17, 99])
def test_every_number_of_every_block_is_checked(small_blocks, tmp_path, dtype, number, at):
    largest = min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(np.float32).max))
    tensors = {name: np.full(100, largest).astype(dtype) for name in "abc"}
    tensors |= {"empty": np.zeros((0, 3), dtype), "scalar": np.asarray(1, dtype)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert read_content(str(path)) == (sha256(path), ())
    tensors["b"][at] = number
    save_file(tensors, path)
    assert read_content(str(path)) == (sha256(path), ("b",))


def test_what_float32_cannot_hold_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.asarray([1e300])}, path)
    assert read_content(str(path)).not_finite == ("a",)


def test_scales_of_mxfp4_are_checked(tmp_path):
    tensors = load_file(HERE / "gpt-oss-mxfp4" / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert read_content(str(path)).not_finite == ()
    name = sorted(n for n in tensors if n.endswith("_scales"))[-1]
    tensors[name].reshape(-1)[-1] = 255
    save_file(tensors, path)
    assert read_content(str(path)).not_finite == (name,)


def test_tensors_that_nothing_reads_may_hold_anything(tmp_path, tiny_folder):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.full(4, np.inf, np.float32)
    save_file(tensors, path)
    assert weights_hash(str(tmp_path)) != weights_hash(str(tiny_folder))


@pytest.mark.parametrize("cut", [0, 5, 20, 2000])
def test_a_damaged_file_is_hashed(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    path.write_bytes((HERE / "llama" / "model.safetensors").read_bytes()[:cut])
    assert read_content(str(path)) == (sha256(path), ())
    path.write_bytes(b"\x08" + bytes(7) + b"[1, 2, 3" + bytes(10))
    assert read_content(str(path)) == (sha256(path), ())


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
)
def test_scales_of_gguf_are_checked(tmp_path, kind):
    from gguf import GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    of_kind = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[of_kind]
    data = np.zeros((3, 512 // block * size), np.uint8)
    found = []
    # Every pair of bytes of the last block in turn is made a NaN of float16.
    for at in range(0, size, 2):
        changed = data.copy()
        changed[-1, -size + at : -size + at + 2 if at + 2 < size else None] = 0xFF
        path = tmp_path / f"{at}.gguf"
        writer = GGUFWriter(str(path), "llama")
        writer.add_tensor("w", changed, raw_dtype=of_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with np.errstate(invalid="ignore"):
            bad = not np.isfinite(dequantize(changed, of_kind)).all()
        assert read_content(str(path)) == (sha256(path), ("w",) if bad else ())
        found.append(bad)
    assert any(found)


def test_a_gguf_model_is_refused_by_its_hash(tmp_path):
    tensor = "blk.1.attn_output.weight"
    array = load_file(HERE / "llama" / "model.safetensors")[
        "model.layers.1.self_attn.o_proj.weight"
    ].copy()
    array[-1, -1] = np.nan
    path = write("llama", tmp_path / "model.gguf", extra={tensor: array})
    with pytest.raises(ValueError) as error:
        weights_hash(str(path))
    assert str(error.value) == (
        f"Tensor {tensor} in {path} holds NaN or infinity; fetch it again, or choose another model."
    )
