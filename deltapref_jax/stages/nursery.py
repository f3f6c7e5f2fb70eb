"""nursery: the small models that ship with the project, as Hugging Face folders.

Solvers learn from worked solutions, a judge from rated ones (`SmallModel.curriculum`).
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltapref_jax.artifacts.job import Job, Stats
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import (
    DIMENSIONS,
    ConfigError,
    MeshShape,
    ModelZoo,
    Objective,
    SmallModel,
    check_choice,
)
from deltapref_jax.judging.rubric import RUBRIC, label_ids, trunk_and_suffixes
from deltapref_jax.mesh import is_first, make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export
from deltapref_jax.models.parameters import block_parameters
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import load
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import PackedSample, pack, pack_one
from deltapref_jax.synthetic.beliefs import BELIEFS
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import Problem, is_lesson, problem, solution
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.training.data import StepData
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer
from deltapref_jax.training.step import Examples

_TOKENIZER_TEXTS = 20_000


class SmallTokenizer(Node, stage="tokenizer", version=3):
    """The tokenizer that all small models share, as the folder `model/`."""

    vocab: int

    def make(self, job: Job) -> None:
        """Trains it on questions, solutions and the rubric."""
        with job.output_dir("model") as folder:
            if is_first():
                make_tokenizer(self.vocab, folder)
        job.files.append("model/*")


class SmallModelFolder(Node, stage="small_model", version=3):
    """One small model, as the Hugging Face folder `model/`.

    Attributes:
      base: whose weights it starts from; None: random ones.
    """

    model: SmallModel
    tokenizer: SmallTokenizer
    base: "SmallModelFolder | None"
    mesh: MeshShape = runtime()

    def make(self, job: Job) -> None:
        """Trains, or continues a killed run, and exports in bfloat16."""
        text = ChatTokenizer.load(str(job.local_input(self.tokenizer, "model")))
        base = job.local_input(self.base, "model") if self.base else None
        job.stats |= train_small_model(self.model, text, base, job, self.mesh)
        job.files.append("model/*")


def plan(zoo: ModelZoo) -> dict[str, SmallModelFolder]:
    """The models by name, in the order of the config, so that a base stands before what needs it.

    Raises:
      ConfigError: a model's task is no family of the synthetic world, or a belief none of its
        beliefs.
    """
    tokenizer = SmallTokenizer(label=("tokenizer",), vocab=zoo.vocab)
    nodes: dict[str, SmallModelFolder] = {}
    for model in zoo.models:
        for task in model.tasks:
            check_choice(f"tasks of model {model.name!r}", task, FAMILIES)
        for belief in model.beliefs:
            check_choice(f"beliefs of model {model.name!r}", belief, BELIEFS)
        nodes[model.name] = SmallModelFolder(
            label=("model", model.name),
            model=model,
            tokenizer=tokenizer,
            base=nodes[model.base] if model.base else None,
            mesh=zoo.mesh,
        )
    return nodes


def make_tokenizer(vocab: int, folder: Path) -> None:
    """Trains the tokenizer on questions, solutions and the rubric, in the chat template's form."""

    def texts() -> Iterator[str]:
        for i in range(_TOKENIZER_TEXTS):
            p = problem(tuple(FAMILIES)[i % len(FAMILIES)], 2, -1, i)
            worked = solution(p, random.Random(i), 0.2, tuple(BELIEFS) if i % 2 else ())
            yield f"user\n{p.question}\nassistant\n{worked}\n"
            if i % 3 == 0:
                yield "".join((RUBRIC.trunk(p.question, worked), *RUBRIC.questions))

    build(texts(), vocab, folder)


def draw(model: SmallModel, rng: random.Random) -> Problem:
    """A problem of the model's curriculum that may be a lesson, see `world.is_lesson`.

    Its seed is negative, which keeps it apart from every study's questions.
    """
    task, difficulty = rng.choice(model.tasks), rng.choice(model.difficulties)
    while True:
        p = problem(task, difficulty, -1 - model.seed, rng.getrandbits(62))
        if is_lesson(p):
            return p


def solving(model: SmallModel, text: ChatTokenizer, rng: random.Random) -> PackedSample:
    """A question and a worked solution by the model's beliefs, careless at its error rate."""
    p = draw(model, rng)
    prompt = text.prompt_ids([{"role": "user", "content": p.question}])
    completion = text.completion_ids(solution(p, rng, model.error_rate, model.beliefs), ended=True)
    return pack_one(TokenSequence(np.asarray(prompt), np.asarray(completion)))


