"""Schedule math and data loading: all that the four scripts share. Nothing in here knows about networks.

A schedule is a float32 tensor `alphas_cumprod` of shape (T,): entry t is alpha-bar_t, the share of the image's variance
that is left in x_t. Times are 0 .. T-1, and t_next = -1 stands for the clean image, where alpha-bar is 1.
"""

import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------------------
# Schedules

def linear_betas(T=1000, beta_start=1e-4, beta_end=0.02):
    """Betas (T,), float64, evenly spaced from beta_start to beta_end (Ho et al. 2020, section 4)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)

def cosine_betas(T=1000, s=0.008, max_beta=0.999):
    """Betas (T,), float64, alpha-bar falling like a squared cosine (Nichol & Dhariwal 2021, 2102.09672, eq. 17)."""
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    return torch.tensor([min(1 - f[t + 1] / f[t], max_beta) for t in range(T)], dtype=torch.float64)

def alpha_bar(betas):
    """alphas_cumprod (T,), float32, from betas (T,). The product of a thousand factors is taken in float64."""
    return (1 - betas.cpu().double()).cumprod(0).float()

def timestep_pairs(T, steps, spacing="trailing"):
    """The walk of a sampler: a list of `steps` pairs (t, t_next), from T - 1 to t_next = -1.

    "uniform" has both ends, T - 1 and 0; "quadratic" is dense near the clean image (Song et al. 2020, appendix D.2);
    "trailing" makes every stride equal, the last one, to -1, included (Lin et al. 2023, 2305.08891, table 2).
    Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps: must be 1 to {T}, the length of the schedule")
    if spacing == "trailing":
        ts = [round(T * i / steps) - 1 for i in range(steps, 0, -1)]
    elif spacing in ("uniform", "quadratic"):
        power = {"uniform": 1, "quadratic": 2}[spacing]
        ts = [round((T - 1) * (1 - i / max(steps - 1, 1)) ** power) for i in range(steps)]
        for i in range(steps - 1, 0, -1):  # near 0 the squares crowd together, and every step must go somewhere
            ts[i - 1] = max(ts[i - 1], ts[i] + 1)
    else:
        raise ValueError(f"spacing {spacing!r}: must be 'uniform', 'quadratic' or 'trailing'")
    ts.append(-1)
    return list(zip(ts, ts[1:]))

# ----------------------------------------------------------------------------------------------------------------------
# The Gaussians. x_t, x0, eps and v are float (B, C, H, W), t is int64 (B,), and everything stays float32.

def _alpha_bar(alphas_cumprod, t):
    """alpha-bar_t, (B, 1, 1, 1); t = -1 is the clean image."""
    return torch.where(t < 0, 1.0, alphas_cumprod.to(t.device)[t])[:, None, None, None]

def _coefficients(alphas_cumprod, t):
    a = _alpha_bar(alphas_cumprod, t)
    return a.sqrt(), (1 - a).sqrt()

def q_sample(x0, t, noise, alphas_cumprod):
    """x_t ~ q(x_t | x_0), given the noise (Ho et al. 2020, eq. 4)."""
    a, s = _coefficients(alphas_cumprod, t)
    return a * x0 + s * noise

def eps_to_x0(x_t, t, eps, alphas_cumprod):
    a, s = _coefficients(alphas_cumprod, t)
    return (x_t - s * eps) / a

def x0_to_eps(x_t, t, x0, alphas_cumprod):
    a, s = _coefficients(alphas_cumprod, t)
    return (x_t - a * x0) / s

def v_to_x0(x_t, t, v, alphas_cumprod):
    """v = sqrt(alpha-bar) eps - sqrt(1 - alpha-bar) x0 (Salimans & Ho 2022, 2202.00512, appendix D)."""
    a, s = _coefficients(alphas_cumprod, t)
    return a * x_t - s * v

def v_to_eps(x_t, t, v, alphas_cumprod):
    a, s = _coefficients(alphas_cumprod, t)
    return s * x_t + a * v

def eps_to_v(x_t, t, eps, alphas_cumprod):
    a, s = _coefficients(alphas_cumprod, t)
    return (eps - s * x_t) / a

def x0_to_v(x_t, t, x0, alphas_cumprod):
    a, s = _coefficients(alphas_cumprod, t)
    return (a * x_t - x0) / s

def posterior(x0, x_t, t, alphas_cumprod, t_next=None):
    """Mean (B, C, H, W) and variance (B, 1, 1, 1) of q(x_{t_next} | x_t, x_0) (Ho et al. 2020, eq. 6 and 7).

    t_next defaults to t - 1; any earlier time will do, since a stride is a single step with a larger beta.
    """
    a, a_next = _alpha_bar(alphas_cumprod, t), _alpha_bar(alphas_cumprod, t - 1 if t_next is None else t_next)
    beta, left = (a_next - a) / a_next, (1 - a_next) / (1 - a)
    return a_next.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * left * x_t, left * beta

def snr(alphas_cumprod):
    """Signal-to-noise ratio (T,)."""
    return alphas_cumprod / (1 - alphas_cumprod)

