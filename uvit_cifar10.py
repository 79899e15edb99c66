"""U-ViT: all are worth words (Bao et al. 2022, arXiv 2209.12152) on CIFAR-10.

Everything is a token: the patches, the time, the class. A plain transformer takes the noise away,
and long skips from its first half to its second, as in a UNet, carry details past the middle.

    python uvit_cifar10.py --sample-only                      # draw from the run, or as shipped
    python uvit_cifar10.py --data-dir data                    # fetch CIFAR-10, train, draw
    torchrun --standalone --nproc_per_node=8 uvit_cifar10.py  # the same on eight GPUs
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock
from torch import nn
from torch.nn.parallel import DistributedDataParallel

NAME = Path(__file__).stem
DATA, CHANNELS, SIZE = "CIFAR10", 3, 32
T = 1000  # times of the schedule: 0 is almost the image, T - 1 almost noise
LAMBDA_MIN = -5.1  # where dpm starts: below this log(alpha / sigma), x_t is all noise
SHAPE = ["dim", "depth", "heads", "patch"]  # the flags that shape the network
# The flags that --resume takes from the checkpoint, where none is typed: numbers and texts only.
RUN = [*SHAPE, "data_dir", "batch_size", "max_steps", "lr", "warmup", "ema", "seed"]
RUN += ["log_every", "save_every", "sample_every"]
# What the numbers in a checkpoint mean: change an entry with the thing it names.
MEANING = {"script": NAME, "data": DATA, "size": SIZE, "channels": CHANNELS, "T": T}
MEANING |= {"schedule": "cosine", "predicts": "v"}
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes, by torchrun; without it there is one
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0

# ---- The network: a transformer on patches, time and class (Bao et al. 2022, section 3)


def timestep_embedding(t, dim):
    """int64 (B,) -> (B, dim): sines and cosines at dim / 2 frequencies from 1 to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)  # so that a high learning rate is safe
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D) -> (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        q = self.norm_q(q.float()).type_as(v)
        k = self.norm_k(k.float()).type_as(v)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention and MLP. In the second half, what the long skip brings is mixed in first."""

    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, skip=None):  # (B, N, D) -> (B, N, D)
        if self.skip:
            x = self.skip(torch.cat([x, skip], dim=-1))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """x_t (B, C, H, W), t (B,), y (B,) -> v, like x_t. y = num_classes, the default, is no class.

    U-ViT-S/2 has dim 512, depth 12, heads 8, patch 2. Raises ValueError for another image size.
    """

    def __init__(self, dim=256, depth=8, heads=4, patch=2, num_classes=10):
        super().__init__()
        self.dim = dim
        self.patch = patch
        self.side = SIZE // patch  # patches along a side
        self.num_classes = num_classes

        self.embed = nn.Linear(CHANNELS * patch**2, dim)
        self.label = nn.Embedding(num_classes + 1, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(2 + self.side**2, dim))
        self.down = nn.ModuleList(Block(dim, heads) for _ in range(depth // 2))
        self.middle = Block(dim, heads)
        self.up = nn.ModuleList(Block(dim, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CHANNELS * patch**2)
        self.smooth = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)  # no seams between the patches

    def forward(self, x, t, y=None):
        if x.shape[1:] != (CHANNELS, SIZE, SIZE):
            raise ValueError(f"images are {(CHANNELS, SIZE, SIZE)} here, not {tuple(x.shape[1:])}")
        if y is None:
            y = torch.full_like(t, self.num_classes)
        time_and_class = torch.stack([timestep_embedding(t, self.dim), self.label(y)], dim=1)
        p = self.patch
        x = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        x = torch.cat([time_and_class, x], dim=1) + self.positions  # (B, 2 + N, D)
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(x, skips.pop())
        x = self.head(self.norm(x))[:, 2:]
        x = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=self.side, p=p, q=p)
        return self.smooth(x).float()


# ---- Diffusion: the loss, the denoiser, and the samplers, which know of no network


def schedule(device="cpu"):
    """alphas_cumprod (T,): the share of the image's variance that is left at each time."""
    from common import alpha_bar, cosine_betas  # here: the rest needs no common.py

    return alpha_bar(cosine_betas(T)).to(device)


def loss(model, x0, y, t, noise, alphas_cumprod):
    """Ho et al. 2020, algorithm 1: mix images with noise, and ask the network which is which.

    x0 and noise (B, C, H, W), y and t (B,), alphas_cumprod (T,) -> a scalar. What the network
    predicts is v (Salimans & Ho 2022, 2202.00512). For another, change `denoiser` and MEANING, too.
    """
    a = alphas_cumprod[t][:, None, None, None]
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise  # eq. 4
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    return F.mse_loss(model(x_t, t, y), v)


def denoiser(model, alphas_cumprod, y=None, guidance=1.0, interval=(0.0, 1.0)):
    """denoise(x_t, t) -> x0 in [-1, 1], for a model(x_t, t, y) that predicts v.

    Guidance 1 is none; it is 1 + w in Ho & Salimans 2022 (2207.12598) and needs y. It acts while
    t[0] / T is in `interval` (Kynkaanniemi et al. 2024, 2404.07724), as if all t were alike.
    """

    def denoise(x_t, t):
        low, high = sorted(interval)
        if guidance == 1 or not low <= t[0] / T <= high:
            v = model(x_t, t, y)
        else:  # with and without the class, in one batch
            null = torch.full_like(y, model.num_classes)
            both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]))
            v, v_null = both.chunk(2)
            v = v_null + guidance * (v - v_null)
        a = alphas_cumprod[t][:, None, None, None]
        return (a.sqrt() * x_t - (1 - a).sqrt() * v).clamp(-1, 1)

    return denoise


