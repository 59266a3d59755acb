"""The one exception that means: the input is wrong, not the program."""


class InputError(ValueError):
    """A file, field or argument that the user can mend; the message names it and says how.

    The command line prints it without a traceback and exits with status 2.
    """
