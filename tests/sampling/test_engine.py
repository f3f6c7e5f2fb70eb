import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import MeshShape, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models import decoder
from deltapref_jax.models.attention import dispatch, live
from deltapref_jax.models.decoder import Cache, empty_cache
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel, abstract
from deltapref_jax.records import digest
from deltapref_jax.sampling import plan, programs
from deltapref_jax.sampling.engine import Engine, Request
from tests.marks import mostly

SPEC = ModelSpec(vocab=40, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp=48)
END = (3, 11)
GENERATOR = "ab" * 8


class Letters:
    """A tokenizer of 40 characters, without `transformers`."""

    end_ids = END

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)


def model(peaky: float = 1.0, seed: int = 0, spec: ModelSpec = SPEC) -> LoadedModel:
    """Returns a random decoder; `peaky` scales its logits."""
    graphdef, state = abstract(spec)
    rng = np.random.default_rng(seed)
    # By the number of axes: final norm 1, embedding scaled, matrices far from 0; block norms are 1.
    scale = {1: 0.0, 2: 0.2 * peaky}
    state = jax.tree.map(
        lambda x: jnp.asarray(
            (x.ndim < 2 or x.shape == (2, 32)) + scale.get(x.ndim, 0.2) * rng.normal(size=x.shape),
            jnp.float32,
        ),
        state,
    )
    return LoadedModel(graphdef, state, spec, Letters(), {})


def requests(count: int = 14, **options) -> list[Request]:
    rng = np.random.default_rng(5)
    return [
        Request(
            digest(i),
            rng.integers(0, 40, rng.integers(1, 21)).tolist(),
            samples=1 + i % 3,
            **options,
        )
        for i in range(count)
    ]


def sampling(**options) -> Sampling:
    return Sampling(**{"max_prompt": 20, "max_tokens": 24, "slots": 8, "chunk": 5} | options)


def engine(loaded=None, mesh=None, seed=0, **options) -> Engine:
    return Engine(loaded or model(), sampling(**options), seed, GENERATOR, mesh)


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(graphdef, state, tokens):
    merged = nnx.merge(graphdef, state)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = merged.hidden(tokens, positions, (tokens >= 0).astype(jnp.int32))
    return jax.nn.log_softmax(hidden @ merged.unembedding().T, axis=-1)


def full_forward(loaded: LoadedModel, prompt, completion) -> np.ndarray:
    """Returns log-probabilities [completion, V] by one uncached forward pass.

    Tokens are padded to one length, so that it compiles once.
    """
    tokens = np.full((1, 48), -1)
    tokens[0, : len(prompt) + len(completion)] = [*prompt, *completion]
    return np.asarray(_log_probs(loaded.graphdef, loaded.state, tokens))[0, len(prompt) - 1 :][
        : len(completion)
    ]


def traces(results):
    return [(c.tokens, c.finish, c.text) for row in results for c in row]


@pytest.fixture(scope="module")
def plain():
    return engine().generate(requests())


def test_greedy_decoding_takes_the_argmax_of_the_full_forward_pass():
    loaded = model()
    greedy = [dataclasses.replace(request, samples=1) for request in requests(5, temperature=0.0)]
    for request, (trace,) in zip(greedy, engine(loaded).generate(greedy), strict=True):
        assert (
            trace.tokens == full_forward(loaded, request.tokens, trace.tokens).argmax(-1).tolist()
        )


def test_log_probability_equals_that_of_the_full_forward_pass(plain):
    loaded = model()
    for request, row in zip(requests(), plain, strict=True):
        for trace in row:
            table = full_forward(loaded, request.tokens, trace.tokens)
            assert trace.logprob == pytest.approx(
                table[np.arange(len(trace.tokens)), trace.tokens].sum(), abs=1e-4
            )


def test_finish_reasons_and_lengths(plain):
    seen = set()
    for tokens, finish, text in traces(plain):
        seen.add(finish)
        ended = tokens[-1] in END
        assert finish == ("eos" if ended else "length") and not set(END) & set(tokens[:-1])
        assert len(tokens) == 24 or (ended and len(tokens) < 24)
        assert text == Letters().decode(tokens[:-1] if ended else tokens)
    assert seen == {"eos", "length"}


