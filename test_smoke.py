"""The promises, checked on a CPU: python -m pytest -q test_smoke.py

What scripts have in common is tested once, and the last test holds it to be the same in all."""

import contextlib
import csv
import gc
import inspect
import io
import itertools
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from filelock import FileLock
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
NETWORKS = {ddpm: partial(ddpm.UNet, 16), ddim: partial(ddim.UNet, 16)}
NETWORKS |= {dit: partial(dit.DiT, 16, 2, 2, 8), uvit: partial(uvit.UViT, 16, 2, 2, 8)}
CPU = "--device cpu --dtype float32 --no-compile -n 4 --steps 2 "
TINY = "--batch-size 8 --log-every 2 --sample-every 0 --warmup 2 --dim 16 "
SHAPE = dict.fromkeys(TRANSFORMERS, "--depth 2 --heads 2 --patch 8 ")


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.NAME)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    """Each test starts where eight classes of images are, and leaves no signal handler."""
    monkeypatch.chdir(tmp_path)
    write_folders("data", *[f"{split}/{k}" for split in ("train", "test") for k in "abcdefgh"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def write_folders(root, *names):
    """0.png in each folder, of noise with the folder's number for a seed."""
    for seed, name in enumerate(names):
        Path(root, name).mkdir(parents=True, exist_ok=True)
        noise = random_images(32, 32, 3, seed=seed).numpy()
        Image.fromarray(noise).save(Path(root, name, "0.png"))


def pixels(path):
    """int32 (H, W, 3) of a picture."""
    with Image.open(path) as image:
        values = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.int32)
        return values.view(image.height, image.width, 3)


def network(script, std=0.05):
    """A small network whose weights are all random."""
    torch.manual_seed(0)
    net = NETWORKS[script]()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=std)
    return net


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
    """The one line that the script has to say."""
    code, errors = 0, io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            run_script(script, flags)
        except SystemExit as stop:
            code = stop.code
    text = errors.getvalue()
    assert (code, text.count("\n")) == (2, 1), text
    assert text.startswith(f"{script.NAME}.py: ")
    return text


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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the handlers hold the run, and it the lock
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()


def load(run):
    with open(Path(run, "log.csv")) as file:
        return torch.load(Path(run, "ckpt.pt"), weights_only=True), [*csv.DictReader(file)]


def assert_same(a, b, tolerance=0.0):
    assert (a["step"], a["images"]) == (b["step"], b["images"])
    for part in ("model", "ema", "optimizer", "muon"):
        if part in a:
            one, other = [state[part].get("state", state[part]) for state in (a, b)]
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# ---- Data, schedules and randomness (common.py)


def test_mnist_files():
    raw = Path("new/MNIST/raw")
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">4i", 2051, 20, 28, 28) + random_images(20, 28, 28).numpy().tobytes()
        labels = struct.pack(">2i", 2049, 20) + bytes(range(10)) * 2
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    (images, labels), test_set, _ = common.load_data("MNIST", "new", 28, 1)
    assert torch.equal(images, random_images(20, 28, 28)[:, None])
    assert labels.tolist() == [*range(10), *range(10)]
    assert torch.equal(images, test_set[0])


def test_image_folders(capsys):
    hidden = ["train/.a", "train/__MACOSX/a", "train/a/.b", ".test/b"]
    write_folders("new", *hidden, "train/b ö", "train/a", "train/a/deep", "val/b ö", "val/a")
    Path("new/train/notes.txt").touch()
    (images, labels), test_set, classes = common.load_data("CIFAR10", "new", 32, 3)
    assert capsys.readouterr().out == "new/train: 1 files are no images, such as notes.txt\n"
    assert classes == ["a", "b ö"]
    assert labels.tolist() == [0, 0, 1]
    for image, seed in zip([*images, *test_set[0]], [5, 6, 4, 8, 7], strict=True):
        assert torch.equal(image, random_images(32, 32, 3, seed=seed).permute(2, 0, 1))


LINEAR = common.alpha_bar(common.linear_betas())
COSINE = common.alpha_bar(common.cosine_betas())


def test_schedules():
    exact = [1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000)]
    assert LINEAR[0].item() == pytest.approx(exact[0], rel=1e-7)
    assert LINEAR[-1] == torch.tensor(math.prod(exact))  # the float32 nearest to it
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
    assert COSINE[0].item() == pytest.approx(f[1] / f[0], rel=1e-7)
    assert COSINE[-1].item() == pytest.approx(f[999] / f[0] * 0.001, rel=1e-6)
    for a in (LINEAR, COSINE, common.alpha_bar(common.cosine_betas(4000))):
        assert 0 < a.min() <= a.max() < 1
        assert (a.diff() < 0).all()


