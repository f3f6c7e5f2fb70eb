"""Where our tokens differ from TRL's: BOS, end token, thinking templates, turns in an answer."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deltapref_jax.text.preference import Example, tokenise
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
    """Decoded prompt and completions with special tokens, and whether they were encoded apart."""
    (got,) = tokenise(text, [Example(prompt, completions)])
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
    (got,) = tokenise(text, [Example(USER, [said("4")])])
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
        tokenise(made(FORGETS), [Example(USER, [turns])])


def test_a_tool_call_behind_such_a_template_is_one_sentence():
    calls = "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor"
    opens = OPENS.replace("<|im_end|>\n{% endfor", calls)
    called = [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]
    with pytest.raises(
        ValueError,
        match=r"^the chat template of here renders the prompt otherwise when an answer "
        r"follows, so that a tool call has no place behind it; give one assistant message of text$",
    ):
        tokenise(made(opens), [Example(USER, [called])])


def test_an_answer_apart_gets_no_space_of_the_tokenizer_before_it():
    text = made(OPENS)
    text.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert parts(text, USER, said("so</think>4"))[1:] == ("so</think>4<|im_end|>", True)


LLAMA = (  # headers and ends as those of Llama 3
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|start|>\n\n"
    "{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|start|>\n\n{% endif %}"
)
GEMMA = (  # the assistant is called model, as in Gemma
    "{{ bos_token }}{% for m in messages %}<|im_start|>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
SURE = [{"role": "user", "content": "Are you sure?"}]
CALLED = [{"role": "tool", "content": "4 is even"}]


@pytest.mark.parametrize("trim", [False, True])  # whether offsets hold the space before a word
@pytest.mark.parametrize(
    ("template", "end"),
    [(IM, "<|im_end|>\n"), (LLAMA, "<|im_end|>"), (GEMMA, "<|im_end|>\n"), (PLAIN, "\n")],
)
@pytest.mark.parametrize("between", [SURE, SURE + CALLED, CALLED])
def test_only_the_assistants_turns_are_targets(template, end, between, trim):
    text = made(template)
    if trim:
        text.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [*said("4: é4"), *between, *said("4 [yes]\n4"), *SURE, *said("4, oui")]
    (got,) = tokenise(text, [Example(USER, [turns, said("5")])])
    (ids, other), (mask, none) = got.completions, got.scored
    assert none is None and mask.dtype == bool and mask.shape == ids.shape
    last = end if "<|im_end|>" in end else end + "</s>"
    space = " " if template is PLAIN else ""  # merged into the first token of a turn
    answers = [f"{space}4: é4{end}", f"{space}4 [yes]\n4{end}", f"{space}4, oui{last}"]
    assert text.tokenizer.decode(ids[mask]) == "".join(answers)
    assert text.tokenizer.decode(other) == f"{space}5{last}"
    whole = text.tokenizer.apply_chat_template([*USER, *turns], tokenize=False)
    assert text.tokenizer.decode([*got.prompt, *ids]) == whole + "</s>" * (template is PLAIN)


def test_the_mask_changes_no_token_and_stays_none_where_everything_is_scored():
    text = made(IM)
    turns = [*said("4"), *SURE, *said("4!")]
    assert parts(text, USER, turns)[1] == (
        "4<|im_end|>\n<|im_start|>user\nAre you sure?<|im_end|>\n"
        "<|im_start|>assistant\n4!<|im_end|>\n"
    )
    for answer in (said("4"), said("<think>so</think>4")):
        (got,) = tokenise(text, [Example(USER, [answer, answer])])
        assert got.scored == (None, None)
    (got,) = tokenise(text, [Example("2 + 2?", [" 4"])])
    assert got.scored == (None,)


def test_a_thought_that_only_the_last_turn_is_given_moves_no_turn():
    thinks = IM.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}",
    )
    text = made(thinks)
    (got,) = tokenise(text, [Example(USER, [[*said("4"), *SURE, *said("4!")]])])
    scored = got.completions[0][got.scored[0]]
    assert text.tokenizer.decode(scored) == "4<|im_end|><think>\n\n</think>\n\n4!<|im_end|>\n"


def test_an_end_inside_any_of_the_assistants_messages_is_written_once():
    turns = [*said("4<|im_end|>"), *SURE, *said("4!</s>\n")]
    assert parts(made(IM), USER, turns) == parts(made(IM), USER, [*said("4"), *SURE, *said("4!")])


def test_a_template_that_rewrites_earlier_turns_is_one_sentence():
    dots = IM.replace(
        "<|im_end|>\n{% endfor",
        "{% if not loop.last and m['role'] == 'assistant' %}.{% endif %}<|im_end|>\n{% endfor",
    )
    text = made(dots)
    assert parts(text, USER, said("4"))[1] == "4<|im_end|>\n"
    with pytest.raises(
        ValueError,
        match=r"^the chat template of here renders a message otherwise when others follow, so "
        r"that the assistant's turns in an answer of several messages cannot be found; "
        r"give one assistant message$",
    ):
        tokenise(text, [Example(USER, [[*said("4"), *SURE, *said("4!")]])])


def test_a_template_that_refuses_is_one_sentence():
    refusing = "{% if messages|length > 1 %}{{ raise_exception('no system here') }}{% endif %}"
    text = made(refusing + "{{ messages[0]['content'] }}")
    with pytest.raises(
        ValueError,
        match=r"^the chat template of here refuses the messages \(no system here\); fix ",
    ):
        tokenise(text, [Example(USER, [said("4")])])


def test_many_are_each_as_alone():
    text = made(IM, "<s> $A")
    rows = [(USER, [said("4"), said("five")]), ("2 + 2?", [" 4"]), ("", ["4"])]
    asked = [Example(*row) for row in rows]
    for one, got in zip(asked, tokenise(text, asked), strict=True):
        (alone,) = tokenise(text, [one])
        assert got.prompt.tolist() == alone.prompt.tolist()
        assert [c.tolist() for c in got.completions] == [c.tolist() for c in alone.completions]


THOUGHT = [{"role": "assistant", "content": "4", "reasoning_content": "two and two"}]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "function_call"])
def test_what_the_template_does_not_write_is_one_sentence(name):
    answer = [{"role": "assistant", "content": "4", name: "two and two"}]
    with pytest.raises(ValueError, match=f"does not write '{name}'; remove them"):
        tokenise(made(IM), [Example(USER, (answer, said("5")))])


def test_a_thought_in_a_field_is_a_target_where_the_template_writes_it():
    template = IM.replace(
        "{{ m['content'] }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m['content'] }}",
    )
    found = parts(made(template), USER, THOUGHT, said("5"))
    assert found[1:3] == ("<think>two and two</think>4<|im_end|>\n", "5<|im_end|>\n")


def test_a_thought_that_the_template_names_and_drops_is_one_sentence():
    template = IM + "{# reasoning_content is left out #}"
    with pytest.raises(ValueError, match="so that a thought in a field of its own has no place"):
        tokenise(made(template), [Example(USER, (THOUGHT, said("5")))])


def test_an_end_of_the_conversation_behind_the_turns_end_is_no_target():
    """As the template of Phi-3 writes it."""
    template = IM + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert parts(made(template), USER, said("4"), said("5"))[1:3] == ("4<|im_end|>", "5<|im_end|>")


def test_a_message_that_the_template_drops_is_one_sentence():
    drops = "{% for m in messages if m['role'] != 'system' %}" + IM[IM.index("%}") + 2 :]
    text = made(drops)
    later = [*USER, {"role": "system", "content": "Be short."}]
    with pytest.raises(ValueError) as error:
        tokenise(text, [Example(later, [said("4")])])
    assert str(error.value) == (
        f"the chat template of {text.where} does not write a message of the role 'system' where "
        "it stands; move or remove it"
    )
    (got,) = tokenise(made(IM), [Example(later, [said("4")])])
    assert "Be short." in text.tokenizer.decode(got.prompt)
