"""What is compared of every family with `transformers`, and the bounds that the tests hold it to.

A check takes a `Case`, one checkpoint of `families/` with what `make_family_fixtures` expects of
it, and returns its worst figure. `test_families` compares that with `BOUNDS`, and `family_table`
writes it to docs/models.md.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, place, shard
from deltapref_jax.models.decoder import empty_cache, unstacked
from deltapref_jax.models.export import write_folder
from deltapref_jax.models.parameters import parameters
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.stored import joined, open_folder, parts, places
from deltapref_jax.models.weights import abstract, assemble
from deltapref_jax.scoring.projection import token_logprobs

HERE = Path(__file__).parent / "families"
CASES = sorted(folder.name for folder in HERE.iterdir())
PROMPT, BETA = 5, 0.3


@dataclasses.dataclass(eq=False)
class Case:
    folder: Path
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


def read_case(name):
    folder = HERE / name
    stored = open_folder(folder)
    graphdef, state = assemble(stored, str(folder))
    state = jax.tree.map(np.asarray, state)
    expected = load_file(folder / "expected.safetensors")
    return Case(folder, stored.spec, graphdef, state, stored.config, expected)


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


@functools.partial(jax.jit, static_argnums=0)
def prefill(graphdef, state, tokens):
    return nnx.merge(graphdef, state).prefill(tokens)


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


def largest(found, expected):
    """The largest absolute difference of several pairs of arrays; NaN counts as infinite."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert np.shape(ours) == np.shape(theirs)
        difference = float(np.abs(np.asarray(ours) - theirs).max())
        worst = max(worst, np.inf if np.isnan(difference) else difference)
    return worst


def logits_difference(case):
    """Of three sequences in rows of their own, from the logits of torch."""
    return largest([alone(case, tokens) for tokens in case.rows], case.logits)


def bfloat16_ratio(case):
    """Root mean square of bfloat16's difference from float32, as a multiple of the reference's."""
    graphdef, _ = abstract(case.spec, jnp.bfloat16)
    squares, count = 0.0, 0
    for tokens, expected in zip(case.rows, case.logits, strict=True):
        difference = alone(case, tokens, graphdef) - expected
        squares, count = squares + float((difference**2).sum()), count + difference.size
    return (squares / count) ** 0.5 / float(case.expected["bf16_rms"][0])


def packed_difference(case):
    """In a row of several tiles, where the sequences alone are rows of one."""
    tokens, positions, segments, spans = packed(case.rows * 2, 200)
    logits = np.asarray(logits_of(case.graphdef, case.state, tokens, positions, segments))[0]
    return largest([logits[span] for span in spans], case.logits * 2)


def shared_difference(case):
    """Sequences 0 and 1 have the prompt in common: a trunk with two branches.

    None of LongRoPE, whose prompts are not shared (see `dispatch.shares_prompts`).
    """
    if any(rope.long_factors for rope in case.spec.ropes):
        return None
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
    return largest(
        [logits[: len(first)], logits[len(first) : end]],
        [case.logits[0], case.logits[1][PROMPT:]],
    )


def cached_difference(case):
    """A long sequence, token by token behind a prefilled half."""
    tokens, half = case.rows[0], len(case.rows[0]) // 2
    spec = case.spec.within(len(tokens))
    graphdef, state = unstacked(abstract(spec)[0], case.state)
    cache, found = empty_cache(spec, 1, len(tokens)), []
    for span in (slice(0, half), *(slice(i, i + 1) for i in range(half, len(tokens)))):
        positions = np.arange(len(tokens))[None, span]
        logits, cache = decode(graphdef, state, tokens[None, span], positions, cache)
        found.append(np.asarray(logits[0]))
    return largest([np.concatenate(found)], case.logits[:1])


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
    """Loss of a DPO step, and its gradients by the names of tensors."""
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
    return float(loss), stored_gradients(case, nnx.to_pure_dict(jax.device_get(gradient)))


