"""Every patch in docs/recipes.md applies, trains two steps and draws an image."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_images
from PIL import Image
from test_data import write_mnist

RECIPES = re.findall(
    r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE | re.DOTALL
)


def patch(text, folder):
    """Apply the hunks of a diff block, which have no line numbers, to the files of the folder."""
    for name, hunks in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", text, re.MULTILINE | re.DOTALL):
        path = folder / name
        code = path.read_text()
        for hunk in hunks.split("@@\n")[1:]:
            lines = [line or " " for line in hunk.splitlines()]
            assert {line[0] for line in lines} <= set(" +-")
            old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
            new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
            assert code.count(old) == 1, f"{name} has this {code.count(old)} times:\n{old}"
            code = code.replace(old, new)
        path.write_text(code)


@pytest.fixture
def folder(tmp_path):
    """The scripts, and images of two classes, in one channel as in three."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i, image in enumerate(random_images(4, 32, 32, 3)):
                Image.fromarray(image.numpy()).save(tmp_path / "data" / part / name / f"{i}.png")
    shutil.copy(tmp_path / "data" / "test" / "cat" / "0.png", tmp_path / "photo.png")
    latents = {"images": torch.randn(4, 4, 32, 32) / 2, "labels": torch.tensor([0, 0, 1, 1])}
    torch.save({**latents, "class_names": ["cat", "dog"]}, tmp_path / "data" / "latents.pt")
    return tmp_path


def run(command, folder):
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


CPU = "--device cpu --no-compile --dtype float32 --data-dir data"
TINY = {
    "ddpm_unet_mnist": "--dim 16",
    "ddim_unet_mnist": "--dim 16",
    "dit_cifar10": "--dim 16 --depth 2 --heads 2 --patch 8",
    "uvit_cifar10": "--dim 16 --depth 2 --heads 2 --patch 8",
}


def find_diffs(text):
    return re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("title", "text"), RECIPES, ids=[title for title, _ in RECIPES])
def test_recipe(title, text, folder):
    diff, *_ = find_diffs(text)
    patch(diff, folder)
    if title == "FashionMNIST":
        shutil.rmtree(folder / "data")
        write_mnist(folder / "data").parent.rename(folder / "data" / title)
    script = re.search(r"^--- (\w+_\w+)\.py", diff, re.MULTILINE)[1]
    command = f"{script}.py {TINY[script]} --batch-size 4 --max-steps 2 -n 1 --run-dir run {CPU}"
    run(command, folder)
    state = torch.load(folder / "run" / "ckpt.pt", weights_only=True)
    assert state["step"] == 2
    assert state["log"][-1]["loss"] > 0
    draw = re.search(r"`(--sample-only[^`]*)`", text)
    draw = draw[1] if draw else "--sample-only"
    run(f"{script}.py {draw} --run-dir run -n 2 --steps 3 --out x.png {CPU}", folder)
    with Image.open(folder / "x.png") as image:
        assert image.width > image.height > 24


def test_told_an_image_from_the_shipped_weights(folder):
    """They are all there, and what it is told changes nothing before it has learnt to use it."""
    for diff in find_diffs(dict(RECIPES)["Told an image: upscaling by training"]):
        patch(diff, folder)
    for name in "abcdefgh":  # ten classes, as the shipped weights know
        for part in ("train", "test"):
            shutil.copytree(folder / "data" / part / "cat", folder / "data" / part / name)
    (folder / "checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / "uvit_cifar10.pt", folder / "checkpoints")
    script = folder / "uvit_cifar10.py"
    script.write_text(script.read_text().replace("T, 256, seed", "T, 2, seed"))  # validated sooner
    flags = "--batch-size 2 --max-steps 1 --lr 1e-9 -n 1 --steps 2 --run-dir run"
    run(f"uvit_cifar10.py {flags} {CPU}", folder)
    found = torch.load(folder / "run" / "ckpt.pt", weights_only=True)["ema"]
    shipped = torch.load(ROOT / "checkpoints" / "uvit_cifar10.pt", weights_only=True)["ema"]
    embed = found.pop("embed.weight")
    torch.testing.assert_close(embed[:, :12], shipped.pop("embed.weight").float())
    assert embed[:, 12:].abs().max() < 1e-6
    for name, weight in shipped.items():
        torch.testing.assert_close(found[name], weight.float())
