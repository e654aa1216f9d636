"""Conversations that the base model writes turn by turn: what it is to continue next, and what its tokens say.

From where the chat template begins a user's turn it writes a question, as Magpie has it (arXiv 2406.08464), and then answers it.
"""

import hashlib
import json
from dataclasses import dataclass

from data.prepare.chat import PROBE
from data.prepare.rows import LONE_SURROGATE
from fms_spec.errors import UserError

# A turn loops where over REPEATED of its passages of so many tokens stood in it before: what is said three times over has 2/3. Of 49
# answers that SmolLM2-135M-Instruct ended by itself none has over 0.30, and all but two have under 0.1.
PASSAGE, REPEATED = 8, 0.5


@dataclass
class Dialogue:
    """A conversation on its way.

    messages: as chat templates take them; those without "content" are to be written, the first of them next. tools: see
    `rows.Conversation`. ended: why it goes no further, None while it does.
    """

    messages: list
    tools: list | None = None
    ended: str | None = None

    @property
    def next(self):
        """The number of the message that is to be written next, None where none is."""
        unwritten = (number for number, message in enumerate(self.messages) if "content" not in message)
        return None if self.ended else next(unwritten, None)

    @property
    def answered(self):
        """The messages up to the last answer that is there: what may be trained on, [] for nothing."""
        answers = []
        for number, message in enumerate(self.messages, start=1):
            if "content" not in message:
                break
            if message["role"] == "assistant":
                answers.append(number)
        return self.messages[: answers[-1]] if answers else []


def own_dialogues(count, questions):
    """So many `Dialogue`s that are all to be written, each of some questions with their answers."""
    return [Dialogue([{"role": "user"}, {"role": "assistant"}] * questions) for _ in range(count)]


def rewritten(conversation):
    """The `Dialogue` of a `rows.Conversation` whose answers are to be written anew; so is one to a last question that has none.

    Calls of tools stay: what the tools gave back answers those very calls.
    """
    if LONE_SURROGATE.search(as_json(conversation)):
        return Dialogue([], ended="not UTF-8")
    messages = [
        {"role": "assistant"} if message["role"] == "assistant" and "tool_calls" not in message else message
        for message in conversation.messages
    ]
    asks = messages and messages[-1]["role"] in ("user", "tool")
    return Dialogue(messages + [{"role": "assistant"}] * bool(asks), conversation.tools)


def as_json(value):
    """A value as one line of JSON; what has no form there, such as a date in a Parquet file, as the text that a template makes of it."""
    return json.dumps(value, ensure_ascii=False, default=str)


class Turns:
    """Turns as the base model's chat template parts them.

    Args:
        template: `chat.ChatTemplate`. roles: whose turns are to be written, of "user" and "assistant".

    Attributes:
        ends: {role: set of the special tokens' ids that end its turn}, at first the template's alone.

    Raises:
        UserError: the template ends such a turn with no special token, so that where it ends isn't known.
    """

    def __init__(self, template, roles):
        self.template, self._seen = template, set()
        self.special = template.special | {template.served.unk_token_id}  # what no text of a turn has
        self.ends = {role: {self.end_of(role)} for role in roles}

    def end_of(self, role):
        asked = [] if role == "user" else [{"role": "user", "content": "?"}]
        behind = self.template.behind_probe([*asked, {"role": role, "content": PROBE}], None) or ""
        ids, places = self.encoded(behind)
        end = next((number for number, token in enumerate(ids) if token in self.special), None)
        if end is None or behind[: places[end][0]].strip():
            mend = "give another, --chat_template=FILE"
            raise UserError(f"the chat template ends no turn of the {role}'s with a special token, so where it ends isn't known; {mend}")
        return ids[end]

    def encoded(self, text):
        """(ids, the (start, end) of each in characters) of a text."""
        encoding = self.template.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def prompt(self, dialogue):
        """What the base model is to continue with the next message: a list of ids, None where the template refuses what is there."""
        number, tools = dialogue.next, dialogue.tools
        before = dialogue.messages[:number]
        if dialogue.messages[number]["role"] == "assistant":
            text = self.template.tried(before, tools, prompt=True)
            return self.encoded(text)[0] if text else None
        text = self.template.tried([*before, {"role": "user", "content": PROBE}], tools) or ""
        if PROBE not in text:
            return None
        begin = len(text[: text.rfind(PROBE)].rstrip(" "))  # a blank before a word is mostly of its first token, which the model writes
        return [token for token, (_, end) in zip(*self.encoded(text)) if end <= begin]

    def longest_prompt(self, dialogue, max_tokens):
        """About how many tokens the prompt for the dialogue's last turn has where all written before it come to so many."""
        messages = [message if "content" in message else message | {"content": PROBE} for message in dialogue.messages]
        text = self.template.tried(messages, dialogue.tools, prompt=True) or ""
        return len(self.encoded(text)[0]) + max_tokens * (sum("content" not in message for message in dialogue.messages) - 1)

    def take(self, dialogue, tokens):
        """Put what the base model wrote, a list of ids, into the dialogue as its next message, or end it there."""
        number, tools = dialogue.next, dialogue.tools
        role, end = dialogue.messages[number]["role"], next((at for at, token in enumerate(tokens) if token in self.special), None)
        text = self.template.backend.decode(tokens[:end], skip_special_tokens=False).strip()
        messages = [*dialogue.messages[:number], {"role": role, "content": text}, *dialogue.messages[number + 1 :]]
        if end is None:
            dialogue.ended = "cut at the limit"
        elif tokens[end] not in self.ends[role]:
            dialogue.ended = "special tokens within"
        elif not text:
            dialogue.ended = "empty"
        elif "\ufffd" in text:
            dialogue.ended = "not UTF-8"
        elif repeated_share(tokens[:end]) > REPEATED:
            dialogue.ended = "loops"
        elif role == "assistant" and not self.writes(messages[: number + 1], tools):
            dialogue.ended = "not written so by the chat template"
        elif self.is_copy(messages, tools):
            dialogue.ended = "copies"
        else:
            dialogue.messages = messages

    def writes(self, messages, tools):
        """Whether the template has the last message's text where the base model was to write it, as for thoughts it need not."""
        before, text = self.template.tried(messages[:-1], tools, prompt=True), self.template.tried(messages, tools) or ""
        return text.startswith(before) and text[len(before) :].lstrip().startswith(messages[-1]["content"])

    def is_copy(self, messages, tools):
        """Whether the same was asked before; from now on it was."""
        digest = hashlib.blake2b(as_json([messages, tools]).encode(errors="surrogatepass"), digest_size=16).digest()
        known = digest in self._seen
        self._seen.add(digest)
        return known


def repeated_share(tokens):
    """The share of passages of PASSAGE tokens that stood in the list before; 0 where it is no longer than one."""
    passages = [tuple(tokens[start : start + PASSAGE]) for start in range(len(tokens) - PASSAGE + 1)]
    return 1 - len(set(passages)) / len(passages) if passages else 0.0
