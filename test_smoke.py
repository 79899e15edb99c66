"""Every promise of the README that a CPU can check, on tiny data made here: python -m pytest -q test_smoke.py"""

import argparse, csv, hashlib, inspect, itertools, math, os, pickle, random, re, shutil, signal, struct
import subprocess, sys, time
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import common
import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm
import dit_cifar10 as dit
import uvit_cifar10 as uvit

ROOT = Path(__file__).parent
NETWORKS = {ddpm: "UNet(dim=16)", ddim: "UNet(dim=16)", dit: "DiT(16, 2, 2, 8)", uvit: "UViT(16, 2, 2, 8)"}
SHAPES = {ddpm: ["--dim", 16], ddim: ["--dim", 16], dit: "--dim 16 --depth 2 --heads 2 --patch 8".split()}
SHAPES[uvit] = SHAPES[dit]
ANY = {ddpm: [], ddim: ["--prompt", ""], dit: ["--classes", 0], uvit: ["--classes", 0]}  # to draw one kind of image
TINY = "--batch-size 8 --log-every 2 --sample-every 0 --warmup 2 --steps 2 -n 4 --dtype float32".split()

def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.int).view(image.height, image.width, 3)

def random_images(n, *shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

# ---- Tiny data in the real formats
@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    """64 + 32 images as IDX files (magic number, sizes, bytes), as torchvision leaves them once unpacked."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 64), ("t10k", 32)):
        images = random_images(n, 28, 28, seed=n)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.numpy().tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n)))
    return root

def image_folder(root, counts, size=28, mode="L"):
    for name, n in counts.items():  # {"train/cat": 3, ..}
        (root / name).mkdir(parents=True)
        for i in range(n):
            noise = random_images(1, size, size, 3, seed=i)[0].numpy()
            Image.fromarray(noise).convert(mode).save(root / name / f"{i}.png")
    return root

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    counts = {f"{split}/{k}": 8 if split == "train" else 4 for split in ("train", "test") for k in "abcdefgh"}
    return image_folder(tmp_path_factory.mktemp("pictures"), counts, size=32, mode="RGB")

def test_mnist_files(mnist):
    (images, labels), (test_images, _), classes = common.load_data("MNIST", mnist, 28)
    assert images.dtype == torch.uint8 and images.shape == (64, 1, 28, 28) and test_images.shape == (32, 1, 28, 28)
    assert torch.equal(images[:, 0], random_images(64, 28, 28, seed=64))
    assert labels.dtype == torch.int64 and labels.tolist() == [i % 10 for i in range(64)] and len(classes) == 10

def test_cifar10_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    batches = [random_images(4, 3072, seed=i) for i in range(6)]
    files = [write(f"batch_{i}", {"data": b.numpy(), "labels": [i, 0, 9, 5]}) for i, b in enumerate(batches)]
    name, md5 = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    (images, labels), (test_images, _), classes = common.load_data("CIFAR10", tmp_path, 32)
    assert images.shape == (20, 3, 32, 32) and labels[:8].tolist() == [0, 0, 9, 5, 1, 0, 9, 5]
    assert torch.equal(images[4], batches[1][0].view(3, 32, 32)) and classes[3] == "class 3"
    assert torch.equal(test_images[3], batches[5][3].view(3, 32, 32))

def test_image_folder(tmp_path):
    image_folder(tmp_path, {"train/b c": 2, "train/a": 3, "test/a": 1, "test/b c": 1}, size=32, mode="RGB")
    (images, labels), (test_images, _), classes = common.load_data("CIFAR10", tmp_path, 32)
    assert classes == ["a", "b c"] and labels.tolist() == [0, 0, 0, 1, 1] and len(test_images) == 2
    assert torch.equal(images[1], random_images(1, 32, 32, 3, seed=1)[0].permute(2, 0, 1))
    shutil.rmtree(tmp_path / "test")
    (images, _), test_set, _ = common.load_data("MNIST", tmp_path, 28)  # resized, and grey
    assert images.shape == (5, 1, 28, 28) and test_set is None

def test_any_kind_of_image(tmp_path):
    """Each in its own size, kind and format, in a class whose name has spaces and letters from elsewhere."""
    folder, colour = tmp_path / "train" / "große Hunde 犬", Image.new("RGB", (50, 40), (200, 100, 50))
    folder.mkdir(parents=True)
    colour.resize((9, 70)).save(folder / "0.png")
    Image.fromarray((256 * torch.full((31, 33), 124)).numpy().astype("uint16")).save(folder / "1.png")  # 16 bits
    for i, (mode, ending) in enumerate([("L", "png"), ("RGBA", "png"), ("P", "png"), ("LA", "png"), ("CMYK", "jpg")]):
        colour.convert(mode).save(folder / f"{2 + i}.{ending}")
    (images, labels), _, classes = common.load_data("CIFAR10", tmp_path, 32)
    assert classes == [folder.name] and labels.tolist() == [0] * 7
    means = images.float().mean(dim=(2, 3))
    expected = torch.tensor([[200, 100, 50], [124, 124, 124]])[[0, 1, 1, 0, 0, 1, 0]]
    assert (means - expected).abs().max() < 2 and images[:, :, 5:-5, 5:-5].float().std(dim=(2, 3)).max() < 12
    [path.unlink() for path in folder.iterdir() if path.name != "0.png"]
    assert len(common.load_data("MNIST", tmp_path, 28)[0][0]) == 1
    (tmp_path / "train" / "nothing").mkdir()
    with pytest.raises(OSError, match="nothing"):
        common.load_data("MNIST", tmp_path, 28)
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "nothing").rmdir()
    with pytest.raises(ValueError, match="0.png is not an image"):
        common.load_data("MNIST", tmp_path, 28)

# ---- Schedules and Gaussians
def test_schedules():
    linear, cosine = common.linear_betas(), common.cosine_betas()
    assert linear.dtype == torch.float64 and linear[[0, -1]].tolist() == [1e-4, 0.02]
    a = common.alpha_bar(linear)
    exact = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000))
    assert a.dtype == torch.float32 and a[-1].item() == pytest.approx(exact, rel=1e-6)
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert common.alpha_bar(cosine)[499].item() == pytest.approx(f(500) / f(0), rel=1e-6) and cosine.max() == 0.999
    for T in (1, 10, 4000):
        for betas in (common.linear_betas(T), common.cosine_betas(T)):
            a = common.alpha_bar(betas)
            assert len(a) == T and 0 < a.min() and a.max() < 1 and (a.diff() < 0).all()

@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "trailing"])
def test_timestep_pairs(spacing):
    for T, steps in ((1000, 1000), (1000, 999), (1000, 50), (1000, 7), (1000, 1), (10, 3), (1, 1)):
        pairs = common.timestep_pairs(T, steps, spacing)
        ts = [t for t, _ in pairs]
        assert len(pairs) == steps and ts[0] == T - 1 and pairs[-1][1] == -1
        assert [t for _, t in pairs[:-1]] == ts[1:] and all(a > b for a, b in pairs) and ts[-1] >= 0
    assert common.timestep_pairs(1000, 5, spacing) == {
        "uniform": [(999, 749), (749, 500), (500, 250), (250, 0), (0, -1)],
        "quadratic": [(999, 562), (562, 250), (250, 62), (62, 0), (0, -1)],
        "trailing": [(999, 799), (799, 599), (599, 399), (399, 199), (199, -1)],
    }[spacing]
    with pytest.raises(ValueError, match="1001 steps"):
        common.timestep_pairs(1000, 1001, spacing)

def test_conversions_and_weights():
    a = common.alpha_bar(common.cosine_betas())
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 8, 3, 4, 4, generator=g)
    t = torch.tensor([0, 1, 10, 100, 500, 900, 990, 950])
    x_t = common.q_sample(x0, t, eps, a)
    v = a[t].sqrt()[:, None, None, None] * eps - (1 - a[t]).sqrt()[:, None, None, None] * x0
    known = dict(x0=x0, eps=eps, v=v)
    for one, other in itertools.permutations(known, 2):
        got = getattr(common, f"{one}_to_{other}")(x_t, t, known[one], a)
        torch.testing.assert_close(got, known[other], atol=2e-4, rtol=2e-3)
    torch.testing.assert_close(common.snr(a), a / (1 - a))
    # whatever is predicted, the weighted loss is the error of x0 times min(SNR, gamma)
    x0_hat = x0 + 0.1
    for target, truth in known.items():
        hat = x0_hat if target == "x0" else getattr(common, f"x0_to_{target}")(x_t, t, x0_hat, a)
        loss = common.min_snr_weights(a, target)[t] * (hat - truth).pow(2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(loss, 0.01 * common.snr(a)[t].clamp(max=5), rtol=1e-2, atol=1e-6)

@pytest.mark.parametrize("betas", [common.linear_betas(), common.cosine_betas(4000)], ids=["linear", "cosine"])
def test_posterior_is_bayes(betas):
    """Against the product of the two Gaussians q(x_t | x_s) q(x_s | x_0), worked out in float64."""
    a, t = common.alpha_bar(betas), torch.tensor([500, 20])
    x0, x_t = torch.tensor([0.3, -0.7]).view(2, 1, 1, 1), torch.tensor([0.9, 0.1]).view(2, 1, 1, 1)
    for s in (None, torch.tensor([350, 7])):
        mean, var = common.posterior(x0, x_t, t, a, s)
        a_t, a_s = a.double()[t], a.double()[t - 1 if s is None else s]
        alpha = a_t / a_s
        precision = alpha / (1 - alpha) + 1 / (1 - a_s)
        expected = (alpha.sqrt() / (1 - alpha) * x_t.flatten() + a_s.sqrt() / (1 - a_s) * x0.flatten()) / precision
        torch.testing.assert_close(var.flatten().double(), 1 / precision, rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.flatten().double(), expected, rtol=1e-5, atol=1e-6)
    mean, var = common.posterior(x0, x_t, torch.tensor([0, 0]), a)
    assert torch.equal(mean, x0) and not var.any()

def test_batch_is_a_function_of_seed_and_step():
    images, labels = random_images(64, 1, 28, 28), torch.arange(64)
    get = lambda *which, **kw: common.batch(images, labels, 1000, 8, *which, **kw)
    whole, again = get(3, 5), get(3, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    for other in (get(3, 6), get(4, 5)):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other))
    shares = [get(3, 5, rank=r, world=4) for r in range(4)]
    assert all(torch.equal(torch.cat(parts), a) for parts, a in zip(zip(*shares), whole))
    x0, y, t, noise, u = whole
    assert torch.equal(x0, images[y] / 127.5 - 1) and noise.shape == x0.shape and t.dtype == torch.int64
    flipped = get(3, 5, flip=True)[0]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x0)]
    assert 0 < sum(mirrored) < 8 and all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, x0))
    t = torch.cat([get(0, step)[2] for step in range(200)])
    assert t.min() < 10 and t.max() > 989 and abs(t.float().mean() - 499.5) < 30

# ---- Samplers, where the best denoiser is known: for data N(mean, std^2) it is linear in x_t
MEAN, STD = 0.4, 0.5

def gaussian(a):
    gain = (a.sqrt() * STD**2 / (a * STD**2 + 1 - a))[:, None, None, None]
    return lambda x_t, t: MEAN + gain[t] * (x_t - a[t][:, None, None, None].sqrt() * MEAN)

def moments(sampler, a, steps, **kw):
    """The exact mean and variance of what `sampler` draws: it is affine in all of its noises, so draw once with each
    noise alone set to one. Row 0 has none of them, row 1 the first x, row 2 + k the noise of step k."""
    b, count = a[-1].double(), itertools.count(2)  # x_T ~ q(x_T), not quite N(0, 1)
    x = torch.full((steps + 2, 1, 1, 1), b.sqrt() * MEAN, dtype=torch.float64)
    x[1] += (b * STD**2 + 1 - b).sqrt()

    alone = lambda x: (torch.arange(len(x)) == next(count)).double().view(-1, 1, 1, 1)
    out = sampler(gaussian(a.double()), x, a, steps, randn=alone, **kw).flatten()
    return out[0].item(), (out[1:] - out[0]).pow(2).sum().item()

@pytest.fixture(params=NETWORKS, ids=lambda script: script.NAME)
def script(request):
    return request.param

def network(script):
    torch.manual_seed(0)
    return eval(NETWORKS[script], vars(script))

WAYS = [("ddim", {}), ("ddim", {"eta": 1}), ("ddpm", {}), ("ddpm", {"variance": "large"})]

@pytest.mark.parametrize("sampler, kw", WAYS)
def test_samplers_are_first_order(sampler, kw):
    """The error halves when the steps double, and the mean and variance of the data come out. (In the other scripts the
    samplers are the same to the letter, which is tested below.)"""
    a, errors = common.alpha_bar(common.linear_betas()), []
    for steps in (50, 100, 200, 400):
        mean, variance = moments(getattr(ddpm, f"{sampler}_sample"), a, steps, **kw)
        assert mean == pytest.approx(MEAN, abs=2 / steps)
        errors.append(abs(variance - STD**2))
    ratios = [after / before for before, after in zip(errors, errors[1:])]
    assert all(0.4 < r < 0.62 for r in ratios), (errors, ratios)
    mean, variance = moments(getattr(ddpm, f"{sampler}_sample"), a, 1000, **kw)
    assert mean == pytest.approx(MEAN, abs=2e-3) and variance == pytest.approx(STD**2, abs=5e-3)

def test_ddim_at_eta_1_is_ddpm_step_by_step():
    """Same denoiser, same noise: after each of the T steps the same x, and it is a draw from common.posterior."""
    a = common.alpha_bar(common.linear_betas(100, 1e-3, 0.1))
    denoise, pairs = gaussian(a), ddpm.timestep_pairs(100, 100)
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for t, t_next in pairs:
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        ts = torch.full((4,), t)
        mean, variance = common.posterior(denoise(x, ts), x, ts, a)
        ancestral = ddpm.ddpm_sample(denoise, x, a, [(t, t_next)], randn=lambda x: z)
        implicit = ddpm.ddim_sample(denoise, x, a, [(t, t_next)], eta=1.0, randn=lambda x: z)
        torch.testing.assert_close(implicit, mean + variance.sqrt() * z, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(ancestral, implicit, atol=2e-6, rtol=1e-5)
        x = ancestral

def test_dpm_solver_is_second_order():
    """Against the exact solution on Gaussian data, in 20,000 times: a quarter of the error as steps double."""
    a = torch.linspace(5e-6, 1e-3, 20000, dtype=torch.float64).neg().add(1).cumprod(0)
    z, b, errors = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1), a[-1], []
    x = b.sqrt() * MEAN + (b * STD**2 + 1 - b).sqrt() * z
    for steps in (41, 81, 161):  # 40, 80, 160 in lambda, and one to the image
        errors.append((dit.dpm_solver_sample(gaussian(a), x, a, steps) - MEAN - STD * z).abs().max().item())
    assert errors[0] < 0.01 and all(3.5 < before / after < 4.5 for before, after in zip(errors, errors[1:])), errors
    for steps in (1, 2, 15, 1000):
        calls, few = [], common.alpha_bar(common.cosine_betas())
        dit.dpm_solver_sample(lambda x, t: calls.append(t[0].item()) or x, torch.randn(1, 1, 2, 2), few, steps)
        assert 990 < calls[0] < 1000 and len(calls) <= steps and calls == sorted(set(calls), reverse=True)
    assert dit.dpm_solver_sample(gaussian(few), torch.randn(2, 1, 1, 1), few, 15).dtype == torch.float32

def test_ddim_returns_the_only_image(script):
    """A data set of one image, and the exact noise prediction for it."""
    a, image = common.alpha_bar(common.linear_betas()), random_images(1, 1, 28, 28) / 127.5 - 1
    target = common.x0_to_eps if script is ddpm else common.x0_to_v
    model = lambda x, t, y=None: target(x, t, image.expand_as(x), a)
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    out = script.ddim_sample(script.denoiser(model, a), noise, a, 10)
    assert (out - image).abs().max() < 1e-4

def test_samplers_walk_and_clip(script):
    a = common.alpha_bar(common.linear_betas())
    for sampler in (script.ddpm_sample, script.ddim_sample):
        for steps, expected in ((4, [999, 749, 499, 249]), ([(300, 20), (20, -1)], [300, 20])):
            seen = []
            sampler(lambda x, t: seen.append(t.unique().item()) or x, torch.randn(2, 1, 2, 2), a, steps)
            assert seen == expected
    denoise = script.denoiser(lambda x, t, y=None: torch.full_like(x, -9), a)
    assert denoise(torch.full((1, 1, 1, 1), 0.5), torch.tensor([900])).item() == 1  # x0 is clipped,
    walk = script.ddim_sample(denoise, torch.full((1, 1, 1, 1), 3.0), a, [(10, 5)])
    assert walk.item() > 1.5  # and x_t is not
    assert script.timestep_pairs(1000, 30) == common.timestep_pairs(1000, 30)

# ---- Networks
def test_network(script):
    net = network(script)
    x, t = torch.randn(4, script.CHANNELS, script.SIZE, script.SIZE), torch.tensor([0, 3, 500, 999])
    out = net(x, t)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert script is uvit or not out.any()  # the last layer starts at zero
    for p in net.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    out = net(x, t)
    torch.testing.assert_close(net(x[1:3], t[1:3]), out[1:3], atol=1e-5, rtol=1e-5)  # nothing leaks between images
    assert (net(x, t.flip(0)) - out).abs().max() > 1e-4  # the time matters
    out.pow(2).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    at_0, at_7 = script.timestep_embedding(torch.tensor([0, 7]), 8).tolist()
    assert at_0 == [0] * 4 + [1] * 4 and [at_7[0], at_7[7]] == pytest.approx([math.sin(7), math.cos(0.007)])

def test_every_pixel_sees_the_corner():
    attention, x = ddpm.Attention(32), torch.randn(1, 32, 7, 7)
    attention.norm = torch.nn.Identity()
    torch.nn.init.normal_(attention.out.weight)
    far = x.clone()
    far[:, :, 0, 0] += 1
    assert ((attention(far) - attention(x)).abs().amax(dim=1) > 1e-4).all()

# ---- ddim_unet_mnist.py alone: prompts, guidance, interpolation, inversion
EVERYTHING, NOTHING, NO_CAPTION = 1 - 2**-24, 0.5, 0.0999  # what u leaves of a caption

def stroke(width, lean):
    """A bar of `width` pixels, 20 rows high, that leans right by `lean` of its height; (1, 1, 28, 28) in [-1, 1]."""
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    middle = 13.5 + lean * (13.5 - row)
    ink = (width / 2 + 0.5 - (column - middle).abs()).clamp(0, 1) * ((row >= 4) & (row < 24))
    return (2 * ink - 1)[None, None]

def said(tokens):
    return " ".join(ddim.WORDS[k] for k in tokens if k)

@pytest.mark.parametrize("width, lean, caption", [
    (4, -0.3, "a thick seven leaning left"), (1.5, 0.3, "a thin seven leaning right"), (2.4, 0, "a seven"),
])
def test_captions_are_read_off_the_image(width, lean, caption):
    told = lambda u: said(ddim.captions(stroke(width, lean), torch.tensor([7]), torch.tensor([u]))[0].tolist())
    assert told(EVERYTHING) == caption and told(NOTHING) == told(NO_CAPTION) == told(0.0) == ""
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    tokens = ddim.captions(stroke(width, lean).expand(4000, 1, 28, 28), torch.full((4000,), 7), u)
    assert tokens.dtype == torch.int64 and tokens.shape == (4000, ddim.LENGTH)
    seen = {said(row) for row in tokens.tolist()}
    assert {"7", "seven", "a 7", caption, caption.replace("seven", "7"), ""} <= seen
    assert all(ddim.tokenize(c) in tokens.tolist() for c in seen)
    silent, more = (tokens == 0).all(dim=1), ("thi" in caption) + ("leaning" in caption)
    assert silent[u < 0.1].all() and silent.float().mean() == pytest.approx(0.1 + 0.9 / 4 / 2**more, abs=0.03)

def test_tokenize():
    assert said(ddim.tokenize("A thick  seven leaning LEFT")) == "a thick seven leaning left"
    assert ddim.tokenize("") == [0] * 5 and ddim.tokenize("an 8") == [1, ddim.WORDS.index("8"), 0, 0, 0]
    with pytest.raises(ValueError, match="'green' is not known.* thick .* nine"):
        ddim.tokenize("a green seven")
    with pytest.raises(ValueError, match="'left'.* 5 words"):
        ddim.tokenize("a thick thin seven leaning left")

def test_attention_is_used():
    """The output is the words' values in proportion to the weights; so where a word has none, it changes nothing."""
    torch.manual_seed(0)
    attention, x, text = ddim.CrossAttention(32, 8), torch.randn(1, 32, 7, 7), torch.randn(1, 5, 8)
    for p in attention.parameters():
        torch.nn.init.normal_(p)

    def by_hand(text):
        pixels = attention.norm(x).flatten(2).transpose(1, 2)
        k, v = attention.kv(text).chunk(2, dim=-1)
        weights = (attention.q(pixels) @ k.transpose(1, 2) / math.sqrt(32)).softmax(dim=-1)
        return weights[0], (x + attention.out(weights @ v).transpose(1, 2).view_as(x))[0].flatten(1)

    other = text.clone()
    other[:, 2] = torch.randn(8)
    (weights, before), (weights_after, after) = by_hand(text), by_hand(other)
    torch.testing.assert_close(attention(x, text)[0].flatten(1), before, atol=1e-4, rtol=1e-4)
    assert weights.std(dim=0).max() > 0.1  # pixels differ in what they listen to
    minded = weights[:, 2] + weights_after[:, 2]
    change = (attention(x, other) - attention(x, text))[0].flatten(1).norm(dim=0)
    assert change[minded > 0.5].min() > 100 * change[minded < 1e-4].max() and (minded < 1e-4).any()
    attention(x, text).square().sum().backward()
    assert attention.q.weight.grad.abs().max() > 1e-3 and attention.kv.weight.grad[:32].abs().max() > 1e-3

def test_a_network_that_was_trained_listens(cli_of):
    cli = cli_of(ddim)
    cli.train("run", 8, "--lr", 0.01)
    net = ddim.UNet(dim=16)
    net.load_state_dict(checkpoint("run")["model"])
    x, t = torch.randn(1, 1, 28, 28), torch.tensor([700])
    draw = lambda prompt: net(x, t, torch.tensor([ddim.tokenize(prompt)]))
    assert torch.equal(net(x, t), draw(""))
    assert len({draw(p).sum().item() for p in ("", "7", "8", "thick 7", "7 thick")}) == 5
    draw("thick 7").square().sum().backward()
    for block in [*net.down[1:], *net.up[1:], net.middle[0]]:
        assert block.attention.q.weight.grad.any() and block.attention.kv.weight.grad.any()

def test_guidance_is_one_batched_call():
    a, calls = common.alpha_bar(common.cosine_betas()), []

    def model(x, t, y):
        calls.append(len(x))
        return y.float().mean(dim=1).view(-1, 1, 1, 1) / 100 + x / 10 + t.view(-1, 1, 1, 1) / 10000

    x, t, y = torch.tensor([0.1, -0.2]).view(2, 1, 1, 1), torch.tensor([500, 700]), torch.tensor([[1] * 5, [2] * 5])
    x0 = torch.cat([ddim.denoiser(model, a, y, guidance)(x, t) for guidance in (1, 3, 0)])
    assert calls == [2, 4, 4]
    v = common.x0_to_v(x.repeat(3, 1, 1, 1), t.repeat(3), x0, a).flatten()
    rest = torch.tensor([0.01 + 0.05, -0.02 + 0.07])
    torch.testing.assert_close(v, torch.cat([torch.tensor(w) + rest for w in ([0.01, 0.02], [0.03, 0.06], [0.0, 0.0])]))

def test_interpolation_is_slerp():
    cfg = argparse.Namespace(seed=3, n=10, tokens=[[0] * 5] * 2, device=torch.device("cpu"))
    x = ddim.slerp_noise(cfg, range(10)).flatten(1)  # image i is in row i % 2
    ends = torch.stack([next(common.noises(3, [i], (1, 28, 28))) for i in range(4)]).flatten(1)
    torch.testing.assert_close(x[[0, 8, 1, 9]], ends)
    for row in (x[0::2], x[1::2]):
        angles = torch.cosine_similarity(row[1:], row[:-1]).acos()
        assert (angles - angles.mean()).abs().max() < 0.01 and row.norm(dim=1).min() > 0.9 * ends.norm(dim=1).min()
    torch.testing.assert_close(ddim.slerp_noise(cfg, [3, 4]).flatten(1), x[3:5])

def test_inversion_returns():
    """On Gaussian data, where the denoiser is exact: image -> noise -> image, better in proportion to the steps."""
    a, x0, errors = common.alpha_bar(common.cosine_betas()), torch.linspace(-1, 1, 5).view(5, 1, 1, 1), []
    for steps in (25, 50, 100):
        pairs = ddim.timestep_pairs(1000, steps)
        noise = ddim.ddim_sample(gaussian(a), x0, a, [(max(t_next, 0), t) for t, t_next in reversed(pairs)])
        errors.append((ddim.ddim_sample(gaussian(a), noise, a, pairs) - x0).abs().max().item())
        assert (noise - (x0 - MEAN) / STD).abs().max() < 5 / steps  # the exact code: the ODE keeps the quantiles
    assert errors[0] < 0.2 and errors[1] < 0.55 * errors[0] and errors[2] < 0.55 * errors[1], errors

@pytest.mark.parametrize("script", [dit, uvit])
def test_classes_and_intervals_from_the_command_line(script, cli_of, capsys):
    cli = cli_of(script)
    cli.train("run", 2)
    draw = ["--sample-only", "--run-dir", "run", "--steps", 2]
    cli(*draw, "--classes", "7, 1", "--n", 4, "--guidance", 3, "--guidance-interval", "0.2,0.8", "--out", "x/")
    assert [p.name for p in sorted(Path("x").iterdir())] == [f"00000{i}-{(7, 1)[i % 2]}.png" for i in range(4)]
    cli(*draw, "--n", 16)
    assert pixels("samples.png").shape == (8 * 34, 2 * 34, 3)
    for flags, named in [
        ("--classes 8", "'h'"), ("--classes 1,", "--classes"), ("--heads 3", "--heads 3"),
        ("--guidance-interval 0.8,0.1", "LO,HI"), ("--guidance-interval 0.5", "LO"), ("--guidance-interval x", "'x'"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli(*draw, *flags.split())
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and named in err, err

def test_guidance_acts_in_its_interval():
    a, calls, x = common.alpha_bar(common.cosine_betas()), [], torch.tensor([0.1, -0.2]).view(2, 1, 1, 1)
    model = lambda x, t, y: calls.append(len(x)) or x / 10 + y.view(-1, 1, 1, 1) / 100  # 10 is the null class
    model.num_classes = 10
    denoise = dit.denoiser(model, a, torch.tensor([1, 2]), 3, (0.2, 0.8))
    for t, y in ((999, [1, 2]), (801, [1, 2]), (800, [-17, -14]), (500, [-17, -14]), (200, [-17, -14]), (199, [1, 2])):
        t, v = torch.tensor([t, t]), x / 10 + torch.tensor(y).view(2, 1, 1, 1) / 100  # y is 10 + 3 (y - 10) inside
        torch.testing.assert_close(denoise(x, t), common.v_to_x0(x, t, v, a).clamp(-1, 1))
    assert calls == [2, 2, 4, 4, 4, 2]

def test_attention_by_formula_is_attention():
    """What a CPU computes in bfloat16 is what PyTorch's kernel, taken in float32, does."""
    torch.manual_seed(0)
    attention, x, kernel = dit.Attention(32, 4), torch.randn(2, 9, 32), torch.nn.functional.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=kernel) as spy:
        expected = attention(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(attention(x).float(), expected, atol=0.02, rtol=0)
    assert spy.call_count == 1 and expected.std() > 0.05

def test_dit_knows_where_a_patch_is():
    """16 x 16 patches: the first half of the channels tells the row, the second the column."""
    positions, row, column = dit.DiT(16, 2, 2, 2).positions, 5, 11
    expected = torch.cat([dit.timestep_embedding(torch.tensor([n]), 8)[0] for n in (row, column)])
    torch.testing.assert_close(positions[16 * row + column], expected)

@pytest.mark.parametrize("gamma", [0, 5])
def test_min_snr_weighs_the_loss(cli_of, pictures, gamma):
    """In the first step the network says 0, so the loss is v squared, times min(SNR, gamma) / (SNR + 1)."""
    cli_of(dit).train("run", 1, "--min-snr", gamma, "--log-every", 1)
    train_set, a = common.load_data("CIFAR10", pictures, 32)[0], common.alpha_bar(common.cosine_betas())
    x0, _, t, noise, _ = common.batch(*train_set, 1000, 8, 0, 1, flip=True)
    v = a[t].sqrt()[:, None, None, None] * noise - (1 - a[t]).sqrt()[:, None, None, None] * x0
    weight = (a / (1 - a)).clamp(max=gamma)[t] * (1 - a[t]) if gamma else 1
    (row,) = csv.DictReader(open("run/log.csv"))
    assert float(row["loss"]) == pytest.approx((weight * v.square().mean(dim=(1, 2, 3))).mean().item(), abs=1e-5)

def test_muon_moves_the_blocks_matrices(cli_of):
    cli = cli_of(uvit)
    cli.train("run", 0)
    before = checkpoint("run")["model"]
    cli("--run-dir", "run", "--resume", "--max-steps", 1, "--steps", 2, "--n", 4)
    state = checkpoint("run")
    moved = {k: w - before[k] for k, w in state["model"].items()}
    hidden = [k for k, w in moved.items() if w.ndim == 2 and k.split(".")[0] in ("down", "middle", "up")]
    assert len(hidden) == 3 * 4 + 1 == len(state["muon"]["state"])  # qkv, out and two of the MLP, three times; a skip
    assert len(state["optimizer"]["state"]) == len(moved) - len(hidden)
    for k in hidden:  # singular values that are about as large: --lr, half warmed up, times 0.2 sqrt(the longer side)
        sizes = torch.linalg.svdvals(moved[k]) / (6e-3 / 2 * 0.2 * math.sqrt(max(moved[k].shape)))
        assert 0.5 < sizes.median() and sizes.max() < 1.3, (k, sizes)
    cli.train("adam", 1, "--no-muon")
    assert not checkpoint("adam")["muon"]["state"] and len(checkpoint("adam")["optimizer"]["state"]) == len(moved)

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(24, 8), (8, 32), (16, 16)])
def test_muon_is_that_of_pytorch(shape):
    """To the precision of bfloat16, which PyTorch's computes in."""
    torch.manual_seed(0)
    ours, theirs = torch.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    one = dit.Muon([ours], dict(lr=0.01))
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad, theirs.grad = torch.randn(shape).repeat(2, 1, 1)
        one.step(), other.step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()

def test_papers_parameter_counts():
    count = lambda net: sum(p.numel() for p in net.parameters()) / 1e6
    assert count(dit.DiT(384, 12, 6, 2)) == pytest.approx(32.48, abs=0.01)  # as the authors' code, in pixels
    assert count(uvit.UViT(512, 12, 8, 2)) == pytest.approx(44.26, abs=0.01)

def test_prompts_from_the_command_line(cli_of, capsys):
    cli = cli_of(ddim)
    cli.train("run", 30, "--lr", 0.01)
    draw = ["--sample-only", "--run-dir", "run", "--steps", 2, "--dtype", "float32"]
    cli(*draw, "--classes", "7,1", "--n", 5, "--out", "classes.png")
    cli(*draw, "--prompt", "seven", "--prompt", "one", "--n", 5, "--out", "prompts.png")
    assert pixels("classes.png").shape == (60, 90, 3) and torch.equal(pixels("classes.png"), pixels("prompts.png"))
    cli(*draw, "--classes", "1, 7", "--n", 5, "--out", "swapped.png")
    assert (pixels("classes.png") - pixels("swapped.png")).abs().max() > 1
    cli(*draw, "--classes", 7, "--prompt", "a thin 3", "--n", 3, "--out", "x/")
    assert sorted(p.name for p in Path("x").iterdir()) == ["000000-7.png", "000001-a-thin-3.png", "000002-7.png"]
    cli(*draw, "--interpolate", "--prompt", "", "--n", 4, "--out", "row.png")
    cli(*draw, "--prompt", "", "--n", 2, "--out", "ends.png")
    row = pixels("row.png")
    assert row.shape == (30, 120, 3) and (row[:, [*range(30), *range(90, 120)]] - pixels("ends.png")).abs().max() <= 1
    cli(*draw, "--n", 20, "--guidance", 1)  # by default all classes
    assert pixels("samples.png").shape == (300, 60, 3)
    capsys.readouterr()
    cli("--invert", "x/000000-7.png", *draw[1:], "--steps", 50, "--prompt", 7, "--prompt", "8", "--out", "back.png")
    psnr, back = float(re.search(r"PSNR (\d+\.\d) dB", capsys.readouterr().out)[1]), pixels("back.png")
    assert psnr > 20 and back.shape == (30, 120, 3) and torch.equal(back[1:29, 1:29], pixels("x/000000-7.png"))
    error = (back[:, :30] - back[:, 60:90])[1:29, 1:29].float().square().mean()
    assert -10 * torch.log10(error / 255**2) == pytest.approx(psnr, abs=0.5)
    for flags, named in [
        ("--prompt|a green seven", "'green'"), ("--prompt|a a a a a a", "5 words"), ("--classes|3,12", "'12'"),
        ("--classes|3,", "''"), ("--invert|", "--invert"), ("--invert|run/ckpt.pt", "run/ckpt.pt"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli(*draw, *flags.split("|"))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and named in err, err
    image_folder(Path("many"), {f"train/{k}": 1 for k in range(11)})
    with pytest.raises(SystemExit):
        cli("--data-dir", "many", "--run-dir", "new")
    assert "11 classes" in capsys.readouterr().err

# ---- The command line
@pytest.fixture
def cli_of(tmp_path, monkeypatch, mnist, pictures):
    """Calls a script's main() in an empty folder, as if from a shell; `cli.data` is a tiny data set for it."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # here and in the processes below: the order of float sums is part of "bit for bit"

    def make(script):
        def call(*flags):
            monkeypatch.setattr(sys, "argv", [script.__file__, "--device", "cpu", *map(str, flags)])
            script.main()

        call.data, call.name = ["--data-dir", mnist if script.SIZE == 28 else pictures], script.NAME
        call.any = ANY[script]
        call.flags = [*TINY, *SHAPES[script], *call.data]
        call.train = lambda run, steps, *more: call(*call.flags, "--run-dir", run, "--max-steps", steps, *more)
        return call

    return make

@pytest.fixture
def cli(script, cli_of):
    return cli_of(script)

def checkpoint(run):
    return torch.load(Path(run, "ckpt.pt"), weights_only=True)

def tensors(tree, path=""):
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list, tuple)):
        for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(v, f"{path}/{k}")

def assert_same(a, b, tolerance=0.0):
    a, b = dict(tensors(a)), dict(tensors(b))
    assert a.keys() == b.keys() and len(a) > 100
    for k in a:
        assert torch.equal(a[k], b[k]) or tolerance and (a[k] - b[k]).abs().max() <= tolerance, k

def test_train_resume_and_draw(cli, script, capsys):
    cli.train("whole", 6)
    printed = capsys.readouterr().out
    assert "M parameters" in printed and "64 images" in printed and "whole" in printed and "images/s" in printed
    cli.train("parts", 3)
    shutil.copy("parts/ckpt.pt", "at3.pt")
    cli("--run-dir", "parts", "--resume", "--max-steps", 6, "--steps", 2)  # the other flags come from the file
    assert_same(checkpoint("whole"), checkpoint("parts"))
    assert checkpoint("parts")["config"]["batch_size"] == 8 and checkpoint("parts")["step"] == 6
    before = torch.load("at3.pt", weights_only=True)["model"]
    moved = [k for k, v in checkpoint("whole")["model"].items() if not torch.equal(v, before[k])]
    assert len(moved) > 0.9 * len(before)  # it does learn

    rows = {run: list(csv.DictReader(open(f"{run}/log.csv"))) for run in ("whole", "parts")}
    assert list(rows["whole"][0]) == "step images loss val_loss lr grad_norm images_per_s seconds".split()
    assert [r["step"] for r in rows["whole"]] == ["2", "4", "6"] == [r["step"] for r in rows["parts"]]
    assert [r["images"] for r in rows["whole"]] == ["16", "32", "48"] and 0.2 < float(rows["whole"][0]["loss"]) < 1.5
    assert rows["whole"][2]["val_loss"] == rows["parts"][2]["val_loss"]
    assert sorted(p.name for p in Path("whole").iterdir()) == ["ckpt.pt", "log.csv", "samples.png"]

    cli("--run-dir", "whole", "--sample-only", "--n", 5, "--steps", 3, *cli.any)  # from the run's own checkpoint
    assert pixels("samples.png").shape == (2 * script.SIZE + 4, 3 * script.SIZE + 6, 3)
    draw = ["--ckpt", "at3.pt", "--steps", 3, "--dtype", "float32", *cli.any]
    for name, sampler in (("x.png", ["ddpm"]), ("y.png", ["ddim", "--eta", 1]), ("z.png", ["ddim"])):
        cli(*draw, "--n", 1, "--out", name, "--sampler", *sampler)
    assert (pixels("x.png") - pixels("y.png")).abs().max() <= 1 and (pixels("x.png") - pixels("z.png")).abs().max() > 1
    cli(*draw, "--n", 2, "--out", "new/way.gif")
    with Image.open("new/way.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (2 * script.SIZE + 4, script.SIZE + 2)

def test_ema_is_its_closed_form(cli, monkeypatch):
    """Half-lives of 0.05 * images seen, up to --ema, so here 0.4, 0.8, .. 6, 6, .. images."""
    weights, replace, first = [], os.replace, lambda weights: next(iter(weights.values()))

    def keep(tmp, path):
        replace(tmp, path)
        weights.extend([first(checkpoint("run")["model"])] if Path(path).name == "ckpt.pt" else [])

    monkeypatch.setattr(os, "replace", keep)
    cli.train("run", 20, "--save-every", 1, "--ema", 6)
    average = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        average = torch.lerp(weight, average, 0.5 ** (8 / min(6, 0.4 * n)))
    assert len(weights) == 21
    torch.testing.assert_close(first(checkpoint("run")["ema"]), average, atol=1e-8, rtol=1e-5)

def test_files_of_images(cli, script):
    cli.train("run", 1)
    draw = ["--sample-only", "--run-dir", "run", "--steps", 2, "--dtype", "float32", *cli.any]
    kind = "-0" if script.SIZE == 32 else ""
    cli(*draw, "--n", 5, "--batch-size", 2, "--out", "five/")
    assert sorted(p.name for p in Path("five").iterdir()) == [f"{i:06d}{kind}.png" for i in range(5)]
    assert pixels(f"five/000000{kind}.png").shape == (script.SIZE, script.SIZE, 3)
    Path(f"five/000003{kind}.png").write_text("mine")
    Path(f"five/000001{kind}.png").unlink()
    cli(*draw, "--n", 6, "--out", "five/")  # fills up: what is there stays
    assert Path(f"five/000003{kind}.png").read_text() == "mine" and len(list(Path("five").iterdir())) == 6

def test_image_i_is_a_function_of_seed_and_i(script):
    """Whatever n and the internal batch are; before rounding to 8 bits."""
    net = network(script)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    float32 = torch.autocast("cpu", enabled=False)
    for sampler in ("ddim", "ddpm", "dpm")[: 2 + hasattr(script, "dpm_solver_sample")]:
        cfg = argparse.Namespace(seed=3, device=torch.device("cpu"), sampler=sampler, eta=0, steps=20, autocast=float32)
        cfg.tokens, cfg.guidance, cfg.interpolate = [[7] + [0] * 4, [1, 2, 8, 0, 0]], 2, False
        cfg.chosen, cfg.guidance_interval = [3, 7], (0.2, 0.8)
        whole = script.draw(net, cfg, range(9))
        parts = [script.draw(net, cfg, index) for index in ([0], range(1, 5), range(5, 9))]
        assert (whole - torch.cat(parts, dim=1)).abs().max() < 1e-5
        looks = script.draw(net, cfg, range(2), looks=5)
        assert looks.shape == (5, 2, *whole.shape[2:]) and (looks[-1] - whole[0, :2]).abs().max() < 1e-5
        assert (whole[0, 0] - whole[0, 1]).abs().max() > 0.1
        cfg.seed = 4
        assert (script.draw(net, cfg, range(9)) - whole).abs().max() > 0.1

def test_processes_share_a_folder(tmp_path, capsys):
    """What torchrun does with -n 50000 --out folder/: each process its share, as many of each class, none twice."""
    net, float32 = network(dit), torch.autocast("cpu", enabled=False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    cfg = argparse.Namespace(seed=3, device=torch.device("cpu"), sampler="dpm", eta=0, steps=3, autocast=float32)
    cfg.guidance, cfg.guidance_interval, cfg.chosen, cfg.batch_size = 2, (0, 1), list(range(10)), 4
    for cfg.world, out in ((1, tmp_path / "one"), (3, tmp_path / "three")):
        for cfg.rank in range(cfg.world):
            dit.write(net, cfg, f"{out}/", 20)
        assert sorted(path.name for path in out.iterdir()) == [f"{i:06d}-{i % 10}.png" for i in range(20)]
    for path in (tmp_path / "one").iterdir():
        assert (pixels(path) - pixels(out / path.name)).abs().max() <= 1
    capsys.readouterr()
    (out / "000001-1.png").unlink(), (out / "000005-5.png").unlink()
    cfg.rank = 0  # it has 0 to 5
    dit.write(net, cfg, f"{out}/", 20)
    assert "2 of 2 images, 0 s left" in capsys.readouterr().out and len(list(out.iterdir())) == 20

# ---- Rough treatment
def shell(script, *flags, launcher=(), **kw):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, *launcher, script.__file__, "--device", "cpu", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kw)

def test_killed_at_random_and_resumed(cli, script):
    """SIGKILL, most of the time within a save, of which there is one per step."""
    flags = [*cli.flags, "--run-dir", "killed", "--save-every", 1, "--max-steps", 10000, "--resume"]
    for _ in range(3):
        process = shell(script, *flags)
        before = checkpoint("killed")["step"] if Path("killed/ckpt.pt").exists() else -1
        while not Path("killed/ckpt.pt").exists() or checkpoint("killed")["step"] <= before + 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(random.random() / 2)
        process.kill()
        process.communicate()
    Path("killed/ckpt.pt.tmp").write_bytes(b"torn")  # had it been killed here
    steps = checkpoint("killed")["step"] + 2
    cli("--run-dir", "killed", "--resume", "--max-steps", steps, "--steps", 2)
    cli.train("whole", steps)
    assert_same(checkpoint("killed"), checkpoint("whole"))
    rows = [int(r["step"]) for r in csv.DictReader(open("killed/log.csv"))]
    assert [r for r in rows if r % 2 == 0] == list(range(2, steps + 1, 2))  # none missing, none twice

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(cli, script, number):
    process = shell(script, *cli.flags, "--run-dir", "asked", "--save-every", 10000, "--max-steps", 10000)
    while not (line := process.stdout.readline()).startswith("step 4 "):
        assert line, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out and not err
    steps = checkpoint("asked")["step"]
    assert 4 <= steps < 10000
    cli("--run-dir", "asked", "--resume", "--max-steps", steps + 1, "--steps", 2)
    cli.train("whole", steps + 1)
    assert_same(checkpoint("asked"), checkpoint("whole"))

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

def test_torchrun_with_two_processes(cli, script):
    """One process hands over to two, and they to one: weights, losses and images are those of one process alone."""
    cli.train("one", 6, "--out", "one.png", "--n", 5)
    cli.train("two", 2)
    process = shell(script, "--run-dir", "two", "--resume", "--max-steps", 4, "-n", 5, "--steps", 2, launcher=TORCHRUN)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("M parameters") == 1 and "cpu x 2" in out and checkpoint("two")["step"] == 4
    shutil.copy("two/ckpt.pt", "four.pt"), shutil.copy("two/samples.png", "four by two.png")
    cli("--run-dir", "two", "--resume", "--max-steps", 6, "--steps", 2, "--n", 5, "--out", "two.png")
    assert_same(checkpoint("one"), checkpoint("two"), tolerance=1e-5)
    one, two = ([r["loss"] for r in csv.DictReader(open(f"{run}/log.csv"))] for run in ("one", "two"))
    assert [float(x) for x in one] == pytest.approx([float(x) for x in two], abs=1e-5) and len(one) == 3
    assert (pixels("one.png") - pixels("two.png")).abs().max() <= 1
    cli("--sample-only", "--ckpt", "four.pt", "--n", 5, "--steps", 2, "--dtype", "float32")
    assert (pixels("samples.png") - pixels("four by two.png")).abs().max() <= 1

def test_ctrl_c_under_torchrun(cli, script):
    """It reaches the workers twice: from the terminal, and passed on by torchrun. They leave together, at step 10 k."""
    flags = [*cli.flags, "--run-dir", "asked", "--max-steps", 10000]
    process = shell(script, *flags, launcher=TORCHRUN, start_new_session=True)
    while not (line := process.stdout.readline()).startswith("step 4 "):
        assert line, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    assert "--resume" in process.communicate(timeout=60)[0]
    assert checkpoint("asked")["step"] % 10 == 0 < checkpoint("asked")["step"]

FETCH = """
import os, time, torch, torch.distributed as dist, torchvision, common
class MNIST:
    def __init__(self, root, **_):
        if not os.path.exists("data"):
            time.sleep(2)
            open("data", "a").write(os.environ["RANK"])
        self.data, self.targets, self.classes = torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3).long(), []
torchvision.datasets.MNIST = MNIST
dist.init_process_group("gloo")
common.load_data("MNIST", ".", 28)
dist.destroy_process_group()
"""

def test_one_process_downloads_and_the_other_waits(tmp_path):
    (tmp_path / "two.py").write_text(FETCH)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, *TORCHRUN, "two.py"], cwd=tmp_path, env=env, check=True, timeout=100)
    assert (tmp_path / "data").read_text() == "0"

def test_full_disk(cli, script):
    """A limit on the size of a file stands in for it: the write fails midway."""
    resource = pytest.importorskip("resource")
    cli.train("run", 2)
    before = Path("run/ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    process = shell(script, "--run-dir", "run", "--resume", "--max-steps", 3, preexec_fn=limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "run/ckpt.pt" in err, err
    assert Path("run/ckpt.pt").read_bytes() == before

def test_without_a_compiler(cli, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    cli.train("run", 1, "--compile")
    assert capsys.readouterr().out.count("--compile is left out") == 1 and checkpoint("run")["step"] == 1

def test_a_loss_that_is_not_finite(cli, capsys):
    cli.train("run", 3)
    state = checkpoint("run")
    next(iter(state["model"].values())).view(-1)[0] = math.nan
    torch.save(state, "run/ckpt.pt")
    before = Path("run/ckpt.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        cli("--run-dir", "run", "--resume", "--max-steps", 50, "--log-every", 5, "--save-every", 100)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "not finite at step 4;" in err
    assert Path("run/ckpt.pt").read_bytes() == before
    with pytest.raises(SystemExit):  # and when it blows up by itself, what was saved is from before
        cli.train("wild", 50, "--lr", 1e30, "--save-every", 1)
    assert all(x.isfinite().all() for _, x in tensors(checkpoint("wild")))

BAD = {  # what is wrong: (flags, what the one line must name)
    "no data, no network": ("--data-dir nowhere", "--data-dir nowhere: no "),
    "no images": ("--data-dir empty", "--data-dir empty"),
    "a broken image": ("--data-dir broken", "broken/train/a/0.png"),
    "no checkpoint": ("--sample-only --ckpt none.pt", "none.pt"),
    "no checkpoint of a run": ("--sample-only --ckpt text.pt", "text.pt"),
    "weights of another shape": ("--sample-only --ckpt shape.pt", "shape.pt"),
    "a torn checkpoint": ("--sample-only --ckpt torn.pt", "torn.pt"),
    "a damaged checkpoint": ("--sample-only --ckpt damaged.pt", "damaged.pt"),
    "a damaged run": ("--run-dir damaged --resume", "damaged/ckpt.pt"),
    "another model": ("--sample-only --ckpt other.pt", "dit_cifar10"),
    "a checkpoint that runs code": ("--sample-only --ckpt evil.pt", "evil.pt"),
    "another size": ("--run-dir run --resume --dim 32", "run/ckpt.pt"),
    "an existing run": ("--run-dir run", "--resume"),
    "too many steps": ("--sample-only --steps 1001", "--steps 1001"),
    "no steps": ("--sample-only --steps 0", "--steps 0"),
    "eta": ("--sample-only --eta 1.5", "--eta 1.5"),
    "an unknown ending": ("--sample-only --out x.jpg", "--out x.jpg"),
    "an impossible place": ("--sample-only --run-dir run --steps 1 --n 1 --out text.pt/x.png", "text.pt/x.png"),
    "a class": ("--sample-only --run-dir run --classes 12", "--classes"),
    "an unknown sampler": ("--sample-only --sampler euler", "euler"),
    "an unknown device": ("--device tpu", "--device tpu"),
    "no heads": ("--heads 0", "--heads 0"),
    "no patch": ("--patch 0", "--patch 0"),
    "a size that does not divide": ("--dim 41", "--dim 41"),
    "a batch that does not divide": ("--batch-size 9", "--batch-size 9"),
    "another batch that does not divide": ("--run-dir run --resume --batch-size 9", "--batch-size 9"),
    "a file for a run": ("--run-dir text.pt", "text.pt"),
}

class Evil:
    __reduce__ = lambda self: (os.system, ("touch evil",))

def test_bad_input_gets_one_line(cli, capsys, monkeypatch):
    cli.train("run", 0)
    image_folder(Path("broken"), {"train/a": 1})
    Path("empty/train/a").mkdir(parents=True)
    for path in ("broken/train/a/0.png", "text.pt"):
        Path(path).write_text("neither a picture nor a checkpoint")
    whole = bytearray(Path("run/ckpt.pt").read_bytes())
    Path("torn.pt").write_bytes(whole[:5000])
    whole[len(whole) // 2] ^= 1  # a bit, within some tensor
    Path("damaged").mkdir(), Path("damaged/ckpt.pt").write_bytes(whole), Path("damaged.pt").write_bytes(whole)
    torch.save({"ema": {}, "config": {"script": "dit_cifar10"}}, "other.pt")
    torch.save({"ema": Evil(), "config": {}}, "evil.pt")
    torch.save({"ema": {}, "step": 1, "config": {"script": cli.name, "dim": 16}}, "shape.pt")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=OSError("no network")))
    for case, (flags, named) in BAD.items():
        capsys.readouterr()
        monkeypatch.setenv("WORLD_SIZE", "2" if "batch" in case else "1")
        with pytest.raises(SystemExit) as stop:
            cli(*cli.data, *flags.split())
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and named in err and "Traceback" not in err, (case, err)
        assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before, case

# ---- A file copied alone, and the repository
def test_a_file_copied_alone_works(script, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    code = f"""
import sys, torch
from {script.NAME} import *
a = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
net, noise = {NETWORKS[script]}, torch.randn(2, CHANNELS, SIZE, SIZE)
for sample in ddpm_sample, ddim_sample:
    assert sample(denoiser(net, a), noise, a, steps=3).shape == noise.shape
assert not {{"common", "torchvision", "PIL"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})

def test_help_names_every_flag_and_is_quick(script):
    start = time.perf_counter()
    out = subprocess.run([sys.executable, script.__file__, "--help"], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 10  # 2 s on an idle machine
    readme = (ROOT / "README.md").read_text()
    for flag in re.findall(r"^  (--[a-z-]+)", out, re.M):
        assert flag in readme, flag

def test_shipped_checkpoint_draws(script, cli_of):
    """What a fresh clone does first, in few steps: white strokes on black; or smooth pictures, blue ones by the sea."""
    path = ROOT / "checkpoints" / f"{script.NAME}.pt"
    shipped = torch.load(path, weights_only=True)
    assert shipped["config"]["script"] == script.NAME and path.stat().st_size < (8 if script.SIZE == 28 else 20) * 2**20
    assert set(shipped) == {"ema", "step", "config"} and all(v.dtype == torch.half for v in shipped["ema"].values())
    cli_of(script)("--sample-only", "--n", 16, "--steps", 10, *(["--classes", "0,8,4,6"] if script.SIZE == 32 else []))
    picture = pixels("samples.png").float()
    if script.SIZE == 28:
        assert 0.6 < (picture < 32).float().mean() < 0.95 and 0.03 < (picture > 224).float().mean() < 0.3
    else:
        planes_and_ships, deer_and_frogs = picture.view(2, 68, 136, 3).mean(dim=(1, 2))  # red, green, blue
        blue = lambda rgb: (rgb[2] - rgb[0]).item()
        assert blue(planes_and_ships) > 5 + blue(deer_and_frogs)
        image = picture.view(4, 34, 4, 34, 3).transpose(1, 2)[:, :, 1:33, 1:33].flatten(0, 1)
        assert 30 < image.std(dim=(1, 2)).mean() < 90 and image.diff(dim=2).abs().mean() < 25

def test_the_code_in_the_readme_runs(tmp_path, mnist, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(mnist)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope = dict(alphas_cumprod=common.alpha_bar(common.linear_betas()), your_model=lambda x, t: x, torch=torch)
    quick = re.sub("times = .*", "times = [99, 899, 999]", shown[0].replace("pairs(1000, 1000)", "pairs(1000, 10)"))
    exec(quick, {})
    exec(shown[1].replace("steps=50", "steps=2"), scope)
    assert scope["images"].shape == (16, 1, 28, 28) and Path("forward_and_reverse.png").stat().st_size > 10_000

def test_repository():
    for script in NETWORKS:
        text = Path(script.__file__).read_text()
        assert len(text.splitlines()) <= (450 if script is ddim else 400), script.NAME
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
        assert imported <= {"torch", "einops", "PIL", "common"}, imported
    assert len((ROOT / "common.py").read_text().splitlines()) <= 250
    assert (ROOT / "requirements.txt").exists() and "MIT" in (ROOT / "LICENSE").read_text()

def test_what_is_the_same_in_two_scripts_is_the_same_to_the_letter():
    one, other = (Path(s.__file__).read_text().split("# ---- The samplers")[1] for s in (dit, uvit))
    one, other = set(one.splitlines()), set(other.replace(" UViT(", " DiT(").splitlines())
    assert all('"--depth"' in line or "(cfg.d" in line for line in one ^ other)  # the two differ in the network
    names = "timestep_embedding timestep_pairs ddpm_sample ddim_sample dpm_solver_sample norm zero die blame"
    for name in names.split():
        assert len({inspect.getsource(vars(s)[name]) for s in NETWORKS if name in vars(s)}) == 1, name
