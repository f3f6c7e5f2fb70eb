"""This project's part of `launch.bench_train`: one process, one measurement, a line of JSON at the end."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltapref_jax.config import MeshShape, Objective
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.flops import forward_flops
from deltapref_jax.models.weights import load
from deltapref_jax.scoring.derange import derange
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.scoring.packing import capacity
from deltapref_jax.training.data import Group, Row, pack_step
from deltapref_jax.training.loop import run_step
from deltapref_jax.training.state import Optimizer, start
from deltapref_jax.training.step import programs
from deltapref_jax.training.watch import batch_flops, step_flops


def groups_of(kind: str, pairs: list[dict[str, list[int]]], score: Any) -> list[Group]:
    """The step's pairs, or its examples with mismatched partners; `score` gives every row its reference."""
    rows = [Row(p["prompt"], p[side]) for p in pairs for side in ("chosen", "rejected")]
    if kind == "dpo":
        flat = score(rows)
        return [Group(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
    partner = derange([str(i // 2) for i in range(len(rows))], 0)
    flat = score(
        rows
        + [
            row._replace(completion=rows[j].completion)
            for row, j in zip(rows, partner, strict=True)
        ]
    )
    own, others = flat[: len(rows)], flat[len(rows) :]
    return [
        Group((row,), 1.0 - i % 2, other)
        for i, (row, other) in enumerate(zip(own, others, strict=True))
    ]


def product_flops(dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of nine: what no step can exceed."""
    square = jnp.ones((2048, 2048), dtype)
    product, best = jax.jit(jnp.matmul), float("inf")
    for _ in range(10):  # the first compiles
        began = time.perf_counter()
        product(square, square).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def main(c: dict[str, Any]) -> dict[str, Any]:
    """Steps of `c["pairs"]` pairs on the model and the pairs in `c["folder"]`; seconds of each, on one device."""
    folder = Path(c["folder"])
    model, mesh = load(str(folder / "model"), c["dtype"]), make_mesh(MeshShape(), jax.devices()[:1])
    rows, length = c["rows"], c["row_length"]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    optimizer, objective = Optimizer(), Objective(kind=c["kind"], beta=c["beta"])
    steps = programs(
        model.spec, c["dtype"], c["kind"], optimizer, capacity(rows, length), mesh, c["remat"]
    )
    ceiling = product_flops(c["dtype"])
    reference_seconds = 0.0

    def score(wanted: list[Row]) -> list[Row | None]:
        nonlocal reference_seconds
        began = time.perf_counter()
        found = score_sequences(
            model.spec, model.state, [r.pieces for r in wanted], rows, length, mesh, c["dtype"]
        )
        reference_seconds += time.perf_counter() - began
        return [
            None if value is None else row._replace(reference=value)  # None: longer than a row
            for row, value in zip(wanted, found.sums, strict=True)
        ]

    data, n = [], c["pairs"]
    for at in range(0, len(pairs), n):
        data.append(groups_of(c["kind"], pairs[at : at + n], score))
        if not at:  # compiles
            reference_seconds = 0.0
    state, spec = start(model.state, optimizer, mesh), model.spec
    del model
    seconds, losses, shares, flops, reference_flops = [], [], [], [], []
    for groups in data:
        began = time.perf_counter()
        batch = pack_step(
            groups, c["kind"], rows, length, share=shares_prompts(mesh, length)
        ).trimmed(1)
        state, sums, _ = run_step(steps, state, batch, objective, c["learning_rate"], mesh)
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - began)
        losses.append(float(sums["loss"]))
        shares.append(batch.filled / batch.positions)
        flops.append(step_flops(spec, batch))
        reference_flops.append(
            sum(batch_flops(forward_flops, spec, each) for each in batch.batches)
        )
    others = max(1, len(data) - 1)
    return {
        "step_seconds": seconds,
        "loss": losses,
        "reference_seconds": reference_seconds / others,
        "real_share": float(np.mean(shares[1:])),
        "step_flops": flops,
        "reference_flops": float(np.mean(reference_flops[1:] or reference_flops)),
        "product_flops": ceiling,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
