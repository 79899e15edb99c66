"""The promises, checked on a CPU: python -m pytest -q test_smoke.py

What several scripts have in common is tested with one of them; tests/test_alike.py holds it to be
the same in all. Whoever changes a schedule, a target or a network finds in the message of the test
that fails what else there is to change.
"""

import contextlib
import csv
import gc
import inspect
import itertools
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

import common
import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm
import dit_cifar10 as dit
import uvit_cifar10 as uvit

torch.set_num_threads(1)  # the order of sums is a part of "bit for bit"
ROOT = Path(__file__).parent
SCRIPTS = [ddpm, ddim, dit, uvit]
TRANSFORMERS = [dit, uvit]
NETWORKS = {
    ddpm: partial(ddpm.UNet, 16),
    ddim: partial(ddim.UNet, 16),
    dit: partial(dit.DiT, 16, 2, 2, 8),
    uvit: partial(uvit.UViT, 16, 2, 2, 8),
}
CPU = "--device cpu --dtype float32 --no-compile -n 4 --steps 2 "
TINY = "--batch-size 8 --log-every 2 --sample-every 0 --warmup 2 --dim 16 "
SHAPE = dict.fromkeys(TRANSFORMERS, "--depth 2 --heads 2 --patch 8 ")
LINEAR = common.linear_schedule()
COSINE = common.cosine_schedule()
RETRAIN = (
    "If you meant to change this, train, put the weights into checkpoints/, and adapt the test"
)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.NAME)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    """Each test starts where eight classes of images are, and leaves no signal handler."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for split in ("train", "test"):
        write_folders("data", *[f"{split}/{name}" for name in "abcdefgh"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def write_folders(root, *names):
    """0.png in each folder, of noise with the folder's number for a seed."""
    for seed, name in enumerate(names):
        folder = Path(root, name)
        folder.mkdir(parents=True, exist_ok=True)
        noise = random_images(32, 32, 3, seed=seed)
        Image.fromarray(noise.numpy()).save(folder / "0.png")


def pixels(path):
    """int32 (H, W, 3) of a picture."""
    with Image.open(path) as image:
        values = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.int32)
        return values.view(image.height, image.width, 3)


def network(script, std=0.05):
    """A small network whose weights are all random."""
    net = NETWORKS[script]()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=std)
    return net


def random_input(script, batch_size):
    return torch.randn(batch_size, script.CHANNELS, script.SIZE, script.SIZE)


def shipped(script):
    """The network with the weights in checkpoints/."""
    try:
        model, _ = script.load(ROOT / "checkpoints" / f"{script.NAME}.pt")
    except SystemExit as error:
        pytest.fail(f"{error}. {RETRAIN}")
    return model


def parse(script, flags=""):
    return script.make_parser().parse_args(shlex.split(CPU + flags))


def run_script(script, flags):
    """main(), as from a shell."""
    with mock.patch.object(sys, "argv", [script.__file__, *shlex.split(CPU + flags)]):
        script.main()


def train(script, run, steps, flags=""):
    run = f"--run-dir {run} --max-steps {steps} "
    run_script(script, TINY + SHAPE.get(script, "") + run + flags)


def refused(script, flags):
    """The one line that the script has to say; Python prints it and exits with 1."""
    with pytest.raises((SystemExit, OSError)) as caught:
        run_script(script, flags)
    line = caught.value.code if caught.type is SystemExit else str(caught.value)
    assert isinstance(line, str)
    assert "\n" not in line
    del caught
    gc.collect()  # the exception knows its frames, and one of them holds the lock of the run
    return line


@contextlib.contextmanager
def interrupted(script, step, number=signal.SIGTERM):
    """Within it, the signal comes in the midst of this step."""
    learning_rate = script.learning_rate

    def interrupt(now, args):
        if now == step:
            signal.raise_signal(number)
        return learning_rate(now, args)

    with mock.patch.object(script, "learning_rate", interrupt):
        yield


def load(run):
    """The checkpoint and the rows of the log of a run."""
    with open(Path(run, "log.csv")) as file:
        rows = list(csv.DictReader(file))
    return torch.load(Path(run, "ckpt.pt"), weights_only=True), rows


def assert_same(a, b, tolerance=0.0):
    """Two checkpoints hold the same weights, averages and state of the optimizers."""
    assert (a["step"], a["images"]) == (b["step"], b["images"])
    for part in ("model", "ema", "optimizer", "muon"):
        if part in a:
            one = a[part].get("state", a[part])
            other = b[part].get("state", b[part])
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# ---- Data, schedules and randomness (common.py; more of it in tests/test_data.py)


def test_mnist_files():
    raw = Path("new/MNIST/raw")
    raw.mkdir(parents=True)
    pixels = random_images(20, 28, 28)
    for split in ("train", "t10k"):
        images = struct.pack(">4i", 2051, 20, 28, 28) + pixels.numpy().tobytes()
        labels = struct.pack(">2i", 2049, 20) + bytes(range(10)) * 2
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    (images, labels), test_set, _ = common.load_data("MNIST", "new", 28, 1)
    assert torch.equal(images, pixels[:, None])
    assert labels.tolist() == [*range(10), *range(10)]
    assert torch.equal(images, test_set[0])


def test_image_folders():
    write_folders("new", "train/b", "train/a", "train/a/deep", "val/b", "val/a")
    (images, labels), test_set, classes = common.load_data("CIFAR10", "new", 32, 3)
    assert classes == ["a", "b"]
    assert labels.tolist() == [0, 0, 1]
    read = [*images, *test_set[0]]
    for image, seed in zip(read, [1, 2, 0, 4, 3], strict=True):
        assert torch.equal(image, random_images(32, 32, 3, seed=seed).permute(2, 0, 1))


def test_schedules():
    factors = [1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000)]
    assert LINEAR[0].item() == pytest.approx(factors[0], rel=1e-7)
    assert LINEAR[-1].item() == pytest.approx(math.prod(factors), rel=1e-6)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
    assert COSINE[0].item() == pytest.approx(f[1] / f[0], rel=1e-7)
    assert COSINE[-1].item() == pytest.approx(f[999] / f[0] * 0.001, rel=1e-6)
    flow = common.flow_schedule()
    assert flow[[0, 499, 999]].tolist() == pytest.approx([0.999999, 0.500999, 1e-6], rel=1e-4)
    for a in (LINEAR, COSINE, flow, common.cosine_schedule(4000)):
        assert 0 < a.min() <= a.max() < 1
        assert (a.diff() < 0).all()


def test_a_batch_is_a_function_of_seed_and_step():
    images = random_images(2000, 1, 2, 2)
    draw = partial(common.batch, images, torch.arange(2000), 10, 6000)
    whole = draw(3, 5)
    shares = [draw(3, 5, rank=rank, world=4) for rank in range(4)]
    others = [draw(3, 6), draw(4, 5), draw(5, 3)]
    for i, part in enumerate(whole):
        assert torch.equal(part, torch.cat([share[i] for share in shares]))
        for other in others:
            assert not torch.equal(part, other[i])
    x0, y, t, noise, u = whole
    assert torch.equal(x0, images[y] / 127.5 - 1)
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert t.bincount(minlength=10).min() > 500  # 600 on average
    assert (u.T.corrcoef() - torch.eye(12)).abs().max() < 0.06


# ---- Samplers, where the best denoiser is known: for data N(MEAN, STD^2) it is linear in x_t

MEAN = 0.4
STD = 0.5


def gaussian(a):
    """denoise(x_t, t) -> the mean of x0 given x_t, for the schedule a."""

    def denoise(x_t, t):
        gain = a[t].sqrt() * STD**2 / (a[t] * STD**2 + 1 - a[t])
        return MEAN + gain * (x_t - a[t].sqrt() * MEAN)

    return denoise


