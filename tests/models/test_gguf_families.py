"""Every family that llama.cpp has, from a GGUF file as its converter writes it.

The files are made of the checkpoints in `families/`, and the logits are those of torch.
"""

import json
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from deltapref_jax.models import gguf as gguf_model
from deltapref_jax.models.config_json import portable, spec_from_hf
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.gguf import TYPES, _check_fields, _config, _layer_types, open_gguf_model
from deltapref_jax.models.stored import open_folder
from deltapref_jax.models.weights import assemble, load
from deltapref_jax.text.gguf_file import open_gguf
from tests.models.family_checks import HERE, LOGITS, largest

ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt-oss-mxfp4": "gpt-oss",
    "llama": "llama",
    "llama-linear": "llama",
    "llama-llama3": "llama",
    "llama-tied-biases": "llama",
    "llama-yarn": "llama",
    "mistral": "llama",
    "nemotron": "nemotron",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "phi3-longrope": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-moe": "qwen3moe",
    "qwen3-moe-unnormalized": "qwen3moe",
    "smollm3": "smollm3",
}
"""By fixture; the others have windows, layers without rotary embeddings or constants of experts
that no file can say."""
SCALED = ("llama-linear", "llama-llama3", "llama-yarn", "phi3-longrope", "olmo3", "gemma3")


def converted(name, array, arch, heads, kv_heads):
    """A tensor of a folder as llama.cpp's converter changes it."""
    if arch in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
        count = heads if ".q_proj." in name else kv_heads
        halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if arch in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return array + 1
    return array


def tensors_of(folder, arch, hf):
    """The tensors by their GGUF names, which the gguf package knows."""
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), hf.layers
    )
    found, experts = {}, {}
    opened = open_folder(folder)
    for name, shape in opened.shapes.items():
        array = np.asarray(opened.read(name, tuple(slice(0, n) for n in shape)), np.float32)
        if hf.tied and name == "lm_head.weight":
            continue
        if arch == "gpt-oss" and (".experts." in name or name.endswith(".sinks")):
            found |= of_gpt_oss(name, array, names)
            continue
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            number, matrix, _ = rest.split(".")
            experts.setdefault(f"{layer}.experts.{matrix}.weight", {})[int(number)] = array
            continue
        base, suffix = name.rsplit(".", 1)
        new = f"{names.get_name(base)}.{suffix}"
        found[new] = converted(name, array, arch, hf.heads, hf.kv_heads)
    for name, arrays in experts.items():
        stacked = np.stack([arrays[e] for e in range(len(arrays))])
        found[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = stacked
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def of_gpt_oss(name, array, names):
    """Sinks, or gates, ups and downs apart and as [experts, out, in], of a tensor of gpt-oss."""
    base, _, kind = name.rpartition(".")
    suffix = "bias" if kind.endswith("_bias") else "weight"
    parts = {kind.removesuffix("_bias"): array}
    if kind.startswith("gate_up"):
        parts = {"gate_proj": array[..., ::2], "up_proj": array[..., 1::2]}
    return {
        f"{names.get_name(f'{base}.{part}')}.{suffix}": x.swapaxes(1, 2) if x.ndim == 3 else x
        for part, x in parts.items()
    }


def rope_of(w, name, config, arch, head):
    """Metadata and tensors of rotary embeddings."""
    scaling = config.get("rope_scaling") or {}
    kind, extra = scaling.get("rope_type", scaling.get("type")), {}
    w.add_rope_freq_base(config.get("rope_theta", DEFAULT_BASES.get(name, 1e4)))
    rotated = int(head * config.get("partial_rotary_factor", 0.5 if arch == "nemotron" else 1))
    w.add_rope_dimension_count(rotated)
    if arch == "gemma3":
        w.add_rope_freq_base_swa(1e4)
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling["factor"])
        w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "llama3":
        base = config["rope_theta"] ** (-np.arange(0, head, 2) / head)
        original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        divisors = []
        for wave in 2 * math.pi / base:
            smooth = (original / wave - low) / (high - low)
            between = 1 / ((1 - smooth) / factor + smooth)
            divisors.append(
                1.0 if wave < original / high else factor if wave > original / low else between
            )
        extra["rope_freqs.weight"] = np.asarray(divisors, np.float32)
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("long", "short"):
            factors = np.asarray(scaling[f"{name}_factor"], np.float32)
            extra[f"rope_factors_{name}.weight"] = factors
    if arch == "phi3":
        w.add_rope_scaling_orig_ctx_len(config.get("original_max_position_embeddings", 64))
    return extra


