"""Runs one side of a benchmark in its own process, as a user would run it, with one request per line."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from jfe_jax.errors import UserError


class Served:
    """Starts `python -m MODULE TASK`, which calls `serve`.

    Args:
      name: of the side, for people.
      module: what is run.
      task: what its `main` gets as JSON.
      env: beside this process's own environment.
    """

    def __init__(self, name: str, module: str, task: dict[str, Any], **env: str):
        self._name = name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-m", module, json.dumps(task)]
        self._process = subprocess.Popen(command, env={**os.environ, **env}, text=True, bufsize=1, **pipes)

    def ask(self, line: str) -> None:
        """Executes the request `line`, and waits for it.

        Raises:
          UserError: the process ended; its output has the reason.
        """
        try:
            self._process.stdin.write(f"{line}\n")
            # What libraries print is passed over.
            while (answer := self._process.stdout.readline()) != f"{line}\n":
                if not answer:
                    raise self._ended()
        except BrokenPipeError as error:
            raise self._ended() from error

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ended(self) -> UserError:
        return UserError(f"{self._name}'s process ended with status {self._process.wait()}")


def serve(work: Callable[[str], Any]) -> None:
    """Executes each line of the input, and repeats the line when it is done."""
    for line in sys.stdin:
        work(line.rstrip("\n"))
        print(line, end="", flush=True)
