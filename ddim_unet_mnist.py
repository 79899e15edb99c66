"""A prompt in, a digit out: Stable Diffusion in miniature, on MNIST in eight colours.

A UNet removes noise while it reads a caption (Rombach et al. 2022, 2112.10752), and guidance makes
it obey (Ho & Salimans 2022, 2207.12598). DDIM adds no noise of its own, so that an image and its
noise can be turned into each other (Song et al. 2020, 2010.02502).

    python ddim_unet_mnist.py --prompt "a thick red seven on blue" "thin 3"
    python ddim_unet_mnist.py --data-dir data                    # fetch MNIST, train, draw
    torchrun --standalone --nproc_per_node=8 ddim_unet_mnist.py  # the same on eight GPUs
"""

import argparse
import copy
import csv
import math
import os
import signal
import sys
import time
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock
from torch import nn

NAME = "ddim_unet_mnist"
DATA = "MNIST"
CHANNELS = 3
SIZE = 28
T = 1000  # times of the schedule: 0 is almost the image, T - 1 almost noise
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes, set by torchrun
RANK = int(os.environ.get("RANK", 0))


def print0(message):
    if RANK == 0:
        print(message, flush=True)


# ---- The prompt: a caption, partly measured in the image, a token for each word, no text encoder

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
RGB = "d62f2f f28522 f7d038 2f9e4f 2f62c9 8546a8 ffffff 141414"
PALETTE = torch.tensor([*bytes.fromhex(RGB)]).view(-1, 3, 1, 1) / 127.5 - 1  # (8, 3, 1, 1)
WORDS = ["", "a", "thick", "thin", "leaning", "left", "right", "on"]  # "" is padding
WORDS += [*COLOURS, *"0123456789", *DIGITS]
TOKEN = {word: number for number, word in enumerate(WORDS)}
LENGTH = 8  # of a prompt, in tokens


def tokenize(prompt):
    """A prompt, say "thin 3" -> a tuple of LENGTH tokens. Raises ValueError for unknown words."""
    words = ["a" if word == "an" else word for word in prompt.lower().split()]
    unknown = [word for word in words if word not in TOKEN]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not known; these are: {' '.join(WORDS[1:])}")
    if len(words) > LENGTH:
        raise ValueError(f"{words[LENGTH]!r} is one too many, {LENGTH} words are the most")
    words += [""] * (LENGTH - len(words))
    return tuple(TOKEN[word] for word in words)


def measure(x0):
    """Images (B, C, H, W) -> width of strokes (B,), and slant (B,): pixels right per pixel up."""
    ink = x0.mean(dim=1) / 2 + 0.5  # (B, H, W) in [0, 1], if bright on black
    total = ink.sum(dim=(1, 2))
    edges = ink.diff(dim=2)[:, 1:].square() + ink.diff(dim=1)[:, :, 1:].square()
    width = 2 * total / edges.sqrt().sum(dim=(1, 2))  # a stroke has two edges
    down = torch.arange(SIZE, device=x0.device)[:, None]
    right = down.T
    mean_down = (ink * down).sum(dim=(1, 2)) / total
    mean_right = (ink * right).sum(dim=(1, 2)) / total
    covariance = (ink * down * right).sum(dim=(1, 2)) / total - mean_down * mean_right
    variance = (ink * down**2).sum(dim=(1, 2)) / total - mean_down**2
    return width, -covariance / variance


def held_out(digit, ink):
    """Pairs held out of training. If the model can draw them, it composes."""
    return (digit + ink) % 7 == 0


def illustrate(x0, y, u):
    """Grey x0 (B, C, H, W), digits y (B,), chance u (B, 12) -> x0 in colour, captions."""
    corners = x0[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=(1, 2))
    x0 = torch.where(corners[:, None, None, None] > 0, -x0, x0)  # dark on light, as scans are
    ink = (8 * u[:, 7]).long()
    ink = torch.where(held_out(y, ink), (ink + 3) % 8, ink)
    paper = (ink + 1 + (7 * u[:, 8]).long()) % 8  # any other colour
    palette = PALETTE.to(x0.device)
    grey = x0.mean(dim=1, keepdim=True) / 2 + 0.5  # 0 is paper, 1 is ink
    return torch.lerp(palette[paper], palette[ink], grey), captions(x0, y, ink, paper, u)


