"""Names the masks that seem to be wrong, from the evidence of all images.

The limits are above what correct labels reach in CamVid, Pascal VOC 2012 (160 images)
and ACDC. In 30, 22 and 75 of their masks that have borders, these planted faults are
found: a mirrored mask, 100 %, 91 % and 67 %; a mask that is shifted by a twentieth of
the width, 100 %, 59 % and 15 %; two exchanged masks, 99 %, 11 of 13 pairs and 8 of 15.
If all masks are shifted by one pixel, this is found in 3, 2 and 4 of four directions.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mpmc_jax.data import decode, masks
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.doctor import edges
from mpmc_jax.data.doctor.evidence import Evidence
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.text import quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

# Bits of 256 in which near-duplicates differ; different pictures differ in 70 or more.
_NEAR = 24
# Gains of contrast of a mask that is mirrored, exchanged, or shifted by more than a
# pixel, see `edges.Contrast`.
_MIRRORED, _EXCHANGED, _MOVED = 8.0, 6.0, 20.0
_CANDIDATES = 64
# Ratio of contrasts if all masks are shifted by some pixels, and masks that it takes.
_SHIFTED, _MASKS = 1.06, 10
# Shares of the pixels alone among others: too many if it is unusual, and in any case.
_ISOLATED, _UNUSUAL, _NOISE = 0.004, 4.0, 0.03
# Shares of the pixels: of a tiny class; void in a useless mask.
_TINY, _VOID = 0.001, 0.95
# Share of borders with a class between the two, see `Evidence.blended`.
_BLENDED = 0.35
# Share of the masks beyond which inverted ones are not exceptions.
_INVERTED = 0.1


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that may be wrong with labels.

    Attributes:
      level: "warning" if it is probably wrong, "note" if it may be right.
      text: one line that names the files, and what to do.
      ids: the images that it is about.
    """

    level: str
    text: str
    ids: tuple[str, ...] = ()


def diagnose(source: Source, found: Mapping[str, Evidence]) -> list[Finding]:
    """Returns what may be wrong with the labels of a data set.

    Args:
      source: the data set.
      found: id -> evidence, of the images that could be read.
    """
    samples = {
        sample.id: sample
        for split in source.splits.values()
        for sample in split
        if sample.id in found
    }
    labeled = {key: each for key, each in found.items() if each.label_digest}
    return [
        *_near_duplicates(source, found, samples),
        *_contradictions(labeled, samples),
        *_repeated_masks(labeled, samples),
        *_exchanged(source, labeled, samples),
        *_moved(labeled, samples),
        *_all_shifted(labeled, samples),
        *_inverted(source, labeled, samples),
        *_rough(labeled, samples),
        *_empty(source, labeled, samples),
        *_blank(found, samples),
        *_rare_classes(source, labeled),
    ]


def _names(samples: Mapping[str, Sample], keys: Iterable[str], part="mask") -> str:
    return shorten([samples[key].name(part) for key in keys])


def _warn(
    keys: Sequence[str], samples: Mapping[str, Sample], text: str, part: str = "mask"
) -> list[Finding]:
    """Returns a warning about these files, or [] without any."""
    if not keys:
        return []
    return [Finding("warning", f"{_names(samples, keys, part)}: {text}", tuple(keys))]


