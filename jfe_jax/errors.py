"""The one exception that means "your input is wrong", as against "the program is wrong"."""


class UserError(Exception):
    """Bad input from a person: a file, a key, a machine too small.

    The message is one line that names the file, line or key and says what to do. The command line prints it to
    standard error and exits 1, without a traceback unless `--debug` is given.
    """
