"""UniMatch V2's step on a vision transformer in plain JAX, one formula per line.

Written from the specification, not from the code under test. Parameters are nested
dictionaries with this project's names; the gradient is JAX's, of the loss below, and
everything else is NumPy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import vit_oracle

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Recipe(NamedTuple):
    """The numbers of a run."""

    patch: int
    heads: int
    depth: int
    grid: int
    epsilon: float
    offset: float
    group_size: int
    threshold: float
    decay: float
    lr: float
    head_multiplier: float
    weight_decay: float
    steps: int


class Draws(NamedTuple):
    """The random draws of a step.

    Attributes:
      strong: two strong views (b,h,w,c), normalized.
      boxes: for each of them (b,h,w) bool, where the partner is pasted.
      masks: (2b,d) multipliers of the tokens of both.
    """

    strong: tuple[Any, Any]
    boxes: tuple[Any, Any]
    masks: Any


def _norm(p, x, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def _dense(p, x):
    return x @ p["kernel"] + p["bias"]


def _attention(p, x, heads):
    b, n, d = x.shape
    q, k, v = jnp.moveaxis(_dense(p["qkv"], x).reshape(b, n, 3, heads, -1), 2, 0)
    scores = jnp.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(d // heads)
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = e / e.sum(-1, keepdims=True)
    out = jnp.einsum("bhnm,bmhe->bnhe", weights, v)
    return _dense(p["proj"], out.reshape(b, n, d))


def _gelu(x):
    return x * (1 + jax.scipy.special.erf(x / np.sqrt(2))) / 2


def _tokens(p, images, recipe: Recipe):
    """The normed patch tokens (b,n,d) of every block, and the grid (h,w)."""
    b, height, width, c = images.shape
    k, (h, w) = recipe.patch, (height // recipe.patch, width // recipe.patch)
    parts = images.reshape(b, h, k, w, k, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = p["embed"]["kernel"].reshape(k * k * c, -1)
    patches = parts.reshape(b, h * w, -1) @ kernel + p["embed"]["bias"]
    # The resize of the positions is linear: its matrix is the resize of unit vectors.
    side = recipe.grid
    units = np.eye(side**2).reshape(side, side, -1)
    scales = [(n + recipe.offset) / side for n in (h, w)]
    resize = vit_oracle.bicubic(units, (h, w), scales).reshape(h * w, -1)
    first = p["class_token"] + p["position"][:, :1]
    rest = patches + resize @ p["position"][:, 1:]
    x = jnp.concatenate([jnp.broadcast_to(first, (b, *first.shape[1:])), rest], 1)
    found = []
    for i in range(recipe.depth):
        block = p[f"block{i}"]
        branch = _attention(
            block, _norm(block["norm1"], x, recipe.epsilon), recipe.heads
        )
        x = x + block["scale1"] * branch
        inner = _gelu(_dense(block["fc1"], _norm(block["norm2"], x, recipe.epsilon)))
        x = x + block["scale2"] * _dense(block["fc2"], inner)
        found.append(_norm(p["norm"], x, recipe.epsilon)[:, 1:])
    return found, (h, w)


def _conv(p, x, stride=1):
    around = p["kernel"].shape[0] // 2
    out = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        [(around, around)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out + p.get("bias", 0)


def _transposed(p, x):
    """out[k*i+u, k*j+v, o] = sum_c in[i, j, c] W[u, v, o, c] + b[o]."""
    b, h, w, _ = x.shape
    k, _, features, _ = p["kernel"].shape
    out = jnp.einsum("bijc,uvoc->biujvo", x, p["kernel"])
    return out.reshape(b, k * h, k * w, features) + p["bias"]


def _resize(x, size):
    """Bilinear with aligned corners."""
    for axis, m in zip((1, 2), size, strict=True):
        n = x.shape[axis]
        place = np.arange(m) * (n - 1) / (m - 1)
        matrix = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(n)))
        x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1)), -1, axis)
    return x


def _unit(p, x):
    inner = _conv(p["conv1"], jnp.maximum(x, 0))
    return x + _conv(p["conv2"], jnp.maximum(inner, 0))


def _head(p, levels):
    """Logits at an eighth of the stride of the four levels (b,h,w,d)."""
    one, two, three, four = (_conv(p[f"project{i + 1}"], levels[i]) for i in range(4))
    pyramid = [
        _transposed(p["resize1"], one),
        _transposed(p["resize2"], two),
        three,
        _conv(p["resize4"], four, stride=2),
    ]
    maps = [_conv(p[f"layer{i + 1}"], pyramid[i]) for i in range(4)]
    path = None
    for i in (3, 2, 1, 0):
        fusion, y = p[f"fusion{i + 1}"], maps[i]
        if path is not None:
            y = path + _unit(fusion["skip"], y)
        size = maps[i - 1].shape[1:3] if i else [2 * n for n in y.shape[1:3]]
        path = _conv(fusion["out"], _resize(_unit(fusion["unit"], y), size))
    return _conv(p["classifier"], jnp.maximum(_conv(p["output"], path), 0))


def predict(params, images, recipe: Recipe, masks=1.0):
    """Logits at the images' size; `masks` (b,1,d) multiply all four levels' tokens."""
    tokens, (h, w) = _tokens(params["backbone"], images, recipe)
    levels = [(x * masks).reshape(len(x), h, w, -1) for x in tokens]
    return _resize(_head(params["decoder"], levels), images.shape[1:3])


def _cross_entropy(logits, label):
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - jnp.log(jnp.exp(shifted).sum(-1, keepdims=True))
    return -jnp.take_along_axis(log_p, label[..., None], -1)[..., 0]


def partners(batch_index, group_size):
    """The place of each image's partner: its group in reverse order."""
    groups = len(batch_index) // group_size
    partner = np.zeros(len(batch_index), int)
    for group in range(groups):
        places = [
            np.flatnonzero(batch_index == record)[0]
            for record in range(group, len(batch_index), groups)
        ]
        partner[places] = places[::-1]
    return partner


