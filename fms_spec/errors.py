"""The one exception that is meant for the person at the keyboard, and what its messages need."""

import reprlib
from typing import Any

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlevel = 2


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the thing and the mend.

    Scripts print its message and end with exit code 1; a library caller may catch it as a
    `ValueError`. Anything else that is raised is a bug and keeps its traceback.
    """


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ, as (dotted name, old, new); None if they are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if difference:
                return difference
        return None
    return None if old == new else (path, old, new)


def shown(value: Any) -> str:
    """A value in a few words, whatever it holds."""
    try:
        return SHORT.repr(value)
    except ValueError:  # Python spells no number of over 4,300 digits
        return "a number of thousands of digits"
