"""Pictures of the README: python extras/figures.py --help lists them, FIGURE --help says how."""

import argparse
import csv
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tools import DEVICE, HOME, load, read_folder

from common import Progress, load_data

TIMES = [0, 25, 50, 100, 150, 200, 250, 300, 400, 500, 700, 999]
# Of the first four, no training image has the digit in that ink.
PROMPTS = [
    "a thick red seven leaning left on blue",
    "a white eight on red",
    "a green 4 leaning right on white",
    "a thin blue 3 on yellow",
    "a thick black 2 on orange",
    "purple five",
    "9 on green",
    "",
]

# Each figure is a function of its flags. It returns the function that saves the picture.


@torch.no_grad()
def forward_and_reverse(args):
    import ddpm_unet_mnist as ddpm

    (digits, _), _, _ = load_data(ddpm.DATA, args.data_dir, ddpm.SIZE, 1)
    x0 = digits[:4] / 127.5 - 1
    model, state = ddpm.load(HOME / "checkpoints/ddpm_unet_mnist.pt")
    alphas_cumprod = ddpm.schedule(name=state["config"]["schedule"])
    torch.manual_seed(3)  # with 0 and 2, one of the four drawings is no digit
    noise, x = torch.randn(2, *x0.shape)
    a = alphas_cumprod[TIMES].view(-1, 1, 1, 1, 1)
    forward = a.sqrt() * x0 + (1 - a).sqrt() * noise  # (times, 4, 1, 28, 28)

    denoise = ddpm.denoiser(model, alphas_cumprod)
    progress = Progress(ddpm.T, "steps")
    on_the_way = {}

    def watched(x_t, t):
        if t in TIMES:
            on_the_way[t] = x_t
        progress.add(1)
        return denoise(x_t, t)

    drawn = ddpm.ddpm_sample(watched, x, alphas_cumprod, ddpm.T)
    on_the_way[0] = drawn  # in place of x_t at t = 0
    reverse = torch.stack([on_the_way[t] for t in TIMES])
    columns = torch.cat([forward, reverse], dim=1)  # (times, 8, 1, 28, 28)
    return ddpm.picture(columns.flatten(0, 1), rows=8).save


def restored(args):
    import restore

    dit, model, _, alphas_cumprod = load(HOME / "checkpoints/dit_cifar10.pt")
    _, test_set, names = load_data(dit.DATA, args.data_dir, dit.SIZE, dit.CHANNELS, DEVICE)
    images, labels = test_set
    y = torch.arange(len(names), device=DEVICE)
    first = torch.stack([torch.where(labels == k)[0][0] for k in y])
    whole = images[first] / 127.5 - 1
    rows = [whole]
    for task in ("inpaint - --mask 12 8 30 28", "upscale", "colour"):
        flags = restore.make_parser().parse_args(task.split())
        damage, repair = restore.find_damage(dit, flags)
        known = damage(whole)
        rows.append(repair(known))
        rows.append(restore.answer(dit, model, alphas_cumprod, flags, known, y))
    picture = dit.picture(torch.stack(rows, dim=1).flatten(0, 1), len(rows))
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save


def prompts(args):
    import ddim_unet_mnist as ddim

    rows = len(args.prompts)
    columns = 12 // len(args.ckpt)  # of a checkpoint
    width = 30 * columns + 10
    table = Image.new("RGB", (max(640, 260 + width * len(args.ckpt)), 30 * rows), "white")
    draw = ImageDraw.Draw(table)
    for row, prompt in enumerate(args.prompts):
        draw.text((4, 30 * row + 7), f'"{prompt}"', "black", ImageFont.load_default(13))
    for i, path in enumerate(args.ckpt):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ddim.__file__, "--ckpt", path, "--prompt", *args.prompts]
            drawing = subprocess.run([*command, f"-n={rows * columns}", f"--out={folder}/"])
            if drawing.returncode != 0:
                sys.exit(1)  # the script has said why
            images, _ = read_folder(folder)
        grid = ddim.picture(images / 127.5 - 1, rows)
        table.paste(grid, (270 + width * i, 0))
    return table.save


def folders(args):
    import dit_cifar10 as dit

    font = ImageFont.load_default(14)
    rows = []
    for path in args.folders:
        images, _ = read_folder(path)
        row = dit.picture(images[: args.n] / 127.5 - 1)
        rows.append(row.resize((2 * row.width, 2 * row.height), Image.Resampling.NEAREST))
    names = [Path(path).name for path in args.folders]
    left = round(max(map(font.getlength, names))) + 16
    width = left + max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for name, row in zip(names, rows, strict=True):
        draw.text((left - 8, top + row.height / 2), name, "black", font, anchor="rm")
        sheet.paste(row, (left, top))
        top += row.height
    return sheet.save


def nearest(images, real, k):
    """The k of real (M, C, H, W) that are nearest to each of images (N, C, H, W), uint8.

    Indices (N, k), and by how much their pixels differ (N, k), the root of the mean square.
    """
    real = real.to(DEVICE).flatten(1).float()
    progress = Progress(len(images), "images compared")
    distances, indices = [], []
    for part in images.split(50):
        found = torch.cdist(part.to(DEVICE).flatten(1).float(), real).topk(k, largest=False)
        distances.append(found.values.cpu() / math.sqrt(real.shape[1]))
        indices.append(found.indices.cpu())
        progress.add(len(part))
    return torch.cat(indices), torch.cat(distances)


