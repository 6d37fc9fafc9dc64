"""Programs in several real processes on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence


def launched(program: str, arguments: Sequence[str], *, processes: int = 2, options: Sequence[str] = ()) -> str:
    """Runs a Python program as launch/local.py starts it, and sees that it ends well; what it printed."""
    command = [sys.executable, "launch/local.py", "--processes", str(processes), *options, "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", program, *arguments],
        # The tests' own count of devices is not theirs.
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