def _near_duplicates(
    source: Source, found: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds images of two splits that look alike; equal ones are reported elsewhere."""
    keys = {
        split: [s.id for s in part if s.id in found and not found[s.id].blank]
        for split, part in source.splits.items()
    }
    pairs = []
    for one, other in itertools.combinations(keys, 2):
        if not keys[one] or not keys[other]:
            continue
        bits = np.array([found[key].picture for key in keys[other]], np.int16)
        for key in keys[one]:
            distances = (bits != found[key].picture).sum(1)
            for i in np.flatnonzero(distances <= _NEAR).tolist():
                twin = keys[other][i]
                if found[key].image_digest != found[twin].image_digest:
                    pairs.append((distances[i], key, twin, one, other))
    if not pairs:
        return []
    pairs.sort()
    _, key, twin, one, other = pairs[0]
    more = f", and so do {quantity(len(pairs) - 1, 'more pair')}" * (len(pairs) > 1)
    text = (
        f"{samples[key].name('image')} ({one}) and {samples[twin].name('image')} "
        f"({other}) look alike{more}; this makes results too good: remove them from "
        "one split, or keep whole scenes in one split"
    )
    ids = itertools.chain.from_iterable(pair[1:3] for pair in pairs)
    return [Finding("warning", text, tuple(dict.fromkeys(ids)))]


def _groups(
    labeled: Mapping[str, Evidence], key: Callable[[Evidence], str]
) -> list[list[str]]:
    groups = collections.defaultdict(list)
    for each, evidence in labeled.items():
        groups[key(evidence)].append(each)
    return [keys for keys in groups.values() if len(keys) > 1]


def _contradictions(
    labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds images that are equal and have different masks."""
    groups = [
        keys
        for keys in _groups(labeled, lambda evidence: evidence.image_digest)
        if len({labeled[key].label_digest for key in keys}) > 1
    ]
    if not groups:
        return []
    more = f", and so in {quantity(len(groups) - 1, 'more case')}" * (len(groups) > 1)
    text = (
        f"{_names(samples, groups[0])}: different labels of equal images{more}; keep "
        "the right ones"
    )
    return [Finding("warning", text, tuple(itertools.chain(*groups)))]


def _repeated_masks(
    labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds masks of several classes that different images share."""
    findings = []
    for keys in _groups(labeled, lambda evidence: evidence.label_digest):
        several = np.count_nonzero(labeled[keys[0]].counts[:IGNORE_LABEL]) > 1
        if several and len({labeled[key].image_digest for key in keys}) > 1:
            text = (
                "the same labels for different images; copied by mistake? Export each "
                "image's own mask"
            )
            findings += _warn(keys, samples, text)
    return findings


def _exchanged(
    source: Source, labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds pairs of masks that fit better on each other's image."""
    fits = {key: each.fit for key, each in labeled.items() if each.fit is not None}
    known = [key for key, fit in fits.items() if fit.own.count]
    worst = sorted(known, key=lambda key: fits[key].own.mean)[:_CANDIDATES]
    read = {key: _read_small(source, samples[key]) for key in worst}
    pairs = []
    for one, other in itertools.combinations(worst, 2):
        if labeled[one].label_digest == labeled[other].label_digest:
            continue
        gain = min(
            edges.contrast(read[a][0], read[b][1]).gain_over(fits[a].own)
            if read[a][1].shape == read[b][1].shape
            else 0.0
            for a, b in ((one, other), (other, one))
        )
        if gain > _EXCHANGED:
            pairs.append((gain, one, other))
    findings, used = [], set()
    for _, one, other in sorted(pairs, reverse=True):
        if not used & {one, other}:
            used |= {one, other}
            text = "each fits the other's image better; exchange the two files"
            findings += _warn([one, other], samples, text)
    return findings


def _read_small(source: Source, sample: Sample) -> tuple[edges.Steps, np.ndarray]:
    image = decode.decode_stored(source_lib.read_bytes(sample.image), source.pixels)
    content = source_lib.read_bytes(sample.mask or b"")
    return edges.small(image, masks.read_mask(content, source.masks).label_hw)


def _moved(
    labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds masks that are mirrored or shifted against their images."""
    moved = collections.defaultdict(list)
    for key, each in labeled.items():
        if each.fit is None or not each.fit.change:
            continue
        shifted = each.fit.change.startswith("too")
        if each.fit.best.gain_over(each.fit.own) > (_MOVED if shifted else _MIRRORED):
            moved[each.fit.change].append(key)
    findings = []
    for change, keys in moved.items():
        text = f"borders fit the image better if the mask was {change}; export it again"
        if change.startswith("too"):
            text = f"labels lie {change} on the image; export them again, or move them"
        findings += _warn(keys, samples, text)
    return findings


def _all_shifted(
    labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds out whether the masks are shifted by up to three pixels altogether."""
    profiles = {
        key: each.fit.profile
        for key, each in labeled.items()
        if each.fit is not None and each.fit.profile.any()
    }
    if len(profiles) < _MASKS:
        return []
    mean = np.mean(list(profiles.values()), axis=0)
    row, column = np.unravel_index(mean.argmax(), mean.shape)
    down, right = int(row) - edges.REACH, int(column) - edges.REACH
    here = mean[edges.REACH, edges.REACH]
    keys = [
        key
        for key, each in profiles.items()
        if each[row, column] > each[edges.REACH, edges.REACH]
    ]
    if mean[row, column] < _SHIFTED * here or 2 * len(keys) < len(profiles):
        return []
    moves = [
        f"{quantity(abs(size), 'pixel')} {words[size > 0]}"
        for size, words in ((down, ("up", "down")), (right, ("left", "right")))
        if size
    ]
    text = (
        f"the borders of {len(keys)} of {quantity(len(profiles), 'mask')} fit their "
        f"images better when moved {' and '.join(moves)}; were they cropped, counted "
        "from 1 or resized otherwise than the images? Move them, or export them again"
    )
    return _warn(keys, samples, text)


def _inverted(
    source: Source, labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds masks of two classes in which these seem to be exchanged."""
    if len(source.class_names) != 2 or len(labeled) < _MASKS:
        return []
    keys = [
        key
        for key, each in labeled.items()
        if each.rim == 1 and each.counts[1] > each.counts[0] > 0
    ]
    if len(keys) > _INVERTED * len(labeled):
        return []
    names = source.class_names
    text = (
        f"{names[1]} surrounds {names[0]}, unlike in the other masks; if they are "
        "inverted, exchange the two values"
    )
    return _warn(keys, samples, text)


def _rough(
    labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds masks with scattered pixels, and masks that were resized smoothly."""
    shares = {key: each.isolated for key, each in labeled.items()}
    usual = float(np.median(list(shares.values()))) if shares else 0.0
    limit = min(max(_ISOLATED, _UNUSUAL * usual), _NOISE)
    noisy = [key for key, share in shares.items() if share > limit]
    blended = [key for key, each in labeled.items() if each.blended > _BLENDED]
    noise = (
        "many single pixels of other classes than their neighbors; was the mask saved "
        "with loss (JPEG), dithered, or made much smaller? Export it as PNG, without "
        "dithering"
    )
    smooth = (
        "between most classes lies a line of a class with a number in between; it was "
        "resized with interpolation: resize masks with nearest neighbor"
    )
    noisy = [key for key in noisy if key not in blended]
    return _warn(blended, samples, smooth) + _warn(noisy, samples, noise)


def _empty(
    source: Source, labeled: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    """Finds masks with nothing but the first class, and masks that are mostly void."""
    findings = []
    only_first = [
        key
        for key, each in labeled.items()
        if each.counts[0] and not each.counts[1:IGNORE_LABEL].any()
    ]
    if only_first and len(only_first) < len(labeled):
        count = quantity(len(only_first), "mask")
        text = (
            f"{count} without any class but {source.class_names[0]}: "
            f"{_names(samples, only_first)}; if something is not labeled there, label "
            "it, or move the image to unlabeled/"
        )
        findings.append(Finding("note", text, tuple(only_first)))
    mostly_void = [
        key
        for key, each in labeled.items()
        if each.counts[IGNORE_LABEL] > _VOID * each.counts.sum()
        and each.counts[:IGNORE_LABEL].any()
    ]
    if mostly_void:
        text = (
            f"{_names(samples, mostly_void)}: more than {_VOID:.0%} void; label more "
            "of it, or move the image to unlabeled/"
        )
        findings.append(Finding("note", text, tuple(mostly_void)))
    return findings


def _blank(
    found: Mapping[str, Evidence], samples: Mapping[str, Sample]
) -> list[Finding]:
    keys = [key for key, each in found.items() if each.blank]
    text = "all pixels are equal; remove the image and its mask"
    return _warn(keys, samples, text, "image")


def _rare_classes(source: Source, labeled: Mapping[str, Evidence]) -> list[Finding]:
    """Finds classes of few pixels, and classes that validation lacks."""
    counts = sum((each.counts for each in labeled.values()), np.zeros(256, int))
    total = counts[:IGNORE_LABEL].sum()
    findings = []
    for label, name in enumerate(source.class_names):
        keys = tuple(key for key, each in labeled.items() if each.counts[label])
        if not keys:
            continue
        share = counts[label] / total
        if share < _TINY or len(keys) < 3:
            text = (
                f"class {name} has {share:.2%} of the pixels, in "
                f"{quantity(len(keys), 'image')} ({shorten([*keys])}); if it is a "
                "stray value, mend the mask; else label more of it, merge it with "
                "another class, or use a loss with Dice "
                "(--config.method.supervised_loss=ce_dice)"
            )
            findings.append(Finding("note", text, keys))
    held_out = [s.id for s in source.splits.get("val", ()) if s.id in labeled]
    seen = sum((labeled[key].counts for key in held_out), np.zeros(256, int))
    absent = [
        name
        for label, name in enumerate(source.class_names)
        if counts[label] and not seen[label]
    ]
    if absent and held_out:
        text = (
            f"no validation mask holds {shorten(absent)}, so that no IoU is measured "
            "for it; choose other images in val.txt"
        )
        findings.append(Finding("note", text))
    return findings