@pytest.mark.parametrize("peaky", [0.05, 1.0, 4.0])
def test_order_slots_chunk_and_shard_do_not_matter(peaky):
    loaded, batch = model(peaky), requests()
    results = engine(loaded).generate(batch)
    order = np.random.default_rng(1).permutation(len(batch))
    shuffled = engine(loaded).generate([batch[i] for i in order])
    assert traces(shuffled[i] for i in np.argsort(order)) == traces(results)
    other = engine(loaded, slots=3, chunk=7)
    assert traces(
        row for i in range(0, len(batch), 5) for row in other.generate(batch[i : i + 5])
    ) == traces(results)


def test_the_same_call_gives_the_same_bits(plain):
    assert engine().generate(requests()) == plain


def test_samples_seeds_and_generators_differ(plain):
    one = Request(digest(0), [1, 2, 3], samples=4)
    assert len({tuple(c.tokens) for c in engine().generate([one])[0]}) == 4
    assert traces(engine(seed=1).generate(requests())) != traces(plain)
    assert traces(Engine(model(), sampling(), 0, "ef" * 8).generate(requests())) != traces(plain)


def test_stop_strings_cut_text_tokens_and_log_probability():
    loaded, batch = model(), requests()
    free = engine(loaded).generate(batch)
    stop = max((c.text for row in free for c in row), key=len)[2:4]
    stopped = engine(loaded, stop=(stop, "not there")).generate(batch)
    hits = 0
    for request, before, after in zip(batch, free, stopped, strict=True):
        for a, b in zip(before, after, strict=True):
            if stop not in a.text:
                assert a == b
                continue
            hits += 1
            kept = a.text.index(stop) + len(stop)  # a character is a token
            assert (b.text, b.tokens, b.finish) == (
                a.text[: kept - len(stop)],
                a.tokens[:kept],
                "stop",
            )
            table = full_forward(loaded, request.tokens, b.tokens)
            assert b.logprob == pytest.approx(table[np.arange(kept), b.tokens].sum(), abs=1e-4)
    assert hits


def test_the_cache_grows_with_the_longest_sequence():
    endless = Letters()
    endless.end_ids = ()
    loaded = dataclasses.replace(model(), text=endless)
    short, long = engine(loaded), engine(loaded, max_tokens=300)
    expected = short.generate(requests(6))
    assert short.cache.v[0].shape[2] == 44  # max_prompt + max_tokens
    for _ in range(2):
        assert [c.tokens[:24] for row in long.generate(requests(6)) for c in row] == [
            t for t, _, _ in traces(expected)
        ]
        assert long.cache.v[0].shape[2] == 320  # doubled from 256, up to max_prompt + max_tokens


def test_a_cache_on_a_tpu_has_whole_tiles():
    even, over = Sampling(max_prompt=64, max_tokens=64), Sampling(max_prompt=64, max_tokens=65)
    assert [plan.cache_positions(s, "tpu") for s in (even, over)] == [128, 256]
    assert plan.cache_positions(over, "gpu") == over.longest == 129


@pytest.mark.parametrize("positions_last", [False, True])
def test_a_grown_cache_holds_what_it_held_and_the_shorter_one_is_freed(positions_last):
    short = empty_cache(SPEC, 2, 16)
    rng = np.random.default_rng(0)
    keys = [rng.normal(size=(2, 2, 16, 8)).astype(np.float32) for _ in short.k]
    values = [rng.normal(size=v.shape).astype(np.float32) for v in short.v]
    stored = [k.swapaxes(2, 3) if positions_last else k for k in keys]
    short = Cache(tuple(map(jnp.asarray, stored)), tuple(map(jnp.asarray, values)), positions_last)
    long = programs.grow(short, 24)
    assert all(array.is_deleted() for array in jax.tree.leaves(short))
    assert long.length == 24 and long.positions_last == positions_last
    for i in range(SPEC.layers):
        k = np.asarray(long.k[i]).swapaxes(2, 3) if positions_last else np.asarray(long.k[i])
        for got, want in ((k, keys[i]), (np.asarray(long.v[i]), values[i])):
            np.testing.assert_array_equal(got[:, :, :16], want)
            assert got.shape == (2, 2, 24, 8) and not got[:, :, 16:].any()


def test_filters_per_request():
    batch = [
        Request(r.prompt_id, r.tokens, 2, top_k=1) if i % 2 else r
        for i, r in enumerate(requests(6))
    ]
    results = engine().generate(batch)
    greedy = engine().generate([Request(r.prompt_id, r.tokens, 2, temperature=0.0) for r in batch])
    free = engine().generate(requests(6))
    for i, row in enumerate(results):
        assert traces([row]) == traces([greedy[i] if i % 2 else free[i]])


