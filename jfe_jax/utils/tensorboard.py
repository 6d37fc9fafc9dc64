"""TensorBoard's event files, scalars only.

The format is a sequence of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the data), each
holding an `Event` protocol buffer. The writers that packages offer import a deep-learning framework besides.
"""

import os
import socket
import struct
import time
from pathlib import Path

_SESSION_START = b"\x08\x01"  # SessionLog {status: START}


def _make_crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC_TABLE = _make_crc_table()


class EventWriter:
    """Appends scalars to a new event file in a directory."""

    def __init__(self, directory: Path, purge_step: int | None = None):
        """`purge_step`: TensorBoard forgets what older files in the directory say of this step and later ones."""
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        # Two in one second are two files.
        suffixes = (f".{number}" for number in range(1 << 30))
        self._file = (directory / (name + next(s for s in suffixes if not (directory / (name + s)).exists()))).open(
            "wb"
        )
        self._write(_encode_bytes(3, b"brain.Event:2"))
        if purge_step is not None:
            self._write(_encode_int(2, purge_step) + _encode_bytes(7, _SESSION_START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of the curve `tag`."""
        point = _encode_bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
        self._write(_encode_int(2, step) + _encode_bytes(5, _encode_bytes(1, point)))

    def flush(self) -> None:
        """Hands everything to the system."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and ends."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _encode_int(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _encode_varint(value)


def _encode_bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
