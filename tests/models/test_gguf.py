"""A GGUF file loads like the folder that it was made from: weights, spec, tokenizer, template."""

import json
import shutil

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast

from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.gguf import _check_fields
from deltapref_jax.models.spec import ModelSpec, Rope
from deltapref_jax.models.weights import load
from deltapref_jax.synthetic.tokenizer import TEMPLATE
from deltapref_jax.text import gguf_file, gguf_tokenizer
from deltapref_jax.text.template import ChatTokenizer

CORPUS = [
    "user\nWhat is 12 + 30?\nassistant\n12 + 30 = 42\n",
    "It's a café; we're naïve, they've 3.14!\n\n  x\ty",
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q8 = gguf.GGMLQuantizationType.Q8_0
YARN = gguf.RopeScalingType.YARN


def renamed(name):
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        *NAMES.items(),
    ):
        name = name.replace(ours, theirs)
    return name


def permuted(array, heads):
    """Interleaves the halves of every head, as llama.cpp's converter does to q and k of a Llama."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def write_gguf(folder, path, pre="smollm", quantised=True, **changes):
    """Writes the folder as a GGUF file, with matrices in Q8_0 and norms in float32."""
    config, tensors = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, changes.get("arch", "llama"))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    if changes.get("merges", True):
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for key, value in changes.get("fields", {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    if changes.get("template", TEMPLATE):
        writer.add_chat_template(TEMPLATE)
    for name, array in (tensors | changes.get("tensors", {})).items():
        for part, heads in (
            ("q_proj", config["num_attention_heads"]),
            ("k_proj", config["num_key_value_heads"]),
        ):
            array = permuted(array, heads) if part in name else array
        if array.ndim > 1 and quantised:
            writer.add_tensor(renamed(name), quantize(array, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(renamed(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose matrices Q8_0 represents exactly."""
    path = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        gguf_tokenizer.PRE_TOKENIZERS["smollm"],
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=gguf_tokenizer.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    text = ChatTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=SPECIAL[0],
            pad_token=SPECIAL[0],
            additional_special_tokens=SPECIAL[1:],
            chat_template=TEMPLATE,
        ),
        "test",
    )
    spec = ModelSpec(
        len(text.tokenizer), 64, 2, 4, 2, 16, 96, ropes=(Rope(1e5),), tied=False, max_positions=128
    )
    export(
        jax.tree.map(lambda x: 5 * x, nnx.state(Decoder(spec, rngs=nnx.Rngs(1)))), spec, text, path
    )
    tensors = load_file(path / "model.safetensors")
    save_file(
        {name: dequantize(quantize(a, Q8), Q8) if a.ndim > 1 else a for name, a in tensors.items()},
        path / "model.safetensors",
    )
    return path


@pytest.mark.parametrize("quantised", [True, False])
def test_a_gguf_file_is_the_folder(folder, tmp_path, quantised):
    ours = load(write_gguf(folder, tmp_path / "m.gguf", quantised=quantised))
    theirs = load(str(folder))
    assert ours.spec == theirs.spec
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(ours.state), nnx.to_pure_dict(theirs.state)
    )
    assert ours.text.end_ids == theirs.text.end_ids
    assert [ours.text.tokenizer.decode([i]) for i in ours.text.end_ids] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+30?"}]
    assert ours.text.render(chat) == theirs.text.render(chat)
    for words in (
        *CORPUS[:2],
        "1234 5 67",
        " leading",
        "日本 🙂\u200d e\u0301",
        "<|im_end|>\n<|im_start|>x",
        "",
        "\n\n \n",
    ):
        assert ours.text.completion_ids(words, True) == theirs.text.completion_ids(words, True), (
            words
        )
        assert ours.text.decode(ours.text.completion_ids(words, True)) == words.replace(
            "<|im_end|>", ""
        ).replace("<|im_start|>", "")
    assert ours.text.prompt_ids(chat) == theirs.text.prompt_ids(chat)


def test_a_gguf_file_without_output_is_tied(folder, tmp_path):
    lean = shutil.copytree(folder, tmp_path / "lean")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, lean / "model.safetensors")
    model = load(write_gguf(lean, tmp_path / "m.gguf"))
    assert model.spec.tied
    assert "head" not in nnx.to_pure_dict(model.state)


def test_fields_that_change_nothing_are_accepted(folder, tmp_path):
    fields = {"llama.rope.dimension_count": 16, "llama.expert_count": 0, "split.count": 1}
    fields |= {"llama.logit_scale": 1.0, "llama.vocab_size": 302}
    assert load(write_gguf(folder, tmp_path / "m.gguf", fields=fields)).spec == (
        load(str(folder)).spec
    )


