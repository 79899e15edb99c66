"""extras/classify.py on ten patterns for digits: python -m pytest -q tests/test_classify.py"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import classify
import pytest
import torch
from conftest import ROOT
from torch import nn
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
    patterns = nn.functional.pad(torch.kron(blocks, torch.ones(4, 4)), [4] * 4)
    for i in range(20):
        k = i % 10
        ink, paper = COLORS[[i % 8]], COLORS[[(i + 1 + i % 7) % 8]]
        color = painted(255 * patterns[[k]], ink, paper) / 255
        images = {
            f"data/train/{k}/{i}.png": patterns[k],
            f"data/test/{k}/{i}.png": patterns[k],
            f"untested/train/{k}/{i}.png": patterns[k],
            f"right/{i:06d}-{k}.png": patterns[k],
            f"wrong/{i:06d}-{(k + 1) % 10}.png": patterns[k],
            f"color/{i:06d}-a-thick-{k}.png": color,
            f"nameless/{i:06d}.png": patterns[k],
            f"eleven/{i:06d}-{i}.png": patterns[k],
        }
        for path, image in images.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / path)
    (folder / "empty").mkdir()
    (folder / "single").mkdir()
    save_image(patterns[0], folder / "single/000000-0.png")
    weights = classify.network(1, 3).state_dict()
    torch.save({"model": weights, "train": torch.zeros(2, 256)}, folder / "three.pt")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(classify, "STEPS", 100)
    monkeypatch.setattr(classify, "BATCH_SIZE", 10)

    def run(*argv):
        classify.main([str(flag) for flag in argv])
        return re.sub(r"^classes: .*\n", "", capfd.readouterr().out, flags=re.MULTILINE)

    return run


@pytest.fixture
def progress(monkeypatch):
    """[what, total, done] of all long work."""
    said = []

    class Recorder:
        def __init__(self, total, what):
            self.line = [what, total, 0]
            said.append(self.line)

        def add(self, n):
            self.line[2] += n

    monkeypatch.setattr(classify.common, "Progress", Recorder)
    return said


# ---- The parts


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


@pytest.mark.parametrize("channels", [1, 3])
def test_network_is_that_of_judges_trained_before(channels):
    """A judge_*.pt of another year is read as it was: these are its names and shapes."""
    c = channels
    layers = [("0", (8 * c, c, 2, 2))]
    for number, inside, outside in [
        (2, 8 * c, 64),
        (4, 64, 64),
        (5, 64, 128),
        (7, 128, 128),
        (8, 128, 256),
    ]:
        layers.append((f"{number}.0", (outside, inside, 3, 3)))
        layers.append((f"{number}.1", (outside,)))
    layers.append(("11", (10, 256)))
    model = classify.network(channels, 10)
    weights = [(name, value.shape) for name, value in model.state_dict().items()]
    found = [(n.removesuffix(".weight"), shape) for n, shape in weights if n.endswith(".weight")]
    assert found == layers


def test_network_by_hand():
    model = classify.network(1, 10).eval()
    x = torch.randn(2, 1, 28, 28, device=classify.DEVICE)

    def convolve(x, block):
        convolution, norm, _ = block
        return norm(convolution(x)).relu()

    h = convolve(model[0](x).relu(), model[2])
    h = nn.functional.max_pool2d(h, 2)
    h = convolve(h + convolve(h, model[4]), model[5])
    h = nn.functional.max_pool2d(h, 2)
    h = convolve(h + convolve(h, model[7]), model[8])
    torch.testing.assert_close(model(x), model[11](h.mean(dim=(2, 3))))


@pytest.mark.parametrize("channels", [1, 3])
def test_training_shows_colour_images_both_ways_round(channels, monkeypatch):
    seen = []

    class Crop:
        def __init__(self, size, padding, padding_mode):
            assert (size, padding, padding_mode) == (8, 2, "reflect")

        def __call__(self, x):
            left, right = x.chunk(2, dim=-1)
            seen.append((left.mean() < right.mean()).item())
            return x

    monkeypatch.setattr(classify.transforms, "RandomCrop", Crop)
    monkeypatch.setattr(classify, "STEPS", 4)
    images = torch.zeros(6, channels, 8, 8, dtype=torch.uint8)
    images[..., :4] = 200
    labels = torch.arange(6)
    model, features = classify.fit(images.to(classify.DEVICE), labels.to(classify.DEVICE), 6)
    assert seen == [False, channels == 3] * 2
    assert not model.training
    torch.testing.assert_close(features, classify.read(model, images.to(classify.DEVICE)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_in_the_dtype_of_the_scripts(dtype, monkeypatch):
    parser = argparse.ArgumentParser()
    parser.set_defaults(dtype=dtype)
    monkeypatch.setattr(classify.dit_cifar10, "make_parser", lambda: parser)
    monkeypatch.setattr(classify, "STEPS", 1)
    network = classify.network
    dtypes = []

    def watched(*shape):
        model = network(*shape)
        model.register_forward_hook(lambda model, x, logits: dtypes.append(logits.dtype))
        return model

    monkeypatch.setattr(classify, "network", watched)
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8, device=classify.DEVICE)
    model, _ = classify.fit(images, torch.arange(6, device=classify.DEVICE), 6)
    assert dtypes == [getattr(torch, dtype)]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_features_are_those_of_an_image_and_of_its_mirror_image(progress):
    model = classify.network(3, 10).eval()
    images = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8, device=classify.DEVICE)
    features = classify.read(model, images)
    assert features.dtype == torch.float64
    assert progress == [["views read", 600, 600]]
    with torch.no_grad():
        ways = [model[:-1](x / 127.5 - 1) for x in (images, images.flip(-1))]
    expected = (ways[0] + ways[1]) / 2
    torch.testing.assert_close(features, expected.double(), rtol=1e-4, atol=1e-5)
    model = classify.network(1, 10).eval()
    digits = images[:, :1]
    with torch.no_grad():
        expected = model[:-1](digits / 127.5 - 1).double()
    torch.testing.assert_close(classify.read(model, digits), expected, rtol=1e-4, atol=1e-5)


def test_report_by_hand(capsys):
    """A network that sees four pixels: sure by 9 to 3, three times, and once it cannot know."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4)).to(classify.DEVICE)
    nn.init.zeros_(model[1].bias)
    model[1].weight.data = torch.eye(4, 256, device=classify.DEVICE) * torch.tensor(9).log() / 2
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8, device=classify.DEVICE)
    for i, k in enumerate([0, 1, 3]):
        images[i, 0, 0, k] = 255
    reference = images.flatten(1).double() / 127.5 - 1
    asked = torch.tensor([0, 1, 2, 2], device=classify.DEVICE)
    names = ["zero", "one", "two", "three"]
    with torch.no_grad():
        classify.report("title", model, images, asked, reference + 0.5, names)
        classify.report("again", model, images, None, reference, names)
    assert capsys.readouterr().out.replace("-0.000", "0.000").splitlines() == [
        "title: 4 images, Frechet distance 64.000",  # 256 times 0.5 squared
        "  mean confidence 0.625, below 0.5 in 25.0%",
        "  read as asked: 50.0% +- 28.9%",
        "    zero: 100.0%",
        "    one: 100.0%",
        "    two: 0.0%",
        "again: 4 images, Frechet distance 0.000",
        "  mean confidence 0.625, below 0.5 in 25.0%",
    ]


