"""The programs in extras/ that measure, with no network: python -m pytest -q .ci/test_extras.py"""

import math
import sys
from pathlib import Path

import bits_per_dim
import clip_score
import fid
import pytest
import torch
from PIL import Image
from torch import nn

from common import alpha_bar, cosine_betas, linear_betas

SHIPPED = sorted(Path(__file__).resolve().parents[1].glob("checkpoints/*.pt"))
DIT = next(str(path) for path in SHIPPED if path.stem == "dit_cifar10")
SCHEDULES = {"linear": linear_betas(), "cosine": cosine_betas()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of noise, ten classes: two of each to train, one to test, and two as if drawn."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    for i in range(30):
        part = folder / ("test" if i < 10 else "train") / str(i % 10)
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
        for place in (part, folder / "drawn") if i >= 10 else (part,):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(place / f"{i:06d}-{i % 10}.png")
    return folder


@pytest.mark.parametrize("name", SCHEDULES)
def test_bound_where_it_is_known(name):
    """Pixels that are Gaussian have a denoiser, an entropy and a bound in closed form."""
    torch.manual_seed(0)
    a, sd = alpha_bar(SCHEDULES[name]).double(), 30.0
    pixels = (127.5 + sd * torch.randn(200, 1, 8, 8)).round().clamp(0, 255).to(torch.uint8)
    bins = torch.special.ndtr((torch.arange(257) - 128).double() / sd).diff()
    truth = -bins[pixels.long()].log2().mean().item()
    variance = (sd**2 + 1 / 12) / 127.5**2  # rounding adds a twelfth

    def denoise(x_t, t):
        a_t = a[t][:, None, None, None]
        return x_t * a_t.sqrt() * variance / (a_t * variance + 1 - a_t)

    bits = bits_per_dim.bits_per_dim(denoise, pixels, a, draws=200)[0]
    prior, small, large, decoder = bits.mean(dim=1).tolist()
    error = variance * (1 - a) / (a * variance + 1 - a)  # the mean square of x0_hat - x0
    kl = -(a / (1 - a)).diff() * error[1:] / 2
    ratio = (1 - a[:-1]) / (1 - a[1:])
    kl_large = ratio * kl + (ratio - 1 - ratio.log()) / 2
    assert small == pytest.approx(kl.sum().item() / math.log(2), rel=0.01)
    assert large == pytest.approx(kl_large.sum().item() / math.log(2), rel=0.01)
    assert truth < prior + large + decoder < truth + 0.16 < prior + small + decoder


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_network_that_sees_nothing(name):
    """Where x0_hat = 0, the KLs telescope, and the error of x0 is everywhere its mean square."""
    torch.manual_seed(0)
    a = alpha_bar(SCHEDULES[name]).double()
    pixels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    power = (pixels.double() / 127.5 - 1).square().mean().item()
    bits, *terms = bits_per_dim.bits_per_dim(lambda x_t, t: 0 * x_t, pixels, a, draws=1000)
    nats = (a / (1 - a))[[0, -1]].diff().abs().item() / 2 * power
    assert bits[1].mean().item() == pytest.approx(nats / math.log(2), rel=2e-3)
    x0, v = bits_per_dim.errors_by_tenth(*terms, a).T
    over = torch.stack([x.mean() for x in (1 / (1 - a))[1:].split([99] + 9 * [100])])
    torch.testing.assert_close(x0, torch.full_like(x0, power), rtol=0.02, atol=0)
    torch.testing.assert_close(v, power * over, rtol=0.02, atol=0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_bits_per_dim_of_every_checkpoint(path, data, capsys):
    for flags in ([], ["--unconditional"]):
        bits_per_dim.main([str(path), "--data-dir", str(data), "-n", "2", *flags])
        told = capsys.readouterr().out
        assert told.count(" bits/dim") == 2
        assert "nan" not in told.split("by tenth")[0]


def test_fid_by_hand(data, tmp_path, monkeypatch, capsys):
    """From a checkpoint to the score with random weights, and the score from the features seen."""
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as network

    weights = str(tmp_path / "inception.pth")
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda *_: None)
        model = network("random", ["2048"], weights)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # else all images have the same features
    torch.save(model.state_dict(), weights)
    seen, forward = [], network.forward

    def watch(self, x):
        features = forward(self, x)
        seen.extend(f.double() for f in features if f.shape[1] == 2048)
        return features

    monkeypatch.setattr(network, "forward", watch)
    argv = [DIT, "-n", "12", "--data-dir", str(data), "--weights", weights]
    scores = fid.main([*argv, "--", "--steps", "1", "--guidance", "1", "--seed", "5"])
    drawn, real = torch.cat(seen).split([12, 20])
    a = (drawn - drawn.mean(dim=0)) / math.sqrt(11)
    b = (real - real.mean(dim=0)) / math.sqrt(19)
    overlap = a @ b.T  # its singular values squared are the eigenvalues of cov(a) cov(b)
    root = torch.linalg.eigvalsh(overlap @ overlap.T).clamp(min=0).sqrt().sum()
    apart = (drawn.mean(dim=0) - real.mean(dim=0)).square().sum()
    by_hand = (apart + a.square().sum() + b.square().sum() - 2 * root).item()
    assert scores["frechet_inception_distance"] == pytest.approx(by_hand, rel=1e-3)
    assert "steps 1, eta 0.0, guidance 1.0" in capsys.readouterr().out


class Oracle(nn.Module):  # knows a caption by its last digit, and an image by its red
    def encode_text(self, captions):
        return torch.eye(10)[captions]

    def encode_image(self, images):
        return torch.eye(10)[images] + 0.1


def test_clip_score_of_an_oracle(data, tmp_path):
    for i in range(10):
        red = 1 if i == 9 else i  # the last one shows another class
        Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / f"{i:06d}-{i}.png")
    clip = (
        Oracle(),
        lambda captions: torch.tensor([int(caption[-1]) for caption in captions]),
        lambda image: torch.tensor(image.getpixel((0, 0))[0] % 10),
    )
    (own, others, nearest), _ = clip_score.main([str(tmp_path), "--data-dir", str(data)], clip)
    high, low = [100 * x / math.sqrt(1.1**2 + 9 * 0.1**2) for x in (1.1, 0.1)]
    assert own == pytest.approx(0.9 * high + 0.1 * low, rel=1e-4)
    assert others == pytest.approx((high + 89 * low) / 90, rel=1e-4)
    assert nearest == pytest.approx(0.9)


