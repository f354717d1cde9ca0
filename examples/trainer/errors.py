"""The one exception that the command line turns into a message and exit code 1."""


class TrainingError(Exception):
    """Something a user can put right: the message says what and how."""
