"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """One line for people: what is wrong, where, and how to mend it. The command line exits with code 2."""


def describe(error: OSError) -> str:
    """An error of the operating system (full disk, no permission, no such file) in one line."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
