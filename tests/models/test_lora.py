"""Adapters: their initial values, their merge and export, and what `peft` reads of an export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from deltapref_jax.config import LORA_TARGETS, ConfigError, Lora, Model
from deltapref_jax.models.export import export, write_folder
from deltapref_jax.models.flops import forward_flops, training_flops
from deltapref_jax.models.lora import adapters, add_adapters, export_adapter, fit_lora, merge
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.stored import open_folder
from deltapref_jax.models.weights import abstract, assemble, load
from tests.models.family_checks import dequantised, read_case

FAMILIES = Path(__file__).parent / "families"
CASES = sorted(folder.name for folder in FAMILIES.iterdir())
FULL, LORA = Lora(), Lora(4, 6.0)
SOME = Lora(2, 3.0, ("down_proj", "q_proj"))


@pytest.fixture(scope="module")
def adapted(tiny):
    """(trained, frozen) parameters with a B that is not 0."""
    trained, frozen = add_adapters(tiny.spec, tiny.state, LORA, 0)
    r = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + r.normal(0, 0.1, x.shape).astype(np.float32), trained), frozen


def logits(spec, states, lora=FULL, dtype=jnp.float32):
    """Returns the logits [2, 12, V] of fixed tokens."""
    graphdef, _ = abstract(spec, dtype, adapters(lora, spec))
    tokens = jnp.arange(24).reshape(2, 12) % spec.vocab
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    @jax.jit
    def run(states):
        model = nnx.merge(graphdef, *states)
        return model.hidden(tokens, positions, jnp.ones((2, 12), int)) @ model.unembedding().T

    return np.asarray(run(states), np.float32)


def test_a_is_peft_s_draw_from_seed_and_path_and_b_is_zero(tiny):
    first, again, other = (
        nnx.to_pure_dict(add_adapters(tiny.spec, tiny.state, LORA, seed)[0])["blocks"]
        for seed in (3, 3, 2**32 - 1)
    )
    assert set(first) == {
        f"{name}_{side}" for name in adapters(LORA, tiny.spec).targets for side in "ab"
    }
    inputs = {"down": tiny.spec.mlp, "o": tiny.spec.heads * tiny.spec.head_width}
    for name in adapters(LORA, tiny.spec).targets:
        a = np.asarray(first[f"{name}_a"])
        # kaiming_uniform_(a=sqrt(5)) has the bound sqrt(6 / (1 + 5) / inputs).
        bound = inputs.get(name, tiny.spec.width) ** -0.5
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert abs(a.mean()) < 4 * bound / 3**0.5 / a.size**0.5
        np.testing.assert_array_equal(a, again[f"{name}_a"])
        assert (a != other[f"{name}_a"]).all()
        assert not np.asarray(first[f"{name}_b"]).any()
    assert (
        len(
            {
                np.asarray(first[f"{name}_a"]).flat[0] / inputs.get(name, tiny.spec.width) ** -0.5
                for name in adapters(LORA, tiny.spec).targets
            }
        )
        == 7
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_with_b_zero_the_policy_is_its_base_exactly(tiny, dtype):
    fresh = add_adapters(tiny.spec, tiny.state, LORA, 0)
    np.testing.assert_array_equal(
        logits(tiny.spec, fresh, LORA, dtype), logits(tiny.spec, [tiny.state], dtype=dtype)
    )


def test_merged_and_exported_decoders_give_the_adapted_logits(tiny, adapted, tmp_path):
    want = logits(tiny.spec, adapted, LORA)
    assert np.abs(want - logits(tiny.spec, [tiny.state])).max() > 0.1
    merged = merge(tiny.state, adapted[0], LORA)
    np.testing.assert_allclose(logits(tiny.spec, [merged]), want, atol=1e-5)
    export(merged, tiny.spec, tiny.text, tmp_path)
    np.testing.assert_array_equal(
        logits(tiny.spec, [load(str(tmp_path)).state]), logits(tiny.spec, [merged])
    )
    untouched = {
        name: a for name, a in nnx.to_pure_dict(merged)["blocks"].items() if "norm" in name
    }
    assert all(
        (a == nnx.to_pure_dict(tiny.state)["blocks"][name]).all() for name, a in untouched.items()
    )


def test_only_the_targets_are_adapted(tiny):
    trained, frozen = add_adapters(tiny.spec, tiny.state, SOME, 0)
    assert set(nnx.to_pure_dict(trained)["blocks"]) == {"q_a", "q_b", "down_a", "down_b"}
    moved = jax.tree.map(lambda x: x + 1.0, trained)
    before, after = (
        nnx.to_pure_dict(s)["blocks"] for s in (tiny.state, merge(tiny.state, moved, SOME))
    )
    assert {name for name in before if (before[name] != after[name]).any()} == {"q", "down"}


def test_full_fine_tuning_is_the_case_without_adapters(tiny):
    trained, frozen = add_adapters(tiny.spec, tiny.state, Lora(), 0)
    assert trained is tiny.state
    assert not jax.tree.leaves(frozen)
    assert merge(tiny.state, trained, Lora()) is trained


def test_a_base_is_loaded_in_its_own_dtype(tiny, tmp_path):
    export(tiny.state, tiny.spec, tiny.text, tmp_path, "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(load(str(tmp_path), params=None).state)} == {
        "bfloat16"
    }
    assert {str(x.dtype) for x in jax.tree.leaves(load(str(tmp_path)).state)} == {"float32"}


def test_the_adapter_folder_has_pefts_names_and_layout(tiny, adapted, tmp_path):
    export_adapter(
        adapted[0], tiny.spec, LORA, Model("the/base", revision="v2"), tmp_path / "adapter"
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (
        config["peft_type"],
        config["r"],
        config["lora_alpha"],
        config["base_model_name_or_path"],
        config["revision"],
    ) == ("LORA", 4, 6, "the/base", "v2")
    assert config["target_modules"] == list(LORA_TARGETS)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * tiny.spec.layers
    merged = nnx.to_pure_dict(merge(tiny.state, adapted[0], LORA))["blocks"]
    for name, module in (
        ("o", "self_attn.o_proj"),
        ("k", "self_attn.k_proj"),
        ("down", "mlp.down_proj"),
    ):
        prefix = f"base_model.model.model.layers.1.{module}"
        a, b = (tensors[f"{prefix}.lora_{side}.weight"] for side in "AB")
        w = np.asarray(nnx.to_pure_dict(tiny.state)["blocks"][name][1])
        w = w.reshape(a.shape[1], b.shape[0])
        np.testing.assert_allclose(
            w + 1.5 * (b @ a).T, np.asarray(merged[name][1]).reshape(w.shape), atol=1e-5
        )


def test_flops_have_no_gradients_of_frozen_matrices():
    spec, positions = ModelSpec(1000, 64, 3, 4, 2, 16, 160), np.array([*range(10), *range(6)])
    base, whole = forward_flops(spec, positions, 7), training_flops(spec, positions, 7)
    assert whole == pytest.approx(3 * base)
    shape = adapters(Lora(8), spec)
    # Inputs and outputs of q and o, of k and v, and of the MLP's matrices.
    low_rank = 2 * 16 * 3 * 8 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 160))
    attention = 2 * 3 * 64 * (10**2 + 6**2)
    assert forward_flops(spec, positions, 7, shape) == pytest.approx(base + low_rank)
    assert training_flops(spec, positions, 7, shape) == pytest.approx(
        2 * (base - attention) + 3 * (attention + low_rank)
    )


def test_targets_are_what_the_family_has():
    """Nemotron has no gate, and of a mixture of experts attention alone is adapted."""
    attention = LORA_TARGETS[:4]
    expected = {
        "llama": LORA_TARGETS,
        "phi3": LORA_TARGETS,
        "nemotron": (*attention, "up_proj", "down_proj"),
        "qwen3-moe": attention,
    }
    for name, targets in expected.items():
        spec = open_folder(FAMILIES / name).spec
        assert fit_lora(Lora(2), spec).targets == targets
        assert fit_lora(Lora(2, targets=("v_proj", "q_proj")), spec).targets == ("v_proj", "q_proj")
        assert adapters(Lora(2), spec).targets == tuple(t.split("_")[0] for t in targets)
        lacking = [t for t in LORA_TARGETS if t not in targets]
        for target in lacking:
            with pytest.raises(ConfigError) as error:
                fit_lora(Lora(2, targets=(target, "q_proj")), spec)
            assert str(error.value) == (
                f"config.training.lora.targets names {target}, which a {spec.family} student has "
                f"not; it has {', '.join(targets)}."
            )


def family_adapters(name, lora):
    """A fixture of a family with adapters whose B is not 0: spec, parameters, adapters."""
    stored = open_folder(FAMILIES / name)
    _, state = assemble(stored, name)
    state = jax.tree.map(np.asarray, state)
    trained, _ = add_adapters(stored.spec, state, lora, 3)
    r = np.random.default_rng(1)
    return (
        stored,
        state,
        jax.tree.map(lambda x: x + r.normal(0, 0.1, x.shape).astype(np.float32), trained),
    )


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "up_proj")], ids=["all", "some"])
@pytest.mark.parametrize("name", CASES)
def test_the_merged_tensors_of_a_family_are_those_of_its_adapter(name, targets, tmp_path):
    """In the files: W + alpha / rank * B A for every module, also where it holds several matrices.

    B of a fused module is block-diagonal: a matrix that is no target keeps its rows as they are.
    """
    spec = open_folder(FAMILIES / name).spec
    there = fit_lora(Lora(2), spec).targets
    lora = Lora(2, 7.0, tuple(t for t in targets if t in there))
    stored, state, trained = family_adapters(name, lora)
    write_folder(merge(state, trained, lora), spec, tmp_path / "merged", "float32", stored.config)
    export_adapter(trained, spec, lora, Model("the/base"), tmp_path / "adapter")
    base, merged, adapter = (
        load_file(file)
        for file in (
            FAMILIES / name / "model.safetensors",
            tmp_path / "merged" / "model.safetensors",
            tmp_path / "adapter" / "adapter_model.safetensors",
        )
    )
    if "quantization_config" in stored.config:
        base = dequantised(read_case(name), base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    modules = {tensor.rpartition(".lora_")[0] for tensor in adapter}
    assert {module.split(".")[-1] for module in modules} == set(config["target_modules"])
    for module in modules:
        a, b = (adapter.pop(f"{module}.lora_{side}.weight") for side in "AB")
        short = module.split(".")[-1]
        rank = config.get("rank_pattern", {}).get(short, config["r"])
        alpha = config.get("alpha_pattern", {}).get(short, config["lora_alpha"])
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        tensor = f"{module.removeprefix('base_model.model.')}.weight"
        delta = merged[tensor] - base[tensor]
        np.testing.assert_allclose(delta, alpha / rank * (b @ a), rtol=0, atol=2e-6, err_msg=tensor)
        if short == "qkv_proj" and targets:
            keys = slice(spec.heads * spec.head_width, -spec.kv_heads * spec.head_width)
            assert not b[keys].any() and not delta[keys].any()
        base[tensor] = merged[tensor]
    assert not adapter
    for tensor, array in merged.items():
        np.testing.assert_array_equal(array, base[tensor], err_msg=tensor)


def test_a_fraction_of_alpha_is_exported_as_it_is(tmp_path):
    """PEFT divides a module's alpha by its rank, which is threefold where three matrices lie."""
    lora = Lora(2, 3.5)
    stored, _, trained = family_adapters("phi3", lora)
    export_adapter(trained, stored.spec, lora, Model("the/base"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3.5)
    assert config["rank_pattern"] == {"qkv_proj": 6, "gate_up_proj": 4}
    assert config["alpha_pattern"] == {"qkv_proj": 10.5, "gate_up_proj": 7.0}


_PEFT = """
import sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
assert all("lora" not in name or p.abs().sum() > 0 for name, p in model.named_parameters())
tokens = (torch.arange(24).reshape(2, 12)) % model.config.vocab_size
with torch.no_grad():
    np.save(out, model(tokens).logits.numpy())
"""


@pytest.fixture
def peft():
    """An interpreter that has PEFT: this one, or that of DELTAPREF_PEFT."""
    python = os.environ.get("DELTAPREF_PEFT", sys.executable)
    if subprocess.run(
        [python, "-c", "import torch, peft"], capture_output=True, check=False
    ).returncode:
        pytest.skip(
            "there is no torch with peft here; DELTAPREF_PEFT may name an interpreter that has them"
        )
    return python


def peft_logits(python, base, adapter, out):
    subprocess.run([python, "-c", _PEFT, base, adapter, out], check=True)
    return np.load(out)


@pytest.mark.slow
def test_peft_gives_our_logits(tiny, adapted, tmp_path, peft):
    export(tiny.state, tiny.spec, tiny.text, tmp_path / "base")
    export_adapter(adapted[0], tiny.spec, LORA, Model(str(tmp_path / "base")), tmp_path / "adapter")
    theirs = peft_logits(peft, tmp_path / "base", tmp_path / "adapter", tmp_path / "out.npy")
    np.testing.assert_allclose(theirs, logits(tiny.spec, adapted, LORA), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "phi3-longrope", "nemotron", "qwen3-moe", "gemma3"])
def test_peft_gives_the_logits_of_a_family(name, tmp_path, peft):
    """Fused tensors, no gate, and experts that are not adapted."""
    lora = Lora(2, 7.0)
    stored, state, trained = family_adapters(name, lora)
    export_adapter(trained, stored.spec, lora, Model(str(FAMILIES / name)), tmp_path / "adapter")
    theirs = peft_logits(peft, FAMILIES / name, tmp_path / "adapter", tmp_path / "out.npy")
    ours = logits(stored.spec, [merge(state, trained, lora)])
    cap = stored.spec.logit_cap
    ours = cap * np.tanh(ours / cap) if cap else ours
    assert np.abs(ours - logits(stored.spec, [state])).max() > 0.1
    worst = np.abs(theirs - ours).max()
    print(f"{name}: {worst:.1e}")
    assert worst < 1e-4
