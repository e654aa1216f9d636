"""Conversations as a chat template writes them, and which of their tokens the assistant wrote.

Characters of the rendered text are told apart first, by the template's own marks or by rendering the conversation again in part; then
tokens are, and what doesn't begin and end between two tokens is not known for sure. Shapes: n tokens, a answers.
"""

import hashlib
import os
import re
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
        self.date = date.today() if any("strftime_now" in template for template in self.templates.values()) else None
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
        now = {"strftime_now": self.date.strftime} if self.date else {}
        (text,), ranges = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks, **self.served.special_tokens_map, **now,
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
        marked = bool(MARKS.search(self.served.get_chat_template(self.given, tools)))
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
        if marked:
            answers = [(start, end) for start, end in marks if start < end]
            if not answers:
                raise LeftOut("without an answer")
        else:
            answers = [(prompt, self.end_of(conversation, number, text, prompt)) for number, prompt in zip(spoken, prompts)]
        if any(None in answer for answer in answers):
            raise LeftOut(UNSURE)
        return Rendered(text, [prompt for prompt in prompts if prompt is not None], answers, marked)

    def end_of(self, conversation, number, text, start):
        """Where in `text` the template goes on behind the answer that is message `number` and begins at `start`; None if that isn't sure.

        With another text in the answer's place the template writes the same behind it. An answer that calls tools may be ended in another
        way: there the last call's arguments are replaced, and its end is the special token that the conversation up to it ends with.
        """
        messages, tools, _ = conversation
        if start is None or PROBE in text:
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
        return [self.placed(one, encoding) for one, encoding in zip(rendered, encodings)]

    def placed(self, rendered, encoding):
        ids, offsets = encoding.ids, np.array(encoding.offsets, np.int64).reshape(-1, 2)
        prompts = {start: self.token_at(start, rendered.text, ids, offsets) for start in rendered.prompts}
        answers = []
        for start, end in rendered.answers:
            first = self.between(start, offsets) if rendered.marked else prompts.get(start)
            last = self.end_token(end, rendered, ids, offsets)
            if first is None or last is None or first >= last:
                return LeftOut(UNSURE)
            answers.append((-1 if prompts.get(start) is None else first, first, last))
        return np.array(ids, np.int32), np.array(answers, np.int32)

    def count_ends(self, encoded):
        """Count the tokens that answers end with, of an encoding.Encoded."""
        self.ends.update(encoded.tokens[encoded.answers[:, 2] - 1].tolist())

    @lru_cache(maxsize=1024)
    def ids_of(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def between(self, place, offsets):
        """The number of the token that begins at a character, None where one stands across it."""
        token = int(np.searchsorted(offsets[:, 0], place))
        begins = token < len(offsets) and offsets[token, 0] == place
        return token if begins and (token == 0 or offsets[token - 1, 1] <= place) else None

    def token_at(self, place, text, ids, offsets):
        """As `between`, but None also where the text before has other tokens when it stands alone, as a prompt does.

        A special token parts what is before it from what is behind, so only what follows the last one is compared.
        """
        token = self.between(place, offsets)
        if token is None:
            return None
        begin = next((number for number in range(token - 1, -1, -1) if ids[number] in self.special), 0)
        alone = text[offsets[begin, 0] if begin else 0 : place]
        return token if self.ids_of(alone) == ids[begin:token] else None

    def end_token(self, place, rendered, ids, offsets):
        """The number behind the special token that ends a turn whose text ends at a character; None where there is none."""
        token = int(np.searchsorted(offsets[:, 0], place))
        if rendered.marked and token and ids[token - 1] in self.special and offsets[token - 1, 1] == place:  # the mark holds it
            return token
        while token < len(ids) and ids[token] not in self.special:
            token += 1
        return token + 1 if token < len(ids) and not rendered.text[place : offsets[token, 0]].strip() else None


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