# ---- The program


def test_folders(run, folder, progress):
    out = run("right", "wrong", "--cas")
    # Of each folder: its drawings, real ones, and real ones as one trained on the folder reads them
    assert re.findall("asked: (.*?)%", out) == ["100.0", "100.0", "100.0", "0.0", "100.0", "0.0"]
    assert "all real ones, to one trained on these: 20 images" in out
    distances = re.findall("Frechet distance (.*)", out)
    assert {abs(float(distance)) for distance in distances} == {0.0}  # all are the same images
    assert progress.count(["steps", 100, 100]) == 3
    assert progress.count(["views read", 20, 20]) == 9
    weights = (folder / "data/judge_mnist.pt").read_bytes()
    again = run("right", "color", "nameless")
    assert (folder / "data/judge_mnist.pt").read_bytes() == weights  # it is kept
    right, color, nameless = re.split("^(?=color|nameless)", again, flags=re.MULTILINE)
    assert color == right.replace("right", "color")
    drawn, real = nameless.split("as many real ones")
    assert "asked" not in drawn
    assert "asked" in real
    assert run("nameless", "--cas") == nameless  # images without classes teach none


def test_as_many_real_ones_and_not_always_the_first(run, folder):
    classes = [str(k) for k in range(10)]
    some = folder / "some"
    some.mkdir()
    for path in sorted((folder / "right").iterdir())[:6]:
        (some / path.name).write_bytes(path.read_bytes())
    out = run("some", "--judge", "judges/other.pt")
    drawn, real = out.split("as many real ones: 6 images")
    assert re.findall(r"^    (\d): ", drawn, re.MULTILINE) == classes[:6]
    shown = re.findall(r"^    (\d): ", real, re.MULTILINE)
    assert set(shown) <= set(classes)
    assert shown not in (["0", "1", "2"], ["7", "8", "9"])  # two of each class, in order
    assert (folder / "judges/other.pt").exists()
    again = run("some", "--judge", "judges/other.pt")
    assert again == out[out.index("some: ") :]


