"""Makes `families/`: tiny checkpoints of every family, and what `transformers` computes with them.

    pip install torch==2.13.0 transformers==5.24.0
    python tests/models/make_family_fixtures.py [NAME ...]

A folder holds config.json and model.safetensors, as a user has them, and expected.safetensors:

    tokens_i, logits_i    sequences, longer than windows and original contexts, and their logits
    prompt, greedy        a prompt and the tokens that greedy decoding appends
    loss, grad.TENSOR     one DPO step on sequences 0 (chosen) and 1 (rejected) with beta 0.3, given
                          references and the first `PROMPT` tokens as the prompt
    bf16_rms              root mean square of the logits' difference between bfloat16 and float32
    read.TENSOR           experts of the first layer, dequantised, where a file has them in MXFP4

Every sequence is computed alone, so that nothing depends on padding or on its neighbours.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import FP4_VALUES

HERE = Path(__file__).parent / "families"
PROMPT = 5
BETA = 0.3
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
LENGTHS = (40, 31, 9)

SMALL = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Eight pairs of dimensions, of which three quarters are rotated.
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 4.0],
}

CASES = {
    "llama": {"model_type": "llama"},
    "llama-tied-biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
        "head_dim": 10,
    },
    "llama-llama3": {"model_type": "llama", "rope_theta": 5e4, "rope_scaling": LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-yarn": {"model_type": "llama", "rope_scaling": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 8},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 6,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3-window": {
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "sliding_window": 6,
        "no_rope_layer_interval": 2,
        "tie_word_embeddings": False,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
    "qwen3-moe-unnormalized": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": False,
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "sliding_window": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "num_hidden_layers": 6,
        "sliding_window": 6,
        "rope_scaling": YARN,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8},
    "phi3-longrope": {
        "model_type": "phi3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "rope_scaling": LONG,
        "tie_word_embeddings": True,
    },
    "nemotron": {"model_type": "nemotron", "head_dim": 8, "norm_eps": 1e-5, "hidden_act": "relu2"},
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "head_dim": 10,
        "intermediate_size": 20,
        "sliding_window": 7,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        # So small that gates and ups are clamped.
        "swiglu_limit": 0.75,
        "swiglu_alpha": 1.3,
        "rope_theta": 150000,
        "rope_scaling": YARN | {"truncate": False},
    },
    # Experts as the released files hold them, in rows of one and of two blocks.
    "gpt-oss-mxfp4": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 5,
        "head_dim": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "sliding_window": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 150000,
        "rope_scaling": YARN | {"factor": 32.0, "truncate": False},
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
    },
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draws weights so large that every part of a layer moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    plus_one = "Gemma" in type(model).__name__ or "Nemotron" in type(model).__name__
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if name.endswith("sinks"):
                weight.copy_(1 + draw)
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(0.3 * draw + (0 if plus_one else 1))
            elif weight.ndim == 1:
                weight.copy_(0.3 * draw)
            elif "embed" in name:
                weight.copy_(draw / (1 if "Gemma" not in type(model).__name__ else 4))
            else:
                weight.copy_(draw * 1.3 / math.sqrt(weight.shape[-1]))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None], use_cache=False).logits[0].float()


def as_stored(name: str, weight: torch.Tensor, stacked: bool) -> list[tuple[str, torch.Tensor]]:
    """Names and parts of a weight in a file, where experts are apart."""
    layer, experts, kind = name.partition(".experts.")
    if not experts or stacked:
        return [(name, weight)]
    if kind == "down_proj":
        return [(f"{layer}.experts.{e}.down_proj.weight", x) for e, x in enumerate(weight)]
    return [
        (f"{layer}.experts.{e}.{part}_proj.weight", half)
        for e, x in enumerate(weight)
        for part, half in zip(("gate", "up"), x.chunk(2), strict=True)
    ]


def mxfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The experts' matrices [E, in, out] as numbers of 4 bits, 32 of which share a scale."""
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    scales = torch.floor(torch.log2(groups.abs().amax(-1))) - 1
    numbers = torch.tensor(FP4_VALUES)
    codes = (groups[..., None] / 2.0 ** scales[..., None, None] - numbers).abs().argmin(-1)
    return {
        f"{name}_blocks": (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
        f"{name}_scales": (scales + 127).to(torch.uint8),
    }


def quantised(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Stores a model as gpt-oss's released files are, and reads it as `transformers` does."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        packed = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        tensors |= mxfp4(name, weight) if packed else {name: weight.bfloat16()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options, **EAGER).eval()


def make(name: str, changes: dict) -> None:
    torch.manual_seed(0)
    fields = SMALL | changes
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, **EAGER).eval()
    randomize(model, len(name))
    model.save_pretrained(folder / "saved")
    # The weights as `transformers` stores them, with the config as a user wrote it.
    (folder / "saved" / "model.safetensors").replace(folder / "model.safetensors")
    for file in (folder / "saved").iterdir():
        file.unlink()
    (folder / "saved").rmdir()
    if "quantization_config" in fields:
        model = quantised(model, folder)
    generator = torch.Generator().manual_seed(1)
    expected: dict[str, torch.Tensor] = {}
    rows = [torch.randint(3, fields["vocab_size"], (n,), generator=generator) for n in LENGTHS]
    rows[1][:PROMPT] = rows[0][:PROMPT]
    squares, count = 0.0, 0
    half = AutoModelForCausalLM.from_config(config, **EAGER).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    sums = []
    for i, tokens in enumerate(rows):
        logits = logits_of(model, tokens)
        expected[f"tokens_{i}"], expected[f"logits_{i}"] = tokens.int(), logits.detach()
        with torch.no_grad():
            difference = logits_of(half, tokens) - logits
        squares, count = squares + float((difference**2).sum()), count + difference.numel()
        picked = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
        sums.append(picked[PROMPT - 1 :].sum())
    # References near the policy, so that the loss is not saturated.
    references = torch.stack([sums[0].detach().round() - 1, sums[1].detach().round() + 1])
    margin = (sums[0] - references[0]) - (sums[1] - references[1])
    loss = -torch.nn.functional.logsigmoid(BETA * margin)
    loss.backward()
    expected |= {"loss": loss.detach()[None], "references": references}
    expected["bf16_rms"] = torch.tensor([math.sqrt(squares / count)])
    for key, weight in model.named_parameters():
        if "quantization_config" in fields and key.startswith("model.layers.0.mlp.experts."):
            expected[f"read.{key}"] = weight.detach().bfloat16()
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        for stored, part in as_stored(key, gradient, fields["model_type"] == "gpt_oss"):
            expected[f"grad.{stored}"] = part
    with torch.no_grad():
        trace = rows[2]
        expected["prompt"] = trace.int()
        for _ in range(12):
            trace = torch.cat([trace, logits_of(model, trace)[-1].argmax()[None]])
        expected["greedy"] = trace[len(rows[2]) :].int()
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    print(name, f"loss {float(loss.detach()):.4f}, bf16 {float(expected['bf16_rms'][0]):.2e}")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case, CASES[case])
