"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the thing and the mend.

    Scripts print its message and end with exit code 1; a library caller may catch it as a
    `ValueError`. Anything else that is raised is a bug and keeps its traceback.
    """
