"""Messages in every form in which data sets store them are the same messages, or are refused."""

import json

import pytest

from deltapref_jax.data.messages import content

WANT = [{"role": "user", "content": "b a?"}, {"role": "assistant", "content": "a b"}]
SHAREGPT = [{"from": "human", "value": "b a?"}, {"from": "gpt", "value": "a b"}]


def read(value):
    return content({"chosen": value}, "chosen")


@pytest.mark.parametrize(
    "stored",
    [
        WANT,
        json.dumps(WANT),
        json.dumps(WANT, indent=1),
        SHAREGPT,
        json.dumps(SHAREGPT),
        [{"role": "human", "content": "b a?"}, {"role": "gpt", "content": "a b"}],
        [{"role": "User", "content": "b a?"}, {"role": "model", "content": "a b"}],
        {"role": ["user", "assistant"], "content": ["b a?", "a b"]},
        {"from": ["human", "gpt"], "value": ["b a?", "a b"]},
        [
            {"role": "user", "content": [{"type": "text", "text": "b "}, {"text": "a?"}]},
            {"role": "assistant", "content": "a b", "name": None},
        ],
    ],
)
def test_every_form_is_the_same_messages(stored):
    assert read(stored) == WANT


@pytest.mark.parametrize("stored", [WANT[1], SHAREGPT[1], json.dumps(WANT[1])])
def test_one_message_may_stand_alone(stored):
    assert read(stored) == WANT[1:]


def test_a_message_alone_is_not_taken_for_one_list_per_key():
    """Its texts have equal lengths, as lists per key have."""
    assert read({"role": "user", "content": "abcd"}) == [{"role": "user", "content": "abcd"}]


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "",
        '{"name": "Ann"}',
        '{"role": "admin", "content": "x"}',  # an answer in JSON that is no message
        '[{"role": "CEO", "name": "Ann"}]',
        '{"from": "Bern", "value": 3}',
        '{"role": "user", ',
        "[1, 2]",
    ],
)
def test_other_text_stays_text(text):
    assert read(text) == text


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        (str(WANT), "'chosen' has a list of messages as text that is not JSON"),
        (str(WANT).replace(",", "\n"), "'chosen' has a list of messages as text that is not JSON"),
        (json.dumps(WANT)[:-3], "'chosen' has a list of messages as text that is not JSON"),
        (["a b"], "'chosen' has a message without 'role' and 'content' as text"),
        ([{"role": "user"}], "'chosen' has a message without 'role' and 'content' as text"),
        ({"role": 3, "content": "x"}, "'chosen' has a message without 'role' and 'content' as te"),
        ({"role": ["user"], "content": ["a", "b"]}, "'chosen' has messages with lists of differe"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'chosen' has a message without 'ro"),
        ([{"from": "function_call", "value": "{}"}], "'chosen' has a message of the role 'functi"),
        ([{"role": "narrator", "content": "x"}], "'chosen' has a message of the role 'narrator', "),
        ([], "'chosen' is neither text nor a list of messages"),
        (3, "'chosen' is neither text nor a list of messages"),
        (None, "'chosen' is missing"),
    ],
)
def test_what_is_no_message_is_one_sentence(stored, sentence):
    with pytest.raises(ValueError) as error:
        read(stored)
    assert str(error.value).startswith(sentence)
