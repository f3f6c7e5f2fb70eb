"""A generator with experts: Qwen3 30B-A3B writes and judges for a student of 8B.

configs/by_size.py has the rest.

    python -m launch.preflight --config=configs/qwen_30b_a3b.py --topology=v6e:2x4
    python -m launch.ablate --config=configs/qwen_30b_a3b.py
"""

from configs.by_size import study
from deltapref_jax.config import Experiment


def get_config() -> Experiment:
    return study(
        name="qwen_30b_a3b",
        question="What does a student of 8B learn from a generator of experts?",
        student="Qwen/Qwen3-8B",
        weak="Qwen/Qwen3-8B",
        strong="Qwen/Qwen3-30B-A3B",
        learning_rate=5e-7,
        slots=128,
    )
