"""What the scripts share; each module says in its first line what it holds."""


class InputError(ValueError):
    """A flag, file or folder that cannot be used: the scripts print its message as one line and exit with status 2."""


class RunError(RuntimeError):
    """A run that cannot go on: the scripts print its message as one line and exit with status 1."""
