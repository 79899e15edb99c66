"""How fast are our networks, beside those of diffusers, of lucidrains and of smalldiffusion?

    python extras/speed.py --what transformer --batch 32 --rounds 10

Whole training steps (forward, loss, backward, Adam), and the evaluations that a sampler makes, of
networks of about one size, as they come and in alternation, so that all see the same machine.
"""

import argparse
import importlib
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from tools import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit_cifar10
from common import Progress


def list_unets():
    """[(module, class, its arguments), ..]"""
    diffusers = {
        "sample_size": 28,
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 10,
        "block_out_channels": (32, 64, 128),
        "norm_num_groups": 8,
        "down_block_types": 3 * ["DownBlock2D"],
        "up_block_types": 3 * ["UpBlock2D"],
        "add_attention": False,  # as ours has none; lucidrains' cannot do without
    }
    lucidrains = {"dim": 32, "dim_mults": (1, 2, 4), "channels": 1}
    return [
        ("ddpm_unet_mnist", "UNet", {}),
        ("diffusers", "UNet2DModel", diffusers),
        ("denoising_diffusion_pytorch", "Unet", lucidrains),
    ]


def list_transformers(depth, patch):
    """[(module, class, its arguments), ..]"""
    ours = {"dim": 384, "depth": depth, "heads": 6, "patch": patch}
    diffusers = {
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": 32,
        "patch_size": patch,
        "num_layers": depth,
        "num_attention_heads": 6,
        "attention_head_dim": 64,
        "attention_bias": True,
        "num_embeds_ada_norm": 10,
    }
    smalldiffusion = {
        "in_dim": 32,
        "channels": 3,
        "depth": depth,
        "num_heads": 6,
        "patch_size": patch,
    }
    return [
        ("dit_cifar10", "DiT", ours),
        ("uvit_cifar10", "UViT", ours),
        ("diffusers", "DiTTransformer2DModel", diffusers),
        ("smalldiffusion", "DiT", smalldiffusion),
    ]


def evaluate(net, x, t):
    package = type(net).__module__.split(".")[0]
    if package == "diffusers":
        return net(x, t, class_labels=t % 10).sample
    if package == "smalldiffusion":  # it knows noise levels, not times
        return net(x, (t + 1).view(-1, 1, 1, 1) / 100)
    return net(x, t)


def train_step(net, optimizer, dtype, x, t):
    net.train()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
        out = evaluate(net, x, t)
    F.mse_loss(out.float(), x).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def draw_step(net, dtype, x, t):
    """What a sampler does: an evaluation."""
    net.eval()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
        evaluate(net, x, t)


def seconds(run):
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def list_matmuls():
    """{dtype: a product of two matrices of side 2048}, bfloat16 where the scripts choose it."""
    a = torch.randn(2048, 2048, device=DEVICE)
    matmuls = {"float32": partial(torch.mm, a, a)}
    if dit_cifar10.make_parser().get_default("dtype") == "bfloat16":  # else it takes minutes
        b = a.bfloat16()
        matmuls["bfloat16"] = partial(torch.mm, b, b)
    return matmuls


def count_flops(net, x, t):
    """Of an evaluation, with attention written out, so that it is counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluate(net, x, t)
    return counter.get_total_flops()


def measure(runs, rounds):
    """The median time in seconds of each of runs, {key: function}, taken in turn."""
    times = {key: [] for key in runs}
    progress = Progress((rounds + 1) * len(runs), "measurements")
    for _ in range(rounds + 1):
        for key, run in runs.items():
            times[key].append(seconds(run))
            progress.add(1)
    # The first round warms up.
    return {key: statistics.median(measured[1:]) for key, measured in times.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("--what", choices=["unet", "transformer"], default="unet", help="(%(default)s)")
    add("--batch", type=int, default=32, help="images in a step (%(default)s)")
    add("--rounds", type=int, default=10, help="the median is reported (%(default)s)")
    add("--depth", type=int, default=12, help="blocks of a transformer (%(default)s)")
    add("--patch", type=int, choices=[2, 4, 8], default=4, help="of a transformer (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.batch, args.rounds, args.depth) < 1:
        sys.exit("--batch, --rounds and --depth must be 1 at least")
    if args.what == "unet":
        shape = (1, 28, 28)
        networks = list_unets()
    else:
        shape = (3, 32, 32)
        networks = list_transformers(args.depth, args.patch)
    x = torch.randn(args.batch, *shape, device=DEVICE)
    t = torch.randint(1000, (args.batch,), device=DEVICE)
    matmuls = list_matmuls()
    runs = {("matmul", dtype): matmul for dtype, matmul in matmuls.items()}
    flops = {}  # of an evaluation; a training step takes three times as many
    for module, name, options in networks:
        try:
            network = getattr(importlib.import_module(module), name)
        except ImportError as error:
            print(f"{module} is left out, pip install {module} ({error})")
            continue
        net = network(**options).to(DEVICE)
        size = sum(map(torch.numel, net.parameters())) / 1e6
        label = f"{module} {name}, {size:.2f} M"
        flops[label] = count_flops(net, x, t)
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        for dtype in matmuls:
            runs[label, dtype, "training"] = partial(train_step, net, optimizer, dtype, x, t)
            runs[label, dtype, "drawing"] = partial(draw_step, net, dtype, x, t)
    median = measure(runs, args.rounds)
    for label in flops:
        for dtype in matmuls:
            training = median[label, dtype, "training"]
            drawing = median[label, dtype, "drawing"]
            matmul_rate = 2 * 2048**3 / median["matmul", dtype]  # operations a second
            share = 3 * flops[label] / training / matmul_rate
            rates = f"training {args.batch / training:.1f} images/s, {share:.0%} of the matmul rate"
            print(f"{label}, {dtype}: {rates}, evaluation {args.batch / drawing:.1f} images/s")


if __name__ == "__main__":
    main()