def moments(sample, steps):
    """The exact mean and variance of what a sampler draws.

    Its image is a constant plus a sum of noises, each times a number. They are found by a batch:
    the first row has no noise, and each other row has one of the noises, which is 1.
    """
    a = LINEAR.double()
    rows = itertools.count(2)
    x = torch.full((steps + 2, 1, 1, 1), a[-1].sqrt().item() * MEAN, dtype=torch.float64)
    x[1] += (a[-1] * STD**2 + 1 - a[-1]).sqrt()

    def noise_in_the_next_row(x):
        noise = torch.zeros_like(x)
        noise[next(rows)] = 1
        return noise

    out = sample(gaussian(a), x, a, steps, randn=noise_in_the_next_row).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


WALKS = [dit.ddim_sample, dit.ddpm_sample, ddpm.ddim_sample, ddpm.ddpm_sample]


@pytest.mark.parametrize("sample", WALKS)
def test_samplers_are_first_order(sample):
    """The error halves when the steps double, and mean and variance of the data come out."""
    errors = []
    for steps in (50, 100, 200, 400):
        mean, variance = moments(sample, steps)
        assert mean == pytest.approx(MEAN, abs=2 / steps)
        errors.append(abs(variance - STD**2))
    for before, after in itertools.pairwise(errors):
        assert 0.4 < after / before < 0.62
    assert moments(sample, 1000) == pytest.approx((MEAN, STD**2), abs=5e-3)


def posterior(x0, x_t, a_t, a_s):
    """Mean and variance of q(x_s | x_t, x0), by Bayes' rule: q(x_t | x_s) q(x_s | x0)."""
    alpha = a_t / a_s
    precision = alpha / (1 - alpha) + 1 / (1 - a_s)
    mean = alpha.sqrt() / (1 - alpha) * x_t + a_s.sqrt() / (1 - a_s) * x0
    return mean / precision, 1 / precision


@pytest.mark.parametrize("steps", [100, 30])
@pytest.mark.parametrize("sample", [dit.ddpm_sample, ddpm.ddpm_sample])
def test_each_step_of_ddpm_is_a_draw_from_the_posterior(sample, steps):
    """But the last gives the estimate of the image."""
    a = common.linear_schedule(100, 1e-3, 0.1).double()
    noise = torch.randn(steps, 4, 1, 2, 2, dtype=torch.float64)
    unused = iter(noise[1:])
    seen = []

    def denoise(x_t, t):
        x0 = gaussian(a)(x_t, t)
        seen.append((t, x_t, x0))
        return x0

    image = sample(denoise, noise[0], a, steps, randn=lambda x: next(unused))
    assert [t for t, _, _ in seen] == [round(100 * i / steps) - 1 for i in range(steps, 0, -1)]
    assert next(unused, None) is None
    for k, (now, then) in enumerate(itertools.pairwise(seen), start=1):
        t, x_t, x0 = now
        s, x_s, _ = then
        mean, variance = posterior(x0, x_t, a[t], a[s])
        torch.testing.assert_close(x_s, mean + variance.sqrt() * noise[k])
    torch.testing.assert_close(image, seen[-1][-1])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_scales_the_noise_of_a_step(eta):
    """Song et al. 2020, eq. 12 and 16: sigma is eta times that of the posterior."""
    a = common.linear_schedule(10, 0.01, 0.2).double()
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    x0 = torch.full_like(x, 0.3)
    noise = torch.randn_like(x)
    denoise = mock.Mock(return_value=x0)
    dit.ddim_sample(denoise, x, a, steps=2, eta=eta, randn=lambda x: noise)
    (_, first), (x_next, second) = [call.args for call in denoise.call_args_list]
    assert (first, second) == (9, 4)
    _, variance = posterior(x0, x, a[9], a[4])
    sigma = eta * variance.sqrt()
    eps = (x - a[9].sqrt() * x0) / (1 - a[9]).sqrt()
    expected = a[4].sqrt() * x0 + (1 - a[4] - sigma**2).sqrt() * eps + sigma * noise
    torch.testing.assert_close(x_next, expected)


def test_dpm_solver_starts_where_nothing_but_noise_is_left():
    """At lambda = -5.1, or at T - 1, where Ho's schedule still has more of the image."""
    asked = []

    def denoise(x, t):
        asked.append(t)
        return x

    dit.dpm_solver_sample(denoise, torch.zeros(1, 1), COSINE, 2)
    dit.dpm_solver_sample(denoise, torch.zeros(1, 1), LINEAR, 2)
    assert asked == [(COSINE.logit() / 2 + 5.1).abs().argmin(), 0, 999, 0]


def test_dpm_solver_is_second_order():
    """A quarter of the error as the steps double, though one is three times as long as the next."""
    errors = []
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for steps in (10, 20, 40):
        long_and_short = torch.tensor([0, *[1.5, 0.5] * steps], dtype=torch.float64)
        a = (8 - 8 * long_and_short.cumsum(0) / steps).sigmoid()  # lambda from 4 to -4
        noisy = a[-1].sqrt() * MEAN + (a[-1] * STD**2 + 1 - a[-1]).sqrt() * z
        image = a[0].sqrt() * MEAN + (a[0] * STD**2 + 1 - a[0]).sqrt() * z
        drawn = dit.dpm_solver_sample(gaussian(a), noisy, a, 1000)
        errors.append((drawn - gaussian(a)(image, 0)).abs().max())
    assert errors[0] < 0.01
    for before, after in itertools.pairwise(errors):
        assert 3.3 < before / after < 4.7


def test_dpm_solver_by_hand():
    """A step of 3 in lambda, from x = 0 with x0 = 0; then one of 1.5 with x0 = 1."""
    a = torch.tensor([4.0, 1.0, -5.0]).sigmoid()

    def denoise(x_t, t):
        return x_t + 1 if t == 1 else x_t

    image = dit.dpm_solver_sample(denoise, torch.zeros(1, 1, 1, 1), a, 99)
    d = 1 + 1.5 / (2 * 3)  # algorithm 2
    assert image.item() == pytest.approx(d * math.sqrt(a[0]) * (1 - math.exp(-1.5)))


@pytest.mark.parametrize("steps, first", [(7, 1.0), (15, COSINE[0].item())])
def test_dpm_solver_takes_as_many_steps_as_asked(steps, first):
    a = COSINE.clone()
    a[0] = first
    denoise = mock.Mock(side_effect=lambda x_t, t: x_t)
    image = dit.dpm_solver_sample(denoise, torch.randn(1, 1, 2, 2), a, steps)
    assert image.isfinite().all()
    times = [call.args[1] for call in denoise.call_args_list]
    assert len(times) == steps
    assert times == sorted(set(times), reverse=True)


def test_inversion_returns():
    """Image -> noise -> image, better in proportion to the steps."""
    errors = []
    x0 = torch.linspace(-1, 1, 5).view(5, 1, 1, 1)
    for steps in (25, 50, 100):
        noise = ddim.ddim_invert(gaussian(COSINE), x0, COSINE, steps)
        again = ddim.ddim_sample(gaussian(COSINE), noise, COSINE, steps)
        errors.append((again - x0).abs().max())
        assert (noise - (x0 - MEAN) / STD).abs().max() < 5 / steps  # the ODE keeps the quantiles
    assert errors[0] < 0.2
    assert errors[1] < 0.55 * errors[0]
    assert errors[2] < 0.55 * errors[1]


# ---- The loss, the denoiser and guidance


