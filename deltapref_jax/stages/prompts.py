"""prompts: sources to one table of distinct questions, without those that overlap an evaluation question."""

from deltapref_jax.config import ConfigError, Prompts
from deltapref_jax.data.decontaminate import overlapping
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.records import PROMPT, table
from deltapref_jax.workspace import Job

VERSION = 2


def prompts(job: Job) -> None:
    """The config's `sources` to PROMPT; inputs `suite/…`, if any, are what the questions must not overlap."""
    rows: dict[str, dict] = {}
    counts = dict.fromkeys(("read", "empty", "duplicate", "overlap_exact", "overlap_13_gram"), 0)
    for fields, path in zip(job.config["sources"], job.local["paths"], strict=True):
        found, seen = read_prompts(
            Prompts(**dict(fields) | {"tasks": tuple(fields["tasks"]), "path": path})
        )
        for name, count in seen.items():
            counts[name] += count
        counts["duplicate"] += sum(row["prompt_id"] in rows for row in found)
        rows |= {row["prompt_id"]: row for row in found}
    evaluation = [row for suite in job.tables("suite").values() for row in suite.to_pylist()]
    overlap = overlapping(rows.values(), evaluation)
    for reason in overlap.values():
        counts["overlap_" + reason.replace("-", "_")] += 1
    kept = [row for key, row in rows.items() if key not in overlap]
    if not kept:
        raise ConfigError(
            f"All {len(rows)} training questions overlap evaluation questions; give other sources, or "
            "another seed."
        )
    job.stats |= {name: float(count) for name, count in counts.items()}
    job.write(table(PROMPT, kept))