def test_the_hash_of_a_file_is_of_its_content(folder, tmp_path):
    a, b = (write_gguf(folder, tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert weights_hash(a) == weights_hash(b)
    assert weights_hash(a) != weights_hash(write_gguf(folder, tmp_path / "c.gguf", quantised=False))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"pre": "whale"},
            "{} names the pre-tokenizer 'whale' (tokenizer.ggml.pre); known: gpt-2, "
            "smollm, llama-bpe, qwen2, dbrx, gpt-4o, tekken.",
        ),
        (
            {"model": "bert"},
            "{} holds a 'bert' tokenizer; only byte-level BPE ('gpt2') and SentencePiece ('llama') "
            "are supported: convert the model to a Hugging Face folder.",
        ),
        (
            {"model": "llama"},
            "{} has no tokenizer.ggml.scores, without which its tokenizer cannot be rebuilt; "
            "convert the model again, or give a Hugging Face folder.",
        ),
        (
            {"arch": "mamba"},
            "{} has the general.architecture 'mamba'; supported: llama, smollm3, qwen2, qwen3, "
            "qwen3moe, gemma2, gemma3, olmo2, phi3, nemotron, gpt-oss.",
        ),
        (
            {"scaling": gguf.RopeScalingType.LONGROPE},
            "{} has no tensor rope_factors_long.weight, which LongRoPE needs; fetch it again.",
        ),
        (
            {"merges": False},
            "{} has no tokenizer.ggml.merges, without which its tokenizer cannot be rebuilt; "
            "convert the model again, or give a Hugging Face folder.",
        ),
        (
            {"fields": {"split.count": 3}},
            "{} is one of 3 parts of a model (split.count); name the parts "
            "NAME-00001-of-00003.gguf and so on, or merge them with llama-gguf-split --merge.",
        ),
        (
            {"fields": {"llama.rope.dimension_count": 8}},
            "{} has the llama.rope.dimension_count 8 and heads of 16; only equal ones are "
            "supported.",
        ),
        (
            {"fields": {"llama.expert_count": 8}},
            "{} has the llama.expert_count 8, and a decoder with that option is not supported; "
            "give a model without it.",
        ),
        (
            {"fields": {"llama.logit_scale": 0.5}},
            "{} has the llama.logit_scale 0.5, and a decoder with that option is not supported; "
            "give a model without it.",
        ),
        (
            {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}, "scaling": YARN},
            "{} has the llama.rope.scaling.type 'yarn' and a tensor rope_freqs.weight; a model "
            "with both is not supported.",
        ),
        (
            {"fields": {"llama.attention.scale": 1.0}},
            "{} has the llama.attention.scale 1.0, and a decoder with that option is not "
            "supported; give a model without it.",
        ),
        (
            {"fields": {"llama.rope.scaling.attn_factor": 1.5}},
            "{} has the llama.rope.scaling.attn_factor 1.5, and a decoder with that option is not "
            "supported; give a model without it.",
        ),
    ],
)
def test_what_is_not_supported_is_one_sentence(folder, tmp_path, changes, sentence):
    path = write_gguf(folder, tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == sentence.format(path)


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.99])
def test_a_cut_file_is_one_sentence(folder, tmp_path, keep):
    path = tmp_path / "m.gguf"
    write_gguf(folder, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(
        ValueError, match=rf"^{path} is not a readable GGUF file \(.*\); fetch it again\.$"
    ):
        load(str(path))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"split.count": "two"}, "split.count is 'two'"),
        ({"split.no": "a"}, "split.no is 'a'"),
        ({"general.alignment": 0}, "general.alignment is 0"),
        ({"llama.attention.key_length": "abc"}, "key_length is 'abc'"),
        ({"llama.context_length": 1.5}, "context_length is 1.5"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon is 'x'"),
        ({"llama.rope.scaling.type": 3}, "rope.scaling.type is 3"),
        ({"tokenizer.ggml.tokens": 5}, "tokens is 5"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1, 1]}, "2 entries for 1"),
        ({"tokenizer.ggml.scores": [1.0, "a"]}, "scores is"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 10**6}, "1000000, and it"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1"),
    ],
)
def test_metadata_of_another_type_are_named(fields, words):
    """`open_gguf` puts the name of the file in front of the sentence."""
    with pytest.raises(ValueError) as error:
        gguf_file._check_types(fields)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00003-of-00002.gguf"])
def test_the_number_of_a_part_is_checked(name):
    with pytest.raises(ValueError, match="by its name"):
        gguf_file.gguf_parts(name)


def test_what_llama_cpp_needs_is_not_made_up(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "m.gguf")
    fields = gguf_file.open_gguf(path).fields
    for change, words in (
        ({"general.type": "adapter"}, "general.type 'adapter'"),
        ({"llama.vocab_size": 3}, "llama.vocab_size 3 and 302 tokens"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "no llama.attention.layer_norm_rms_eps"),
        ({"llama.context_length": None}, "llama.context_length None"),
    ):
        changed = {k: v for k, v in ({**fields} | change).items() if v is not None}
        with pytest.raises(ValueError, match=words):
            _check_fields(tmp_path, changed, "llama", {})
