"""Conversations as a chat template writes them, and which of their tokens the assistant wrote.

Characters of the rendered text are told apart first, by the template's own marks or by rendering the conversation again in part; then
tokens are, and what doesn't begin and end between two tokens is not known for sure. Shapes: n tokens, a answers.
"""

import hashlib
import os
import re
from bisect import bisect_left
from collections import Counter
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer, processors
from transformers.utils.chat_template_utils import render_jinja_template

from data.manifest import reason
from data.tokenizer import served_tokenizer
from fms_spec.errors import UserError

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "Qzx"  # what an answer is replaced by to see what stands behind it: letters alone, which no template escapes or strips
UNSURE = "which tokens are the assistant's is not sure"


class LeftOut(Exception):
    """Why a conversation can't be trained on. Args: a reason that is the same for all of a kind, and more about this one."""

    def __init__(self, why, detail=""):
        super().__init__(why)
        self.why, self.detail = why, detail


class Rendered(NamedTuple):
    """A conversation's text, and in characters where prompts for an answer end, and (start, end) of each answer, without what ends its turn
    where the template does not mark answers itself."""

    text: str
    prompts: list
    answers: list
    marked: bool


class ChatTemplate:
    """A tokenizer's chat template, or one from a file.

    The template sees the date on which it was loaded, so that all conversations of a folder have the same.

    Args:
        tokenizer: `DocumentTokenizer`. path: of a Jinja file, None for the tokenizer's own template.

    Raises:
        UserError: there is no template, or the file can't be read.
    """

    def __init__(self, tokenizer, path=None):
        self.served = served_tokenizer(os.path.expanduser(tokenizer.name))
        self.given = read_template(path) if path else None
        if not (self.given or self.served.chat_template):
            raise UserError(f"tokenizer {tokenizer.name}: has no chat template; give its model's in a Jinja file, --chat_template=FILE")
        templates = self.given or self.served.chat_template
        self.templates = templates if isinstance(templates, dict) else {"default": templates}
        self.check_syntax(tokenizer.name if path is None else path)
        self.marks = {text: bool(MARKS.search(text)) for text in self.templates.values()}
        self.date = date.today() if any("strftime_now" in template for template in self.templates.values()) else None
        now = {"strftime_now": lambda format: self.date.strftime(format)} if self.date else {}
        self.variables = self.served.special_tokens_map | now
        self.ends = Counter()  # how many answers end with each token
        self.backend = Tokenizer.from_str(tokenizer.backend.to_str())
        self.backend.post_processor = processors.Sequence([])  # it may cut the spaces off a token's place in the text
        added = self.backend.get_added_tokens_decoder().items()
        self.special = {token for token, one in added if one.special} - {self.served.unk_token_id}  # which parts of words may be

    def check_syntax(self, name):
        for template in self.templates.values():
            try:
                render_jinja_template([], chat_template=template)
            except TemplateSyntaxError as error:
                raise UserError(f"chat template of {name}: line {error.lineno}: {reason(error)}; mend it, or give another") from None

    @property
    def sha256(self):
        """Of the templates, hex."""
        return hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(self.templates.items())).encode()).hexdigest()

    def identity(self, path):
        """What the manifest records of it; path: of the file that it is from, None for the tokenizer's."""
        dated = {"date": self.date.isoformat()} if self.date else {}
        about = {"origin": path or "tokenizer", "sha256": self.sha256, "templates": self.templates}
        return about | {"answers_end_with": dict(sorted(self.ends.items()))} | dated

    def write(self, messages, tools, prompt=False, marks=False):
        """(text, [(start, end) that the template marks as the assistant's]) of messages. prompt: go on to where the assistant begins."""
        template = self.served.get_chat_template(self.given, tools)
        (text,), ranges = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks, **self.variables,
        )  # fmt: skip
        return text, ranges[0] if ranges else []

    def tried(self, messages, tools, **how):
        """As `write`'s text; None where the template refuses such messages."""
        try:
            return self.write(messages, tools, **how)[0]
        except Exception:  # a template may fail like any program
            return None

    def render(self, conversation):
        """A conversation as `Rendered`.

        Raises:
            LeftOut: the template refuses it, there is no answer in it, or where answers begin and end is not sure.
        """
        messages, tools, _ = conversation
        marked = self.marks[self.served.get_chat_template(self.given, tools)]
        try:
            text, marks = self.write(messages, tools, marks=marked)
            text.encode()
        except UnicodeEncodeError:
            raise LeftOut("not UTF-8") from None
        except Exception as error:  # a template may fail like any program
            raise LeftOut("refused by the chat template", reason(error)) from None
        spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not spoken:
            raise LeftOut("without an answer")
        begun = [self.tried(messages[:number], tools, prompt=True) for number in spoken]
        prompts = [len(before) if before is not None and text.startswith(before) else None for before in begun]
        if not marked:
            return Rendered(text, prompts, self.unmarked_answers(conversation, text, dict(zip(spoken, prompts))), marked)
        answers = [(start, end) for start, end in marks if start < end]
        if not answers:
            raise LeftOut("without an answer")
        return Rendered(text, [prompt for prompt in prompts if prompt is not None], answers, marked)

    def unmarked_answers(self, conversation, text, begins):
        """(start, end) of each answer in `text`. begins: {number of its message: where it begins}; raises LeftOut where one isn't sure."""
        answers = []
        if None not in begins.values():
            ends = self.ends_at_once(conversation, text)
            answers = [(start, ends.get(number) or self.end_of(conversation, number, text, start)) for number, start in begins.items()]
        if not answers or any(end is None or end < start for start, end in answers):
            raise LeftOut(UNSURE)
        return answers

    def ends_at_once(self, conversation, text):
        """{number of its message: as `end_of`} of the answers that call no tools, from one text with PROBE in the place of each.

        All else must be there as before, around what they say. Where it isn't (an answer has a thought in it that the template moves),
        there are none, and `end_of` is asked for each.
        """
        messages, tools, _ = conversation
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant" and not message.get("tool_calls")]
        changed = [message | {"content": PROBE} if number in said else message for number, message in enumerate(messages)]
        parts = (self.tried(changed, tools) or "").split(PROBE)
        if PROBE in text or len(parts) != len(said) + 1 or not parts[-1] or not text.endswith(parts[-1]):
            return {}
        ends, end = {}, len(text) - len(parts[-1])
        for number, before in zip(reversed(said), reversed(parts[:-1])):
            ends[number], content = end, messages[number]["content"]
            written = next((before + form for form in (content, content.strip()) if text.endswith(before + form, 0, end)), None)
            if written is None:
                return {}
            end -= len(written)
        return {} if end else ends

    def end_of(self, conversation, number, text, start):
        """Where in `text` the template goes on behind the answer that is message `number` and begins at `start`; None if that isn't sure.

        With another text in the answer's place the template writes the same behind it. An answer that calls tools may be ended in another
        way: there the last call's arguments are replaced, and its end is the special token that the conversation up to it ends with.
        """
        messages, tools, _ = conversation
        if PROBE in text:
            return None
        calls = messages[number].get("tool_calls")
        changed = messages[number] | ({"tool_calls": with_probe(calls)} if calls else {"content": PROBE})
        behind = self.behind_probe([*messages[:number], changed, *messages[number + 1 :]], tools)
        if not behind or not text.endswith(behind) or len(text) - len(behind) < start:
            return None
        end = len(text) - len(behind)
        if not calls:
            return end
        closing = self.behind_probe([*messages[:number], changed], tools)
        if not closing or not behind.startswith(closing):
            return None
        encoded = self.backend.encode(closing, add_special_tokens=False)
        places = [place for token, place in zip(encoded.ids, encoded.offsets) if token in self.special]
        return end + places[-1][0] if places else None

    def behind_probe(self, messages, tools):
        """What the template writes behind the only PROBE in some messages; None where it refuses them, or has it elsewhere too."""
        text = self.tried(messages, tools)
        return text.partition(PROBE)[2] if text and text.count(PROBE) == 1 else None

    def encode(self, rendered):
        """(ids int32 [n], answers int32 [a, 3]) of each `Rendered`, or the `LeftOut` that tells why there are none.

        answers: for each the number of tokens of the prompt that asks for it, -1 where that isn't known, its first token, and the one
        behind its last, which is the special token that ends its turn.
        """
        encodings = self.backend.encode_batch([one.text for one in rendered], add_special_tokens=False)
        return [self.placed(one, Tokens(encoding)) for one, encoding in zip(rendered, encodings)]

    def placed(self, rendered, tokens):
        prompts = {start: self.token_at(start, rendered.text, tokens) for start in rendered.prompts}
        answers = []
        for start, end in rendered.answers:
            first = tokens.beginning(start) if rendered.marked else prompts.get(start)
            last = self.end_token(end, rendered, tokens)
            if first is None or last is None or first >= last:
                return LeftOut(UNSURE)
            answers.append((-1 if prompts.get(start) is None else first, first, last))
        return np.array(tokens.ids, np.int32), np.array(answers, np.int32)

    def count_ends(self, encoded):
        """Count the tokens that answers end with, of an encoding.Encoded."""
        self.ends.update(encoded.tokens[encoded.answers[:, 2] - 1].tolist())

    @lru_cache(maxsize=1024)
    def ids_of(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def token_at(self, place, text, tokens):
        """As `Tokens.beginning`, but None also where the text before has other tokens when it stands alone, as a prompt does.

        A special token parts what is before it from what is behind, so only what follows the last one is compared.
        """
        token = tokens.beginning(place)
        if token is None:
            return None
        begin = next((number for number in range(token - 1, -1, -1) if tokens.ids[number] in self.special), 0)
        alone = text[tokens.span(begin)[0] if begin else 0 : place]
        return token if self.ids_of(alone) == tokens.ids[begin:token] else None

    def end_token(self, place, rendered, tokens):
        """The number behind the special token that ends a turn whose text ends at a character; None where there is none."""
        token, ids = tokens.first_from(place), tokens.ids
        if rendered.marked and token and ids[token - 1] in self.special and tokens.span(token - 1)[1] == place:  # the mark holds it
            return token
        while token < len(ids) and ids[token] not in self.special:
            token += 1
        return token + 1 if token < len(ids) and not rendered.text[place : tokens.span(token)[0]].strip() else None


class Tokens:
    """The tokens of a text. ids: a list. span: function of a token's number giving (start, end) in characters.

    Places are looked up one by one: a list of all would take longer.
    """

    def __init__(self, encoding):
        self.ids, self.span = encoding.ids, encoding.token_to_chars

    def first_from(self, place):
        """The number of the first token that begins at a character or behind it; as many as there are where none does."""
        return bisect_left(range(len(self.ids)), place, key=lambda token: self.span(token)[0])

    def beginning(self, place):
        """The number of the token that begins at a character, None where one stands across it."""
        token = self.first_from(place)
        begins = token < len(self.ids) and self.span(token)[0] == place
        return token if begins and (token == 0 or self.span(token - 1)[1] <= place) else None


def with_probe(calls):
    """Calls of tools, the last with PROBE for its arguments."""
    function = calls[-1].get("function", calls[-1]) | {"arguments": {"to": PROBE}}
    return [*calls[:-1], calls[-1] | {"function": function} if "function" in calls[-1] else function]


def read_template(path):
    """The text of a template file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"--chat_template={path}: can't be read ({problem}); give a file with a Jinja template") from None
    if not text.strip():
        raise UserError(f"--chat_template={path}: is empty; give a file with a Jinja template")
    return text
