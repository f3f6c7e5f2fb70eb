"""Measures the sampler's speed relative to a roofline of this machine; prints a table, writes JSON.

    python -m launch.bench_sample --slots=192
    python -m launch.bench_sample --model=path/to/folder --slots=32 --prompts=32 --max_tokens=64

The roofline of a decode step is the larger of two times: its FLOPs over the rate of a matrix
product, and the bytes of weights and KV cache over the memory bandwidth. Every slot counts as busy,
and both rates are measured in the same run. The FLOPs of prefilling the prompts are added. `ratio`
is the roofline time of the whole run over the measured time. Without --model, a random model is
sampled, whose traces end with probability 1/64 at every token.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from rich.table import Table

from deltapref_jax.config import DTYPES, QUANTIZATIONS, ConfigError, Sampling
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.parameters import parameters, weight_bytes
from deltapref_jax.models.sharding import path_name
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import LoadedModel, abstract, load, quantised_state
from deltapref_jax.progress import plain_console
from deltapref_jax.records import digest
from deltapref_jax.sampling.engine import Engine, Request
from launch.flags import define_count, define_output, run_main

_MODEL = flags.DEFINE_string("model", "", "Model to sample; a random small one if empty.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Dtype of the computation.")
_QUANTIZATION = flags.DEFINE_enum(
    "quantization", "", list(QUANTIZATIONS), "Format of the matrices of layers."
)
_SLOTS = flags.DEFINE_multi_integer(
    "slots",
    [128, 192],
    "Rows decoded at once; repeat for several measurements.",
    lower_bound=1,
    upper_bound=2**20,
)
_CHUNK = define_count("chunk", 16, "Decode steps per dispatch.")
_PROMPTS = define_count("prompts", 512, "Number of random prompts.")
_SAMPLES = define_count("samples", 2, "Traces per prompt.")
_MAX_PROMPT = define_count(
    "max_prompt", 96, "Longest prompt in tokens; the shortest has a quarter of it."
)
_MAX_TOKENS = define_count("max_tokens", 128, "Longest trace in tokens.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Below 1, the top-p filter is measured too.", lower_bound=1e-6, upper_bound=1.0
)
_LAYERS = define_count("layers", 3, "Layers of the random model.", 1000)
_WIDTH = define_count("width", 128, "Width of the random model, a multiple of 8.", 2**16)
_VOCAB = define_count("vocab", 512, "Vocabulary size of the random model.")
_OUTPUT = define_output()


class _FakeTokenizer:
    """A tokenizer whose end ids are the first 1/64 of the vocabulary."""

    def __init__(self, vocab: int):
        self.end_ids = tuple(range(max(1, vocab // 64)))

    def decode(self, ids: list[int]) -> str:
        """Returns the ids as numbers in text."""
        return " ".join(map(str, ids))


def random_model() -> LoadedModel:
    """Returns a small decoder with random weights, whose draws are nearly uniform."""
    spec = ModelSpec(
        _VOCAB.value, _WIDTH.value, _LAYERS.value, 4, 2, _WIDTH.value // 4, _WIDTH.value * 11 // 4
    )
    graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0), dtype=jnp.dtype(_DTYPE.value)))
    text: Any = _FakeTokenizer(spec.vocab)
    if _QUANTIZATION.value:
        spec = spec.quantised(_QUANTIZATION.value)
        graphdef, _ = abstract(spec, jnp.dtype(_DTYPE.value))
        state = quantised_state(state, spec)
    declared = parameters(spec)
    state = jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x, declared[path_name(path)].stored_dtype(spec, _DTYPE.value)),
        state,
    )
    return LoadedModel(graphdef, state, spec, text, {})


def best_seconds(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    """Returns the seconds of the fastest of seven calls, after one that compiles."""
    jitted = jax.jit(function)
    jax.block_until_ready(jitted(*args))
    times = []
    for _ in range(7):
        started = time.perf_counter()
        jax.block_until_ready(jitted(*args))
        times.append(time.perf_counter() - started)
    return min(times)


def machine_rates(dtype: jnp.dtype) -> tuple[float, float]:
    """Measures the FLOP/s of a square matrix product and the bytes/s of summing a large array."""
    n, size = 1536, 1 << 26
    square = jnp.ones((n, n), dtype)
    flops = 2 * n**3 / best_seconds(jnp.matmul, square, square)
    return flops, size * dtype.itemsize / best_seconds(jnp.sum, jnp.ones(size, dtype))


def step_costs(spec: ModelSpec, slots: int, length: int, itemsize: int) -> tuple[float, float]:
    """Returns FLOPs and bytes of a decode step of `slots` rows on `length` cached positions."""
    # The embedding of an untied model is a lookup of a few rows, and counts as no work.
    matrices = spec.parameters - (0 if spec.tied else spec.vocab * spec.width)
    attention = 4 * spec.layers * spec.heads * spec.head_width * length
    cache = 2 * spec.layers * spec.kv_heads * spec.head_width * length
    embed = 0 if spec.tied else spec.vocab * spec.width * itemsize
    weights = weight_bytes(spec, _DTYPE.value) - embed
    return slots * (2 * matrices + attention), weights + itemsize * slots * cache


def measure(model: LoadedModel, slots: int, rates: tuple[float, float]) -> dict[str, float]:
    """Returns one row of the table; a first pass compiles, and a second is timed."""
    sampling = Sampling(
        max_prompt=_MAX_PROMPT.value, max_tokens=_MAX_TOKENS.value, slots=slots, chunk=_CHUNK.value
    )
    engine = Engine(model, sampling, 0, digest("bench"))
    rng = np.random.default_rng(0)
    lengths = rng.integers(max(1, _MAX_PROMPT.value // 4), _MAX_PROMPT.value + 1, _PROMPTS.value)
    requests = [
        Request(
            digest(i),
            rng.integers(0, model.spec.vocab, n).tolist(),
            _SAMPLES.value,
            top_p=_TOP_P.value,
        )
        for i, n in enumerate(lengths)
    ]
    engine.generate(requests)
    compiled = engine.stats["compile_seconds"]
    engine.stats.clear()
    engine.generate(requests)
    stats, dtype = engine.stats, jnp.dtype(_DTYPE.value)
    assert engine.cache is not None
    flops, size = step_costs(model.spec, slots, engine.cache.v[0].shape[2], dtype.itemsize)
    step = max(flops / rates[0], size / rates[1])
    prompt = (
        stats["prompt_tokens"]
        * step_costs(model.spec, 1, _MAX_PROMPT.value // 2, dtype.itemsize)[0]
        / rates[0]
    )
    return {
        "slots": slots,
        "tokens": stats["tokens"],
        "seconds": stats["seconds"],
        "tokens_per_second": stats["tokens"] / stats["seconds"],
        "utilisation": stats["tokens"] / stats["slot_steps"],
        "step_ms": 1e3 * stats["seconds"] / stats["steps"],
        "bound_ms": 1e3 * (step + prompt / stats["steps"]),
        "ratio": (step * stats["steps"] + prompt) / stats["seconds"],
        "prompt_padding": 1 - stats["prompt_tokens"] / stats["padded_prompt_tokens"],
        "compile_seconds": compiled,
    }


def main(_: list[str]) -> None:
    """Measures every value of --slots, prints the table and writes the JSON."""
    if _WIDTH.value % 8:
        raise ConfigError(
            f"--width is {_WIDTH.value}; the random model's four heads need a multiple of 8."
        )
    model = (
        load(_MODEL.value, _DTYPE.value, _DTYPE.value, _QUANTIZATION.value)
        if _MODEL.value
        else random_model()
    )
    rates = machine_rates(jnp.dtype(_DTYPE.value))
    rows = [measure(model, slots, rates) for slots in _SLOTS.value]
    table = Table(
        title=f"{model.spec.parameters:,} parameters; products {rates[0] / 1e9:.0f} GFLOP/s, "
        f"reading {rates[1] / 1e9:.1f} GB/s"
    )
    for name in rows[0]:
        table.add_column(name.replace("_", "\n"), justify="right")
    for row in rows:
        table.add_row(
            *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in row.values())
        )
    plain_console().print(table)
    if _OUTPUT.value:
        with open(_OUTPUT.value, "w") as file:
            json.dump(
                {
                    "spec": dataclasses.asdict(model.spec),
                    "flops_per_second": rates[0],
                    "bytes_per_second": rates[1],
                    "rows": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    run_main(main)
