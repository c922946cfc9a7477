"""Metrics on disk: what is in the file after crashes and resumes."""

import json
import resource
import struct

import pytest

from streamdit_jax.errors import StreamDiTError
from streamdit_jax.training.metrics import MetricsWriter, read_metrics


def test_lines_are_json_and_survive_a_resume_once(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 8):
            writer.write(step, {"loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # a crash in the middle of a line
    with MetricsWriter(tmp_path, step=5, tensorboard=False) as writer:
        for step in range(6, 9):
            writer.write(step, {"loss": 10.0 + step})
    after = path.read_text().splitlines()
    assert after[:5] == before[:5]
    assert [json.loads(line) for line in after[5:]] == [{"step": s, "loss": 10.0 + s} for s in (6, 7, 8)]
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "mae": 2.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "mae": 2.0}


def test_lines_are_on_disk_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.25, "mae": 0.5})
        writer.write(4, {"loss": 0.125, "mae": float("nan")})
    with MetricsWriter(tmp_path, step=3) as writer:
        writer.write(4, {"loss": 0.0625})
    scalars, starts = set(), []
    for path in (tmp_path / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(data[12 : 12 + length]),)
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            scalars |= {(value.tag, event.step, value.simple_value) for value in event.summary.value}
            starts += [event.step] if event.HasField("session_log") else []
            data = data[16 + length :]
    assert starts == [4]  # from where TensorBoard drops what it was told before
    assert scalars == {("loss", 3, 0.25), ("mae", 3, 0.5), ("loss", 4, 0.125), ("loss", 4, 0.0625)}


def test_full_disk_is_said_and_leaves_a_sound_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file grows beyond this, as if the disk were full
        try:
            with pytest.raises(StreamDiTError, match=r"metrics\.jsonl: metrics cannot be written: File too large; "):
                for step in range(2, 9):
                    writer.write(step, {"loss": 1 / 3})
            writer.close()  # with nothing left to be written
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == 100  # the last line is torn
    with MetricsWriter(tmp_path, step=2, tensorboard=False) as writer:
        writer.write(3, {"loss": 3.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamDiTError, match=r"file.*metrics\.jsonl: metrics cannot be written: "):
        MetricsWriter(tmp_path / "file")
