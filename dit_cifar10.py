"""Scalable diffusion models with transformers (Peebles & Xie 2022, arXiv 2212.09748) on CIFAR-10, all in this file.

Cut the pixels into patches, a token each, and let a plain transformer take the noise away. Time and class enter through
adaLN-Zero: they shift, scale and gate what every block does, and at first all gates are shut. It predicts v.

    python dit_cifar10.py --sample-only                      # draw from the shipped checkpoint, a row per class
    python dit_cifar10.py --data-dir data                    # fetch CIFAR-10, train, draw
    torchrun --standalone --nproc_per_node=8 dit_cifar10.py  # the same on eight GPUs
"""

import argparse, contextlib, copy, functools, math, os, re, shutil, signal, sys, time, zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

NAME, T, CHANNELS, SIZE = Path(__file__).stem, 1000, 3, 32

# ---- The network: a transformer on patches (Peebles & Xie 2022, section 3)
def zero(layer):  # so that a block starts as the identity, and a deep stack of them learns at once
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer

def timestep_embedding(t, dim):
    """int64 (B,) -> (B, dim): sines and cosines at dim / 2 frequencies from 1 to 1/10000 (Vaswani et al. 2017, 3.5)."""
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        slow = q.is_cpu and q.dtype is torch.bfloat16  # where the formula is twice as fast as PyTorch's kernel
        x = (q * q.shape[-1]**-0.5 @ k.mT).softmax(dim=-1) @ v if slow else F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b heads n d -> b n (heads d)"))

