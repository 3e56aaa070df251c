"""What a run writes of its numbers: metrics.jsonl and TensorBoard's event files."""

import contextlib
import fcntl
import logging
import math
import os
import re
import resource
import struct
import sys
import termios

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.training import metric_writer
from tests.support.programs import read_metrics


def test_a_step_that_compiled_makes_no_speed(tmp_path):
    made = metric_writer.MetricWriter(tmp_path, 0, 10, images=4)
    made.restart_clock(untimed=1)
    for step in (1, 2):
        made.add({"loss": 1.0, "lr": 0.1})
        made.flush(step)
    made.close()
    first, second = read_metrics(tmp_path)
    assert "train/images_per_second" not in first
    assert second["train/images_per_second"] > 0


def test_a_mean_counts_the_steps_that_had_a_number(tmp_path):
    made = metric_writer.MetricWriter(tmp_path, 0, 10, images=4)
    weights = [math.nan, 0.2, 0.4, math.nan]
    for step, weight in enumerate(weights, start=1):
        made.add({"loss": float(step), "unlabeled_weight": weight, "lr": 0.1})
        if step in (3, 4):
            made.flush(step)
    made.close()
    first, second = read_metrics(tmp_path)
    assert first["train/loss"] == 2 and second["train/loss"] == 4
    assert first["train/unlabeled_weight"] == pytest.approx(0.3)
    assert "train/unlabeled_weight" not in second


