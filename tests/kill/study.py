"""A toy study for the kill harness: every stage, real models of a few thousand parameters."""

import json
import pathlib

from flax import nnx

from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import problem, solution
from deltapref_jax.text.template import ChatTokenizer

CONFIG = """
from deltapref_jax.config import *

FINISHES = ("eos", "stop", "length")


SUMS = {root!r} + "/sums.jsonl"


def suite(name, domain, prompts):
    return Suite(name=name, domain=domain, prompts=prompts, samples=2)


def get_config():
    return Experiment(
        name="toy",
        student=Model({root!r} + "/model"),
        prompts=(Prompts(tasks=("chain",), count=12, difficulty=1),),
        generators=(Generator(name="weak"), Generator(name="strong", temperature=0.5)),
        judges=(Judge(name="exact"), Judge(name="model", kind="model", dimensions=("factuality",))),
        objectives=(Objective(name="dpo"), Objective(name="kto", kind="kto")),
        arms=(
            Arm(name="dpo", chosen="strong", rejected="weak", seeds=(0, 1)),
            Arm(name="kto", chosen="strong", rejected="weak", objective="kto"),
            Arm(
                name="top", chosen="strong", rejected="weak", keep="top", judge="model",
                fraction=0.5,
            ),
        ),
        suites=(
            suite("chain", "in", Prompts(tasks=("chain",), count=4, difficulty=1, seed=9)),
            suite("sums", "out", Prompts(kind="jsonl", path=SUMS, checker="math")),
        ),
        training=Training(
            pairs_per_step=4, steps=6, rows=4, row_length=192, checkpoint_every=2,
            finishes=FINISHES,
        ),
        sampling=Sampling(max_prompt=144, max_tokens=8, slots=8, chunk=4, shard=4),
        scoring=Scoring(rows=2, row_length=640, shard=6),
    )
"""


def write_study(root: pathlib.Path) -> None:
    """Writes a model, questions and `study.py` into `root`."""
    problems = [problem(name, 1, 7, i) for name in FAMILIES for i in range(20)]
    build([f"user\n{p.question}\nassistant\n{solution(p)}\n" for p in problems], 320, root / "text")
    text = ChatTokenizer.load(str(root / "text"))
    spec = ModelSpec(len(text.tokenizer), 8, 2, 2, 1, 4, 16, max_positions=1024)
    export(nnx.state(Decoder(spec, rngs=nnx.Rngs(0))), spec, text, root / "model")
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "study.py").write_text(CONFIG.format(root=str(root)))
