"""Runs one `jfe` command as several processes on this machine, joined over loopback: a pod in small.

    python launch/local.py --processes 4 --devices 2 -- jfe train --config FILE

Every process has `--devices` simulated CPU devices. Lines are prefixed with the process's number; process 0's come as
they are. The first process that fails ends the others; SIGTERM and SIGINT are handed to all.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import FrameType


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1, help="simulated devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each process runs")
    args = parser.parse_args()
    command = args.command[args.command[:1] == ["--"] :]
    if not command or args.processes < 1 or args.devices < 1:
        parser.error("give --processes and --devices of 1 or more, and a command after --")
    if shutil.which(command[0]) is None:
        parser.error(f"{command[0]}: no such program")
    return run(command, args.processes, args.devices)


def run(command: list[str], processes: int, devices: int) -> int:
    """Exit status: 0 if all processes ended so, else that of the first that did not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    shared = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JFE_COORDINATOR": f"127.0.0.1:{port}",
        "JFE_PROCESSES": str(processes),
    }
    running = [
        subprocess.Popen(
            command,
            env=shared | {"JFE_PROCESS": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group of its own, to be ended with all that it has started.
            start_new_session=True,
        )
        for number in range(processes)
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    readers = [threading.Thread(target=_relay, args=(number, process)) for number, process in enumerate(running)]
    for reader in readers:
        reader.start()
    status = _wait(running)
    for reader in readers:
        reader.join()
    return status


def _wait(running: list[subprocess.Popen]) -> int:
    # In whatever order they end: a process that fails leaves the others waiting for it.
    left, status = {process.pid: process for process in running}, 0
    while left:
        pid, code = os.wait()
        process = left.pop(pid, None)
        if process is None:
            continue
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode and not status:
            status = process.returncode if process.returncode > 0 else 128 - process.returncode
            for other in left.values():
                os.killpg(other.pid, signal.SIGKILL)
    return status


def _relay(number: int, process: subprocess.Popen) -> None:
    prefix = b"" if number == 0 else f"[{number}] ".encode()
    for line in process.stdout:
        sys.stdout.buffer.write(prefix + line)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
