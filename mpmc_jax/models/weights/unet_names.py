"""Maps the U-Net's variables to the names of UniMatch's state dict for ACDC."""

_ENCODER = {
    "stage1": "encoder.in_conv",
    **{f"stage{i + 1}": f"encoder.down{i}.maxpool_conv.1" for i in range(1, 5)},
}
_DECODER = {
    **{f"up{i}": f"decoder.up{i}.conv" for i in range(1, 5)},
    **{f"up{i}_reduce": f"decoder.up{i}.conv1x1" for i in range(1, 5)},
    "classifier": "decoder.out_conv",
}
_UNITS = _ENCODER | _DECODER
# Indices of (convolution, batch norm) in the published sequence of a block.
_PLACES = {"conv0": {"conv": 0, "norm": 1}, "conv1": {"conv": 4, "norm": 5}}


def torch_unit(unit: str, inner: list[str]) -> str:
    """Returns the prefix of the keys of a unit such as "stage2", ["conv0", "norm"].

    Raises:
      ValueError: the published network has no such unit.
    """
    if unit not in _UNITS:
        raise ValueError(
            f"the published U-Net has no unit {unit!r}: no weights of it can be loaded"
        )
    if not inner:
        return _UNITS[unit]
    block, kind = inner
    return f"{_UNITS[unit]}.conv_conv.{_PLACES[block][kind]}"
