"""extras/figures.py and extras/speed.py, tiny: python -m pytest -q .ci/test_figures.py"""

import sys
from pathlib import Path

import figures
import pytest
import speed
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

LOGS = " ".join(map(str, Path(__file__).resolve().parents[1].glob("assets/*.csv")))
CURVES = [f"curves {LOGS}", f"curves {LOGS} --x seconds", "curves r.csv --x evaluations --y share"]
ERRORS = [
    "",
    "curves none.csv",
    "curves x.csv",
    "forward-and-reverse --data-dir x.csv",
    "prompts dog",
]


def test_forward_and_reverse(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"train/{i}").mkdir(parents=True)
        Image.new("L", (28, 28), 60 * i).save(tmp_path / f"train/{i}/x.png")
    monkeypatch.setattr("ddpm_unet_mnist.UNet.forward", lambda self, x, t, y: x)
    monkeypatch.chdir(tmp_path)
    figures.main(["forward-and-reverse", "--data-dir", ".", "--out", "x.png"])
    pixels = pil_to_tensor(Image.open("x.png").convert("L")).double().view(8, 30, 12, 30)
    spread = pixels[:4, 1:-1, :6, 1:-1].std(dim=(1, 3))  # (digits, times): noise grows
    assert (spread.diff() > 0).all()


@pytest.mark.parametrize("line", ["prompts 7 thin", *CURVES])
def test_pictures(line, tmp_path, monkeypatch):
    if "prompts" not in line:
        pytest.importorskip("matplotlib", reason="pip install matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("r.csv").write_text("sampler,evaluations,share\ndpm,8,0.9\nddim,50,0.8\ndpm,5,0.7\n")
    figures.main([*line.split(), "--out", "x.png"])
    assert Image.open("x.png").size == ((640, 60) if "prompts" in line else (800, 400))


@pytest.mark.parametrize("what", ["unet", "transformer"])
def test_speed_without_diffusers(what, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    size = ["--batch", "1", "--rounds", "1", "--depth", "1", "--patch", "8"]
    speed.main(["--what", what, *size])
    printed = capsys.readouterr().out
    assert "pip install diffusers" in printed
    assert printed.count("float32: training") >= (1 if what == "unet" else 2)


@pytest.mark.parametrize("line", [*ERRORS, f"curves {LOGS}", "speed --batch 0"])
def test_errors_are_one_line(line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("images,loss,val_loss\n1,none,1\n")
    if LOGS in line:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        (speed if "speed" in line else figures).main(line.removeprefix("speed").split())
    assert len(capfd.readouterr().err.splitlines()) == 1
