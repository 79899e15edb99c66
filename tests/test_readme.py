"""The README's commands run, in few steps, where they need neither a network nor hours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SKIPPED = ("pip ", "torchrun", "--data-dir", "python -m pytest", "typed", "extras/")


def commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks[1:]).replace("\\\n", " ").splitlines()  # the first block is .ci/run's
    return [line for line in lines if not any(word in line for word in SKIPPED)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone of the files, so that what is drawn lands elsewhere."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "checkpoints"]:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("command", commands())
def test_command(command, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where this python is `python`
    env = dict(os.environ, PATH=path)
    quick = command.split("#")[0] + " --steps 3 -n 4"  # the last flag of a kind counts
    done = subprocess.run(quick, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = re.search(r"--out (\S+)", command)
    assert (folder / (out[1] if out else "samples.png")).exists()


def test_python_blocks(folder):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=folder, check=True)


def test_the_tests_that_it_names_are_there():
    named = re.findall(r"`(test_\w+)`", README)
    text = "".join(path.read_text() for path in [ROOT / "test_smoke.py", *ROOT.glob("tests/*.py")])
    assert len(named) > 5
    assert [name for name in named if f"def {name}(" not in text] == []


def test_its_lines_fit_a_window():
    assert [line for line in README.splitlines() if len(line) > 120] == []
