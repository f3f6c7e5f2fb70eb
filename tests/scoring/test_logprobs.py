"""Packed = unpacked, chunked = whole, eight devices = one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from deltapref_jax.config import MeshShape
from deltapref_jax.mesh import make_mesh, shard
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring import logprobs, projection
from deltapref_jax.scoring.packing import (
    PackedSample,
    layout,
    max_segments,
    pack,
    pack_one,
    pack_sequences,
)


def sample(prompt, completion, number=0):
    return pack_one(TokenSequence(prompt, completion), number)


def sequences(vocab, count=11, seed=0):
    r = np.random.default_rng(seed)
    return [
        sample(r.integers(0, vocab, r.integers(1, 9)), r.integers(0, vocab, r.integers(1, 20)), i)
        for i in range(count)
    ]


def naive(model, params, rows):
    """Sums of log-softmax over the targets of unpacked rows of one sequence, from all logits."""
    decoder = nnx.merge(model.graphdef, params)
    tokens, targets = (np.zeros((len(rows), 32), int) for _ in range(2))
    for i, s in enumerate(rows):
        tokens[i, : len(s.tokens)], targets[i, : len(s.tokens)] = s.tokens, s.targets
    segments = jnp.asarray(np.arange(32) < [[len(s.tokens)] for s in rows]).astype(int)
    hidden = decoder.hidden(
        jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(32), tokens.shape), segments
    )
    found = jax.nn.log_softmax(hidden @ decoder.unembedding().T)[:, :-1]
    return (jnp.take_along_axis(found, tokens[:, 1:, None], axis=2)[..., 0] * targets[:, 1:]).sum(
        axis=1
    )


def tiles(monkeypatch, tokens, entries):
    monkeypatch.setattr(projection, "_CPU_TILE", (entries * tokens, entries))


@pytest.mark.parametrize(("tokens", "shares"), [(1, 1), (7, 4), (4096, 2)])
def test_packed_values_and_gradients_equal_unpacked(tiny, monkeypatch, tokens, shares):
    rows = sequences(tiny.spec.vocab)
    micros = pack([[[s]] for s in rows], 4, 40)
    tiles(monkeypatch, tokens, tiny.spec.vocab // shares)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=len(rows)))

    def packed(params):
        total = 0.0
        for m in micros:
            sums, _ = logprobs.sequence_logprobs(
                nnx.merge(tiny.graphdef, params), m.batch, max_segments(4, 40)
            )
            total += (sums[: len(m.order)] * weight[m.order]).sum()
        return total

    ours, our_gradient = jax.jit(jax.value_and_grad(packed))(tiny.state)
    plain, gradient = jax.jit(
        jax.value_and_grad(lambda params: naive(tiny, params, rows) @ weight)
    )(tiny.state)
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-5 * float(jnp.abs(b).max())
        ),
        our_gradient,
        gradient,
    )


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2), (1, 1, 1, 8), (1, 2, 2, 2)]
)
def test_eight_devices_equal_one(tiny, one_device, shape):
    rows = sequences(tiny.spec.vocab, 30)
    (micro,) = pack([[[s]] for s in rows], 16, 64)
    mesh = make_mesh(MeshShape(*shape))
    want, counts = logprobs.logprob_fn(tiny.spec, "float32", 128, one_device)(
        tiny.state, micro.batch
    )
    params = jax.device_put(tiny.state, shardings(tiny.state, mesh))
    got, _ = logprobs.logprob_fn(tiny.spec, "float32", 128, mesh)(
        params, shard(micro.batch, mesh, BATCH)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(counts[: len(rows)], [rows[i].targets.sum() for i in micro.order])


@pytest.mark.parametrize("shape", [(2, 1, 4, 1), (1, 2, 2, 2)])
def test_a_vocabulary_in_shares_has_the_values_and_gradients_of_the_whole(shape, monkeypatch):
    r, mesh = np.random.default_rng(0), make_mesh(MeshShape(*shape))
    tiles(monkeypatch, 5, 4)  # several on every device
    hidden, matrix = (
        jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((4, 24, 8), (48, 8))
    )
    labels, mask = jnp.asarray(r.integers(0, 48, (4, 24))), jnp.asarray(r.random((4, 24)) < 0.6)
    g = jnp.asarray(r.normal(size=(4, 24)), jnp.float32)

    def plain(h, w):
        found = jax.nn.log_softmax(h @ w.T)
        return jnp.where(mask, jnp.take_along_axis(found, labels[..., None], axis=2)[..., 0], 0)

    def run(f, h, w):
        return jax.jit(lambda h, w: (f(h, w), jax.vjp(f, h, w)[1](g)))(h, w)

    got = run(
        lambda h, w: projection.token_logprobs(h, w, labels, mask, mesh),
        shard(hidden, mesh, BATCH),
        shard(matrix, mesh, PartitionSpec("tensor", "fsdp")),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, run(plain, hidden, matrix)
    )


def test_logits_take_the_memory_of_three_buffers_of_one_tile(monkeypatch):
    """The logits of 8 and of 32 rows of 1024 targets on 4096 words have 128 and 512 MiB."""
    tiles(monkeypatch, 2048, 1024)

    def extra(rows):
        shapes = (
            jax.ShapeDtypeStruct((rows, 1024, 8), jnp.float32),
            jax.ShapeDtypeStruct((4096, 8), jnp.float32),
            jax.ShapeDtypeStruct((rows, 1024), jnp.int32),
            jax.ShapeDtypeStruct((rows, 1024), bool),
        )
        gradient = jax.grad(
            lambda h, w, y, m: projection.token_logprobs(h, w, y, m).sum(), argnums=(0, 1)
        )
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    tile, hidden = 4 * 2048 * 1024, 4 * 1024 * 8
    few, many = extra(8), extra(32)
    assert few < 3.1 * tile + 6 * 8 * hidden
    assert many - few < 6 * 24 * hidden


@pytest.mark.parametrize(
    ("vocab", "entries"),
    [(400, 400), (49_152, 8192), (128_256, 8064), (151_936, 8064), (8371, 4224)],
)
def test_tiles_are_multiples_of_a_vector_register(vocab, entries):
    assert projection._tile_shape(1 << 20, vocab, projection._TILE)[1] == entries
    assert -(-vocab // entries) == -(-vocab // 8192)


@pytest.mark.parametrize(("vocab", "cap"), [(101, 0.0), (101, 3.0), (48, 0.0)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 2), (2, 2, 2, 1)])
def test_an_odd_vocabulary_has_the_values_and_gradients_of_its_logits(
    vocab, cap, shape, monkeypatch
):
    """The last slice begins earlier, and what it has in common with the one before counts once."""
    tiles(monkeypatch, 5, 16)
    r, mesh = (
        np.random.default_rng(0),
        make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)]),
    )
    hidden, matrix = (
        jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((4, 24, 8), (vocab, 8))
    )
    labels, mask = jnp.asarray(r.integers(0, vocab, (4, 24))), jnp.asarray(r.random((4, 24)) < 0.6)
    g = jnp.asarray(r.normal(size=(4, 24)), jnp.float32)

    def plain(h, w):
        logits = h @ w.T
        found = jax.nn.log_softmax(cap * jnp.tanh(logits / cap) if cap else logits)
        return jnp.where(mask, jnp.take_along_axis(found, labels[..., None], axis=2)[..., 0], 0)

    def run(f):
        return jax.jit(lambda h, w: (f(h, w), jax.vjp(f, h, w)[1](g)))(hidden, matrix)

    got = run(lambda h, w: projection.token_logprobs(h, w, labels, mask, mesh, cap))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, run(plain))


def test_layout_holds_every_sequence_once_and_keeps_groups_together():
    r = np.random.default_rng(0)
    lengths = np.minimum(r.lognormal(4, 0.8, 200).astype(int) + 1, 256).tolist()
    samples = [sample([], range(n), i) for i, n in enumerate(lengths)]
    groups = [[[samples[i], samples[i + 100]]] for i in range(100)]

    def numbers():
        return [[[s.members[0] for s in row] for row in micro] for micro in layout(groups, 8, 256)]

    micros = numbers()
    assert sorted(i for micro in micros for row in micro for i in row) == list(range(200))
    home = {i: m for m, micro in enumerate(micros) for row in micro for i in row}
    assert all(home[i] == home[i + 100] for i in range(100))
    assert all(sum(lengths[i] for i in row) <= 256 for micro in micros for row in micro)
    assert micros == numbers()
    assert sum(lengths) / (len(micros) * 8 * 256) > 0.85


def test_a_sequence_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match=r"Sequences of \[41\] tokens .* do not fit 4 rows of 40"):
        layout([[[sample([], range(41))]]], 4, 40)


def test_branches_see_the_trunk_and_not_each_other(tiny):
    """A trunk with three branches in one sequence = three sequences, each trunk + its branch."""
    r = np.random.default_rng(3)
    trunk, tails = (
        r.integers(0, tiny.spec.vocab, 9),
        [r.integers(0, tiny.spec.vocab, n) for n in (4, 2, 6)],
    )
    run = jax.jit(lambda state, *batch: nnx.merge(tiny.graphdef, state).hidden(*batch))
    branched = PackedSample(
        np.concatenate([trunk, *tails]).astype(np.int32),
        np.zeros(21, bool),
        np.concatenate([np.arange(9), *(9 + np.arange(len(t)) for t in tails)]).astype(np.int32),
        np.repeat([0, 1, 2, 3], [9, 4, 2, 6]).astype(np.int32),
    )
    (micro,) = pack([[[branched]], [[sample([1, 2], [3])]]], 1, 32)
    hidden = run(
        tiny.state,
        *(
            jnp.asarray(x)
            for x in (
                micro.batch.tokens,
                micro.batch.positions,
                micro.batch.segments,
                micro.batch.branches,
            )
        ),
    )[0]
    start = 9
    for tail in tails:
        alone = np.concatenate([trunk, tail])[None]
        want = run(
            tiny.state, jnp.asarray(alone), jnp.arange(alone.shape[1])[None], jnp.ones_like(alone)
        )[0, 9:]
        np.testing.assert_allclose(hidden[start : start + len(tail)], want, atol=2e-5)
        start += len(tail)


def together(vocab, seed=0):
    """Sequences of seven prompts of 1 to 12 tokens, with 1 to 5 completions each, shuffled."""
    r = np.random.default_rng(seed)
    found = [
        TokenSequence(prompt, r.integers(0, vocab, r.integers(1, 14)))
        for prompt in (r.integers(0, vocab, n).tolist() for n in (1, 2, 3, 12, 9, 5, 7))
        for _ in range(r.integers(1, 6))
    ]
    return [found[i] for i in r.permutation(len(found))]


@pytest.mark.parametrize(("rows", "length"), [(2, 32), (4, 64), (1, 160)])
def test_prompts_read_once_give_the_sums_and_gradients_of_each_sequence_alone(tiny, rows, length):
    sequences = together(tiny.spec.vocab)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=len(sequences)))

    def results(share):
        micros = pack_sequences(sequences, rows, length, share)
        assert sorted(int(i) for m in micros for i in m.order) == list(range(len(sequences)))

        def total(params):
            model, sums = nnx.merge(tiny.graphdef, params), jnp.zeros(len(sequences))
            for m in micros:
                found, _ = logprobs.sequence_logprobs(model, m.batch, max_segments(rows, length))
                sums = sums.at[m.order].set(found[: len(m.order)])
            return sums @ weight, sums

        (_, sums), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(tiny.state)
        return sums, gradient, sum(np.count_nonzero(m.batch.segments) for m in micros)

    got, got_gradient, read = results(True)
    want, gradient, whole = results(False)
    assert whole == sum(len(s.prompt_ids) + len(s.completion_ids) for s in sequences)
    assert read < 0.85 * whole
    np.testing.assert_allclose(got, want, rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-5 * float(jnp.abs(b).max())
        ),
        got_gradient,
        gradient,
    )


def test_a_prompt_is_read_as_often_as_rows_are_filled_behind_it():
    """Prompt of 10; a row of 32 holds 9 + 3 * 7 tokens. One token, or none, is nothing to share."""
    prompt, completion = list(range(10)), list(range(6))
    (micro,) = pack_sequences([TokenSequence(prompt, completion)] * 7, 4, 32, True)
    assert sorted((micro.batch.segments > 0).sum(axis=1).tolist()) == [0, 16, 30, 30]
    for short in ([], [5]):
        (micro,) = pack_sequences([TokenSequence(short, completion)] * 3, 4, 32, True)
        assert (micro.batch.segments > 0).sum() == 3 * (6 + len(short))
        assert not micro.batch.branches.any()


def test_a_group_fills_holes_one_by_one_rather_than_open_another_micro_batch():
    """Rows of 26 have 9 tokens left: 16 tokens behind one prompt fit none of them, 9 + 9 do."""
    big, small = TokenSequence([1], range(16)), TokenSequence(range(3), range(6))
    sequences = [big, big, small, small]
    (micro,) = pack_sequences(sequences, 2, 26, True, [[0], [1], [2, 3]])
    assert (micro.batch.segments > 0).all()
    assert sorted(micro.order.tolist()) == [0, 1, 2, 3]
    (micro,) = pack_sequences(sequences[2:], 2, 26, True, [[0, 1]])
    assert (micro.batch.segments > 0).sum() == 16


@pytest.mark.parametrize(("rows", "length"), [(1, 32), (2, 32)])
def test_no_more_sequences_are_behind_a_prompt_than_a_micro_batch_may_hold(
    tiny, one_device, rows, length
):
    """A row of 32 tokens would hold 15 one-token answers, and has places for 4 sequences."""
    sequences = [TokenSequence([7, 8, 9], [answer]) for answer in range(30)]
    micros = pack_sequences(sequences, rows, length, True)
    assert max(len(m.order) for m in micros) <= max_segments(rows, length)
    got = logprobs.score_sequences(
        tiny.spec, tiny.state, sequences, rows, length, one_device, "float32"
    ).sums
    np.testing.assert_allclose(
        got, naive(tiny, tiny.state, [pack_one(sequence) for sequence in sequences]), rtol=2e-5
    )


def masked(vocab, seed=0):
    """`together` with masks: none, all but a few, the ends of a completion, or a single target."""
    r = np.random.default_rng(seed)
    found = []
    for i, sequence in enumerate(together(vocab, seed)):
        mask = r.random(len(sequence.completion_ids)) < 0.6
        mask[r.integers(len(mask))] = True
        found.append(sequence._replace(scored=None if i % 4 == 0 else mask))
    return found


@pytest.mark.parametrize("share", [False, True])
def test_a_mask_leaves_the_sum_over_its_tokens_and_no_gradient_of_the_others(tiny, share):
    """Values and gradients are those of unpacked rows with the logits in full, masked by hand."""
    sequences = masked(tiny.spec.vocab)
    assert sum(not s.targets[len(s.prompt_ids) :].all() for s in sequences) > 5
    micros = pack_sequences(sequences, 4, 64, share)
    assert any(m.batch.branches is not None and m.batch.branches.any() for m in micros) == share
    weight = jnp.asarray(np.random.default_rng(1).normal(size=len(sequences)))

    def packed(params):
        model, sums = nnx.merge(tiny.graphdef, params), jnp.zeros(len(sequences))
        counts = jnp.zeros(len(sequences))
        for m in micros:
            found, number = logprobs.sequence_logprobs(model, m.batch, max_segments(4, 64))
            sums = sums.at[m.order].set(found[: len(m.order)])
            counts = counts.at[m.order].set(number[: len(m.order)])
        return sums @ weight, (sums, counts)

    def plain(params):
        sums = naive(tiny, params, [pack_one(s) for s in sequences])
        return sums @ weight, sums

    (_, (sums, counts)), ours = jax.jit(jax.value_and_grad(packed, has_aux=True))(tiny.state)
    (_, want), gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(tiny.state)
    np.testing.assert_allclose(sums, want, rtol=2e-5)
    by_hand = [sum(s.scored) if s.scored is not None else len(s.completion_ids) for s in sequences]
    np.testing.assert_array_equal(counts, by_hand)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-5 * float(jnp.abs(b).max())
        ),
        ours,
        gradient,
    )
    unmasked = naive(tiny, tiny.state, [pack_one(s._replace(scored=None)) for s in sequences])
    differs = np.array([not s.targets[len(s.prompt_ids) :].all() for s in sequences])
    np.testing.assert_array_equal(np.abs(np.asarray(unmasked - sums)) > 1e-3, differs)


@pytest.mark.parametrize("share", [False, True])
def test_a_masked_last_token_may_be_any_token(tiny, share):
    """Nothing follows it, so that neither it as a target nor it as an input has a gradient."""
    vocab, r = tiny.spec.vocab, np.random.default_rng(2)
    prompt = r.integers(0, vocab - 2, 5)
    answers = [r.integers(0, vocab - 2, n) for n in (4, 7)]

    def results(last):
        sequences = [
            TokenSequence(prompt, [*answer, last], np.arange(len(answer) + 1) < len(answer))
            for answer in answers
        ]
        (micro,) = pack_sequences(sequences, 2, 32, share)

        def total(params):
            model = nnx.merge(tiny.graphdef, params)
            return logprobs.sequence_logprobs(model, micro.batch, max_segments(2, 32))[0].sum()

        return jax.jit(jax.value_and_grad(total))(tiny.state)

    (one, gradient), (other, again) = results(vocab - 1), results(vocab - 2)
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, gradient, again)
    embedding = nnx.to_pure_dict(gradient)["embed"]
    np.testing.assert_array_equal(embedding[-2:], 0)
    assert np.abs(embedding[prompt]).max() > 0
