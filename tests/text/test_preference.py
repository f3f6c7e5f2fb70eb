"""Where TRL's tokens are wrong and ours are not: BOS, end token, thinking templates; elsewhere they are TRL's."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deltapref_jax.text.preference import tokenise
from deltapref_jax.text.template import ChatTokenizer

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}[assistant] {% endif %}"
IM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = IM.replace(
    "assistant\n{% endif", "assistant\n<think>\n{% endif"
)  # asks with the thought opened
FORGETS = IM.replace(
    "m['content']", "m['content'].split('</think>')[-1]"
)  # drops the thoughts of finished turns
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
USER = [{"role": "user", "content": "2 + 2?"}]


def said(content):
    return [{"role": "assistant", "content": content}]


def made(template, adds=None, **options):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    bpe.train_from_iterator(
        ["[assistant] 4 [user] 2 + 2?"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if adds:
        bpe.post_processor = processors.TemplateProcessing(
            single=adds,
            special_tokens=[(t, bpe.token_to_id(t)) for t in ("<s>", "</s>") if t in adds],
        )
    options = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template,
    } | options
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe, **options), "here")


def parts(text, prompt, *completions):
    """Decoded prompt and completions, special tokens shown, and whether they were tokenised apart."""
    (got,) = tokenise(text, [(prompt, completions)])
    return (
        text.tokenizer.decode(got.prompt),
        *(text.tokenizer.decode(c) for c in got.completions),
        got.prompt_not_prefix,
    )


@pytest.mark.parametrize(
    "adds", ["<s> $A", "<s> $A </s>"]
)  # TRL: <s><s> where the text has one; </s> moves the border
@pytest.mark.parametrize("prompt", ["2 + 2?", "<s>2 + 2?"])
def test_one_bos_and_one_eos_in_text(adds, prompt):
    assert parts(made(PLAIN, adds), prompt, " 4", " 5</s>") == (
        "<s>2 + 2?",
        " 4</s>",
        " 5</s>",
        False,
    )


def test_a_tokenizer_that_adds_no_bos_gets_none():
    assert parts(made(PLAIN), "2 + 2?", " 4") == ("2 + 2?", " 4</s>", False)
    assert parts(made(PLAIN), "<s>2 + 2?", " 4") == ("<s>2 + 2?", " 4</s>", False)


def test_a_template_that_writes_bos_writes_it_once():
    text = made("{{ bos_token }}" + PLAIN, "<s> $A")
    assert parts(text, USER, said("4")) == (
        "<s>[user] 2 + 2?\n[assistant]",
        " 4\n</s>",
        False,
    )  # " 4" is a token


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        (" 4", " 4</s>"),
        (" 4</s>", " 4</s>"),
        (" 4</s>\n", " 4</s>\n"),  # TRL: </s>\n</s>
        (" 4<|im_end|>", " 4<|im_end|>"),  # TRL: <|im_end|></s>
    ],
)
def test_text_ends_once(completion, want):
    assert parts(made(IM), "2 + 2?", completion)[1] == want


def test_an_answer_gets_the_end_that_its_template_leaves_out():
    assert parts(made(PLAIN), USER, said("4"), said("")) == (  # TRL: no end token at all
        "[user] 2 + 2?\n[assistant]",
        " 4\n</s>",
        " \n</s>",
        False,
    )


@pytest.mark.parametrize(
    "content", ["4", "4<|im_end|>", "4<|im_end|>\n", "4</s>"]
)  # TRL: the end twice
def test_an_answer_ends_once(content):
    assert parts(made(IM), USER, said(content))[1] == "4<|im_end|>\n"


def test_pad_that_is_eos_does_not_hide_the_end():
    text = made(IM, eos_token="<|im_end|>", pad_token="<|im_end|>")
    (got,) = tokenise(text, [(USER, [said("4")])])
    assert text.tokenizer.decode(got.completions[0]) == "4<|im_end|>\n"
    assert got.completions[0].tolist().count(text.tokenizer.pad_token_id) == 1


ASKED = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("content", ["<think>\nso\n</think>4", "so\n</think>4"])
def test_a_prompt_that_opens_the_thought_is_the_one_that_is_asked(content):
    """TRL scores from where both part: the prompt loses its <think>, or the answer has it twice."""
    assert parts(made(OPENS), USER, said(content), said("5")) == (
        ASKED + "<think>\n",
        "so\n</think>4<|im_end|>",
        "5<|im_end|>",
        True,
    )


def test_thoughts_that_the_template_drops_are_trained_on():
    """TRL trains on the rendered conversation, without them."""
    thought = "<think>\nso\n</think>4"
    assert parts(made(FORGETS), USER, said(thought), said("5")) == (
        ASKED,
        thought + "<|im_end|>",
        "5<|im_end|>",
        True,
    )
    assert parts(made(FORGETS), USER, said("4"), said("5")) == (
        ASKED,
        "4<|im_end|>\n",
        "5<|im_end|>\n",
        False,
    )


def test_several_messages_behind_such_a_template_are_one_sentence():
    turns = [*said("<think>so</think>4"), *USER, *said("4")]
    with pytest.raises(
        ValueError,
        match=r"^the chat template of here renders the prompt otherwise when an answer "
        r"follows, so that an answer of several messages has no place behind it; "
        r"give one assistant message$",
    ):
        tokenise(made(FORGETS), [(USER, [turns])])


def test_several_messages_behind_another_template_are_trls():
    turns = [*said("4"), *USER, *said("4!")]
    assert parts(made(IM), USER, turns)[1] == "4<|im_end|>\n" + ASKED + "4!<|im_end|>\n"


def test_a_template_that_refuses_is_one_sentence():
    text = made("{{ raise_exception('no system here') }}")
    with pytest.raises(
        ValueError,
        match=r"^the chat template of here refuses the messages \(no system here\); mend ",
    ):
        tokenise(text, [(USER, [said("4")])])


def test_many_are_each_as_alone():
    text = made(IM, "<s> $A")
    asked = [(USER, [said("4"), said("five")]), ("2 + 2?", [" 4"]), ("", ["4"])]
    for one, got in zip(asked, tokenise(text, asked), strict=True):
        (alone,) = tokenise(text, [one])
        assert got.prompt.tolist() == alone.prompt.tolist()
        assert [c.tolist() for c in got.completions] == [c.tolist() for c in alone.completions]
