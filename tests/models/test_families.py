"""Every family against `transformers`: `make_family_fixtures` wrote what is expected here."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, place, shard
from deltapref_jax.models.decoder import empty_cache, unstacked
from deltapref_jax.models.export import write_folder
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.stored import open_folder, places, stored_shape, to_stored
from deltapref_jax.models.weights import abstract, assemble
from deltapref_jax.scoring.projection import token_logprobs

HERE = Path(__file__).parent / "families"
CASES = sorted(folder.name for folder in HERE.iterdir())
PROMPT, BETA = 5, 0.3


@dataclasses.dataclass(eq=False)
class Case:
    spec: object
    graphdef: object
    state: object
    config: dict
    expected: dict

    @property
    def rows(self):
        return [self.expected[f"tokens_{i}"] for i in range(3)]

    @property
    def logits(self):
        return [self.expected[f"logits_{i}"] for i in range(3)]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = HERE / request.param
    stored = open_folder(folder)
    graphdef, state = assemble(stored, str(folder))
    state = jax.tree.map(np.asarray, state)
    return Case(
        stored.spec,
        graphdef,
        state,
        stored.config,
        load_file(folder / "expected.safetensors"),
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, state, tokens, positions, segments, branches=None):
    model = nnx.merge(graphdef, state)
    return logits_from(model, model.hidden(tokens, positions, segments, branches))


def logits_from(model, hidden):
    logits = jnp.einsum(
        "bld,vd->blv", hidden, model.unembedding(), preferred_element_type=jnp.float32
    )
    cap = model.spec.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits


def alone(case, tokens, graphdef=None):
    """Logits of one sequence in a row of its own."""
    row = packed([tokens], 96)[:3]
    return np.asarray(logits_of(graphdef or case.graphdef, case.state, *row))[0, : len(tokens)]


@functools.partial(jax.jit, static_argnums=0)
def decode(graphdef, state, tokens, positions, cache):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.decode(tokens, positions, cache)
    return logits_from(model, hidden), cache


def packed(rows, length):
    """A row of several sequences, one behind the other, and where each of them lies."""
    tokens, positions, segments = (np.zeros((1, length), np.int32) for _ in range(3))
    at, spans = 0, []
    for i, row in enumerate(rows):
        span = slice(at, at + len(row))
        tokens[0, span], positions[0, span], segments[0, span] = row, np.arange(len(row)), i + 1
        spans.append(span)
        at += len(row)
    return tokens, positions, segments, spans


def test_logits_are_those_of_transformers(case):
    for tokens, expected in zip(case.rows, case.logits, strict=True):
        np.testing.assert_allclose(alone(case, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_the_reference_is(case):
    graphdef, _ = abstract(case.spec, jnp.bfloat16)
    squares, count = 0.0, 0
    for tokens, expected in zip(case.rows, case.logits, strict=True):
        difference = alone(case, tokens, graphdef) - expected
        squares, count = squares + float((difference**2).sum()), count + difference.size
    assert (squares / count) ** 0.5 <= 1.1 * float(case.expected["bf16_rms"][0])


@pytest.mark.slow
def test_packed_rows_have_the_logits_of_their_sequences(case):
    """A row of several tiles, where the sequences alone are rows of one."""
    tokens, positions, segments, spans = packed(case.rows * 2, 200)
    logits = np.asarray(logits_of(case.graphdef, case.state, tokens, positions, segments))[0]
    for span, expected in zip(spans, case.logits * 2, strict=False):
        np.testing.assert_allclose(logits[span], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_shared_prompt_changes_no_logit(case):
    """Sequences 0 and 1 have the prompt in common: a trunk with two branches."""
    if any(rope.long_factors for rope in case.spec.ropes):
        pytest.skip("LongRoPE: prompts are not shared, see dispatch.shares_prompts")
    first, second = case.rows[:2]
    trunk, a, b = first[:PROMPT], first[PROMPT:], second[PROMPT:]
    tokens, positions, segments, branches = (np.zeros((1, 200), np.int32) for _ in range(4))
    end = PROMPT + len(a) + len(b)
    tokens[0, :end] = [*trunk, *a, *b]
    positions[0, :end] = [*range(len(first)), *range(PROMPT, len(second))]
    segments[0, :end] = 1
    branches[0, PROMPT:end] = [1] * len(a) + [2] * len(b)
    logits = logits_of(case.graphdef, case.state, tokens, positions, segments, branches)
    logits = np.asarray(logits)[0]
    np.testing.assert_allclose(logits[: len(first)], case.logits[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[len(first) : end], case.logits[1][PROMPT:], rtol=0, atol=1e-4)


def test_greedy_decoding_in_a_cache_gives_the_same_tokens(case):
    prompt, greedy = case.expected["prompt"], case.expected["greedy"]
    length = len(prompt) + len(greedy)
    spec = case.spec.within(length)
    graphdef, state = unstacked(abstract(spec)[0], case.state)
    cache, found = empty_cache(spec, 1, length), []
    tokens, positions = prompt[None], np.arange(len(prompt))[None]
    while len(found) < len(greedy):
        logits, cache = decode(graphdef, state, tokens, positions, cache)
        found.append(int(np.argmax(logits[0, -1])))
        tokens, positions = np.asarray([[found[-1]]], np.int32), positions[:, -1:] + 1
    assert found == greedy.tolist()


@pytest.mark.slow
def test_a_cache_has_the_logits_of_the_full_forward_pass(case):
    """A long sequence, token by token behind a prefilled half."""
    tokens, half = case.rows[0], len(case.rows[0]) // 2
    spec = case.spec.within(len(tokens))
    graphdef, state = unstacked(abstract(spec)[0], case.state)
    cache, found = empty_cache(spec, 1, len(tokens)), []
    for span in (slice(0, half), *(slice(i, i + 1) for i in range(half, len(tokens)))):
        positions = np.arange(len(tokens))[None, span]
        logits, cache = decode(graphdef, state, tokens[None, span], positions, cache)
        found.append(np.asarray(logits[0]))
    np.testing.assert_allclose(np.concatenate(found), case.logits[0], rtol=0, atol=1e-4)


def dpo_loss(state, graphdef, batch, references, mesh=None):
    tokens, positions, segments = batch
    model = nnx.merge(graphdef, state)
    hidden = model.hidden(tokens, positions, segments, remat="attention", mesh=mesh)
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    mask = (positions >= PROMPT - 1) & (segments == after) & (segments > 0)
    logprobs = token_logprobs(hidden, model.unembedding(), labels, mask, mesh, model.spec.logit_cap)
    sums = [jnp.sum(jnp.where(segments == i, logprobs, 0)) for i in (1, 2)]
    margin = (sums[0] - references[0]) - (sums[1] - references[1])
    return -jax.nn.log_sigmoid(BETA * margin)


@functools.lru_cache(maxsize=2)
def gradients(case, mesh=None, repeat=1):
    tokens, positions, segments, _ = packed(case.rows[:2], 136)  # longer than one tile
    batch = [np.repeat(x, repeat, axis=0) for x in (tokens, positions, segments)]
    for x in batch:
        x[1:] = 0  # the other rows are empty
    state = case.state
    if mesh is not None:
        batch = shard(batch, mesh, BATCH)
        state = place(state, shardings(state, mesh))
    run = jax.jit(jax.value_and_grad(dpo_loss), static_argnums=(1, 4))
    loss, gradient = run(state, case.graphdef, batch, case.expected["references"], mesh)
    return float(loss), nnx.to_pure_dict(jax.device_get(gradient))


def stored_gradients(case, tree):
    """Gradients by the names of tensors."""
    found = {}
    where = places(case.spec, gguf=False)
    for name, p in parameters(case.spec).items():
        array = np.asarray(tree["blocks"][p.short] if p.stacked else tree[name])
        for place_, layer in zip(where[name], array if p.stacked else [array], strict=True):
            for tensor, piece in zip(place_.tensors, layer if p.batch else [layer], strict=True):
                found.setdefault(tensor, []).append(to_stored(piece, p, case.spec))
    return {name: np.concatenate(rows) for name, rows in found.items()}


@pytest.mark.slow
def test_the_gradient_of_a_dpo_step_is_that_of_torch(case):
    loss, tree = gradients(case)
    np.testing.assert_allclose(loss, case.expected["loss"][0], rtol=0, atol=2e-5)
    found = stored_gradients(case, tree)
    wanted = {
        name.removeprefix("grad."): value
        for name, value in case.expected.items()
        if name.startswith("grad.")
    }
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        scale = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            found[name] / scale, expected / scale, rtol=0, atol=2e-4, err_msg=name
        )


@pytest.mark.slow
def test_eight_devices_have_the_gradient_of_one(case):
    """Rows, columns of a row, and heads or experts are divided."""
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2, context=2))
    loss, tree = gradients(case)
    ours, split = gradients(case, mesh, repeat=4)
    np.testing.assert_allclose(ours, loss, rtol=0, atol=2e-5)
    for name, expected in stored_gradients(case, tree).items():
        scale = max(1e-3, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            stored_gradients(case, split)[name] / scale,
            expected / scale,
            rtol=0,
            atol=2e-4,
            err_msg=name,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_written_as_they_were_read(case, dtype, tmp_path, request):
    folder = HERE / request.node.callspec.params["case"]
    write_folder(case.state, case.spec, tmp_path / "a", dtype, case.config)
    again = open_folder(tmp_path / "a")
    assert again.spec == case.spec
    _, state = assemble(again, "a", params=None)
    write_folder(state, again.spec, tmp_path / "b", dtype, again.config)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    if dtype == "float32":
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "a", folder))
        assert ours.keys() | {"lm_head.weight"} == theirs.keys() | {"lm_head.weight"}
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_every_parameter_has_the_declared_shape(case):
    flat = nnx.to_pure_dict(case.state)
    for name, p in parameters(case.spec).items():
        array = flat["blocks"][p.short] if p.stacked else flat[name]
        assert array.shape == ((case.spec.layers,) if p.stacked else ()) + p.shape(case.spec)
        assert np.prod(stored_shape(p, case.spec)) * (p.shape(case.spec)[0] if p.batch else 1) == (
            np.prod(p.shape(case.spec))
        )
    assert case.spec.parameters == sum(x.size for x in jax.tree.leaves(case.state))


def test_transformers_reads_what_is_written(case, tmp_path):
    """Its config class gives the exported config.json the meaning of the first one."""
    from transformers import AutoConfig

    write_folder(case.state, case.spec, tmp_path, "float32", case.config)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.model_type == json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert open_folder(tmp_path).spec == case.spec


@pytest.mark.parametrize(
    "shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 4, "tensor": 2}], ids=str
)
def test_devices_read_their_own_parts(case, shape, request):
    """Parameters that are placed from their files equal those that are placed from the host."""
    folder = HERE / request.node.callspec.params["case"]
    mesh = make_mesh(MeshShape(**({"data": 1, "fsdp": 1} | shape)))
    _, lazy = assemble(open_folder(folder), str(folder))
    placed = place(lazy, shardings(case.state, mesh))
    for ours, whole in zip(jax.tree.leaves(placed), jax.tree.leaves(case.state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), whole)