def real_pixels(extent, height, width):
    """(b,h,w) bool, within the rows and columns of `extent`."""
    top, left, bottom, right = (x[:, None, None] for x in extent.T)
    rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None]
    inside = (rows >= top) & (rows < bottom)
    return inside & (columns >= left) & (columns < right)


def arrays(batch, group_size):
    """The normalized images, labels, real pixels and partners of a batch."""
    image, weak = (
        (np.asarray(crops.image) / 255 - MEAN) / STD
        for crops in (batch.labeled, batch.unlabeled)
    )
    return {
        "image": image,
        "label": np.asarray(batch.labeled.label).astype(int),
        "weak": weak,
        "real": real_pixels(np.asarray(batch.unlabeled.extent), *weak.shape[1:3]),
        "partner": partners(np.asarray(batch.labeled.batch_index), group_size),
    }


def loss(params, teacher, given, draws: Draws, recipe: Recipe):
    """L = (L_x + (L_s1 + L_s2) / 2) / 2, and its terms; `given` is of `arrays`."""
    names = ("image", "label", "weak", "real", "partner")
    image, label, weak, real, partner = (given[name] for name in names)
    scores = predict(teacher, weak, recipe)
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    confidence = jax.lax.stop_gradient(e.max(-1) / e.sum(-1))
    pseudo = jax.lax.stop_gradient(scores.argmax(-1))

    labeled = label != 255
    plain = predict(params, image, recipe)
    pixel = _cross_entropy(plain, jnp.where(labeled, label, 0))
    terms = {"loss_supervised": (pixel * labeled).sum() / labeled.sum()}

    def mixed(value, box):
        where = box.reshape(box.shape + (1,) * (value.ndim - 3))
        return jnp.where(where, value[partner], value)

    boxes = draws.boxes
    views = [mixed(view, box) for view, box in zip(draws.strong, boxes, strict=True)]
    masks = draws.masks[:, None]
    both = predict(params, jnp.concatenate(views), recipe, masks)
    for name, logits, box in zip(("s1", "s2"), jnp.split(both, 2), boxes, strict=True):
        counted = mixed(real, box)
        kept = (mixed(confidence, box) >= recipe.threshold) & counted
        pixel = _cross_entropy(logits, mixed(pseudo, box))
        terms[f"loss_{name}"] = (pixel * kept).sum() / counted.sum()
    unlabeled = (terms["loss_s1"] + terms["loss_s2"]) / 2
    terms["loss"] = (terms["loss_supervised"] + unlabeled) / 2
    terms["confident_weak"] = (confidence >= recipe.threshold).mean()
    return terms["loss"], terms


_gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnames="recipe")


class Trainer:
    """AdamW with two rates and the moving average.

    Attributes:
      params, teacher: of the student and of its average.
    """

    def __init__(self, params: Mapping[str, Any], recipe: Recipe) -> None:
        """Begins with a copy as teacher."""
        self.params = jax.tree.map(np.array, params)
        self.teacher = jax.tree.map(np.array, params)
        self._recipe, self._count = recipe, 0
        self._first, self._second = (
            jax.tree.map(np.zeros_like, self.params) for _ in range(2)
        )

    def step(self, batch: Any, draws: Draws) -> dict[str, float]:
        """Makes a step; returns its terms."""
        recipe, k = self._recipe, self._count
        given = arrays(batch, recipe.group_size)
        with jax.numpy_rank_promotion("allow"):
            gradient, terms = _gradient(self.params, self.teacher, given, draws, recipe)
        # The rate is set after the step, for the next one.
        rate = recipe.lr * (1 - max(k - 1, 0) / recipe.steps) ** 0.9
        for half, factor in (("backbone", 1), ("decoder", recipe.head_multiplier)):
            self._update(half, gradient[half], rate * factor)
        decay = min(1 - 1 / (k + 1), recipe.decay)
        self.teacher = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, self.teacher, self.params
        )
        self._count += 1
        return {name: float(value) for name, value in terms.items()}

    def _update(self, half: str, gradient: Any, rate: float) -> None:
        """AdamW with betas 0.9 and 0.999, epsilon 1e-8; all parameters decay."""
        number, decay = self._count + 1, self._recipe.weight_decay
        first = jax.tree.map(
            lambda m, g: 0.9 * m + 0.1 * np.asarray(g), self._first[half], gradient
        )
        second = jax.tree.map(
            lambda v, g: 0.999 * v + 0.001 * np.asarray(g) ** 2,
            self._second[half],
            gradient,
        )

        def moved(p, m, v):
            adam = m / (1 - 0.9**number) / (np.sqrt(v / (1 - 0.999**number)) + 1e-8)
            return p - rate * (adam + decay * p)

        self.params[half] = jax.tree.map(moved, self.params[half], first, second)
        self._first[half], self._second[half] = first, second
