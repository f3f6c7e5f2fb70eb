"""train: one arm and seed. Pairs join traces and reference log-probabilities; a policy folder comes out."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltapref_jax.config import ConfigError, MeshShape, Objective, Training
from deltapref_jax.mesh import is_first, make_mesh
from deltapref_jax.models.weights import export, load
from deltapref_jax.scoring.packing import Sample, capacity, pack
from deltapref_jax.stages.score import Sequences
from deltapref_jax.training.loop import Run, StepData, train
from deltapref_jax.training.state import Optimizer
from deltapref_jax.training.step import Examples
from deltapref_jax.workspace import Job

VERSION = 1


class Arm:
    """An arm's training data: groups of sequences with their references; step number to a step's data.

    A group is a pair (DPO), one example (KTO: both halves of every pair, labels mixed; SFT: the chosen traces).
    """

    def __init__(self, job: Job, sequences: Sequences, pairs: list[dict], reference: dict, mismatched: dict):
        self.kind = job.config["objective"]["kind"]
        self.training = Training(**job.config["training"])
        self.seed = job.config["seed"]
        self._sequences, self._reference, self._mismatched = sequences, reference, mismatched
        self.groups: list[list[tuple[str, str, float]]] = []  # (prompt, trace, desirable)
        for p in pairs:
            chosen, rejected = (p["prompt_id"], p["chosen_id"], 1.0), (p["prompt_id"], p["rejected_id"], 0.0)
            if self.kind in ("dpo", "dpo_norm"):
                self.groups.append([chosen, rejected])
            else:
                self.groups += [[chosen]] if self.kind == "sft" else [[chosen], [rejected]]
        self.dropped = self._drop_long()
        per_pair = 2 if self.kind == "kto" else 1
        self.batch = min(self.training.pairs_per_step * per_pair, len(self.groups))
        if not self.batch:
            raise ConfigError(f"All {self.dropped} pairs are longer than config.training.row_length "
                              f"({self.training.row_length} tokens); raise it.")
        epochs = -(-int(self.training.epochs * len(self.groups)) // self.batch)
        self.steps = self.training.steps if self.training.budget == "steps" else max(1, epochs)

    def _drop_long(self) -> int:
        """Drops groups with a sequence longer than a row, or refuses them; returns how many were dropped."""
        def long(group: list[tuple[str, str, float]]) -> bool:
            rows = [(prompt, trace) for prompt, trace, _ in group]
            if self.kind == "kto":
                rows += [(self._mismatched[trace][0], trace) for _, trace, _ in group]
            return any(len(self._sequences.sample(*row).tokens) > self.training.row_length for row in rows)

        kept = [group for group in self.groups if not long(group)]
        dropped = len(self.groups) - len(kept)
        if dropped and self.training.over_length == "error":
            raise ConfigError(f"{dropped} of {len(self.groups)} groups are longer than config.training.row_length "
                              f"({self.training.row_length} tokens); raise it, or set over_length to 'drop'.")
        self.groups = kept
        return dropped

    def members(self, step: int) -> list[int]:
        """Groups of a step: epochs are seeded permutations laid end to end."""
        n, found = len(self.groups), []
        orders: dict[int, np.ndarray] = {}
        for place in range(step * self.batch, (step + 1) * self.batch):
            epoch, at = divmod(place, n)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(n)
            found.append(int(orders[epoch][at]))
        return found

    def __call__(self, step: int) -> StepData:
        """The step's micro-batches, and KTO's baseline rows."""
        groups = [self.groups[i] for i in self.members(step)]
        flat = [member for group in groups for member in group]
        samples = [self._sequences.sample(prompt, trace) for prompt, trace, _ in flat]
        starts = np.cumsum([0] + [len(group) for group in groups])
        indices = [list(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        t = self.training
        micros = [(m.batch, self._examples(m.order, indices, flat))
                  for m in pack(samples, indices, t.rows, t.row_length)]
        baseline, extra = self._baseline(flat) if self.kind == "kto" else ([], 0)
        total = sum(int(s.targets.sum()) for s in samples) if self.kind == "sft" else len(groups)
        tokens = sum(len(s.tokens) for s in samples) + extra
        return StepData(micros, baseline, float(total), tokens, (step + 1) * self.batch / len(self.groups))

    def _examples(self, order: np.ndarray, indices: list[list[int]], flat: list[tuple[str, str, float]]) -> Examples:
        segment = {int(i): s for s, i in enumerate(order)}
        here = [group for group in indices if group[0] in segment]
        size = capacity(self.training.rows, self.training.row_length)
        columns: Any = np.zeros((4, size), np.float32)  # first_ref, second_ref, desirable, weight
        places = np.zeros((2, size), np.int32)
        for k, group in enumerate(here):
            for side, i in enumerate(group):
                places[side, k] = segment[i]
                columns[side, k] = 0.0 if self.kind == "sft" else self._reference[flat[i][1]]
            columns[2, k], columns[3, k] = flat[group[0]][2], 1.0
        return Examples(places[0], places[1], *columns)

    def _baseline(self, flat: list[tuple[str, str, float]]) -> tuple[list[tuple[Any, np.ndarray, np.ndarray]], int]:
        rows = [(self._mismatched[trace], trace) for _, trace, _ in flat]
        samples: list[Sample] = [self._sequences.sample(partner[0], trace) for partner, trace in rows]
        t, size, out = self.training, capacity(self.training.rows, self.training.row_length), []
        for micro in pack(samples, [[i] for i in range(len(samples))], t.rows, t.row_length):
            reference, weight = np.zeros(size, np.float32), np.zeros(size, np.float32)
            reference[: len(micro.order)] = [rows[i][0][1] for i in micro.order]
            weight[: len(micro.order)] = 1.0
            out.append((micro.batch, reference, weight))
        return out, sum(len(s.tokens) for s in samples)


def references(job: Job, wanted: str) -> tuple[dict[str, float], dict[str, tuple[str, float]]]:
    """Reference log-probabilities by trace, and (prompt, log-probability) of its mismatched row.

    Raises:
      ConfigError: a table was made by other weights than the reference that this arm names.
    """
    matched: dict[str, float] = {}
    mismatched: dict[str, tuple[str, float]] = {}
    for name, node in job.node.inputs.items():
        if not name.startswith("score/"):
            continue
        made = node.config["weights"]
        if made != wanted:
            raise ConfigError(f"The log-probabilities of {name.removeprefix('score/')!r} were made by the weights "
                              f"{made} and this arm's reference has the weights {wanted}; score the traces with the "
                              "reference.")
        for row in job.table(name).to_pylist():
            if row["logprob"] is None:
                continue
            if row["matched"]:
                matched[row["trace_id"]] = row["logprob"]
            else:
                mismatched[row["trace_id"]] = (row["prompt_id"], row["logprob"])
    return matched, mismatched


def train_arm(job: Job) -> None:
    """PAIR, TRACE, LOGPROB and PROMPT to metrics.jsonl, checkpoints/ and policy/ (a Hugging Face folder)."""
    c = job.config
    folder = Path(job.dir)
    with job.alone():
        model = load(job.local["student"]["path"], c["dtype"])
        pairs = job.table("pairs").to_pylist()
        needed = {p[side] for p in pairs for side in ("chosen_id", "rejected_id")}
        traces = [t for table in job.tables("sample").values() for t in table.to_pylist() if t["trace_id"] in needed]
        matched, mismatched = references(job, c["reference"])
        kind = c["objective"]["kind"]
        scored = [p for p in pairs if kind == "sft" or all(
            p[side] in matched and (kind != "kto" or p[side] in mismatched) for side in ("chosen_id", "rejected_id"))]
        arm = Arm(job, Sequences(model.text, job.table("prompts").to_pylist(), traces), scored, matched, mismatched)
        t = arm.training
        run = Run(Objective(**c["objective"]), arm.steps, t.rows, t.row_length, t.warmup, t.schedule,
                  optimizer=Optimizer(t.clip, t.weight_decay), checkpoint_every=t.checkpoint_every,
                  keep_checkpoints=t.keep_checkpoints)
        guard = c["reference"] == c["student"] and kind != "sft"
        params, counts = train(model.spec, model.state, arm, run, make_mesh(MeshShape(**job.local["mesh"])), folder,
                               job.node.label, c["dtype"], guard)
        if is_first():
            export(jax.device_get(params), model.spec, model.text, folder / "policy")
    job.stats |= counts | {"pairs": float(len(pairs)), "groups": float(len(arm.groups)), "steps": float(arm.steps),
                           "dropped_long": float(arm.dropped + (len(pairs) - len(scored)))}
    job.files += ["metrics.jsonl", "policy/*"]
