"""extras/fid.py and extras/clip_score.py, with no network: python -m pytest -q tests/test_scores.py

The weights that they are meant for have to be fetched. Here, others take their place.
"""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import clip_score
import fid
import pytest
import torch
from conftest import ROOT, random_images
from PIL import Image
from torch import nn

import ddim_unet_mnist as ddim

DIT = str(ROOT / "checkpoints/dit_cifar10.pt")
DDIM = str(ROOT / "checkpoints/ddim_unet_mnist.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of noise, ten classes: two of each to train, one to test, and two as if drawn."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "drawn").mkdir()
    for i, pixels in enumerate(random_images(30, 32, 32, 3)):
        image = Image.fromarray(pixels.numpy())
        name = f"{i:06d}-{i % 10}.png"
        part = folder / ("test" if i < 10 else "train") / str(i % 10)
        part.mkdir(parents=True, exist_ok=True)
        image.save(part / name)
        if i >= 10:
            image.save(folder / "drawn" / name)
    return folder


@pytest.fixture
def progress(monkeypatch):
    """What has been said of the progress: 'done of total what' for each count."""
    said = []

    class Recorder:
        def __init__(self, total, what):
            self.text = f"of {total} {what}"
            self.done = 0

        def add(self, n):
            self.done += n
            said.append(f"{self.done} {self.text}")

    monkeypatch.setattr(fid, "Progress", Recorder)
    monkeypatch.setattr(clip_score, "Progress", Recorder)
    return said


# ---- FID


def test_fid_by_hand(data, tmp_path, monkeypatch, capsys, progress):
    """From a checkpoint to the score with random weights, and the score from the features seen."""
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    weights = str(tmp_path / "inception.pth")
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(Network, "load_state_dict", lambda *_: None)
        model = Network("random", ["2048"], weights)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # else all images have the same features
    torch.save(model.state_dict(), weights)
    seen = []
    forward = Network.forward

    def watch(self, x):
        features = forward(self, x)
        seen.extend(f.double() for f in features if f.shape[1] == 2048)
        return features

    monkeypatch.setattr(Network, "forward", watch)
    argv = [DIT, "-n", "12", "--data-dir", str(data), "--weights", weights]
    flags = ["--steps", "1", "--guidance", "1", "--seed", "5", "--classes", "3", "4"]
    scores = fid.main([*argv, "--", *flags])
    drawn, real = torch.cat(seen).split([12, 20])
    a = (drawn - drawn.mean(dim=0)) / math.sqrt(11)
    b = (real - real.mean(dim=0)) / math.sqrt(19)
    overlap = a @ b.T  # its singular values squared are the eigenvalues of cov(a) cov(b)
    root = torch.linalg.eigvalsh(overlap @ overlap.T).clamp(min=0).sqrt().sum()
    apart = (drawn.mean(dim=0) - real.mean(dim=0)).square().sum()
    by_hand = (apart + a.square().sum() + b.square().sum() - 2 * root).item()
    assert scores["frechet_inception_distance"] == pytest.approx(by_hand, rel=1e-3)
    assert progress[-1] == "32 of 32 images seen by Inception"
    assert "sampler dpm, steps 1, guidance 1.0" in capsys.readouterr().out


class FakeFidelity:
    """In place of torch-fidelity: it keeps what it is given, and reads every image of it."""

    def calculate_metrics(self, input1, input2, **options):
        self.images = [self.read(input1), self.read(input2)]
        self.options = options
        scores = {"frechet_inception_distance": 12.34567}
        for name in ("kernel_inception_distance", "inception_score"):
            scores |= {f"{name}_mean": 1.5, f"{name}_std": 0.25}
        return scores

    def read(self, images):
        assert torch.is_tensor(images[0])  # as torch-fidelity does
        return torch.stack([images[i] for i in range(len(images))])


@pytest.fixture
def fidelity(monkeypatch):
    fake = FakeFidelity()
    monkeypatch.setattr(fid, "find_inception", lambda path: fake)
    return fake