def stored_gradients(case, tree):
    found, places_of = {}, {}
    where = places(case.spec, gguf=False)
    for name, p in parameters(case.spec).items():
        array = np.asarray(tree["blocks"][p.short] if p.stacked else tree[name])
        for place_, layer in zip(where[name], array if p.stacked else [array], strict=True):
            for tensor, part in parts(layer, p, place_, case.spec):
                found.setdefault(tensor, []).append(part)
                places_of[tensor] = place_
    return {name: joined(held, places_of[name]) for name, held in found.items()}


def relative(found, expected):
    """The largest difference of gradients, each over its tensor's largest entry."""
    assert found.keys() == expected.keys()
    return max(
        largest([found[name]], [tensor]) / max(1e-3, float(np.abs(tensor).max()))
        for name, tensor in expected.items()
    )


def gradient_difference(case):
    """Of one DPO step from torch's; the loss has a bound of its own."""
    loss, found = gradients(case)
    np.testing.assert_allclose(loss, case.expected["loss"][0], rtol=0, atol=2e-5)
    wanted = {
        name.removeprefix("grad."): value
        for name, value in case.expected.items()
        if name.startswith("grad.")
    }
    return relative(found, wanted)


def devices_difference(case):
    """The same from one device's; rows, columns of a row, and heads or experts are divided."""
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2, context=2))
    loss, alone_ = gradients(case)
    ours, split = gradients(case, mesh, repeat=4)
    np.testing.assert_allclose(ours, loss, rtol=0, atol=2e-5)
    return relative(split, alone_)


def round_trip_differences(case, dtype, folder):
    """The number of tensors that differ when weights are written, read and written again.

    In float32 they are compared with the fixture's own file too.
    """
    write_folder(case.state, case.spec, folder / "a", dtype, case.config)
    again = open_folder(folder / "a")
    assert again.spec == case.spec
    _, state = assemble(again, "a", params=None)
    write_folder(state, again.spec, folder / "b", dtype, again.config)
    assert (folder / "a" / "config.json").read_bytes() == (
        folder / "b" / "config.json"
    ).read_bytes()
    first, second, fixture = (
        load_file(f / "model.safetensors") for f in (folder / "a", folder / "b", case.folder)
    )
    if "quantization_config" in case.config:
        fixture = dequantised(case, fixture)
    assert first.keys() == second.keys()
    assert first.keys() | {"lm_head.weight"} == fixture.keys() | {"lm_head.weight"}
    others = [second, fixture] if dtype == "float32" else [second]
    return sum(
        any(array.tobytes() != other[name].tobytes() for other in others)
        for name, array in first.items()
    )


def dequantised(case, tensors):
    """The tensors of a file in MXFP4: torch's in the first layer, and what was read in others."""
    whole = {name: x for name, x in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    blocks = nnx.to_pure_dict(case.state)["blocks"]
    gate_up = np.stack([blocks["expert_gate"], blocks["expert_up"]], axis=-1)
    for layer in range(case.spec.layers):
        experts = f"model.layers.{layer}.mlp.experts"
        whole[f"{experts}.gate_up_proj"] = gate_up[layer].reshape(*gate_up.shape[1:3], -1)
        whole[f"{experts}.down_proj"] = blocks["expert_down"][layer]
    whole |= {name.removeprefix("read."): x for name, x in case.expected.items() if "read." in name}
    # Nothing is rounded: the file has bfloat16, and so have what it dequantises to.
    return {name: np.asarray(x, np.float32) for name, x in whole.items()}


LOGITS, GRADIENTS = 1e-4, 2e-4
BOUNDS = {
    logits_difference: LOGITS,
    bfloat16_ratio: 1.1,
    cached_difference: LOGITS,
    packed_difference: LOGITS,
    shared_difference: LOGITS,
    devices_difference: GRADIENTS,
    gradient_difference: GRADIENTS,
}
"""The largest figure of every check that takes a case alone."""
