"""How many prompts a recipe's budget has room for, in traces or in FLOPs by formula."""

import dataclasses
from collections.abc import Mapping

from deltapref_jax.config import ConfigError, Prompts
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.stages.report import Report
from launch.cost import Cost


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the work of a recipe.

    Attributes:
      most: traces, or FLOPs.
      flag: that gave it.
      unit: "traces" or "FLOPs".
      fixed: work that no prompt changes: capability, audits and retests, in FLOPs.
      of_prompt: generator to the work of its traces of one prompt, and of their ratings.
    """

    most: float
    flag: str
    unit: str
    fixed: float
    of_prompt: Mapping[str, float]

    def prompts(self, *generators: str) -> int:
        """Prompts that two generators can answer."""
        return int((self.most - self.fixed) // sum(self.of_prompt[name] for name in generators))

    @property
    def dearest(self) -> tuple[str, str]:
        """The two generators whose traces take most."""
        a, b, *_ = sorted(self.of_prompt, key=lambda name: -self.of_prompt[name])
        return a, b

    def check(self, least: int, available: int) -> None:
        """Refuses a budget that is too small, or larger than all prompts need.

        Args:
          least: prompts that are needed.
          available: prompts that the config has.

        Raises:
          ConfigError: whatever generators are chosen, so that nothing has been made.
        """
        per_prompt = sum(self.of_prompt[name] for name in self.dearest)
        needed, all_need = (self.fixed + n * per_prompt for n in (least, available))
        if self.most < needed:
            of_all = f", beside {self.fixed:.3g} for capability, audits and retests"
            beside = of_all if self.fixed else ""
            raise ConfigError(
                f"{self.flag} is {self.most:g}, and {least} prompts, the fewest of which a pair "
                f"can be kept, need {needed:.6g} {self.unit} if {' and '.join(self.dearest)} "
                f"write the traces{beside}; raise it to at least that."
            )
        if self.most > all_need:
            raise ConfigError(
                f"{self.flag} is {self.most:g}, and all {available:,} prompts of the config need "
                f"{all_need:.6g} {self.unit} at most; lower it to that, leave it out, or give the "
                "config more prompts."
            )


def flops_of_prompt(report: Report, cost: Cost) -> dict[str, float]:
    """Generator to FLOPs of its traces of one prompt and of every judge's ratings, at most."""
    questions = cost.work(report.prompts).items
    return {
        name: sum(
            cost.most_flops(node)
            for node in (traces, *(tables[name] for tables in report.ratings.values()))
        )
        / questions
        for name, traces in report.traces.items()
    }


def fixed_flops(report: Report, cost: Cost) -> float:
    """FLOPs of all generators' answers to the suites, and of the judges' audits and retests."""
    results = [node for tables in report.capability.values() for node in tables.values()]
    judged = (report.audits, report.trace_audits, report.retests)
    return sum(map(cost.most_flops, (*results, *(n for nodes in judged for n in nodes.values()))))


def sizes(sources: tuple[Prompts, ...]) -> list[int]:
    """Questions of every source; those of files are read."""
    made = ("synthetic", "reasoning_gym")
    return [p.count if p.kind in made else len(read_prompts(p)[0]) for p in sources]
