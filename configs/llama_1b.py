"""A student of 1B: Llama 3.2 1B learns from Llama 3.1 8B.

configs/by_size.py has the rest.

    python -m launch.preflight --config=configs/llama_1b.py --topology=v5e:2x4
    python -m launch.ablate --config=configs/llama_1b.py
"""

from configs.by_size import study
from deltapref_jax.config import Experiment


def get_config() -> Experiment:
    return study(
        name="llama_1b",
        question="What does a student of 1B learn from a generator eight times its size?",
        student="meta-llama/Llama-3.2-1B-Instruct",
        weak="meta-llama/Llama-3.2-1B-Instruct",
        strong="meta-llama/Llama-3.1-8B-Instruct",
        learning_rate=1e-6,
    )
