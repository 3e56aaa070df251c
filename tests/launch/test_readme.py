"""What the README promises: its commands run, and the quick start learns."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.data_sets import make_folder
from tests.support.programs import ENVIRONMENT, ROOT, SMALL, run


@pytest.mark.full
def test_every_command_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    ours = [line.split("#")[0].strip() for line in lines if "python -m launch" in line]
    others = [
        line for line in lines if line not in ours and "python -m launch" not in line
    ]
    # These are run elsewhere: by CI itself, and by the quick start's own test.
    for line in others:
        assert re.match(
            r"bash launch/(quickstart|test)\.sh|.*-m (venv|pip install)|source ", line
        )
    source = make_folder(tmp_path / "mine", images=12)
    (source / "unlabeled").mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(source / "unlabeled" / f"u{i}.png")
    assert len(ours) == 5
    for line in ours:
        arguments = line.replace("my_data", str(source)).replace(
            "runs/", f"{tmp_path}/"
        )
        arguments = arguments.replace("=data", f"={tmp_path}/data").split()[2:]
        if arguments[0] == "launch.train":
            arguments += [*SMALL, f"--config.data.data_dir={tmp_path}/data"]
        run(*arguments)
    assert len(list((tmp_path / "mine" / "predictions").glob("*_index.png"))) == 6


@pytest.mark.full
def test_the_quick_start_reaches_its_mark(tmp_path):
    """About eight minutes; it asserts val/miou and the patch classifier itself."""
    environment = ENVIRONMENT | {"XLA_FLAGS": "", "MPMC_VENV": sys.prefix}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (tmp_path / "run" / "figure.png").exists()
