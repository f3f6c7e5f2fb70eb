"""Tunix's contender in `launch.bench_train`, run by an environment with `google-tunix`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as weights
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput


class TimedTrainer(DPOTrainer):
    """A DPOTrainer that records when each step ends."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.ends = [time.perf_counter()]

    def _post_process_train_step(self, aux: Any) -> None:
        jax.block_until_ready(aux)
        self.ends.append(time.perf_counter())
        super()._post_process_train_step(aux)


def padded(rows: list[list[int]], size: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pads ids to [P, size]; returns them and their mask, both int32."""
    ids, mask = np.ones((len(rows), size), np.int32), np.zeros((len(rows), size), np.int32)
    for i, row in enumerate(rows):
        at = slice(size - len(row), size) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


def main(c: dict[str, Any]) -> dict[str, Any]:
    """Trains steps of `c["pairs"]` pairs with DPOTrainer.

    All are padded to the longest prompt and completion of the data.
    """
    folder = Path(c["folder"])
    h = json.loads((folder / "model" / "config.json").read_text())
    config = llama.ModelConfig(
        h["num_hidden_layers"],
        h["vocab_size"],
        h["hidden_size"],
        h["intermediate_size"],
        h["num_attention_heads"],
        h["head_dim"],
        h["num_key_value_heads"],
        int(c["rope_theta"]),
        h["rms_norm_eps"],
        weight_tying=True,
        remat_config=llama.RematConfig[c["remat"]],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    micro_batch, accumulate = c["pairs"] // c["accumulate"], c["accumulate"]
    prompt = max(len(r["prompt"]) for r in rows)
    answer = max(len(r[side]) for r in rows for side in ("chosen", "rejected"))

    def batch(pairs: list[dict[str, list[int]]]) -> TrainingInput:
        return TrainingInput(
            *padded([r["prompt"] for r in pairs], prompt, True),
            *padded([r["chosen"] for r in pairs], answer, False),
            *padded([r["rejected"] for r in pairs], answer, False),
        )

    with jax.set_mesh(mesh):
        policy, reference = (
            weights.create_model_from_safe_tensors(str(folder / "model"), config, mesh, jnp.float32)
            for _ in range(2)
        )
        trainer = TimedTrainer(
            policy,
            reference,
            optax.adamw(c["learning_rate"], weight_decay=0.0),
            DPOTrainingConfig(
                beta=c["beta"],
                eval_every_n_steps=10**6,
                max_steps=len(rows) // c["pairs"],
                gradient_accumulation_steps=accumulate if accumulate > 1 else None,
                pbar_description=None,
            ),
        )
        trainer.train(
            [batch(rows[at : at + micro_batch]) for at in range(0, len(rows), micro_batch)], None
        )
    ends = trainer.ends[::accumulate]
    return {"step_seconds": np.diff(ends).tolist(), "loss": [], "reference_seconds": 0.0}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
