"""Which language a document is in, told by `py3langid`: its model comes with it, and nothing is asked of a network."""

from functools import cache

from fms_spec.errors import UserError

SEEN = 1000  # characters of a document that are looked at, the first


class Languages:
    """Tells documents in some languages from those in others.

    Args:
        wanted: ISO 639 codes of the languages. where: the setting that asks for them, for messages.

    Raises:
        UserError: `py3langid` is not there, or knows no such language.
    """

    def __init__(self, wanted, where):
        try:
            self.identifier, self.wanted = identifier(), {*wanted}
        except ImportError:
            raise UserError(f"{where}: needs py3langid; pip install 'fms-spec[languages]', or leave it out") from None
        unknown = self.wanted - {*self.identifier.nb_classes}
        if unknown:
            raise UserError(f"{where}: {min(unknown)} is the code of no language that can be told; give ISO 639 codes such as en, de, zh")

    def other(self, texts):
        """The code of the language that texts are in, if it is none that is wanted; None where it is, or there is nothing to tell it by."""
        text = " ".join(texts)[:SEEN]
        language = self.identifier.classify(text)[0] if text.strip() else None
        return None if language in self.wanted else language


@cache
def identifier():
    """What tells languages, read once for all sources."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
