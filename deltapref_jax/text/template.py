"""A tokenizer with its chat template: messages to prompt ids, answers to target ids, ids to text.

Prompt and completion are tokenised apart, at a fixed border, because a model that samples meets
them like that: no merge crosses the border, and a trace is scored on the tokens it was sampled as.
"""

import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import transformers

from deltapref_jax.config import ConfigError
from deltapref_jax.text.gguf_tokenizer import tokenizer_from_gguf

Messages = Sequence[dict[str, Any]]  # role, content, and tool_calls in some

# Templates end a turn with one of these, which is not always the tokenizer's eos_token. Another one
# is found by rendering a turn, see `_turn_end`.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"""The date that a chat template writes as today's, so that a prompt has the same tokens every day.

It is the date that the template of Llama 3.2 writes where it is given no clock."""

# This macro shadows the clock of `transformers`, which takes no function from its caller. Jinja
# drops the line end behind a block, so that the template itself renders as before.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(
        f" | replace('%{directive}', '{TEMPLATE_DATE.strftime('%' + directive)}')"
        for directive in ("-d", "-m", "-H", "-I", "-j", *"aAbBcCdDefFgGhHIjklmMnpPrRStTuUVwWxXyYzZ")
    )
    + " }}{% endmacro %}\n"
)


class ChatTokenizer:
    """Tokenizer and template of one model; a base model may have no template.

    Attributes:
      tokenizer: the `transformers` fast tokenizer.
      where: the model's path, for messages.
      end_ids: every token that ends a turn; a finished completion is given the first.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        where: str,
        end_ids: Sequence[int] = (),
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {where} has no eos_token; name it in tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.where = where
        known = tokenizer.get_vocab()
        turn = [
            known[t] for t in _TURN_ENDS if t in known and t in str(tokenizer.chat_template or "")
        ]
        self._bos = _bos(tokenizer)
        turn = [*self._turn_end(), *turn]
        self.end_ids = tuple(dict.fromkeys([*turn, tokenizer.eos_token_id, *end_ids]))

    @classmethod
    def load(cls, path: str) -> "ChatTokenizer":
        """From a Hugging Face folder or a GGUF file.

        Raises:
          FileNotFoundError: there is nothing at `path`.
          ValueError: the folder has no readable tokenizer, the tokenizer has no end token, or the
            GGUF file names an unknown pre-tokenizer.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"There is no model at {path}; give a Hugging Face folder or a .gguf file."
            )
        if os.path.isfile(path):
            from_gguf, end_ids = tokenizer_from_gguf(path)
            return cls(from_gguf, path, end_ids)
        if (
            not (Path(path) / "tokenizer.json").exists()
            and not (Path(path) / "tokenizer_config.json").exists()
        ):
            raise ValueError(
                f"The folder {path} has no tokenizer.json; copy the model's tokenizer files there."
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as e:  # transformers raises many types for missing and broken files
            raise ValueError(
                f"The tokenizer in {path} cannot be read ({str(e).splitlines()[0]}); copy the "
                "model's tokenizer files there again."
            ) from e
        return cls(tokenizer, path, _end_ids(Path(path)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's files, chat template included, for `transformers` and vLLM."""
        self.tokenizer.save_pretrained(str(folder))
        config = Path(folder) / "tokenizer_config.json"
        # transformers 5 writes a class that transformers 4 (and vLLM on it) does not know.
        config.write_text(
            config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        )

    @functools.cached_property
    def identity(self) -> str:
        """16 hex digits that two models share exactly when token ids mean the same to both.

        Then the ids that one model sampled are the other's tokens of that text and of that end of
        turn, and both render a conversation alike. The digest leaves out what changes no token:
        padding, truncation, and the post-processor, of which only the added BOS is used.
        """
        tokenizer = self.tokenizer
        serialised = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding", "post_processor"):
            serialised.pop(name, None)
        template = json.dumps(tokenizer.chat_template, sort_keys=True)
        values = tokenizer.special_tokens_map | {"strftime_now": TEMPLATE_DATE}
        written = {name: str(value) for name, value in values.items() if name in template}
        first, *others = self.end_ids
        parts = [serialised, template, written, self._bos, added_bos(tokenizer), first]
        text = json.dumps([*parts, sorted(others)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_template(self) -> None:
        """Refuses a tokenizer without a chat template, which messages need and plain text does not.

        Raises:
          ConfigError: the tokenizer has no chat template, or one that cannot be used.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer of {self.where} has no chat template; add chat_template.jinja to "
                "its folder, or give text instead of messages."
            )
        if any(word in self._template_error for word in ("sandbox", "is unsafe")):
            raise ConfigError(
                f"The chat template of {self.where} asks for more than a template may "
                f"({self._template_error}), and is not run; use the template of the model's makers."
            )
        if self._template_error:
            raise ConfigError(
                f"The chat template of {self.where} cannot be used ({self._template_error}); copy "
                "the model's tokenizer files there again."
            )

    @functools.cached_property
    def _template_error(self) -> str:
        """What is wrong with the template, shown by one question; "" if nothing is."""
        messages = [{"role": "user", "content": "question"}]
        try:
            rendered, *others = [self._render(messages, False, None) for _ in range(4)]
        except Exception as e:  # a template is a program, which may raise anything
            return (str(e).strip() or type(e).__name__).splitlines()[0]
        if set(others) != {rendered}:
            return "it renders one question in several ways"
        return "" if "question" in rendered else "it leaves out what the user asks"

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to the assistant's answer; they hold one BOS at most."""
        return self.encode_with_bos(self.render(messages))

    def render(
        self,
        messages: Messages,
        answered: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Text of a conversation by the template.

        Args:
          messages: the conversation.
          answered: the conversation is complete; otherwise the header of an answer follows it.
          tools: JSON schemas of what the assistant may call, for templates that write them.

        Raises:
          ConfigError: see `check_template`.
        """
        self.check_template()
        return self._render(messages, answered, tools)

    def _render(
        self, messages: Messages, answered: bool, tools: list[dict[str, Any]] | None
    ) -> str:
        template = self.tokenizer.get_chat_template(tools=tools)
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tools=cast(Any, tools),  # functions would be allowed too
                chat_template=_FIXED_CLOCK * ("strftime_now" in template) + template,
                tokenize=False,
                add_generation_prompt=not answered,
            )
        )

    def encode_with_bos(self, text: str) -> list[int]:
        """Ids of rendered text that starts a sequence; they begin with one BOS at most."""
        return [*self._bos, *self.encode([text])[0]]

    @functools.cached_property
    def special(self) -> list[str]:
        """Texts that mean more than their words: control tokens, and what the template writes.

        The latter are the lines that it puts around contents, such as "[INST]" or "### Response:",
        which are ordinary text to many tokenizers.
        """
        frame = [line.strip() for part in self._frame for line in part.splitlines()]
        written = [line for line in frame if len(line) > 2 and not line.replace(" ", "").isalnum()]
        return list(dict.fromkeys([*self._control_tokens, *written]))

    @functools.cached_property
    def _control_tokens(self) -> list[str]:
        # Gemma's <start_of_turn> and Mistral's [INST] are special, and no special token's name.
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return [str(token) for token in dict.fromkeys([*self.tokenizer.all_special_tokens, *added])]

    @functools.cached_property
    def _frame(self) -> list[str]:
        """What the template puts before, between and behind the contents of three messages."""
        return self._around("user", "assistant", "user")

    def _around(self, *roles: str) -> list[str]:
        """What the template puts around the contents of `roles`, whose last is an answer or asks.

        It is [] where there is no template, or one that cannot render this, of which
        `_template_error` tells.
        """
        contents = [f"content-{i}-of-{len(roles)}" for i in range(len(roles))]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            rendered = self._render(messages, roles[-1] == "assistant", None)
        except Exception:  # a template is a program, which may raise anything
            return []
        parts = re.split("|".join(contents), rendered)
        return parts if len(parts) == len(roles) + 1 else []

    def _turn_end(self) -> list[int]:
        """The control token that the template puts behind what the assistant says; [] if none."""
        around = self._around("user", "assistant")
        behind = around[-1].lstrip() if around else ""
        ends = [token for token in self._control_tokens if behind.startswith(token)]
        known = self.tokenizer.get_vocab()
        return [known[max(ends, key=len)]] if ends else []

    def completion_ids(self, text: str, ended: bool) -> list[int]:
        """Ids of an answer; the end-of-turn token follows only if the answer ended with it."""
        return self.completions_ids([text], [ended])[0]

    def completions_ids(self, texts: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        """`completion_ids` of many answers, tokenised in one call."""
        encoded = self.encode_continued(list(texts))
        return [ids + list(self.end_ids[:1]) * end for ids, end in zip(encoded, ended, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, which continue a sequence, without special tokens."""
        if self._continuing is not None:
            return str(self._continuing.decode(list(ids), skip_special_tokens=True))
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text that continues a sequence, without added special tokens."""
        return self.encode_continued([text])[0]

    def encode_continued(self, texts: list[str]) -> list[list[int]]:
        """`encode_plain` of many texts, tokenised in one call."""
        if self._continuing is None:
            return self.encode(texts)
        encoded = self._continuing.encode_batch(texts, add_special_tokens=False)
        return [list(one.ids) for one in encoded]

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer | None:
        """The tokenizer without the space that it puts before text; None where it puts none.

        Tokenizers made with SentencePiece (Llama 2, Mistral) begin every text with a space, and
        decoding drops it, as if every text were the first of its sequence. The ids that a model
        samples behind a prompt come back only if neither is done.
        """
        serialised = json.loads(self.tokenizer.backend_tokenizer.to_str())
        parts = {name: serialised[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
        if (parts["decoder"] or {}).get("type") == "ByteLevel":
            del parts["decoder"]  # it says that it adds a space, and does nothing
        changed = {name: _without_prefix(part) for name, part in parts.items()}
        if changed == parts:
            return None
        bare = {"truncation": None, "padding": None, "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(serialised | changed | bare))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that start a sequence, without added special tokens, in one call."""
        if not texts:
            return []
        encoded: Any = self.tokenizer(texts, add_special_tokens=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def offsets(self, text: str) -> np.ndarray:
        """int [T, 2]: where each token of `encode` starts and stops, in characters."""
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)


def _without_prefix(part: Any) -> Any:
    """A serialised part of a tokenizer, changed to neither add nor drop a first space."""
    if isinstance(part, list):
        return [p for p in map(_without_prefix, part) if p is not None]
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None if isinstance(part, dict) else part
    for name, value in (("prepend_scheme", "never"), ("add_prefix_space", False), ("start", 0)):
        if name in part:
            return part | {name: value}
    return {key: _without_prefix(value) for key, value in part.items()}


def _end_ids(folder: Path) -> list[int]:
    """The end tokens that a model's folder names: one, or a list of which the tokenizer has one.

    As in `transformers`, config.json counts only where there is no generation_config.json.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            return named_end_ids(folder / name)
    return []


def named_end_ids(file: Path) -> list[int]:
    """The end tokens that a generation_config.json or config.json names.

    Raises:
      ValueError: the file is damaged, or names something that is no token id.
    """
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as e:
        raise ValueError(
            f"{file} is not a JSON object ({e}); copy the model's file there again."
        ) from e
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31:
            raise ValueError(
                f"{file} has the eos_token_id {i!r}; it must be a token id or a list of them."
            )
    return ids


def _bos(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """The BOS where the tokenizer adds one and the template does not write it."""
    bos, template = tokenizer.bos_token, str(tokenizer.chat_template or "")
    return [] if bos is None or "bos_token" in template or bos in template else added_bos(tokenizer)


def added_bos(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer puts before plain text; [] where it adds none."""
    adds: Any = tokenizer("", add_special_tokens=True)
    # Some post-processors add an EOS as well, which is left out.
    return [i for i in adds["input_ids"][:1] if i == tokenizer.bos_token_id]
