"""The plan of a dry run: every artifact wanted, which exist, and what the rest will cost at most."""

from collections.abc import Mapping

from rich.table import Table

from deltapref_jax.config import Experiment
from deltapref_jax.workspace import Node, Workspace, in_order


def plan_table(e: Experiment, nodes: Mapping[str, Node], workspace: Workspace) -> Table:
    """A row per artifact with traces and tokens (upper bounds: every trace at its longest)."""
    questions = sum(p.count for p in e.prompts)
    generators = {g.name: g for g in e.generators}
    asked = sum(s.prompts.count * s.samples for s in e.suites)
    longest = e.sampling.max_prompt + e.sampling.max_tokens

    def cost(label: str) -> tuple[int, int]:
        kind, _, rest = label.partition("/")
        if kind == "sample":
            traces = questions * generators[rest].samples
            return traces, traces * longest
        if kind in ("judge", "score"):
            name = rest.split("/")[-1]
            traces = questions * generators[name].samples
            judge = next((j for j in e.judges if kind == "judge" and j.name == rest.split("/")[0]), None)
            passes = 0 if judge and judge.kind == "exact" else 1 if judge else 2
            return traces, passes * traces * longest
        if kind in ("evaluate", "capability"):
            return asked, asked * longest
        if kind == "train":
            t = e.training
            traces = 2 * t.pairs_per_step * t.steps
            return traces, traces * longest
        return 0, 0

    table = Table(title=f"{e.name}: {e.question}", title_justify="left")
    for column, justify in (("artifact", "left"), ("key", "left"), ("there", "left"), ("traces ≤", "right"),
                            ("tokens ≤", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    wanted = {node.key: node for node in nodes.values()}
    total = [0, 0, 0]
    for node in in_order({node.label: node for node in wanted.values()}):
        there = workspace.complete(node)
        traces, tokens = (0, 0) if there else cost(node.label)
        total = [total[0] + there, total[1] + traces, total[2] + tokens]
        table.add_row(node.label, node.key, "yes" if there else "no", f"{traces:,}" if traces else "",
                      f"{tokens:,}" if tokens else "")
    table.add_section()
    table.add_row(f"{len(wanted)} artifacts", "", f"{total[0]} there", f"{total[1]:,}", f"{total[2]:,}")
    return table