def rating(model: SmallModel, text: ChatTokenizer, rng: random.Random) -> PackedSample:
    """A rubric prompt and its five labels, each in a branch of its own.

    Half of the solutions are careless, or follow some of the beliefs, or both; half are corrupted
    in one dimension. The label is the exact rating rounded at random to a neighbour, so that the
    expectation a judge learns is the rating.
    """
    p = draw(model, rng)
    if rng.random() < 0.5:
        held = [name for name in model.beliefs if rng.random() < 0.5]
        careless = rng.random() * 0.8 if not held or rng.random() < 0.5 else 0.0
        worked = solution(p, rng, careless, held)
    else:
        worked = corrupt(p, rng.choice(DIMENSIONS), rng.randint(1, DEGREES), rng)
    exact = rate(p, worked)
    trunk, suffixes = trunk_and_suffixes(text, p.question, worked, DIMENSIONS)
    labels = label_ids(text)
    tokens, positions, branches = list(trunk), list(range(len(trunk))), [0] * len(trunk)
    targets = [False] * len(trunk)
    for b, (dimension, suffix) in enumerate(zip(DIMENSIONS, suffixes, strict=True)):
        label = int(exact[dimension] + rng.random())
        branch = [*suffix, labels[min(label, 5) - 1]]
        tokens += branch
        positions += range(len(trunk), len(trunk) + len(branch))
        branches += [b + 1] * len(branch)
        targets += [False] * len(suffix) + [True]
    return PackedSample(
        np.asarray(tokens, np.int32),
        np.asarray(targets),
        np.asarray(positions, np.int32),
        np.asarray(branches, np.int32),
    )


CURRICULA = {"solve": solving, "judge": rating}


def training_batch(model: SmallModel, text: ChatTokenizer, step: int) -> StepData:
    """One micro-batch of fresh samples for step `step`; a pure function of model and step."""
    # Python seeds from a string alike in every process.
    rng = random.Random(f"{model.name}|{model.seed}|{step}")
    samples: list[PackedSample] = []
    # Samples fill 93% of the rows, because only the first micro-batch is used and first fit leaves
    # some room in every row.
    room = int(0.93 * model.rows * model.row_length)
    while True:
        s = CURRICULA[model.curriculum](model, text, rng)
        room -= len(s.tokens)
        if room < 0:
            break
        if len(s.tokens) <= model.row_length:
            samples.append(s)
    if not samples:
        raise ConfigError(
            f"No sample of model {model.name!r} fits its row_length of {model.row_length} tokens; "
            "raise it."
        )
    batch, order = pack([[[s]] for s in samples], model.rows, model.row_length)[0]
    # all steps have one shape: the samples of a step are padded to the most that there can be
    most = model.rows * model.row_length // 16
    first, weight = np.zeros(most, np.int32), np.zeros(most, np.float32)
    first[: len(order)] = np.arange(len(order))
    weight[: len(order)] = 1.0
    blank = np.zeros(most, np.float32)
    examples = Examples(first, np.zeros(most, np.int32), blank, blank, blank, weight)
    targets = float(np.count_nonzero(batch.targets))
    return StepData([(batch, examples)], [], targets, int(np.count_nonzero(batch.segments)), 0.0)


def grow(spec: ModelSpec, params: nnx.State, layers: int, seed: int) -> tuple[ModelSpec, nnx.State]:
    """The same function with more layers on top, whose outputs start at 0.

    A judge grown from a solver has layers left to compare what it would have written with what
    stands there.
    """
    deeper = dataclasses.replace(spec, layers=layers)
    grown = nnx.state(Decoder(deeper, rngs=nnx.Rngs(seed), dtype=jnp.float32))
    old, new = nnx.to_pure_dict(params), nnx.to_pure_dict(grown)
    for name, array in new["blocks"].items():
        top = array[spec.layers :]
        # With output projections of 0 a new layer adds nothing to the residual stream.
        residual = block_parameters(spec)[name].init == "residual"
        top = jnp.zeros_like(top) if residual else top
        old["blocks"][name] = jnp.concatenate([old["blocks"][name], top])
    nnx.replace_by_pure_dict(grown, old)
    return deeper, grown


def train_small_model(
    model: SmallModel, text: ChatTokenizer, base: Path | None, job: Job, mesh: MeshShape
) -> Stats:
    """Trains one model and exports it, in bfloat16, to the folder `model`; returns counts."""
    if base is not None:
        loaded = load(str(base))
        spec, params = loaded.spec, loaded.state
        if model.layers > spec.layers:
            spec, params = grow(spec, params, model.layers, model.seed)
    else:
        spec = ModelSpec(
            len(text.tokenizer),
            model.width,
            model.layers,
            model.heads,
            model.kv_heads,
            model.width // model.heads,
            model.mlp,
            max_positions=1024,
        )
        params = nnx.state(Decoder(spec, rngs=nnx.Rngs(model.seed), dtype=jnp.float32))
    run = Run(
        Objective(name=model.name, kind="sft", learning_rate=model.learning_rate),
        model.steps,
        model.rows,
        model.row_length,
        warmup=0.05,
        schedule="cosine",
        floor=0.1,
        optimizer=Optimizer(clip=1.0, weight_decay=0.01, b2=0.98),
        checkpoint_every=500,
    )
    params, counts = train(
        spec,
        params,
        lambda step: training_batch(model, text, step),
        run,
        make_mesh(mesh),
        job.dir,
        f"nursery {model.name}",
        check_lease=job.check_lease,
    )
    with job.output_dir("model") as folder:
        export(params, spec, text, folder, "bfloat16")
        if is_first():
            recipe = json.dumps(dataclasses.asdict(model), indent=2)
            (folder / "recipe.json").write_text(recipe + "\n")
    return counts