def test_what_the_loss_asks_for_is_what_the_denoiser_takes(script):
    """The noise in ddpm, v elsewhere; x0 is clipped, and x_t is not."""
    a = script.schedule()
    assert torch.equal(a, COSINE), f"{script.NAME} has another schedule. {RETRAIN}"
    t = torch.tensor([0, 20, 500, 900])
    alpha = a[t].sqrt().view(4, 1, 1, 1)
    sigma = (1 - a[t]).sqrt().view(4, 1, 1, 1)
    x0 = random_images(4, 1, 2, 2) / 127.5 - 1
    noise = torch.randn_like(x0)
    x_t = alpha * x0 + sigma * noise
    answer = alpha * noise - sigma * x0
    weight = 1.0
    if script is ddpm:
        answer = noise
        weight = 9.34  # the mean of 1.00, 1.00, 2.03 and 33.33
    perfect = mock.Mock(return_value=answer)
    wrong = mock.Mock(return_value=answer + 1)
    advice = f"{script.NAME} predicts something else. {RETRAIN}"
    assert script.loss(perfect, x0, None, t, noise, a) == pytest.approx(0, abs=1e-10), advice
    torch.testing.assert_close(perfect.call_args.args[0], x_t)
    assert script.loss(wrong, x0, None, t, noise, a) == pytest.approx(weight, 1e-3), advice
    denoise = script.denoiser(perfect, a)
    assert (denoise(x_t, t) - x0).abs().max() < 1e-4, advice
    assert denoise(x_t + 9, t).max() == 1


@pytest.mark.parametrize("script", [ddim, dit, uvit])
def test_what_means_something_else_is_refused(script, monkeypatch):
    """The shipped weights, once schedule, target or the way back to x0 have changed."""

    def linear(device="cpu"):
        return LINEAR

    def noise_in_place_of_v(model, x0, y, t, noise, a):
        x_t = a[t].sqrt() * x0 + (1 - a[t]).sqrt() * noise
        return (model(x_t, t, y) - noise).square().mean()

    def x0_in_place_of_v(model, a, y=None):
        return lambda x_t, t: model(x_t, t, y)

    path = ROOT / "checkpoints" / f"{script.NAME}.pt"
    shipped(script)
    changes = {"schedule": linear, "loss": noise_in_place_of_v, "denoiser": x0_in_place_of_v}
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(script, name, change)
            with pytest.raises(SystemExit, match="trained with another schedule, loss or denoiser"):
                script.load(path)


def test_what_means_something_else_is_refused_by_ddpm(monkeypatch):
    path = ROOT / "checkpoints" / "ddpm_unet_mnist.pt"
    shipped(ddpm)
    with monkeypatch.context() as patch:
        patch.setattr(common, "cosine_schedule", common.linear_schedule)
        with pytest.raises(SystemExit, match="trained with another schedule, loss or denoiser"):
            ddpm.load(path)
    for name in ("loss", "denoiser"):
        with monkeypatch.context() as patch:
            patch.setattr(ddpm, name, getattr(dit, name))
            with pytest.raises(SystemExit, match="trained with another schedule, loss or denoiser"):
                ddpm.load(path)


def test_words_that_mean_something_else_are_refused(monkeypatch):
    monkeypatch.setattr(ddim, "WORDS", [*reversed(ddim.WORDS)])
    with pytest.raises(SystemExit, match="trained with another schedule, loss or denoiser"):
        ddim.load(ROOT / "checkpoints" / "ddim_unet_mnist.pt")


def with_or_without_y(x_t, t, y=None):
    """What a network may answer: 0.03 with a condition, 0.01 without."""
    return torch.full_like(x_t, 0.01 if y is None else 0.03)


def guided(script, t, *options):
    """The v that the denoiser takes, at time t."""
    denoise = script.denoiser(with_or_without_y, COSINE, torch.tensor([1]), *options)
    x0 = denoise(torch.zeros(1, 1, 1, 1), t)
    return (-x0 / (1 - COSINE[t]).sqrt()).item()


def test_guidance():
    """v_null + guidance (v - v_null)."""
    for script in (ddim, dit):
        assert guided(script, 500, 3) == pytest.approx(0.07)
        assert guided(script, 500, 1) == pytest.approx(0.03)
        assert guided(script, 500, 0) == pytest.approx(0.01)
    assert guided(ddim, 999, 3) == pytest.approx(0.07)


@pytest.mark.parametrize("interval", [(0.2, 0.8), (0.8, 0.2)])
def test_guidance_acts_in_its_interval(interval):
    assert guided(dit, 801, 3, interval) == pytest.approx(0.03)
    assert guided(dit, 800, 3, interval) == pytest.approx(0.07)
    assert guided(dit, 200, 3, interval) == pytest.approx(0.07)
    assert guided(dit, 199, 3, interval) == pytest.approx(0.03)


def calls_of_the_network(script, y, flags):
    """How often draw() calls the network, with a class or a prompt and without."""
    model = mock.Mock(side_effect=with_or_without_y)
    args = parse(script, "--sampler ddim --steps 10 " + flags)  # at t = 999, 899, .. 99
    script.draw(model, COSINE, args, [y], "x.png")
    asked = [len(call.args) for call in model.call_args_list]
    return asked.count(3), asked.count(2)


def test_guidance_reaches_the_drawing():
    seven = ddim.tokenize("7")
    assert calls_of_the_network(ddim, seven, "--guidance 1") == (10, 0)
    assert calls_of_the_network(ddim, seven, "--guidance 3") == (10, 10)
    assert calls_of_the_network(dit, 7, "--guidance 1") == (10, 0)
    assert calls_of_the_network(dit, 7, "--guidance 3 --guidance-interval 0.2 0.8") == (10, 6)
    assert calls_of_the_network(dit, 7, "--guidance 3 --guidance-interval 0 0.3") == (10, 3)


# ---- Networks


def test_network(script):
    net = network(script, std=0.15)
    x = random_input(script, 4)
    t = torch.tensor([0, 3, 500, 999])
    out = net(x, t)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    torch.testing.assert_close(net(x[1:3], t[1:3]), out[1:3], atol=1e-5, rtol=1e-5)  # no leak
    assert (net(x, t.flip(0)) - out).abs().max() > 1e-4
    out.square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("script", [ddim, dit, uvit])
def test_the_network_minds_y_and_nothing_in_particular_is_the_default(script):
    net = network(script, std=0.15)
    x = random_input(script, 1)
    t = torch.tensor([500])
    kinds = list(range(11))
    if script is ddim:
        kinds = [ddim.tokenize(prompt) for prompt in ("7", "8", "thick 7", "7 thick", "")]
    outs = [net(x, t, torch.tensor([kind])) for kind in kinds]
    torch.testing.assert_close(net(x, t), outs[-1])
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().max() > 1e-4


FINGERPRINTS = {
    ddpm: [0.48215, 1.38276, -0.37814],
    ddim: [0.06551, 0.88111, 0.29939],
    dit: [0.04879, 0.56977, -0.14721],
    uvit: [0.03353, 0.56828, -0.14582],
}


def test_the_networks_compute_what_they_did(script):
    """With the shipped weights: mean, spread and one number of the answer to a fixed input."""
    x = random_input(script, 2)
    t = torch.tensor([300, 700])
    y = torch.tensor([3, 7])
    if script is ddim:
        y = torch.tensor([ddim.tokenize("a thick red 3 on blue"), ddim.tokenize("7")])
    with torch.no_grad():
        out = shipped(script)(x, t, y)
    found = [out.mean().item(), out.std().item(), out[1, 0, 14, 14].item()]
    advice = f"the network of {script.NAME} computes {found}. {RETRAIN}"
    assert found == pytest.approx(FINGERPRINTS[script], abs=3e-5), advice


def test_networks_start_from_zero():
    for script in (ddpm, ddim, dit):
        net = NETWORKS[script]()
        x = random_input(script, 2)
        first_guess = x if script is ddpm else torch.zeros_like(x)
        assert torch.equal(net(x, torch.tensor([3, 500])), first_guess)
    x = torch.randn(2, 16, 16)
    c = torch.randn(2, 16)
    assert torch.equal(NETWORKS[dit]().blocks[1](x, c), x)  # adaLN-Zero: all gates are shut


def test_parameter_counts_of_the_papers():
    dit_s_2 = dit.DiT(384, 12, 6, 2)
    uvit_s_2 = uvit.UViT(512, 12, 8, 2)
    for net, count in ((dit_s_2, 32.48e6), (uvit_s_2, 44.26e6)):
        found = sum(map(torch.numel, net.parameters()))
        assert found == pytest.approx(count, abs=2e4), f"{found}: adapt this and the docstring"