def neighbours(args):
    from classify import ink

    import dit_cifar10 as dit

    drawn, _ = read_folder(args.folder)
    size = drawn.shape[-1]
    if size == 28:
        drawn = ink(drawn)
        (real, _), test_set, _ = load_data("MNIST", args.data_dir, size, 1)
    else:
        (real, _), test_set, _ = load_data("CIFAR10", args.data_dir, size, 3)
        real = torch.cat([real, real.flip(-1)])  # training shows both
    indices, distances = nearest(drawn, real, k=3)
    ours = distances[:, 0]
    print("how far from the nearest training image, of 255: the median, and the least")
    print(f"{len(drawn)} drawings: {ours.median():.1f}, {ours.min():.1f}")
    if test_set:
        others = test_set[0][: len(drawn)]
        _, usual = nearest(others, real, k=1)
        print(f"{len(others)} test images: {usual.median():.1f}, {usual.min():.1f}")
    columns = torch.cat([drawn[:, None], real[indices]], dim=1)[: args.n]  # (n, 4, C, H, W)
    picture = dit.picture(columns.flatten(0, 1) / 127.5 - 1, rows=4)
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save


def grids(args):
    if len(args.labels) != len(args.files):
        sys.exit(f"{len(args.files)} files need as many --labels, not {len(args.labels)}")
    pictures = []
    try:
        for path in args.files:
            with Image.open(path) as image:
                pictures.append(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them
        sys.exit(f"{path}: {error}")
    try:
        font = ImageFont.truetype("DejaVuSans.ttf", 18)  # has a ½
    except OSError:
        font = ImageFont.load_default(18)
    gap = 10
    top = 30  # where the labels stand
    width = sum(picture.width + gap for picture in pictures) - gap
    height = top + max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for picture, label in zip(pictures, args.labels, strict=True):
        middle = left + picture.width / 2
        draw.text((middle, top / 2), label, "black", font, anchor="mm")
        sheet.paste(picture, (left, top))
        left += picture.width + gap
    return sheet.save


def curves(args):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        sys.exit(f"pip install matplotlib ({error})")
    lines = {}  # {label: [(x, y), ..]}
    try:
        for path in args.files:
            for row in csv.DictReader(Path(path).read_text().splitlines()):
                for y in args.y:
                    label = row.get("sampler", f"{path}, {y}")
                    point = (float(row[args.x]), float(row[y]))
                    lines.setdefault(label, []).append(point)
    except (OSError, KeyError, TypeError, ValueError) as error:
        columns = f"{args.x}, {', '.join(args.y)}"
        sys.exit(f"{path} must be a csv file with {columns}: {error!r}")
    figure = Figure((8, 4), layout="tight")
    axes = figure.subplots()
    for label, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, label=label)
    axes.set(xlabel=args.x, ylabel=args.y[0])
    axes.legend()
    return figure.savefig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    figures = parser.add_subparsers(metavar="FIGURE", required=True)

    def add_figure(name, make, text):
        figure = figures.add_parser(name, help=text, description=text)
        figure.error = sys.exit
        figure.set_defaults(make=make)
        figure.add_argument("--out", default=f"{name}.png", help="(%(default)s)")
        return figure.add_argument

    text = "real digits turn into noise, noise into samples"
    add = add_figure("forward-and-reverse", forward_and_reverse, text)
    add("--data-dir", default="data", help="with MNIST (%(default)s)")

    text = "the first test image of each class: damaged and restored, three times"
    add = add_figure("restored", restored, text)
    add("--data-dir", default="data", help="with CIFAR-10 (%(default)s)")

    add = add_figure("prompts", prompts, "a table of prompts and of digits drawn for them")
    add("--ckpt", nargs="+", default=[HOME / "checkpoints/ddim_unet_mnist.pt"])
    add("prompts", nargs="*", default=PROMPTS, help="a row each (the README's)")

    add = add_figure("folders", folders, "a row for each folder, with its name and first images")
    add("folders", nargs="+", help="of PNG files, from top to bottom")
    add("-n", type=int, default=10, help="images in a row (%(default)s)")

    text = "drawings, and below each the three training images that are nearest to it"
    add = add_figure("neighbours", neighbours, text)
    add("folder", help="of PNG files")
    add("--data-dir", default="data", help="of the training images (%(default)s)")
    add("-n", type=int, default=10, help="drawings to show (%(default)s)")

    add = add_figure("grids", grids, "pictures side by side, as the grids that a run has drawn")
    add("files", nargs="+", help="PNG files, from left to right")
    add("--labels", nargs="+", required=True, help='one for each, such as "0 min" "½ min"')

    text = "columns of csv files against another, as losses against images seen"
    add = add_figure("curves", curves, text)
    add("files", nargs="+", help="log.csv of runs, or any csv file; a line for each")
    add("--x", default="images", help="a column (%(default)s)")
    add("--y", nargs="+", default=["loss", "val_loss"], help="columns (loss, val_loss)")

    args = parser.parse_args(argv)
    save = args.make(args)
    try:
        save(args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"--out {args.out}: {error}")


if __name__ == "__main__":
    main()