def captions(x0, y, ink, paper, u):
    """Tokens (B, LENGTH) that say a part of what is true. One in ten says nothing, for guidance."""
    width, slant = measure(x0)
    thickness = torch.where(width > 2.6, TOKEN["thick"], 0)  # a third of MNIST each
    thickness = torch.where(width < 2.1, TOKEN["thin"], thickness)
    side = torch.where(slant > 0.1, TOKEN["right"], 0)
    side = torch.where(slant < -0.1, TOKEN["left"], side)
    says_digit = u[:, 2] < 0.75
    says = (u < 0.5).T  # (12, B): whether to mention a part, and if the digit is to be a word
    says_side = says[5] & (side > 0)
    words = [
        says[3] * says_digit * TOKEN["a"],
        says[4] * thickness,
        says[9] * (TOKEN["red"] + ink),
        says_digit * (TOKEN["0"] + y + 10 * says[6]),  # 7 or seven
        says_side * TOKEN["leaning"],
        says_side * side,
        says[10] * TOKEN["on"],
        says[10] * (TOKEN["red"] + paper),
    ]
    words = torch.stack(words, dim=1) * (u[:, :1] >= 0.1)
    gaps_last = (words == 0).int().argsort(dim=1, stable=True)
    return words.gather(1, gaps_last)


# ---- The network: a UNet much as in ddpm_unet_mnist.py, that pays attention to the prompt


def sinusoids(t, dim):
    """Numbers t (N,) -> (N, dim): sines and cosines at dim / 2 frequencies from 1 to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(channels):  # 16 channels a group: smaller groups take a CPU six times as long
    return nn.GroupNorm(channels // 16, channels)


def zero(layer):  # at first a block adds nothing to its shortcut, so that deep stacks train easily
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class CrossAttention(nn.Module):
    """Every pixel asks all the words of the prompt (Rombach et al. 2022, section 3.3)."""

    def __init__(self, dim, dim_text):
        super().__init__()
        self.heads = dim // 32
        self.norm = norm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim_text, 2 * dim)
        self.out = zero(nn.Linear(dim, dim))

    def forward(self, x, text):  # (B, C, H, W), (B, LENGTH, dim_text) -> (B, C, H, W)
        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q = rearrange(self.q(pixels), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(text), "b n (k h d) -> k b h n d", k=2, h=self.heads)
        pixels = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return x + rearrange(self.out(pixels), "b (h w) c -> b c h w", h=x.shape[2])


class Block(nn.Module):
    """Norm, SiLU, convolution, twice, with the time added in between and a shortcut around."""

    def __init__(self, dim_in, dim, dim_time, dim_text=None):
        super().__init__()
        self.norm1 = norm(dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, padding=1)
        self.time = nn.Linear(dim_time, dim)
        self.norm2 = norm(dim)
        self.conv2 = zero(nn.Conv2d(dim, dim, 3, padding=1))
        self.shortcut = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()
        self.attention = CrossAttention(dim, dim_text) if dim_text else None

    def forward(self, x, time, text):  # text (B, LENGTH, dim_text) -> (B, dim, H, W)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return self.attention(h, text) if self.attention else h


class UNet(nn.Module):
    """x_t (B, C, H, W), t (B,) in 0..T-1, tokens y (B, LENGTH) -> v. Without y: of no prompt."""

    def __init__(self, dim=48):
        super().__init__()
        self.dim = dim
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))
        self.words = nn.Embedding(len(WORDS), 2 * dim)
        self.read = nn.Conv1d(2 * dim, 2 * dim, 3, padding=1)  # tells "blue" from "on blue"
        self.stem = nn.Conv2d(CHANNELS, dim, 3, padding=1)
        # the levels, 28 x 28, 14 x 14 and 7 x 7: channels, and those of the prompt if it is read
        levels = [(dim, None), (2 * dim, 2 * dim), (2 * dim, 2 * dim)]
        between = [(dim, 2 * dim), (2 * dim, 2 * dim)]
        self.down = nn.ModuleList(Block(d, d, 4 * dim, text) for d, text in levels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in between)
        self.middle = nn.ModuleList(Block(2 * dim, 2 * dim, 4 * dim, a) for a in (2 * dim, None))
        self.up = nn.ModuleList(Block(2 * d, d, 4 * dim, text) for d, text in levels)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in between)
        last = zero(nn.Conv2d(dim, CHANNELS, 3, padding=1))
        self.head = nn.Sequential(norm(dim), nn.SiLU(), last)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, y=None):
        if y is None:
            y = torch.zeros(len(t), LENGTH, dtype=torch.int64, device=t.device)  # the empty prompt
        time = F.silu(self.time(sinusoids(t, self.dim)))  # (B, 4 dim)
        words = self.words(y).mT  # (B, 2 dim, LENGTH)
        text = (words + self.read(words)).mT
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for level, block in enumerate(self.down):
            if level > 0:
                h = self.shrink[level - 1](h)
            h = block(h, time, text)
            skips.append(h)
        for block in self.middle:
            h = block(h, time, text)
        for level in (2, 1, 0):
            h = self.up[level](torch.cat([h, skips[level]], dim=1), time, text)
            if level > 0:
                h = self.grow[level - 1](F.interpolate(h, scale_factor=2.0))
        return self.head(h).float()


# ---- Diffusion: the loss, the denoiser, and the samplers, which know of no network


def schedule(device="cpu"):
    """alphas_cumprod (T,): the share of the image's variance that is left at each time."""
    from common import cosine_schedule  # here, so that the rest needs no common.py

    return cosine_schedule(T).to(device)


