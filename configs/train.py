"""One arm from a file of pairs: a small DPO run; name the data and the student by flag.

    python -m launch.train --config=configs/train.py --config.data.path=pairs.parquet \\
        --config.student.path=FOLDER
"""

from deltapref_jax.config import Objective, PairTraining, Training


def get_config() -> PairTraining:
    return PairTraining(
        objective=Objective(name="dpo", kind="dpo", beta=0.1, learning_rate=5e-7),
        training=Training(
            pairs_per_step=32,
            budget="epochs",
            epochs=1.0,
            rows=8,
            row_length=2048,
            checkpoint_every=50,
        ),
    )
