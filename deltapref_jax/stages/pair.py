"""pair: a join and a selection over tables; an arm costs nothing until it trains."""

import numpy as np

from deltapref_jax.pairs.build import Rules, build
from deltapref_jax.pairs.select import sample_delta, select
from deltapref_jax.records import PAIR, table
from deltapref_jax.workspace import Job

VERSION = 2


def pair(job: Job) -> None:
    """PROMPT, TRACE, VERDICT and RATING to PAIR; config: the arm's pairing and selection, the ladder, the seed."""
    c = job.config
    traces = {name: t.to_pylist() for name, t in job.tables("sample").items()}
    correct = {
        row["trace_id"]: row["correct"]
        for t in job.tables("verify").values()
        for row in t.to_pylist()
    }
    dimensions = list(c["dimensions"])
    ratings: dict[str, list[float]] = {}
    for rated in job.tables("judge").values():
        for row in rated.to_pylist():
            ratings.setdefault(row["trace_id"], [0.0] * len(dimensions))[
                dimensions.index(row["dimension"])
            ] = row["rating"]
    rules = Rules(
        c["chosen"], c["rejected"], c["ladder"], tuple(c["finishes"]), c["direction"], c["stratum"]
    )
    pool, counts = build(
        job.table("prompts")["prompt_id"].to_pylist(), traces, correct, ratings, rules
    )
    if not pool:
        raise ValueError(
            f"No pair is left for {c['chosen']} against {c['rejected']}: {counts}. Use more prompts, "
            "longer traces (config.sampling.max_tokens) or another stratum."
        )
    tokens = {row["trace_id"]: row["tokens"] for rows in traces.values() for row in rows}
    by = None if c["by"] == "sum" else dimensions.index(c["by"])
    kept = select(pool, c["keep"], c["fraction"], c["seed"], by, tokens)
    job.stats |= {k: float(v) for k, v in counts.items()} | {
        "kept": float(len(kept)),
        "chosen_tokens": float(np.mean([tokens[p["chosen_id"]] for p in kept])),
        "rejected_tokens": float(np.mean([tokens[p["rejected_id"]] for p in kept])),
    }
    if dimensions and ratings:
        job.stats["sample_delta"] = float(np.mean(sample_delta(kept, by)))
    job.write(table(PAIR, kept))
