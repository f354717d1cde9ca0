"""The one exception that the command line turns into a message and exit code 1."""


class TrainingError(Exception):
    """An error that the user can fix; the message says what is wrong and how."""
