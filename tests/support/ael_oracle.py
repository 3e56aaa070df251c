"""A small AEL, its inputs, and its losses as slow loops."""

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.methods.ael.inputs import Inputs
from mpmc_jax.methods.ael.memory_bank import Seen
from mpmc_jax.methods.ael.method import AEL
from tests.support.linear_network import cross_entropy, network, scores, softmax, step

CLASSES, SIDE, MEMBERS, GROUPS, IMAGES, DELAY = 4, 12, 2, 2, 7, 3
EXAMPLES = MEMBERS * GROUPS
METHOD = AEL(
    num_classes=CLASSES,
    num_unlabeled=IMAGES,
    group_size=MEMBERS,
    groups=GROUPS,
    dropout_channels=(("fuse1", 3),),
    threshold=0.5,
    object_area=0.02,
    presence_area=0.1,
    delay=DELAY,
    scale=1 / GROUPS,
)


def make_inputs(seed, void=0.2):
    rng = np.random.default_rng(seed)

    def images(count):
        # Blocks, so that predictions have objects.
        coarse = rng.normal(size=(count, SIDE // 4, SIDE // 4, 3))
        return np.kron(coarse, np.ones((1, 4, 4, 1)))

    def masks(count):
        return {"fuse1": rng.choice([0.5, 1.0, 1.5], (count, 1, 1, 3))}

    shape = (EXAMPLES, SIDE, SIDE)
    label = rng.integers(0, CLASSES, shape)
    inputs = Inputs(
        image=images(EXAMPLES),
        label=np.where(rng.random(shape) < void, 255, label),
        labeled_real=np.ones(shape, bool),
        first=images(GROUPS),
        second=images(GROUPS),
        first_real=np.ones((GROUPS, SIDE, SIDE), bool),
        second_real=np.ones((GROUPS, SIDE, SIDE), bool),
        wanted=rng.integers(0, CLASSES, GROUPS),
        seen=Seen(
            group=np.arange(GROUPS),
            image=np.array([[0, 3], [6, 3]]),
            present=np.zeros((GROUPS, 2, CLASSES), bool),
            label=rng.integers(0, CLASSES, GROUPS),
            uniform=rng.random(GROUPS),
        ),
        slot=np.int32(1),
        object_draw=rng.random((GROUPS, SIDE, SIDE)),
        box_draw=rng.random((GROUPS, 3)),
        survival=(
            rng.random((GROUPS, CLASSES, SIDE, SIDE)),
            rng.random((GROUPS, SIDE, SIDE)),
        ),
        decoder_dropout={
            "labeled": masks(EXAMPLES),
            "mixed": masks(GROUPS),
            "teacher_labeled": masks(EXAMPLES),
            "teacher_unlabeled": masks(2 * GROUPS),
        },
    )

    def cast(x):
        wide = np.asarray(x).dtype == np.float64
        return jnp.asarray(x, jnp.float32 if wide else None)

    return jax.tree.map(cast, inputs)


def run(method, student, teacher, inputs, memory):
    """See `linear_network.step`."""
    return step(method, MEMBERS, student, teacher, inputs, memory)


def setting(seed, **changes):
    student = network(seed + 100, CLASSES, train=True)
    teacher = network(seed + 200, CLASSES, train=False)
    return METHOD, student, teacher, make_inputs(seed, **changes), memory(seed)


def memory(seed):
    """After some steps: something was seen, and confidences differ."""
    rng = np.random.default_rng(seed)
    begun = METHOD.init(jax.random.key(seed))
    seen = rng.random(begun.presence.shape) < 0.3
    return begun.replace(presence=jnp.asarray(seen))


def consistency_oracle(logits, certainty, label, confidence, uniform):
    """One group's mean of weighted cross-entropies, pixel by pixel."""
    lack = 1 - confidence
    total = divisor = 0.0
    entropy = cross_entropy(logits, label)
    for i, y, x in np.ndindex(*label.shape):
        c = logits[i, y, x].argmax()
        if uniform[c, y, x] > 1 - lack[c] / (lack.max() + 1e-12):
            weight = certainty[i, y, x] ** 2
            divisor += weight
            total += weight * entropy[i, y, x]
    return total / (divisor + 1e-12)


def teacher_says(teacher, inputs, box):
    """(certainty, label) of labeled and of mixed images, threshold applied."""
    trained = teacher.replace(train=True)
    masks = inputs.decoder_dropout
    labeled = softmax(scores(trained, inputs.image, masks["teacher_labeled"]))
    both = jnp.concatenate([inputs.first, inputs.second])
    unlabeled = softmax(scores(trained, both, masks["teacher_unlabeled"]))
    first, second = np.split(unlabeled, 2)
    mixed = np.where(np.asarray(box)[..., None], second, first)
    out = []
    for p in (labeled, mixed):
        label = np.where(p.max(-1) < METHOD.threshold, 255, p.argmax(-1))
        out.append((p.max(-1), label))
    return out, first.argmax(-1), second.argmax(-1)


def losses_oracle(student, teacher, inputs, box, confidence):
    """The two consistency terms, and the confidences after the step."""
    said, *_ = teacher_says(teacher, inputs, box)
    mixed = np.where(np.asarray(box)[..., None], inputs.second, inputs.first)
    passes = [
        scores(student, inputs.image, inputs.decoder_dropout["labeled"]),
        scores(student, mixed, inputs.decoder_dropout["mixed"]),
    ]
    moved = np.array(confidence, np.float64)
    for group in range(GROUPS):
        at = slice(group * MEMBERS, (group + 1) * MEMBERS)
        p, label = softmax(passes[0][at]), np.asarray(inputs.label)[at]
        for c in range(CLASSES):
            here = p[label == c, c]
            measured = here.mean() if len(here) else 0.0
            moved[group, c] = 0.999 * moved[group, c] + 0.001 * measured
    terms = []
    for place, members in enumerate((MEMBERS, 1)):
        each = []
        for group in range(GROUPS):
            at = slice(group * members, (group + 1) * members)
            certainty, label = said[place]
            uniform = np.asarray(inputs.survival[place])[group]
            uniform = np.broadcast_to(uniform, (CLASSES, SIDE, SIDE))
            each.append(
                consistency_oracle(
                    passes[place][at], certainty[at], label[at], moved[group], uniform
                )
            )
        terms.append(np.mean(each))
    return terms, moved
