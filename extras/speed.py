"""How fast are our networks, beside those of diffusers, of lucidrains and of smalldiffusion?

    python extras/speed.py --what transformer --batch 32 --rounds 10

Whole training steps (forward, loss, backward, Adam), and the evaluations that a sampler makes, of
networks of about one size, as they come and in alternation, so that all see the same machine.
"""

import argparse
import importlib
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fail(message):
    """For what the user can put right: one line and exit code 2, no traceback."""
    print(f"speed.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


def list_networks(what, depth, patch):
    """The shape of an image, and [(module, class, its arguments), ..]."""
    if what == "unet":
        peer = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10}
        peer |= {"block_out_channels": (32, 64, 128), "norm_num_groups": 8}
        peer |= {"down_block_types": 3 * ["DownBlock2D"], "up_block_types": 3 * ["UpBlock2D"]}
        peer |= {"add_attention": False}  # as ours has none; lucidrains' cannot do without
        lucid = {"dim": 32, "dim_mults": (1, 2, 4), "channels": 1}
        ours = [("ddpm_unet_mnist", "UNet", {})]
        peers = [("diffusers", "UNet2DModel", peer), ("denoising_diffusion_pytorch", "Unet", lucid)]
        return (1, 28, 28), ours + peers
    shape = {"dim": 384, "depth": depth, "heads": 6, "patch": patch}
    peer = {"in_channels": 3, "out_channels": 3, "sample_size": 32, "patch_size": patch}
    peer |= {"num_layers": depth, "num_attention_heads": 6, "attention_head_dim": 64}
    peer |= {"attention_bias": True, "num_embeds_ada_norm": 10}
    small = {"in_dim": 32, "channels": 3, "depth": depth, "num_heads": 6, "patch_size": patch}
    ours = [("dit_cifar10", "DiT", shape), ("uvit_cifar10", "UViT", shape)]
    peers = [("diffusers", "DiTTransformer2DModel", peer), ("smalldiffusion", "DiT", small)]
    return (3, 32, 32), ours + peers


def evaluate(net, x, t):
    if type(net).__module__.startswith("diffusers"):
        return net(x, t, class_labels=t % 10).sample
    if type(net).__module__.startswith("smalldiffusion"):  # it knows noise levels, not times
        return net(x, (t + 1).view(-1, 1, 1, 1) / 100)
    return net(x, t)


def step(net, optimizer, dtype, x, t):
    """A training step, or without an optimizer what a sampler does: an evaluation."""
    net.train(optimizer is not None)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")
    with autocast, torch.set_grad_enabled(net.training):
        out = evaluate(net, x, t)
    if net.training:
        torch.nn.functional.mse_loss(out.float(), x).backward()
        optimizer.step()
        optimizer.zero_grad()


def seconds(function, *inputs):
    start = time.perf_counter()
    function(*inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    add = parser.add_argument
    add("--what", choices=["unet", "transformer"], default="unet", help="(%(default)s)")
    add("--batch", type=int, default=32, help="images in a step (%(default)s)")
    add("--rounds", type=int, default=10, help="of which the median is told (%(default)s)")
    add("--depth", type=int, default=12, help="blocks of a transformer (%(default)s)")
    add("--patch", type=int, choices=[2, 4, 8], default=4, help="of a transformer (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.batch, args.rounds, args.depth) < 1:
        fail("--batch, --rounds and --depth must be 1 at least")
    shape, networks = list_networks(args.what, args.depth, args.patch)
    x = torch.randn(args.batch, *shape, device=DEVICE)
    t = torch.randint(1000, (args.batch,), device=DEVICE)
    a = torch.randn(2048, 2048, device=DEVICE)
    matrices = {"float32": a, "bfloat16": a.bfloat16()}
    first = [min(seconds(torch.mm, a, a) for _ in range(3)) for a in matrices.values()]
    if first[1] > first[0]:
        del matrices["bfloat16"]  # this machine emulates it
    runs = {("matmul", dtype): (torch.mm, a, a) for dtype, a in matrices.items()}
    flops = {}  # of an evaluation; a training step takes three times as many
    for module, name, options in networks:
        try:
            net = getattr(importlib.import_module(module), name)(**options).to(DEVICE)
        except ImportError as error:
            print(f"{module} is left out, pip install {module} ({error})")
            continue
        label = f"{module} {name}, {sum(map(torch.numel, net.parameters())) / 1e6:.2f} M"
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            evaluate(net, x, t)  # with attention written out, so that it is counted
        flops[label] = counter.get_total_flops()
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        for dtype in matrices:
            runs[label, dtype] = (step, net, optimizer, dtype, x, t)
            runs[label, dtype, "drawing"] = (step, net, None, dtype, x, t)
    times = {key: [] for key in runs}
    for _ in range(args.rounds + 1):  # the first one warms up
        for key, run in runs.items():
            times[key].append(seconds(*run))
    median = {key: statistics.median(measured[1:]) for key, measured in times.items()}
    for label, dtype in itertools.product(flops, matrices):
        train, draw = median[label, dtype], median[label, dtype, "drawing"]
        share = 3 * flops[label] / train / (2 * len(a) ** 3 / median["matmul", dtype])
        print(f"{label}, {dtype}: training {args.batch / train:.1f} images/s, ", end="")
        print(f"{share:.0%} of the matmul rate, evaluation {args.batch / draw:.1f} images/s")


if __name__ == "__main__":
    main()