DEFAULT_BASES = {"gemma3": 1e6, "smollm3": 2e6, "olmo3": 5e5}


def write(name, path, store=None, fields=None, extra=None, **split):
    """Writes a fixture as llama.cpp's converter does; `store` maps an array to data and a type."""
    folder, arch = HERE / name, ARCHITECTURES[name]
    hf = open_folder(folder).spec
    config = json.loads((folder / "config.json").read_text())
    w = gguf.GGUFWriter(path, arch, **split)
    w.add_block_count(hf.layers)
    w.add_context_length(hf.max_positions)
    w.add_embedding_length(hf.width)
    w.add_feed_forward_length(hf.mlp)
    w.add_head_count(hf.heads)
    w.add_head_count_kv(hf.kv_heads)
    w.add_layer_norm_rms_eps(hf.norm_eps)
    if "head_dim" in config:
        w.add_key_length(hf.head_width)
        w.add_value_length(hf.head_width)
    windows = [layer.window for layer in hf.kinds]
    if arch in ("gemma2", "gemma3", "phi3", "gpt-oss") or name in ("mistral", "olmo3"):
        w.add_sliding_window(max(windows))
    if name == "olmo3":
        w.add_sliding_window_pattern([window > 0 for window in windows])
    if arch == "gemma2":
        w.add_attention_scale(hf.query_scale)
        w.add_attn_logit_softcapping(hf.attention_cap)
        w.add_final_logit_softcapping(hf.logit_cap)
    if arch == "nemotron":
        w.add_layer_norm_eps(hf.norm_eps)
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if hf.experts:
        w.add_expert_count(hf.experts.total)
        w.add_expert_used_count(hf.experts.active)
        w.add_expert_feed_forward_length(hf.experts.mlp)
        if not hf.experts.normalized:
            w.add_expert_weights_norm(False)
    tensors = tensors_of(folder, arch, hf) | rope_of(w, name, config, arch, hf.head_width)
    vocabulary(w, hf.vocab)
    for key, value in (fields or {}).items():
        (w.add_uint32 if isinstance(value, int) else w.add_float32)(key, value)
    for tensor, array in (tensors | (extra or {})).items():
        data, qtype = store(array) if store else (array, None)
        w.add_tensor(tensor, data, raw_dtype=qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def vocabulary(w, size):
    """A SentencePiece vocabulary of single characters."""
    w.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(size - 3))]
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * size)
    w.add_token_types([2, 3, 3, *[1] * (size - 3)])


def logits_of(stored, tokens):
    graphdef, state = assemble(stored, "file.gguf")
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state)))
    positions = jnp.arange(len(tokens))[None]
    hidden = model.hidden(tokens[None], positions, jnp.ones_like(positions))
    logits = jnp.einsum("bld,vd->blv", hidden, model.unembedding())[0]
    cap = model.spec.logit_cap
    return np.asarray(cap * jnp.tanh(logits / cap) if cap else logits)


def logits_difference(name, stored):
    """The largest difference of two sequences' logits from those of torch."""
    expected = load_file(HERE / name / "expected.safetensors")
    return largest(
        [logits_of(stored, expected[f"tokens_{i}"]) for i in (0, 2)],
        [expected[f"logits_{i}"] for i in (0, 2)],
    )


def packed(array):
    """Matrices of experts in MXFP4, which has the numbers of the folder exactly."""
    kind = gguf.GGMLQuantizationType.MXFP4
    return (quantize(array, kind), kind) if array.ndim == 3 else (array, None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name, tmp_path):
    stored = open_gguf_model(write(name, tmp_path / "m.gguf", packed if "mxfp4" in name else None))
    folder = open_folder(HERE / name)
    if name not in (*SCALED, "gemma2"):
        assert stored.spec == folder.spec
    assert logits_difference(name, stored) <= LOGITS
    ours, theirs = (assemble(opened, "m")[1] for opened in (stored, folder))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=1e-6),
        nnx.to_pure_dict(ours),
        nnx.to_pure_dict(theirs),
    )


