"""extras/bits_per_dim.py where the bound is known: pytest -q tests/test_bits_per_dim.py"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import bits_per_dim
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import cosine_schedule, linear_schedule

SHIPPED = sorted(ROOT.glob("checkpoints/*.pt"))
DIT = ROOT / "checkpoints/dit_cifar10.pt"
SCHEDULES = {"linear": linear_schedule().double(), "cosine": cosine_schedule().double()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten classes, each of one grey: an image to train, two to test."""
    folder = tmp_path_factory.mktemp("data")
    for k in range(10):
        for place in (f"train/{k}/0.png", f"test/{k}/0.png", f"test/{k}/1.png"):
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (28, 28), 10 * k).save(path)
    return folder


@pytest.fixture
def progress(monkeypatch):
    """What the program has said of its progress: the total, and what was done of it."""
    said = SimpleNamespace(total=0, done=0.0)

    class Recorder:
        def __init__(self, total, what):
            said.total += total

        def add(self, n):
            said.done += n

    monkeypatch.setattr(bits_per_dim, "Progress", Recorder)
    return said


@pytest.mark.parametrize("name", SCHEDULES)
def test_bound_where_it_is_known(name):
    """Pixels that are Gaussian have a denoiser, an entropy and a bound in closed form."""
    torch.manual_seed(0)
    a, sd = SCHEDULES[name], 30.0
    pixels = (127.5 + sd * torch.randn(200, 1, 8, 8)).round().clamp(0, 255).to(torch.uint8)
    bins = torch.special.ndtr((torch.arange(257) - 128).double() / sd).diff()
    truth = -bins[pixels.long()].log2().mean().item()
    variance = (sd**2 + 1 / 12) / 127.5**2  # rounding adds a twelfth

    def denoise(x_t, t):
        assert x_t.dtype == torch.float32
        a_t = a[t][:, None, None, None]
        return x_t * a_t.sqrt() * variance / (a_t * variance + 1 - a_t)

    found = bits_per_dim.bits_per_dim(denoise, pixels, a, draws=200)
    prior = found["prior"].mean().item()
    small = found["small"].mean().item()
    large = found["large"].mean().item()
    decoder = found["decoder"].mean().item()
    error = variance * (1 - a) / (a * variance + 1 - a)  # the mean square of x0_hat - x0
    kl = -(a / (1 - a)).diff() * error[1:] / 2
    ratio = (1 - a[:-1]) / (1 - a[1:])
    kl_large = ratio * kl + (ratio - 1 - ratio.log()) / 2
    last = a[-1] * (pixels.double() / 127.5 - 1).square().mean() - a[-1] - (1 - a[-1]).log()
    assert prior == pytest.approx(last.item() / 2 / math.log(2), rel=1e-6)
    assert small == pytest.approx(kl.sum().item() / math.log(2), rel=0.01)
    assert large == pytest.approx(kl_large.sum().item() / math.log(2), rel=0.01)
    assert truth < prior + large + decoder < truth + 0.16 < prior + small + decoder


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_network_that_sees_nothing(name):
    """Where x0_hat = 0, the KLs telescope, and the error of x0 is everywhere its mean square."""
    torch.manual_seed(0)
    a = SCHEDULES[name]
    pixels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    power = (pixels.double() / 127.5 - 1).square().mean().item()
    found = bits_per_dim.bits_per_dim(lambda x_t, t: 0 * x_t, pixels, a, draws=1000)
    nats = (a / (1 - a))[[0, -1]].diff().abs().item() / 2 * power
    assert found["small"].mean().item() == pytest.approx(nats / math.log(2), rel=2e-3)
    x0, v = bits_per_dim.errors_by_tenth(found["times"], found["errors"], found["weights"], a).T
    tenths = (1 / (1 - a))[1:].split([99] + 9 * [100])
    over = torch.stack([tenth.mean() for tenth in tenths])
    torch.testing.assert_close(x0, torch.full_like(x0, power), rtol=0.02, atol=0)
    torch.testing.assert_close(v, power * over, rtol=0.02, atol=0)


