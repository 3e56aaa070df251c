"""Vision transformers and their decoders in plain NumPy, one formula per line.

Parameters are this project's, as nested dictionaries; images and maps have no batch
axis. Written from the specifications, not from the code under test.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(p, x, epsilon):
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
    return centered / deviation * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(p, x, heads):
    n, d = x.shape
    qkv = dense(p["qkv"], x)
    out = np.zeros((n, d))
    size = d // heads
    for head in range(heads):
        q, k, v = (
            qkv[:, part * d + head * size : part * d + (head + 1) * size]
            for part in range(3)
        )
        weights = softmax(q @ k.T / np.sqrt(size))
        out[:, head * size : (head + 1) * size] = weights @ v
    return dense(p["proj"], out)


def gelu(x):
    return x * (1 + _erf(x / np.sqrt(2))) / 2


def block(p, x, heads, epsilon):
    """One pre-norm block on tokens (n,d)."""
    branch = attention(p, layer_norm(p["norm1"], x, epsilon), heads)
    x = x + p.get("scale1", 1) * branch
    inner = gelu(dense(p["fc1"], layer_norm(p["norm2"], x, epsilon)))
    return x + p.get("scale2", 1) * dense(p["fc2"], inner)


def _cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def bicubic(grid, size, scales):
    """PyTorch's bicubic resize of (h,w,d) by given scales, borders repeated."""
    h, w, d = grid.shape
    out = np.zeros((*size, d))
    for r in range(size[0]):
        y = (r + 0.5) / scales[0] - 0.5
        for c in range(size[1]):
            x = (c + 0.5) / scales[1] - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = grid[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
                    out[r, c] += _cubic(y - i) * _cubic(x - j) * value
    return out


def bilinear(grid, size, *, align_corners):
    """PyTorch's bilinear resize of (h,w,d), without antialiasing."""

    def source(i, n, m):
        if align_corners:
            return i * (n - 1) / (m - 1) if m > 1 else 0.0
        return max((i + 0.5) * n / m - 0.5, 0.0)

    h, w, d = grid.shape
    out = np.zeros((*size, d))
    for r in range(size[0]):
        y = source(r, h, size[0])
        i = min(math.floor(y), h - 1)
        for c in range(size[1]):
            x = source(c, w, size[1])
            j = min(math.floor(x), w - 1)
            below, right = min(i + 1, h - 1), min(j + 1, w - 1)
            top = grid[i, j] * (1 - x + j) + grid[i, right] * (x - j)
            bottom = grid[below, j] * (1 - x + j) + grid[below, right] * (x - j)
            out[r, c] = top * (1 - y + i) + bottom * (y - i)
    return out


def positions(position, size, offset):
    """DINOv2's positions of a grid, or Segmenter's for an offset of None: (1+n,d)."""
    first, rest = position[:1], position[1:]
    side = math.isqrt(len(rest))
    if size == (side, side):
        return position
    grid = rest.reshape(side, side, -1)
    if offset is None:
        resized = bilinear(grid, size, align_corners=False)
    else:
        resized = bicubic(grid, size, [(n + offset) / side for n in size])
    return np.concatenate([first, resized.reshape(size[0] * size[1], -1)])


def encoder(p, image, *, patch, heads, depth, epsilon, offset):
    """Maps an image (H,W,c) to the map (h,w,d) of every block."""
    h, w = (side // patch for side in image.shape[:2])
    kernel = p["embed"]["kernel"]
    tokens = [p["class_token"][0, 0]]
    for r in range(h):
        for c in range(w):
            rows, columns = (slice(i * patch, (i + 1) * patch) for i in (r, c))
            part = image[rows, columns]
            value = np.tensordot(part, kernel, 3) + p["embed"]["bias"]
            tokens.append(value)
    x = np.stack(tokens) + positions(p["position"][0], (h, w), offset)
    taps = []
    for i in range(depth):
        x = block(p[f"block{i}"], x, heads, epsilon)
        taps.append(layer_norm(p["norm"], x, epsilon)[1:].reshape(h, w, -1))
    return taps


def conv(p, x, stride=1):
    """A convolution of (h,w,i) with zeros around it."""
    kernel = p["kernel"]
    k = kernel.shape[0]
    padded = np.pad(x, ((k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    h, w = ((side - 1) // stride + 1 for side in x.shape[:2])
    out = np.zeros((h, w, kernel.shape[-1])) + p.get("bias", 0)
    for r in range(h):
        for c in range(w):
            rows, columns = (slice(i * stride, i * stride + k) for i in (r, c))
            out[r, c] += np.tensordot(padded[rows, columns], kernel, 3)
    return out


def transposed_conv(p, x, k):
    """out[k*i+u, k*j+v, o] = sum_c in[i, j, c] W[u, v, o, c] + b[o]."""
    h, w, _ = x.shape
    out = np.zeros((k * h, k * w, p["kernel"].shape[2]))
    for i in range(h):
        for j in range(w):
            for u in range(k):
                for v in range(k):
                    value = p["kernel"][u, v] @ x[i, j] + p["bias"]
                    out[k * i + u, k * j + v] = value
    return out


def _unit(p, x):
    inner = conv(p["conv1"], np.maximum(x, 0))
    return x + conv(p["conv2"], np.maximum(inner, 0))


def dpt(p, levels):
    """Maps four levels (h,w,d) to logits at an eighth of their stride."""
    one, two, three, four = (conv(p[f"project{i + 1}"], levels[i]) for i in range(4))
    pyramid = [
        transposed_conv(p["resize1"], one, 4),
        transposed_conv(p["resize2"], two, 2),
        three,
        conv(p["resize4"], four, stride=2),
    ]
    maps = [conv(p[f"layer{i + 1}"], pyramid[i]) for i in range(4)]
    path = None
    for i in (3, 2, 1, 0):
        fusion, y = p[f"fusion{i + 1}"], maps[i]
        if path is not None:
            y = path + _unit(fusion["skip"], y)
        size = maps[i - 1].shape[:2] if i else [2 * n for n in y.shape[:2]]
        y = bilinear(_unit(fusion["unit"], y), size, align_corners=True)
        path = conv(fusion["out"], y)
    return conv(p["classifier"], np.maximum(conv(p["output"], path), 0))


def mask_transformer(p, tokens, heads):
    """Maps a map of tokens (h,w,d) to logits (h,w,C)."""
    h, w, d = tokens.shape
    p = p["masks"]
    patches = dense(p["project"], tokens.reshape(h * w, d))
    x = np.concatenate([patches, p["class_embeddings"][0]])
    for i in range(2):
        x = block(p[f"block{i}"], x, heads, 1e-5)
    x = layer_norm(p["norm"], x, 1e-5)
    patches, classes = x[: h * w] @ p["patch_projection"], x[h * w :]
    classes = classes @ p["class_projection"]
    patches = patches / np.sqrt((patches**2).sum(-1, keepdims=True))
    classes = classes / np.sqrt((classes**2).sum(-1, keepdims=True))
    masks = layer_norm(p["mask_norm"], patches @ classes.T, 1e-5)
    return masks.reshape(h, w, -1)