def test_a_batch_is_a_function_of_seed_and_step():
    images = random_images(2000, 1, 2, 2)
    draw = partial(common.batch, images, torch.arange(2000), 10, 6000)
    shares = [draw(3, 5, rank=rank, world=4) for rank in range(4)]
    others = [draw(3, 6), draw(4, 5), draw(5, 3)]
    for i, part in enumerate(draw(3, 5)):
        assert torch.equal(part, torch.cat([share[i] for share in shares]))
        for other in others:
            assert not torch.equal(part, other[i])
    x0, y, t, noise, u = draw(3, 5)
    assert torch.equal(x0, images[y] / 127.5 - 1)
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert t.bincount(minlength=10).min() > 500  # 600 on average
    assert (u.T.corrcoef() - torch.eye(12)).abs().max() < 0.06


# ---- Samplers, where the best denoiser is known: for data N(mean, std^2) it is linear in x_t
MEAN, STD = 0.4, 0.5


def gaussian(a):
    a = a.view(-1, 1, 1, 1)

    def denoise(x_t, t):
        gain = a[t].sqrt() * STD**2 / (a[t] * STD**2 + 1 - a[t])
        return MEAN + gain * (x_t - a[t].sqrt() * MEAN)

    return denoise


def moments(sample, steps, **options):
    """The exact mean and variance of what is drawn, for it is affine in its noises, a row each."""
    a, numbers = LINEAR.double(), itertools.count(2)
    x = torch.full((steps + 2, 1, 1, 1), a[-1].sqrt().item() * MEAN, dtype=torch.float64)
    x[1] += (a[-1] * STD**2 + 1 - a[-1]).sqrt()

    def alone(x):
        noise = torch.zeros_like(x)
        noise[next(numbers)] = 1
        return noise

    out = sample(gaussian(a), x, a, steps, randn=alone, **options).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


WAYS = [(dit.ddim_sample, {}), (dit.ddim_sample, {"eta": 1}), (dit.ddpm_sample, {})]


@pytest.mark.parametrize("sample, options", WAYS)
def test_samplers_are_first_order(sample, options):
    """The error halves when the steps double, and mean and variance of the data come out."""
    errors = []
    for steps in (50, 100, 200, 400):
        mean, variance = moments(sample, steps, **options)
        assert mean == pytest.approx(MEAN, abs=2 / steps)
        errors.append(abs(variance - STD**2))
    for before, after in itertools.pairwise(errors):
        assert 0.4 < after / before < 0.62
    assert moments(sample, 1000, **options) == pytest.approx((MEAN, STD**2), abs=5e-3)


def posterior(x0, x_t, a_t, a_s):
    """Mean and variance of q(x_s | x_t, x0), by Bayes' rule: q(x_t | x_s) q(x_s | x0)."""
    alpha = a_t / a_s
    precision = alpha / (1 - alpha) + 1 / (1 - a_s)
    mean = alpha.sqrt() / (1 - alpha) * x_t + a_s.sqrt() / (1 - a_s) * x0
    return mean / precision, 1 / precision


@pytest.mark.parametrize("steps", [100, 30])
@pytest.mark.parametrize("sample, options", WAYS[1:])
def test_each_step_is_a_draw_from_the_posterior(sample, options, steps):
    """Of DDPM, and of DDIM where eta is 1; but the last gives the estimate of the image."""
    a = common.alpha_bar(common.linear_betas(100, 1e-3, 0.1)).double()
    noise = torch.randn(steps, 4, 1, 2, 2, dtype=torch.float64)
    draws, seen = iter(noise[1:]), []

    def denoise(x_t, t):
        seen.append((t[0].item(), x_t, gaussian(a)(x_t, t)))
        return seen[-1][-1]

    image = sample(denoise, noise[0], a, steps, randn=lambda x: next(draws), **options)
    assert [t for t, _, _ in seen] == [round(100 * i / steps) - 1 for i in range(steps, 0, -1)]
    assert next(draws, None) is None
    for k, ((t, x_t, x0), (s, x_s, _)) in enumerate(itertools.pairwise(seen), start=1):
        mean, variance = posterior(x0, x_t, a[t], a[s])
        torch.testing.assert_close(x_s, mean + variance.sqrt() * noise[k])
    torch.testing.assert_close(image, seen[-1][-1])