def test_times_share_the_fall_of_log_snr_and_weights_undo_it():
    torch.manual_seed(0)
    a = SCHEDULES["cosine"]
    times, weights = bits_per_dim.draw_times(a, 1000, 30)
    assert times.min() == 1
    assert times.max() == 999
    log_snr = (a / (1 - a)).log()
    share = (log_snr[0] - log_snr[times - 1]) / (log_snr[0] - log_snr[-1])  # fallen before
    assert (share - torch.arange(1000)[:, None] / 1000 < 0.001).all()
    sums = (weights * (times > 500)).sum(0)  # of a function of the time, for each image
    torch.testing.assert_close(sums, torch.full_like(sums, 499), rtol=0.02, atol=0)


def test_decoding_by_hand():
    """Beside the true value, a bin's probability is a difference of two Gaussian integrals."""
    a = torch.tensor([0.999, 0.99], dtype=torch.float64)
    sigma = math.sqrt(0.001 / 0.01 * (1 - 0.99 / 0.999))
    pixels = torch.tensor([0, 100, 255, 0], dtype=torch.uint8).view(4, 1, 1, 1)
    x0_hat = (pixels / 127.5 - 1).double()
    x0_hat[3] += 1  # so far away that the clamp acts
    half = 0.5 * math.erf(1 / 255 / sigma / math.sqrt(2))  # from the middle of a bin to its edge
    expected = [0.5 + half, 2 * half, 0.5 + half, 1e-12]
    nats = bits_per_dim.decoding(x0_hat, pixels, a)
    assert (-nats).exp().tolist() == pytest.approx(expected)


class Script(SimpleNamespace):
    """Of a model that knows the grey of each class, and without a class answers grey 127.5."""

    DATA, SIZE, CHANNELS = "MNIST", 28, 1

    def denoiser(self, model, alphas_cumprod, y=None):
        assert model == "the model"

        def denoise(x_t, t):
            if y is None:
                return 0 * x_t
            assert len(y) == len(x_t) == len(t)
            return (10 * y / 127.5 - 1)[:, None, None, None].expand_as(x_t)

        return denoise


class Illustrated(Script):
    """Of the same, but an image is painted in the negative, and what is said is the class + 5."""

    def illustrate(self, x0, y, u):
        assert u.shape == (len(y), 12)
        assert 0.1 <= u.min() <= u.mean() <= u.max() < 1
        return -x0, y + 5

    def denoiser(self, model, alphas_cumprod, y=None):
        denoise = super().denoiser(model, alphas_cumprod, None if y is None else y - 5)
        return lambda x_t, t: -denoise(x_t, t)


def kl_lines(output):
    """{variance: (kl, total)} of what the program has printed."""
    lines = {}
    for line in output.splitlines():
        found = re.fullmatch(r"(.*), (.*) variance: (.*) ± .* bits/dim", line)
        if found:
            lines[found[2]] = (float(found[1]), float(found[3]))
    return lines


@pytest.fixture
def run(data, monkeypatch, capsys):
    """The output of the program on a script that has no checkpoint, on 20 test images."""

    def run(script, *flags):
        alphas_cumprod = cosine_schedule().to(bits_per_dim.DEVICE)
        state = {"config": {"class_names": list("0123456789")}}
        loaded = (script, "the model", state, alphas_cumprod)
        monkeypatch.setattr(bits_per_dim, "load", lambda path: loaded)
        bits_per_dim.main(["x.pt", "--data-dir", str(data), *flags])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("script", [Script(), Illustrated()])
def test_a_model_that_knows_all(script, run, progress):
    output = run(script)
    assert "x.pt on 20 test images\n" in output
    assert progress.total == 20
    assert progress.done == pytest.approx(20)
    kls = kl_lines(output)
    assert kls["small"][0] == 0
    assert kls["large"][0] > 0
    prior, decoder = re.search("prior (.*), decoder (.*), and", output).groups()
    for kl, total in kls.values():
        assert total == pytest.approx(float(prior) + kl + float(decoder), abs=0.01)
    rows = re.findall(r"t / T from 0.\d  0.00000  0.00000", output)
    assert len(rows) == 10