@pytest.mark.parametrize("name", [name for name in TYPES if name != "F32"])
def test_every_type_is_dequantised(name, tmp_path):
    """All rows of a matrix have the numbers that the gguf package gives for their blocks."""
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    w = gguf.GGUFWriter(path, "llama")
    vocabulary(w, 67)
    data = rng.integers(0, 256, (3, 2 * size), np.uint8)
    w.add_tensor("x", data, raw_dtype=kind)
    w.add_tensor("y", np.arange(5, dtype=np.float32))
    for finish in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(w, finish)()
    w.close()
    file, theirs = open_gguf(str(path)), gguf.GGUFReader(path)
    for ours, other in zip(file.tensors.values(), theirs.tensors, strict=True):
        assert ours.shape == tuple(other.shape[::-1])
        np.testing.assert_array_equal(
            dequantize(ours.data, ours.type), dequantize(other.data, other.tensor_type)
        )
    for key, value in file.fields.items():
        np.testing.assert_equal(value, theirs.get_field(key).contents())


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_has_the_logits_of_the_rounded_weights(kind, tmp_path):
    """A mixture of experts, whose tensors have three axes."""
    qtype = gguf.GGMLQuantizationType[kind]

    def store(array):
        return (quantize(array, qtype), qtype) if array.ndim > 1 else (array, None)

    def rounded(array):
        return dequantize(*store(array)) if array.ndim > 1 else array

    tokens = load_file(HERE / "qwen3-moe" / "expected.safetensors")["tokens_0"]
    stored = open_gguf_model(write("qwen3-moe", tmp_path / "a.gguf", store))
    expected = open_gguf_model(
        write("qwen3-moe", tmp_path / "b.gguf", lambda a: (rounded(a), None))
    )
    np.testing.assert_array_equal(logits_of(stored, tokens), logits_of(expected, tokens))


@pytest.mark.parametrize("name", ["llama-tied-biases", "qwen3-moe", "gemma3", "phi3"])
def test_a_part_of_a_tensor_is_that_part_of_the_whole(name, tmp_path, monkeypatch):
    """Devices ask for their rows and columns alone, and rows are dequantised a few at a time."""
    monkeypatch.setattr(gguf_model, "_CHUNK", 100)
    stored = open_gguf_model(write(name, tmp_path / "m.gguf"))
    for tensor, shape in stored.shapes.items():
        whole = stored.read(tensor, ())
        assert whole.shape == shape
        for index in ((slice(1, 3),), (slice(2, 5), slice(3, 8))[: len(shape)]):
            np.testing.assert_array_equal(stored.read(tensor, index), whole[index])


def test_a_type_that_is_not_read_is_refused_by_its_name(tmp_path):
    def store(array):
        if array.shape == (2, 256):
            return np.zeros((2, 8 * 40), np.uint8), gguf.GGMLQuantizationType.Q8_1
        return array, None

    path = write("llama", tmp_path / "m.gguf", store, extra={"x": np.ones((2, 256), np.float32)})
    with pytest.raises(ValueError) as error:
        open_gguf_model(path)
    assert str(error.value) == (
        f"Tensor x of {path} is stored as Q8_1; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, "
        "Q5_1, Q4_K, Q5_K, Q6_K, MXFP4. Give the model in one of them."
    )


