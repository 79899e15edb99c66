"""Pictures of the README: python extras/figures.py --help lists them, FIGURE --help says how."""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
TIMES = [0, 25, 50, 100, 150, 200, 250, 300, 400, 500, 700, 999]
# Of the first four, no training image has the digit in that ink.
PROMPTS = [
    "a thick red seven leaning left on blue",
    "a white eight on red",
    "a green 4 leaning right on white",
]
PROMPTS += ["a thin blue 3 on yellow", "a thick black 2 on orange", "purple five", "9 on green", ""]


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
    model = ddpm.load(HOME / "checkpoints/ddpm_unet_mnist.pt")[0]
    alphas_cumprod = ddpm.schedule(name=model.schedule)
    torch.manual_seed(3)  # with 0 and 2, one of the four drawings is no digit
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
    columns = 12 // len(args.ckpt)
    table = Image.new("RGB", (640, 30 * len(args.prompts)), "white")
    draw = ImageDraw.Draw(table)
    for row, prompt in enumerate(args.prompts):
        draw.text((4, 30 * row + 7), f'"{prompt}"', "black", ImageFont.load_default(13))
    for i, path in enumerate(args.ckpt):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, HOME / "ddim_unet_mnist.py", "--ckpt", path]
            command += ["--prompt", *args.prompts, f"-n={columns * len(args.prompts)}"]
            if subprocess.run([*command, "--out", f"{folder}/x.png"]).returncode:
                sys.exit(2)  # the script has said why
            table.paste(Image.open(f"{folder}/x.png"), (270 + i * (30 * columns + 10), 0))
    return table.save


def curves(args):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fail(f"pip install matplotlib ({error})")
    lines = {}
    try:
        for path in args.files:
            for row in csv.DictReader(Path(path).read_text().splitlines()):
                for y in args.y:
                    line = lines.setdefault(row.get("sampler", f"{path}, {y}"), [])
                    line.append((float(row[args.x]), float(row[y])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{path} must be a csv file with {args.x}, {', '.join(args.y)}: {error!r}")
    axes = Figure((8, 4), layout="tight").subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), label=label)
    axes.set(xlabel=args.x, ylabel=args.y[0])
    axes.legend()
    return axes.figure.savefig


FIGURES = {
    "forward-and-reverse": (forward_and_reverse, "real digits turn into noise, noise into samples"),
    "prompts": (prompts, "a table of prompts and of digits drawn for them"),
    "curves": (curves, "columns of csv files against another, as losses against images seen"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    figures = parser.add_subparsers(metavar="FIGURE", required=True)
    add = {}
    for name, (make, text) in FIGURES.items():
        figure = figures.add_parser(name, help=text, description=text)
        figure.error = fail
        figure.set_defaults(make=make)
        figure.add_argument("--out", default=f"{name}.png", help="(%(default)s)")
        add[name] = figure.add_argument
    add["forward-and-reverse"]("--data-dir", default="data", help="with MNIST (%(default)s)")
    add["prompts"]("--ckpt", nargs="+", default=[HOME / "checkpoints/ddim_unet_mnist.pt"])
    add["prompts"]("prompts", nargs="*", default=PROMPTS, help="a row each (the README's)")
    add["curves"]("files", nargs="+", help="log.csv of runs, or any csv file; a line for each")
    add["curves"]("--x", default="images", help="a column (%(default)s)")
    add["curves"]("--y", nargs="+", default=["loss", "val_loss"], help="columns (loss, val_loss)")
    args = parser.parse_args(argv)
    save = args.make(args)
    try:
        save(args.out)
    except (OSError, ValueError) as error:
        fail(f"--out {args.out}: {error}")


if __name__ == "__main__":
    main()