@pytest.mark.parametrize("script", [Script(), Illustrated()])
def test_the_same_model_when_it_is_told_nothing(script, run, monkeypatch):
    monkeypatch.setattr(bits_per_dim, "DRAWS", 400)
    output = run(script, "--unconditional")
    a = cosine_schedule()
    power = (torch.arange(10) * 10 / 127.5 - 1).square().mean().item()
    nats = (a / (1 - a))[[0, -1]].diff().abs().item() / 2 * power
    assert kl_lines(output)["small"][0] == pytest.approx(nats / math.log(2), rel=0.02)
    rows = re.findall(r"t / T from 0.(\d)  (.*)  (.*)", output)
    assert [int(tenth) for tenth, _, _ in rows] == list(range(10))
    for _, x0, v in rows:
        assert float(x0) == pytest.approx(power, rel=0.2)
        assert float(v) >= float(x0)


def test_images_are_chosen_at_random_and_always_the_same(run):
    chosen = []

    class Listener(Script):
        def denoiser(self, model, alphas_cumprod, y=None):
            chosen.append(y.tolist())
            return super().denoiser(model, alphas_cumprod, y)

    for n in ("5", "20"):
        run(Listener(), "-n", n)
    few, all_of_them = chosen
    assert few == all_of_them[:5]
    assert all_of_them != sorted(all_of_them)
    assert sorted(all_of_them) == [i // 2 for i in range(20)]


def test_the_printed_error_is_the_standard_error(run, monkeypatch):
    """Of two images, half of the difference. Of three times, the last has another weight."""
    bits = torch.tensor([1.0, 3.0]).double()
    zero = torch.zeros(2).double()
    found = {
        "prior": zero + 0.25,
        "small": bits,
        "large": 2 * bits,
        "decoder": zero + 0.5,
        "times": torch.tensor([[1, 1], [150, 150], [199, 199]]),
        "errors": torch.tensor([[1.0, 3.0], [5.0, 5.0], [9.0, 9.0]]).double(),
        "weights": torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]).double(),
    }
    monkeypatch.setattr(bits_per_dim, "bits_per_dim", lambda *_: found)
    output = run(Script(), "-n", "2")
    assert "prior 0.2500, decoder 0.500, and the KLs" in output
    assert "2.000, small variance: 2.75 ± 1.00 bits/dim" in output
    assert "4.000, large variance: 4.75 ± 2.00 bits/dim" in output
    assert "from 0.0  2.00000" in output
    assert "from 0.1  6.00000" in output


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_checkpoint(path, data, progress, monkeypatch, capsys):
    monkeypatch.setattr(bits_per_dim, "DRAWS", 5)  # so as not to take a minute
    told = []
    for flags in ([], ["--unconditional"]):
        bits_per_dim.main([str(path), "--data-dir", str(data), "-n", "2", *flags])
        output = capsys.readouterr().out
        told.append(kl_lines(output))
        for _, total in told[-1].values():
            assert 0 < total < 20  # plain greys are no digits, and no photographs
        assert f"{path} on 2 test images\n" in output
    assert (told[0] == told[1]) == (path.stem == "ddpm_unet_mnist")  # which reads no class
    assert progress.done == pytest.approx(progress.total) == 4


ERRORS = [  # arguments, part of the line
    ("text.pt", "text.pt is not a checkpoint"),
    (f"{DIT} -n 1", "-n 1: a standard error wants two images"),
    (f"{DIT} -n x", "invalid int value: 'x'"),
    (f"{DIT} --data-dir odd", "--data-dir odd: "),
    (f"{DIT} --data-dir untested", "--data-dir untested: there is no test set"),
    (f"{DIT} --data-dir few", "--data-dir few: 1 classes, and the model knows 10"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "odd/0.png",
        "few/train/cat/0.png",
        "few/test/cat/0.png",
        "untested/train/x/0.png",
    ):
        Path(path).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(path)
    Path("text.pt").write_text("no tensors")
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        bits_per_dim.main(line.split())
    assert "\n" not in error.value.code
