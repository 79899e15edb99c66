"""Is a drawing of the class that was asked for? A small classifier, trained once, reads it.

python extras/classify.py eval/uvit/ checkpoints/dit_cifar10.pt -n 500 -- --guidance 2
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tools import DEVICE, load, read_folder
from torch import nn
from torchvision import ops, transforms

import common
import dit_cifar10

STEPS = 2500  # of training the classifier
BATCH_SIZE = 256

# ---- The classifier


class Residual(ops.Conv2dNormActivation):
    def forward(self, x):
        return x + super().forward(x)


def network(channels, classes, width=64):
    """(B, C, H, W) in [-1, 1] -> logits; without its last layer, features (B, 4 * width)."""
    conv = ops.Conv2dNormActivation  # 3 x 3, batch norm, ReLU
    model = nn.Sequential(
        nn.Conv2d(channels, 8 * channels, 2, bias=False),
        nn.ReLU(),
        conv(8 * channels, width),
        nn.MaxPool2d(2),
        Residual(width, width),
        conv(width, 2 * width),
        nn.MaxPool2d(2),
        Residual(2 * width, 2 * width),
        conv(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
    return model.to(DEVICE, memory_format=torch.channels_last)


def fit(images, labels, classes, width=64, seed=0):
    """A classifier of uint8 (N, C, H, W) by classes (N,), and features (M, D) of some of them."""
    print(f"training on {len(images)} images, in {STEPS} steps of {BATCH_SIZE}", flush=True)
    torch.manual_seed(seed)
    in_colour = images.shape[1] == 3
    model = network(images.shape[1], classes, width)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, 0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, STEPS, cycle_momentum=False)
    crop = transforms.RandomCrop(images.shape[-1], padding=2, padding_mode="reflect")
    dtype = dit_cifar10.make_parser().get_default("dtype")  # bfloat16 where it is fast
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")
    progress = common.Progress(STEPS, "steps")
    for step in range(STEPS):
        x, y, *_ = common.batch(images, labels, 1, BATCH_SIZE, seed, step)
        if in_colour and step % 2:  # digits have no mirror image
            x = x.flip(-1)
        with autocast:
            logits = model(crop(x))
        nn.functional.cross_entropy(logits.float(), y, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        progress.add(1)
    model.eval()
    some = images[:: len(images) // 10000 + 1]
    return model, read(model, some)


@torch.no_grad()
def read(model, images):
    """uint8 (N, C, H, W) -> features (N, D), float64; in colour, both ways round and averaged."""
    views = images
    if images.shape[1] == 3:
        views = torch.cat([images, images.flip(-1)])
    progress = common.Progress(len(views), "views read")
    features = []
    for part in views.split(250):
        features.append(model[:-1](part / 127.5 - 1))
        progress.add(len(part))
    return torch.cat(features).unflatten(0, (-1, len(images))).mean(dim=0).double()


def load_judge(path, channels, classes):
    """(the classifier, features of its training images) from a file that get_judge has saved."""
    try:
        state = torch.load(path, DEVICE, weights_only=True)
        features = state["train"]
        model = network(channels, classes, width=features.shape[1] // 4).eval()
        model.load_state_dict(state["model"])
    except Exception as error:  # of a dozen kinds, because a file can be damaged in many ways
        sys.exit(f"{path} is not a classifier of {classes} classes: {type(error).__name__}")
    return model, features


def get_judge(path, images, labels, classes, width, seed):
    """The classifier in this file and its features; trained on these images where it is missing."""
    if path.exists():
        return load_judge(path, images.shape[1], classes)
    path.parent.mkdir(parents=True, exist_ok=True)  # before the training, which is long
    model, features = fit(images, labels, classes, width, seed)
    torch.save({"model": model.state_dict(), "train": features}, path)
    return model, features


# ---- Drawings


def draw(checkpoint, n, flags):
    """A new folder with n drawings of this checkpoint, by its own script and with these flags."""
    script = load(checkpoint)[0]
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, script.__file__, "--ckpt", checkpoint, "-n", str(n)]
    drawing = subprocess.run([*command, "--out", f"{folder}/", *flags])
    if drawing.returncode != 0:
        sys.exit(1)  # the script has said why
    return folder


def ink(images):
    """Any ink on any paper, uint8 (N, C, H, W) -> bright ink on black, (N, 1, H, W)."""
    edge = images[:, :, [0, -1]].flatten(2)  # the first and the last row, (N, C, 2 W)
    paper = edge.float().median(dim=2).values[:, :, None, None]
    distance = (images - paper).norm(dim=1, keepdim=True)
    farthest = distance.amax(dim=(2, 3), keepdim=True)
    distance = distance / farthest.clamp(min=1e-12)  # not 0, where the paper is blank
    return distance.mul(255).round().byte()


def frechet(x, y):
    """Between Gaussians fitted to x (N, D), y (M, D) (Heusel et al. 2017, 1706.08500)."""
    means = (x.mean(0) - y.mean(0)).square()
    shared = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real
    return (means + x.var(0) + y.var(0) - 2 * shared).sum().item()


def report(title, model, images, asked, reference, names):
    """Print how far images (N, C, H, W) are from the reference, features (M, D), and how they
    are read; asked (N,) says as what they should be, or is None."""
    features = read(model, images)
    print(f"{title}: {len(images)} images, Frechet distance {frechet(features, reference):.3f}")
    sure, seen = model[-1](features.float()).softmax(dim=1).max(dim=1)
    unsure = (sure < 0.5).float()
    print(f"  mean confidence {sure.mean():.3f}, below 0.5 in {unsure.mean():.1%}")
    if asked is None:
        return
    hits = (seen == asked).double()
    print(f"  read as asked: {hits.mean():.1%} +- {hits.std() / len(hits) ** 0.5:.1%}")
    for k in asked.unique():
        print(f"    {names[k]}: {hits[asked == k].mean():.1%}")


def examine(source, args, flags):
    """Report on one source, a folder or a checkpoint."""
    folder = source if source.is_dir() else draw(source, args.n, flags)
    images, asked = read_folder(folder)
    if len(images) < 2:
        sys.exit(f"{folder}: a distance wants two images")
    images = images.to(DEVICE)
    size = images.shape[-1]
    name = "CIFAR10"
    if size == 28:
        name = "MNIST"
        images = ink(images)
    channels = images.shape[1]
    train_set, test_set, names = common.load_data(name, args.data_dir, size, channels, DEVICE)
    if not test_set:
        sys.exit(f"--data-dir {args.data_dir}: there is no test set")
    if asked is not None:
        asked = asked.to(DEVICE)
        if asked.max() >= len(names):
            sys.exit(f"{folder}: class {asked.max()} is none of the {len(names)} in the --data-dir")

    path = args.judge or Path(args.data_dir, f"judge_{name.lower()}.pt")
    model, reference = get_judge(path, *train_set, len(names), args.width, args.seed)
    report(source, model, images, asked, reference, names)
    real, labels = test_set
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: len(images)]
    report("as many real ones", model, real[some], labels[some], reference, names)
    if args.cas and asked is not None:
        student, features = fit(images, asked, len(names))
        title = "all real ones, to one trained on these"
        report(title, student, real, labels, features, names)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.error = sys.exit
    add = parser.add_argument
    add("sources", nargs="+", type=Path, help="folders of PNG files or checkpoints")
    add("-n", type=int, default=1000, help="to draw, with the flags that follow --")
    add("--data-dir", default="data", help="of the real images (%(default)s)")
    add("--judge", type=Path, help="the classifier (judge_*.pt in the --data-dir)")
    add("--width", type=int, default=64, help="of one that is yet to be trained (%(default)s)")
    add("--seed", type=int, default=0, help="of its training (%(default)s)")
    add("--cas", action="store_true", help="train another on the drawings alone")
    args = parser.parse_args(argv[:end])
    for source in args.sources:
        examine(source, args, flags=argv[end + 1 :])


if __name__ == "__main__":
    main()