def test_attention_by_hand():
    """Over the words of a prompt: their values, in proportion to the weights, in two heads."""
    layer = ddim.CrossAttention(64, 8)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    x = torch.randn(1, 64, 7, 7)
    text = torch.randn(1, 5, 8)
    q = layer.q(layer.norm(x).flatten(2).mT)
    k, v = layer.kv(text).chunk(2, dim=-1)
    heads = []
    for head in (slice(0, 32), slice(32, 64)):
        scores = q[..., head] @ k[..., head].mT / math.sqrt(32)
        heads.append(scores.softmax(dim=-1) @ v[..., head])
    expected = x + layer.out(torch.cat(heads, dim=-1)).mT.view_as(x)
    torch.testing.assert_close(layer(x, text), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
@pytest.mark.parametrize("script", [ddpm, ddim, dit])
def test_muon_is_that_of_pytorch(script):
    """For tall matrices and wide ones, two of one shape, and kernels, which it flattens."""
    shapes = [(24, 8, 2, 2), (24, 8, 2, 2), (8, 4, 3, 3), (8, 36), (64, 16)]
    ours = [torch.zeros(shape) for shape in shapes]
    theirs = [weight.flatten(1).clone() for weight in ours]
    one = script.Muon(ours, {"lr": 0.01})
    other = torch.optim.Muon(theirs, 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for weight, same in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight)
            same.grad = weight.grad.flatten(1)
        one.step()
        other.step()
        for weight, same in zip(ours, theirs, strict=True):
            # theirs computes in bfloat16, which gives 0.019; 0.06 in place of 0.05 gives 0.03
            assert weight.flatten(1).dist(same) < 0.025 * same.norm()


@pytest.mark.parametrize("script", [ddpm, ddim, dit])
@pytest.mark.parametrize("parts", [3, 6])
def test_muon_takes_q_k_and_v_apart(script, parts):
    """And the six of adaLN. They are trained as if they were matrices of their own."""
    whole = [torch.randn(parts * 8, 8) for _ in range(2)]
    apart = [part.clone() for weight in whole for part in weight.chunk(parts)]
    optimizers = [script.Muon(weights, {"lr": 0.01}) for weights in (whole, apart)]
    for _ in range(3):
        for weight in whole:
            weight.grad = torch.randn_like(weight)
        for part, grad in zip(apart, torch.cat([w.grad for w in whole]).split(8), strict=True):
            part.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat(whole), torch.cat(apart))


@pytest.mark.parametrize("script", [dit, uvit])
def test_muon_takes_the_matrices_inside(script):
    """And Adam takes the vectors, and the matrices that meet pixels, times and classes."""
    model = NETWORKS[script]()
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizers = script.make_optimizers(model, 0.1)
    taken = {}
    for kind, optimizer in optimizers.items():
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.1
        taken[kind] = [names.pop(id(weight)) for weight in group["params"]]
    assert not names  # each weight is taken, and once
    weights = dict(model.named_parameters())
    outside = {name.split(".")[0] for name in taken["optimizer"] if weights[name].ndim > 1}
    expected = {
        dit: {"embed", "time", "label", "head"},
        uvit: {"embed", "label", "positions", "head", "smooth"},
    }
    assert outside == expected[script]
    assert {weights[name].ndim for name in taken["muon"]} == {2}


# ---- Captions


def stroke(width, lean):
    """A bar of `width` pixels that leans right by `lean` of its height (1, 1, 28, 28)."""
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    middle = 13.5 + lean * (13.5 - row)
    inside = (row >= 4) & (row < 24)
    ink = (width / 2 + 0.5 - (column - middle).abs()).clamp(0, 1) * inside
    return (2 * ink - 1)[None, None]


THICK = stroke(4, -0.3)
U = [0.2, 0.01, 0.22, 0.23, 0.24, 0.25, 0.26, 0.4, 0.3, 0.29, 0.28, 0.99]  # all different


def caption(image, digit, u):
    """What the caption of one image says."""
    _, tokens = ddim.illustrate(image, torch.tensor([digit]), torch.tensor([u]))
    return " ".join(ddim.WORDS[token] for token in tokens[0] if token)


def test_captions_are_read_off_the_image():
    assert caption(THICK, 7, U) == "a thick green seven leaning left on white"
    assert caption(stroke(1.5, 0.3), 7, U) == "a thin green seven leaning right on white"
    assert caption(stroke(2.4, 0), 7, U) == "a green seven on white"
    for k, name in enumerate(ddim.DIGITS):
        assert name in caption(THICK, k, U).split()


@pytest.mark.parametrize(
    ("which", "number", "words"),
    [
        (0, 0.0999, ""),
        (0, 0.9, "a thick green seven leaning left on white"),
        (1, 0.9, "a thick green seven leaning left on white"),
        (2, 0.74, "a thick green seven leaning left on white"),
        (2, 0.76, "thick green leaning left on white"),
        (3, 0.6, "thick green seven leaning left on white"),
        (4, 0.6, "a green seven leaning left on white"),
        (5, 0.6, "a thick green seven on white"),
        (6, 0.6, "a thick green 7 leaning left on white"),
        (7, 0.8, "a thick white seven leaning left on orange"),
        (8, 0.8, "a thick green seven leaning left on orange"),
        (9, 0.6, "a thick seven leaning left on white"),
        (10, 0.6, "a thick green seven leaning left"),
        (11, 0.1, "a thick green seven leaning left on white"),
    ],
)
def test_each_chance_decides_one_thing(which, number, words):
    u = U.copy()
    u[which] = number
    assert caption(THICK, 7, u) == words


def test_dark_digits_on_light_paper_are_ink_all_the_same():
    assert caption(-THICK, 7, U) == caption(THICK, 7, U)
    images = [ddim.illustrate(x, torch.tensor([7]), torch.tensor([U]))[0] for x in (THICK, -THICK)]
    torch.testing.assert_close(*images)
    spot = THICK.clone()
    spot[..., 0, 0] = -0.8  # does not turn the rest
    assert caption(spot, 7, U) == caption(THICK, 7, U)


def test_images_are_painted_as_the_caption_says():
    image, _ = ddim.illustrate(THICK, torch.tensor([7]), torch.tensor([U]))
    green = ddim.PALETTE[ddim.COLOURS.index("green"), :, 0, 0]
    white = ddim.PALETTE[ddim.COLOURS.index("white"), :, 0, 0]
    torch.testing.assert_close(image[0, :, 13, 13], green)
    torch.testing.assert_close(image[0, :, 0, 0], white)


def test_a_pair_that_is_held_out_is_not_trained_on():
    """No green 4: it is white, and the paper follows."""
    assert caption(THICK, 4, U) == "a thick white four leaning left on orange"


def test_tokenize():
    words = [ddim.WORDS[token] for token in ddim.tokenize("An  8 on BLUE")]
    assert words == ["a", "8", "on", "blue", "", "", "", ""]
    with pytest.raises(ValueError, match="'pink' is not known"):
        ddim.tokenize("a pink 7")
    with pytest.raises(ValueError, match="'7' is one too many"):
        ddim.tokenize("a " * 8 + "7")


def test_interpolation_is_slerp():
    """Image i is in row i % 2; row r goes from noise 2r to noise 2r + 1."""
    x = next(ddim.interpolated_noises(3, range(10), 2, 10, "cpu")).flatten(1)
    ends = next(common.noises(3, range(4), (3, 28, 28))).flatten(1)
    torch.testing.assert_close(x[[0, 8, 1, 9]], ends)
    angles = torch.cosine_similarity(x[2:], x[:-2]).acos()
    assert (angles[::2] - angles[0]).abs().max() < 0.01
    assert x.norm(dim=1).min() > 0.9 * ends.norm(dim=1).min()


# ---- Training


