"""TRL's contender in `launch.bench_train`, run by an environment with `trl` and `torch`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


class Clock(TrainerCallback):
    """Records the seconds and the loss of every step."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock before the data of the first step are collated."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Records the seconds of a step, after its optimizer update."""
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now

    def on_log(self, *_: Any, **more: Any) -> None:
        """Records the loss, which is logged at every step."""
        if "loss" in more["logs"]:
            self.losses.append(more["logs"]["loss"])


def words(ids: list[int], end: str = "") -> str:
    """Returns ids as words of the benchmark's tokenizer."""
    return " ".join([*(f"w{i}" for i in ids), end]).strip()


def main(c: dict[str, Any]) -> dict[str, Any]:
    """Trains steps of `c["pairs"]` pairs with DPOTrainer or KTOTrainer, from text as users do."""
    torch.set_num_threads(c["threads"])
    gpu = torch.cuda.is_available()
    folder = Path(c["folder"])
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    kto = c["kind"] == "kto"
    pairs: list[dict[str, Any]] = [
        {
            "prompt": words(r["prompt"]) + " ",
            "chosen": words(r["chosen"][:-1], "</s>"),
            "rejected": words(r["rejected"][:-1], "</s>"),
        }
        for r in rows
    ]
    if kto:
        pairs = [
            {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for p in pairs
            for side in ("chosen", "rejected")
        ]
    config, trainer = (KTOConfig, KTOTrainer) if kto else (DPOConfig, DPOTrainer)
    batch = c["pairs"] * (2 if kto else 1)
    arguments = config(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        max_steps=len(pairs) // batch,
        learning_rate=c["learning_rate"],
        lr_scheduler_type="constant",
        beta=c["beta"],
        max_length=None,
        bf16=gpu and c["dtype"] == "bfloat16",
        use_cpu=not gpu,
        gradient_checkpointing=c["gradient_checkpointing"],
        precompute_ref_log_probs=c["precompute"],
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    clock, reference_seconds = Clock(), 0.0
    precompute = trainer._precompute_ref_logps

    def timed(*args: Any, **more: Any) -> Any:
        nonlocal reference_seconds
        began = time.perf_counter()
        result = precompute(*args, **more)
        reference_seconds += time.perf_counter() - began
        return result

    trainer._precompute_ref_logps = timed
    trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    ).train()
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if gpu else {}
    return peak | {
        "step_seconds": clock.seconds,
        "loss": clock.losses,
        "reference_seconds": reference_seconds / len(clock.seconds),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