def test_dpm_solver_is_second_order():
    """A quarter of the error as the steps double, though one is three times as long as the next."""
    errors, z = [], torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    for steps in (10, 20, 40):
        long_and_short = torch.tensor([0, *[1.5, 0.5] * steps], dtype=torch.float64)
        a = (8 - 8 * long_and_short.cumsum(0) / steps).sigmoid()  # lambda from 4 to -4
        x, image = [b.sqrt() * MEAN + (b * STD**2 + 1 - b).sqrt() * z for b in (a[-1], a[0])]
        best = gaussian(a)(image, torch.zeros(5, dtype=torch.int64))
        errors.append((dit.dpm_solver_sample(gaussian(a), x, a, 1000) - best).abs().max())
    assert errors[0] < 0.01
    for before, after in itertools.pairwise(errors):
        assert 3.3 < before / after < 4.7
    a = torch.tensor([4.0, 1.0, -5.0]).sigmoid()  # a step of 3 in lambda from x0 = 0, one of 1.5
    image = dit.dpm_solver_sample(lambda x, t: [x, x + 1, x][t], torch.zeros(1, 1, 1, 1), a, 99)
    assert image.item() == pytest.approx(1.25 * math.sqrt(a[0]) * (1 - math.exp(-1.5)))


@pytest.mark.parametrize("steps, first", [(7, 1.0), (15, COSINE[0].item())])
def test_dpm_solver_takes_as_many_steps_as_asked(steps, first):
    a = torch.cat([torch.tensor([first]), COSINE[1:]])
    denoise = mock.Mock(side_effect=lambda x_t, t: x_t)
    assert dit.dpm_solver_sample(denoise, torch.randn(1, 1, 2, 2), a, steps).isfinite().all()
    times = [call.args[1].item() for call in denoise.call_args_list]
    assert len(times) == steps
    assert times == sorted(set(times), reverse=True)


def test_inversion_returns():
    """Image -> noise -> image, better in proportion to the steps."""
    errors, x0 = [], torch.linspace(-1, 1, 5).view(5, 1, 1, 1)
    for steps in (25, 50, 100):
        noise = ddim.ddim_invert(gaussian(COSINE), x0, COSINE, steps)
        again = ddim.ddim_sample(gaussian(COSINE), noise, COSINE, steps)
        errors.append((again - x0).abs().max())
        assert (noise - (x0 - MEAN) / STD).abs().max() < 5 / steps  # the ODE keeps the quantiles
    assert errors[0] < 0.2
    assert errors[2] < 0.55 * errors[1] < 0.55**2 * errors[0]


def test_what_the_loss_asks_for_is_what_the_denoiser_takes(script):
    """The noise in ddpm, v elsewhere; x0 is clipped, and x_t is not."""
    a, t = script.schedule(), torch.tensor([0, 20, 500, 900])
    assert a.equal(COSINE)
    alpha, sigma = [share.sqrt().view(4, 1, 1, 1) for share in (a[t], 1 - a[t])]
    x0 = random_images(4, 1, 2, 2) / 127.5 - 1
    noise = torch.randn_like(x0)
    x_t = alpha * x0 + sigma * noise
    answer = noise if script is ddpm else alpha * noise - sigma * x0
    perfect = mock.Mock(return_value=answer)
    assert script.loss(perfect, x0, None, t, noise, a) == 0
    torch.testing.assert_close(perfect.call_args.args[0], x_t)
    wrong = mock.Mock(return_value=answer + 1)
    weight = 9.34 if script is ddpm else 1  # the mean of 1.00, 1.00, 2.03 and 33.33
    assert script.loss(wrong, x0, None, t, noise, a) == pytest.approx(weight, 1e-3)
    denoise = script.denoiser(perfect, a)
    torch.testing.assert_close(denoise(x_t, t), x0, atol=1e-4, rtol=0)
    assert denoise(x_t + 9, t).max() == 1


@pytest.mark.parametrize("script", [ddim, dit])
def test_guidance_acts_in_its_interval(script):
    """v = v_null + guidance (v - v_null), of one batch, where here v is y / 100."""
    model = mock.Mock(num_classes=9, side_effect=lambda x, t, y: y.view(-1, 1, 1, 1) / 100)
    y, options, null = torch.tensor([[1]]), {}, 0
    if script is dit:
        y, options, null = y[0], {"interval": (0.8, 0.2)}, 9
    for guidance, t, inside in [(3, 801, 0), (3, 800, 1), (0, 200, 1), (3, 199, 0), (1, 500, 0)]:
        guided = guidance != 1 if script is ddim else inside
        denoise = script.denoiser(model, COSINE, y, guidance, **options)
        v = -denoise(torch.zeros(1, 1, 1, 1), torch.tensor([t])) / (1 - COSINE[t]).sqrt()
        expected = null + guidance * (1 - null) if guided else 1
        assert v.item() == pytest.approx(expected / 100)
        assert len(model.call_args.args[0]) == (2 if guided else 1)


# ---- Networks