def test_learning_rate():
    args = parse(dit, "--warmup 100 --max-steps 100000 --lr 1")
    steps = (50, 100, 400, 80000, 90001, 100000)
    rates = [dit.learning_rate(step, args) for step in steps]
    assert rates == pytest.approx([0.5, 1, 0.5, 0.03536, 0.01667, 0], abs=1e-5)


def prepared(script, batch, is_training):
    """What a script makes of a batch before its loss sees it."""
    x0, y, t, noise, u = batch
    if script is ddim:
        x0, y = ddim.illustrate(x0, y, u)
    elif script in TRANSFORMERS and is_training:
        y = torch.where(u[:, 0] < 0.1, 8, y)  # a tenth has the null class
        x0 = torch.where(u[:, 1, None, None, None] < 0.5, x0.flip(-1), x0)  # half are mirrored
    elif is_training:
        t = t.maximum((1000 * u[:, 0]).long())
    return x0, y, t, noise, COSINE


def assert_equal(given, expected):
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)


def test_what_a_step_is_trained_on_and_what_is_validated(script, monkeypatch):
    calls = []
    values = []
    loss = script.loss

    def noted(*args):
        value = loss(*args)
        calls.append(args)
        values.append(value.item())
        return value

    monkeypatch.setattr(script, "loss", noted)
    train(script, "run", 1, "--batch-size 64 --micro-batch 64 --seed 5 --lr 0.1")
    _, trained, validated = calls  # the first is meaning()'s
    train_set, test_set, _ = common.load_data(script.DATA, "data", script.SIZE, script.CHANNELS)
    step = common.batch(*train_set, 1000, 64, seed=5, step=1)
    held_out = common.batch(*test_set, 1000, 256, seed=0, step=0)
    assert_equal(trained[1:], prepared(script, step, is_training=True))
    assert_equal(validated[1:], prepared(script, held_out, is_training=False))
    state, (row,) = load("run")
    last = list(state["ema"])[-1]
    assert torch.equal(validated[0].state_dict()[last], state["ema"][last])
    assert not torch.equal(state["model"][last], state["ema"][last])
    logged = [float(row["loss"]), float(row["val_loss"])]
    assert logged == pytest.approx(values[1:], abs=1e-5)


def test_the_rate_reaches_every_optimizer(script):
    train(script, "run", 1, "--lr 0.1")
    state, (row,) = load("run")
    assert float(row["lr"]) == 0.05  # half of it: one step of two to warm up
    for name in {"optimizer", "muon"} & set(state):
        (group,) = state[name]["param_groups"]
        assert group["lr"] == 0.05
        assert group.get("weight_decay", 0) == 0


def test_gradients_are_clipped_before_the_optimizer_sees_them(script, monkeypatch):
    """To a norm of 1: after a step, momenta are 0.1 (Adam) or 0.05 (Muon) of what it saw."""
    loss = script.loss
    monkeypatch.setattr(script, "loss", lambda *args: 1000 * loss(*args))
    train(script, "run", 1)
    state, (row,) = load("run")
    assert float(row["grad_norm"]) > 2
    squares = 0.0
    for name in {"optimizer", "muon"} & set(state):
        for memory in state[name]["state"].values():
            seen = memory["exp_avg"] / 0.1 if "exp_avg" in memory else memory["momenta"] / 0.05
            squares += seen.square().sum().item()
    assert math.sqrt(squares) == pytest.approx(1, abs=1e-3)


def test_a_step_in_parts_is_the_step(script):
    """8 images at once, or 3, 3 and 2: up to rounding the same weights and the same log."""
    train(script, "whole", 2, "--micro-batch 8")
    train(script, "parts", 2, "--micro-batch 3")
    (whole, (row,)), (parts, (same,)) = load("whole"), load("parts")
    torch.testing.assert_close(parts["model"], whole["model"], rtol=0, atol=1e-5)
    assert float(same["loss"]) == pytest.approx(float(row["loss"]), abs=2e-5)
    assert float(same["grad_norm"]) == pytest.approx(float(row["grad_norm"]), abs=2e-3)


def test_bfloat16_reaches_training_validation_and_drawing(script, monkeypatch):
    seen = []

    def noting_the_type(function):
        def noted(*args, **options):
            one = torch.ones(1, 1)
            seen.append((one @ one).dtype)  # autocast shows in the type of products
            return function(*args, **options)

        return noted

    monkeypatch.setattr(script, "loss", noting_the_type(script.loss))
    monkeypatch.setattr(script, "meaning", lambda *name: [])
    sampler = noting_the_type(script.SAMPLERS["ddim"])
    monkeypatch.setitem(script.SAMPLERS, "ddim", sampler)
    flags = "--sampler ddim --batch-size 2 --dtype "
    train(script, "half", 1, flags + "bfloat16")
    assert seen == [torch.bfloat16] * 3
    train(script, "full", 1, flags + "float32")
    assert seen[3:] == [torch.float32] * 3


def test_compile_compiles_what_is_trained(script, monkeypatch):
    def forward_only(model, disable=False):
        return model if disable else model.forward

    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=forward_only))
    loss = mock.Mock(side_effect=script.loss)
    monkeypatch.setattr(script, "loss", loss)
    for flag, is_compiled in (("--compile", True), ("--no-compile", False)):
        loss.reset_mock()
        train(script, f"run{flag}", 1, flag)
        _, trained, validated = [call.args[0] for call in loss.call_args_list]
        assert inspect.ismethod(trained) == is_compiled
        assert isinstance(validated, torch.nn.Module)


def test_a_signal_finishes_the_step_and_resume_goes_on_bit_for_bit(script, capsys):
    """With the flags of the run. Where training ends, its averaged weights are drawn."""
    train(script, "whole", 4, "--lr 0.05 --seed 3")
    with interrupted(script, 3, signal.SIGINT if script is ddim else signal.SIGTERM):
        train(script, "parts", 4, "--lr 0.05 --seed 3")
    assert "stopped after step 3; --resume continues" in capsys.readouterr().out
    state, _ = load("parts")
    assert state["step"] == 3
    state["config"]["device"] = "tpu"  # of another machine
    state["seconds"] = 1000.0
    torch.save(state, "parts/ckpt.pt")
    run_script(script, "--run-dir parts --resume")
    assert_same(load("whole")[0], load("parts")[0])
    assert float(load("parts")[1][-1]["seconds"]) >= 1000
    run_script(script, "--sample-only --run-dir parts --seed 3")
    assert torch.equal(pixels("samples.png"), pixels("whole/samples-0000004.png"))