def test_fid_of_a_folder(data, fidelity, capsys, progress):
    """All drawn images against all those for training, and none of the test set."""
    scores = fid.main([str(data / "drawn"), "--data-dir", str(data), "--weights", "w.pth"])
    images = random_images(30, 32, 32, 3)[10:].permute(0, 3, 1, 2)  # here, the same are in train/
    drawn, real = fidelity.images
    assert torch.equal(drawn, images)
    assert torch.equal(real.flatten(1).long().sum(1).sort()[0], images.flatten(1).sum(1).sort()[0])
    options = fidelity.options
    assert options["fid"] and options["isc"] and options["kid"]
    assert options["kid_subset_size"] == 20
    assert options["feature_extractor_weights_path"] == "w.pth"
    assert not options["cache"] and not options["verbose"]
    assert scores["frechet_inception_distance"] == 12.34567
    assert [*dict.fromkeys(progress)] == [
        f"{i} of 40 images seen by Inception" for i in range(1, 41)
    ]
    classes, *lines = capsys.readouterr().out.splitlines()
    assert classes.startswith("classes: {0: '0', 1: '1', ")
    assert lines == [
        "20 images against 20 for training; drawn before: its sampler, steps, guidance and seed "
        "are yours to tell",
        "papers draw 50000: with fewer, FID is higher",
        "frechet_inception_distance 12.3457",
        "kernel_inception_distance 1.50000 ± 0.25000",
        "inception_score 1.50000 ± 0.25000",
    ]


def is_paper(images):
    """Whether blank digits are shown as ddim_unet_mnist sees them, on any paper of its eight."""
    palette = ddim.PALETTE.mul(127.5).add(127.5).round().byte().flatten(1).tolist()
    return {tuple(image[:, 0, 0].tolist()) for image in images} <= {*map(tuple, palette)}


def test_fid_takes_grey_images_for_digits(tmp_path, fidelity, monkeypatch):
    asked = []

    def load_data(name, data_dir, size, channels):
        asked.append((name, data_dir, size, channels))
        return (torch.zeros(5, 3, size, size), torch.zeros(5, dtype=int)), None, None

    monkeypatch.setattr(fid, "load_data", load_data)
    for i in range(10):
        Image.new("L", (28, 28), 20 * i).save(tmp_path / f"{i:06d}.png")
    fid.main([str(tmp_path), "--data-dir", "here"])
    assert not fidelity.images[1].any()
    Image.new("RGB", (28, 28), (9, 9, 8)).save(tmp_path / "000000.png")
    fid.main([str(tmp_path), "--data-dir", "here"])
    assert is_paper(fidelity.images[1])
    for path in tmp_path.iterdir():
        Image.new("RGB", (32, 32), (9, 9, 8)).save(path)
    fid.main([str(tmp_path), "--data-dir", "here"])
    assert asked == 2 * [("MNIST", "here", 28, 3)] + [("CIFAR10", "here", 32, 3)]
    assert not fidelity.images[1].any()