def timestep_pairs(T, steps):
    """[(t, t_next), ..]: equal strides from T - 1 to -1, the clean image (2305.08891, table 2)."""
    ts = [round(T * i / steps) - 1 for i in range(steps, -1, -1)]
    return list(pairwise(ts))


def ddpm_sample(denoise, x, alphas_cumprod, steps=1000, randn=torch.randn_like):
    """Ho et al. 2020, algorithm 2: draw each x_{t_next} from q(x_{t_next} | x_t, x0).

    As in all SAMPLERS, x is noise (B, C, H, W), denoise(x_t, t >= 0) gives x0, randn(x) noise.
    """
    alpha_bar = [*alphas_cumprod.tolist(), 1.0]  # at -1 the clean image's: not alphas_cumprod[-1]
    for t, t_next in timestep_pairs(len(alphas_cumprod), steps):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x0 = denoise(x, torch.full(x.shape[:1], t, device=x.device))
        beta = 1 - a / a_next
        shrink = (1 - a_next) / (1 - a)
        x = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * shrink * x  # eq. 7
        if t_next >= 0:
            x = x + math.sqrt(shrink * beta) * randn(x)
    return x


def ddim_sample(denoise, x, alphas_cumprod, steps=50, eta=0.0, randn=torch.randn_like):
    """Song et al. 2020 (2010.02502), eq. 12. With eta = 0 it solves an ODE; eta = 1 is DDPM."""
    alpha_bar = [*alphas_cumprod.tolist(), 1.0]
    for t, t_next in timestep_pairs(len(alphas_cumprod), steps):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x0 = denoise(x, torch.full(x.shape[:1], t, device=x.device))
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))  # eq. 16
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * randn(x)
    return x


def dpm_solver_sample(denoise, x, alphas_cumprod, steps=15, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2), in even steps of lambda.

    Draws no noise. Takes fewer steps than asked for where two of them round to the same time.
    """
    # finite where alpha-bar is 1; on the CPU, for an Apple GPU has no float64
    alpha_bar = alphas_cumprod.cpu().double().clamp(max=1 - 1e-7)
    lambdas = alpha_bar.logit() / 2  # log(alpha / sigma)
    first = max(lambdas[-1], LAMBDA_MIN)
    targets = torch.linspace(first, lambdas[0], max(steps, 2))[:steps]
    ts = sorted({(lambdas - target).abs().argmin().item() for target in targets}, reverse=True)
    x0_before = h_before = None
    for t, t_next in pairwise(ts):
        a, a_next = alpha_bar[t].item(), alpha_bar[t_next].item()
        x0 = denoise(x, torch.full(x.shape[:1], t, device=x.device))
        h = (lambdas[t_next] - lambdas[t]).item()
        d = x0
        if x0_before is not None:  # extrapolate from this estimate and the one before
            d = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = math.sqrt((1 - a_next) / (1 - a)) * x - math.sqrt(a_next) * math.expm1(-h) * d
        x0_before, h_before = x0, h
    return denoise(x, torch.full(x.shape[:1], ts[-1], device=x.device))


SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample, "dpm": dpm_solver_sample}

# ---- Files and messages


def print0(message):
    if RANK == 0:
        print(message, flush=True)


def fail(message):
    """For what the user can put right: one line and exit code 2, no traceback."""
    line = "".join(c if c.isprintable() else " " for c in str(message))  # no escape codes
    print(f"{NAME}.py: {' '.join(line.split())[:300]}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def replacing(path):
    """Yield a temporary path and, at the end, move it to `path`: no kill leaves half a file."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # it may be a link to somewhere else
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where a disk is full
        fail(f"cannot write {path}: {error}")


