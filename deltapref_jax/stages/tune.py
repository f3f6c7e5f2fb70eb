"""tune: the learning rate of an objective, by the answers of policies that tried several."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltapref_jax.analysis import statistics as st
from deltapref_jax.artifacts.job import Job
from deltapref_jax.artifacts.node import Node
from deltapref_jax.records import RateTrial, to_table
from deltapref_jax.stages.evaluate import ResultTable


class RateTable(Node, stage="tune", version=1):
    """RATE_TRIAL: every rate that was tried, its accuracy on the tuning questions, and the choice.

    Attributes:
      rates: that were tried, ascending.
      results: of the policy of every rate, by the rate as text and the tuning suite.
    """

    rates: tuple[float, ...]
    results: Mapping[str, Mapping[str, ResultTable]]

    def make(self, job: Job) -> None:
        """Chooses the rate of the highest mean accuracy over suites, the lowest of equal ones."""
        answers = [
            pa.concat_tables(job.tables(self.results[f"{rate:g}"]).values()) for rate in self.rates
        ]
        # No domain averages a tuning suite, so the domain of its results is "".
        accuracies = [st.accuracy(table, "") for table in answers]
        best = int(np.argmax([accuracy.value for accuracy in accuracies]))
        trials = [
            RateTrial(rate, len(pc.unique(table["prompt_id"])), *accuracy, chosen=i == best)
            for i, (rate, table, accuracy) in enumerate(
                zip(self.rates, answers, accuracies, strict=True)
            )
        ]
        job.write(to_table(RateTrial, trials))
