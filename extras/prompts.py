"""Does ddim_unet_mnist.py draw what its prompt says, also in pairs that training never showed?

    python extras/prompts.py checkpoints/ddim_unet_mnist.pt -n 1000 --out prompts/
    python extras/classify.py prompts/seen/ prompts/held_out/  # are they the digits asked for?

Half of the prompts, all like "a thick red seven leaning left on blue", ask for pairs of digit and
ink seen in training, half for those held out. A colour is right if it is nearer to the one asked
for than to the others. Then the colours asked for are undone, width and slant are measured as for
the captions, and the digits are written, white on black.
"""

import argparse
import random
import sys
from itertools import product
from pathlib import Path

import torch
from tools import DEVICE, HOME

import ddim_unet_mnist as ddim
from common import Progress, noises

SHIPPED = HOME / "checkpoints" / "ddim_unet_mnist.pt"
MIDDLE = (2.1 + 2.6) / 2  # of the widths that captions call thin and thick, in pixels


def ask(n, held, seed):
    """n prompts, and int64 (n, 5): the digit, ink, paper, whether thick, whether leaning right."""
    choose = random.Random(seed).choice
    pairs = [pair for pair in product(range(10), range(8)) if ddim.held_out(*pair) == held]
    prompts, asked = [], []
    for _ in range(n):
        digit, ink = choose(pairs)
        paper = choose([colour for colour in range(8) if colour != ink])
        thickness = choose(["thick", "thin"])
        side = choose(["left", "right"])
        noun = choose([str(digit), ddim.DIGITS[digit]])
        look = f"{thickness} {ddim.COLOURS[ink]} {noun} leaning {side}"
        prompts.append(f"a {look} on {ddim.COLOURS[paper]}")
        asked.append([digit, ink, paper, thickness == "thick", side == "right"])
    return prompts, torch.tensor(asked)


def draw(model, prompts, args, progress):
    """Images (N, 3, H, W), on the CPU. Image i is a function of --seed, i and its prompt."""
    alphas_cumprod = ddim.schedule(DEVICE)
    shape = (ddim.CHANNELS, ddim.SIZE, ddim.SIZE)
    numbers = range(len(prompts))
    drawn = []

    def watched(x_t, t):
        progress.add(len(x_t) / args.steps)
        return denoise(x_t, t)

    for start in range(0, len(numbers), args.micro_batch):
        part = numbers[start : start + args.micro_batch]
        tokens = torch.tensor([ddim.tokenize(prompts[i]) for i in part], device=DEVICE)
        denoise = ddim.denoiser(model, alphas_cumprod, tokens, args.guidance)
        noise = next(noises(args.seed, part, shape, DEVICE))
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, args.dtype == "bfloat16"):
            images = ddim.ddim_sample(watched, noise, alphas_cumprod, args.steps)
        drawn.append(images.cpu())
    return torch.cat(drawn)


def colours(images):
    """Images (B, 3, H, W) -> their ink and paper (B,): numbers of the nearest in PALETTE."""
    palette = ddim.PALETTE.flatten(1)
    pixels = images.flatten(2)
    edge = images[:, :, [0, 1, -2, -1]].flatten(2)
    paper = edge.median(dim=2).values  # (B, 3)
    distance = (pixels - paper[:, :, None]).square().sum(dim=1)
    inner = distance.topk(10).indices  # the edges of a stroke are mixed with paper
    ink = pixels.gather(2, inner[:, None].expand(-1, 3, -1)).mean(dim=2)
    return [torch.cdist(colour, palette).argmin(dim=1) for colour in (ink, paper)]


def undo(images, ink, paper):
    """Images (B, 3, H, W) in these colours (B,) -> (B, 1, H, W) in [-1, 1], white on black."""
    paper = ddim.PALETTE[paper]
    way = ddim.PALETTE[ink] - paper
    share = ((images - paper) * way).sum(dim=1) / way.square().sum(dim=1)
    return share.clamp(0, 1)[:, None] * 2 - 1


def judge(images, asked):
    """Images (B, 3, H, W), asked (B, 5) -> the digits (B, 1, H, W), and what is found of them."""
    _, ink, paper, thick, right = asked.T
    inks, papers = colours(images)
    digits = undo(images, ink, paper)
    width, slant = ddim.measure(digits)  # nan, and so never right, where nothing is drawn
    return digits, {
        "ink": inks == ink,
        "paper": papers == paper,
        "ink and paper": (inks == ink) & (papers == paper),
        "thickness": torch.where(thick == 1, width > MIDDLE, width < MIDDLE),
        "lean": torch.where(right == 1, slant > 0, slant < 0),
        "width of thick ones": width[(thick == 1) & width.isfinite()],
        "width of thin ones": width[(thick == 0) & width.isfinite()],
    }


def average(values):
    """The mean and its standard error, in percent where values are true or false."""
    mean = values.double().mean()
    error = values.double().std(correction=0) / len(values) ** 0.5
    form = ".1%" if values.dtype == torch.bool else ".2f"
    return f"{mean:{form}} ± {error:{form}}"


def make_folder(folder):
    """Make a new folder: no digits of another run may be among these."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = list(folder.iterdir())
    except OSError as error:
        sys.exit(f"--out: {error}")
    if others:
        sys.exit(f"--out: {folder} is not empty, name another folder")


def main(argv=None):
    usual = ddim.make_parser().parse_args([])  # as the script draws
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument

    def flag(name, default, text, **options):
        add(name, type=type(default), default=default, help=f"{text} (%(default)s)", **options)

    add("checkpoint", nargs="?", default=SHIPPED, help="of ddim_unet_mnist.py (%(default)s)")
    flag("-n", 1000, "prompts of each")
    flag("--out", "prompts/", "for seen/ and held_out/, which are new")
    flag("--guidance", usual.guidance, "as for the script")
    flag("--steps", usual.steps, "of DDIM")
    flag("--seed", usual.seed, "of prompts and noise")
    flag("--dtype", usual.dtype, "of the network", choices=["float32", "bfloat16"])
    flag("--micro-batch", usual.micro_batch, "images at a time")
    args = parser.parse_args(argv)
    if min(args.n, args.steps, args.micro_batch) < 1 or args.steps > ddim.T:
        sys.exit(f"-n, --steps and --micro-batch must be 1 at least, and --steps {ddim.T} at most")
    model, _ = ddim.load(args.checkpoint)
    model.to(DEVICE)
    folders = [Path(args.out, "seen"), Path(args.out, "held_out")]
    for folder in folders:
        make_folder(folder)

    progress = Progress(2 * args.n, "images")
    columns = []
    for folder in folders:
        prompts, asked = ask(args.n, folder.name == "held_out", args.seed)
        images = draw(model, prompts, args, progress)
        digits, found = judge(images, asked)
        columns.append(found)
        for i, digit in enumerate(digits):
            ddim.picture(digit[None]).save(folder / f"{i:06d}-{asked[i, 0]}.png")
    print(f"{args.checkpoint}, guidance {args.guidance:g}, {args.steps} steps, {args.n} each")
    print(f"{'':20}{'seen':>15}{'held out':>15}")
    seen, held_out = columns
    for name in seen:
        print(f"{name:20}{average(seen[name]):>15}{average(held_out[name]):>15}")


if __name__ == "__main__":
    main()