def loss(model, x0, y, t, noise, alphas_cumprod):
    """Ho et al. 2020, algorithm 1, but the network predicts v (Salimans & Ho 2022, 2202.00512).

    x0 and noise (B, ..), y and t (B,), alphas_cumprod (T,) -> a scalar. `denoiser` undoes it: for
    another target, change both.
    """
    a = alphas_cumprod[t].view(-1, *[1] * (x0.dim() - 1))  # (B, 1, ..)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise  # eq. 4
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    return F.mse_loss(model(x_t, t, y), v)


def denoiser(model, alphas_cumprod, y=None, guidance=1.0):
    """denoise(x_t, t) -> x0, by a model that predicts v; t is an int, or int64 (B,).

    Guidance 1 is none; it is 1 + w in Ho & Salimans 2022 (2207.12598).
    """

    def denoise(x_t, t):
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        v = model(x_t, t, y)
        if guidance != 1:
            v_null = model(x_t, t)  # without the prompt
            v = v_null + guidance * (v - v_null)
        a = alphas_cumprod[t].view(-1, *[1] * (x_t.dim() - 1))
        x0 = a.sqrt() * x_t - (1 - a).sqrt() * v
        return x0.clamp(-1, 1)  # the range of pixels

    return denoise


def ddim_sample(denoise, x, alphas_cumprod, steps=50, eta=0.0, randn=torch.randn_like):
    """From noise x (B, ..) to images (Song et al. 2020, 2010.02502, eq. 12).

    With eta = 0 it solves an ODE; with eta = 1 it is DDPM (Ho et al. 2020, algorithm 2).
    """
    alpha_bar = [*alphas_cumprod.tolist(), 1.0]  # at index -1, the clean image's
    # equal strides from T - 1 to -1 (Lin et al. 2023, 2305.08891, table 2)
    times = [round(len(alphas_cumprod) * i / steps) - 1 for i in range(steps, -1, -1)]
    for t, t_next in pairwise(times):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x0 = denoise(x, t)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))  # eq. 16
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * randn(x)
    return x


