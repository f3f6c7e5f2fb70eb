"""evaluate: a model's answers to the questions of one suite, checked, sample by sample."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jax

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.artifacts.shards import Made, Pass, Shards, Stats, make_shards
from deltapref_jax.config import ADDED, ConfigError, MeshShape, Model, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import open_model
from deltapref_jax.records import Prompt, Result, Verdict, digest, to_table
from deltapref_jax.sampling.engine import Completion, Engine, Request
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import asked, marked
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.verify import verdict

# Of the draws: every policy meets the same uniforms, so that differences between policies pair.
_IDENTITY = digest("evaluation")


class ResultTable(Node, stage="evaluate", version=8, sharded=True):
    """RESULT: one model on one suite. The missing suites of one model share one engine.

    An answer is a function of seed, model, question and sample index; which shard it is in, and who
    makes that, change it by rounding at most.

    Attributes:
      policy: what is evaluated, where it was trained here; None: the model at `model.path`.
      weights: hash of that model's weights; "" of a trained policy.
      domain: that averages the suite; "" of a second read-out.
      temperature: of the suite, or of the generator whose capability is measured; so are `top_p`,
        `top_k`, `system` and `prefix` (a policy is asked plainly).
      model: of a trained policy only its dtype counts.
      checkers: hash of the code of every checker that is the user's own (`callables.code_hash`).
    """

    questions: PromptTable
    policy: Policy | None
    weights: str
    suite: str
    domain: str
    samples: int
    temperature: float
    top_p: float
    top_k: int
    system: str
    prefix: str
    sampling: Sampling
    seed: int
    model: Model
    mesh: MeshShape = runtime()
    checkers: Mapping[str, str] = dataclasses.field(default_factory=dict, metadata=ADDED)

    def batch(self) -> object:
        """All suites of one model: its weights are loaded once, and its slots stay filled."""
        model = self.policy or (self.weights, self.model.place)
        return model, self.model.dtype, self.model.quantization, self.sampling, self.mesh

    @classmethod
    def make_batch(cls, work: Sequence[tuple[Self, Job]]) -> None:
        """Answers and checks the questions of all suites, `sampling.shard` of them in one pass.

        A suite has shards of so many questions; shards of small suites are answered in one pass, so
        that slots stay filled. The seconds and counts of a pass are shared out by tokens.

        Raises:
          ValueError: a question is longer than config.sampling.max_prompt, or has no checker;
            nothing has been sampled.
        """
        size = work[0][0].sampling.shard
        questions: dict[ResultTable, list[Prompt]] = {
            node: job.rows(Prompt, node.questions) for node, job in work
        }
        # Questions are checked before a model is loaded.
        for node, prompts in questions.items():
            node._check_checkers(prompts)
        # The model is loaded with the first shard that has to be made, and serves all of them.
        sampler = functools.cache(lambda: _sampler(*work[0], questions))
        suites: dict[Shards, ResultTable] = {
            node._shards(job, len(questions[node])): node for node, job in work
        }

        def make(chosen: Pass, advance: Callable[[int], None]) -> list[Made]:
            engine, requests = sampler()
            parts = [(suites[shards], slice(i * size, (i + 1) * size)) for shards, i in chosen]
            # Counts are those of one pass.
            engine.stats.clear()
            asked_now = [request for node, part in parts for request in requests[node][part]]
            answers = iter(engine.generate(asked_now, advance))
            results = [
                node._results([(prompt, next(answers)) for prompt in questions[node][part]])
                for node, part in parts
            ]
            model = work[0][0].model  # of all nodes
            return [_shard(rows, model, engine.stats) for rows in results]

        make_shards(list(suites), make, size)

    def _shards(self, job: Job, questions: int) -> Shards:
        size = self.sampling.shard
        sizes = [min(size, questions - start) for start in range(0, questions, size)]
        return Shards(job, sizes, questions * self.samples)

    def _check_checkers(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not prompt.checker:
                raise ValueError(
                    f"Question {prompt.prompt_id} of suite {self.suite!r} has no checker; set the "
                    "checker of the suite's prompts."
                )

    def _request(self, prompt: Prompt, tokens: Sequence[int]) -> Request:
        return Request(
            prompt.prompt_id, tokens, self.samples, self.temperature, self.top_p, self.top_k
        )

    def _verdict(self, prompt: Prompt, sample: int, completion: Completion) -> Verdict:
        where = (
            f"sample {sample} of question {prompt.prompt_id} by {self.name.rpartition('/')[0]} in "
            f"suite {self.suite!r}"
        )
        said = verdict(prompt, "", completion.text, completion.finish, where)
        if said.correct is None:
            raise ConfigError(
                f"{prompt.checker} returned None for {where}; a suite counts answers that are "
                "right, so that its checker returns True or False."
            )
        return said

    def _results(self, answered: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[Result]:
        checked = [
            (prompt, sample, completion, self._verdict(prompt, sample, completion))
            for prompt, completions in answered
            for sample, completion in enumerate(completions)
        ]
        return [
            Result(
                suite=self.suite,
                domain=self.domain,
                task=prompt.task,
                prompt_id=prompt.prompt_id,
                sample=sample,
                text=completion.text,
                answer=said.answer,
                correct=said.correct is True,
                finish=completion.finish,
                logprob=completion.logprob,
                tokens=len(completion.tokens),
            )
            for prompt, sample, completion, said in checked
        ]


def _shard(results: list[Result], model: Model, stats: Stats) -> Made:
    """One shard with its part of what a pass took."""
    tokens = sum(result.tokens for result in results)
    share = tokens / max(stats["tokens"], 1)
    own = {
        "tokens": float(tokens),
        "truncated": float(sum(result.finish == "length" for result in results)),
    }
    return Made(
        marked(to_table(Result, results), model),
        {k: share * n for k, n in stats.items()} | own,
        share,
    )


def _sampler(
    node: ResultTable, job: Job, questions: Mapping[ResultTable, Sequence[Prompt]]
) -> tuple[Engine, dict[ResultTable, list[Request]]]:
    """The engine of a node's model, and the requests of every suite, whose lengths are checked."""
    path = job.local_input(node.policy, "policy") if node.policy else node.model.place
    dtype, quantization = node.model.dtype, node.model.quantization
    model = open_model(str(path), dtype=dtype, params=dtype, quantization=quantization)
    # Every process answers shards of its own, on its own devices.
    mesh = make_mesh(node.mesh, jax.local_devices())
    engine = Engine(model, node.sampling, node.seed, _IDENTITY, mesh)
    requests = {
        suite: [
            suite._request(prompt, model.text.prompt_ids(asked(prompt, suite.system, suite.prefix)))
            for prompt in prompts
        ]
        for suite, prompts in questions.items()
    }
    for of_suite in requests.values():
        engine.check(of_suite)
    return engine, requests
