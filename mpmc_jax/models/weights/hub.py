"""Weights by name: files on the Hugging Face hub, kept in its cache.

A name of `PRETRAINED`, such as "dinov2_s14", or "hub:OWNER/NAME[/FILE][@REVISION]" for
any other file. Everything else is a path.
"""

import hashlib
import importlib
import pathlib
import re
from typing import NamedTuple

from mpmc_jax.models.weights.formats import WeightsError
from mpmc_jax.text import first_line

PREFIX = "hub:"
_FILE = "model.safetensors"
_OFFLINE = (
    "without a connection set HF_HUB_OFFLINE=1 (what was fetched before is used), "
    "behind a mirror HF_ENDPOINT, or give the path of a file"
)


class HubFile(NamedTuple):
    """A file on the hub.

    Attributes:
      repository: OWNER/NAME.
      file: path inside the repository.
      revision: branch, tag or commit.
      license: of the weights, "" if unknown.
    """

    repository: str
    file: str = _FILE
    revision: str = "main"
    license: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}/{self.file}@{self.revision}"


def _dinov2(size: str) -> HubFile:
    name = f"timm/vit_{size}_patch14_dinov2.lvd142m"
    return HubFile(name, license="Apache-2.0")


def _augreg(size: str) -> HubFile:
    name = f"timm/vit_{size}_patch16_384.augreg_in21k_ft_in1k"
    return HubFile(name, license="Apache-2.0")


def _torchvision(name: str) -> HubFile:
    return HubFile(f"timm/{name}.tv_in1k", license="BSD-3-Clause")


# Backbone -> its pretrained weights. The deep-stem ResNets of the published numbers are
# not on the hub in a form that is read here; see docs/weights.md.
PRETRAINED = {
    "dinov2_s14": _dinov2("small"),
    "dinov2_b14": _dinov2("base"),
    "dinov2_l14": _dinov2("large"),
    "vit_s16": _augreg("small"),
    "vit_b16": _augreg("base"),
    "vit_l16": _augreg("large"),
    "resnet18": _torchvision("resnet18"),
    "resnet50_plain": _torchvision("resnet50"),
    "resnet101_plain": _torchvision("resnet101"),
}


def parse(name: str) -> HubFile | None:
    """Returns the file that a name means, or None for a path.

    Raises:
      WeightsError: "hub:" with something else than OWNER/NAME[/FILE][@REVISION].
    """
    if name in PRETRAINED:
        return PRETRAINED[name]
    if not name.startswith(PREFIX):
        return None
    pattern = r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@\s]+))?"
    match = re.fullmatch(pattern, name.removeprefix(PREFIX))
    if match is None:
        raise WeightsError(f"{name}: expected hub:OWNER/NAME[/FILE][@REVISION]")
    return HubFile(match[1], match[2] or _FILE, match[3] or "main")


def locate(name: str) -> tuple[pathlib.Path, dict[str, str]]:
    """Returns the path of a file of weights, and where it is from for manifests.

    A file of the hub is fetched, see `fetch`; any other name is a path.
    """
    file = parse(name)
    if file is None:
        return pathlib.Path(name), {}
    origin = {"hub": str(file)}
    if file.license:
        origin["license"] = file.license
    return fetch(file), origin


def fetch(file: HubFile) -> pathlib.Path:
    """Downloads a file into the hub's cache, unless it is there, and returns its path.

    Raises:
      WeightsError: it cannot be had, or its content is not what the hub says it is; the
        message says what to do.
    """
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        found = hub.hf_hub_download(
            file.repository, file.file, revision=file.revision, library_name="mpmc_jax"
        )
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{file}: its owners ask for an agreement; accept it on the repository's "
            "page and log in (`hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{file}: there is no such repository, or it is private (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{file}: there is no such revision") from error
    except errors.RemoteEntryNotFoundError as error:
        raise WeightsError(f"{file}: the repository has no such file") from error
    except (OSError, errors.HFValidationError) as error:
        raise WeightsError(
            f"{file}: cannot be fetched ({first_line(error)}); {_OFFLINE}"
        ) from error
    path = pathlib.Path(found)
    _check(file, path)
    return path


def push(folder: pathlib.Path, repository: str, *, public: bool) -> str:
    """Uploads a folder to a repository of the hub, and returns its address.

    Args:
      folder: the folder.
      repository: OWNER/NAME; it is made if there is none.
      public: whether everybody may read a repository that is made.

    Raises:
      WeightsError: it cannot be uploaded; the message says what to do.
    """
    api = importlib.import_module("huggingface_hub").HfApi(library_name="mpmc_jax")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Add a trained run"
        )
    except (OSError, errors.HFValidationError) as error:
        raise WeightsError(
            f"--push={repository}: cannot be uploaded ({first_line(error)}); log in "
            f"(`hf auth login`); {folder} is complete"
        ) from error
    return str(address)


def _check(file: HubFile, path: pathlib.Path) -> None:
    """Compares a file with its checksum: the hub's cache names large files by it."""
    stored = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", stored.name):
        return
    with stored.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != stored.name:
        raise WeightsError(
            f"{file}: {stored} is damaged (SHA-256 {digest[:12]}..., the hub's is "
            f"{stored.name[:12]}...); remove that file and fetch it again"
        )
