"""The nursery: tokenizer, small decoders on worked solutions, a judge on rated ones; all as Hugging Face folders."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltapref_jax.config import (
    DIMENSIONS,
    ConfigError,
    MeshShape,
    ModelZoo,
    Objective,
    SmallModel,
    choose,
)
from deltapref_jax.judging.rubric import RUBRIC, label_ids, trunk_and_suffixes
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import export, load
from deltapref_jax.scoring.packing import Sample, pack, sample
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import Problem, problem, solution
from deltapref_jax.text.template import Text
from deltapref_jax.training.data import StepData
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer
from deltapref_jax.training.step import Examples
from deltapref_jax.workspace import Job, Node

VERSION = 1
_TOKENIZER_TEXTS = 20_000


def make_tokenizer(vocab: int, folder: Path) -> None:
    """Trains the pupils' tokenizer on questions, solutions and the rubric, in the chat template's form."""

    def texts() -> Iterator[str]:
        for i in range(_TOKENIZER_TEXTS):
            p = problem(tuple(FAMILIES)[i % len(FAMILIES)], 2, -1, i)
            worked = solution(p, random.Random(i), 0.2)
            yield f"user\n{p.question}\nassistant\n{worked}\n"
            if i % 3 == 0:
                yield "".join((RUBRIC.trunk(p.question, worked), *RUBRIC.questions))

    build(texts(), vocab, folder)


def draw(pupil: SmallModel, rng: random.Random) -> Problem:
    """A problem of the pupil's curriculum; its seed keeps it apart from every study's questions (theirs are ≥ 0)."""
    return problem(
        rng.choice(pupil.tasks),
        rng.choice(pupil.difficulties),
        -1 - pupil.seed,
        rng.getrandbits(62),
    )


def solving(pupil: SmallModel, text: Text, rng: random.Random) -> Sample:
    """A question and a worked solution, careless at the pupil's error rate."""
    p = draw(pupil, rng)
    prompt = text.prompt_ids([{"role": "user", "content": p.question}])
    return sample(prompt, text.completion_ids(solution(p, rng, pupil.error_rate), ended=True))


def rating(pupil: SmallModel, text: Text, rng: random.Random) -> Sample:
    """A rubric prompt and its five labels, each in a branch of its own.

    Half of the solutions are careless, half are corrupted in one dimension. The label is the exact rating rounded at
    random to a neighbour, so that the expectation a judge learns is the rating.
    """
    p = draw(pupil, rng)
    if rng.random() < 0.5:
        worked = solution(p, rng, rng.random() * 0.8)
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
    return Sample(
        np.asarray(tokens, np.int32),
        np.asarray(targets),
        np.asarray(positions, np.int32),
        np.asarray(branches, np.int32),
    )


LESSONS = {"solve": solving, "judge": rating}


def lesson(pupil: SmallModel, text: Text, step: int) -> StepData:
    """Step `step` of a pupil's education: one micro-batch filled with fresh samples; a pure function of both."""
    rng = random.Random(f"{pupil.name}|{pupil.seed}|{step}")
    samples: list[Sample] = []
    room = int(0.93 * pupil.rows * pupil.row_length)
    while True:
        s = LESSONS[pupil.lesson](pupil, text, rng)
        room -= len(s.tokens)
        if room < 0:
            break
        if len(s.tokens) <= pupil.row_length:
            samples.append(s)
    if not samples:
        raise ConfigError(
            f"No sample of pupil {pupil.name!r} fits its row_length of {pupil.row_length} tokens; raise "
            "it."
        )
    micros = pack([[[s]] for s in samples], pupil.rows, pupil.row_length)[:1]
    batch, order = micros[0]
    blank = np.zeros(len(order), np.float32)
    most = pupil.rows * pupil.row_length // 16  # samples of a step, padded: one shape for all steps
    pad = (0, most - len(order))
    examples = Examples(
        np.pad(np.arange(len(order), dtype=np.int32), pad),
        np.zeros(most, np.int32),
        np.pad(blank, pad),
        np.pad(blank, pad),
        np.pad(blank, pad),
        np.pad(blank + 1, pad),
    )
    return StepData(
        [(batch, examples)],
        [],
        float(np.count_nonzero(batch.targets)),
        int(np.count_nonzero(batch.segments)),
        0.0,
    )


