"""Sources into the spool: tokenised, without what is left out, and of each only as much as is needed."""

import heapq
import math

from data.prepare.encoding import encode_documents
from data.prepare.tables import READING, has_prompt, piece_length
from data.progress import progress
from data.tokenizer import refuse_unknown
from fms_spec.errors import UserError


def read_documents(spool, mixture, tokenizer, template, settings, unwanted, each):
    """Tokenise every source into the spool, one after the other; with max_tokens, only as much as is needed of each.

    template: `chat.ChatTemplate`, None where no source holds conversations. unwanted: functions of (`sources.Document`, `encoding.Encoded`)
    that give (why it is left out, more about it), None where it isn't; called in order, and no more of them once one does. each: see
    `encoding.encode_documents`.

    Raises:
        UserError: nothing is left of a source.
    """
    pieces = piece_length(settings.prompt_length, mixture)
    with progress(desc="tokenise", unit="token", unit_scale=True, total=settings.max_tokens) as bar:
        for number, part in enumerate(mixture.parts):
            read, enough = 0, Enough(settings, mixture.share(number), part.settings.limit)
            documents = part.documents(settings.generator(READING, number))  # of the first as with READING alone
            talks = part.source.conversations
            for document, encoded in encode_documents(documents, tokenizer, template if talks else None, part.skipped, each):
                tokens, answers, prefixed = encoded
                if tokenizer.overflows:
                    refuse_unknown(tokens, tokenizer.embedding_size, tokenizer.backend, part.label(document.file, document.row))
                found = next(filter(None, (test(document, encoded) for test in (part.misfit, *unwanted))), None)
                if found:
                    part.skipped.add(found[0], document, found[1])
                    continue
                prefix = tokenizer.prefix if prefixed else []
                # A text has an end-of-text token, which no prompt has.
                promptable = has_prompt(answers[:, 0], settings.prompt_length, prefix).any() if talks else len(tokens) > pieces
                about = (document.content.category, document.content.asked_by) if talks else (None, ())
                spool.append(encoded, number, document.file, document.row, promptable, about)
                read += 1
                bar.update(len(tokens))
                if enough.after(len(tokens), promptable):
                    break
            if not read:
                raise UserError(f"source {part.settings.path}: no documents" + (f"; {part.skipped}" if part.skipped.first else ""))


class Enough:
    """Tells when a source has given what is needed, whichever documents are held out later and whatever prefixes add.

    share: of max_tokens that is to come from it. limit: documents that are enough in any case, or None.
    """

    def __init__(self, settings, share, limit):
        self.held_out, self.limit = settings.held_out, limit
        self.wanted = None if settings.max_tokens is None else math.ceil(settings.max_tokens * share)
        self.longest, self.total, self.promptable, self.documents = [], 0, 0, 0

    def after(self, length, promptable):
        """True if, with one more document of `length` tokens, no more are needed. promptable: whether it may be held out."""
        self.documents += 1
        if self.documents == self.limit:
            return True
        if self.wanted is None:
            return False
        self.total += length
        self.promptable += bool(promptable)
        heapq.heappush(self.longest, length)
        if len(self.longest) > self.held_out:
            heapq.heappop(self.longest)
        return self.promptable >= self.held_out and self.total - sum(self.longest) >= self.wanted
