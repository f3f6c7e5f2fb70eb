"""The plan of a dry run: every artifact wanted, which exist, and what the rest will cost at most."""

from collections.abc import Mapping

from rich.table import Table

from deltapref_jax.config import DIMENSIONS, OBJECTIVE_KINDS, Arm, Experiment
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.synthetic.corrupt import DEGREES
from deltapref_jax.workspace import Node, Workspace, in_order


class Cost:
    """Upper bounds by artifact: every source full, every prompt and trace at its longest."""

    def __init__(self, e: Experiment, nodes: Mapping[str, Node], workspace: Workspace):
        self._e, self._nodes = e, nodes
        self._longest = e.sampling.max_prompt + e.sampling.max_tokens

        def rows(label: str, sources: tuple) -> int:
            if workspace.complete(nodes[label]):
                return int(workspace.manifest(nodes[label])["stats"]["rows"])
            return sum(
                p.count or len(read_prompts(p)[0]) for p in sources
            )  # 0 means all that a file holds

        self._questions = rows("prompts", e.prompts)
        self._asked = sum(rows(f"suite/{s.name}", (s.prompts,)) * s.samples for s in e.suites)
        self._traces = {g.name: self._questions * g.samples for g in e.generators}
        self._judges = {j.name: j for j in e.judges}
        self._kinds = {o.name: o.kind for o in e.objectives}

    def __call__(self, label: str) -> tuple[int, int]:
        """Traces and tokens that the artifact called `label` takes: sampled, read, or trained on."""
        kind, _, rest = label.partition("/")
        if kind == "sample":
            return self._traces[rest], self._traces[rest] * self._longest
        if kind == "score":  # with its own prompt, and with another one
            return 2 * self._traces[rest], 2 * self._traces[rest] * self._longest
        if kind == "judge":
            judge, name = rest.split("/", 1)
            return self._judged(judge, self._traces[name])
        if kind == "audit":
            problems = min(self._nodes[label].config["count"], self._questions)
            return self._judged(rest, problems * (1 + len(DIMENSIONS) * DEGREES))
        if kind in ("evaluate", "capability"):
            return self._asked, self._asked * self._longest
        if kind == "train":
            return self._trained(next(a for a in self._e.arms if a.name == rest.rsplit("/", 1)[0]))
        return 0, 0

    def _judged(self, judge: str, traces: int) -> tuple[int, int]:
        return traces, 0 if self._judges[
            judge
        ].kind == "exact" else traces * self._e.scoring.row_length

    def _trained(self, arm: Arm) -> tuple[int, int]:
        t, kind = self._e.training, OBJECTIVE_KINDS[self._kinds[arm.objective]]
        pool = max(1, int(self._questions * arm.fraction))
        pairs = (
            t.pairs_per_step * t.steps
            if t.budget == "steps"
            else int(pool * t.epochs) + t.pairs_per_step
        )
        traces = (
            pairs * (1 if kind.unit == "token" else 2) * (1 + kind.baseline)
        )  # KTO: with another prompt too
        return traces, traces * min(self._longest, t.row_length)


def plan_table(e: Experiment, nodes: Mapping[str, Node], workspace: Workspace) -> Table:
    """A row per artifact: label, key, whether it is there, and what making it takes."""
    cost = Cost(e, nodes, workspace)
    table = Table(title=f"{e.name}: {e.question}", title_justify="left")
    table.add_column("artifact", overflow="fold")
    table.add_column("key", no_wrap=True)
    table.add_column("there")
    table.add_column("traces ≤", justify="right", no_wrap=True)
    table.add_column("tokens ≤", justify="right", no_wrap=True)
    there = traces = tokens = 0
    wanted = in_order(nodes)
    for node in wanted:
        made = workspace.complete(node)
        needs = (0, 0) if made else cost(node.label)
        there, traces, tokens = there + made, traces + needs[0], tokens + needs[1]
        table.add_row(
            node.label, node.key, "yes" if made else "no", *(f"{n:,}" if n else "" for n in needs)
        )
    table.add_section()
    table.add_row(f"{len(wanted)} artifacts", "", f"{there} there", f"{traces:,}", f"{tokens:,}")
    return table