def load(path):
    """(the network of averaged weights, the whole dict) that train() saved. Runs no code of it."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load ignores checksums
            raise ValueError("it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = state["config"], state["ema"]
        if config["meaning"] != MEANING:
            raise ValueError(f"it means {dict(config['meaning'].items() - MEANING.items())}")
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("its weights are not finite")
        shape = [int(config[flag]) for flag in SHAPE]
        model = UViT(*shape, len(config["names"])).eval()
        model.load_state_dict(weights)
    except Exception as error:  # of a dozen kinds, for a file can be damaged in many ways
        fail(f"{path} is not a checkpoint of {NAME}.py: {type(error).__name__}: {error}")
    return model, state


# ---- Drawing


@torch.no_grad()
def draw(model, args, classes, index, looks=1):
    """Images (looks, B, C, H, W): so many looks at the way from noise, the last at its end."""
    from common import noises

    device = next(model.parameters()).device
    alphas_cumprod = schedule(device)
    y = torch.tensor([classes[i % len(classes)] for i in index], device=device)
    denoise = denoiser(model, alphas_cumprod, y, args.guidance, args.guidance_interval)
    noise = noises(args.seed, index, (CHANNELS, SIZE, SIZE), device)
    frames = []

    def watched(x_t, t):
        if looks > 1:
            frames.append(x_t)
        return denoise(x_t, t)

    options = {"eta": args.eta} if args.eta else {}
    options |= {"steps": args.steps, "randn": lambda x: next(noise)}
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        frames.append(SAMPLERS[args.sampler](watched, next(noise), alphas_cumprod, **options))
    return torch.stack([frames[(len(frames) - 1) * (i + 1) // looks] for i in range(looks)])


def picture(images, rows=1):
    """float (N, C, H, W) in [-1, 1] -> a PIL image, where image i is in row i % rows."""
    from PIL import Image

    pixels = images.mul(127.5).add(128).clamp(0, 255).byte().cpu().expand(-1, 3, -1, -1)
    if len(pixels) > 1:  # a black frame around each, and black where the last column has none
        pixels = F.pad(pixels, (1, 1, 1, 1, 0, 0, 0, -len(pixels) % rows))
    return Image.fromarray(rearrange(pixels, "(n r) c h w -> (r h) (n w) c", r=rows).numpy())


def write(model, args, classes, out, n):
    """Draw n images. x.png is a grid, a row per class, x.gif the way to it, x/ a file each."""
    looks = min(50, args.steps) if out.endswith(".gif") else 1
    index = range(RANK, n, WORLD) if out.endswith("/") else range(n)  # files: a share each
    drawn = []
    for start in range(0, len(index), args.batch_size):
        part = index[start : start + args.batch_size]
        drawn.append(draw(model, args, classes, part, looks).cpu())
        print0(f"{start + len(part)} of {len(index)} images")
        if out.endswith("/"):
            for i, image in zip(part, drawn.pop()[0], strict=True):
                with replacing(f"{out}{i:06d}-{classes[i % len(classes)]}.png") as path:
                    picture(image[None]).save(path, "PNG")
    if drawn and RANK == 0:
        rows = len(classes) if 1 < len(classes) < n else round(math.sqrt(n))
        first, *rest = [picture(images, rows) for images in torch.cat(drawn, dim=1)]
        moving = {"save_all": True, "append_images": rest, "duration": 60, "loop": 0}
        with replacing(out) as path:
            first.save(path, out[-3:], **(moving if rest else {}))
    print0(out)


# ---- Training


class Muon(torch.optim.Optimizer):
    """Orthogonal momentum (kellerjordan.github.io/posts/muon). PyTorch's is in bfloat16 only."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for shape in {w.shape for w in group["params"]}:  # weight by weight, a GPU would idle
            ws = [w for w in group["params"] if w.shape == shape]
            grads = torch.stack([w.grad.reshape(len(w), -1) for w in ws])
            momenta = self.state[ws[0]].setdefault("momenta", torch.zeros_like(grads))
            momenta.lerp_(grads, 0.05)
            x = F.normalize(grads.lerp(momenta, 0.95), dim=(1, 2))  # Nesterov's
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            for _ in range(5):  # Newton-Schulz steps, towards singular values that are all 1
                gram = x @ x.mT
                gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                x = torch.baddbmm(x, gram, x, beta=3.4445)
            x = x.mT if tall else x
            size = 0.2 * group["lr"] * math.sqrt(max(x.shape[1:]))  # of Adam's steps (2502.16982)
            torch._foreach_sub_(ws, list(x.reshape(-1, *shape)), alpha=size)


