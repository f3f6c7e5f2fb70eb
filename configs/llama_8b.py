"""A student of 8B: Llama 3.1 8B, with rejected traces of Llama 3.2 1B.

The size of the student of arXiv 2604.08723; configs/by_size.py has the rest.

    python -m launch.preflight --config=configs/llama_8b.py --topology=v5e:4x4
    python -m launch.ablate --config=configs/llama_8b.py
"""

from configs.by_size import study
from deltapref_jax.config import Experiment


def get_config() -> Experiment:
    return study(
        name="llama_8b",
        question="What does a student of 8B learn from its own traces against those of 1B?",
        student="meta-llama/Llama-3.1-8B-Instruct",
        weak="meta-llama/Llama-3.2-1B-Instruct",
        strong="meta-llama/Llama-3.1-8B-Instruct",
        learning_rate=5e-7,
    )
