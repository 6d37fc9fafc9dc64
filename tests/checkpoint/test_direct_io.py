"""What a buffer held is what its file holds, whatever the file system can do."""

import errno
import fcntl
import os
import resource

import ml_dtypes
import numpy as np
import pytest

from jfe_jax.checkpoint import direct_io
from jfe_jax.checkpoint.direct_io import AlignedBuffer, DirectWriter


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_files_are_as_long_as_what_they_hold(tmp_path, dtype):
    rng, buffer = np.random.default_rng(0), AlignedBuffer()
    # Around a disk's block, and the largest in between: what is left of it must not show.
    for shape in [(3, 1000), (1,), (4096,), (2, 2048), (4097,), ()]:
        array = rng.normal(size=shape).astype(dtype)
        buffer.array(shape, np.dtype(dtype))[...] = array
        buffer.write(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == array.tobytes(), shape


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_file_system_without_direct_writes_is_written_to_all_the_same(tmp_path, monkeypatch, refused):
    really_open, really_write = os.open, os.pwrite

    def fake_open(path, flag, mode):
        if refused == "open" and flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flag, mode)

    def fake_write(file, data, place):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_write(file, data, place)

    buffer = AlignedBuffer()
    buffer.array((5000,), np.dtype(np.int32))[...] = np.arange(5000)
    with monkeypatch.context() as patch:
        patch.setattr(direct_io.os, "open", fake_open)
        patch.setattr(direct_io.os, "pwrite", fake_write)
        buffer.write(tmp_path / "file")
    np.testing.assert_array_equal(np.fromfile(tmp_path / "file", np.int32), np.arange(5000))


def test_a_stream_is_what_was_given_to_it_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_io, "_WRITE_BYTES", 8192)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size).astype(np.float32) for size in (3, 5000, 2045, 0, 4096, 1, 777)]
    for count in range(len(arrays) + 1):
        with DirectWriter(tmp_path / "file") as stream:
            for array in arrays[:count]:
                scratch = array.copy()
                stream.write(scratch)
                # It is the caller's again.
                scratch[:] = np.nan
        assert (tmp_path / "file").read_bytes() == b"".join(array.tobytes() for array in arrays[:count]), count


def test_a_full_disk_is_told(tmp_path):
    buffer = AlignedBuffer()
    buffer.array((100_000,), np.dtype(np.uint8))[...] = 1
    # Files that cannot grow: what a full disk is to a writer, without needing one.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            buffer.write(tmp_path / "file")
        with pytest.raises(OSError, match="File too large"), DirectWriter(tmp_path / "stream") as stream:
            stream.write(np.ones(100_000, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_directory_that_is_not_there_cannot_be_waited_for(tmp_path):
    direct_io.sync_file_system(tmp_path)
    with pytest.raises(FileNotFoundError):
        direct_io.sync_file_system(tmp_path / "nowhere")
