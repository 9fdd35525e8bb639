"""The one exception type a user is meant to see: `train.py` prints it as a single line and exits with status 2."""


class UserError(Exception):
    """A mistake in the input (config, weights, data, folder) or a run that cannot honestly go on.

    The message is one line that names the thing, its value and what would be valid.
    """
