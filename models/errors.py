"""The one exception that means: what the user asked for cannot be done, and here is the remedy."""


class InputError(ValueError):
    """Bad input. The message is one line: the field, its value, what was expected. The command line exits with 2."""
