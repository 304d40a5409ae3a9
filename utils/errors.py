"""The one error that the scripts turn into a line of text, and the text of others."""


class InputError(ValueError):
    """Bad input from the user: shown as one line, exit code 2. `key` is the setting at fault, as in "data.root"."""

    def __init__(self, key, message):
        super().__init__(key, message)  # both in args, so that the error survives pickling
        self.key, self.message = key, message

    def __str__(self):
        return f"{self.key}: {self.message}"


class Busy(InputError):
    """Another process is at this run: exit code 3."""


def one_line(error):
    """What another library's exception says, without line breaks; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
