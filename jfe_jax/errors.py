"""Defines exceptions for invalid input, as opposed to bugs in the program."""


class UserError(Exception):
    """Bad input from a person: a file, a key, a machine too small.

    The message is one line that names the file, line or key and says what to do. The command line prints it to
    standard error and exits 1, without a traceback unless `--debug` is given.
    """


class RemoteProcessError(UserError):
    """An error that another process of the same job raised and reports; this process exits with it silently."""


def format_error(error: Exception) -> str:
    """Formats an error as one line for the user."""
    if isinstance(error, OSError):
        # A full disk, a missing permission: the system's own words say it, with the file's name.
        return f"{error.filename or 'file'}: {error.strerror or error}"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
