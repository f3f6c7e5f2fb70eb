"""prompts: sources to one table of distinct questions, apart from every evaluation question."""

from collections.abc import Mapping

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.config import ConfigError, Prompts
from deltapref_jax.data.decontaminate import overlapping
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.records import Prompt, to_table


class PromptTable(Node, stage="prompts", version=4):
    """PROMPT: the distinct questions of all sources that do not overlap a question of `suites`.

    Attributes:
      sources: where the questions are, in order.
      contents: what the path of every source holds: a content hash, or a name on the hub.
      suites: questions that must stay out of this table, by suite.
    """

    sources: tuple[Prompts, ...]
    contents: tuple[str, ...]
    suites: Mapping[str, "PromptTable"]

    def make(self, job: Job) -> None:
        """Reads the sources; an equal question of a later source is a duplicate."""
        prompts: dict[str, Prompt] = {}
        counts = dict.fromkeys(("read", "empty", "duplicate"), 0)
        for source in self.sources:
            found, seen = read_prompts(source)
            for name, count in seen.items():
                counts[name] += count
            counts["duplicate"] += sum(prompt.prompt_id in prompts for prompt in found)
            prompts |= {prompt.prompt_id: prompt for prompt in found}
        held_out = [prompt for suite in self.suites.values() for prompt in job.rows(Prompt, suite)]
        overlap = overlapping(prompts.values(), held_out)
        kept = [prompt for prompt in prompts.values() if prompt.prompt_id not in overlap]
        if not kept:
            raise ConfigError(
                f"All {len(prompts)} training questions overlap evaluation questions; give other "
                "sources, or another seed."
            )
        reasons = list(overlap.values())
        job.stats |= {name: float(count) for name, count in counts.items()} | {
            "overlap_exact": float(reasons.count("exact")),
            "overlap_13_gram": float(reasons.count("13-gram")),
        }
        job.write(to_table(Prompt, kept))