def test_fid_of_a_checkpoint(fidelity, monkeypatch, capsys):
    """Its script draws, with the flags after --, and what was asked for is reported."""
    asked = []

    def load_data(name, data_dir, size, channels):
        asked.append((name, size, channels))
        labels = torch.zeros(2000, dtype=torch.int64)
        images = torch.zeros(2000, 3, size, size, dtype=torch.uint8)
        return (images, labels), None, [*"0123456789"]

    def run(command):
        asked.append(command)
        for i in range(12):
            Image.new("RGB", (28, 28), (20 * i, 0, 0)).save(f"{command[-1]}{i:06d}-red-7.png")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fid, "load_data", load_data)
    monkeypatch.setattr(fid.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fid.main([DDIM, "-n", "12", "--", "--prompt", "red 7", "--seed", "3"])
    data, command = asked
    assert data == ("MNIST", 28, 3)
    assert command[1:7] == [ddim.__file__, "--sample-only", "--ckpt", DDIM, "-n", "12"]
    assert command[7:11] == ["--prompt", "red 7", "--seed", "3"]
    assert not Path(command[-1]).exists()  # the images have been read, and are gone
    drawn, real = fidelity.images
    assert drawn[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    assert len(real) == 2000
    assert is_paper(real)  # in colour, as the network has seen them
    assert fidelity.options["kid_subset_size"] == 12
    settings = "sampler ddim, steps 20, guidance 3.0, prompt ['red 7'], seed 3"
    first = f"12 images against 2000 for training; {ddim.NAME}, step 20000, averaged weights (EMA)"
    others, line, *_ = capsys.readouterr().out.splitlines()
    assert others.startswith("the classes of the data are ['0', '1', ")
    assert others.endswith(f"those of the checkpoint {ddim.load(DDIM)[1]['config']['class_names']}")
    assert line == f"{first}, {settings}"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    fid.main([DDIM, "-n", "12"])
    assert asked[-1][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert asked[-1][5] == ddim.__file__


@pytest.mark.parametrize(
    ("drawn", "real", "size"), [(1200, 1100, 1000), (15, 12, 12), (12, 15, 12)]
)
def test_kid_takes_a_thousand_at_most(drawn, real, size, fidelity):
    images = torch.zeros(1200, 3, 2, 2, dtype=torch.uint8)
    fid.score(fidelity, images[:drawn], images[:real], None)
    assert fidelity.options["kid_subset_size"] == size


def test_a_script_that_fails_has_said_why(data, fidelity, capfd):
    with pytest.raises(SystemExit, match="1"):
        fid.main([DIT, "-n", "12", "--data-dir", str(data), "--", "--classes", "11"])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("--classes [11]: there are ")


# ---- CLIP


class Oracle(nn.Module):
    """It knows a caption by its last digit, and an image by its red."""

    def encode_text(self, captions):
        return 7 * torch.eye(10)[captions]  # of any length

    def encode_image(self, images):
        assert not self.training
        return 5 * (torch.eye(10)[images] + 0.1)


def tokenize(captions):
    return torch.tensor([int(caption[-1]) for caption in captions])


def preprocess(image):
    return torch.tensor(image.getpixel((0, 0))[0] % 10)


def test_clip_score_of_an_oracle(data, tmp_path, capsys, progress):
    for i in range(100):
        red = 1 if i % 10 == 9 else i % 10  # one in ten shows another class
        Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / f"{i:06d}-{i % 10}.png")
    argv = [str(tmp_path), "--data-dir", str(data), "--caption", "one {} or {}"]
    drawn, _ = clip_score.main(argv, (Oracle(), tokenize, preprocess))
    own, others, nearest = drawn
    high, low = [100 * x / math.sqrt(1.1**2 + 9 * 0.1**2) for x in (1.1, 0.1)]
    assert own == pytest.approx(0.9 * high + 0.1 * low, rel=1e-4)
    assert others == pytest.approx((high + 89 * low) / 90, rel=1e-4)
    assert nearest == pytest.approx(0.9)
    # the ten images of the test set first
    assert progress == [
        f"{n} of {total} images seen by CLIP" for n, total in ((10, 10), (64, 100), (100, 100))
    ]
    _, first, second, third = capsys.readouterr().out.splitlines()
    assert first == "100 images, ViT-B-32-quickgelu openai, captions like 'one 0 or 0'"
    assert second == f"drawn: {own:.2f} own caption, {others:.2f} others, 90.0% nearest to own"
    assert third.startswith("real: ")


@pytest.mark.parametrize("has_test_set", [True, False])
def test_clip_score_of_real_images(has_test_set, tmp_path, monkeypatch):
    """Beside n drawn images stand n real ones by chance, of the test set if there is one."""
    reds = torch.arange(40) % 10
    reds[20:] += 100  # the test set's
    images = reds.view(40, 1, 1, 1).expand(40, 3, 8, 8).to(torch.uint8)
    labels = torch.arange(40) % 10
    sets = (images[:20], labels[:20]), (images[20:], labels[20:])
    names = [f"{k} - number{k}" for k in range(10)]
    asked = []

    def load_data(name, *_):
        asked.append(name)
        return sets[0], sets[1] if has_test_set else None, names

    looked = []

    def watch(image):
        looked.append(image.getpixel((0, 0))[0])
        return preprocess(image)

    monkeypatch.setattr(clip_score, "load_data", load_data)
    for i in range(6):
        Image.new("RGB", (28, 28), (0, 0, 0)).save(tmp_path / f"{i:06d}-0.png")
    captions = []

    def tokenize_and_keep(texts):
        captions.append(texts)
        return tokenize(texts)

    _, (own, _, nearest) = clip_score.main([str(tmp_path)], (Oracle(), tokenize_and_keep, watch))
    assert asked == ["MNIST"]
    assert captions[0] == [f"a photo of a number{k}" for k in range(10)]
    torch.manual_seed(0)
    chosen = torch.randperm(20)[:6] + 20 * has_test_set
    assert looked[:6] == reds[chosen].tolist()
    assert nearest == 1.0
    assert own == pytest.approx(110 / math.sqrt(1.1**2 + 9 * 0.1**2), rel=1e-4)
    Image.new("RGB", (32, 32)).save(tmp_path / "000000-0.png")
    clip_score.main([str(tmp_path)], (Oracle(), tokenize, preprocess))
    assert asked[-1] == "CIFAR10"


def test_clip_score_of_a_random_network_is_chance(data):
    open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt")
    clip = (model, open_clip.get_tokenizer("ViT-S-32-alt"), preprocess)
    argv = [str(data / "drawn"), "--data-dir", str(data)]
    (own, others, nearest), _ = clip_score.main(argv, clip)
    assert abs(own - others) < 1
    assert nearest < 0.4


def test_clip_is_loaded_by_name(monkeypatch):
    """Of what open_clip gives, the preprocessing is the last: the one in the middle augments."""
    asked = []

    def create(*names):
        asked.append(names)
        return "model", "augmenting", "plain"

    fake = SimpleNamespace(
        create_model_and_transforms=create, get_tokenizer="tokenizer of {}".format
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    monkeypatch.setattr(clip_score.logging, "disable", asked.append)
    assert clip_score.load_clip("ViT", "w.pt") == ("model", "tokenizer of ViT", "plain")
    assert asked == [clip_score.logging.ERROR, ("ViT", "w.pt")]


# ---- Errors


ERRORS = [  # a program, its arguments, and what it says
    (fid, f"{DIT} --weights text.pt", "--weights: "),
    (fid, DIT, "no network here, and more"),
    (fid, "none.pt --weights none.pt", "none.pt is not a checkpoint: "),
    (fid, "odd --weights none.pt", "odd holds 1 PNG files, too few"),
    (fid, f"{DIT} --weights none.pt --data-dir odd", "--data-dir odd: "),
    (fid, f"{DIT} --weights none.pt -- --steps x", "--steps"),
    (clip_score, "few", "few holds no PNG files"),
    (clip_score, "few/train/cat", "few/train/cat: the class is missing in a name"),
    (clip_score, "odd --data-dir few", "odd has class 11, and few has 1 classes"),
    (clip_score, "nine --data-dir few", "nine has class 1, and few has 1 classes"),
    (clip_score, "odd --data-dir odd", "--data-dir odd: "),
    (clip_score, "zero --data-dir few --weights x", "weights of ViT-B-32-quickgelu in a file"),
]


@pytest.mark.parametrize(("program", "line", "message"), ERRORS)
def test_errors_are_one_line(program, line, message, tmp_path, monkeypatch, capfd):
    def fetch(*_, **__):
        raise OSError("no network here,\nand more")

    package = "torch_fidelity" if program is fid else "open_clip"
    if program is fid or "weights" in line:
        pytest.importorskip(package, reason="an extra package")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(clip_score.logging, "disable", lambda level: None)
    monkeypatch.chdir(tmp_path)
    for path in (
        "odd/000000-11.png",
        "nine/000000-1.png",
        "zero/000000-0.png",
        "few/train/cat/x.png",
    ):
        Path(path).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (9, 0, 0)).save(path)
    Path("text.pt").write_text("no tensors")
    torch.save({}, "none.pt")
    with pytest.raises(SystemExit) as end:
        program.main(line.split())
    assert message in end.value.code
    assert "\n" not in end.value.code


@pytest.mark.parametrize(("program", "name"), [(fid, "torch_fidelity"), (clip_score, "open_clip")])
def test_a_missing_package_is_named(program, name, data, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install "):
        program.main([str(data / "drawn"), "--data-dir", str(data)])


def test_captions_have_to_differ(data):
    argv = [str(data / "drawn"), "--data-dir", str(data), "--caption", "a photo 7"]
    with pytest.raises(SystemExit, match="the same for two classes"):
        clip_score.main(argv, (Oracle(), tokenize, preprocess))
