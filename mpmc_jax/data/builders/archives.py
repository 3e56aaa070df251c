"""Reads downloaded files that are not trusted: tar archives and MATLAB files."""

import io
import pathlib
import struct
import tarfile
import zlib

import numpy as np
import scipy.io
from scipy.io.matlab import MatReadError

from mpmc_jax.data.decode import encode_png
from mpmc_jax.data.raster_formats import UnreadableImage

# Limit for members, compressed and decompressed; SBD's largest is far below.
_MAX_MEMBER_BYTES = 1 << 24
# MATLAB 5 files: length of the header, and the type of a zlib stream.
_HEADER_BYTES, _COMPRESSED = 128, 15


def read_members(path: pathlib.Path, folder: str, suffix: str) -> dict[str, bytes]:
    """Reads the files of one folder of a .tar.gz, by stem.

    Nothing is extracted. An archive with links, absolute names or `..`, which could
    write outside its folder, is refused as a whole.

    Args:
      path: the archive.
      folder: last folders of the wanted names, such as "dataset/cls".
      suffix: ending of the wanted names, such as ".mat".

    Raises:
      ValueError: truncated, not an archive, or refused; the message names archive and
        member.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                _refuse(path, member)
                name = pathlib.PurePosixPath(member.name)
                wanted = member.isfile() and name.suffix == suffix
                if not wanted or name.name.startswith("."):
                    continue
                if not str(name.parent).endswith(folder):
                    continue
                stream = archive.extractfile(member)
                if stream is not None:
                    found[name.stem] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: truncated, or not a .tar.gz ({error}); download it again"
        ) from error
    return found


def _refuse(path: pathlib.Path, member: tarfile.TarInfo) -> None:
    name = pathlib.PurePosixPath(member.name)
    if member.issym() or member.islnk():
        reason = f"is a link to {member.linkname!r}"
    elif name.is_absolute():
        reason = "has an absolute name"
    elif ".." in name.parts:
        reason = "leaves the archive by '..'"
    elif member.size > _MAX_MEMBER_BYTES and name.suffix == ".mat":
        reason = f"has {member.size} bytes, more than {_MAX_MEMBER_BYTES}"
    else:
        return
    raise ValueError(
        f"{path}: refused, its member {member.name!r} {reason}; download the original"
    )


def sbd_mask(content: bytes) -> bytes:
    """Converts SBD's MATLAB file to a PNG of its classes, `GTcls.Segmentation`.

    Raises:
      UnreadableImage: not such a file, or one that decompresses to too many bytes.
    """
    _check_decompressed(content)
    try:
        fields = scipy.io.loadmat(io.BytesIO(content), variable_names=["GTcls"])
    except (MatReadError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise UnreadableImage(
            f"not a MATLAB file, or a damaged one ({error}); extract it again"
        ) from error
    record = fields.get("GTcls")
    names = None if record is None else record.dtype.names
    if record is None or names is None or "Segmentation" not in names:
        raise UnreadableImage(
            "lacks GTcls.Segmentation; SBD's class masks are those of dataset/cls"
        )
    label_hw = np.asarray(record["Segmentation"].flat[0])
    if label_hw.ndim != 2 or label_hw.dtype != np.uint8:
        raise UnreadableImage(
            f"GTcls.Segmentation is {label_hw.dtype} {label_hw.shape}, not a uint8 mask"
        )
    return encode_png(label_hw)


def _check_decompressed(content: bytes) -> None:
    """Raises UnreadableImage if an element decompresses to too many bytes."""
    order = "<" if content[_HEADER_BYTES - 2 : _HEADER_BYTES] == b"IM" else ">"
    position = _HEADER_BYTES
    while position + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, position)
        begin, position = position + 8, position + 8 + size
        if kind != _COMPRESSED:
            continue
        unpacker, packed = zlib.decompressobj(), content[begin:position]
        try:
            unpacked = unpacker.decompress(packed, _MAX_MEMBER_BYTES + 1)
        except zlib.error:
            return  # SciPy reports the damage.
        if len(unpacked) > _MAX_MEMBER_BYTES:
            raise UnreadableImage(
                f"refused: it decompresses to more than {_MAX_MEMBER_BYTES} bytes, "
                "unlike any mask of SBD; download the original"
            )