def ddim_invert(denoise, x, alphas_cumprod, steps=50):
    """Images (B, ..) -> their noise, by eq. 12 backwards (Song et al. 2020, section 5.4)."""
    alpha_bar = alphas_cumprod.tolist()
    # starts at t = 0, because networks are not trained for t = -1
    times = [max(round(len(alpha_bar) * i / steps) - 1, 0) for i in range(steps + 1)]
    for t, t_next in pairwise(times):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x0 = denoise(x, t)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps
    return x


ddpm_sample = partial(ddim_sample, eta=1.0)
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}


def meaning():
    """A fingerprint of schedule, loss and denoiser, measured with a network that returns x_t.

    Words and colours belong to it. Weights are saved with it; a script that measures another
    refuses them. None where there is no common.py, because this file was copied alone.
    """
    try:
        alphas_cumprod = schedule()
    except ImportError:
        return None
    x = torch.tensor([0.1, -0.2, 0.3])
    t = torch.tensor([T // 20, T // 2, T - T // 20])
    x0 = denoiser(lambda x_t, t, y: x_t, alphas_cumprod)(x, t)
    error = loss(lambda x_t, t, y: x_t, x, None, t, x.flip(0), alphas_cumprod)
    measured = [round(number, 4) for number in (*x0.tolist(), error.item())]
    return [*measured, RGB, " ".join(WORDS)]


# ---- Drawing


def load(path):
    """(the network with averaged weights, the whole dict) from a file that train() has saved."""
    try:
        archive = zipfile.ZipFile(path)
        folders = [entry for entry in archive.filelist if entry.external_attr & 16]
        if archive.testzip() or folders:  # torch.load ignores checksums, and skips what is a folder
            raise ValueError("it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
        config = state["config"]
        model = UNet(config["dim"]).eval()
        model.load_state_dict(state["ema"])
        if meaning() not in (None, config["meaning"]):
            raise ValueError("trained with another schedule, loss or denoiser")
    except Exception as error:  # of a dozen kinds, because a file can be damaged in many ways
        reason = " ".join(str(error).partition(". ")[0].split())[:300]  # its first sentence
        sys.exit(f"{path} is not a checkpoint of {NAME}.py: {type(error).__name__}: {reason}")
    return model, state


def interpolated_noises(seed, index, rows, n, device):
    """Yields noise on the way from noise 2r to noise 2r + 1 in row r (Song et al. 2020, D.5)."""
    from common import noises

    shape = (CHANNELS, SIZE, SIZE)
    starts = noises(seed, [2 * (i % rows) for i in index], shape, device)
    ends = noises(seed, [2 * (i % rows) + 1 for i in index], shape, device)
    columns = math.ceil(n / rows)
    # random noises are nearly at right angles, so this keeps the variance
    share = torch.tensor([i // rows / max(columns - 1, 1) for i in index], device=device)  # 0 to 1
    angle = math.pi / 2 * share[:, None, None, None]
    for start, end in zip(starts, ends, strict=True):
        yield angle.cos() * start + angle.sin() * end


def picture(images, rows=1):
    """float (N, C, H, W) in [-1, 1] -> a PIL image, where image i is in row i % rows."""
    from PIL import Image

    pixels = images.mul(127.5).add(128).clamp(0, 255).byte().cpu().expand(-1, 3, -1, -1)
    if len(pixels) > 1:  # a black frame around each, and black images where the last are missing
        pixels = F.pad(pixels, (1, 1, 1, 1, 0, 0, 0, -len(pixels) % rows))
    return Image.fromarray(rearrange(pixels, "(n r) c h w -> (r h) (n w) c", r=rows).numpy())


@torch.no_grad()
def draw(model, alphas_cumprod, args, y, out):
    """Draw an image for each prompt in y, of tokens. Image i depends only on --seed, i and y[i].

    x.png is a grid, a row per prompt, x.gif the way to it, x/ a file each.
    """
    from common import Progress, noises

    device = alphas_cumprod.device
    indices = range(len(y))
    if out.endswith("/"):
        indices = range(RANK, len(y), WORLD)  # the share of this process
    elif RANK > 0:
        return
    sample = SAMPLERS[args.sampler]
    progress = Progress(len(indices), "images")
    rows = len(args.prompt or set(y))
    if not 1 < rows < len(y) and not args.interpolate:
        rows = round(math.sqrt(len(y)))
    drawn, way = [], []  # the images, in parts, and for a .gif the x_t on the way to a part

    # denoise and noise_stream are those of the part that is being drawn
    def watched(x_t, t):
        progress.add(len(x_t) / args.steps)
        if out.endswith(".gif"):
            way.append(x_t)
        return denoise(x_t, t)

    def randn(x):
        return next(noise_stream)

    for start in range(0, len(indices), args.micro_batch):
        part = indices[start : start + args.micro_batch]
        asked = torch.tensor([y[i] for i in part], device=device)
        denoise = denoiser(model, alphas_cumprod, asked, args.guidance)
        noise_stream = noises(args.seed, part, (CHANNELS, SIZE, SIZE), device)
        if args.interpolate:
            noise_stream = interpolated_noises(args.seed, part, rows, len(y), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            x_t = next(noise_stream)
            images = sample(watched, x_t, alphas_cumprod, args.steps, randn=randn)
        if out.endswith("/"):
            for i, image in zip(part, images, strict=True):
                words = [WORDS[token] for token in y[i] if token]
                picture(image[None]).save(out + "-".join([f"{i:06d}", *words]) + ".png")
        else:
            drawn.append([*way, images])
            way.clear()
    if drawn:
        frames = [torch.cat(frame) for frame in zip(*drawn, strict=True)]
        first, *rest = [picture(images, rows) for images in frames]
        first.save(out, save_all=bool(rest), append_images=rest, duration=60, loop=0)
    print0(out)


@torch.no_grad()
def invert(model, alphas_cumprod, args, y, out):
    """Write a picture of --invert, its noise, it again, and the noise under the other prompts."""
    from common import read_image

    if out.endswith("/") or (Path(out).exists() and Path(out).samefile(args.invert)):
        sys.exit(f"--invert draws one picture: --out {out} must end in .png, and be another file")
    device = alphas_cumprod.device
    try:
        image = read_image(args.invert, SIZE, CHANNELS)[None].to(device) / 127.5 - 1
    except (OSError, ValueError) as error:
        sys.exit(f"--invert {args.invert}: {error}")
    first, *others = torch.tensor(y, device=device)[:, None]
    denoise = denoiser(model, alphas_cumprod, first)  # without guidance, which would not be undone
    noise = ddim_invert(denoise, image, alphas_cumprod, args.steps)
    images = [image, noise, ddim_sample(denoise, noise, alphas_cumprod, args.steps)]
    for tokens in others:
        denoise = denoiser(model, alphas_cumprod, tokens, args.guidance)
        images.append(ddim_sample(denoise, noise, alphas_cumprod, args.steps))
    picture(torch.cat(images)).save(out)
    print0(out)


# ---- Training


class Muon(torch.optim.Optimizer):
    """Orthogonal momentum (kellerjordan.github.io/posts/muon). PyTorch's is always in bfloat16."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {w.shape for w in group["params"]}:  # all of a shape at once, for the GPU
            ws = [w for w in group["params"] if w.shape == shape]
            grads = torch.stack([w.grad.reshape(len(w), -1) for w in ws])
            momenta = self.state[ws[0]].setdefault("momenta", torch.zeros_like(grads))
            momenta.lerp_(grads, 0.05)
            x = grads.lerp(momenta, 0.95)  # Nesterov's
            rows, columns = x.shape[1:]
            if rows in (3 * columns, 6 * columns):  # several in one, such as q, k and v
                x = x.reshape(-1, columns, columns)
            x = F.normalize(x, dim=(1, 2))
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            for _ in range(5):  # Newton-Schulz steps, towards singular values that are all 1
                gram = x @ x.mT
                gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                x = torch.baddbmm(x, gram, x, beta=3.4445)
            x = x.mT if tall else x
            size = 0.2 * group["lr"] * math.sqrt(max(x.shape[1:]))  # as Adam's (2502.16982)
            torch._foreach_sub_(ws, list(x.reshape(-1, *shape)), alpha=size)


def learning_rate(step, args):
    """Warm up, fall with 1 / sqrt(step), and fall linearly to 0 over the last fifth."""
    lr = args.lr * min(step / args.warmup, math.sqrt(args.warmup / step))
    return lr * min(1, 5 * (1 - (step - 1) / args.max_steps))


def on_signals(handler):
    """Use this handler for Ctrl-C and SIGTERM. None: they end the program, as usual."""
    if WORLD == 1:  # with more processes they always do, and --resume goes back to the last save
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


def save(state, saved, run_dir):
    """Write the state of a run, with that of its networks and optimizers, and log.csv."""
    if RANK > 0:
        return
    state_dicts = {name: part.state_dict() for name, part in saved.items()}
    torch.save(state | state_dicts, run_dir / "ckpt.tmp")
    os.replace(run_dir / "ckpt.tmp", run_dir / "ckpt.pt")  # no kill leaves half a file
    with open(run_dir / "log.csv", "w", newline="") as file:
        log = csv.DictWriter(file, state["log"][-1], extrasaction="ignore", lineterminator="\n")
        log.writeheader()
        log.writerows(state["log"])


@torch.no_grad()
def validate(model, test_set, alphas_cumprod, autocast):
    """The loss on the same 256 test images and uniform times; nan without a test set."""
    from common import batch

    if not test_set:
        return math.nan
    x0, y, t, noise, u = batch(*test_set, T, 256, seed=0, step=0)
    x0, y = illustrate(x0, y, u)
    with autocast:
        return loss(model, x0, y, t, noise, alphas_cumprod).item()


def train(args, state, device):
    """Step n depends on --seed, n and the state alone: not on stops, nor on how many processes."""
    from common import Progress, batch, load_data

    train_set, test_set, class_names = load_data(DATA, args.data_dir, SIZE, CHANNELS, device)
    if len(class_names) > len(DIGITS):
        sys.exit(f"--data-dir {args.data_dir}: {len(class_names)} classes, and words for ten")
    run_dir = Path(args.run_dir).expanduser()
    torch.manual_seed(args.seed)  # the same first weights in every process
    model = UNet(args.dim).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = Muon(model.parameters(), {"lr": args.lr})  # takes a bias as a matrix, too
    saved = {"model": model, "ema": ema, "optimizer": optimizer}
    if state:
        for name, part in saved.items():
            part.load_state_dict(state[name])
    else:
        state = {"step": 0, "images": 0, "seconds": 0.0, "log": []}
    state["config"] = {**vars(args), "script": NAME, "class_names": class_names}
    state["config"]["meaning"] = meaning()
    millions = sum(map(torch.numel, model.parameters())) / 1e6
    print0(f"{millions:.2f} M parameters, {len(train_set[0])} images, from step {state['step']}")

    net = torch.compile(model, disable=not args.compile)
    if WORLD > 1:
        net = nn.parallel.DistributedDataParallel(net)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    alphas_cumprod = schedule(device)
    progress = Progress(args.max_steps - state["step"], "steps")
    stopped = []  # the signals that came
    losses, start = [], time.perf_counter()
    for step in range(state["step"] + 1, args.max_steps + 1):
        on_signals(lambda *caught: stopped.append(caught))  # this step is finished and saved first
        x0, y, t, noise, u = batch(*train_set, T, args.batch_size, args.seed, step, RANK, WORLD)
        x0, y = illustrate(x0, y, u)
        train_loss = 0.0
        for i in range(0, len(x0), args.micro_batch):
            part = slice(i, i + args.micro_batch)
            with autocast:
                part_loss = loss(net, x0[part], y[part], t[part], noise[part], alphas_cumprod)
            part_loss = part_loss * len(x0[part]) / len(x0)  # so that gradients add up
            part_loss.backward()
            train_loss += part_loss.detach()
            progress.add(len(x0[part]) / len(x0))
        losses.append(train_loss)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        with autocast:  # for the products in Muon
            optimizer.step()
        optimizer.zero_grad()
        state["step"] = step
        state["images"] += args.batch_size
        half_life = min(args.ema, 0.05 * state["images"])  # short at first: the start was bad
        for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(weight.detach(), 1 - 0.5 ** (args.batch_size / half_life))

        last = step == args.max_steps
        sampling = last or (args.sample_every > 0 and step % args.sample_every == 0)
        saving = bool(stopped) or sampling or step % args.save_every == 0
        if saving or step % args.log_every == 0:  # not at every step: .item() waits for the GPU
            mean_loss = torch.stack(losses).mean() / WORLD
            if WORLD > 1:
                dist.all_reduce(mean_loss)
            weight_norm = sum(weight.detach().norm() for weight in model.parameters())
            if not math.isfinite(mean_loss + grad_norm + weight_norm):
                sys.exit(f"loss or weights not finite at step {step}: try again with a lower --lr")
            elapsed = time.perf_counter() - start
            state["seconds"] += elapsed
            row = {
                "step": step,
                "images": state["images"],
                "loss": round(mean_loss.item(), 5),
                "val_loss": round(validate(ema, test_set, alphas_cumprod, autocast), 5),
                "lr": round(lr, 8),
                "grad_norm": round(grad_norm.item(), 3),
                "images_per_s": round(len(losses) * args.batch_size / elapsed),
                "seconds": round(state["seconds"]),
            }
            state["log"].append(row)
            print0("  ".join(f"{name} {number}" for name, number in row.items()))
            losses, start = [], time.perf_counter()
        if saving:
            save(state, saved, run_dir)
            on_signals(None)  # until the next step, nothing can be lost
            if stopped:
                print0(f"stopped after step {step}; --resume continues")
                break
        if sampling:
            asked = [tokenize(str(i % len(class_names))) for i in range(args.n)]
            draw(ema, alphas_cumprod, args, asked, f"{run_dir}/samples-{step:07d}.png")
            start = time.perf_counter()  # drawing is not training


# ---- The command line


def make_parser():
    parser = argparse.ArgumentParser()
    parser.error = sys.exit  # one line, not a page of usage
    add = parser.add_argument

    def flag(name, default, text, **options):
        text += " (default: %(default)s)"
        add(name, type=type(default), default=default, help=text, **options)

    # drawing: each of the first six asks for it
    add("--sample-only", action="store_true", help="draw and exit; else train and then draw")
    add("--ckpt", help="what to draw from; else the run's own checkpoint, or the shipped one")
    add("--prompt", nargs="+", help='such as "thin red 7 on white"; else all digits; a row each')
    add("--interpolate", action="store_true", help="in each row, from one noise to another")
    add("--invert", help="an image: find its noise, under the first prompt, and redraw it")
    add("--out", help="x.png: a grid, x.gif: the way to it, x/: a file each (samples.png)")
    flag("--sampler", "ddim", "which way to the image", choices=list(SAMPLERS))
    flag("--steps", 20, "of the sampler: ddpm wants more of them")
    flag("--guidance", 3.0, "1 is none, more obeys the prompt more")
    flag("-n", 80, "how many images")
    # training
    flag("--data-dir", "data", "MNIST, or your own images in train/<class>/")
    flag("--run-dir", f"runs/{NAME}", "for ckpt.pt, log.csv and samples")
    add("--resume", action="store_true", help="continue the run in --run-dir, with its flags")
    flag("--batch-size", 64, "images in a step, over all processes")
    flag("--max-steps", 8000, "steps of the whole run")
    flag("--lr", 4e-3, "the highest learning rate")
    flag("--warmup", 100, "steps until it is reached; then it falls with 1 / sqrt(step)")
    flag("--ema", 50000, "half-life of the averaged weights, in images; 5%% of those seen at most")
    flag("--log-every", 100, "steps")
    flag("--save-every", 500, "steps")
    flag("--sample-every", 2000, "steps; 0: only at the end")
    flag("--seed", 0, "of the training, or of the images")
    # the network
    flag("--dim", 48, "channels", choices=[16, 32, 48, 64, 96, 128])
    # the machine
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    device = "cuda" if cuda else "mps" if mps else "cpu"
    flag("--device", device, "where to compute", choices=sorted({device, "cpu"}))
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # only new versions of PyTorch have it
    bfloat16 = cpu.get("avx512_bf16", False)
    if cuda:
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if bfloat16 else "float32"
    flag("--dtype", dtype, "of the network", choices=["float32", "bfloat16"])
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="when training")
    micro_batch = 128 if device == "cpu" else 1024  # so few stay in a CPU's caches
    flag("--micro-batch", micro_batch, "images at a time; a step adds up their gradients")
    return parser


def resume(parser, args, path):
    """The flags and the state of the run that is saved at this path."""
    if not args.resume:
        sys.exit(f"{args.run_dir} holds a run: add --resume, or name another --run-dir")
    _, state = load(path)
    if "log" not in state:
        sys.exit(f"--resume: {path} holds weights alone, no run")
    config = state["config"]
    for flag in ("run_dir", "device", "dtype", "compile", "micro_batch"):  # not those of the run
        config[flag] = vars(args)[flag]
    args = parser.parse_args(namespace=argparse.Namespace(**config))  # what is typed wins
    return args, state


def read_prompts(args, class_names):
    """The tokens of each --prompt. Without any, of all digits; of the empty one for --invert."""
    prompts = args.prompt
    if prompts is None and args.invert:
        prompts = [""]
    elif prompts is None:
        prompts = [str(k) for k in range(len(class_names))]
    try:
        return [tokenize(prompt) for prompt in prompts]
    except ValueError as error:
        sys.exit(f"--prompt: {error}")


def main():
    parser = make_parser()
    args = parser.parse_args()
    drawing = (
        args.sample_only
        or args.interpolate
        or (args.ckpt, args.prompt, args.invert, args.out) != (None, None, None, None)
    )
    out = args.out if args.out is not None else "samples.png"
    if not out.endswith((".png", ".gif", "/")):
        sys.exit(f"--out {out} must end in .png, .gif or /")
    counts = [args.n, args.steps, args.batch_size, args.micro_batch, args.max_steps, args.warmup]
    if min(*counts, args.ema, args.log_every, args.save_every) < 1 or args.steps > T:
        sys.exit(f"numbers of images and steps must be 1 at least, and --steps {T} at most")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    own = Path(args.run_dir, "ckpt.pt").expanduser()
    if drawing:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        shipped = Path(__file__).with_name("checkpoints") / f"{NAME}.pt"
        path = args.ckpt or (own if own.exists() else shipped)
        model, state = load(path)
        y = read_prompts(args, state["config"]["class_names"])
        print0(f"{path}: step {state['step']}")
        if args.invert is not None:
            invert(model.to(device), schedule(device), args, y, out)
        else:
            y = [y[i % len(y)] for i in range(args.n)]
            draw(model.to(device), schedule(device), args, y, out)
    else:
        if args.resume and not own.exists():
            sys.exit(f"--resume: there is no {own}")
        # makes the folder of the run, in which only one may be
        with FileLock(own.with_name(f"lock{RANK}"), timeout=0):
            state = None
            if own.exists():
                args, state = resume(parser, args, own)
            if args.batch_size % WORLD:
                sys.exit(f"--batch-size {args.batch_size} cannot be shared by {WORLD} processes")
            train(args, state, device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a disk that is full, a folder that cannot be written
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
