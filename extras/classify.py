"""Is a drawing of the class that was asked for? A small classifier, trained once, reads it.

python extras/classify.py eval/uvit/ checkpoints/dit_cifar10.pt -n 500 -- --guidance 2
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torchvision import datasets, ops, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Residual(ops.Conv2dNormActivation):
    def forward(self, x):
        return x + super().forward(x)


def network(channels, classes):
    """(B, C, H, W) in [-1, 1] -> logits; without its last layer, features (B, 256)."""
    conv = ops.Conv2dNormActivation  # 3 x 3, batch norm, ReLU
    full = [nn.Conv2d(channels, 8 * channels, 2, bias=False), nn.ReLU(), conv(8 * channels, 64)]
    half = [nn.MaxPool2d(2), Residual(64, 64), conv(64, 128)]
    quarter = [nn.MaxPool2d(2), Residual(128, 128), conv(128, 256), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*full, *half, *quarter, nn.Flatten(), nn.Linear(256, classes)).to(DEVICE)


def ink(images):
    """Any ink on any paper, uint8 (N, C, H, W) -> bright ink on black, (N, 1, H, W)."""
    paper = images[:, :, [0, -1]].flatten(2).float().median(dim=2).values[:, :, None, None]
    distance = (images - paper).norm(dim=1, keepdim=True)
    return nn.functional.normalize(distance, float("inf"), dim=(2, 3)).mul(255).round().byte()


@torch.no_grad()
def read(model, images):
    """uint8 (N, C, H, W) -> features (N, 256), float64; in colour, both ways round and averaged."""
    views = torch.cat([images, images.flip(-1)]) if images.shape[1] == 3 else images
    features = torch.cat([model[:-1](part / 127.5 - 1) for part in views.split(250)])
    return features.view(-1, len(images), 256).mean(dim=0).double()


def fit(images, labels, classes, steps=4000, batch_size=256):
    """A classifier of uint8 (N, C, H, W) by classes (N,), and features (M, 256) of some of them."""
    print(f"training on {len(images)} images, in {steps} steps of {batch_size}", flush=True)
    torch.manual_seed(0)
    model = network(images.shape[1], classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, 0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, steps, cycle_momentum=False)
    crop = transforms.RandomCrop(images.shape[-1], padding=2, padding_mode="reflect")
    for step in range(steps):
        x, y = common.batch(images, labels, 1, batch_size, 0, step)[:2]
        x = x.flip(-1) if x.shape[1] == 3 and step % 2 else x
        nn.functional.cross_entropy(model(crop(x)), y, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return model.eval(), read(model, images[:: len(images) // 10000 + 1])


def frechet(x, y):
    """Between Gaussians fitted to x (N, D), y (M, D) (Heusel et al. 2017, 1706.08500)."""
    shared = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real
    return ((x.mean(0) - y.mean(0)).square() + x.var(0) + y.var(0) - 2 * shared).sum().item()


def report(title, model, images, asked, reference, names):
    features = read(model, images)
    print(f"{title}: {len(images)} images, Frechet distance {frechet(features, reference):.3f}")
    sure, seen = model[-1](features.float()).softmax(dim=1).max(dim=1)
    print(f"  mean confidence {sure.mean():.3f}, below 0.5 in {sure.lt(0.5).float().mean():.1%}")
    if len(asked) == len(images):
        hits = (seen == asked.to(DEVICE)).double()
        print(f"  read as asked: {hits.mean():.1%} +- {hits.std() / len(hits) ** 0.5:.1%}")
        print(*[f"    {names[k]}: {hits[asked == k].mean():.1%}" for k in asked.unique()], sep="\n")


def main():
    end = [*sys.argv, "--"].index("--")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("sources", nargs="+", type=Path, help="folders of PNG files or checkpoints")
    parser.add_argument("-n", type=int, default=1000, help="to draw, with the flags that follow --")
    parser.add_argument("--data-dir", default="data", help="of the real images (%(default)s)")
    parser.add_argument("--judge", type=Path, help="the classifier (judge_*.pt in the --data-dir)")
    parser.add_argument("--cas", action="store_true", help="train another on the drawings alone")
    args = parser.parse_args(sys.argv[1:end])
    for source in args.sources:
        try:
            folder = source if source.is_dir() else Path(tempfile.mkdtemp())
            if folder != source:
                script = torch.load(source, "cpu", weights_only=True)["config"]["script"]
                draw = [sys.executable, Path(common.__file__).with_stem(script), "--ckpt", source]
                draw += [f"-n={args.n}", f"--out={folder}/", *sys.argv[end + 1 :]]
                subprocess.run(draw, check=True)
            files = sorted(folder.glob("*.png"))
            size = datasets.folder.default_loader(files[0]).width
            images = torch.stack([common.read_image(file, size, 3) for file in files]).to(DEVICE)
            name, channels = ("MNIST", 1) if size == 28 else ("CIFAR10", 3)
            images = ink(images) if name == "MNIST" else images
            train, test, names = common.load_data(name, args.data_dir, size, channels, DEVICE)
            some = torch.randperm(len(test[0]), generator=torch.manual_seed(0))[: len(images)]
            judge = args.judge or Path(args.data_dir, f"judge_{name.lower()}.pt")
            state = torch.load(judge, DEVICE, weights_only=True) if judge.exists() else {}
            model = network(channels, len(names)).eval()
            model.load_state_dict(state.get("model", model.state_dict()))
        except Exception as error:  # of many kinds, for a file can be damaged in many ways
            parser.error(f"{source}, its data or its classifier cannot be read: {error!r:.200}")
        if not state:
            model, state["train"] = fit(*train, len(names))
            torch.save({"model": model.state_dict(), "train": state["train"]}, judge)
        asked = torch.tensor([int(k) for file in files for k in re.findall(r"-(\d+)$", file.stem)])
        report(source, model, images, asked, state["train"], names)
        report("as many real ones", model, test[0][some], test[1][some], state["train"], names)
        if args.cas and len(asked) == len(images):
            model, features = fit(images, asked.to(DEVICE), len(names))
            report("all real ones, to one trained on these", model, *test, features, names)


if __name__ == "__main__":
    main()