class Block(nn.Module):
    """Attention and MLP, each shifted and scaled before and gated after, as the condition says (adaLN-Zero)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = zero(nn.Linear(dim, 6 * dim))  # all gates shut: the block starts as the identity

    def forward(self, x, c):  # (B, N, D), (B, D) -> (B, N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).float()[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

class DiT(nn.Module):
    """x float (B, channels, size, size) in [-1, 1], t int64 (B,) in 0 .. T - 1, y int64 (B,) in 0 .. num_classes (the
    null class, and the default) -> v, float32, of x's shape. DiT-S/2 has dim 384, depth 12, heads 6, patch 2."""
    def __init__(self, dim=256, depth=8, heads=4, patch=2, num_classes=10, channels=CHANNELS, size=SIZE):
        super().__init__()
        self.patch, self.num_classes = dict(p=patch, q=patch), num_classes
        self.embed = nn.Linear(channels * patch**2, dim)
        grid = torch.cartesian_prod(*[torch.arange(size // patch)] * 2).flatten()  # row, column, row, ..
        self.register_buffer("positions", timestep_embedding(grid, dim // 2).view(-1, dim), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding.from_pretrained(0.02 * torch.randn(num_classes + 1, dim), freeze=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation, self.head = zero(nn.Linear(dim, 2 * dim)), zero(nn.Linear(dim, channels * patch**2))

    def forward(self, x, t, y=None):
        y = torch.full_like(t, self.num_classes) if y is None else y
        c = F.silu(self.time(timestep_embedding(t, 256)) + self.label(y))  # (B, D)
        h = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", **self.patch)) + self.positions
        for block in self.blocks:
            h = block(h, c)  # (B, N, D)
        shift, scale = self.modulation(c).float()[:, None].chunk(2, dim=-1)
        h = self.head(self.norm(h) * (1 + scale) + shift)
        return rearrange(h, "b (h w) (c p q) -> b c (h p) (w q)", h=x.shape[2] // self.patch["p"], **self.patch).float()

# ---- The samplers. They know of no network: denoise(x_t, t) gives an estimate of the clean image, x0_hat
def denoiser(model, alphas_cumprod, y=None, guidance=1.0, interval=(0.0, 1.0)):
    """denoise(x_t, t) -> x0_hat in [-1, 1], for a model(x_t, t, y) that predicts v (Salimans & Ho 2022, 2202.00512).
    y: classes (B,), which guidance needs. Guidance 1 leaves v as it is, more moves it away from that of the null class;
    it is 1 + w in Ho & Salimans 2022 (2207.12598), eq. 6. It acts where t / T is in `interval` (2404.07724)."""
    def denoise(x_t, t):  # float (B, C, H, W), int64 (B,)
        alpha_bar, (low, high) = alphas_cumprod.to(t.device)[t][:, None, None, None], interval
        if guidance == 1 or (low, high) != (0, 1) and not low <= t[0].item() / len(alphas_cumprod) <= high:
            v = model(x_t, t, y)
        else:
            null = torch.full_like(y, model.num_classes)
            v, v_null = model(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])).chunk(2)
            v = v_null + guidance * (v - v_null)
        return (alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v).clamp(-1, 1)
    return denoise

def timestep_pairs(T, steps):
    """[(t, t_next), ..]: equal strides from T - 1 to -1, the clean image (Lin et al. 2023, 2305.08891, table 2)."""
    ts = [round(T * i / steps) - 1 for i in range(steps, -1, -1)]
    return list(zip(ts, ts[1:]))

def ddpm_sample(denoise, x, alphas_cumprod, steps=1000, variance="small", randn=torch.randn_like):
    """Ancestral sampling (Ho et al. 2020, algorithm 2): draw each x_{t_next} from q(x_{t_next} | x_t, x0_hat).
    denoise: (float (B, C, H, W), int64 (B,)) -> float (B, C, H, W); x: noise (B, C, H, W); alphas_cumprod: float (T,);
    steps: how many, at most T, or a list of (t, t_next); variance: "small" (beta-tilde) is the posterior's, "large"
    (beta) best where the data are white noise (section 3.2); randn: x -> noise like x. Returns (B, C, H, W)."""
    alpha_bar = alphas_cumprod.tolist() + [1.0]  # so that alpha_bar[-1] is the clean image's
    for t, t_next in steps if isinstance(steps, list) else timestep_pairs(len(alphas_cumprod), steps):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x0 = denoise(x, torch.full((len(x),), t, device=x.device))
        beta, left = 1 - a / a_next, (1 - a_next) / (1 - a)
        x = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * left * x  # eq. 7
        x = x + math.sqrt(beta if variance == "large" else left * beta) * randn(x) if t_next >= 0 else x
    return x

def ddim_sample(denoise, x, alphas_cumprod, steps=50, eta=0.0, randn=torch.randn_like):
    """Denoising diffusion implicit models (Song et al. 2020, 2010.02502, eq. 12): move towards x0_hat, up to t_next.
    The rest is as in ddpm_sample. With eta = 0 no noise is drawn and an ODE is solved; eta = 1 is ddpm_sample."""
    alpha_bar = alphas_cumprod.tolist() + [1.0]
    for t, t_next in steps if isinstance(steps, list) else timestep_pairs(len(alphas_cumprod), steps):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x0 = denoise(x, torch.full((len(x),), t, device=x.device))
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt(max((1 - a_next) / (1 - a) * (1 - a / a_next), 0))  # eq. 16
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * eps
        x = x + sigma * randn(x) if sigma > 0 else x
    return x

def dpm_solver_sample(denoise, x, alphas_cumprod, steps=15, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2): x0_hat is extrapolated from this step and the last.
    The rest is as in ddpm_sample, but `steps` is a number: of times evenly spaced in lambda = log(alpha / sigma), those
    that round to the same t being one. They start at -5.1: a cosine schedule has little but noise before it."""
    alpha_bar = alphas_cumprod.cpu().double()  # in this order: an Apple GPU has no float64
    lambdas = alpha_bar.logit() / 2
    even = torch.linspace(max(lambdas[-1].item(), -5.1), lambdas[0], max(steps, 2), dtype=torch.float64)[:steps]
    ts = sorted({(lambdas - value).abs().argmin().item() for value in even}, reverse=True)
    x0_before = h_before = None
    for t, t_next in zip(ts, ts[1:]):
        x0 = denoise(x, torch.full((len(x),), t, device=x.device))
        a, a_next, h = alpha_bar[t].item(), alpha_bar[t_next].item(), (lambdas[t_next] - lambdas[t]).item()
        d = x0 if x0_before is None else x0 + h / (2 * h_before) * (x0 - x0_before)
        x = math.sqrt((1 - a_next) / (1 - a)) * x - math.sqrt(a_next) * math.expm1(-h) * d
        x0_before, h_before = x0, h
    return denoise(x, torch.full((len(x),), ts[-1], device=x.device))  # first order, to where there is no noise

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon) and
    as large as Adam's steps (2502.16982). torch.optim.Muon is in bfloat16, very slow on a CPU without it."""
    @torch.no_grad()
    def step(self):
        for w in self.param_groups[0]["params"]:  # (m, n)
            momentum = self.state[w].setdefault("momentum", torch.zeros_like(w)).lerp_(w.grad, 0.05)
            x = w.grad.lerp(momentum, 0.95)  # Nesterov's
            x = (x.mT if (tall := len(w) > w.shape[1]) else x) / x.norm().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            w.sub_(x.mT if tall else x, alpha=0.2 * self.param_groups[0]["lr"] * math.sqrt(max(w.shape)))

def train(cfg, state):
    """Ho et al. 2020, algorithm 1. Returns the network of averaged weights, or None if a signal ends the run early.
    Step n is a function of (cfg.seed, n) and the weights it finds, whatever the number of processes and of restarts."""
    from common import alpha_bar, batch, cosine_betas, load_data, min_snr_weights, q_sample, x0_to_v
    torch.manual_seed(cfg.seed % 2**32)  # the same first weights in every process
    with blame(f"--data-dir {cfg.data_dir}"):
        train_set, test_set, cfg.names = load_data("CIFAR10", cfg.data_dir, SIZE, cfg.device)
    cfg.chosen = choose(cfg)
    model = DiT(*(getattr(cfg, name) for name in SHAPE), len(cfg.names)).to(cfg.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    averages, named = list(ema.parameters()), dict(model.named_parameters())
    hidden = {k: w for k, w in named.items() if cfg.muon and w.ndim == 2 and re.search("attention|mlp|skip", k)}
    adam = torch.optim.Adam([w for k, w in named.items() if k not in hidden], fused=cfg.device.type != "mps")
    muon = Muon([dict(params=hidden.values())], {})
    parts, path = dict(model=model, ema=ema, optimizer=adam, muon=muon), Path(cfg.run_dir, "ckpt.pt")
    new = dict(step=0, log=["step,images,loss,val_loss,lr,grad_norm,images_per_s,seconds"], seconds=0.0)
    with blame(f"--resume: {path} does not fit"):
        [part.load_state_dict(state[name]) for name, part in parts.items() if state]
        first, rows, seconds = [(state or new)[name] for name in new]

    def save(step):
        config = dict(script=NAME, names=cfg.names) | {name: getattr(cfg, name) for name in SAVED + SHAPE}
        more = dict(step=step, log=rows, seconds=seconds, config=config, job=os.environ.get("TORCHELASTIC_RUN_ID"))
        with blame(f"{path} cannot be written (disk full?), and what was there still is"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({k: p.state_dict() for k, p in parts.items()} | more, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # so that no kill leaves a torn file
    say = print if cfg.rank == 0 else lambda *_, **__: None
    say(f"{cfg.device.type} x {cfg.world}, {cfg.dtype}, {sum(w.numel() for w in averages) / 1e6:.2f} M parameters")
    say(f"{cfg.data_dir}: {len(train_set[0])} images; {cfg.run_dir}: from step {first} to {cfg.max_steps}", flush=True)
    save(0) if cfg.rank == 0 and not state else None
    alphas_cumprod = alpha_bar(cosine_betas(T)).to(cfg.device)
    weight = min_snr_weights(alphas_cumprod, "v", cfg.min_snr) if cfg.min_snr > 0 else torch.ones_like(alphas_cumprod)
    net = torch.compile(model) if cfg.compile else model
    net = nn.parallel.DistributedDataParallel(net) if cfg.world > 1 else net

    def loss_of(net, data, *which, **share):
        x0, y, t, noise, u = batch(*data, T, *which, **share)
        x_t, y = q_sample(x0, t, noise, alphas_cumprod), torch.where(u < 0.1, len(cfg.names), y)  # for guidance
        with cfg.autocast:
            v = net(x_t, t, y)
        return (weight[t] * (v - x0_to_v(x_t, t, x0, alphas_cumprod)).square().mean(dim=(1, 2, 3))).mean()
    total = (lambda x: dist.all_reduce(x) or x) if cfg.world > 1 else lambda x: x  # over all processes
    stop, recent, tick, ticked = [], [], time.perf_counter(), first
    old = {n: signal.signal(n, lambda *_: stop.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
    for step in range(first + 1, cfg.max_steps + 1):
        # the paper's rate is constant; this one falls, and unlike a cosine it needs no end of the run to aim for
        lr = cfg.lr * min(step / cfg.warmup, math.sqrt(cfg.warmup / step))
        loss = loss_of(net, train_set, cfg.batch_size, cfg.seed, step, flip=True, rank=cfg.rank, world=cfg.world)
        loss.backward()
        recent.append(torch.stack([loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)]))
        adam.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = lr
        adam.step(), cfg.autocast(muon.step)(), model.zero_grad()
        seen = step * cfg.batch_size
        half_life = min(cfg.ema, 0.05 * seen)  # images; it grows with the run, which so forgets its first, bad weights
        torch._foreach_lerp_(averages, [w.data for w in named.values()], 1 - 0.5 ** (cfg.batch_size / half_life))
        leaving = bool(stop) if cfg.world == 1 else step % 10 == 0 and total(torch.tensor(len(stop), device=cfg.device))
        saving = leaving or step == cfg.max_steps or step % cfg.save_every == 0
        reporting = step % cfg.log_every == 0 or step == first + 10
        if saving or reporting:  # not at every step, for here the host waits for the device
            values = total(torch.stack(recent)) / cfg.world
            loss, grad_norm = values.mean(dim=0).tolist()
            if False in (fine := values.isfinite().all(dim=1).tolist()):
                bad = step - len(fine) + 1 + fine.index(False)
                die(f"loss or gradient not finite at step {bad}; {path} is older: try --resume with a lower --lr")
        if reporting:
            val_loss = f"{loss_of(ema, test_set, 256, 0, 0).item():.5f}" if test_set else ""
            elapsed, images = time.perf_counter() - tick, cfg.batch_size * (step - ticked)
            pace, seconds, tick, ticked, recent = images / elapsed, seconds + elapsed, tick + elapsed, step, []
            left = f"{pace:.0f} images/s  {(cfg.max_steps - step) * cfg.batch_size / pace / 60:.1f} min left"
            say(f"step {step}  loss {loss:.4f}  validation {val_loss}  {left}", flush=True)
            rows.append(f"{step},{seen},{loss:.5f},{val_loss},{lr:g},{grad_norm:.3f},{pace:.0f},{seconds:.0f}")
            with blame(f"--run-dir {cfg.run_dir}"):
                Path(cfg.run_dir, "log.csv").write_text("\n".join([*rows, ""])) if cfg.rank == 0 else None
        save(step) if saving and cfg.rank == 0 else None
        if leaving:  # several processes agree on it every ten steps
            return say(f"stopped after step {step}; --resume continues", flush=True)
        if cfg.sample_every and step % cfg.sample_every == 0:
            write(ema, cfg, f"{cfg.run_dir}/samples-{step:07d}.png", min(cfg.n, 100))
    [signal.signal(number, handler) for number, handler in old.items()]  # from here on, they may end the drawing
    return ema

@torch.no_grad()
def draw(model, cfg, index, looks=1):
    """float (looks, len(index), C, H, W): looks at equal distances on the way from noise, the last one at the images.
    Image k is a function of (cfg.seed, index[k]) and its class alone, whatever else is drawn with it."""
    from common import alpha_bar, cosine_betas, noises
    noise = noises(cfg.seed, index, (CHANNELS, SIZE, SIZE), cfg.device)
    alphas_cumprod = alpha_bar(cosine_betas(T)).to(cfg.device)
    y = torch.tensor([cfg.chosen[i % len(cfg.chosen)] for i in index], device=cfg.device)
    denoise, frames = cfg.autocast(denoiser(model, alphas_cumprod, y, cfg.guidance, cfg.guidance_interval)), []
    watch = lambda x_t, t: looks > 1 and frames.append(x_t) or denoise(x_t, t)
    walk = dict(ddpm=ddpm_sample, ddim=functools.partial(ddim_sample, eta=cfg.eta), dpm=dpm_solver_sample)[cfg.sampler]
    frames.append(walk(watch, next(noise), alphas_cumprod, cfg.steps, randn=lambda _: next(noise)))
    return torch.stack([frames[(len(frames) - 1) * (i + 1) // looks] for i in range(looks)])

def save_picture(frames, path, rows=1):
    """float (looks, N, C, H, W) -> a grid, image i in row i % rows, that moves if there are several looks."""
    from PIL import Image
    frames = frames.mul(127.5).add(128).clamp(0, 255).byte().cpu()
    frames = F.pad(frames, [int(frames.shape[1] > 1)] * 4 + [0, 0, 0, -frames.shape[1] % rows])
    pixels = rearrange(frames, "looks (columns rows) c h w -> looks (rows h) (columns w) c", rows=rows)
    first, *rest = [Image.fromarray(p.numpy()) for p in pixels.expand(-1, -1, -1, 3).contiguous()]
    more = dict(save_all=True, append_images=rest, duration=[60] * len(rest) + [2000], loop=0) if rest else {}
    with blame(f"--out {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        first.save(f"{path}.tmp", Path(path).suffix[1:], **more)
        os.replace(f"{path}.tmp", path)

def write(model, cfg, out, n):
    """Draw n images, each process its share: out x.png is a grid, x.gif the way to it, x/ a file per image.
    Image i has class i % P of the P chosen, and row i % P of the grid; a single class gets a square."""
    folder, looks = out.endswith("/"), min(50, cfg.steps) if out.endswith(".gif") else 1
    mine = range(cfg.rank * n // cfg.world, (cfg.rank + 1) * n // cfg.world)
    path = lambda i: Path(out, f"{i:06d}-{cfg.chosen[i % len(cfg.chosen)]}.png")
    mine = [i for i in mine if not folder or not path(i).exists()]  # what is drawn already is kept
    drawn, start = [], time.perf_counter()
    for at in range(0, len(mine), cfg.batch_size):
        index = mine[at : at + cfg.batch_size]
        images = draw(model, cfg, index, looks).cpu()
        for k, i in enumerate(index if folder else ()):
            save_picture(images[:, k : k + 1], path(i))
        drawn += [] if folder else [images]
        left = (time.perf_counter() - start) / (at + len(index)) * (len(mine) - at - len(index))
        print(f"{at + len(index)} of {len(mine)} images, {left:.0f} s left", flush=True) if cfg.rank == 0 else None
    if cfg.world > 1 and not folder:
        dist.all_gather_object(shares := [None] * cfg.world, drawn)
        drawn = sum(shares, [])
    if cfg.rank == 0:
        rows = min(n, len(cfg.chosen)) if len(cfg.chosen) > 1 else round(math.sqrt(n))
        save_picture(torch.cat(drawn, dim=1), out, rows) if drawn else None
        print(out, "(what was there before is kept)" if folder else "", flush=True)

# ---- The command line. What is SAVED in a checkpoint is what --resume takes from there, where no flag says otherwise
SAVED = "data_dir batch_size max_steps muon lr min_snr warmup ema save_every sample_every log_every seed dtype".split()
SHAPE = "dim depth heads patch".split()

def die(message):  # for what the user can put right: one line, exit code 2, no traceback
    print(f"{NAME}.py: {' '.join(message.split())[:300]}", file=sys.stderr)
    sys.exit(2)

@contextlib.contextmanager
def blame(what):
    try:
        yield
    except Exception as error:
        die(f"{what}: {str(error).split('. ')[0] or type(error).__name__}")

def parse(**defaults):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.error, flag = lambda message: die(f"{message} (see --help)"), p.add_argument
    def number(name, x, help): flag(name, type=type(x), default=x, metavar="N", help=f"{help} (%(default)s)")
    flag("--sample-only", action="store_true", help="draw and exit; without it, train and then draw")
    flag("--ckpt", metavar="PATH", help=f"weights to draw from (the run's, else checkpoints/{NAME}.pt)")
    flag("--sampler", choices=["ddpm", "ddim", "dpm"], default="dpm", help="(%(default)s)")
    number("--steps", 15, f"of at most {T}; ddim wants 50, ddpm 250")
    number("--eta", 0.0, "noise in ddim: 0 is none, 1 is ddpm"), number("--seed", 0, "of the images, or the training")
    flag("--classes", metavar="N,N", help="the classes to draw, a row each (all of them)")
    number("--guidance", 3.0, "1 is none, more obeys the class more")
    def numbers(text): return tuple(map(float, text.split(",")))
    flag("--guidance-interval", type=numbers, default="0,1", metavar="LO,HI", help="of t / T, to guide (%(default)s)")
    flag("-n", "--n", type=int, default=100, metavar="N", help="images (%(default)s)")
    flag("--out", metavar="PATH", help="x.png a grid, x.gif the way to it, x/ a PNG per image (samples.png)")
    flag("--data-dir", default="data", metavar="PATH", help="CIFAR-10, or train/<class>/*.png (%(default)s)")
    flag("--run-dir", default=f"runs/{NAME}", metavar="PATH", help="ckpt.pt, log.csv, samples (%(default)s)")
    flag("--resume", action="store_true", help="continue the run in --run-dir, if any, with the flags it had")
    number("--batch-size", 256, "images, over all processes"), number("--max-steps", 80000, "to train in all")
    flag("--muon", action=argparse.BooleanOptionalAction, default=True, help="for the blocks' matrices; or only Adam")
    number("--lr", 6e-3, "the highest learning rate"), number("--warmup", 500, "steps up to it, then 1/sqrt(step)")
    number("--ema", 500000, "half-life, in images"), number("--min-snr", 5.0, "gamma of 2303.09556; 0: no weights")
    number("--save-every", 500, "steps"), number("--log-every", 100, "steps")
    number("--sample-every", 2000, "steps, 0 is never")
    number("--dim", 256, "channels of a token"), number("--heads", 4, "of attention")
    number("--depth", 8, "blocks"), number("--patch", 2, "pixels, the side of a token")
    flag("--device", metavar="NAME", help="where to compute (cuda, else mps, else cpu)")
    flag("--dtype", choices=["float32", "bfloat16"], help="of the network (bfloat16 where the hardware has it)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (for training on cuda)")
    cfg = p.parse_args(namespace=argparse.Namespace(**defaults))
    cfg.rank, cfg.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cfg.sample_only |= cfg.ckpt is not None
    counts = "n steps batch_size save_every log_every warmup ema dim depth heads patch lr".split()
    for wrong, message in [
        *((getattr(cfg, k) <= 0, f"--{k.replace('_', '-')} {getattr(cfg, k)}: must be above 0") for k in counts),
        (not cfg.sample_only and cfg.batch_size % cfg.world, f"--batch-size {cfg.batch_size} over {cfg.world} ranks"),
        (cfg.steps > T, f"--steps {cfg.steps}: there are {T}"),
        (not 0 <= cfg.eta <= 1, f"--eta {cfg.eta}: must be from 0 to 1"),
        (cfg.dim % (math.lcm(4, cfg.heads) or 1), f"--dim {cfg.dim}: not a multiple of 4 and --heads {cfg.heads}"),
        (len(g := cfg.guidance_interval) != 2 or not 0 <= g[0] <= g[1] <= 1, f"--guidance-interval {g}: not LO,HI"),
        (SIZE % (cfg.patch or 1), f"--patch {cfg.patch}: must divide {SIZE}"),
        (not (cfg.out or "/").endswith((".png", ".gif", "/")), f"--out {cfg.out}: must end in .png, .gif or /"),
    ]:
        die(message) if wrong and (defaults or cfg.sample_only or not cfg.resume) else None  # a resumed run has its own
    return cfg

def choose(cfg):
    known = {str(k): name for k, name in enumerate(cfg.names)}
    chosen = known if cfg.classes is None else cfg.classes.split(",")
    return [int(k) if k.strip() in known else die(f"--classes {k}: there are {known}") for k in chosen]

def main():
    cfg = parse()
    ckpt, shipped = Path(cfg.run_dir, "ckpt.pt"), Path(__file__).with_name("checkpoints") / f"{NAME}.pt"
    ckpt = Path(cfg.ckpt or (ckpt if ckpt.exists() else shipped)) if cfg.sample_only else ckpt
    with blame(f"{ckpt} cannot be read as a checkpoint of {NAME}; --ckpt or --run-dir names another"):
        state = torch.load(ckpt, map_location="cpu", weights_only=True) if cfg.sample_only or ckpt.exists() else None
        assert not state or not zipfile.ZipFile(ckpt).testzip(), "it is damaged"  # torch.load does not look
        assert not state or state["config"]["script"] == NAME, f"it is one of {state['config']['script']}"
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # by which torchrun's restarts know their run, if it has one
    if state and not (cfg.sample_only or cfg.resume or job == state.get("job") != "none"):
        die(f"--run-dir {cfg.run_dir} holds a run: continue it with --resume, or name another folder")
    cfg = cfg if cfg.sample_only else parse(**(state["config"] if state else dict(script=NAME)))
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with blame(f"--device {cfg.device or found}"):
        if cuda := (cfg.device or found).startswith("cuda"):
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", (cfg.device or found).partition(":")[2] or 0)))
        cfg.device = torch.empty(1, device="cuda" if cuda else cfg.device or found).device
    chip, cpu = torch.cuda.get_device_capability() if cuda else (0, 0), Path("/proc/cpuinfo")
    bf16 = chip >= (8, 0) or cfg.device.type == "cpu" and cpu.exists() and "bf16" in cpu.read_text()  # avx512_bf16, say
    cfg.dtype = cfg.dtype or ("bfloat16" if bf16 else "float32")
    half = cfg.dtype == "bfloat16"  # where it is off, its device does not matter, and old versions know no mps
    cfg.autocast = torch.autocast(cfg.device.type if half else "cpu", torch.bfloat16, enabled=half)
    triton = chip >= (7, 0) and os.name != "nt"  # torch.compile needs it; it knows neither Windows nor older chips
    cfg.compile = triton and not cfg.sample_only if cfg.compile is None else cfg.compile
    if cfg.compile and not any(map(shutil.which, ["cc", "gcc", "clang", "cl"])):
        cfg.compile = cfg.rank == 0 and print("--compile is left out: it needs a C compiler, and there is none")
    dist.init_process_group("nccl" if cuda and dist.is_nccl_available() else "gloo") if cfg.world > 1 else None
    if cfg.sample_only:
        with blame(f"{ckpt} does not fit {NAME}.py"):
            cfg.names = state["config"]["names"]
            model = DiT(*(state["config"][name] for name in SHAPE), len(cfg.names)).to(cfg.device)
            model.load_state_dict(state["ema"])
            print(f"{ckpt}: step {state['step']}") if cfg.rank == 0 else None
        cfg.chosen = choose(cfg)
        write(torch.compile(model) if cfg.compile else model, cfg, cfg.out or "samples.png", cfg.n)
    elif model := train(cfg, state):
        write(model, cfg, cfg.out or f"{cfg.run_dir}/samples.png", cfg.n)
    (dist.destroy_process_group(), sys.stdout.flush(), os._exit(0)) if cfg.world > 1 else None  # gloo may abort at exit

if __name__ == "__main__":
    main()