def test_a_signal_while_it_validates_loses_nothing(monkeypatch, capsys):
    """It comes when this step's fate is decided, so the next one is finished and saved."""
    losses = itertools.count()
    loss = dit.loss

    def interrupt(model, *args):
        is_validation = not torch.is_grad_enabled()
        if is_validation and len(args[0]) == 256 and next(losses) == 2:
            signal.raise_signal(signal.SIGTERM)
        return loss(model, *args)

    monkeypatch.setattr(dit, "loss", interrupt)
    train(dit, "run", 9, "--log-every 1 --save-every 1000")
    assert "stopped after step 4" in capsys.readouterr().out
    state, rows = load("run")
    assert state["step"] == 4
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("flags", ["--sample-every 2", ""])
def test_a_signal_while_samples_are_drawn_ends_it_at_once(flags, monkeypatch):
    """What was trained is saved before. SIGTERM is left to the system, which ends the process."""

    def interrupt(*args, **options):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(dit.SAMPLERS, "dpm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(dit, "run", 2 if flags == "" else 4, flags)
    assert load("run")[0]["step"] == 2


def test_ctrl_c_exits_with_130_and_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(common, "load_data", lambda *args: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", [dit.__file__, *CPU.split()])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(dit.__file__, run_name="__main__")
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_ema_is_its_closed_form_and_images_are_counted(monkeypatch):
    """Half-lives of 0.05 * images seen, up to --ema; a resumed run keeps both."""
    average = torch.zeros(192)  # as biases start
    seen = []
    save = torch.save

    def follow(state, path):
        images = state["images"]
        batch_size = state["config"]["batch_size"]
        weight = 0.5 ** (batch_size / min(5, 0.05 * images))
        average.copy_(torch.lerp(state["model"]["head.bias"], average, weight))
        torch.testing.assert_close(state["ema"]["head.bias"], average)
        seen.append(images)
        save(state, path)

    monkeypatch.setattr(torch, "save", follow)
    train(dit, "run", 20, "--lr 0.05 --batch-size 4 --save-every 1 --ema 5")
    run_script(dit, "--run-dir run --resume --batch-size 6 --max-steps 25")
    assert seen == [*range(4, 81, 4), 86, 92, 98, 104, 110]


def test_the_schedule_of_a_run_is_kept(monkeypatch):
    """In training, when it goes on, and when its checkpoint is drawn from."""
    flow = common.flow_schedule()
    loss = mock.Mock(side_effect=ddpm.loss)
    sampler = mock.Mock(side_effect=ddpm.ddpm_sample)
    monkeypatch.setattr(ddpm, "loss", loss)
    monkeypatch.setitem(ddpm.SAMPLERS, "ddpm", sampler)
    train(ddpm, "run", 1, "--schedule flow")
    run_script(ddpm, "--run-dir run --resume --max-steps 2")
    run_script(ddpm, "--run-dir run --sample-only")
    run_script(ddpm, "--ckpt run/ckpt.pt")
    assert sampler.call_count == 4
    for call in loss.call_args_list:
        assert torch.equal(call.args[5], flow)
    for call in sampler.call_args_list:
        assert torch.equal(call.args[2], flow)


def test_weights_that_are_not_finite_are_not_saved(monkeypatch):
    train(dit, "run", 2)
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(dit, "learning_rate", lambda step, args: math.inf)
    flags = "--run-dir run --resume --max-steps 9 --save-every 1 --log-every 100"
    assert "not finite at step 3: " in refused(dit, flags)
    assert Path("run/ckpt.pt").read_bytes() == before


def test_a_run_is_locked_while_it_trains(monkeypatch):
    lines = []

    def second_run(step, args):
        with mock.patch.object(dit, "train"):
            lines.append(refused(dit, "--run-dir run"))
        return 0.01

    with monkeypatch.context() as patch:
        patch.setattr(dit, "learning_rate", second_run)
        train(dit, "run", 2)
    assert len(lines) == 2
    for line in lines:
        assert line == "The file lock 'run/lock0' could not be acquired."
    run_script(dit, "--run-dir run --resume --max-steps 3")


# ---- Drawing


def drawn(script, net, flags, n, out="x/"):
    """What draw() makes pictures of: for x/ the images one by one, before they are rounded."""
    y = [ddim.tokenize("7"), ddim.tokenize("8")] if script is ddim else [3, 7]
    y = [y[i % 2] for i in range(n)]
    args = parse(script, f"-n {n} {flags}")
    picture = mock.Mock()
    with mock.patch.object(script, "picture", picture):
        script.draw(net, COSINE, args, *([] if script is ddpm else [y]), out)
    return [call.args[0] for call in picture.call_args_list]


def test_image_i_is_a_function_of_seed_and_i(script):
    """Whatever -n and --micro-batch are."""
    net = network(script)
    for sampler in script.SAMPLERS:
        flags = f"--steps 9 --sampler {sampler} --seed "
        whole = torch.cat(drawn(script, net, flags + "3 --micro-batch 5", 5))
        for n, micro_batch in ((2, 2), (5, 2), (5, 1)):
            parts = torch.cat(drawn(script, net, flags + f"3 --micro-batch {micro_batch}", n))
            torch.testing.assert_close(parts, whole[:n], atol=1e-5, rtol=0)
        other_seed = torch.cat(drawn(script, net, flags + "4", 1))
        assert (other_seed[0] - whole[0]).abs().max() > 0.1
        assert (whole[2] - whole[0]).abs().max() > 0.1


def test_a_gif_is_the_way_to_the_grid(script):
    net = network(script)
    ways = []
    for micro_batch in (5, 2):
        flags = f"--steps 3 --micro-batch {micro_batch}"
        *way, grid = drawn(script, net, flags, 5, "x.gif")
        (again,) = drawn(script, net, flags, 5, "x.png")
        assert len(way) == 3
        assert torch.equal(grid, again)
        noise = next(common.noises(0, range(5), grid.shape[1:]))
        assert torch.equal(way[0], noise)
        ways.append(torch.stack([*way, grid]))
    torch.testing.assert_close(*ways, atol=1e-5, rtol=0)


def test_processes_share_a_folder(monkeypatch):
    net = network(dit)
    args = parse(dit, "--micro-batch 2")
    y = [3, 7] * 5
    Path("three").mkdir()
    monkeypatch.setattr(dit, "WORLD", 3)
    for rank, files in ((2, 3), (1, 6), (0, 10)):
        monkeypatch.setattr(dit, "RANK", rank)
        dit.draw(net, COSINE, args, y, "three/")
        dit.draw(net, COSINE, args, y, f"{rank}.png")
        assert len(list(Path("three").iterdir())) == files
    assert [path.name for path in Path().glob("?.png")] == ["0.png"]  # one of them draws the grid
    grid = pixels("0.png").view(2, 34, 5, 34, 3)[:, 1:33, :, 1:33]
    for i in range(10):
        image = pixels(f"three/{i:06d}-{y[i]}.png")
        assert (grid[i % 2, :, i // 2] - image).abs().max() <= 1


@pytest.mark.parametrize("shift", [-0.4, 0, 0.4])
def test_a_picture_has_the_nearest_grey_level(shift):
    levels = torch.arange(256).view(1, 1, 16, 16)
    dit.picture((levels + shift) / 127.5 - 1).save("x.png")
    assert torch.equal(pixels("x.png")[:, :, 0], levels[0, 0].int())


def test_pictures_from_the_command_line(script):
    """--ckpt and --out mean drawing."""
    train(script, "run", 1)
    draw = "--ckpt run/ckpt.pt -n 5 --out "
    side = script.SIZE + 2
    run_script(script, draw + "way.gif --steps 3")
    with Image.open("way.gif") as gif:
        assert gif.n_frames == 4  # what each step starts from, and what comes out
        assert gif.size == (3 * side, 2 * side)
    run_script(script, draw + "x.png --sampler ddpm")
    run_script(script, draw + "y.png --sampler ddim")
    assert (pixels("x.png") - pixels("y.png")).abs().max() > 1


def test_a_folder_at_home(script, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    train(script, "'~/run'", 1)
    assert Path("run/samples-0000001.png").exists()
    assert "run holds a run" in refused(script, "--run-dir '~/run'")


@pytest.mark.parametrize("script", TRANSFORMERS)
def test_a_row_for_each_class(script):
    train(script, "run", 1)
    run_script(script, "--run-dir run -n 5 --classes 7 1")
    run_script(script, "--run-dir run -n 1 --classes 7 --out new/")
    picture = pixels("samples.png")
    assert picture.shape == (2 * 34, 3 * 34, 3)
    assert (picture[1:33, 1:33] - pixels("new/000000-7.png")).abs().max() <= 1
    assert picture[35:67, 69:101].max() == 0  # five images in rows of three


def test_prompts_and_interpolation_from_the_command_line():
    train(ddim, "run", 1)
    draw = "--run-dir run --out "
    run_script(ddim, draw + "x/ --prompt 7 'a thin 3'")
    assert Path("x/000003-a-thin-3.png").exists()
    run_script(ddim, draw + "row.png --prompt '' --interpolate")
    run_script(ddim, draw + "ends.png --prompt '' -n 2")
    row = pixels("row.png")
    ends = torch.cat([row[:, :30], row[:, 90:]], dim=1)
    assert (ends - pixels("ends.png")).abs().max() <= 1


def test_inversion_goes_without_guidance():
    """It is not undone. Only the pictures under other prompts have it."""
    model = mock.Mock(side_effect=with_or_without_y)
    write_folders(".", "x")
    args = parse(ddim, "--invert x/0.png --guidance 3 --steps 10")
    seven = ddim.tokenize("7")
    eight = ddim.tokenize("8")
    ddim.invert(model, COSINE, args, [seven, eight], "back.png")
    prompts = [call.args[2].tolist() if call.args[2:] else None for call in model.call_args_list]
    assert prompts[:20] == [[list(seven)]] * 20
    assert prompts[20:] == [[list(eight)], None] * 10


def test_inversion_from_the_command_line():
    run_script(ddim, "--prompt 7 -n 1 --steps 20 --out x/")
    run_script(ddim, "--invert x/000000-7.png --prompt 7 8 --steps 50 --out back.png")
    framed = pixels("back.png").view(30, 4, 30, 3)
    image, _, again, _ = framed[1:29, :, 1:29].float().unbind(dim=1)
    assert torch.equal(image, pixels("x/000000-7.png").float())
    assert (again - image).square().mean().sqrt() < 25  # PSNR of 20 dB


def test_shipped_checkpoint_draws(script):
    """What a fresh clone does first: white on black, ink on blue, or pictures, ships bluer."""
    shipped(script)
    kinds = {ddpm: "", ddim: "--prompt '7 on blue'"}.get(script, "--classes 0 8 4 6")
    run_script(script, "--sample-only -n 16 --steps 7 " + kinds)
    picture = pixels("samples.png").float()
    if script in TRANSFORMERS:
        planes_and_ships, deer_and_frogs = picture.view(2, 68, 136, 3).mean(dim=(1, 2))
        red, _, blue = planes_and_ships - deer_and_frogs
        assert blue - red > 5, RETRAIN
    elif script is ddpm:
        assert 0.6 < (picture < 32).float().mean() < 0.95, RETRAIN
        assert 0.03 < (picture > 224).float().mean() < 0.3, RETRAIN
    else:
        blue = pytest.approx([47, 98, 201], abs=25)
        assert picture[2, 2].tolist() == blue, RETRAIN  # the paper


# ---- Rough treatment


def start(arguments, **variables):
    """A Python process with these arguments."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, *shlex.split(arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def saved_step(run):
    """The last step in the checkpoint of a run that another process writes."""
    return load(run)[0]["step"] if Path(run, "log.csv").exists() else 0


def test_killed_and_resumed_bit_for_bit():
    flags = CPU + TINY + SHAPE[dit] + "--run-dir killed --save-every 1"
    steps = 0
    for resume in ("", " --resume"):
        process = start(f"{dit.__file__} {flags}{resume}")
        enough = steps + 3
        while steps < enough:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02 + random.random() / 10)
            steps = saved_step("killed")
        process.kill()
        process.communicate()
        Path("killed/ckpt.tmp").write_bytes(b"torn")  # had it been killed here
    state, _ = load("killed")
    with interrupted(dit, state["step"]):
        train(dit, "whole", 80000)
    assert_same(state, load("whole")[0])
    logged = [row["step"] for row in state["log"]]
    assert logged == list(range(1, state["step"] + 1))  # none missing, none twice


def test_two_processes_are_one():
    """Though each takes its half of a step in parts, 3 images and 1."""
    train(dit, "one", 4)
    with interrupted(dit, 2):
        train(dit, "two", 4)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    process = start(f"{torchrun} {dit.__file__} {CPU} --run-dir two --resume --micro-batch 3")
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (one, log_of_one), (two, log_of_two) = load("one"), load("two")
    assert_same(one, two, tolerance=1e-5)
    for name in ("loss", "val_loss"):
        same = pytest.approx(float(log_of_one[-1][name]), abs=2e-5)
        assert float(log_of_two[-1][name]) == same


def test_one_process_of_two(monkeypatch):
    """It trains on its half of the batch, validates on all images, and logs the pace of both."""
    monkeypatch.setattr(dit, "WORLD", 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda net: net)
    for name in ("init_process_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, mock.Mock())
    clock = mock.Mock(perf_counter=mock.Mock(side_effect=itertools.count(0, 10)))  # 10 s a log
    monkeypatch.setattr(dit, "time", clock)
    loss = mock.Mock(side_effect=dit.loss)
    monkeypatch.setattr(dit, "loss", loss)
    train(dit, "run", 2)
    _, first, second, validated = [len(call.args[1]) for call in loss.call_args_list]
    assert (first, second, validated) == (4, 4, 256)
    _, (row,) = load("run")
    assert row["images_per_s"] == str(round(2 * 8 / 10))
    assert row["images"] == "16"


def test_a_run_that_moves_takes_the_defaults_of_the_machine(script):
    """Its own flags come with it, but not where and how to compute."""
    train(script, "run", 1)
    path = Path("run/ckpt.pt")
    state = torch.load(path, weights_only=True)
    there = {"run_dir": "there", "device": "cuda", "dtype": "bfloat16", "compile": True}
    there["micro_batch"] = 3
    state["config"] |= there | {"lr": 0.123}
    torch.save(state, path)
    here = parse(script, CPU + "--run-dir run --resume")
    with mock.patch.object(sys, "argv", ["script.py", "--resume"]):
        resumed, _ = script.resume(script.make_parser(), here, path)
    assert resumed.lr == 0.123
    for name in there:
        assert vars(resumed)[name] == vars(here)[name] != there[name]


def test_training_and_drawing_show_their_progress(script, monkeypatch):
    """In parts of a step and of a drawing, which add up."""
    shown = {}

    class Recorder:
        def __init__(self, total, what):
            self.parts = shown[what] = [total]

        def add(self, n):
            self.parts.append(n)

    train(script, "run", 1)
    monkeypatch.setattr(common, "Progress", Recorder)
    run_script(script, "--run-dir run --resume --max-steps 3 --micro-batch 3 -n 4 --steps 2")
    total, *parts = shown["steps"]
    assert total == 2  # of those that are left
    assert parts == 2 * [3 / 8, 3 / 8, 2 / 8]
    total, *parts = shown["images"]
    assert total == sum(parts) == 4
    assert len(parts) == 2 * 2


def test_with_more_processes_a_signal_ends_them(script, monkeypatch):
    """One that goes on would leave the others waiting for it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(script, "WORLD", 2)
    script.on_signals(mock.Mock())
    assert [signal.getsignal(number) for number in numbers] == before


MACHINES = [  # a GPU, its own bfloat16, that of the CPU; --device, --dtype, --compile
    (False, False, None, "cpu", "float32", False),  # an old PyTorch does not know
    (False, False, False, "cpu", "float32", False),
    (False, False, True, "cpu", "bfloat16", False),
    (True, True, False, "cuda", "bfloat16", True),
    (True, False, True, "cuda", "float32", True),
]


@pytest.mark.parametrize(("cuda", "of_cuda", "of_cpu", "device", "dtype", "compiles"), MACHINES)
def test_defaults_follow_the_machine(
    script, monkeypatch, cuda, of_cuda, of_cpu, device, dtype, compiles
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: of_cuda or including_emulation
    )
    if of_cpu is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        capabilities = {"avx512_bf16": of_cpu}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    args = script.make_parser().parse_args([])
    assert (args.device, args.dtype, args.compile) == (device, dtype, compiles)
    on_cpu = 16 if script in TRANSFORMERS else 128
    assert args.micro_batch == (1024 if cuda else on_cpu)


def test_the_seed_decides_the_first_weights(script):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(script, run, 1, f"--seed {seed} --lr 1e-12")
    a, b, c = [load(run)[0]["model"] for run in "abc"]
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, weight in a.items():
        if weight.numel() > 1 and weight.std() > 0.01:  # no constants, as norms have them
            assert (weight - c[name]).abs().max() > 0.01, name


def test_drawing_is_not_training(script, monkeypatch):
    """By a clock on which a step takes 2 s, and drawing the samples 100."""
    clock = SimpleNamespace(now=0.0)
    timer = SimpleNamespace(perf_counter=lambda: clock.now)
    learning_rate = script.learning_rate

    def step(*args):
        clock.now += 2
        return learning_rate(*args)

    def draw(*args):
        clock.now += 100

    monkeypatch.setattr(script, "time", timer)
    monkeypatch.setattr(script, "learning_rate", step)
    monkeypatch.setattr(script, "draw", draw)
    train(script, "run", 3, "--sample-every 1")
    _, rows = load("run")
    assert [row["images_per_s"] for row in rows] == ["4", "4", "4"]
    assert [row["seconds"] for row in rows] == ["2", "4", "6"]


def test_full_disk(monkeypatch):
    def torn(state, path):
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("no space left")

    train(dit, "run", 2)
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(RuntimeError, match="no space left"):
        run_script(dit, "--run-dir run --resume --max-steps 3")
    assert Path("run/ckpt.pt").read_bytes() == before


def test_a_bug_shows_its_traceback(monkeypatch):
    train(dit, "run", 1)
    monkeypatch.setattr(dit.Block, "forward", mock.Mock(side_effect=ValueError("a bug")))
    for flags in ("--run-dir run --resume --max-steps 2", "--ckpt run/ckpt.pt"):
        with pytest.raises(ValueError, match="a bug"):
            run_script(dit, flags)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_bad_checkpoints_are_refused():
    train(dit, "run", 1)
    state, _ = load("run")
    linear = {**state["config"], "meaning": [0.1, 0.2, 0.3, 0.4]}
    wider = {**state["config"], "dim": 32}
    torch.save({}, "empty.pt")
    torch.save(None, "none.pt")
    torch.save({**state, "evil": Evil()}, "evil.pt")
    torch.save({**state, "config": linear}, "linear.pt")
    torch.save({**state, "config": wider}, "wider.pt")
    whole = bytearray(Path("run/ckpt.pt").read_bytes())
    Path("half.pt").write_bytes(whole[:5000])
    whole[len(whole) // 2] ^= 1  # a bit, within some tensor
    Path("bit.pt").write_bytes(whole)
    whole[len(whole) // 2] ^= 1
    with zipfile.ZipFile("run/ckpt.pt") as archive:
        entry = whole.rindex(b"PK\1\2")  # of the last entry, in the directory at the end
        assert archive.testzip() is None
    whole[entry + 38] ^= 16  # "a folder": PyTorch would not read it
    Path("folder.pt").write_bytes(whole)
    bad = [*Path().glob("*.pt"), "nowhere.pt", ROOT / "checkpoints" / "uvit_cifar10.pt"]
    assert len(bad) == 10
    for path in bad:
        assert f"{path} is not a checkpoint of dit_cifar10.py" in refused(dit, f"--ckpt {path}")
    assert not Path("evil").exists()


def test_a_line_on_standard_error_and_exit_code_1():
    Path("text").write_text("not a folder")
    lines = {
        "--ckpt nowhere.pt": "nowhere.pt is not a checkpoint of dit_cifar10.py",
        "--out text/x.png": "[Errno 17] File exists: 'text'",
        "--run-dir text": "[Errno 17] File exists: '",
    }
    for flags, line in lines.items():
        process = start(f"{dit.__file__} {flags}")
        out, error = process.communicate()
        assert (process.returncode, out) == (1, "")
        assert error.startswith(line)
        assert error.count("\n") == 1


@pytest.fixture
def nothing_changes(monkeypatch):
    """Without a network, and with a run, its checkpoint and odd folders, that stay as they are."""
    train(dit, "run", 1)
    Path("text").write_text("neither a folder nor a picture")
    write_folders("eleven", *[f"train/{k}" for k in range(11)])
    write_folders("broken", "train/a")
    Path("broken/train/a/0.png").write_bytes(b"no picture")
    Path("shipped").mkdir()
    shutil.copy(ROOT / "checkpoints" / "dit_cifar10.pt", "shipped/ckpt.pt")
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("no network")))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    yield
    for path, content in before.items():
        assert path.read_bytes() == content


def test_data_that_cannot_be_read(nothing_changes):
    line = refused(dit, "--data-dir nowhere --run-dir a")
    assert "--data-dir nowhere: no network? put all files of CIFAR10 into" in line
    assert "put images into train/<class>/*.png" in refused(dit, "--data-dir run --run-dir b")
    line = refused(dit, "--data-dir broken --run-dir c")
    assert "replace or delete broken/train/a/0.png" in line
    assert "11 classes" in refused(ddim, "--data-dir eleven --run-dir d")


def test_a_run_is_never_overwritten(nothing_changes):
    assert "run holds a run: add --resume" in refused(dit, "--run-dir run")
    assert "there is no new/ckpt.pt" in refused(dit, "--run-dir new --resume")
    assert "weights alone" in refused(dit, "--run-dir shipped --resume")


def test_flags_that_make_no_sense(nothing_changes, monkeypatch):
    assert refused(dit, "--out x.jpg").startswith("--out x.jpg must end in .png")
    assert "File exists: 'text'" in refused(dit, "--out text/x.png")
    assert refused(dit, "--classes 3 10").startswith("--classes [3, 10]: there are")
    assert "1 at least" in refused(dit, "--sample-only --steps 0")
    assert "1 at least" in refused(dit, "--max-steps -1")
    assert "--lr: invalid float value" in refused(dit, "--lr much")
    assert "--dim 42 must be" in refused(dit, "--run-dir b --dim 42")
    assert "--depth 3 must be even" in refused(uvit, "--run-dir c --depth 3")
    assert "'pink' is not known" in refused(ddim, "--prompt pink")
    assert refused(ddim, "--invert text").startswith("--invert text: ")
    assert "be another file" in refused(
        ddim, "--invert eleven/train/0/0.png --out eleven/train/0/../0/0.png"
    )
    monkeypatch.setattr(dit, "WORLD", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", mock.Mock())
    line = refused(dit, "--run-dir d --batch-size 9")
    assert "--batch-size 9 cannot be shared by 2" in line


# ---- Copies

ALONE = """
import sys
from importlib import import_module
import torch

a = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
for path in sys.argv[1:]:
    script = import_module(path.rpartition("/")[2][:-3])
    net, _ = script.load(path)
    noise = torch.randn(1, script.CHANNELS, script.SIZE, script.SIZE)
    with torch.no_grad():
        for sample in script.SAMPLERS.values():
            assert sample(script.denoiser(net, a), noise, a, steps=2).shape == noise.shape
assert not {"common", "torchvision", "PIL"} & set(sys.modules)
"""


def test_files_copied_alone_work():
    ours = {"torch", "torchvision", "einops", "filelock", "PIL", "common"}
    for script in SCRIPTS:
        shutil.copy(script.__file__, ".")
        code = inspect.getsource(script)
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.M))
        assert imported <= ours | sys.stdlib_module_names
        assert "assert " not in code  # for python -O would leave it out
    Path("alone.py").write_text(ALONE)
    paths = [f"{ROOT}/checkpoints/{script.NAME}.pt" for script in SCRIPTS]
    process = start("alone.py " + shlex.join(paths), PYTHONPATH="")
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_renamed_copy_reads_its_weights(script, monkeypatch):
    """cp dit_cifar10.py mine.py, beside checkpoints/."""
    shipped(script)
    shutil.copy(script.__file__, "mine.py")
    Path("checkpoints").symlink_to(ROOT / "checkpoints")
    flags = f"{CPU} --sample-only -n 1 --out "
    run_script(script, flags + "theirs.png")
    monkeypatch.setattr(sys, "argv", ["mine.py", *flags.split(), "mine.png"])
    runpy.run_path("mine.py", run_name="__main__")
    assert torch.equal(pixels("mine.png"), pixels("theirs.png"))
