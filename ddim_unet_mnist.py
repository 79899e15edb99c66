"""A prompt in, a digit out: Stable Diffusion in miniature, in the pixels of MNIST, all of it in this file.

A UNet learns to take noise away, as in ddpm_unet_mnist.py, while it reads a caption (Rombach et al. 2022, 2112.10752).
Guidance makes it mind the caption (Ho & Salimans 2022, 2207.12598). DDIM takes few steps and adds no noise, so that an
image and its noise can be turned into each other (Song et al. 2020, 2010.02502).

    python ddim_unet_mnist.py --sample-only --prompt "a thick seven leaning left" --prompt "thin 3"
    python ddim_unet_mnist.py --data-dir data                    # fetch MNIST, train, draw
    torchrun --standalone --nproc_per_node=8 ddim_unet_mnist.py  # the same on eight GPUs
"""

import argparse, contextlib, copy, math, os, shutil, signal, sys, time, zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

NAME, T, CHANNELS, SIZE = Path(__file__).stem, 1000, 1, 28

# ---- The prompt: a caption that is read off the image, as a row of tokens, one for each word. There is no text encoder
WORDS, LENGTH = " a thick thin leaning left right".split(" "), 5  # tokens 0 .. 6; 0 is "", which fills up the row
WORDS += "0 zero 1 one 2 two 3 three 4 four 5 five 6 six 7 seven 8 eight 9 nine".split()  # class k: 7 + 2k and 8 + 2k

def tokenize(prompt):
    """A prompt, say "thin 3" -> its LENGTH tokens, a list. Raises ValueError for words not known, and for too many."""
    said = ["a" if word == "an" else word for word in prompt.lower().split()]
    if unknown := [word for word in said if word not in WORDS]:
        raise ValueError(f"{unknown[0]!r} is not known; these are:{' '.join(WORDS)}")
    if len(said) > LENGTH:
        raise ValueError(f"{said[LENGTH]!r} is one too many, {LENGTH} words are the most")
    return [WORDS.index(word) for word in said] + [0] * (LENGTH - len(said))

def captions(x0, y, u):
    """Images (B, C, H, W) in [-1, 1], their classes (B,), random u (B,) in [0, 1) -> tokens, int64 (B, LENGTH).
    "a thick seven leaning left", "3", "thin two": how thick a stroke is and how it leans is measured. u is all the
    chance there is: it leaves out parts, and below 0.1 the whole caption, so that guidance knows what "" draws."""
    ink = x0.mean(dim=1) / 2 + 0.5  # (B, H, W)
    edges = ink.diff(dim=2)[:, 1:].square() + ink.diff(dim=1)[:, :, 1:].square()
    width = 2 * ink.sum(dim=(1, 2)) / edges.sqrt().sum(dim=(1, 2))  # in pixels, for a stroke has two edges
    mean = lambda z: (ink * z).sum(dim=(1, 2)) / ink.sum(dim=(1, 2))
    down, right = torch.meshgrid(*(torch.arange(n, device=x0.device) for n in ink.shape[1:]), indexing="ij")
    slant = (mean(down) * mean(right) - mean(down * right)) / (mean(down**2) - mean(down) ** 2)  # right, if above 0
    coin = lambda k: (u * 2 ** (20 - k)).long() % 2  # bits of u too low to say whether it is below 0.1
    thickness = 2 * (width > 2.6) + 3 * (width < 2.1)  # a third of MNIST each
    lean = 5 * (slant < -0.1) + 6 * (slant > 0.1)
    digit, leaning = coin(0) | coin(1), coin(2) * (lean > 0)  # whether they are mentioned
    parts = [digit * coin(3), thickness * coin(4), digit * (7 + 2 * y + coin(5)), 4 * leaning, lean * leaning]
    parts = torch.stack(parts, dim=1) * (u >= 0.1)[:, None]
    return parts.gather(1, (parts == 0).int().argsort(dim=1, stable=True))  # closes the gaps

# ---- The network: the UNet of ddpm_unet_mnist.py, whose attention is to the prompt instead, at the two lower sizes
def norm(channels):  # 16 channels fill a vector register: smaller groups take a CPU six times as long in channels_last
    return nn.GroupNorm(channels // 16, channels)

def zero(layer):  # so that a block starts as the identity, and a deep stack of them learns at once
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer

def timestep_embedding(t, dim):
    """int64 (B,) -> (B, dim): sines and cosines at dim / 2 frequencies from 1 to 1/10000 (Vaswani et al. 2017, 3.5)."""
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)