def test_metrics_are_json_and_resume_drops_later_lines(tmp_path, caplog):
    first = metric_writer.MetricWriter(tmp_path, 0, 10, images=4)
    for step in (1, 2, 3):
        first.add({"loss": float(step), "lr": 0.1})
        first.flush(step)
    first.write(3, {"val/miou": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')  # cut short by a kill
    second = metric_writer.MetricWriter(tmp_path, 2, 10, images=4)
    with caplog.at_level(logging.INFO):
        second.add({"loss": 1.0, "lr": 0.1})
        second.flush(3)
    second.close()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train/loss"] == 1.0


@pytest.mark.parametrize("losses", [("unlabeled",), ("s1", "s2", "fp", "patch")])
def test_progress_fits_a_terminal_of_80_columns(tmp_path, monkeypatch, losses):
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(writer, "w") as terminal, open(reader, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        made = metric_writer.MetricWriter(tmp_path, 12_345, 240_000, images=16)
        made.restart_clock()
        made._since -= 1
        values = {f"loss_{name}": 0.12345 for name in losses}
        made.add({"loss": 12.3456, "lr": 0.1, **values})
        made.flush(12_346)
        made.close()
        terminal.close()
        output = b""
        with contextlib.suppress(OSError):  # all is read, and nobody writes any more
            while part := screen.read(10_000):
                output += part
    line = output.decode().rstrip("\r\n").split("\r")[-1]
    bar, text = line.split("| ")
    assert len(bar) >= 5 and len(line) <= 80
    pattern = r"12346/240000, loss 12\.346, \d+\.\d images/s, \d+h\d\dm left"
    assert re.fullmatch(pattern, text.rstrip())


def test_lines_that_are_cut_are_kept_beside_and_told(tmp_path, caplog):
    """A damaged line costs itself alone; without checkpoints no line is lost."""
    path, beside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.cut"
    damaged = [b'{"step": 2, "tr\n', b"\0\0\xff\n", b"[1]\n", b'{"step": null}\n']
    whole = [b'{"step": %d, "train/loss": 1.0}\n' % step for step in (1, 2, 3, 4)]
    path.write_bytes(b"".join([*whole[:2], *damaged, *whole[2:]]) + b'{"step": 1')
    with caplog.at_level(logging.INFO):
        metric_writer.MetricWriter(tmp_path, 3, 10, images=4).close()
    assert path.read_bytes() == b"".join(whole[:3])
    cut = b"".join([*damaged, whole[3]]) + b'{"step": 1\n'
    assert beside.read_bytes() == cut
    assert "moved 6 lines to metrics.jsonl.cut: 1 of steps after step 3" in caplog.text
    assert "and 5 that cannot be read" in caplog.text
    # Nothing to cut: nothing is said or written.
    caplog.clear()
    metric_writer.MetricWriter(tmp_path, 3, 10, images=4).close()
    assert not caplog.text and beside.read_bytes() == cut
    # The checkpoints are gone: the run begins again.
    metric_writer.MetricWriter(tmp_path, 0, 10, images=4).close()
    assert path.read_bytes() == b""
    assert beside.read_bytes() == cut + b"".join(whole[:3])


def test_readers_leave_out_the_line_that_a_run_is_writing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "tr')
    assert metric_writer.read_metrics(path) == [{"step": 1, "train/loss": 1.0}]
    for damaged in ("{", "[]", '{"step": null}'):
        path.write_text(f'{{"step": 1}}\n{damaged}\n')
        with pytest.raises(ValueError, match="line 2 cannot be read; .*jsonl.cut"):
            metric_writer.read_metrics(path)


@pytest.mark.parametrize(("names", "limit"), [(1, 1500), (100, 9000)])
def test_a_full_disk_names_the_file_and_loses_no_line_before(tmp_path, names, limit):
    """Of one number a line metrics.jsonl is full first, of many TensorBoard's file."""
    values = {f"{i}": 2.0 for i in range(names)}

    def begin(start):
        return metric_writer.MetricWriter(tmp_path, start, steps=5, images=4)

    reporter = begin(0)
    reporter.write(1, values)
    reporter.sync(1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        message = r"metrics\.jsonl .*: step 2 .* File too large.* same command again"
        with pytest.raises(OSError, match=message):
            for _ in range(2000):
                reporter.write(2, values)
        reporter.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    lines = (tmp_path / "metrics.jsonl").stat().st_size
    assert (lines > limit - 30) == (names == 1)
    again = begin(1)
    again.write(2, values)
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_events_are_what_tensorboard_reads(tmp_path):
    for start in (0, 2):
        made = metric_writer.MetricWriter(tmp_path, start, steps=5, images=4)
        made.write(start + 1, {"train/loss": 0.5 + start})
        made.close()
    found = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        assert path.name.startswith("events.out.tfevents.")
        for record in tf_records(path):
            event = Event.FromString(record)
            if event.HasField("session_log"):
                found = {k: v for k, v in found.items() if k < event.step}
            for value in event.summary.value:
                assert value.tag == "train/loss"
                found[event.step] = value.simple_value
    assert found == {1: 0.5, 3: 2.5}


def test_no_two_classes_share_a_tag_and_tags_are_names(tmp_path):
    """Names that other writers of events change to the same tag."""
    classes = ("a b", "a_b", "a(b", "a/b", " a_b", "a:b", "A_B", "a.b", "ä_b", "_")
    result = EvalResult(
        confusion=np.diag(np.arange(1, len(classes) + 1)),
        histogram=None,
        num_images=1,
        seconds=1.0,
        pad_to=0,
        protocol="whole",
        programs=1,
    )
    # An IoU of every class that is another one's.
    result.confusion[0, 1:] = 1
    wanted = {f"val/{k}": v for k, v in result.scalars(classes).items()}
    assert len([name for name in wanted if "/iou/" in name]) == len(classes)
    made = metric_writer.MetricWriter(tmp_path, 0, steps=1, images=4)
    made.write(1, wanted)
    made.close()
    found = [
        (value.tag, value.simple_value)
        for path in (tmp_path / "tensorboard").iterdir()
        for record in tf_records(path)
        for value in Event.FromString(record).summary.value
    ]
    assert len(found) == len(wanted)
    assert dict(found) == pytest.approx(wanted)


def tf_records(path):
    """The records of a TFRecord file: length, its checksum, bytes, their checksum."""
    content, records = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        records.append(content[12 : 12 + length])
        content = content[16 + length :]
    return records


class _Kept:
    """A writer that keeps what it gets."""

    def __init__(self):
        self.got = []

    def write(self, step, values):
        self.got.append((step, dict(values)))

    def write_pictures(self, step, pictures):
        self.got.append((step, dict(pictures)))

    def flush(self):
        self.got.append("flushed")

    def close(self):
        self.got.append("closed")


def test_further_writers_get_numbers_and_pictures(tmp_path):
    kept, picture = _Kept(), metric_writer.Picture(b"a PNG", 2, 3)
    made = metric_writer.MetricWriter(tmp_path, 0, 9, images=4, further=lambda: [kept])
    made.write(1, {"val/miou": 0.5})
    made.write_pictures(1, {"panels/a": picture})
    made.sync(1)
    made.close()
    pictures = (1, {"panels/a": picture})
    assert kept.got == [(1, {"val/miou": 0.5}), pictures, "flushed", "closed"]
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [Event.FromString(record).summary.value for record in tf_records(path)]
    (image,) = [v for found in values for v in found if v.tag == "panels/a"]
    assert (image.image.height, image.image.width) == (2, 3)
    assert image.image.encoded_image_string == b"a PNG"
    assert len(read_metrics(tmp_path)) == 1


def test_log_lines_escape_what_a_terminal_would_obey(capfd):
    logger = logging.getLogger("mpmc_jax")
    kept = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    try:
        metric_writer.setup_logging()
        logger.info("image %s", "a\x1b[31m\nb.png")
    finally:
        logger.handlers, level, logger.propagate = kept
        logger.setLevel(level)
    assert capfd.readouterr().err.endswith("  image a\\x1b[31m\nb.png\n")
