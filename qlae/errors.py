"""The one exception that stands for a mistake a person can put right."""


class UserError(Exception):
    """One line that names the thing at fault and the remedy; the command line prints it and exits with code 2."""


class StorageError(UserError):
    """A run's folder cannot be written, so that no other run beside it could go on either."""
