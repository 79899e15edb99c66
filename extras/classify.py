"""Is an image of the class that was asked for? A small classifier, trained once and kept, reads it.

    python extras/classify.py --data cifar10 --data-dir data  # train it: how good is it?
    python extras/classify.py eval/dit/ eval/uvit/ --cas      # read folders of 000042-3.png
    python extras/classify.py checkpoints/dit_cifar10.pt -n 500 -- --guidance 2  # draw and read

Frechet distances are in its 256 features, not Inception's, and larger for fewer images: compare
those of equal n, and with that of as many real ones.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import RandomCrop

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = {"mnist": ("MNIST", 28, 1), "cifar10": ("CIFAR10", 32, 3)}  # name, size, channels
BATCH = 256  # images in a training step


def fail(message):
    """For what the user can put right: one line and exit code 2, no traceback."""
    print(f"classify.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def conv(inputs, outputs, *pool):
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, *pool, nn.BatchNorm2d(outputs), nn.ReLU()]


def network(channels, num_classes):
    """(B, C, H, W) in [-1, 1] -> logits; without its last layer, features (B, 256)."""
    stem = [nn.Conv2d(channels, 8 * channels, 2, bias=False), nn.ReLU()]
    half = [*conv(8 * channels, 64, nn.MaxPool2d(2)), Residual(*conv(64, 64))]
    quarter = [*conv(64, 128, nn.MaxPool2d(2)), Residual(*conv(128, 128)), *conv(128, 256)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)]
    return nn.Sequential(*stem, *half, *quarter, *head).to(memory_format=torch.channels_last)


@torch.no_grad()
def read(model, images):
    """uint8 (N, C, H, W) -> features (N, 256) and probabilities (N, classes), on the CPU."""
    features = []
    for x in images.split(250):
        x = x.to(DEVICE) / 127.5 - 1
        views = [x, x.flip(-1)] if x.shape[1] == 3 else [x]
        features.append(sum(model[:-1](view) for view in views) / len(views))
    features = torch.cat(features)
    return features.cpu(), model[-1](features).softmax(dim=1).cpu()


def fit(images, labels, test_set, args):
    """Train on uint8 (N, C, H, W), classes (N,): the network, the test set's features, accuracy."""
    torch.manual_seed(args.seed)
    model = network(images.shape[1], int(test_set[1].max()) + 1).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, 0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, args.steps, cycle_momentum=False)
    crop = RandomCrop(images.shape[-1], padding=2, padding_mode="reflect")
    for _ in range(args.steps):
        index = torch.randint(len(images), (BATCH,))
        x = crop(images[index].float() / 127.5 - 1).to(DEVICE)
        if x.shape[1] == 3:  # they are in random order: mirror half of them
            x[::2] = x[::2].flip(-1)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(x.contiguous(memory_format=torch.channels_last)).float()
        F.cross_entropy(logits, labels[index].to(DEVICE), label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    features, probabilities = read(model.eval(), test_set[0])
    right = probabilities.argmax(dim=1) == test_set[1]
    return model, features, right.double().mean().item()


def frechet(x, y):
    """Between Gaussians fitted to x (N, D) and y (M, D) (Heusel et al. 2017, 1706.08500)."""
    x, y = x.double(), y.double()
    cov_x, cov_y = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return (apart + cov_x.trace() + cov_y.trace() - 2 * shared).item()


def load_real(data, args):
    from common import load_data

    try:
        return load_data(DATA[data][0], args.data_dir, DATA[data][1])
    except (OSError, ValueError) as error:
        fail(f"--data-dir {args.data_dir}: {error}")


def load_judge(data, args):
    """The classifier of a data set, trained if there is none, and what is known of it."""
    path = args.judge or Path(f"runs/judge_{data}.pt")
    if not path.exists():
        print(f"{path}: training it, in {args.steps} steps", flush=True)
        (images, labels), test_set, names = load_real(data, args)
        model, test, accuracy = fit(images, labels, test_set, args)
        train = read(model, images[:: len(images) // 10000 + 1])[0]
        state = {"names": names, "accuracy": accuracy, "train": train, "test": test}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "model": model.state_dict()}, path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = network(DATA[data][2], len(state["names"]))
        model.load_state_dict(state["model"])
    except Exception as error:  # of many kinds, for a file can be damaged in many ways
        fail(f"--judge {path} is not a classifier of {data}: {error}")
    print(f"{path}: {state['accuracy']:.2%} of {len(state['test'])} real test images read right")
    return model.to(DEVICE).eval(), state


def read_images(source, data, n, flags):
    """Their data set, uint8 (N, C, H, W), and the classes (N,) that end their names, or None."""
    from common import read_image

    with tempfile.TemporaryDirectory() as drawn:
        folder = source if Path(source).is_dir() else drawn
        try:
            if folder == drawn:
                script = torch.load(source, "cpu", weights_only=True)["config"]["script"]
                draw = [sys.executable, HOME / f"{script}.py", "--ckpt", source, f"-n={n}"]
                if subprocess.run([*draw, f"--out={drawn}/", *flags]).returncode:
                    sys.exit(2)  # the script has said why
            files = sorted(Path(folder).glob("*.png"))
            with Image.open(files[0]) as image:
                data = data or ("mnist" if image.width <= 28 else "cifar10")
            images = torch.stack([read_image(file, *DATA[data][1:]) for file in files])
        except Exception as error:  # of many kinds, as above
            fail(f"{source} must be a checkpoint, or a folder of PNG files: {error!r}")
    asked = [re.search(r"-.*?(\d+)$", file.stem) for file in files]
    if not all(asked):
        return data, images, None
    return data, images, torch.tensor([int(found[1]) for found in asked])


def report(features, probabilities, asked, state):
    n, num_classes = probabilities.shape
    confidence, seen = probabilities.max(dim=1)
    if asked is not None:
        right = (seen == asked).double()
        share = right.mean().item()
        print(f"  read as asked: {share:.1%} +- {math.sqrt(share * (1 - share) / n):.1%}, by class")
        for k in asked.unique().tolist():
            print(f"    {state['names'][k]}: {right[asked == k].mean():.1%}")
    unsure = (confidence < 0.5).double().mean()
    print(f"  mean confidence {confidence.mean():.3f}, below 0.5 in {unsure:.1%}")
    entropy = torch.special.entr(seen.bincount(minlength=num_classes) / n).sum()
    print(f"  entropy of the classes read: {entropy:.3f} of {math.log(num_classes):.3f}")
    order = torch.randperm(len(state["test"]), generator=torch.manual_seed(0))
    floor = frechet(state["test"][order[:n]], state["train"])
    distance = frechet(features, state["train"])
    print(f"  Frechet distance of {n}: {distance:.3f}; of as many real ones: {floor:.3f}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail  # a line, not a page of usage
    add = parser.add_argument
    add("sources", nargs="*", help="folders/ of PNG files, or checkpoints [-- flags to draw with]")
    add("-n", type=int, default=1000, help="images to draw from a checkpoint (%(default)s)")
    add("--data", choices=list(DATA), help="what they show; else told by their size")
    add("--data-dir", default="data", help="the real images (%(default)s)")
    add("--judge", type=Path, help="the classifier, trained if missing; else runs/judge_DATA.pt")
    add("--cas", action="store_true", help="train another on the images, test it on real ones")
    add("--steps", type=int, default=4000, help=f"of {BATCH} images, of training (%(default)s)")
    add("--seed", type=int, default=0, help="of the training (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the training")
    args = parser.parse_args(argv[:end])
    if not (args.sources or args.data):
        fail("name images, or the --data of a classifier to train")
    if not args.sources:
        load_judge(args.data, args)
    for source in args.sources:
        data, images, asked = read_images(source, args.data, args.n, argv[end + 1 :])
        model, state = load_judge(data, args)
        if asked is not None and asked.max() >= len(state["names"]):
            fail(f"{source} shows class {asked.max()}, which the classifier does not know")
        print(f"{source}: {len(images)} images")
        report(*read(model, images), asked, state)
        if args.cas and asked is not None:
            test_set = load_real(data, args)[1]
            accuracy = fit(images, asked, test_set, args)[2]
            print(f"  read by one trained on them alone: {accuracy:.2%} of the real test images")


if __name__ == "__main__":
    main()
