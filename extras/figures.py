"""Pictures of the README: python extras/figures.py --help lists them, FIGURE --help says how."""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
TIMES = [0, 25, 50, 100, 150, 200, 250, 300, 400, 500, 700, 999]
PROMPTS = ["a thick seven leaning left", "a thin seven leaning right", "7", "a thick three"]
PROMPTS += ["thin 3", "two leaning right", "eight", ""]


def fail(message):
    """For what the user can put right: one line and exit code 2, no traceback."""
    print(f"figures.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


@torch.no_grad()
def forward_and_reverse(args):
    import ddpm_unet_mnist as ddpm
    from common import load_data

    try:
        x0 = load_data(ddpm.DATA, args.data_dir, ddpm.SIZE, 1)[0][0][:4] / 127.5 - 1
    except (OSError, ValueError) as error:
        fail(f"--data-dir {args.data_dir}: {error}")
    alphas_cumprod = ddpm.schedule()
    model = ddpm.load(HOME / "checkpoints/ddpm_unet_mnist.pt")[0]
    torch.manual_seed(0)
    noise, x = torch.randn(2, *x0.shape)
    a = alphas_cumprod[TIMES].view(-1, 1, 1, 1, 1)
    forward = a.sqrt() * x0 + (1 - a).sqrt() * noise  # (times, 4, 1, 28, 28)
    reverse = []

    def watched(x_t, t):
        if t[0] in TIMES:
            reverse.insert(0, x_t)
        return ddpm.denoiser(model, alphas_cumprod)(x_t, t)

    reverse[0] = ddpm.ddpm_sample(watched, x, alphas_cumprod)  # in place of x_t at t = 0
    columns = torch.cat([forward, torch.stack(reverse)], dim=1)  # (times, 8, 1, 28, 28)
    return ddpm.picture(columns.flatten(0, 1), rows=8).save


def prompts(args):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, HOME / "ddim_unet_mnist.py", "--sample-only"]
        command += ["--ckpt", HOME / "checkpoints/ddim_unet_mnist.pt", "--prompt", *args.prompts]
        command += [f"-n={12 * len(args.prompts)}", f"--out={folder}/rows.png"]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(2)  # the script has said why
        table = ImageOps.expand(Image.open(f"{folder}/rows.png"), (190, 0, 0, 0), "white")
    draw, font = ImageDraw.Draw(table), ImageFont.load_default(13)
    for row, prompt in enumerate(args.prompts):
        draw.text((4, 30 * row + 7), f'"{prompt}"', "black", font)
    return table.save


def curves(args):
    """Columns of csv files against another: a line for each file and column, or each sampler."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fail(f"pip install matplotlib ({error})")
    x, unit = ("seconds", 60) if args.x == "minutes" else (args.x, 1)
    lines = {}
    for path in map(Path, args.files):
        name = path.parent.name if path.stem == "log" else path.stem
        try:
            for row in csv.DictReader(path.read_text().splitlines()):
                for y in args.y:
                    line = lines.setdefault(row.get("sampler", f"{name}, {y}"), [])
                    line.append((float(row[x]) / unit, float(row[y])))
        except (OSError, KeyError, TypeError, ValueError) as error:
            fail(f"{path} must be a csv file with {x}, {', '.join(args.y)}: {error!r}")
    axes = Figure((8, 4), layout="tight").subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), args.style, label=label)
    axes.set(xlabel=args.x, xscale=args.xscale, ylabel=args.y[0], ylim=args.ylim)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend()
    return axes.figure.savefig


FIGURES = {
    "forward-and-reverse": (forward_and_reverse, "real digits turn into noise, noise into samples"),
    "prompts": (prompts, "a table of prompts and of digits drawn for them"),
    "loss": (curves, "losses of training and validation against images seen, or minutes"),
    "recognised": (curves, "share read as asked against evaluations of the network"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    figures = parser.add_subparsers(metavar="FIGURE", required=True)
    add = {}
    for name, (make, text) in FIGURES.items():
        figure = figures.add_parser(name, help=text, description=text)
        figure.error = fail
        figure.set_defaults(make=make, y=["loss", "val_loss"], style="-", xscale="linear")
        figure.add_argument("--out", default=f"{name}.png", help="(%(default)s)")
        add[name] = figure.add_argument
    figure.set_defaults(x="evaluations", y=["share"], style="o-", xscale="log", ylim=(0, 1))
    add["forward-and-reverse"]("--data-dir", default="data", help="with MNIST (%(default)s)")
    add["prompts"]("prompts", nargs="*", default=PROMPTS, help="a row each (the README's)")
    add["loss"]("files", nargs="+", help="log.csv of runs, or copies by another name")
    add["loss"]("--against", dest="x", choices=["images", "minutes"], default="images")
    add["loss"]("--ylim", type=float, nargs=2, help="lowest and highest loss to show (all)")
    add["recognised"]("files", nargs=1, help="with columns sampler, evaluations, share (0 to 1)")
    args = parser.parse_args(argv)
    save = args.make(args)
    try:
        save(args.out)
    except (OSError, ValueError) as error:
        fail(f"--out {args.out}: {error}")


if __name__ == "__main__":
    main()