def test_network(script):
    net, t = network(script, std=0.15), torch.tensor([0, 3, 500, 999])
    x = torch.randn(4, script.CHANNELS, script.SIZE, script.SIZE)
    out = net(x, t)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    torch.testing.assert_close(net(x[1:3], t[1:3]), out[1:3], atol=1e-5, rtol=1e-5)  # no leak
    assert (net(x, t.flip(0)) - out).abs().max() > 1e-4
    out.square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad.abs().max() > 0, name
    with pytest.raises(ValueError, match="images are "):
        net(x[..., 1:], t)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_the_network_minds_y_and_nothing_in_particular_is_the_default(script):
    net, x = network(script, std=0.15), torch.randn(1, script.CHANNELS, script.SIZE, script.SIZE)
    kinds = [*range(11)]
    if script is ddim:
        kinds = [ddim.tokenize(prompt) for prompt in ("7", "8", "thick 7", "7 thick", "")]
    outs = [net(x, torch.tensor([500]), torch.tensor([kind])) for kind in kinds]
    torch.testing.assert_close(net(x, torch.tensor([500])), outs[-1])
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().max() > 1e-4


def test_zero_start_and_parameter_counts_of_the_papers():
    for script in (ddpm, ddim, dit):
        x = torch.randn(2, script.CHANNELS, script.SIZE, script.SIZE)
        assert NETWORKS[script]()(x, torch.tensor([3, 500])).equal(x * (script is ddpm))
    x, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert torch.equal(dit.DiT(16, 2, 2, 8).blocks[1](x, c), x)  # adaLN-Zero: all gates are shut
    for net, count in ((dit.DiT(384, 12, 6, 2), 32.48e6), (uvit.UViT(512, 12, 8, 2), 44.26e6)):
        assert sum(map(torch.numel, net.parameters())) == pytest.approx(count, abs=2e4)


