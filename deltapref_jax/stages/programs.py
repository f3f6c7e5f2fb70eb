"""The compiled programs of a study, with abstract arguments: no device and no weights are needed.

`launch.preflight` compiles them for topologies that are not there, and the tests trace them.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jax.sharding import Mesh

from deltapref_jax.config import (
    OBJECTIVE_KINDS,
    REFERENCE_MARGIN,
    STUDENT,
    Experiment,
    MeshShape,
    Model,
    Objective,
    PairTraining,
    Scoring,
    Training,
    mesh_of,
    model_of,
    reference_of,
)
from deltapref_jax.judging.scorer import label_program
from deltapref_jax.mesh import platform_of, rows_of
from deltapref_jax.models.attention.dispatch import shares_prompts
from deltapref_jax.models.flops import forward_flops, training_flops
from deltapref_jax.models.lora import adapters
from deltapref_jax.models.memory import (
    sampling_memory,
    scoring_memory,
    trained_parameters,
    training_memory,
)
from deltapref_jax.models.program import Program
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.sampling.plan import Plan
from deltapref_jax.scoring.logprobs import score_program
from deltapref_jax.stages.meshes import SpecOf
from deltapref_jax.stages.micro_batches import fill_in
from deltapref_jax.stages.train import run_of
from deltapref_jax.training.shapes import step_programs

Meshes = Callable[[MeshShape, bool], Mesh]
"""A shape, and whether it is one of all devices or else of those of one host, to a mesh."""

_RECOMPUTED = {"none": 0.0, "projections": 0.0, "attention": 0.9, "block": 1.0}
"""Matrix products of a forward pass that the backward pass computes again, by remat: all but those
whose outputs are kept; of "attention" also not its own and that of the last projection."""


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """A program of a study.

    Attributes:
      stage: "train", "score", "judge" or "sample".
      of: the objective's kind, or the name of the judge, or the names of generators of one model.
      name: of the program within its stage.
      program: the function and its abstract arguments.
      mesh: that it runs on.
      spec: of its model.
      dtype: of the computation.
      memory: bytes of a device that the whole stage needs, by formula (`models.memory`).
      tokens: that one call reads or writes at most, over all devices of the mesh.
      flops: of the model's matrix products in one call, over all devices of the mesh.
      executed: the same with what is computed again, and with the tokens that pad rows.
      trained: parameters that a training step trains.
    """

    stage: str
    of: str
    name: str
    program: Program
    mesh: Mesh
    spec: ModelSpec
    dtype: str
    memory: float
    tokens: int = 0
    flops: float = 0.0
    executed: float = 0.0
    trained: int = 0

    @property
    def label(self) -> str:
        """Such as "train dpo: gradient"."""
        return f"{self.stage} {self.of}: {self.name}"


def study_programs(e: Experiment, spec_of: SpecOf, meshes: Meshes) -> list[StageProgram]:
    """Every program that a study compiles, at its largest shapes; each model and shape once.

    Args:
      e: validated, with the meshes of `fit_meshes`.
      spec_of: gives the sizes of models.
      meshes: makes meshes.
    """
    longest, answer = e.sampling.longest, e.sampling.max_tokens
    used = {arm.objective for arm in e.arms}
    objectives = [o for o in e.objectives if o.name in used] or list(e.objectives)
    found = list(_training(e.training, objectives, e.student, longest, answer, spec_of, meshes))
    reference = reference_of(e.student, e.reference)
    by_margin = any(arm.by == REFERENCE_MARGIN for arm in e.arms)
    if by_margin or any(OBJECTIVE_KINDS[o.kind].reference for o in objectives):
        found += _scoring(e.scoring, reference, longest, answer, spec_of, meshes)
    for judge in e.judges:
        if judge.kind == "model":
            mesh = meshes(mesh_of(judge.mesh, e.scoring.mesh), True)
            model = model_of(e, judge.model)
            shape = dataclasses.replace(e.scoring, rows=rows_of(e.scoring.rows, mesh.shape))
            spec = spec_of(model.place).quantised(model.quantization)
            program = label_program(spec, model.dtype, shape, mesh)
            # A row is one trace at most, which has a label for every dimension.
            labels = shape.rows * len(judge.dimensions)
            found.append(_judging(judge.name, program, spec, model.dtype, shape, mesh, labels))
    # Generators that differ in what is asked alone share their programs. The fewer samples a prompt
    # has, the more prompts wait for slots; all models but the judges' answer the suites too.
    suites = [suite.samples for suite in e.suites]
    asked: dict[tuple[str, str, str, Mesh, int, bool], list[str]] = {}
    for g in e.generators:
        mesh = meshes(mesh_of(g.mesh, e.sampling.mesh), False)
        model = model_of(e, g.model)
        filtered = g.top_k > 0 or g.top_p < 1
        samples = min([g.samples, *suites])
        key = model.place, model.dtype, model.quantization, mesh, samples, filtered
        asked.setdefault(key, []).append(g.name)
    if suites:
        mesh = meshes(e.sampling.mesh, False)
        key = e.student.place, e.student.dtype, "", mesh, min(suites), False
        asked.setdefault(key, []).append(STUDENT)
    for (place, dtype, quantization, mesh, samples, filtered), names in asked.items():
        plan = Plan(spec_of(place).quantised(quantization), e.sampling, mesh, dtype)
        found += _sampling(", ".join(names), plan, plan.programs(filtered, samples))
    return found


def pair_programs(p: PairTraining, spec_of: SpecOf, meshes: Meshes) -> list[StageProgram]:
    """Every program of a training from a file of pairs; arguments as in `study_programs`."""
    t, longest = p.training, p.training.row_length
    found = list(_training(t, [p.objective], p.student, longest, longest, spec_of, meshes))
    if OBJECTIVE_KINDS[p.objective.kind].reference:
        scoring = Scoring(t.rows, t.row_length, mesh=t.mesh)
        reference = reference_of(p.student, p.reference)
        found += _scoring(scoring, reference, longest, longest, spec_of, meshes)
    return found


def _training(
    t: Training,
    objectives: list[Objective],
    student: Model,
    longest: int,
    answer: int,
    spec_of: SpecOf,
    meshes: Meshes,
) -> Iterator[StageProgram]:
    """Of every kind of objective; what all kinds share is listed with the first."""
    spec, mesh = spec_of(student.place), meshes(t.mesh, True)
    t = fill_in(t, [longest], mesh.shape, spec, student.dtype)
    split = mesh.shape["context"] > 1
    branched = shares_prompts(platform_of(mesh), split, t.row_length, spec)
    positions, targets = packed_positions(t.rows, t.row_length, longest, answer)
    lora = adapters(t.lora, spec)
    whole = _padded(positions, t.rows * t.row_length)
    forward, padded = (forward_flops(spec, p, targets, lora) for p in (positions, whole))
    both = training_flops(spec, positions, targets, lora)
    again = _RECOMPUTED[t.remat] * padded
    memory = training_memory(spec, t, student.dtype, MeshShape(**mesh.shape))
    for kind, objective in {o.kind: o for o in objectives}.items():
        run = run_of(t, objective, t.steps, seed=0)
        for name, program in step_programs(spec, run, mesh, student.dtype, branched).items():
            work = {
                "gradient": (both, training_flops(spec, whole, targets, lora) + again),
                "logprobs": (forward, padded),
            }
            flops, executed = work.get(name, (0.0, 0.0))
            tokens = len(positions) if flops else 0
            yield StageProgram(
                "train",
                kind,
                name,
                program,
                mesh,
                spec,
                student.dtype,
                memory,
                tokens,
                flops,
                executed,
                trained_parameters(spec, t),
            )


def _scoring(
    s: Scoring, model: Model, longest: int, answer: int, spec_of: SpecOf, meshes: Meshes
) -> list[StageProgram]:
    spec, mesh = spec_of(model.place), meshes(s.mesh, True)
    s = dataclasses.replace(s, rows=rows_of(s.rows, mesh.shape))
    split = mesh.shape["context"] > 1
    branched = shares_prompts(platform_of(mesh), split, s.row_length, spec)
    program = score_program(spec, model.dtype, s.rows, s.row_length, mesh, branched)
    positions, targets = packed_positions(s.rows, s.row_length, longest, answer)
    whole = _padded(positions, s.rows * s.row_length)
    shape = MeshShape(**mesh.shape)
    return [
        StageProgram(
            "score",
            "reference",
            "logprobs",
            program,
            mesh,
            spec,
            model.dtype,
            scoring_memory(spec, s.rows, s.row_length, model.dtype, shape),
            len(positions),
            forward_flops(spec, positions, targets),
            forward_flops(spec, whole, targets),
        )
    ]


def _judging(
    name: str, program: Program, spec: ModelSpec, dtype: str, s: Scoring, mesh: Mesh, labels: int
) -> StageProgram:
    positions, _ = packed_positions(s.rows, s.row_length, s.row_length, 0)
    flops = forward_flops(spec, positions, labels)
    shape = MeshShape(**mesh.shape)
    memory = scoring_memory(spec, s.rows, s.row_length, dtype, shape)
    tokens = len(positions)
    return StageProgram(
        "judge", name, "labels", program, mesh, spec, dtype, memory, tokens, flops, flops
    )


def _sampling(name: str, plan: Plan, programs: dict[str, Program]) -> Iterator[StageProgram]:
    s = plan.sampling
    prompts = np.tile(np.arange(s.max_prompt), plan.prefill_rows)
    whole = _padded(prompts, plan.prefill_rows * plan.prefill_lengths[-1])
    # Slots are refilled one by one, so that traces of all lengths are decoded beside each other.
    middle = s.max_prompt + s.max_tokens // 2
    drawn = np.full(s.slots * s.chunk, middle)
    prefill, padded = (forward_flops(plan.spec, p, 0) for p in (prompts, whole))
    decode = _decode_flops(plan.spec, drawn)
    work = {
        "prefill": (len(prompts), prefill, padded),
        "decode": (len(drawn), decode, decode),
    }
    dtype, shape = str(plan.dtype), MeshShape(**plan.mesh.shape)
    memory = sampling_memory(plan.spec, s.slots, plan.positions, dtype, shape)
    for program_name, program in programs.items():
        tokens, flops, executed = work.get(program_name, (0, 0.0, 0.0))
        yield StageProgram(
            "sample",
            name,
            program_name,
            program,
            plan.mesh,
            plan.spec,
            dtype,
            memory,
            tokens,
            flops,
            executed,
        )


def _decode_flops(spec: ModelSpec, positions: np.ndarray) -> float:
    """FLOPs of one new token at each position: all keys are multiplied, with no causal half."""
    inner = spec.heads * spec.head_width
    seen = [float(np.minimum(positions + 1, kind.window or np.inf).sum()) for kind in spec.kinds]
    # At position 0 a token sees one key; the rest of what it sees is added.
    alone = forward_flops(spec, np.zeros(len(positions), int), len(positions))
    return alone + 4.0 * inner * (sum(seen) - len(positions) * len(seen))


def packed_positions(
    rows: int, row_length: int, longest: int, answer: int
) -> tuple[np.ndarray, int]:
    """Positions of the tokens of full rows, and the number of targets among them.

    Rows hold as many sequences of the longest length as fit, and one where none does.

    Args:
      rows: B.
      row_length: L.
      longest: tokens of a sequence.
      answer: of them targets.
    """
    length = min(longest, row_length)
    count = rows * (row_length // length)
    return np.tile(np.arange(length), count), count * min(answer, length)


def _padded(positions: np.ndarray, count: int) -> np.ndarray:
    """`positions` and those of the padding of a batch of `count` tokens.

    Weights multiply padding as they multiply other tokens, and no tile of attention is computed for
    it: each is a sequence of its own.
    """
    return np.pad(positions, (0, count - len(positions)))