class CrossAttention(nn.Module):
    """Every pixel asks all the words of the prompt, and adds what it hears (Rombach et al. 2022, section 3.3)."""
    def __init__(self, dim, dim_text, head_dim=32):
        super().__init__()
        self.norm, self.heads = norm(dim), dim // head_dim
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim_text, 2 * dim), zero(nn.Linear(dim, dim))

    def forward(self, x, text):  # (B, C, H, W), (B, LENGTH, dim_text)
        q = rearrange(self.q(self.norm(x).flatten(2).mT), "b n (heads d) -> b heads n d", heads=self.heads)
        k, v = rearrange(self.kv(text), "b n (kv heads d) -> kv b heads n d", kv=2, heads=self.heads)
        with sdpa_kernel(SDPBackend.MATH) if x.is_cpu else contextlib.nullcontext():  # a CPU is slow at fused gradients
            heard = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(self.out(heard), "b (h w) c -> b c h w", h=x.shape[2])

class Block(nn.Module):
    """Norm, SiLU, convolution, twice, with the time added in between and a shortcut around; then perhaps the prompt."""
    def __init__(self, dim_in, dim, dim_time, dim_text=None):
        super().__init__()
        self.norm1, self.conv1 = norm(dim_in), nn.Conv2d(dim_in, dim, 3, padding=1)
        self.time = nn.Linear(dim_time, dim)
        self.norm2, self.conv2 = norm(dim), zero(nn.Conv2d(dim, dim, 3, padding=1))
        self.shortcut = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()
        self.attention = CrossAttention(dim, dim_text) if dim_text else None

    def forward(self, x, time, text):  # (B, dim_in, H, W), (B, dim_time), (B, LENGTH, dim_text) -> (B, dim, H, W)
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        h = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return self.attention(h, text) if self.attention else h

class UNet(nn.Module):
    """x float (B, channels, H, W) in [-1, 1], t int64 (B,) in 0 .. T - 1, y tokens int64 (B, LENGTH), by default of
    "" -> v, float32, of x's shape. H and W divide by 2 ** (len(mults) - 1). dim: channels at full resolution, a
    multiple of 16; mults: each level's, in dims. All levels but the first (14 x 14, 7 x 7 pixels) read the prompt."""
    def __init__(self, channels=CHANNELS, dim=48, mults=(1, 2, 2)):
        super().__init__()
        self.dim, dims, dim_time, dim_text = dim, [dim * m for m in mults], 4 * dim, 2 * dim
        self.time = nn.Sequential(nn.Linear(dim, dim_time), nn.SiLU(), nn.Linear(dim_time, dim_time), nn.SiLU())
        self.words, self.positions = nn.Embedding(len(WORDS), dim_text), nn.Parameter(torch.zeros(LENGTH, dim_text))
        block = lambda a, b, i: Block(a, b, dim_time, dim_text if i else None)
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.down = nn.ModuleList(block(d, d, i) for i, d in enumerate(dims))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(dims, dims[1:]))
        self.middle = nn.ModuleList(block(dims[-1], dims[-1], i) for i in (1, 0))
        self.up = nn.ModuleList(block(2 * d, d, i) for i, d in enumerate(dims))
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(dims, dims[1:]))
        self.head = nn.Sequential(norm(dim), nn.SiLU(), zero(nn.Conv2d(dim, channels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, y=None):
        time = self.time(timestep_embedding(t, self.dim))  # (B, 4 dim)
        text = self.words(t.new_zeros(len(t), LENGTH) if y is None else y) + self.positions  # (B, LENGTH, 2 dim)
        h, skips = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for i, block in enumerate(self.down):  # (B, 48, 28, 28), (B, 96, 14, 14), (B, 96, 7, 7)
            h = block(self.shrink[i - 1](h) if i else h, time, text)
            skips.append(h)
        for block in self.middle:
            h = block(h, time, text)
        for i, block in reversed(list(enumerate(self.up))):  # and back up
            h = block(torch.cat([h, skips[i]], dim=1), time, text)
            h = self.grow[i - 1](F.interpolate(h, scale_factor=2.0)) if i else h
        return self.head(h).float()

# ---- The samplers. They know of no network: denoise(x_t, t) gives an estimate of the clean image, x0_hat
def denoiser(model, alphas_cumprod, y=None, guidance=1.0):
    """denoise(x_t, t) -> x0_hat in [-1, 1], for a model(x_t, t, y) that predicts v (Salimans & Ho 2022, 2202.00512).
    y: tokens (B, LENGTH), which guidance needs. Guidance 1 leaves v as it is, more moves it away from that of ""; it is
    1 + w in Ho & Salimans 2022, eq. 6."""
    def denoise(x_t, t):  # float (B, C, H, W), int64 (B,)
        alpha_bar = alphas_cumprod.to(t.device)[t][:, None, None, None]
        if guidance == 1:
            v = model(x_t, t, y)
        else:
            v, v_null = model(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, 0 * y])).chunk(2)
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

