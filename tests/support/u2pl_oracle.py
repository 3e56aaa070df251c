"""A small U2PL, its inputs, and its losses as slow loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.losses.contrastive import Draws
from mpmc_jax.methods.u2pl.contrast import PixelContrast
from mpmc_jax.methods.u2pl.method import U2PL, Inputs
from tests.support.linear_network import cross_entropy, network, scores, softmax, step

CLASSES, SIDE, MEMBERS, GROUPS, CHANNELS = 4, 8, 2, 2, 5
EXAMPLES = MEMBERS * GROUPS
QUERIES, NEGATIVES = 6, 3
METHOD = U2PL(
    group_size=MEMBERS,
    pixel_contrast=PixelContrast(
        num_classes=CLASSES,
        group_size=MEMBERS,
        groups=GROUPS,
        channels=CHANNELS,
        low_rank=1,
        high_rank=3,
        queries=QUERIES,
        negatives=NEGATIVES,
        bank_size=40,
        bank_size_first=60,
    ),
    dropout_channels=(("fuse1", 3),),
)
FORMS = {
    name: dataclasses.replace(
        METHOD,
        pixel_contrast=dataclasses.replace(METHOD.pixel_contrast, contrast=name),
    )
    for name in ("released", "corrected")
}


def make_inputs(seed, void=0.2):
    rng = np.random.default_rng(seed)
    shape = (EXAMPLES, SIDE, SIDE)
    box = np.zeros(shape, bool)
    box[:, 2:6, 1:7] = True

    def masks():
        return {"fuse1": rng.choice([0.5, 1.0, 1.5], (2 * EXAMPLES, 1, 1, 3))}

    label = rng.integers(0, CLASSES, shape)
    inputs = Inputs(
        image=rng.normal(size=(*shape, 3)),
        label=np.where(rng.random(shape) < void, 255, label),
        labeled_real=np.ones(shape, bool),
        weak=rng.normal(size=(*shape, 3)),
        real=np.ones(shape, bool),
        mask=box,
        decoder_dropout=masks(),
        teacher_decoder_dropout=masks(),
        draws=Draws(
            rng.random((GROUPS, CLASSES, QUERIES)),
            rng.random((GROUPS, CLASSES, QUERIES, NEGATIVES)),
        ),
        group=np.arange(GROUPS),
        sampling_key=jax.random.split(jax.random.key(seed), GROUPS),
        kept_percent=np.float32(80.0),
        contrast_percent=np.float32(30.0),
    )

    def cast(x):
        if isinstance(x, jax.Array):
            return x
        wide = np.asarray(x).dtype == np.float64
        return jnp.asarray(x, jnp.float32 if wide else None)

    return jax.tree.map(cast, inputs)


def run(method, student, teacher, inputs, bank):
    """Value, terms and gradient by the student, then targets, statistics and bank."""
    value, (terms, after), gradient, (targets, moved) = step(
        method, MEMBERS, student, teacher, inputs, bank
    )
    return value, terms, gradient, (targets, moved, after)


def setting(seed, form="released", **changes):
    student = network(seed + 100, CLASSES, train=True)
    teacher = network(seed + 200, CLASSES, train=False)
    method = FORMS[form]
    return method, student, teacher, make_inputs(seed, **changes), method.init(None)


def mixed(inputs, value):
    """The other member of the group inside the box."""
    value, out = np.asarray(value), np.array(value)
    for i in range(EXAMPLES):
        group, member = divmod(i, MEMBERS)
        partner = value[group * MEMBERS + (member + 1) % MEMBERS]
        box = np.asarray(inputs.mask)[i]
        out[i][box] = partner[box]
    return out


def teacher_says(teacher, inputs):
    """Mixed labels, and train-mode scores of [labeled, mixed]."""
    label = mixed(inputs, scores(teacher, inputs.weak).argmax(-1))
    images = np.concatenate([np.asarray(inputs.image), mixed(inputs, inputs.weak)])
    trained = teacher.replace(train=True)
    return label, scores(trained, images, inputs.teacher_decoder_dropout), images


def unsupervised_oracle(student, teacher, inputs):
    label, logits, images = teacher_says(teacher, inputs)
    p = softmax(logits[EXAMPLES:])
    h = -(p * np.log(p + 1e-10)).sum(-1)
    entropy = cross_entropy(
        scores(student, images, inputs.decoder_dropout)[EXAMPLES:], label
    )
    losses = []
    for group in range(GROUPS):
        at = slice(group * MEMBERS, (group + 1) * MEMBERS)
        kept = h[at] < np.percentile(h[at], 80.0)
        losses.append(entropy[at][kept].mean() * h[at].size / kept.sum())
    return np.mean(losses)


def group_sets(form, group, label, logits, inputs):
    """Low, key and label masks of a group as loops: (pixels, classes) each."""
    members = range(group * MEMBERS, (group + 1) * MEMBERS)
    p = softmax(logits[EXAMPLES:])
    h = -(p * np.log(p + 1e-10)).sum(-1)
    inside = np.stack([h[i] for i in members])
    low_bar, high_bar = np.percentile(inside, 30.0), np.percentile(inside, 70.0)
    known = np.asarray(inputs.label)
    used = members if form == "corrected" else list(members)[:1]
    rows = []
    for unlabeled in (False, True):
        truth = label if unlabeled else known
        for i in used:
            for y, x in np.ndindex(SIDE // 2, SIDE // 2):
                at = (i, 2 * y, 2 * x)
                here = p[at] if unlabeled else softmax(logits[:EXAMPLES])[at]
                rank = np.argsort(np.argsort(-here, kind="stable"))
                low = h[at] <= low_bar if unlabeled else known[at] != 255
                high = h[at] >= high_bar if unlabeled else known[at] != 255
                if form == "released":
                    own = {int(truth[j, 2 * y, 2 * x]) for j in members}
                    own = {0 if c == 255 else c for c in own}
                    own = set() if truth[at] == 255 else own
                else:
                    own = {int(truth[at])} - {255}
                for c in range(CLASSES):
                    mine = c in own
                    far = 1 <= rank[c] < 3 if unlabeled else rank[c] < 1
                    released = mine and far and unlabeled
                    corrected = far and (unlabeled or not mine)
                    is_key = released if form == "released" else corrected
                    likely = here[c] > 0.3
                    used_low = mine and low and (form == "released" or likely)
                    rows.append((used_low, likely, is_key and high and here[c] < 1))
    table = np.array(rows, bool).reshape(-1, CLASSES, 3)
    low = table[..., 0]
    return low, low & table[..., 1], table[..., 2]


def embeddings(linear, images, masks, form, group):
    pixels = np.asarray(images)[:, ::2, ::2] * np.asarray(masks["fuse1"])
    maps = pixels @ np.asarray(linear.embedder)
    members = list(range(group * MEMBERS, (group + 1) * MEMBERS))
    used = members if form == "corrected" else members[:1]
    at = [*used, *(EXAMPLES + i for i in used)]
    return maps[at].reshape(-1, CHANNELS).astype(np.float64)


def contrast_oracle(form, student, teacher, inputs, bank):
    """The contrast of each group with the bank as it is after the step."""
    label, logits, images = teacher_says(teacher, inputs)
    rings = FORMS[form].pixel_contrast.rings
    keys = [
        np.asarray(bank.keys[rings.rows(bank, c, jnp.arange(int(bank.size[c])))])
        for c in range(CLASSES)
    ]
    losses, new = [], [[] for _ in range(CLASSES)]
    for group in range(GROUPS):
        low, anchor, key = group_sets(form, group, label, logits, inputs)
        mine = embeddings(student, images, inputs.decoder_dropout, form, group)
        theirs = embeddings(
            teacher, images, inputs.teacher_decoder_dropout, form, group
        )
        for c in range(CLASSES):
            new[c] += list(theirs[key[:, c]])
        present = [c for c in range(CLASSES) if low[:, c].any()]
        total = 0.0
        for k, other in enumerate(present):
            own = k if form == "released" else other
            rows = np.flatnonzero(anchor[:, own])
            if len(rows) == 0 or len(keys[other]) == 0:
                continue
            prototype = theirs[low[:, own]].mean(0) if low[:, own].any() else 0
            draws = jax.tree.map(
                lambda x, group=group: np.asarray(x)[group, :], inputs.draws
            )
            for q in range(QUERIES):
                a = mine[rows[int(draws.anchor[k, q] * len(rows))]]
                picked = [int(u * len(keys[other])) for u in draws.negative[k, q]]
                to = [prototype, *(keys[other][i] for i in picked)]
                cosine = [
                    a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-8) for b in to
                ]
                total += cross_entropy(np.array(cosine) / 0.5, np.array(0)) / QUERIES
        losses.append(total / len(present) if len(present) > 1 else 0.0)
    return np.mean(losses), new