@pytest.fixture
def parts(tmp_path):
    """The parts of a split file, as `llama-gguf-split` names them."""
    write("llama", tmp_path / "m.gguf", split_max_tensors=9)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert [p.name for p in found] == [f"m-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]
    return found


def test_all_parts_of_a_split_file_are_read(parts, tmp_path):
    whole = write("llama", tmp_path / "whole.gguf")
    tokens = load_file(HERE / "llama" / "expected.safetensors")["tokens_0"]
    for given in (parts[0], parts[2]):
        model = load(str(given))
        assert model.spec == load(str(whole)).spec
        np.testing.assert_array_equal(
            logits_of(open_gguf_model(given), tokens), logits_of(open_gguf_model(whole), tokens)
        )
    assert weights_hash(str(parts[0])) == weights_hash(str(parts[3])) != weights_hash(str(whole))
    before = weights_hash(str(parts[0]))
    data = bytearray(parts[3].read_bytes())
    data[-1] ^= 1
    parts[3].write_bytes(data)
    assert weights_hash(str(parts[0])) != before


def test_a_missing_part_is_named(parts):
    parts[2].unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(str(parts[0]))
    assert str(error.value) == (
        f"There is no {parts[2]}, a part of the model of {parts[0]}; give all 4 parts."
    )


def test_parts_in_another_order_are_refused(parts):
    first, second = (part.read_bytes() for part in parts[1:3])
    parts[1].write_bytes(second)
    parts[2].write_bytes(first)
    with pytest.raises(ValueError, match=r"is part 3 by its split.no, and 2 by its name"):
        load(str(parts[0]))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("qwen2", {"qwen2.attention.sliding_window": 5}, "qwen2.attention.sliding_window 5"),
        ("gemma3", {"gemma3.attn_logit_softcapping": 5.0}, "gemma3.attn_logit_softcapping 5.0"),
        ("qwen3-moe", {"qwen3moe.expert_weights_scale": 2.5}, "qwen3moe.expert_weights_scale 2.5"),
        ("qwen3-moe", {"qwen3moe.expert_gating_func": 2}, "qwen3moe.expert_gating_func 2"),
        ("phi3", {"phi3.rope.scaling.attn_factor": 1.5}, "phi3.rope.scaling.attn_factor 1.5"),
        ("llama-yarn", {"llama.rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor 0.0"),
        ("llama-yarn", {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier 0.1"),
    ],
)
def test_a_field_that_nothing_reads_is_refused_by_its_name(name, fields, sentence, tmp_path):
    path = write(name, tmp_path / "m.gguf", fields=fields)
    with pytest.raises(ValueError, match="with that option is not supported") as error:
        open_gguf_model(path)
    assert sentence in str(error.value)


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (1.5, "1.5")])
def test_a_size_that_is_none_is_refused(value, shown, tmp_path):
    """Files of other converters may lack a field, or have one number per layer."""
    path = write("llama", tmp_path / "m.gguf")
    fields = open_gguf(str(path)).fields | {"llama.block_count": value}
    with pytest.raises(ValueError) as error:
        _check_fields(path, fields, "llama", {})
    assert str(error.value) == (
        f"{path} has the llama.block_count {shown}; it must be a whole number above 0: give a "
        "whole model."
    )


def test_divisors_of_frequencies_are_exact(tmp_path):
    """Llama 3's scaling becomes the very factors of the file, in words that transformers reads."""
    path = write("llama-llama3", tmp_path / "m.gguf")
    divisors = open_gguf(str(path)).tensors["rope_freqs.weight"].data.view(np.float32)
    stored = open_gguf_model(path)
    (rope,) = stored.spec.ropes
    np.testing.assert_allclose(rope.factors, 1 / divisors.astype(np.float64), rtol=1e-7)
    assert (rope.long_factors, rope.scale) == ((), 1.0)
    (again,) = spec_from_hf(portable(stored.config)).ropes
    assert again == rope


@pytest.mark.parametrize(("layers", "scalar"), [(46, 6), (8, 8)])
def test_gemma_2_27b_scales_scores_by_its_width(layers, scalar):
    """llama.cpp knows it by its 46 layers; D is 24, and there are 4 heads of 8."""
    fields = {"tokenizer.ggml.tokens": [""] * 67}
    sizes = {"block_count": layers, "embedding_length": 24, "attention.head_count": 4}
    fields |= {f"gemma2.{name}": value for name, value in sizes.items()}
    fields["gemma2.attention.key_length"] = 8
    assert _config(fields, "gemma2", {})["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("pattern", "want"),
    [(3, "ssfssf"), (1, "ffffff"), (0, "ssssss"), ([True, False] * 3, "sfsfsf")],
)
def test_patterns_of_windows(pattern, want):
    assert "".join(kind[0] for kind in _layer_types(pattern, 6)) == want