def train(cfg, state):
    """Ho et al. 2020, algorithm 1. Returns the network of averaged weights, or None if a signal ends the run early.
    Step n is a function of (cfg.seed, n) and the weights it finds, whatever the number of processes and of restarts."""
    from common import alpha_bar, batch, cosine_betas, load_data, q_sample, x0_to_v
    torch.manual_seed(cfg.seed % 2**32)  # the same first weights in every process
    model = UNet(dim=cfg.dim).to(cfg.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    averages, weights = list(ema.parameters()), [w.detach() for w in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), fused=cfg.device.type != "mps")
    parts, path = dict(model=model, ema=ema, optimizer=optimizer), Path(cfg.run_dir, "ckpt.pt")
    new = dict(step=0, log=["step,images,loss,val_loss,lr,grad_norm,images_per_s,seconds"], seconds=0.0)
    with blame(f"--resume: {path} does not fit"):
        [part.load_state_dict(state[name]) for name, part in parts.items() if state]
        first, rows, seconds = [(state or new)[name] for name in new]
    with blame(f"--data-dir {cfg.data_dir}"):
        train_set, test_set, classes = load_data("MNIST", cfg.data_dir, SIZE, cfg.device)
        assert len(classes) <= 10, f"{len(classes)} classes, and there are words for ten"

    def save(step):
        config = dict(script=NAME) | {name: getattr(cfg, name) for name in SAVED}
        more = dict(step=step, log=rows, seconds=seconds, config=config, job=os.environ.get("TORCHELASTIC_RUN_ID"))
        with blame(f"{path} cannot be written (disk full?), and what was there still is"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({k: p.state_dict() for k, p in parts.items()} | more, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # so that no kill leaves a torn file
    say = print if cfg.rank == 0 else lambda *_, **__: None
    say(f"{cfg.device.type} x {cfg.world}, {cfg.dtype}, {sum(w.numel() for w in weights) / 1e6:.2f} M parameters")
    say(f"{cfg.data_dir}: {len(train_set[0])} images; {cfg.run_dir}: from step {first} to {cfg.max_steps}", flush=True)
    save(0) if cfg.rank == 0 and not state else None
    alphas_cumprod = alpha_bar(cosine_betas(T)).to(cfg.device)
    net = torch.compile(model) if cfg.compile else model
    net = nn.parallel.DistributedDataParallel(net) if cfg.world > 1 else net

    def loss_of(net, data, *which, **share):
        x0, y, t, noise, u = batch(*data, T, *which, **share)
        x_t, y = q_sample(x0, t, noise, alphas_cumprod), captions(x0, y, u)
        with cfg.autocast:
            return F.mse_loss(net(x_t, t, y), x0_to_v(x_t, t, x0, alphas_cumprod))
    total = (lambda x: dist.all_reduce(x) or x) if cfg.world > 1 else lambda x: x  # over all processes
    stop, recent, tick, ticked = [], [], time.perf_counter(), first
    old = {n: signal.signal(n, lambda *_: stop.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
    for step in range(first + 1, cfg.max_steps + 1):
        # Ho et al. keep the rate constant; falling, it gave lower losses on MNIST, and needs no end of a run to aim for
        lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(step / cfg.warmup, math.sqrt(cfg.warmup / step))
        loss = loss_of(net, train_set, cfg.batch_size, cfg.seed, step, rank=cfg.rank, world=cfg.world)
        loss.backward()
        recent.append(torch.stack([loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)]))
        optimizer.step(), optimizer.zero_grad()
        seen = step * cfg.batch_size
        half_life = min(cfg.ema, 0.05 * seen)  # images; it grows with the run, which so forgets its first, bad weights
        torch._foreach_lerp_(averages, weights, 1 - 0.5 ** (cfg.batch_size / half_life))
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
            write(ema, cfg, f"{cfg.run_dir}/samples-{step:07d}.png", min(cfg.n, 80))
    [signal.signal(number, handler) for number, handler in old.items()]  # from here on, they may end the drawing
    return ema

@torch.no_grad()
def draw(model, cfg, index, looks=1):
    """float (looks, len(index), C, H, W): looks at equal distances on the way from noise, the last one at the images.
    Image k is a function of (cfg.seed, index[k]) and its prompt alone (or place in the row, if cfg.interpolate)."""
    from common import alpha_bar, cosine_betas, noises
    noise = noises(cfg.seed, index, (CHANNELS, SIZE, SIZE), cfg.device)
    alphas_cumprod = alpha_bar(cosine_betas(T)).to(cfg.device)
    y = torch.tensor([cfg.tokens[i % len(cfg.tokens)] for i in index], device=cfg.device)
    denoise, x, frames = cfg.autocast(denoiser(model, alphas_cumprod, y, cfg.guidance)), next(noise), []
    x = slerp_noise(cfg, index) if cfg.interpolate else x
    watch = lambda x_t, t: looks > 1 and frames.append(x_t) or denoise(x_t, t)
    sampler, more = (ddim_sample, dict(eta=cfg.eta)) if cfg.sampler == "ddim" else (ddpm_sample, {})
    frames.append(sampler(watch, x, alphas_cumprod, cfg.steps, randn=lambda _: next(noise), **more))
    return torch.stack([frames[(len(frames) - 1) * (i + 1) // looks] for i in range(looks)])

def slerp_noise(cfg, index):
    """The noise of --interpolate: row r goes from noise 2r to 2r + 1 by slerp (Song et al. 2020, appendix D.5)."""
    from common import noises
    rows, columns = len(cfg.tokens), math.ceil(cfg.n / len(cfg.tokens))
    noise = lambda end: next(noises(cfg.seed, [i % rows * 2 + end for i in index], (CHANNELS, SIZE, SIZE), cfg.device))
    ends = torch.stack([noise(0), noise(1)])  # (2, B, C, H, W)
    angle = F.cosine_similarity(*ends.flatten(2), dim=1).acos()
    way = torch.tensor([i // rows / max(columns - 1, 1) for i in index], device=cfg.device)  # 0 to 1
    return torch.einsum("eb, ebchw -> bchw", torch.stack([1 - way, way]).mul(angle).sin() / angle.sin(), ends)

@torch.no_grad()
def invert(model, cfg, out):
    """Image -> noise -> image: DDIM backwards and forwards (Song et al. 2020, section 5.4), under the first prompt, and
    the noise redrawn under every other prompt. The picture has the image, its noise, the image again, the others."""
    from common import alpha_bar, cosine_betas, read_image
    with blame(f"--invert {cfg.invert}"):
        image = read_image(cfg.invert, SIZE, CHANNELS)[None].to(cfg.device) / 127.5 - 1
    a, pairs = alpha_bar(cosine_betas(T)).to(cfg.device), timestep_pairs(T, cfg.steps)
    first, *others = torch.tensor(cfg.tokens, device=cfg.device)[:, None]
    walk = lambda x, pairs, y, scale: ddim_sample(cfg.autocast(denoiser(model, a, y, scale)), x, a, pairs)
    back = [(max(t_next, 0), t) for t, t_next in reversed(pairs)]  # the image stands in for x at t = 0
    noise = walk(image, back, first, 1)
    again = walk(noise, pairs, first, 1)
    redrawn = [walk(noise, pairs, y, cfg.guidance) for y in others]
    save_picture(torch.stack([image, noise, again, *redrawn], dim=1), out)
    print(f"{out}: PSNR {-10 * (image - again).div(2).square().mean().log10().item():.1f} dB")

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
    Image i has prompt i % P of the P there are, and row i % P of the grid; a single prompt gets a square."""
    folder, looks = out.endswith("/"), min(50, cfg.steps) if out.endswith(".gif") else 1
    mine = range(cfg.rank * n // cfg.world, (cfg.rank + 1) * n // cfg.world)
    path = lambda i: Path(out, f"{i:06d}-{cfg.labels[i % len(cfg.labels)]}".rstrip("-") + ".png")
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
        rows = min(n, len(cfg.tokens)) if len(cfg.tokens) > 1 or cfg.interpolate else round(math.sqrt(n))
        save_picture(torch.cat(drawn, dim=1), out, rows) if drawn else None
        print(out, "(what was there before is kept)" if folder else "", flush=True)

# ---- The command line. What is SAVED in a checkpoint is what --resume takes from there, where no flag says otherwise
SAVED = "data_dir batch_size max_steps lr warmup ema save_every sample_every log_every dim seed dtype".split()

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
    flag("--sampler", choices=["ddpm", "ddim"], default="ddim", help="(%(default)s)")
    number("--steps", 20, f"of at most {T}; ddpm wants more than ddim")
    number("--eta", 0.0, "noise in ddim: 0 is none, 1 is ddpm")
    flag("--prompt", action="append", metavar="TEXT", help='"a thick seven leaning left", a row each')
    flag("--classes", metavar="N,N", help="the same as prompts that name the class alone (all of them)")
    number("--guidance", 2.0, "1 is none, more obeys the prompt more")
    flag("--interpolate", action="store_true", help="draw rows whose noise goes from one to another")
    flag("--invert", metavar="IMAGE", help="find its noise, under the first prompt, and redraw it under all of them")
    flag("-n", "--n", type=int, default=80, metavar="N", help="images (%(default)s)")
    number("--seed", 0, "of the images, or of the training")
    flag("--out", metavar="PATH", help="x.png a grid, x.gif the way to it, x/ a PNG per image (samples.png)")
    flag("--data-dir", default="data", metavar="PATH", help="MNIST, or train/<class>/*.png (%(default)s)")
    flag("--run-dir", default=f"runs/{NAME}", metavar="PATH", help="ckpt.pt, log.csv, samples (%(default)s)")
    flag("--resume", action="store_true", help="continue the run in --run-dir, if any, with the flags it had")
    number("--batch-size", 64, "images, over all processes"), number("--max-steps", 20000, "to train in all")
    number("--lr", 1e-3, "the highest learning rate"), number("--warmup", 1000, "steps up to it, then 1/sqrt(step)")
    number("--ema", 50000, "half-life, in images")
    number("--save-every", 500, "steps"), number("--log-every", 100, "steps")
    number("--sample-every", 2000, "steps, 0 is never")
    number("--dim", 48, "channels at 28 x 28, a multiple of 16")
    flag("--device", metavar="NAME", help="where to compute (cuda, else mps, else cpu)")
    flag("--dtype", choices=["float32", "bfloat16"], help="of the network (bfloat16 where the hardware has it)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (for training on cuda)")
    cfg = p.parse_args(namespace=argparse.Namespace(**defaults))
    cfg.rank, cfg.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cfg.sample_only |= cfg.interpolate or cfg.invert is not None or cfg.ckpt is not None
    counts = "n steps batch_size save_every log_every warmup ema dim lr".split()
    for wrong, message in [
        *((getattr(cfg, k) <= 0, f"--{k.replace('_', '-')} {getattr(cfg, k)}: must be above 0") for k in counts),
        (not cfg.sample_only and cfg.batch_size % cfg.world, f"--batch-size {cfg.batch_size} over {cfg.world} ranks"),
        (cfg.steps > T, f"--steps {cfg.steps}: there are {T}"),
        (not 0 <= cfg.eta <= 1, f"--eta {cfg.eta}: must be from 0 to 1"),
        (cfg.dim % 16, f"--dim {cfg.dim}: must be a multiple of 16"),
        (cfg.invert is not None and not (cfg.out or ".png").endswith(".png"), f"--out {cfg.out}: must end in .png"),
        (not (cfg.out or "/").endswith((".png", ".gif", "/")), f"--out {cfg.out}: must end in .png, .gif or /"),
    ]:
        die(message) if wrong and (defaults or cfg.sample_only or not cfg.resume) else None  # a resumed run has its own
    digits = dict(zip(WORDS[7::2], WORDS[8::2]))  # {"0": "zero", ..}
    classes = [] if cfg.prompt or cfg.invert is not None else list(digits)
    classes = classes if cfg.classes is None else [k.strip() for k in cfg.classes.split(",")]
    asked = cfg.prompt or [""] * (not classes)
    with blame("--classes or --prompt"):
        cfg.tokens = [tokenize(prompt) for prompt in [digits.get(k, repr(k)) for k in classes] + asked]
    cfg.labels = classes + ["-".join(prompt.split()) for prompt in asked]  # for the names of files
    return cfg

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
            model = UNet(dim=state["config"]["dim"]).to(cfg.device)
            model.load_state_dict(state["ema"])
            print(f"{ckpt}: step {state['step']}") if cfg.rank == 0 else None
        model, out = torch.compile(model) if cfg.compile else model, cfg.out or "samples.png"
        write(model, cfg, out, cfg.n) if cfg.invert is None else invert(model, cfg, out) if cfg.rank == 0 else None
    elif model := train(cfg, state):
        write(model, cfg, cfg.out or f"{cfg.run_dir}/samples.png", cfg.n)
    (dist.destroy_process_group(), sys.stdout.flush(), os._exit(0)) if cfg.world > 1 else None  # gloo may abort at exit

if __name__ == "__main__":
    main()
