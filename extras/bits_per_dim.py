"""How well does a model know real images? The variational bound of a checkpoint, in bits/dim.

    python extras/bits_per_dim.py checkpoints/dit_cifar10.pt --data-dir data -n 1000

Per pixel and channel, without loss: 8 without a model, 3.7 with DDPM (Ho et al. 2020, table 2).
"""

import argparse
import importlib
import math
import sys
from pathlib import Path

import torch
from torch.special import ndtr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = (1, 2, 3)  # of an image, in (B, C, H, W)


def fail(message):
    print(f"bits_per_dim.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


@torch.no_grad()
def bits_per_dim(denoise, pixels, alphas_cumprod, draws=40, device="cpu"):
    """The bound of Ho et al. 2020, eq. 5, for uint8 images (B, C, H, W), by denoise(x_t, t) -> x0.

    Bits/dim (4, B): prior; KLs where p has q's variance ("small"); where it has beta_t ("large");
    decoder. Of T - 1 KLs, `draws` are taken: their times, the mean squares of x0_hat - x0 and the
    weights follow, each (draws, B). All but the network is float64 and on the CPU.
    """
    x0 = pixels.double() / 127.5 - 1

    def estimate(t):
        a = alphas_cumprod[t][:, None, None, None]
        noise = torch.randn(x0.shape)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        x0_hat = denoise(x_t.float().to(device), t.to(device))
        return x0_hat.cpu().double()

    a = alphas_cumprod[-1]
    prior = (a * (x0.square() - 1) - torch.log1p(-a)).mean(DIMS) / 2
    # Bits are spent where log SNR falls. Cut its fall into `draws` equal shares: a time from each.
    snr = alphas_cumprod / (1 - alphas_cumprod)
    falls = snr.log().diff()
    probability = falls / falls.sum()
    u = torch.rand(draws, len(x0), dtype=torch.float64)
    u = (torch.arange(draws)[:, None] + u) / draws
    step = torch.searchsorted(probability.cumsum(0)[:-1], u)
    weight = 1 / (draws * probability[step])
    errors = torch.stack([(estimate(t) - x0).square().mean(DIMS) for t in step + 1])
    small = -snr.diff()[step] / 2 * errors  # Kingma et al. 2021 (2107.00630), eq. 14
    ratio = (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:])  # small variance / large
    large = ratio[step] * small + (ratio - 1 - ratio.log())[step] / 2
    sigma = (ratio[0] * (1 - alphas_cumprod[1] / alphas_cumprod[0])).sqrt()  # that of t = 1
    away = x0 - estimate(torch.zeros(len(x0), dtype=torch.int64))
    up = ndtr((away + 1 / 255) / sigma).masked_fill(pixels == 255, 1.0)
    down = ndtr((away - 1 / 255) / sigma).masked_fill(pixels == 0, 0.0)
    decoder = -(up - down).clamp(min=1e-12).log().mean(DIMS)  # eq. 13: 256 bins, open at the ends
    small, large = (weight * small).sum(0), (weight * large).sum(0)
    nats = torch.stack([prior, small, large, decoder])
    return nats / math.log(2), step + 1, errors, weight


def errors_by_tenth(times, errors, weight, alphas_cumprod):
    """Mean square error of x0 and of v for each tenth of T, (10, 2), by what bits_per_dim gives."""
    both = torch.stack([errors, errors / (1 - alphas_cumprod[times])])
    means = []
    for tenth in range(10):
        here = times * 10 // len(alphas_cumprod) == tenth
        means.append((both * weight)[:, here].sum(1) / weight[here].sum())
    return torch.stack(means)


def main(argv=None):
    from common import load_data

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("checkpoint", help="of any of the scripts")
    parser.add_argument("--data-dir", default="data", help="as for the script (%(default)s)")
    parser.add_argument("-n", type=int, default=1000, help="test images (%(default)s)")
    parser.add_argument("--unconditional", action="store_true", help="tell no class, no prompt")
    args = parser.parse_args(argv)
    if args.n < 2:
        fail("-n: a standard error wants two images")
    try:
        state = torch.load(args.checkpoint, "cpu", weights_only=True)
        script = importlib.import_module(state["config"]["script"])
        model = script.load(args.checkpoint)[0].to(DEVICE)
    except Exception as error:  # of many kinds, for a file can be damaged in many ways
        fail(f"{args.checkpoint} cannot be loaded: {error}")
    try:
        _, test_set, names = load_data(script.DATA, args.data_dir, script.SIZE, script.CHANNELS)
    except (OSError, ValueError) as error:
        fail(f"--data-dir {args.data_dir}: {error}")
    if not test_set or len(names) != len(state["config"].get("names", names)):
        fail(f"--data-dir {args.data_dir}: no test set, or other classes than the model's")
    torch.manual_seed(0)
    images, y = test_set
    if hasattr(script, "illustrate"):  # in colours, and told what captions may say
        u = torch.rand(len(y), 12).clamp(min=0.1)
        x0, y = script.illustrate(images / 127.5 - 1, y, u)
        images = x0.mul(127.5).add(127.5).round().byte()
    named = [model.schedule] if hasattr(model, "schedule") else []
    alphas_cumprod = script.schedule("cpu", *named).double()
    batches = []
    for index in torch.randperm(len(images))[: args.n].split(100):
        told = None if args.unconditional else y[index].to(DEVICE)
        denoise = script.denoiser(model, alphas_cumprod.float().to(DEVICE), told)
        batches.append(bits_per_dim(denoise, images[index], alphas_cumprod, device=DEVICE))
    bits, *terms = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    prior, small, large, decoder = bits
    print(f"{args.checkpoint} on {len(prior)} test images")
    print(f"prior {prior.mean():.4f}, decoder {decoder.mean():.3f}, and the KLs:")
    for variance, kl in (("small", small), ("large", large)):
        total = prior + kl + decoder
        error = total.std() / len(total) ** 0.5
        print(f"{kl.mean():.3f}, {variance} variance: {total.mean():.2f} ± {error:.2f} bits/dim")
    print("mean square error of x0 and of v, by tenth of the times:")
    for tenth, (x0, v) in enumerate(errors_by_tenth(*terms, alphas_cumprod)):
        print(f"t / T from 0.{tenth}  {x0:.5f}  {v:.5f}")


if __name__ == "__main__":
    main()