def test_attention_by_hand():
    """Over the words of a prompt: their values, in proportion to the weights, in two heads."""
    layer, x, text = ddim.CrossAttention(64, 8), torch.randn(1, 64, 7, 7), torch.randn(1, 5, 8)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    q = layer.q(layer.norm(x).flatten(2).mT)
    k, v = layer.kv(text).chunk(2, dim=-1)
    heads = []
    for head in (slice(0, 32), slice(32, 64)):
        weights = (q[..., head] @ k[..., head].mT / math.sqrt(32)).softmax(dim=-1)
        heads.append(weights @ v[..., head])
    expected = x + layer.out(torch.cat(heads, dim=-1)).mT.view_as(x)
    torch.testing.assert_close(layer(x, text), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
def test_muon_is_that_of_pytorch():
    ours = [*torch.zeros(2, 24, 2, 2, 2), torch.zeros(8, 36)]
    theirs = [w.flatten(1).clone() for w in ours]
    one = dit.Muon(ours, {"lr": 0.01})
    other = torch.optim.Muon(theirs, 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    pairs = list(zip(ours, theirs, strict=True))
    for _ in range(4):
        for w, same in pairs:  # after 0, 1, 2 and 3 steps; PyTorch's are in bfloat16
            assert w.flatten(1).dist(same) <= 0.02 * same.norm()
            w.grad = torch.randn_like(w)
            same.grad = w.grad.flatten(1)
        one.step()
        other.step()


def stroke(width, lean):
    """A bar of `width` pixels that leans right by `lean` of its height (1, 1, 28, 28)."""
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    middle = 13.5 + lean * (13.5 - row)
    ink = (width / 2 + 0.5 - (column - middle).abs()).clamp(0, 1) * ((row >= 4) & (row < 24))
    return (2 * ink - 1)[None, None]


STROKES = [(4, -0.3, "a thick green {} leaning left on black")]
STROKES += [(1.5, 0.3, "a thin green {} leaning right on black"), (2.4, 0, "a green {} on black")]


@pytest.mark.parametrize("width, lean, caption", STROKES)
def test_captions_are_read_off_the_image(width, lean, caption):
    for k, name in enumerate(ddim.DIGITS):
        for u, words in ((0.49, caption.format(name)), (0.6, str(k)), (0.0999, "")):
            y = torch.tensor([k])
            u = torch.full((1, 12), u)
            if k == 4:  # a green 4 is held out, and white comes in its place
                words = words.replace("green", "white").replace("black", "yellow")
            _, tokens = ddim.illustrate(stroke(width, lean), y, u)
            assert tokens[0].tolist() == ddim.tokenize(words)


def test_tokenize():
    words = [ddim.WORDS[token] for token in ddim.tokenize("An  8 on BLUE")]
    assert words == ["a", "8", "on", "blue", "", "", "", ""]
    for prompt, named in (("a pink 7", "'pink' is not known"), ("a " * 8 + "7", "'7' is one too")):
        with pytest.raises(ValueError, match=named):
            ddim.tokenize(prompt)


def test_interpolation_is_slerp():
    args = parse(ddim, "--seed 3 -n 10")
    x = ddim.interpolated_noise(args, 2, range(10), "cpu").flatten(1)  # image i is in row i % 2
    ends = next(common.noises(3, range(4), (3, 28, 28))).flatten(1)
    torch.testing.assert_close(x[[0, 8, 1, 9]], ends)
    angles = torch.cosine_similarity(x[2:], x[:-2]).acos()
    assert (angles[::2] - angles[0]).abs().max() < 0.01
    assert x.norm(dim=1).min() > 0.9 * ends.norm(dim=1).min()


# ---- Training


def test_learning_rate():
    args = parse(dit, "--warmup 100 --max-steps 100000 --lr 1")
    rates = [dit.learning_rate(step, args) for step in (50, 100, 400, 80000, 90001, 100000)]
    assert rates == pytest.approx([0.5, 1, 0.5, 0.03536, 0.01667, 0], abs=1e-5)


def test_what_a_step_is_trained_on_and_what_is_validated(script, monkeypatch):
    loss = mock.Mock(side_effect=script.loss)
    clip = mock.Mock(side_effect=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(script, "loss", loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train(script, "run", 1, "--batch-size 64 --seed 5 --lr 0.1")
    assert clip.call_args.args[1] == 1
    trained, validated = [call.args for call in loss.call_args_list]
    sets = common.load_data(script.DATA, "data", script.SIZE, script.CHANNELS)
    step = common.batch(*sets[0], 1000, 64, 5, 1)
    held_out = common.batch(*sets[1], 1000, 256, 0, 0)
    for args, (x0, y, t, noise, u) in ((trained, step), (validated, held_out)):
        if script is ddim:
            x0, y = ddim.illustrate(x0, y, u)
        elif script in TRANSFORMERS and args is trained:
            y = torch.where(u[:, 0] < 0.1, 8, y)  # a tenth has the null class
            x0 = torch.where(u[:, 1, None, None, None] < 0.5, x0.flip(-1), x0)  # half are mirrored
        elif args is trained:
            t = t.maximum((1000 * u[:, 0]).long())
        for given, expected in zip(args[1:], (x0, y, t, noise, script.schedule()), strict=True):
            assert torch.equal(given, expected)
    state, (row,) = load("run")
    last = list(state["ema"])[-1]
    assert torch.equal(validated[0].state_dict()[last], state["ema"][last])
    assert not torch.equal(state["model"][last], state["ema"][last])
    assert float(row["val_loss"]) == pytest.approx(script.loss(*validated).item(), abs=1e-4)
    assert state["optimizer"]["param_groups"][0]["lr"] == float(row["lr"]) == 0.05


def test_a_signal_finishes_the_step_and_resume_goes_on_bit_for_bit(script, capsys):
    """With the flags of the run. Where training ends, its averaged weights are drawn."""
    train(script, "whole", 4, "--lr 0.05 --seed 3")
    with interrupted(script, 3, signal.SIGINT if script is ddim else signal.SIGTERM):
        train(script, "parts", 4, "--lr 0.05 --seed 3")
    assert "stopped after step 3; --resume continues" in capsys.readouterr().out
    state, _ = load("parts")
    state["config"] |= {"out": "x.jpg", "sample_only": True, "device": "tpu"}
    torch.save({**state, "seconds": 1000.0}, "parts/ckpt.pt")
    run_script(script, "--run-dir parts --resume")
    assert_same(load("whole")[0], load("parts")[0])
    assert float(load("parts")[1][-1]["seconds"]) >= 1000
    run_script(script, "--sample-only --run-dir parts --seed 3")
    assert torch.equal(pixels("samples.png"), pixels("whole/samples-0000004.png"))


def test_ema_is_its_closed_form_and_images_are_counted(monkeypatch):
    """Half-lives of 0.05 * images seen, up to --ema, so here 0.2, 0.4, .. 3, 3, .. images."""
    average, save = torch.zeros(192), torch.save  # as biases start

    def follow(state, path):
        weight = 0.5 ** (4 / min(3, 0.2 * state["step"]))
        average.copy_(torch.lerp(state["model"]["head.bias"], average, weight))
        save(state, path)

    monkeypatch.setattr(torch, "save", follow)
    train(dit, "run", 20, "--batch-size 4 --save-every 1 --ema 3")
    torch.testing.assert_close(load("run")[0]["ema"]["head.bias"], average)
    run_script(dit, "--run-dir run --resume --batch-size 16 --max-steps 25")
    seen = {row["step"]: row["images"] for row in load("run")[1]}
    assert [seen["20"], seen["25"]] == ["80", "160"]


def test_weights_that_are_not_finite_are_not_saved(monkeypatch):
    train(dit, "run", 2)
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(dit, "learning_rate", lambda step, args: math.inf)
    flags = "--run-dir run --resume --max-steps 9 --save-every 1 --log-every 100"
    assert "not finite at step 3: " in refused(dit, flags)
    assert Path("run/ckpt.pt").read_bytes() == before


# ---- Drawing


def test_image_i_is_a_function_of_seed_and_i(script, monkeypatch):
    """Whatever n and the internal batch are; before rounding to 8 bits."""
    kinds = {ddpm: [], ddim: [[[7] * 5, [8] * 5]]}.get(script, [[3, 7]])
    draw = partial(script.draw, network(script))
    for sampler in list(script.SAMPLERS):
        args = parse(script, f"--seed 3 --steps 9 --sampler {sampler}")
        spy = mock.Mock(side_effect=script.SAMPLERS[sampler])
        monkeypatch.setitem(script.SAMPLERS, sampler, spy)
        whole = draw(args, *kinds, range(5), looks=3)
        assert torch.equal(spy.call_args.args[2], script.schedule())
        parts = [draw(args, *kinds, index) for index in ([0], range(1, 5))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[-1:], atol=1e-5, rtol=0)
        args.seed = 4
        for other in (whole[2, 1:2], whole[0, :1], draw(args, *kinds, [0])[0]):
            assert (other - whole[2, :1]).abs().max() > 0.1


def test_processes_share_a_folder(monkeypatch):
    net, args = network(dit), parse(dit, "--batch-size 2")
    monkeypatch.setattr(dit, "WORLD", 3)
    for rank in (2, 1, 0):
        monkeypatch.setattr(dit, "RANK", rank)
        dit.write(net, args, [3, 7], "three/", 10)
        dit.write(net, args, [3, 7], f"{rank}.png", 10)
        assert len(list(Path("three").iterdir())) == [10, 6, 3][rank]
    assert [path.name for path in Path().glob("?.png")] == ["0.png"]  # one of them draws the grid
    grid = pixels("0.png").view(2, 34, 5, 34, 3)[:, 1:33, :, 1:33]
    for i in range(10):
        image = pixels(f"three/{i:06d}-{[3, 7][i % 2]}.png")
        assert (grid[i % 2, :, i // 2] - image).abs().max() <= 1
    levels = torch.arange(256).view(1, 1, 16, 16)
    for shift in (-0.4, 0, 0.4):  # the nearest grey level
        dit.picture((levels + shift) / 127.5 - 1).save("x.png")
        assert torch.equal(pixels("x.png")[:, :, 0], levels[0, 0].int())


def test_pictures_from_the_command_line(script):
    train(script, "run", 1)
    draw, side = "--ckpt run/ckpt.pt -n 5 --out ", script.SIZE + 2
    run_script(script, draw + "way.gif --steps 3")
    with Image.open("way.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, (3 * side, 2 * side))
    run_script(script, draw + "x.png --sampler ddpm")
    run_script(script, draw + "y.png --sampler ddim --eta 1")
    run_script(script, draw + "z.png --sampler ddim")
    assert (pixels("x.png") - pixels("y.png")).abs().max() <= 1
    assert (pixels("x.png") - pixels("z.png")).abs().max() > 1
    if script is not ddpm:  # a row for each class
        run_script(script, draw + "x.png --classes 7 1")
        run_script(script, draw + "new/ --classes 7")
        assert pixels("x.png").shape == (2 * side, 3 * side, 3)
        assert torch.equal(pixels("x.png")[1 : side - 1, 1 : side - 1], pixels("new/000000-7.png"))


def test_prompts_and_interpolation_from_the_command_line():
    train(ddim, "run", 1)
    draw = "--sample-only --run-dir run --out "
    run_script(ddim, draw + "x/ --classes 7 --prompt 'a thin 3'")
    assert Path("x/000003-a-thin-3.png").exists()
    run_script(ddim, draw + "row.png --prompt '' --interpolate")
    run_script(ddim, draw + "ends.png --prompt '' -n 2")
    ends = torch.cat([pixels("row.png")[:, :30], pixels("row.png")[:, 90:]], dim=1)
    assert (ends - pixels("ends.png").view(30, 60, 3)).abs().max() <= 1


def test_inversion_from_the_command_line(monkeypatch):
    spy = mock.Mock(side_effect=ddim.denoiser)
    monkeypatch.setattr(ddim, "denoiser", spy)
    run_script(ddim, "--sample-only --classes 7 -n 1 --steps 20 --out x/")
    run_script(ddim, "--invert x/000000-7.png --prompt 7 8 --steps 50 --out back.png")
    _, _, eight, guidance = spy.call_args.args
    assert eight[0].tolist() == ddim.tokenize("8")
    assert guidance == 3  # for the picture under another prompt
    shown = pixels("back.png")[1:29].view(28, 4, 30, 3)[:, :, 1:29]
    assert torch.equal(shown[:, 0], pixels("x/000000-7.png"))
    assert (shown[:, 2] - shown[:, 0].float()).square().mean().sqrt() < 25  # PSNR of 20 dB


def test_shipped_checkpoint_draws(script):
    """What a fresh clone does first: white on black, ink on blue, or pictures, ships bluer."""
    kinds = {ddpm: "", ddim: "--prompt '7 on blue'"}.get(script, "--classes 0 8 4 6")
    run_script(script, "--sample-only -n 16 --steps 10 " + kinds)
    picture = pixels("samples.png").float()
    if script in TRANSFORMERS:
        planes_and_ships, deer_and_frogs = picture.view(2, 68, 136, 3).mean(dim=(1, 2))
        red, _, blue = planes_and_ships - deer_and_frogs
        assert blue - red > 5
    elif script is ddpm:
        assert 0.6 < (picture < 32).float().mean() < 0.95
        assert 0.03 < (picture > 224).float().mean() < 0.3
    else:
        assert picture[2, 2].tolist() == pytest.approx([47, 98, 201], abs=25)  # the paper


# ---- Rough treatment


def start(arguments, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *shlex.split(arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
    return subprocess.Popen(command, env=environment, **pipes)


def test_killed_and_resumed_bit_for_bit():
    flags = CPU + TINY + SHAPE[dit] + "--run-dir killed --save-every 1 --resume"
    steps = 0
    for _ in range(2):
        process, enough = start(f"{dit.__file__} {flags}"), steps + 3
        while steps < enough:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02 + random.random() / 10)
            steps = load("killed")[0]["step"] if Path("killed/log.csv").exists() else 0
        process.kill()
        process.communicate()
        Path("killed/ckpt.pt.tmp").write_bytes(b"torn")  # had it been killed here
    state, _ = load("killed")
    with interrupted(dit, state["step"]):
        train(dit, "whole", 80000)
    assert_same(state, load("whole")[0])
    logged = [int(row.split(",")[0]) for row in state["log"][1:]]
    assert logged == list(range(1, state["step"] + 1))  # none missing, none twice


def test_two_processes_are_one():
    train(dit, "one", 4)
    with interrupted(dit, 2):
        train(dit, "two", 4)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    process = start(f"{torchrun} {dit.__file__} {CPU} --run-dir two --resume")
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (one, log_of_one), (two, log_of_two) = load("one"), load("two")
    assert_same(one, two, tolerance=1e-5)
    assert float(log_of_one[-1]["loss"]) == pytest.approx(float(log_of_two[-1]["loss"]), abs=2e-5)


def test_full_disk(monkeypatch):
    def torn(state, path):
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("no space left")

    train(dit, "run", 2)
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", torn)
    text = refused(dit, "--run-dir run --resume --max-steps 3")
    assert "cannot write run/ckpt.pt: no space left" in text
    assert Path("run/ckpt.pt").read_bytes() == before


def test_whose_fault_it_is(monkeypatch):
    """A bug shows its traceback, Ctrl-C nothing at all, and a second run gets its line."""
    train(dit, "run", 1)
    with FileLock("run/lock0"):
        assert "another run is in it" in refused(dit, "--run-dir run --resume")
    monkeypatch.setattr(dit.Block, "forward", mock.Mock(side_effect=ValueError("a bug")))
    for flags in ("--run-dir run --resume --max-steps 2", "--ckpt run/ckpt.pt"):
        with pytest.raises(ValueError, match="a bug"):
            run_script(dit, flags)
    monkeypatch.setattr(common, "load_data", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        train(dit, "new", 1)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_bad_checkpoints_are_refused():
    train(dit, "run", 1)
    (state, _), whole = load("run"), bytearray(Path("run/ckpt.pt").read_bytes())
    linear = {**state["config"], "meaning": {**dit.MEANING, "schedule": "linear"}}
    contents = [{}, None, {**state, "evil": Evil()}, {**state, "config": linear}]
    contents += [{**state, "config": {**state["config"], "dim": 32}}]
    for i, content in enumerate(contents):
        torch.save(content, f"{i}.pt")
    state["ema"]["head.bias"][0] = math.nan
    torch.save(state, "5.pt")
    Path("6.pt").write_bytes(whole[:5000])
    whole[len(whole) // 2] ^= 1  # a bit, within some tensor
    Path("7.pt").write_bytes(whole)
    paths = [f"{i}.pt" for i in range(9)] + [f"{ROOT}/checkpoints/uvit_cifar10.pt"]
    lines = [refused(dit, f"--ckpt {path}") for path in paths]
    assert start(f"-O {dit.__file__} --ckpt 7.pt").communicate() == ("", lines[7])
    assert not Path("evil").exists()


BAD = """
dit  --data-dir nowhere --run-dir a           | nowhere: no network? put the files of CIFAR10 into
dit  --data-dir run --run-dir b               | put images into train/<class>/*.png
dit  --data-dir broken --run-dir c            | replace or delete broken/train/a/0.png
dit  --run-dir run                            | add --resume
dit  --run-dir run --resume --data-dir names  | names was
dit  --run-dir run --resume --heads 4         | heads was 2
dit  --run-dir run --resume --batch-size 9    | --batch-size 9 cannot be shared by 2
dit  --run-dir shipped --resume               | weights alone
dit  --sample-only --eta 0.5                  | --eta is for --sampler ddim
dit  --sample-only --guidance nan             | --guidance: nan
dit  --sample-only --out x.jpg                | --out x.jpg
dit  --sample-only --out text/x.png           | text is no folder
dit  --sample-only --classes 3 10             | --classes [3, 10]
dit  --lr nan                                 | --lr: nan
dit  --max-steps -1                           | --max-steps: -1
dit  --dim 42                                 | --dim 42
ddim --sample-only --prompt pink              | 'pink'
ddim --sample-only --prompt 7 --classes 12    | '12'
ddim --invert text                            | --invert text
ddim --data-dir names --run-dir d             | 11 classes
"""


def test_bad_input_gets_one_line_and_changes_nothing(monkeypatch):
    train(dit, "run", 1)
    Path("text").write_text("neither a folder nor a picture")
    write_folders("names", *[f"train/{k}" for k in range(11)])
    write_folders("broken", "train/a")
    Path("broken/train/a/0.png").write_bytes(b"no picture")
    Path("shipped").mkdir()
    shutil.copy(ROOT / "checkpoints" / "dit_cifar10.pt", "shipped/ckpt.pt")
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("no network")))
    paths = [path for path in Path().rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in paths]
    for row in BAD.strip().splitlines():
        name, flags = row.split(" | ")[0].split(maxsplit=1)
        monkeypatch.setattr(dit, "WORLD", 2 if "batch" in flags else 1)
        line = refused({"dit": dit, "ddim": ddim}[name], flags)
        assert row.split(" | ")[1] in line
        assert [path.read_bytes() for path in paths] == before


ALONE = """
import sys, torch
from importlib import import_module
a = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
for name in sys.argv[1:]:
    script = import_module(name)
    net = (getattr(script, "UNet", None) or getattr(script, "DiT", None) or script.UViT)(64)
    noise = torch.randn(1, script.CHANNELS, script.SIZE, script.SIZE)
    for sample in script.SAMPLERS.values():
        assert sample(script.denoiser(net, a), noise, a, steps=2).shape == noise.shape
assert not {"common", "torchvision", "PIL"} & set(sys.modules)
"""


def test_files_copied_alone_work():
    for script in SCRIPTS:
        shutil.copy(script.__file__, ".")
        code = inspect.getsource(script)
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.M))
        ours = {"torch", "torchvision", "einops", "filelock", "PIL", "common"}
        assert imported <= ours | sys.stdlib_module_names
        assert "assert " not in code  # for python -O would leave it out
    Path("alone.py").write_text(ALONE)
    names = " ".join(script.NAME for script in SCRIPTS)
    process = start(f"alone.py {names}", PYTHONPATH="")
    assert process.communicate() == ("", "")
    assert process.returncode == 0


def test_a_console_that_lacks_letters():
    command = f"{dit.__file__} {CPU} --sample-only --out größe/犬.png"
    out, err = start(command, PYTHONIOENCODING="cp1252").communicate()
    assert "\\u72ac.png" in out, err
    assert Path("größe/犬.png").exists()


OWN = {  # what is each script's own, and may differ
    (dit, uvit): "Attention Block check make_parser",
    (ddpm, ddim): "Block UNet schedule loss denoiser make_parser",
    (dit, ddim): "Block loss denoiser make_parser",
    (dit, ddpm): "Block schedule loss denoiser make_parser",
}
ALIKE = "load draw write train check main"  # the same, but for lines with one of these in them:
WORDS = """Net( DiT( optimizer Muon batch( illustrate( mirrored names) ["names"] digits classes
tokens prompt write( draw( next( denoiser( rows round( shape invert interpolate SAMPLERS[ loss(net
args.d args.ckpt .png else: group[ schedule( maximum( decided"""


def source(script, name, alike):
    text = inspect.getsource(vars(script)[name]).replace("UViT", "DiT")
    words = WORDS.split() if alike else []
    return [line for line in text.splitlines() if not any(word in line for word in words)]


@pytest.mark.parametrize("one, other", OWN)
def test_what_is_the_same_in_two_scripts_is_the_same_to_the_letter(one, other):
    both = vars(one).keys() & vars(other).keys()
    for name in sorted(both - set(OWN[one, other].split())):
        if getattr(vars(one)[name], "__module__", "") == one.__name__:
            alike = name in ALIKE.split() and other is not uvit
            assert source(other, name, alike) == source(one, name, alike), (
                f"make {name}() in {other.NAME}.py and in {one.NAME}.py the same again"
            )