def make_optimizers(model, lr):
    """Muon for the matrices of attention, MLP and skip, found by name; Adam for all the others."""
    weights = dict(model.named_parameters())
    names = [n for n in weights if "attention" in n or "mlp" in n or "skip" in n]
    matrices = [weights.pop(name) for name in names if weights[name].ndim == 2]
    adam = torch.optim.Adam(weights.values(), lr, fused=matrices[0].device.type != "mps")
    return {"optimizer": adam, "muon": Muon(matrices, {"lr": lr})}


def learning_rate(step, args):
    """Warm up, fall with 1 / sqrt(step), and go in a line to 0 over the last fifth of the run."""
    lr = args.lr * min(step / args.warmup, math.sqrt(args.warmup / step))
    return lr * min(1, 5 * (1 - (step - 1) / args.max_steps))


def train(args, state, device):
    """Train from scratch, or go on from the state of a run.

    Step n is a function of (--seed, n) and the weights, in however many goes and processes.
    """
    from common import batch, load_data

    try:
        train_set, test_set, names = load_data(DATA, args.data_dir, SIZE, CHANNELS, device)
    except (OSError, ValueError) as error:
        fail(f"--data-dir {args.data_dir}: {error}")

    torch.manual_seed(args.seed)  # the same first weights in every process
    model = UViT(args.dim, args.depth, args.heads, args.patch, len(names)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    averages = list(ema.parameters())
    weights = [w.detach() for w in model.parameters()]
    optimizers = make_optimizers(model, args.lr)
    parts = {"model": model, "ema": ema, **optimizers}
    header = "step,images,loss,val_loss,lr,grad_norm,images_per_s,seconds"
    progress = {"step": 0, "images": 0, "seconds": 0.0, "log": [header]}
    config = {**vars(args), "script": NAME, "names": names, "meaning": MEANING}
    if state:
        for key in [*SHAPE, "names"]:
            if config[key] != state["config"][key]:
                fail(f"--resume: {key} was {state['config'][key]}, and a run keeps it")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        progress = {name: state[name] for name in progress}
    print0(f"{len(train_set[0])} images of {len(names)} classes, {names[0]} to {names[-1]}")
    size = f"{sum(map(torch.numel, weights)) / 1e6:.2f} M parameters"
    print0(f"{size}, {args.dtype}, {device.type} x {WORLD}, from step {progress['step']}")

    net = torch.compile(model, disable=not args.compile)
    if WORLD > 1:
        net = DistributedDataParallel(net)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    alphas_cumprod = schedule(device)
    signals = []
    if WORLD == 1:  # Ctrl-C, or a cluster's SIGTERM: finish the step, save and leave
        signal.signal(signal.SIGINT, lambda *caught: signals.append(caught))
        signal.signal(signal.SIGTERM, lambda *caught: signals.append(caught))

    recent, start = [], time.perf_counter()
    for step in range(progress["step"] + 1, args.max_steps + 1):
        x0, y, t, noise, u = batch(*train_set, T, args.batch_size, args.seed, step, RANK, WORLD)
        mirrored = u[:, 1, None, None, None] < 0.5
        x0 = torch.where(mirrored, x0.flip(-1), x0)
        y = torch.where(u[:, 0] < 0.1, len(names), y)  # a tenth without a class, for guidance
        with autocast:
            value = loss(net, x0, y, t, noise, alphas_cumprod)
        value.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(step, args)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast:  # for the products in Muon
                optimizer.step()
            optimizer.zero_grad()
        progress["step"] = step
        progress["images"] += args.batch_size
        # parameters, no buffers; the half-life, in images, grows so that the bad start is forgotten
        half_life = min(args.ema, 0.05 * progress["images"])
        torch._foreach_lerp_(averages, weights, 1 - 0.5 ** (args.batch_size / half_life))
        recent.append(torch.stack([value.detach(), grad_norm]))

        last = signals or step == args.max_steps
        saving = last or step % args.save_every == 0
        if saving or step % args.log_every == 0:  # not at every step, for here the host waits
            mean = torch.stack(recent).mean(dim=0)
            if WORLD > 1:
                dist.all_reduce(mean)
            train_loss, grad_norm = (mean / WORLD).tolist()
            if not math.isfinite(train_loss + grad_norm + sum(torch._foreach_norm(weights))):
                fail(f"loss or weights not finite at step {step}: --resume with a lower --lr")
            val_loss = math.nan
            if test_set:
                with autocast, torch.no_grad():
                    x0, y, t, noise, _ = batch(*test_set, T, 256, seed=0, step=0)
                    val_loss = loss(ema, x0, y, t, noise, alphas_cumprod).item()
            elapsed = time.perf_counter() - start
            pace = len(recent) * args.batch_size / elapsed
            minutes = (args.max_steps - step) / len(recent) * elapsed / 60
            progress["seconds"] += elapsed
            row = f"{step},{progress['images']},{train_loss:.5f},{val_loss:.5f},{lr:g},"
            row += f"{grad_norm:.3f},{pace:.0f},{progress['seconds']:.0f}"
            progress["log"].append(row)
            speed = f"{pace:.0f} images/s  {minutes:.1f} min left"
            print0(f"step {step}  loss {train_loss:.4f}  validation {val_loss:.4f}  {speed}")
            recent, start = [], time.perf_counter()
        if saving and RANK == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            with replacing(Path(args.run_dir, "ckpt.pt")) as path:
                torch.save({**state, **progress, "config": config}, path)
            with replacing(Path(args.run_dir, "log.csv")) as path:
                path.write_text("\n".join(progress["log"]) + "\n")
        if signals:
            print0(f"stopped after step {step}; --resume continues")
            break
        if last or (args.sample_every and step % args.sample_every == 0):
            out = f"{args.run_dir}/samples-{step:07d}.png"
            write(ema, args, range(len(names)), out, args.n)


# ---- The command line


def within(low, high, kind=float):
    """A type for argparse: a number from low to high, and so never a nan."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)

    return number


def make_parser():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail  # a line, not a page of usage
    count, share = within(1, 1e9, int), within(0, 1)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()

    add = parser.add_argument_group("drawing").add_argument
    add("--sample-only", action="store_true", help="draw and exit; else train and then draw")
    add("--ckpt", help="what to draw from; else the run's own checkpoint, or the shipped one")
    add("--sampler", choices=list(SAMPLERS), default="dpm", help="which way to the image")
    add("--steps", type=within(1, T, int), default=15, help="ddim wants 50, ddpm 250")
    add("--eta", type=share, default=0.0, help="noise in ddim: 0 is none, 1 is ddpm")
    add("--classes", type=int, nargs="+", help="numbers of the classes to draw, else all of them")
    add("--guidance", type=within(0, 1e3), default=3.0, help="1 is none, more obeys the class more")
    add("--guidance-interval", type=share, nargs=2, default=(0.2, 0.8), help="guide at these t / T")
    add("-n", "--n", type=count, default=100, help="how many images")
    add("--out", default="samples.png", help="x.png a grid, x.gif the way to it, x/ a file each")

    add = parser.add_argument_group("training").add_argument
    add("--data-dir", default="data", help="CIFAR-10, or your own images in train/<class>/")
    add("--run-dir", default=f"runs/{NAME}", help="for ckpt.pt, log.csv and samples")
    add("--resume", action="store_true", help="continue the run in --run-dir, with its flags")
    add("--batch-size", type=count, default=256, help="images, over all processes")
    add("--max-steps", type=count, default=80000, help="to train in all")
    add("--lr", type=within(0, 10), default=6e-3, help="the highest learning rate")
    add("--warmup", type=count, default=500, help="steps up to it")
    add("--ema", type=count, default=500000, help="half-life of averaged weights, in images")
    add("--log-every", type=count, default=100, help="steps")
    add("--save-every", type=count, default=500, help="steps")
    add("--sample-every", type=within(0, 1e9, int), default=2000, help="steps, 0 is never")
    add("--seed", type=within(0, 2**31, int), default=0, help="of the training, or of the images")

    add = parser.add_argument_group("network, and machine (which --resume forgets)").add_argument
    add("--dim", type=count, default=256, help="channels of a token")
    add("--depth", type=count, default=8, help="blocks beside the middle one")
    add("--heads", type=count, default=4, help="of attention")
    add("--patch", type=int, choices=[1, 2, 4, 8, 16], default=2, help="side of a token, in pixels")
    device = "cuda" if cuda else "mps" if mps else "cpu"
    add("--device", choices=sorted({device, "cpu"}), default=device, help="where to compute")
    dtype = "bfloat16" if cuda else "float32"
    add("--dtype", choices=["float32", "bfloat16"], default=dtype, help="of the network")
    add("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="when training")
    return parser


def find_checkpoint(args, drawing):
    """Where to draw from, or what to resume; None where a new run begins."""
    own = Path(args.run_dir, "ckpt.pt")
    if drawing:
        shipped = Path(__file__).with_name("checkpoints") / f"{NAME}.pt"
        return args.ckpt or (own if os.path.exists(own) else shipped)
    if not args.resume and (os.path.exists(own) or os.path.exists(own.with_name("log.csv"))):
        fail(f"{args.run_dir} holds a run: add --resume, or name another --run-dir")
    return own if os.path.exists(own) and args.resume else None


def check(args, drawing):
    """Fail where flags do not fit together."""
    if args.batch_size % WORLD and not drawing:
        fail(f"--batch-size {args.batch_size} cannot be shared by {WORLD} processes")
    if args.dim % 2 or args.dim % args.heads:
        fail(f"--dim {args.dim} must be a multiple of 2 and of --heads {args.heads}")
    if args.depth % 2:
        fail(f"--depth {args.depth} must be even: half before the middle block, half after")
    if args.eta and args.sampler != "ddim":
        fail(f"--eta is for --sampler ddim, and there is none in {args.sampler}")
    if not args.out.endswith((".png", ".gif", "/")):
        fail(f"--out {args.out} must end in .png, .gif or /")
    folder = next(p for p in Path(f"{args.out}x").absolute().parents if os.path.exists(p))
    if not os.access(f"{folder}/", os.W_OK):
        fail(f"--out {args.out}: {folder} is no folder that can be written to")


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # no letter of a name may end a run
    signal.signal(signal.SIGINT, lambda *caught: sys.exit(130))  # without a traceback
    parser = make_parser()
    args = parser.parse_args()
    drawing = args.sample_only or args.ckpt
    path = find_checkpoint(args, drawing)
    model, state = load(path) if path else (None, None)
    if state and not drawing:
        if "images" not in state:
            fail(f"--resume: {path} holds weights alone, or a run of an older version")
        parser.set_defaults(**{flag: str(state["config"][flag]) for flag in RUN})  # as if typed
        args = parser.parse_args()
    check(args, drawing)

    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if drawing:
        names = state["config"]["names"]
        classes = args.classes or range(len(names))
        if not 0 <= min(classes) <= max(classes) < len(names):
            fail(f"--classes {classes}: there are {dict(enumerate(names))}")
        print0(f"{path}: step {state.get('step')!r}")
        write(model.to(device), args, classes, args.out, args.n)
    else:
        lock = FileLock(Path(args.run_dir, f"lock{RANK}"))  # held until this process ends
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            fail(f"{args.run_dir}: another run is in it, or it cannot be written ({error})")
        train(args, state, device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
