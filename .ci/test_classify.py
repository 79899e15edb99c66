"""extras/classify.py on ten patterns for digits: python -m pytest -q .ci/test_classify.py"""

import re

import classify
import pytest
import torch
from torchvision.utils import save_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    blocks = torch.rand(10, 1, 7, 7, generator=torch.manual_seed(0)).round()
    for i, pattern in enumerate(torch.kron(blocks.repeat(4, 1, 1, 1), torch.ones(4, 4))):
        for name in (f"data/train/{i % 10}", f"data/test/{i % 10}", "right", "wrong"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            asked = (i + (name == "wrong")) % 10
            save_image(pattern, folder / name / f"{i:06d}-{asked}.png")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(classify, "BATCH", 40)

    def run(*flags):
        classify.main(["--steps", "60", *map(str, flags)])
        return capfd.readouterr().out

    return run


def test_frechet():
    x = torch.randn(300, 8) @ torch.randn(8, 8)
    assert abs(classify.frechet(x, x)) < 1e-6
    assert classify.frechet(x, x + 2) == pytest.approx(8 * 2**2, rel=1e-4)
    wider = 3 * x.sub(x.mean(0)) + x.mean(0)
    assert classify.frechet(x, wider) == pytest.approx(4 * x.T.cov().trace())


def test_folders(run):
    assert "100.00% of 40 real test images" in run("--data", "mnist")
    first = run("right/", "wrong/", "--cas")
    assert re.findall("asked: (.*?)%", first) == ["100.0", "0.0"]
    assert re.findall("([\\d.]+)% of the real test", first) == ["100.00", "0.00"]
    assert set(run("right/", "wrong/").splitlines()) <= set(first.splitlines())


@pytest.mark.parametrize(("name", "classes"), [("ddim_unet_mnist", 10), ("ddpm_unet_mnist", 0)])
def test_checkpoint(run, name, classes):
    out = run(classify.HOME / f"checkpoints/{name}.pt", "-n", "12", "--", "--steps", "2")
    assert "12 images" in out
    assert "Frechet distance of 12" in out
    assert len(re.findall(r"^    \d: ", out, re.MULTILINE)) == classes


@pytest.mark.parametrize("flags", ["", "none/", "data/", "--n x", "--data mnist --judge right"])
def test_errors(run, flags, capfd):
    with pytest.raises(SystemExit, match="2"):
        run(*flags.split())
    assert re.fullmatch("classify.py: .*\n", capfd.readouterr().err)
