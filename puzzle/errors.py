"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """One line for people: what is wrong, where, and how to mend it. The command line exits with code 2."""
