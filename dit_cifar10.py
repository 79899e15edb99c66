"""Scalable diffusion models with transformers (Peebles & Xie 2022, arXiv 2212.09748) on CIFAR-10.

The image is cut into patches, one token each, and a plain transformer removes the noise. Time and
class enter through adaLN-Zero: they shift, scale and gate what every block does.

    python dit_cifar10.py --sample-only                      # from your run, or the shipped weights
    python dit_cifar10.py --data-dir data                    # fetch CIFAR-10, train, draw
    torchrun --standalone --nproc_per_node=8 dit_cifar10.py  # the same on eight GPUs
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

NAME = "dit_cifar10"
DATA = "CIFAR10"
CHANNELS = 3
SIZE = 32
T = 1000  # times of the schedule: 0 is almost the image, T - 1 almost noise
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes, set by torchrun
RANK = int(os.environ.get("RANK", 0))


def print0(message):
    if RANK == 0:
        print(message, flush=True)


# ---- The network: a transformer on patches (Peebles & Xie 2022, section 3)


def sinusoids(t, dim):
    """Numbers t (N,) -> (N, dim): sines and cosines at dim / 2 frequencies from 1 to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)  # so that a high learning rate is safe
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D) -> (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        q = self.norm_q(q.float())
        k = self.norm_k(k.float())
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention and MLP; c gives each a shift and a scale before it and a gate after it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):  # (B, N, D), (B, D) -> (B, N, D)
        modulation = self.modulation(c).float()[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """x_t (B, C, H, W), t (B,) in 0..T-1, classes y (B,) -> v, like x_t. Without y: of any class.

    DiT-S/2 has dim 384, depth 12, heads 6, patch 2.
    """

    def __init__(self, dim=256, depth=8, heads=4, patch=2, num_classes=10):
        super().__init__()
        self.patch = patch
        self.nothing = num_classes  # the y that says nothing
        self.embed = nn.Linear(CHANNELS * patch**2, dim)
        side = torch.arange(SIZE // patch)
        row, column = torch.cartesian_prod(side, side).T  # of each patch
        positions = torch.cat([sinusoids(row, dim // 2), sinusoids(column, dim // 2)], dim=1)
        self.register_buffer("positions", positions, persistent=False)  # (N, D)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, CHANNELS * patch**2)
        for name, layer in self.named_modules():
            if name.endswith(("modulation", "head")):
                nn.init.zeros_(layer.weight)  # all gates shut: every block starts as the identity
                nn.init.zeros_(layer.bias)

    def forward(self, x, t, y=None):
        if y is None:
            y = torch.full_like(t, self.nothing)
        c = F.silu(self.time(sinusoids(t, 256)) + self.label(y))  # (B, D)
        p = self.patch
        x = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        x = x + self.positions  # (B, N, D)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).float()[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift).float()  # (B, N, C p p)
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=SIZE // p, p=p, q=p)


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


def denoiser(model, alphas_cumprod, y=None, guidance=1.0, interval=(0.0, 1.0)):
    """denoise(x_t, t) -> x0, by a model that predicts v; t is an int, or without guidance (B,).

    Guidance 1 is none; it is 1 + w in Ho & Salimans 2022 (2207.12598). It acts while t / T is in
    the interval (Kynkaanniemi et al. 2024, 2404.07724).
    """

    def denoise(x_t, t):
        guided = guidance != 1 and min(interval) <= t / len(alphas_cumprod) <= max(interval)
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        v = model(x_t, t, y)
        if guided:
            v_null = model(x_t, t)  # without the class
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


def dpm_solver_sample(denoise, x, alphas_cumprod, steps=12, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2), in even steps of lambda.

    Takes fewer steps than asked for where two of them round to the same time. randn is not used.
    """
    alpha_bar = alphas_cumprod.cpu().double().clamp(max=1 - 1e-7)
    alpha, sigma = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
    lambdas = alpha_bar.logit() / 2  # log(alpha / sigma); below -5.1, x_t is all noise
    targets = torch.linspace(max(lambdas[-1], -5.1), lambdas[0], steps)
    nearest = (lambdas[:, None] - targets).abs().argmin(dim=0)
    times = nearest.unique().flip(0).tolist()  # T - 1 first
    x0_before, h_before = x, math.inf  # h / inf = 0: the first step does not extrapolate
    for t, t_next in pairwise(times):
        x0 = denoise(x, t)
        h = (lambdas[t_next] - lambdas[t]).item()
        d = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = sigma[t_next] / sigma[t] * x - alpha[t_next] * math.expm1(-h) * d
        x0_before, h_before = x0, h
    return denoise(x, times[-1])


ddpm_sample = partial(ddim_sample, eta=1.0)
SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample, "dpm": dpm_solver_sample}


def meaning():
    """A fingerprint of schedule, loss and denoiser, measured with a network that returns x_t.

    Weights are saved with it; a script that measures another refuses them. None where there is no
    common.py, because this file was copied alone.
    """
    try:
        alphas_cumprod = schedule()
    except ImportError:
        return None
    x = torch.tensor([0.1, -0.2, 0.3])
    t = torch.tensor([T // 20, T // 2, T - T // 20])
    x0 = denoiser(lambda x_t, t, y: x_t, alphas_cumprod)(x, t)
    error = loss(lambda x_t, t, y: x_t, x, None, t, x.flip(0), alphas_cumprod)
    return [round(number, 4) for number in (*x0.tolist(), error.item())]


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
        shape = [config["dim"], config["depth"], config["heads"], config["patch"]]
        model = DiT(*shape, len(config["class_names"])).eval()
        model.load_state_dict(state["ema"])
        if meaning() not in (None, config["meaning"]):
            raise ValueError("trained with another schedule, loss or denoiser")
    except Exception as error:  # of a dozen kinds, because a file can be damaged in many ways
        reason = " ".join(str(error).partition(". ")[0].split())[:300]  # its first sentence
        sys.exit(f"{path} is not a checkpoint of {NAME}.py: {type(error).__name__}: {reason}")
    return model, state


def picture(images, rows=1):
    """float (N, C, H, W) in [-1, 1] -> a PIL image, where image i is in row i % rows."""
    from PIL import Image

    pixels = images.mul(127.5).add(128).clamp(0, 255).byte().cpu().expand(-1, 3, -1, -1)
    if len(pixels) > 1:  # a black frame around each, and black images where the last are missing
        pixels = F.pad(pixels, (1, 1, 1, 1, 0, 0, 0, -len(pixels) % rows))
    return Image.fromarray(rearrange(pixels, "(n r) c h w -> (r h) (n w) c", r=rows).numpy())


@torch.no_grad()
def draw(model, alphas_cumprod, args, y, out):
    """Draw an image of each class in y. Image i depends only on --seed, i and y[i].

    x.png is a grid, a row per class, x.gif the way to it, x/ a file each.
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
        denoise = denoiser(model, alphas_cumprod, asked, args.guidance, args.guidance_interval)
        noise_stream = noises(args.seed, part, (CHANNELS, SIZE, SIZE), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            x_t = next(noise_stream)
            images = sample(watched, x_t, alphas_cumprod, args.steps, randn=randn)
        if out.endswith("/"):
            for i, image in zip(part, images, strict=True):
                picture(image[None]).save(f"{out}{i:06d}-{y[i]}.png")
        else:
            drawn.append([*way, images])
            way.clear()
    if drawn:
        frames = [torch.cat(frame) for frame in zip(*drawn, strict=True)]
        rows = len(args.classes or set(y))
        if not 1 < rows < len(y):
            rows = round(math.sqrt(len(y)))
        first, *rest = [picture(images, rows) for images in frames]
        first.save(out, save_all=bool(rest), append_images=rest, duration=60, loop=0)
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


def make_optimizers(model, lr):
    """Muon for the matrices inside the network, found by name; Adam for all the others."""
    weights = dict(model.named_parameters())
    inside = ("attention", "mlp", "modulation", "skip")
    names = [n for n, w in weights.items() if w.ndim == 2 and any(part in n for part in inside)]
    matrices = [weights.pop(name) for name in names]
    adam = torch.optim.Adam(weights.values(), lr, fused=True)
    return {"optimizer": adam, "muon": Muon(matrices, {"lr": lr})}


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
    x0, y, t, noise, _ = batch(*test_set, T, 256, seed=0, step=0)
    with autocast:
        return loss(model, x0, y, t, noise, alphas_cumprod).item()


def train(args, state, device):
    """Step n depends on --seed, n and the state alone: not on stops, nor on how many processes."""
    from common import Progress, batch, load_data

    train_set, test_set, class_names = load_data(DATA, args.data_dir, SIZE, CHANNELS, device)
    run_dir = Path(args.run_dir).expanduser()
    torch.manual_seed(args.seed)  # the same first weights in every process
    model = DiT(args.dim, args.depth, args.heads, args.patch, len(class_names)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, args.lr)
    saved = {"model": model, "ema": ema, **optimizers}
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
        y[u[:, 0] < 0.1] = model.nothing  # a tenth without a class, for guidance
        x0 = torch.where(u[:, 1, None, None, None] < 0.5, x0.flip(-1), x0)
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
        for optimizer in optimizers.values():
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
            asked = [i % len(class_names) for i in range(args.n)]
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

    # drawing: each of the first four asks for it
    add("--sample-only", action="store_true", help="draw and exit; else train and then draw")
    add("--ckpt", help="what to draw from; else the run's own checkpoint, or the shipped one")
    add("--classes", type=int, nargs="+", help="numbers of the classes to draw; else all of them")
    add("--out", help="x.png: a grid, x.gif: the way to it, x/: a file each (samples.png)")
    flag("--sampler", "dpm", "which way to the image", choices=list(SAMPLERS))
    flag("--steps", 12, "of the sampler: ddim wants 50, ddpm 250")
    flag("--guidance", 3.0, "1 is none, more obeys the class more")
    interval = "guide at these t / T (default: 0.2 0.8)"
    add("--guidance-interval", type=float, nargs=2, default=(0.2, 0.8), help=interval)
    flag("-n", 100, "how many images")
    # training
    flag("--data-dir", "data", "CIFAR-10, or your own images in train/<class>/")
    flag("--run-dir", f"runs/{NAME}", "for ckpt.pt, log.csv and samples")
    add("--resume", action="store_true", help="continue the run in --run-dir, with its flags")
    flag("--batch-size", 256, "images in a step, over all processes")
    flag("--max-steps", 80000, "steps of the whole run")
    flag("--lr", 6e-3, "the highest learning rate")
    flag("--warmup", 500, "steps until it is reached; then it falls with 1 / sqrt(step)")
    flag("--ema", 500000, "half-life of the averaged weights, in images; 5%% of those seen at most")
    flag("--log-every", 100, "steps")
    flag("--save-every", 500, "steps")
    flag("--sample-every", 2000, "steps; 0: only at the end")
    flag("--seed", 0, "of the training, or of the images")
    # the network
    flag("--dim", 256, "channels of a token")
    flag("--depth", 8, "blocks")
    flag("--heads", 4, "attention heads")
    flag("--patch", 2, "side of a token, in pixels", choices=[1, 2, 4, 8, 16])
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
    micro_batch = 16 if device == "cpu" else 1024  # so few stay in a CPU's caches
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


def main():
    parser = make_parser()
    args = parser.parse_args()
    drawing = args.sample_only or (args.ckpt, args.classes, args.out) != (None, None, None)
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
        names = state["config"]["class_names"]
        classes = args.classes or range(len(names))
        if not 0 <= min(classes) <= max(classes) < len(names):
            sys.exit(f"--classes {classes}: there are {dict(enumerate(names))}")
        y = [classes[i % len(classes)] for i in range(args.n)]
        print0(f"{path}: step {state['step']}")
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
            if args.dim % 4 or args.dim % args.heads:
                sys.exit(f"--dim {args.dim} must be a multiple of 4 and of --heads {args.heads}")
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
