"""What Linux says of a process's memory; getrusage's peak is inherited from the process that started this one."""

from pathlib import Path


def peak() -> int:
    """KiB: the most pages that this process has had in memory, of files too."""
    return status("VmHWM")


def status(name: str) -> int:
    """KiB, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
