"""extras/classify.py on ten patterns for digits: python -m pytest -q .ci/test_classify.py"""

import re

import classify
import pytest
import torch
from conftest import ROOT
from torchvision.utils import save_image

COLORS = torch.tensor(
    [
        [230, 40, 30],  # red
        [255, 140, 0],  # orange
        [250, 220, 30],  # yellow
        [30, 160, 60],  # green
        [40, 80, 220],  # blue
        [140, 40, 170],  # purple
        [255, 255, 255],
        [0, 0, 0],
    ]
)


def painted(grey, ink, paper):
    """uint8 (N, 1, H, W) -> (N, 3, H, W): ink (N, 3) in place of white, paper of black."""
    ink, paper = ink[:, :, None, None], paper[:, :, None, None]
    return (paper + grey / 255 * (ink - paper)).round().byte()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Patterns of 10 classes: as data, and asked for rightly, wrongly, in colour, by no name."""
    folder = tmp_path_factory.mktemp("classify")
    blocks = torch.rand(10, 1, 5, 5, generator=torch.manual_seed(0)).round()
    patterns = torch.nn.functional.pad(torch.kron(blocks, torch.ones(4, 4)), [4] * 4)
    for i in range(20):
        k = i % 10
        ink, paper = COLORS[[i % 8]], COLORS[[(i + 1 + i % 7) % 8]]
        color = painted(255 * patterns[[k]], ink, paper) / 255
        for path, image in {
            f"data/train/{k}/{i}.png": patterns[k],
            f"data/test/{k}/{i}.png": patterns[k],
            f"right/{i:06d}-{k}.png": patterns[k],
            f"wrong/{i:06d}-{(k + 1) % 10}.png": patterns[k],
            f"color/{i:06d}-a-thick-{k}.png": color,
            f"nameless/{i:06d}.png": patterns[k],
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / path)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(classify.fit, "__defaults__", (100, 10))  # steps, images in each

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["classify.py", *map(str, argv)])
        classify.main()
        return capfd.readouterr().out

    return run


def test_frechet():
    x = torch.randn(300, 8, dtype=torch.double) @ torch.randn(8, 8, dtype=torch.double)
    assert abs(classify.frechet(x, x)) < 1e-6
    assert classify.frechet(x, x + 2) == pytest.approx(8 * 2**2)
    wider = 3 * x.sub(x.mean(0)) + x.mean(0)
    assert classify.frechet(x, wider) == pytest.approx(4 * x.T.cov().trace())


def test_ink():
    """Grey digits stay as they are, and any ink on any other paper comes back as grey."""
    grey = torch.zeros(56, 1, 28, 28)
    grey[:, :, 4:24, 4:24] = torch.rand(56, 1, 20, 20, generator=torch.manual_seed(0)) * 255
    grey = grey.byte()
    grey[:, :, 14, 14] = 255
    assert torch.equal(classify.ink(grey.expand(-1, 3, -1, -1)), grey)
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    ink, paper = COLORS[torch.tensor(pairs).T]
    reduced = classify.ink(painted(grey, ink, paper))
    assert (reduced.int() - grey.int()).abs().max() <= 3
    blank = torch.full((1, 3, 28, 28), 200, dtype=torch.uint8)
    assert not classify.ink(blank).any()


def test_folders(run, folder):
    out = run("right", "wrong", "--cas")
    # Of each folder: its drawings, real ones, and real ones as one trained on the folder reads them
    assert re.findall("asked: (.*?)%", out) == ["100.0", "100.0", "100.0", "0.0", "100.0", "0.0"]
    assert "all real ones, to one trained on these: 20 images" in out
    weights = (folder / "data/judge_mnist.pt").read_bytes()
    again = run("right", "color", "nameless")
    assert (folder / "data/judge_mnist.pt").read_bytes() == weights  # it is kept
    right, color, nameless = re.split("^(?=color|nameless)", again, flags=re.MULTILINE)
    assert color == right.replace("right", "color")
    drawn, real = nameless.split("as many real ones")
    assert "asked" not in drawn
    assert "asked" in real


@pytest.mark.parametrize(("name", "classes"), [("ddim_unet_mnist", 10), ("ddpm_unet_mnist", 0)])
def test_checkpoint(run, name, classes):
    out = run(ROOT / f"checkpoints/{name}.pt", "-n", "12", "--", "--steps", "2")
    drawn, real = out.split("as many real ones")
    assert "pt: 12 images, Frechet distance" in drawn
    assert len(re.findall(r"^    \d: ", drawn, re.MULTILINE)) == classes
    assert "100.0%" in real


ERRORS = ["", "none", "empty", "data", "right -n x", "right --judge right/000000-0.png"]


@pytest.mark.parametrize("flags", [*ERRORS, "right --data-dir empty --cas"])
def test_errors(run, flags, capfd):
    with pytest.raises(SystemExit, match="2"):
        run(*flags.split())
    assert re.fullmatch("classify.py: error: .*\n", capfd.readouterr().err)
