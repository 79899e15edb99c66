"""How well does a model know real images? The variational bound of a checkpoint, in bits/dim.

    python extras/bits_per_dim.py checkpoints/dit_cifar10.pt --data-dir data -n 1000

Per pixel and channel, without loss: 8 without a model, 3.7 with DDPM (Ho et al. 2020, table 2).
"""

import argparse
import math
import sys

import torch
from tools import DEVICE, as_trained, compare_classes, load
from torch.special import ndtr

from common import Progress, load_data

DIMS = (1, 2, 3)  # of an image, in (B, C, H, W)
DRAWS = 40  # times at which each image is tried, of the T - 1 that have a KL


@torch.no_grad()
def bits_per_dim(denoise, pixels, alphas_cumprod, draws):
    """The bound of Ho et al. 2020, eq. 5, for uint8 images (B, C, H, W), by denoise(x_t, t) -> x0.

    Returns a dict. Its "prior", "small", "large" and "decoder" are in bits/dim, (B,): the KLs where
    p has q's variance are "small", where it has beta_t "large". They are estimated from so many
    draws of a time: the "times", the mean square "errors" of x0 there, and the "weights" are
    (draws, B). All but `denoise` is float64 and on the CPU.
    """
    x0 = pixels.double() / 127.5 - 1
    times, weights = draw_times(alphas_cumprod, draws, len(x0))
    errors = []
    for t in times:
        x0_hat = estimate(denoise, x0, t, alphas_cumprod)
        errors.append((x0_hat - x0).square().mean(DIMS))
    errors = torch.stack(errors)
    small, large = divergence(errors, times, alphas_cumprod)
    at_0 = estimate(denoise, x0, torch.zeros(len(x0), dtype=torch.int64), alphas_cumprod)
    a = alphas_cumprod[-1]
    prior = (a * (x0.square() - 1) - torch.log1p(-a)).mean(DIMS) / 2
    return {
        "prior": prior / math.log(2),
        "small": (weights * small).sum(0) / math.log(2),
        "large": (weights * large).sum(0) / math.log(2),
        "decoder": decoding(at_0, pixels, alphas_cumprod) / math.log(2),
        "times": times,
        "errors": errors,
        "weights": weights,
    }


def draw_times(alphas_cumprod, draws, n):
    """Times in 1 .. T-1 and their weights, (draws, n): a weighted sum stands for one of all times.

    Bits are spent where log SNR falls. Its fall is cut into equal shares, with a time from each.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    falls = snr.log().diff()
    probability = falls / falls.sum()
    u = torch.rand(draws, n, dtype=torch.float64)
    u = (torch.arange(draws)[:, None] + u) / draws
    step = torch.searchsorted(probability.cumsum(0)[:-1], u)
    return step + 1, 1 / (draws * probability[step])


def estimate(denoise, x0, t, alphas_cumprod):
    """What the model takes for x0 (B, C, H, W), once there is noise on it, of times t (B,)."""
    a = alphas_cumprod[t][:, None, None, None]
    noise = torch.randn(x0.shape)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    return denoise(x_t.float(), t).double()


def divergence(errors, times, alphas_cumprod):
    """The KLs in nats, with the small variance and with the large one, shaped like the errors."""
    a, a_next = alphas_cumprod[times], alphas_cumprod[times - 1]  # a_next has less noise
    fall = a_next / (1 - a_next) - a / (1 - a)  # of the SNR
    small = fall / 2 * errors  # Kingma et al. 2021 (2107.00630), eq. 14
    ratio = (1 - a_next) / (1 - a)  # small variance / large
    large = ratio * small + (ratio - 1 - ratio.log()) / 2
    return small, large


def decoding(x0_hat, pixels, alphas_cumprod):
    """From the last noise to pixels, in nats (B,): 256 bins, open at the ends (Ho et al., eq. 13).

    x0_hat is the estimate at t = 0.
    """
    a, a_next = alphas_cumprod[1], alphas_cumprod[0]
    sigma = ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()  # small, at t = 1
    away = pixels.double() / 127.5 - 1 - x0_hat
    up = ndtr((away + 1 / 255) / sigma).masked_fill(pixels == 255, 1.0)
    down = ndtr((away - 1 / 255) / sigma).masked_fill(pixels == 0, 0.0)
    return -(up - down).clamp(min=1e-12).log().mean(DIMS)


def errors_by_tenth(times, errors, weights, alphas_cumprod):
    """Mean square error of x0 and of v for each tenth of T, (10, 2), by what bits_per_dim gives."""
    errors_of_v = errors / (1 - alphas_cumprod[times])
    tenths = times * 10 // len(alphas_cumprod)
    means = torch.empty(10, 2, dtype=torch.float64)
    for tenth in range(10):
        here = tenths == tenth
        total = weights[here].sum()
        means[tenth, 0] = (weights * errors)[here].sum() / total
        means[tenth, 1] = (weights * errors_of_v)[here].sum() / total
    return means


def from_cpu(denoise, progress):
    """The same denoise for tensors on the CPU. It counts the images, in parts, as it goes."""

    def moved(x_t, t):
        x0 = denoise(x_t.to(DEVICE), t.to(DEVICE)).cpu()
        progress.add(len(x_t) / (DRAWS + 1))
        return x0

    return moved


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    parser.add_argument("checkpoint", help="of any of the scripts")
    parser.add_argument("--data-dir", default="data", help="as for the script (%(default)s)")
    parser.add_argument("-n", type=int, default=1000, help="test images (%(default)s)")
    parser.add_argument("--unconditional", action="store_true", help="tell no class, no prompt")
    args = parser.parse_args(argv)
    if args.n < 2:
        sys.exit(f"-n {args.n}: a standard error wants two images")
    script, model, state, alphas_cumprod = load(args.checkpoint)
    _, test_set, classes = load_data(script.DATA, args.data_dir, script.SIZE, script.CHANNELS)
    if not test_set:
        sys.exit(f"--data-dir {args.data_dir}: there is no test set")
    known = len(state["config"]["class_names"])
    if len(classes) != known:
        sys.exit(f"--data-dir {args.data_dir}: {len(classes)} classes, and the model knows {known}")
    compare_classes(state, classes)

    torch.manual_seed(0)
    images, y = test_set
    images, y = as_trained(script, images, y)
    chosen = torch.randperm(len(images))[: args.n]
    exact = alphas_cumprod.cpu().double()
    progress = Progress(len(chosen), "images")
    parts = []
    for index in chosen.split(100):
        told = None if args.unconditional else y[index].to(DEVICE)
        denoise = from_cpu(script.denoiser(model, alphas_cumprod, told), progress)
        parts.append(bits_per_dim(denoise, images[index], exact, DRAWS))
    found = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}

    print(f"{args.checkpoint} on {len(chosen)} test images")
    prior, decoder = found["prior"], found["decoder"]
    print(f"prior {prior.mean():.4f}, decoder {decoder.mean():.3f}, and the KLs:")
    for variance in ("small", "large"):
        kl = found[variance]
        total = prior + kl + decoder
        error = total.std() / len(total) ** 0.5
        print(f"{kl.mean():.3f}, {variance} variance: {total.mean():.2f} ± {error:.2f} bits/dim")
    print("mean square error of x0 and of v, by tenth of the times:")
    by_tenth = errors_by_tenth(found["times"], found["errors"], found["weights"], exact)
    for tenth, (x0, v) in enumerate(by_tenth):
        print(f"t / T from 0.{tenth}  {x0:.5f}  {v:.5f}")


if __name__ == "__main__":
    main()
