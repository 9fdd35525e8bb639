"""The one exception type a user is meant to see: `train.py` prints it as a single line and exits with status 2."""


class UserError(Exception):
    """A mistake in the input (config, weights, data, folder) or a run that cannot honestly go on.

    The message is one line that names the thing, its value and what would be valid.
    """


LONGEST = 1500  # characters of a message: a name in it may have any length


def one_line(text: str) -> str:
    """A message as one line of printable characters: what a user typed, or a file held, may have none of that."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
