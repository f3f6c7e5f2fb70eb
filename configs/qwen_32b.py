"""A student of 32B: Qwen3 32B, with rejected traces of Qwen3 8B.

configs/by_size.py has the rest.

    python -m launch.preflight --config=configs/qwen_32b.py --topology=v5p:4x4x4
    python -m launch.ablate --config=configs/qwen_32b.py
"""

from configs.by_size import study
from deltapref_jax.config import Experiment


def get_config() -> Experiment:
    return study(
        name="qwen_32b",
        question="Does a delta in scale still teach a student of 32B?",
        student="Qwen/Qwen3-32B",
        weak="Qwen/Qwen3-8B",
        strong="Qwen/Qwen3-32B",
        learning_rate=1e-7,
        slots=128,
    )
