"""Prompts and completions: one BOS, the template's end token, a border that no merge crosses."""

import json
import pickle
import re

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from deltapref_jax.config import ConfigError
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import pack_one
from deltapref_jax.text.template import TEMPLATE_DATE, ChatTokenizer

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}[assistant] {% endif %}"
THINKS = TURNS + "{% if add_generation_prompt %}[assistant] <think>\n{% endif %}"
WRITES_BOS = "{{ bos_token }}" + PLAIN
SPELLS_BOS = "<s>" + PLAIN
IM = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


def tokenizer(template, adds=None, **options):
    """A byte-level BPE with merges over the border; its post-processor puts `adds` around text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    bpe.train_from_iterator(
        ["assistant] Answer: 4", "[user] What is 2 + 2?", "<think>\n so </think> 4"] * 9,
        trainers.BpeTrainer(
            vocab_size=330,
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
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | options),
    )


def made(*args, **options):
    return ChatTokenizer(tokenizer(*args, **options), "here")


@pytest.mark.parametrize("adds", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("template", [PLAIN, WRITES_BOS, SPELLS_BOS])
def test_one_bos_at_most_and_no_eos_in_a_prompt(template, adds):
    text = made(template, adds)
    ids = text.prompt_ids(CHAT)
    bos, eos = (text.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>"))
    writes = template is not PLAIN or adds is not None
    assert ids.count(bos) == writes
    assert ids[0] == bos or not writes
    assert eos not in ids
    assert text.tokenizer.decode(ids[writes:]) == "[user] What is 2 + 2?\n[assistant] "


@pytest.mark.parametrize("adds", [None, "<s> $A", "<s> $A </s>"])
def test_a_completion_has_no_bos_and_its_end_token_only_if_it_ended(adds):
    text = made(PLAIN, adds)
    end = text.tokenizer.convert_tokens_to_ids("</s>")
    whole = text.completion_ids("Answer: 4", ended=True)
    assert whole == [*text.completion_ids("Answer: 4", ended=False), end]
    assert text.tokenizer.decode(whole) == "Answer: 4</s>"
    assert text.completions_ids(["Answer: 4", "", "4"], [True, True, False]) == [
        whole,
        [end],
        text.completion_ids("4", ended=False),
    ]
    assert text.completions_ids([], []) == []


def test_the_end_is_the_templates_and_the_tokenizers_ends_a_trace_too():
    text = made(IM)
    ends = [text.tokenizer.convert_ids_to_tokens(i) for i in text.end_ids]
    assert ends == ["<|im_end|>", "</s>"]
    assert text.tokenizer.decode(text.completion_ids("4", ended=True)) == "4<|im_end|>"
    assert [made(PLAIN).tokenizer.convert_ids_to_tokens(i) for i in made(PLAIN).end_ids] == ["</s>"]
    assert ChatTokenizer(tokenizer(IM), "here", end_ids=[7, text.end_ids[0]]).end_ids == (
        *text.end_ids,
        7,
    )


@pytest.mark.parametrize("template", [PLAIN, THINKS, IM, WRITES_BOS])
@pytest.mark.parametrize("answer", ["Answer: 4", " so </think> 4", "", "]x", "\n\nthen 4 "])
def test_the_prompt_is_a_prefix_and_no_merge_moves_the_border(template, answer):
    text = made(template, "<s> $A")
    prompt, completion = text.prompt_ids(CHAT), text.completion_ids(answer, ended=True)
    s = pack_one(TokenSequence(np.asarray(prompt), np.asarray(completion)))
    assert s.tokens[: len(prompt)].tolist() == prompt
    assert s.tokens[s.targets].tolist() == completion
    assert text.decode(completion) == answer
    assert text.tokenizer.decode(s.tokens[:-1]).removeprefix("<s>") == (
        text.render(CHAT) + answer
    ).removeprefix("<s>")


def sentencepiece(spaces, template=PLAIN):
    """A tokenizer like that of Llama 2 or Mistral: it puts a space before the text that it gets."""
    merges = []
    for word in ("▁The", "The", "▁sum", "▁is"):
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    characters = ["▁", *(chr(i) for i in range(33, 127))]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *characters]
    pieces += [a + b for a, b in merges]
    bpe = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(dict.fromkeys(pieces))},
            list(dict.fromkeys(merges)),
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if spaces == "prepend":
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        last = [decoders.Strip(" ", 1, 0)]
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=spaces, split=False)
        metaspace = decoders.Metaspace("▁", prepend_scheme=spaces, split=False)
        bpe.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return ChatTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=template
        ),
        "here",
    )


@pytest.mark.parametrize("spaces", ["prepend", "first", "always", "never"])
@pytest.mark.parametrize(
    ("sampled", "said"),
    [
        (["The", "▁sum", "▁is", "▁", "4"], "The sum is 4"),
        (["▁The", "▁sum"], " The sum"),
        (["▁", "▁The"], "  The"),
        (["4"], "4"),
        (["<0x0A>", "4", "<0x0A>", "▁is", "<0xC3>", "<0xA9>"], "\n4\n isé"),
        (["▁"], " "),
        ([], ""),
    ],
)
def test_sampled_ids_come_back_where_the_tokenizer_puts_a_space_before_text(spaces, sampled, said):
    text = sentencepiece(spaces)
    ids = [text.tokenizer.convert_tokens_to_ids(t) for t in sampled]
    assert text.decode(ids) == said
    assert text.completion_ids(said, ended=False) == text.encode_plain(said) == ids
    assert text.completion_ids(said, ended=True) == [*ids, text.end_ids[0]]


@pytest.mark.parametrize("spaces", ["prepend", "first", "always", "never"])
def test_a_prompt_keeps_the_space_that_the_tokenizer_puts_before_text(spaces):
    text = sentencepiece(spaces)
    want = text.tokenizer(text.render(CHAT))["input_ids"]
    assert text.prompt_ids(CHAT) == want
    assert (want[1] == text.tokenizer.convert_tokens_to_ids("▁")) == (spaces != "never")
    assert pickle.loads(pickle.dumps(text)).encode_plain("The") == text.encode_plain("The")


def test_a_byte_level_tokenizer_may_put_a_space_before_text_too():
    text = made(PLAIN)
    text.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert text.tokenizer.decode(text.prompt_ids(CHAT)).startswith(" [user]")
    for said in ("4", " 4", "Answer: 4"):
        assert text.decode(text.completion_ids(said, ended=True)) == said


FORMATS = ["%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %H:%M:%S", "%x %c %j %I %p %y", "none"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_date_in_a_template_is_the_same_every_day(form, monkeypatch, tmp_path):
    def written(now):
        return (
            f"\n  {{% macro day() %}}{{{{ {now} }}}}{{% endmacro %}}\n"
            f"{{% set d = {now} %}}  {{{{ d }}}}|{{{{ day() }}}}\n" + PLAIN
        )

    template = written(f"strftime_now('{form}')")
    text, fixed = made(template), made(written(f"'{TEMPLATE_DATE.strftime(form)}'"))
    assert text.render(CHAT) == fixed.render(CHAT)
    assert text.prompt_ids(CHAT) == fixed.prompt_ids(CHAT)
    assert text.render(CHAT, answered=True) == fixed.render(CHAT, answered=True)
    text.save(tmp_path)
    assert ChatTokenizer.load(str(tmp_path)).tokenizer.chat_template == template
    identity = text.identity
    monkeypatch.setattr("deltapref_jax.text.template.TEMPLATE_DATE", "another")
    assert made(template).identity != identity


@pytest.mark.parametrize(
    ("generation", "config", "more"),
    [
        ({"eos_token_id": [1, 9, 7]}, {"eos_token_id": 1}, (9, 7)),
        ({"eos_token_id": 9}, {}, (9,)),
        ({}, {"eos_token_id": [9]}, ()),  # config.json does not count beside the other
        (None, {"eos_token_id": [9, 8]}, (9, 8)),
        (None, {"eos_token_id": None}, ()),
        (None, None, ()),
    ],
)
def test_every_end_token_that_the_models_folder_names_ends_a_trace(
    generation, config, more, tmp_path
):
    made(PLAIN).save(tmp_path)
    for name, value in (("generation_config", generation), ("config", config)):
        if value is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = ChatTokenizer.load(str(tmp_path))
    assert text.end_ids == (*made(PLAIN).end_ids, *more)
    assert text.completion_ids("4", ended=True)[-1] == text.tokenizer.eos_token_id


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_broken_generation_config_is_one_sentence(content, tmp_path):
    made(PLAIN).save(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=r"^\S+/generation_config\.json is not a JSON object \(.*\); copy the model's file "
        r"there again\.$",
    ):
        ChatTokenizer.load(str(tmp_path))


def test_decode_leaves_special_tokens_out_and_words_as_they_are():
    text = made(IM)
    assert text.decode(text.encode_plain("<|im_start|>a , b .<|im_end|>")) == "a , b ."
    assert set(text.special) == {*SPECIAL, "<|im_start|>user", "<|im_start|>assistant"}
    assert "[user]" in made(PLAIN).special


def test_saved_is_loaded(tmp_path):
    text = made(IM, "<s> $A")
    text.save(tmp_path)
    again = ChatTokenizer.load(str(tmp_path))
    assert again.prompt_ids(CHAT) == text.prompt_ids(CHAT)
    assert again.end_ids == text.end_ids
    assert again.identity == text.identity
    assert again.completion_ids("Answer: 4", ended=True) == text.completion_ids(
        "Answer: 4", ended=True
    )


def changed(change, *args, **options):
    """Identity of a tokenizer after `change(tokenizer)`."""
    made_of = tokenizer(*args, **options)
    change(made_of)
    return ChatTokenizer(made_of, "elsewhere").identity


def test_identity_is_the_same_where_ids_mean_the_same():
    want = made(IM, "<s> $A").identity
    assert len(want) == 16 and int(want, 16) >= 0

    def padded(t):
        t.pad_token = "<s>"
        t.backend_tokenizer.enable_truncation(8)
        t.backend_tokenizer.enable_padding(length=4)

    assert changed(padded, IM, "<s> $A") == want
    assert changed(lambda t: None, IM, "<s> $A </s>") == want  # the EOS is never added


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens(["Answer"]),  # another token
        lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "chat_template", IM.replace("user", "human") + " "),
        lambda t: setattr(t, "eos_token", "<|im_start|>"),  # another end of turn
        lambda t: setattr(t, "bos_token", "</s>"),  # no longer the token that is added
    ],
)
def test_identity_differs_where_ids_mean_something_else(change):
    assert changed(change, IM, "<s> $A") != made(IM, "<s> $A").identity


def test_identity_knows_bos_end_ids_and_names_in_the_template():
    assert made(IM).identity != made(IM, "<s> $A").identity
    one, more, order = (
        ChatTokenizer(tokenizer(IM), "here", end_ids=ids).identity for ids in ([], [7, 8], [8, 7])
    )
    assert one != more == order
    named = IM + "{{ pad_token }}"
    assert made(named, pad_token="<s>").identity != made(named, pad_token="</s>").identity
    assert made(IM, pad_token="<s>").identity == made(IM, pad_token="</s>").identity


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"eos_token": None},
            "The tokenizer of here has no eos_token; name it in tokenizer_config.json.",
        ),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        made(PLAIN, **options)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "asked", ["{% for i in range(10 ** 9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}"]
)
def test_a_template_that_asks_for_too_much_is_not_run(asked):
    with pytest.raises(ValueError) as error:
        made(asked + PLAIN, "<s> $A").render(CHAT)
    assert re.fullmatch(
        r"The chat template of here asks for more than a template may \(.+\), and is not run; use "
        r"the template of the model's makers\.",
        str(error.value),
    )


def test_only_messages_need_a_template():
    text, other = made(None, "<s> $A"), made(PLAIN, "<s> $A")
    assert text.encode_with_bos("What is 2 + 2?") == other.encode_with_bos("What is 2 + 2?")
    assert text.completion_ids("4", True) == other.completion_ids("4", True)
    with pytest.raises(ValueError) as error:
        text.render(CHAT)
    assert str(error.value) == (
        "The tokenizer of here has no chat template; add chat_template.jinja to its folder, or "
        "give text instead of messages."
    )


def test_no_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^There is no model at /nowhere; give a Hugging Face folder or a "
    ):
        ChatTokenizer.load("/nowhere")
    with pytest.raises(
        ValueError, match=rf"^The folder {tmp_path} has no tokenizer\.json; copy the model's "
    ):
        ChatTokenizer.load(str(tmp_path))


def test_the_control_token_behind_an_answer_ends_a_trace_whatever_its_name():
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }} {{ END }}{% endfor %}"
    for end in ("<|im_end|>", "<s>"):  # neither is the tokenizer's eos_token
        text = made(turns.replace("{{ END }}", end), eos_token="</s>", bos_token=None)
        ends = [text.tokenizer.convert_ids_to_tokens(i) for i in text.end_ids]
        assert ends == [end, "</s>"]
    alone = made(turns.replace(" {{ END }}", ""))  # the next turn's beginning is no end
    assert [alone.tokenizer.convert_ids_to_tokens(i) for i in alone.end_ids] == ["</s>"]


def test_a_template_that_draws_at_random_is_one_sentence():
    text = made("{{ range(99999) | random }}" + PLAIN)
    with pytest.raises(ConfigError, match="it renders one question in several ways"):
        text.prompt_ids(CHAT)


@pytest.mark.parametrize("form", ["%e", "%j", "%f", "%Z", "%G-W%V-%u", "%D", "%-H", "%R"])
def test_every_part_of_a_date_is_written(form):
    rendered = made("{{ strftime_now('" + form + "') }}|" + PLAIN).render(CHAT)
    assert rendered.split("|")[0] == TEMPLATE_DATE.strftime(form)
