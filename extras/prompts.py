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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ddim_unet_mnist as ddim

SHIPPED = Path(ddim.__file__).with_name("checkpoints") / "ddim_unet_mnist.pt"
MIDDLE = (2.1 + 2.6) / 2  # of the widths that captions call thin and thick, in pixels


def fail(message):
    """For what the user can put right: one line and exit code 2, no traceback."""
    print(f"prompts.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


def ask(n, held, seed):
    """n prompts, and int64 (n, 5): the digit, ink, paper, whether thick, whether leaning right."""
    choose = random.Random(seed).choice
    pairs = [(k, c) for k in range(10) for c in range(8) if ddim.held_out(k, c) == held]
    prompts, asked = [], []
    for _ in range(n):
        digit, ink = choose(pairs)
        paper = choose([c for c in range(8) if c != ink])
        thickness, side = choose(["thick", "thin"]), choose(["left", "right"])
        noun = choose([str(digit), ddim.DIGITS[digit]])
        look, ground = f"{thickness} {ddim.COLOURS[ink]}", ddim.COLOURS[paper]
        prompts.append(f"a {look} {noun} leaning {side} on {ground}")
        asked.append([digit, ink, paper, thickness == "thick", side == "right"])
    return prompts, torch.tensor(asked)


def colours(images):
    """Images (B, 3, H, W) -> their ink and paper (B,): numbers of the nearest in PALETTE."""
    pixels, palette = images.flatten(2), ddim.PALETTE.flatten(1)
    paper = images[:, :, [0, 1, -2, -1]].flatten(2).median(dim=2).values  # (B, 3)
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    parser.set_defaults(**vars(ddim.make_parser().parse_args([])))  # as the script draws
    add = parser.add_argument
    add("checkpoint", nargs="?", default=SHIPPED, help="of ddim_unet_mnist.py (%(default)s)")
    add("-n", type=ddim.within(2, 1e6, int), default=1000, help="prompts of each (%(default)s)")
    add("--out", default="prompts/", help="for seen/ and held_out/, which are new (%(default)s)")
    add("--guidance", type=ddim.within(0, 1e3), help="as for the script (%(default)s)")
    add("--steps", type=ddim.within(1, ddim.T, int), help="of DDIM (%(default)s)")
    add("--seed", type=ddim.within(0, 2**31, int), help="of prompts and noise (%(default)s)")
    args = parser.parse_args(argv)
    model = ddim.load(args.checkpoint)[0].to(args.device)
    folders = [Path(args.out, name) for name in ("seen", "held_out")]
    try:
        for folder in folders:
            folder.mkdir(parents=True)  # no digits of another run may be among these
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    columns = []
    for folder in folders:
        prompts, asked = ask(args.n, folder.name == "held_out", args.seed)
        tokens = [ddim.tokenize(prompt) for prompt in prompts]
        parts = torch.arange(args.n).split(100)
        images = torch.cat([ddim.draw(model, args, tokens, part.tolist())[-1] for part in parts])
        digits, found = judge(images.cpu(), asked)
        columns.append(found)
        for i, (digit, k) in enumerate(zip(digits, asked[:, 0], strict=True)):
            with ddim.replacing(folder / f"{i:06d}-{k}.png") as path:
                ddim.picture(digit[None]).save(path, "PNG")
    print(f"{args.checkpoint}, guidance {args.guidance:g}, {args.steps} steps, {args.n} each")
    print(f"{'':20}{'seen':>15}{'held out':>15}")
    for name, seen in columns[0].items():
        print(f"{name:20}{average(seen):>15}{average(columns[1][name]):>15}")


if __name__ == "__main__":
    main()
