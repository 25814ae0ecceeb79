"""The one exception that stands for a mistake a person can put right."""


class UserError(Exception):
    """One line that names the thing at fault and the remedy; the command line prints it and exits with code 2."""