def test_models_of_one_shape_share_the_compiled_programs():
    engine().generate(requests())
    sizes = [f._cache_size() for f in (programs.advance, programs.prefill, programs.insert)]
    engine(model(seed=1)).generate(requests())
    assert [f._cache_size() for f in (programs.advance, programs.prefill, programs.insert)] == sizes


def test_counts(plain):
    sampler = engine()
    sampler.generate(requests())
    tokens = sum(len(tokens) for tokens, _, _ in traces(plain))
    assert sampler.stats["tokens"] == tokens
    assert sampler.stats["truncated"] == sum(finish == "length" for _, finish, _ in traces(plain))
    assert sampler.stats["slot_steps"] == 8 * sampler.stats["steps"] >= tokens
    assert sampler.stats["prompt_tokens"] == sum(len(r.tokens) for r in requests())


def test_errors():
    with pytest.raises(
        ValueError, match="Prompt abc0 has 21 tokens; config.sampling.max_prompt allows 1 to 20"
    ):
        engine().generate([Request("abc0", [1] * 21)])
    with pytest.raises(ValueError, match="Prompt abc1 has 0 tokens"):
        engine().generate([Request("abc1", [])])
    with pytest.raises(ValueError, match="config.sampling.stop holds an empty string"):
        engine(stop=("x", ""))
    with pytest.raises(
        ValueError, match="max_prompt [+] max_tokens is 5020 and the model has 2048 positions"
    ):
        engine(max_tokens=5000)
    broken = model()
    broken.state["embed"][...] = broken.state["embed"][...] * jnp.nan
    with pytest.raises(ValueError, match="log-probability that is not finite"):
        engine(broken).generate(requests(1))


@pytest.fixture(scope="module")
def short():
    """Requests of eight tokens at most, and what one device makes of them."""
    cut = [Request(r.prompt_id, r.tokens[:8], r.samples) for r in requests()]
    return cut, engine(max_prompt=8).generate(cut)


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2), (1, 1, 8)])
def test_eight_devices_equal_one(short, shape):
    cut, one = short
    many = engine(mesh=make_mesh(MeshShape(*shape)), max_prompt=8).generate(cut)
    assert traces(many) == traces(one)
    logprobs = [[c.logprob for row in results for c in row] for results in (one, many)]
    np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-4)


def test_slots_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match="slots is 12; it must be a multiple of the 8 devices"):
        engine(mesh=make_mesh(MeshShape(data=8)), slots=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "width", "heads"),
    mostly(
        pytest.mark.exhaustive,
        [
            ((1, 1, 1, 1), 128, 4),
            ((2, 1, 2, 1), 128, 4),
            ((1, 1, 1, 1), 32, 1),
            ((2, 1, 2, 1), 64, 2),
        ],
        *(1, 2),
    ),
)
def test_decoding_as_on_a_tpu_gives_the_same_traces(shape, width, heads, monkeypatch):
    """The kernel that reads live tiles, its program run in XLA; traces cross a border of tiles."""
    spec = dataclasses.replace(SPEC, heads=8, kv_heads=4, head_width=width, layers=1)
    shapes = {"max_tokens": 130, "slots": 4, "chunk": 16}
    batch, loaded = requests(5), model(4.0, spec=spec)
    want = engine(loaded, **shapes).generate(batch)
    assert max(len(tokens) for tokens, _, _ in traces(want)) > 120
    for module in (dispatch, decoder, plan):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "tpu")
    run, traced = live.live_attention, []

    def interpreted(*args, **options):
        traced.append(args)
        return run(*args, **options, interpret=True)

    monkeypatch.setattr(live, "live_attention", interpreted)
    jax.clear_caches()  # programs are kept by shapes, which the platform changes in part
    mesh = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)])
    sampler = engine(loaded, mesh, **shapes)
    got = sampler.generate(batch)
    # Narrow heads lie beside each other; `heads` are left of four.
    assert sampler.cache.v[0].shape == (4, heads, 256, 4 * width // heads)
    assert traced and traces(got) == traces(want)
    jax.clear_caches()


def test_a_mesh_of_one_device_is_the_default(plain):
    assert engine(mesh=make_mesh(MeshShape(), jax.devices()[:1])).generate(requests()) == plain
