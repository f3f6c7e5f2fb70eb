"""evaluate: a model's answers to the questions of one suite, checked, sample by sample."""

from collections.abc import Sequence
from typing import Self

import jax

from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node, runtime
from deltapref_jax.config import MeshShape, Model, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.weights import load
from deltapref_jax.progress import Counter
from deltapref_jax.records import Prompt, Result, digest, to_table
from deltapref_jax.sampling.engine import Completion, Engine, Request
from deltapref_jax.stages.prompts import PromptTable
from deltapref_jax.stages.sample import asked
from deltapref_jax.stages.train import Policy
from deltapref_jax.stages.verify import verdict

# Of the draws: every policy meets the same uniforms, so that differences between policies pair.
_IDENTITY = digest("evaluation")


class ResultTable(Node, stage="evaluate", version=5):
    """RESULT: one model on one suite. Missing suites of one model are sampled in one pass.

    Attributes:
      policy: what is evaluated, where it was trained here; None: the model at `model.path`.
      weights: hash of that model's weights; "" of a trained policy.
      temperature: of the suite, or of the generator whose capability is measured; so are `top_p`,
        `top_k`, `system` and `prefix` (a policy is asked plainly).
      model: of a trained policy only its dtype counts.
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

    def batch(self) -> object:
        """All suites of one model: slots stay filled, and its weights are loaded once."""
        model = self.policy or (self.weights, self.model.path, self.model.dtype, self.sampling)
        return model, self.mesh

    @classmethod
    def make_batch(cls, work: Sequence[tuple[Self, Job]]) -> None:
        """Answers and checks the questions of all suites.

        Raises:
          ValueError: a question is longer than config.sampling.max_prompt, or has no checker.
        """
        first, job = work[0]
        questions = [each_job.rows(Prompt, node.questions) for node, each_job in work]
        # Questions are checked before a model is loaded.
        for (node, _), prompts in zip(work, questions, strict=True):
            node._check_checkers(prompts)
        trained = first.policy and job.local_input(first.policy, "policy")
        path = str(trained or first.model.path)
        model = load(path, dtype=first.model.dtype, params=first.model.dtype)
        mesh = make_mesh(first.mesh, jax.local_devices())
        engine = Engine(model, first.sampling, first.seed, _IDENTITY, mesh)
        requests = [
            node._request(prompt, model.text.prompt_ids(asked(prompt, node.system, node.prefix)))
            for (node, _), prompts in zip(work, questions, strict=True)
            for prompt in prompts
        ]
        total = sum(request.samples for request in requests)
        with Counter(first.name, total, "traces", job.show) as counter:
            completions = iter(engine.generate(requests, counter.advance))
        tokens = engine.stats["tokens"]
        for (node, each_job), prompts in zip(work, questions, strict=True):
            answered = [(prompt, next(completions)) for prompt in prompts]
            results = node._results(answered)
            # The seconds and counts of the pass are shared out by tokens.
            each_job.share = sum(result.tokens for result in results) / max(tokens, 1)
            each_job.stats |= {name: each_job.share * n for name, n in engine.stats.items()}
            each_job.write(to_table(Result, results))

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

    def _results(self, answered: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[Result]:
        return [
            Result(
                suite=self.suite,
                domain=self.domain,
                task=prompt.task,
                prompt_id=prompt.prompt_id,
                sample=sample,
                correct=bool(verdict(prompt, "", completion.text, completion.finish).correct),
                finish=completion.finish,
                tokens=len(completion.tokens),
            )
            for prompt, completions in answered
            for sample, completion in enumerate(completions)
        ]