def grow(spec: ModelSpec, params: nnx.State, layers: int, seed: int) -> tuple[ModelSpec, nnx.State]:
    """The same function with more layers: new blocks on top whose outputs start at 0, so that they pass everything on.

    A judge grown from a solver has layers left to compare what it would have written with what stands there.
    """
    deeper = dataclasses.replace(spec, layers=layers)
    fresh = nnx.state(Decoder(deeper, rngs=nnx.Rngs(seed), dtype=jnp.float32))
    old, new = nnx.to_pure_dict(params), nnx.to_pure_dict(fresh)
    for name, array in new["blocks"].items():
        top = (
            jnp.zeros_like(array[spec.layers :]) if name in ("o", "down") else array[spec.layers :]
        )
        old["blocks"][name] = jnp.concatenate([old["blocks"][name], top])
    nnx.replace_by_pure_dict(fresh, old)
    return deeper, fresh


def raise_pupil(
    pupil: SmallModel, tokenizer: Path, base: Path | None, folder: Path, mesh: MeshShape
) -> dict[str, float]:
    """Trains one pupil and exports it, in bfloat16, to `folder/model`; returns counts."""
    text = Text.load(str(tokenizer))
    if base is not None:
        loaded = load(str(base))
        spec, params = loaded.spec, loaded.state
        if pupil.layers > spec.layers:
            spec, params = grow(spec, params, pupil.layers, pupil.seed)
    else:
        spec = ModelSpec(
            len(text.tokenizer),
            pupil.width,
            pupil.layers,
            pupil.heads,
            pupil.kv_heads,
            pupil.width // pupil.heads,
            pupil.mlp,
            max_positions=1024,
        )
        params = nnx.state(Decoder(spec, rngs=nnx.Rngs(pupil.seed), dtype=jnp.float32))
    run = Run(
        Objective(name=pupil.name, kind="sft", learning_rate=pupil.learning_rate),
        pupil.steps,
        pupil.rows,
        pupil.row_length,
        warmup=0.05,
        schedule="cosine",
        floor=0.1,
        optimizer=Optimizer(clip=1.0, weight_decay=0.01, b2=0.98),
        checkpoint_every=500,
    )
    params, counts = train(
        spec,
        params,
        lambda step: lesson(pupil, text, step),
        run,
        make_mesh(mesh),
        folder,
        f"nursery {pupil.name}",
    )
    export(params, spec, text, folder / "model", "bfloat16")
    (folder / "model" / "pupil.json").write_text(
        json.dumps(dataclasses.asdict(pupil), indent=2) + "\n"
    )
    return counts


def tokenizer(job: Job) -> None:
    """The pupils' tokenizer, as a folder."""
    make_tokenizer(job.config["vocab"], Path(job.dir / "model"))
    job.files += _files(job)


def pupil(job: Job) -> None:
    """One pupil, as a Hugging Face folder `model/`; inputs: the tokenizer, and the base if it has one."""
    fields = dict(job.config["pupil"])
    who = SmallModel(
        **fields | {"tasks": tuple(fields["tasks"]), "difficulties": tuple(fields["difficulties"])}
    )
    base = Path(job.path("base") / "model") if "base" in job.node.inputs else None
    with job.alone():
        job.stats |= raise_pupil(
            who,
            Path(job.path("tokenizer") / "model"),
            base,
            Path(job.dir),
            MeshShape(**job.local["mesh"]),
        )
    job.files += _files(job)


def _files(job: Job) -> list[str]:
    return sorted(f"model/{file.name}" for file in (job.dir / "model").iterdir())


def plan(nursery: ModelZoo) -> dict[str, Node]:
    """Nodes by label: `tokenizer`, and `pupil/<name>` in the order of the config.

    Raises:
      ConfigError: a pupil's task is no family of the synthetic world.
    """
    nodes = {"tokenizer": Node("tokenizer", "tokenizer", {"vocab": nursery.vocab}, version=VERSION)}
    for p in nursery.pupils:
        for task in p.tasks:
            choose(f"tasks of pupil {p.name!r}", task, FAMILIES)
        inputs = {"tokenizer": nodes["tokenizer"]} | (
            {"base": nodes[f"pupil/{p.base}"]} if p.base else {}
        )
        nodes[f"pupil/{p.name}"] = Node(
            "pupil",
            f"pupil/{p.name}",
            {"pupil": dataclasses.asdict(p)},
            inputs,
            {"mesh": dataclasses.asdict(nursery.mesh)},
            VERSION,
        )
    return nodes
