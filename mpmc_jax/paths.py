"""Paths as people type them."""

import os
import re
from pathlib import Path


def as_path(name: str, text: str) -> Path:
    """The path that an argument names; "~" at its beginning is the home directory.

    Args:
      name: the argument, such as "--workdir", for messages.
      text: its value.

    Raises:
      ValueError: the value is empty, or a URL such as gs://bucket/data.
    """
    if not text:
        raise ValueError(f"{name}= is empty; give a path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(
            f"{name}={text} is a URL, and only paths are read and written; mount it as "
            "a folder (gcsfuse, s3fs, rclone mount), or copy the files to a disk"
        )
    # Unlike Path.expanduser it leaves "~name" of no user alone.
    return Path(os.path.expanduser(text))
