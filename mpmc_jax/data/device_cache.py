"""Training images cached on the device, and crops that are made there.

The host draws where crops come from, as it does without the cache
(`data.resident=false`), and sends crop plans instead of pixels. The crops are the same;
a byte of AEL's, which are interpolated in floats, may differ by one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.data import crop_plan, decode
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.geometry.cropping import CropConfig, fill_color, to_bytes
from mpmc_jax.data.geometry.focus import focused
from mpmc_jax.data.geometry.registry import Draw, build_geometry
from mpmc_jax.data.parallel_map import map_with_progress
from mpmc_jax.data.splits import Split
from mpmc_jax.text import quantity
from mpmc_jax.types import IGNORE_LABEL, Array, Batch, Crops, PyTree

# Stream -> the list that its images are from.
_LISTS = {
    "labeled": "labeled",
    "source": "labeled",
    "unlabeled": "unlabeled",
    "partner": "unlabeled",
}


@dataclasses.dataclass(frozen=True)
class PlanReader:
    """Makes crop plans where `pipeline.RecordReader` makes crops; reads no image.

    Attributes:
      sizes: (n,2) rows and columns of the list's images.
      ids: position in the list -> id.
      draw: draws where a crop comes from.
      filter_taps, stride: see `crop_plan.plan`.
      labels: (n,h,w) labels of the list's images, or None; only a focus on classes
        reads them.
    """

    sizes: np.ndarray
    ids: tuple[str, ...]
    draw: Draw
    filter_taps: int
    stride: int
    labels: np.ndarray | None = None

    def crops(
        self, position: int, rng: np.random.Generator, configs: Sequence[CropConfig]
    ) -> list[dict[str, Any]]:
        """Makes one plan of an image for each of the configs, drawn in that order."""
        rows, columns = map(int, self.sizes[position])
        found = []
        for crop_config in configs:
            cut = self.draw(rng, (rows, columns), crop_config)
            if self.labels is not None and crop_config.focus is not None:
                label_hw = self.labels[position, :rows, :columns]
                cut = focused(rng, cut, label_hw, crop_config.focus)
            arrays = crop_plan.plan(
                cut,
                (rows, columns),
                crop_config,
                filter_taps=self.filter_taps,
                stride=self.stride,
            )
            index = np.array(position, np.int32)
            found.append({"image": arrays, "extent": cut.extent(), "index": index})
        return found

    def empty_crop(self, size: int) -> dict[str, Any]:
        """Makes the plan of a crop without a real pixel."""
        crop_config = CropConfig(size)
        (plan,) = self.crops(0, np.random.default_rng(0), [crop_config])
        return {
            "image": jax.tree.map(np.zeros_like, plan["image"]),
            "extent": np.zeros(4, np.int32),
            "index": np.array(0, np.int32),
        }


class DeviceCache:
    """The images of both lists, and the function that makes crops of them.

    Attributes:
      arrays: list -> {"image": (n,h,w,c), and for the labeled list "label": (n,h,w)},
        padded to the largest image.
    """

    def __init__(
        self, info: DatasetInfo, split: Split, geometry: str, crop_config: CropConfig
    ) -> None:
        """Reads all images.

        Raises:
          ValueError: images that are not 8-bit gray or RGB with a geometry that
            interpolates; an unreadable image.
        """
        self._pixels = info.facts.pixels
        self._image_format = info.image_format
        self._geometry, self._crop_config = build_geometry(geometry), crop_config
        is_picture = decode.is_picture(self._pixels)
        if not is_picture and self._geometry.resampling != "nearest":
            raise ValueError(
                f"data.resident=true: images of "
                f"{quantity(self._pixels.channels, 'channel')} of "
                f"{self._pixels.dtype} are resized on the host; set data.resident=false"
            )
        self._split = split
        position = {key: i for i, key in enumerate(info.ids["train"])}
        records = info.records("train")
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        self._sizes: dict[str, np.ndarray] = {}
        for name in ("labeled", "unlabeled"):
            ids = getattr(split, name)
            if ids:
                chosen = [position[key] for key in ids]
                self._load(name, records, chosen)

    def _load(self, name: str, records: Sequence[dict], chosen: list[int]) -> None:
        labeled = name == "labeled"

        def read(position: int) -> tuple[np.ndarray, np.ndarray | None]:
            record = records[position]
            image = decode.as_array(
                decode.record_image(record["image"], self._image_format, self._pixels)
            )
            if labeled:
                return image, decode.record_label(record["mask"])
            # Images of more than 8 bits are only indexed, so that converting before
            # cropping gives the same.
            return to_bytes(image, self._pixels), None

        found = list(map_with_progress(read, chosen, f"loading {name}"))
        self._sizes[name] = np.array([image.shape[:2] for image, _ in found])
        pictures = [image for image, _ in found]
        self.arrays[name] = {"image": _padded(pictures, 0)}
        if labeled:
            masks = [mask for _, mask in found if mask is not None]
            self.arrays[name]["label"] = _padded(masks, IGNORE_LABEL)

    @property
    def bytes(self) -> int:
        """Number of bytes that all images take on a device."""
        return sum(array.nbytes for array in jax.tree.leaves(self.arrays))

    def reader(self, name: str) -> PlanReader:
        """Returns the reader that makes crop plans of a list's images."""
        sizes, crop_config = self._sizes[name], self._crop_config
        base = crop_config.scale_base or np.inf
        least = crop_config.scale_min * np.minimum(sizes.max(1), base)
        # Rounding may make a resized side shorter by a pixel.
        shrink = float((sizes.max(1) / np.maximum(np.floor(least) - 1, 1)).max())
        return PlanReader(
            sizes=sizes,
            ids=getattr(self._split, name),
            draw=self._geometry.draw,
            filter_taps=crop_plan.filter_taps_needed(self._geometry.resampling, shrink),
            stride=self.arrays[name]["image"].shape[2],
            labels=self.arrays[name].get("label"),
        )

    def cut(self, arrays: PyTree, batch: Batch) -> Batch:
        """Makes crops of a batch of plans, on the device.

        Args:
          arrays: this cache's `arrays`, placed on the device.
          batch: its images are plans.
        """
        streams = {
            field.name: getattr(batch, field.name)
            for field in dataclasses.fields(batch)
        }
        fill = fill_color(self._crop_config.fill, self._pixels)
        label_fill = self._geometry.label_fill
        return Batch(
            **{
                name: cut_stream(arrays[_LISTS[name]], crops, fill, label_fill)
                for name, crops in streams.items()
                if crops is not None
            }
        )


