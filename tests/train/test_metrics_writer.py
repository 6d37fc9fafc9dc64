"""What a run writes about itself."""

import json
import struct

from jfe_jax.train.metrics_writer import MetricsLog
from jfe_jax.utils.tensorboard import EventWriter

# What tensorboardX writes for Event {wall_time: 1.0, file_version: "brain.Event:2"}, checksums and all.
VERSION = bytes.fromhex("1800000000000000a37f4b2209000000000000f03f1a0d627261696e2e4576656e743a3286bf577a")


def records(path):
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    return found


def test_event_files_are_byte_for_byte_the_format(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.0)
    writer = EventWriter(tmp_path, purge_step=300)
    writer.scalar("train/loss", 0.5, 301)
    writer.close()
    (path,) = tmp_path.iterdir()
    assert path.read_bytes().startswith(VERSION)
    _, start, scalar = records(path)
    assert start[9:] == b"\x10\xac\x02" + b"\x3a\x02\x08\x01"
    assert scalar[9:] == b"\x10\xad\x02" + b"\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15" + struct.pack("<f", 0.5)


def test_a_log_continues_after_the_step(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.write(3, {"val_loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2)
    log.write(3, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 7.0}]
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_a_new_log_begins_anew(tmp_path):
    MetricsLog(tmp_path, 0).close()
    log = MetricsLog(tmp_path, 0)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert len(list(tmp_path.glob("events.*"))) == 1