def test_a_second_judge_of_another_shape(run, folder):
    """With it, --width is for the training alone: a file that is there says how wide it is."""
    out = run("right", "--judge", "narrow.pt", "--width", "8")
    assert re.findall("asked: (.*?)%", out) == ["100.0", "100.0"]
    first = torch.load(folder / "narrow.pt", weights_only=True)
    assert first["train"].shape == (20, 32)
    again = run("right", "--judge", "narrow.pt")
    assert again == out[out.index("right: ") :]
    run("right", "--judge", "other.pt", "--width", "8", "--seed", "1")
    second = torch.load(folder / "other.pt", weights_only=True)
    assert second["train"].shape == (20, 32)
    assert (second["train"] - first["train"]).abs().mean() > 0.1


def test_images_of_other_sizes_are_in_colour(run, folder):
    photos = folder / "photos"
    for k in range(2):
        for i in range(3):
            image = torch.zeros(3, 16, 16)
            image[2 * k] = torch.rand(16, 16) / 2 + 0.5
            for path in (f"train/{k}/{i}.png", f"test/{k}/{i}.png", f"drawn/{i + 3 * k}-{k}.png"):
                (photos / path).parent.mkdir(parents=True, exist_ok=True)
                save_image(image, photos / path)
    out = run("photos/drawn", "--data-dir", "photos")
    assert re.findall("asked: (.*?)%", out) == ["100.0", "100.0"]
    state = torch.load(photos / "judge_cifar10.pt", weights_only=True)
    assert state["model"]["0.weight"].shape[1] == 3
    assert state["model"]["11.weight"].shape[0] == 2
    assert state["train"].shape == (6, 256)
    assert state["train"].dtype == torch.float64


@pytest.mark.parametrize(("name", "classes"), [("ddim_unet_mnist", 10), ("ddpm_unet_mnist", 0)])
def test_checkpoint(run, name, classes):
    out = run(ROOT / f"checkpoints/{name}.pt", "-n", "12", "--", "--steps", "2")
    drawn, real = out.split("as many real ones")
    distance = re.search("pt: 12 images, Frechet distance (.*)", drawn)
    assert float(distance[1]) > 0.1
    assert len(re.findall(r"^    \d: ", drawn, re.MULTILINE)) == classes
    assert "100.0%" in real


@pytest.mark.parametrize("name", ["dit_cifar10", "ddim_unet_mnist"])
def test_its_script_draws_with_the_flags_given(name, monkeypatch):
    checkpoint = ROOT / f"checkpoints/{name}.pt"
    commands = []

    def run(command):
        commands.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    drawn = classify.draw(checkpoint, 7, ["--guidance", "2"])
    script = str(ROOT / f"{name}.py")
    expected = [sys.executable, script, "--ckpt", str(checkpoint), "-n", "7", "--out", f"{drawn}/"]
    assert commands == [[*expected, "--guidance", "2"]]
    assert Path(drawn).is_dir()
    assert not list(Path(drawn).iterdir())
    assert classify.draw(checkpoint, 7, []) != drawn


def test_what_a_script_refuses_is_said_once(run, capfd):
    with pytest.raises(SystemExit, match="1"):
        run(ROOT / "checkpoints/ddpm_unet_mnist.pt", "--", "--steps", "0")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("numbers of images and steps must be 1 at least")


ERRORS = [  # arguments, part of the line
    ("", "sources"),
    ("right -n x", "invalid int value: 'x'"),
    ("none", "none is not a checkpoint: FileNotFoundError"),
    ("three.pt", "three.pt is not a checkpoint"),
    ("empty", "empty holds no PNG files"),
    ("single", "single: a distance wants two images"),
    ("eleven", "eleven: class 19 is none of the 10 in the --data-dir"),
    ("right --data-dir untested --cas", "--data-dir untested: there is no test set"),
    ("right --data-dir right", "--data-dir right: put images into train/"),
    ("right --judge right/000000-0.png", "000000-0.png is not a classifier of 10 classes: Unpick"),
    ("right --judge three.pt", "three.pt is not a classifier of 10 classes: RuntimeError"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line(run, line, message):
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(*line.split())
    assert "\n" not in error.value.code