def test_clip_score_of_a_random_network_is_chance(data):
    open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt")
    clip = (model, open_clip.get_tokenizer("ViT-S-32-alt"), preprocess)
    argv = [str(data / "drawn"), "--data-dir", str(data)]
    (own, others, nearest), _ = clip_score.main(argv, clip)
    assert abs(own - others) < 1
    assert nearest < 0.4


ERRORS = [  # program, its arguments in a folder, part of the line
    (bits_per_dim, "text.pt", "text.pt cannot be loaded"),
    (bits_per_dim, f"{DIT} -n 1", "two images"),
    (bits_per_dim, f"{DIT} --data-dir odd", "--data-dir odd: "),
    (bits_per_dim, f"{DIT} --data-dir few", "no test set, or other classes"),
    (fid, f"{DIT} --weights text.pt", "--weights"),
    (fid, DIT, "fetch https://"),
    (fid, "none.pt --weights none.pt", "none.pt is no folder and cannot be loaded"),
    (fid, "odd --weights none.pt", "1 PNG files"),
    (clip_score, "few", "no PNG files"),
    (clip_score, "few/train/cat", "the class is missing"),
    (clip_score, "odd --data-dir few", "class 11"),
]


@pytest.mark.parametrize(("program", "line", "message"), ERRORS)
def test_errors_are_one_line(program, line, message, tmp_path, monkeypatch, capsys):
    def fetch(*_, **__):
        raise OSError("no network here")

    if program is fid:
        pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.chdir(tmp_path)
    for path in ("odd/000000-11.png", "few/train/cat/x.png"):
        Path(path).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), (9, 0, 0)).save(path)
    Path("text.pt").write_text("no tensors")
    torch.save({}, "none.pt")
    with pytest.raises(SystemExit, match="2"):
        program.main(line.split())
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f"{program.__name__}.py: ")
    assert message in errors[-1]


@pytest.mark.parametrize(("program", "name"), [(fid, "torch_fidelity"), (clip_score, "open_clip")])
def test_a_missing_package_is_named(program, name, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="2"):
        program.main([str(data / "drawn"), "--data-dir", str(data)])
    assert "pip install " in capsys.readouterr().err
