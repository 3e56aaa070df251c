"""Weights by name, from a small server in the hub's place."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from mpmc_jax.models.weights import hub
from mpmc_jax.models.weights.formats import WeightsError
from tests.support.programs import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = safetensors_numpy.save({"a": np.arange(6, dtype=np.float32)})


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves one file of one repository, and errors as the hub does."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, with_content):
        path = self.path.split("?")[0]
        error = None
        if not path.startswith("/owner/name/"):
            error = "RepoNotFound"
        elif not path.startswith(("/owner/name/resolve/main/", f"/{COMMIT}/")):
            error = "RevisionNotFound"
        elif not path.endswith("/model.safetensors"):
            error = "EntryNotFound"
        if error is not None:
            self.send_response(404)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if with_content:
            self.wfile.write(CONTENT)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The server's address, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", tmp_path_factory.mktemp("hub")
    server.shutdown()
    server.server_close()


def _locate(place, *names, **environment):
    """What `hub.locate` says of names, in a process that looks at the server."""
    code = (
        "import json, sys, time\n"
        "time.sleep = lambda seconds: None\n"  # the client's, between its attempts
        "from mpmc_jax.models.weights import hub\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        path, origin = hub.locate(name)\n"
        "        print(json.dumps([str(path), origin]))\n"
        "    except hub.WeightsError as error:\n"
        "        print(json.dumps(str(error)))\n"
    )
    address, cache = place
    hubs = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=ROOT,
        env=os.environ | hubs | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_file_is_fetched_once_and_checked(place):
    name = "hub:owner/name"
    missing = ["hub:owner/name/other.bin", "hub:owner/name@old", "hub:owner/none"]
    (path, origin), *errors = _locate(place, name, *missing)
    with open(path, "rb") as file:
        assert file.read() == CONTENT
    assert origin == {"hub": "hub:owner/name/model.safetensors@main"}
    for error, said in zip(errors, ("file", "revision", "repository"), strict=True):
        assert f"no such {said}" in error and "\n" not in error
    # From the cache, where there is no connection; what is not in it is told.
    gone = {"HF_HUB_OFFLINE": "1"}
    (again, _), error = _locate(place, name, "dinov2_s14", **gone)
    assert again == path
    assert error.startswith("hub:timm/vit_small_patch14_dinov2.lvd142m/model.safe")
    assert "cannot be fetched" in error and "HF_ENDPOINT" in error
    nowhere = "http://localhost:1"
    (error,) = _locate(place, "hub:owner/third", HF_ENDPOINT=nowhere)
    assert "cannot be fetched" in error and "HF_HUB_OFFLINE=1" in error
    # A damaged file is told by the name that the cache gave it.
    with open(os.path.realpath(path), "r+b") as file:
        file.write(b"damage")
    (error,) = _locate(place, name, **gone)
    assert "is damaged" in error and "remove that file" in error


@pytest.mark.parametrize("public", [False, True])
def test_a_pushed_repository_is_private_unless_asked_for(public, monkeypatch, tmp_path):
    api = mock.create_autospec(huggingface_hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    hub.push(tmp_path, "owner/name", public=public)
    (made,) = api.return_value.create_repo.call_args_list
    assert made == mock.call("owner/name", private=not public, exist_ok=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weights.npz", None),
        ("hub/model.safetensors", None),
        ("hub:a/b", hub.HubFile("a/b")),
        ("hub:a/b/c/d.pth@v1", hub.HubFile("a/b", "c/d.pth", "v1")),
        ("resnet18", hub.HubFile("timm/resnet18.tv_in1k", license="BSD-3-Clause")),
    ],
)
def test_names(name, expected):
    assert hub.parse(name) == expected


@pytest.mark.parametrize("name", ["hub:a", "hub:", "hub:a/b@", "hub:a b/c"])
def test_names_that_are_none(name):
    with pytest.raises(WeightsError, match="expected hub:OWNER/NAME"):
        hub.parse(name)
