"""This project's contender in `launch.bench_train`: measures one run, prints a line of JSON."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltapref_jax.config import MeshShape, Objective
from deltapref_jax.mesh import make_mesh, platform_of
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.flops import forward_flops
from deltapref_jax.models.weights import load
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.derange import derange
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training.data import Group, ReferencedSequence, pack_step
from deltapref_jax.training.loop import train_step
from deltapref_jax.training.monitor import batch_flops, step_flops
from deltapref_jax.training.state import Optimizer, init_state
from deltapref_jax.training.step import programs

Score = Callable[[list[TokenSequence]], list[ReferencedSequence]]


def groups_of(kind: str, pairs: list[dict[str, list[int]]], score: Score) -> list[Group]:
    """Returns a step's pairs, or its KTO examples with their mismatched sequences.

    `score` computes the reference log-probabilities.
    """
    rows = [
        TokenSequence(np.asarray(pair["prompt"]), np.asarray(pair[side]))
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    if kind == "dpo":
        scored = score(rows)
        return [Group(pair) for pair in zip(scored[::2], scored[1::2], strict=True)]
    partners = derange([str(i // 2) for i in range(len(rows))], 0)
    mismatched = [
        row._replace(completion_ids=rows[j].completion_ids)
        for row, j in zip(rows, partners, strict=True)
    ]
    scored = score(rows + mismatched)
    matched, others = scored[: len(rows)], scored[len(rows) :]
    return [
        Group((row,), 1.0 - i % 2, other)
        for i, (row, other) in enumerate(zip(matched, others, strict=True))
    ]


def product_flops(dtype: str) -> float:
    """Measures the FLOP/s of a large matrix product, the best of nine: no step can exceed it."""
    size = 2048 if jax.default_backend() == "cpu" else 8192  # which fills an accelerator
    square = jnp.ones((size, size), dtype)
    product, best = jax.jit(jnp.matmul), float("inf")
    for _ in range(10):  # The first call compiles, and is never the best.
        began = time.perf_counter()
        product(square, square).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def main(c: dict[str, Any]) -> dict[str, Any]:
    """Trains steps of `c["pairs"]` pairs from `c["folder"]` on one device, and times each."""
    folder = Path(c["folder"])
    model, mesh = load(str(folder / "model"), c["dtype"]), make_mesh(MeshShape(), jax.devices()[:1])
    rows, length = c["rows"], c["row_length"]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    optimizer, objective = Optimizer(), Objective(kind=c["kind"], beta=c["beta"])
    steps = programs(
        model.spec, c["dtype"], c["kind"], optimizer, max_segments(rows, length), mesh, c["remat"]
    )
    ceiling = product_flops(c["dtype"])
    reference_seconds = 0.0

    def score(sequences: list[TokenSequence]) -> list[ReferencedSequence]:
        nonlocal reference_seconds
        began = time.perf_counter()
        scores = score_sequences(model.spec, model.state, sequences, rows, length, mesh, c["dtype"])
        reference_seconds += time.perf_counter() - began
        if None in scores.sums:
            raise ValueError(f"A sequence of the bench is longer than {length} tokens.")
        return [
            ReferencedSequence(sequence, logprob)
            for sequence, logprob in zip(sequences, scores.sums, strict=True)
            if logprob is not None
        ]

    data, n = [], c["pairs"]
    for at in range(0, len(pairs), n):
        data.append(groups_of(c["kind"], pairs[at : at + n], score))
        if not at:  # The first step's reference pass compiles, and is not counted.
            reference_seconds = 0.0
    state, spec = init_state(model.state, optimizer, mesh), model.spec
    share = shares_prompts(platform_of(mesh), False, length, spec)
    del model
    seconds, losses, shares, flops, reference_flops = [], [], [], [], []
    for groups in data:
        began = time.perf_counter()
        batch = pack_step(groups, c["kind"], rows, length, share=share).drop_empty_halves(1)
        state, sums, _ = train_step(steps, state, batch, objective, c["learning_rate"], mesh)
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - began)
        losses.append(float(sums["loss"]))
        shares.append(batch.filled / batch.positions)
        flops.append(step_flops(spec, batch))
        reference_flops.append(
            sum(batch_flops(forward_flops, spec, packed) for packed in batch.batches)
        )
    counted_steps = max(1, len(data) - 1)
    memory = jax.devices()[0].memory_stats()  # None on CPU
    peak = {"peak_bytes": memory["peak_bytes_in_use"]} if memory else {}
    return peak | {
        "step_seconds": seconds,
        "loss": losses,
        "reference_seconds": reference_seconds / counted_steps,
        "real_share": float(np.mean(shares[1:])),
        "step_flops": flops,
        "reference_flops": float(np.mean(reference_flops[1:] or reference_flops)),
        "product_flops": ceiling,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
