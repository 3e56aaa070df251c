"""Checks a prepared data set for damage."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpmc_jax.data import decode, parallel_map, splits
from mpmc_jax.data.builders import base
from mpmc_jax.data.check import Report, note_absent
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL


def check(info: DatasetInfo) -> Report:
    """Decodes every record and compares it with metadata.json.

    This covers ids and their order, counts, the classes in each mask, label values,
    sizes, and the SHA-256 of each split. The report has no digests; its warnings are
    those of the check at preparation.
    """
    problems: list[str] = []
    pixels, images_with = np.zeros(256, np.int64), np.zeros(256, np.int64)
    present: dict[str, tuple[int, ...]] = {}
    for split, ids in info.ids.items():
        records = _open(info, split, problems)
        if len(records) != len(ids):
            problems.append(f"{split}: {len(records)} records for {len(ids)} ids")
        digest = hashlib.sha256()
        outcomes = parallel_map.map_with_progress(
            lambda position, split=split, records=records: _check_record(
                info, split, position, records
            ),
            range(min(len(records), len(ids))),
            f"checking {split}",
        )
        for found, counts, record in outcomes:
            problems += found
            if record is None:
                continue
            base.add_record(digest, *record)
            if counts is not None:
                pixels += counts
                images_with += counts > 0
                seen = np.flatnonzero(counts[: info.facts.num_classes])
                present[record[0]] = tuple(map(int, seen))
        if digest.hexdigest() != info.contents.get(split):
            problems.append(f"{split}: the records are not those that were written")
    problems += _compare_present(info, present)
    if problems:
        problems.append(
            f"remove {info.directory} and prepare the data set again from its source"
        )
    name, classes = info.facts.dataset, info.facts.class_names
    problems += splits.check_labels(name, info.ids, info.present)
    return Report(
        tuple(problems),
        pixels,
        images_with,
        present,
        {},
        info.facts.pixels,
        warnings=info.warnings,
        notes=tuple(
            note_absent(name, info.ids.get("train", ()), info.present, classes)
        ),
    )


def _open(info: DatasetInfo, split: str, problems: list[str]) -> Sequence[dict]:
    try:
        return info.records(split)
    except ValueError as error:
        problems.append(str(error))
        return ()


def _check_record(
    info: DatasetInfo, split: str, position: int, records: Sequence[dict]
) -> tuple[list[str], np.ndarray | None, tuple[str, bytes, bytes] | None]:
    """Returns a record's problems, its label counts if labeled, and its contents.

    The contents are id, image and mask.
    """
    name = f"{split}, record {position} ({info.ids[split][position]})"
    try:
        record: Any = records[position]
    except ValueError as error:
        return [str(error)], None, None
    key = record["id"]
    key = key.decode() if isinstance(key, bytes) else key
    parts = (key, record["image"], record["mask"])
    problems = []
    if key != info.ids[split][position]:
        problems.append(f"{name}: holds {key!r}")
    try:
        decoded = decode.record_image(parts[1], info.image_format, info.facts.pixels)
        size = decode.as_array(decoded).shape[:2]
        label_hw = decode.record_label(parts[2])
    except UnreadableImage as error:
        return [*problems, f"{name}: {error}"], None, parts
    if not record["labeled"]:
        return problems, None, parts
    if size != label_hw.shape:
        problems.append(f"{name}: image {size}, mask {label_hw.shape}")
    counts = np.bincount(label_hw.ravel(), minlength=256)
    wrong = np.flatnonzero(counts[info.facts.num_classes : IGNORE_LABEL])
    if wrong.size:
        values = (wrong + info.facts.num_classes).tolist()
        problems.append(f"{name}: label values {shorten(values)} are not classes")
    return problems, counts, parts


def _compare_present(
    info: DatasetInfo, present: dict[str, tuple[int, ...]]
) -> list[str]:
    wrong = sorted(
        key
        for key in {*present, *info.present}
        if present.get(key) != info.present.get(key)
    )
    return (
        [f"masks hold other classes than metadata.json says: {shorten(wrong)}"]
        if wrong
        else []
    )


def summary(info: DatasetInfo) -> str:
    """Describes a data set: images per split, fingerprint, whether it is partial."""
    facts = info.facts
    lines = [
        f"{facts.dataset}/{key}: {quantity(len(ids), 'image')}"
        for key, ids in info.ids.items()
    ]
    mark = " (partial)" if facts.partial else ""
    return "\n".join([*lines, f"fingerprint {facts.fingerprint}{mark}"])