def min_snr_weights(alphas_cumprod, target="eps", gamma=5.0):
    """Loss weights (T,) which all say "x0 error times min(SNR, gamma)" (Hang et al. 2023, 2303.09556, section 3.4)."""
    r = snr(alphas_cumprod)
    return r.clamp(max=gamma) / {"eps": r, "x0": torch.ones_like(r), "v": r + 1}[target]

# ----------------------------------------------------------------------------------------------------------------------
# Data: a data set is a uint8 tensor (N, C, H, W) and int64 labels (N,), both on the training device. No workers.

def load_data(name, data_dir, size, device="cpu"):
    """(images, labels) of the training set, the same of the test set or None, and the class names.

    name: "MNIST" (1 channel) or "CIFAR10" (3), found in data_dir or downloaded there by one process per node. If there
    is train/<class>/* in it (and perhaps test/<class>/*), any images, those are read instead, at size x size pixels.
    Raises OSError when there are no data and no network, ValueError for an image that cannot be read.
    """
    waits = dist.is_initialized() and os.environ.get("LOCAL_RANK") != "0"
    if waits:
        dist.barrier()
    train, test = Path(data_dir, "train"), Path(data_dir, "test")
    if train.is_dir():
        channels = {"MNIST": 1, "CIFAR10": 3}[name]
        *train_set, classes = _read_folder(train, size, channels)
        *test_set, test_classes = _read_folder(test, size, channels) if test.is_dir() else (None, classes)
        if test_classes != classes:
            raise ValueError(f"{test}: its classes are not those of {train}")
    else:
        train_set, test_set, classes = _read_torchvision(name, data_dir)
    if dist.is_initialized() and not waits:
        dist.barrier()
    train_set = tuple(part.to(device) for part in train_set)
    test_set = tuple(part.to(device) for part in test_set) if test_set != [None] else None
    return train_set, test_set, classes

def _read_torchvision(name, data_dir):
    from torchvision import datasets  # a second of import, so only where data are read

    sets = []
    for split in (True, False):
        try:
            data = getattr(datasets, name)(data_dir, train=split, download=True)
        except (OSError, RuntimeError) as error:
            raise OSError(f"no {name} there, nor from the network ({error}); bring the files, or train/<class>/*.png")
        images = torch.as_tensor(data.data)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        sets.append((images, torch.as_tensor(data.targets)))
    return *sets, data.classes

def read_image(path, size, channels):
    """uint8 (channels, size, size) of any image file, cropped and scaled. Raises ValueError if it cannot be read."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # photographs lie on their side and say so
            image = image.point(lambda v: v / 256) if image.mode.startswith("I") else image  # 16 bits
            image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read ({error})") from error
    return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))

def _read_folder(root, size, channels):
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(root)  # its FileNotFoundError names what is missing
    images = torch.empty(len(folder), channels, size, size, dtype=torch.uint8)
    for i, (path, _) in enumerate(folder.samples):
        images[i] = read_image(path, size, channels)
    return images, torch.tensor(folder.targets), folder.classes

# ----------------------------------------------------------------------------------------------------------------------
# Randomness: everything is drawn by a generator made for it from two numbers, so no random state is ever saved.

def generator(seed, n, device="cpu"):
    """The torch.Generator of the n-th draw under `seed`."""
    # A CPU's Mersenne Twister reads 32 bits of its seed. The golden ratio puts our seeds 0, 1, 2, .. far apart in them.
    return torch.Generator(device).manual_seed((seed * 2654435769 + n) % 2**32)

def batch(images, labels, T, batch_size, seed, step, flip=False, rank=0, world=1):
    """All that is random in training step `step`: x0 (B, C, H, W) in [-1, 1], y (B,), t (B,), noise, u (B,) in [0, 1).

    It is drawn for the whole global batch and then sliced, so that process `rank` of `world` has its B = batch_size /
    world rows of what a single one would have. With flip, half of the images are mirrored; u decides on dropped labels.
    """
    device = images.device
    g = generator(seed, step, device)
    index = torch.randint(len(images), (batch_size,), generator=g, device=device)
    t = torch.randint(T, (batch_size,), generator=g, device=device)
    noise = torch.randn(batch_size, *images.shape[1:], generator=g, device=device)
    u, mirror = torch.rand(2, batch_size, generator=g, device=device)
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    x0 = images[index[mine]].float() / 127.5 - 1
    if flip:
        x0 = torch.where(mirror[mine, None, None, None] < 0.5, x0.flip(-1), x0)
    return x0, labels[index[mine]], t[mine], noise[mine], u[mine]

def noises(seed, index, shape, device="cpu"):
    """Yields noise (len(index), *shape) for ever: row k is a function of (seed, index[k]), whatever is beside it."""
    generators = [generator(seed, i, device) for i in index]
    while True:  # eight at a time: on a GPU, a call per image and step would take longer than the network
        yield from torch.stack([torch.randn(8, *shape, generator=g, device=device) for g in generators], dim=1)