def _padded(arrays: Sequence[np.ndarray], value: int) -> np.ndarray:
    rows = max(array.shape[0] for array in arrays)
    columns = max(array.shape[1] for array in arrays)
    out = np.full(
        (len(arrays), rows, columns, *arrays[0].shape[2:]), value, arrays[0].dtype
    )
    for i, array in enumerate(arrays):
        out[i, : array.shape[0], : array.shape[1]] = array
    return out


def cut_stream(
    arrays: dict[str, Array], crops: Crops, fill: np.ndarray, label_fill: int
) -> Crops:
    """Makes the crops of one stream's plans.

    Args:
      arrays: the arrays of its list, see `DeviceCache`.
      crops: the plans, in `image`.
      fill: (c,) color of the padding.
      label_fill: label of the padding.
    """

    def one(plan: dict[str, Array], extent: Array, index: Array):
        image = arrays["image"][index]
        mask = arrays["label"][index] if "label" in arrays else None
        if "map" in plan:
            picked = None if mask is None else _pick(mask, plan["map"])
            return _pick(image, plan["map"]), picked
        side = plan["rows"].shape[0]
        lines, columns = jnp.arange(side)[:, None], jnp.arange(side)[None, :]
        top, left, bottom, right = extent
        real = (lines >= top) & (lines < bottom) & (columns >= left) & (columns < right)
        crop = jnp.where(real[..., None], _resample(image, plan), fill)
        if mask is not None:
            picked = mask[plan["label_rows"][:, None], plan["label_columns"][None, :]]
            mask = jnp.where(real, picked, jnp.uint8(label_fill))
        return crop, mask

    plan: Any = crops.image
    image, label = jax.vmap(one)(plan, crops.extent, crops.index)
    # A crop without a real pixel is black and void.
    empty = ~crops.extent.any(axis=1)[:, None, None]
    image = jnp.where(empty[..., None], jnp.zeros((), image.dtype), image)
    if label is not None:
        label = jnp.where(empty, jnp.uint8(IGNORE_LABEL), label)
    return crops.replace(image=image, label=label)


def _pick(values: Array, indices: Array) -> Array:
    """Gathers values (h,w,...) at flat indices (s,s); 0 where the index is -1."""
    flat = values.reshape(-1, *values.shape[2:])
    picked = flat[jnp.maximum(indices, 0)]
    valid = (indices >= 0).reshape(indices.shape + (1,) * (values.ndim - 2))
    return jnp.where(valid, picked, jnp.zeros((), values.dtype))


def _resample(image: Array, plan: dict[str, Array]) -> Array:
    """Resizes (h,w,c) uint8 to (s,s,c) uint8, one axis at a time, by a plan."""
    whole = jnp.issubdtype(plan["row_weights"].dtype, jnp.integer)
    across = (plan["columns"], plan["column_weights"], 1)
    down = (plan["rows"], plan["row_weights"], 0)
    # Pillow goes across first and rounds in between; PyTorch goes down first.
    for first, weights, axis in (across, down) if whole else (down, across):
        image = _weighted(image, first, weights, axis)
        if whole:
            half = 1 << (crop_plan.PRECISION_BITS - 1)
            image = jnp.clip((image + half) >> crop_plan.PRECISION_BITS, 0, 255)
    if not whole:
        image = jnp.floor(image + 0.5)
    return image.astype(jnp.uint8)


def _weighted(image: Array, first: Array, weights: Array, axis: int) -> Array:
    """Sums the k pixels from `first` (s,) along an axis, weighted by (s,k)."""
    out = 0
    for tap in range(weights.shape[1]):
        index = jnp.minimum(first + tap, image.shape[axis] - 1)
        weight = jnp.expand_dims(weights[:, tap], (1, 2) if axis == 0 else (0, 2))
        out = out + jnp.take(image, index, axis=axis).astype(weights.dtype) * weight
    return jnp.asarray(out)
