"""LoRA (Hu et al. 2021, 2106.09685): a few images change what a network draws.

They are your own, in typed/train/<class>/, or typed digits, of `lora.py --make-typed typed`. Then:

    python extras/lora.py checkpoints/ddim_unet_mnist.pt --data-dir typed --out typed.pt
"""

import argparse
import hashlib
import sys
from operator import attrgetter
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tools import DEVICE, load
from torch import nn

from common import Progress, batch, load_data


class LoRA(nn.Sequential):
    """Two linear layers, A (r, n) and B (m, r), turn a weight (m, ..) into it + 8 / r B A (eq. 3).

    So the change does not grow with the rank r; 8, the default, is what papers call alpha.
    """

    def forward(self, weight):
        a, b = self
        return weight + (8 / len(a.weight) * b.weight @ a.weight).view_as(weight)


def add_lora(model, rank):
    """Freeze a model, and add B A to the weight of each linear and convolutional layer (eq. 3)."""
    model.requires_grad_(False)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        a = nn.Linear(layer.weight[0].numel(), rank, bias=False)
        b = nn.Linear(rank, len(layer.weight), bias=False)
        nn.init.zeros_(b.weight)  # nothing changes at first
        nn.utils.parametrize.register_parametrization(layer, "weight", LoRA(a, b).to(DEVICE))


def train(script, model, alphas_cumprod, state, args):
    """Train A and B by the script's loss. Returns {name: weight in half precision}."""
    if not Path(args.data_dir, "train").is_dir():  # load_data would fetch what the model knows
        sys.exit(f"--data-dir {args.data_dir}: put images into {args.data_dir}/train/<class>/")
    shape = (script.SIZE, script.CHANNELS)
    train_set, _, class_names = load_data(script.DATA, args.data_dir, *shape, DEVICE)
    num_classes = len(state["config"]["class_names"])
    has_classes = script.NAME != "ddpm_unet_mnist"
    if has_classes and len(class_names) != num_classes:
        found = f"{len(class_names)} classes, and the model has {num_classes}"
        sys.exit(f"--data-dir {args.data_dir}: {found}")
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.Adam(learnt.values())
    progress = Progress(args.steps, "steps")

    def loss(step):
        x0, y, t, noise, u = batch(*train_set, script.T, 16, 0, step)
        if hasattr(script, "illustrate"):
            x0, y = script.illustrate(x0, y, u)  # colours and captions
        elif hasattr(model, "nothing"):
            y[u[:, 0] < 0.1] = model.nothing  # a tenth without a class, for guidance
        return script.loss(model, x0, y, t, noise, alphas_cumprod)

    losses = []
    for step in range(args.steps):
        loss_now = loss(step)
        loss_now.backward()
        losses.append(loss_now.item())
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        progress.add(1)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    with torch.no_grad():
        if not loss(0) <= losses[0]:  # of the same images and noise, before the first step
            sys.exit("nothing was learnt, the loss is no lower than at first: try a lower --rank")
    return {name: weight.detach().cpu().half() for name, weight in learnt.items()}


def make_typed(folder):
    """Write digits of DejaVu Serif, or Pillow's own face, regular and bold, in five slants."""
    try:
        face = ImageFont.truetype("DejaVuSerif.ttf", 218)  # eight times the size: smooth edges
    except OSError:
        face = ImageFont.load_default(224)
    for digit in range(10):
        Path(folder, f"train/{digit}").mkdir(parents=True, exist_ok=True)
        for i in range(10):
            is_bold = i >= 5
            slant = 0.15 * (i % 5 - 2)
            image = Image.new("L", (224, 224))
            draw = ImageDraw.Draw(image)
            draw.text((112, 192), str(digit), 255, face, "ms", stroke_width=5 * is_bold)
            image = image.transform((224, 224), Image.AFFINE, (1, slant, -112 * slant, 0, 1, 0))
            image.resize((28, 28)).save(f"{folder}/train/{digit}/{i}.png")


def hash_weights(weights):
    """SHA-256 of {name: weight} in half precision: the same of a run, and as it is shipped."""
    halves = [weight.half().flatten() for weight in weights.values()]
    return hashlib.sha256(torch.cat(halves).numpy()).hexdigest()


def load_adapter(path, sha256):
    """The dict of a .lora.pt that was learnt with the weights of this SHA-256."""
    try:
        adapter = torch.load(path, map_location="cpu", weights_only=True)
        learnt_with = adapter["sha256"]
    except Exception as error:  # of a dozen kinds, because a file can be damaged in many ways
        sys.exit(f"--adapter {path} is not an adapter: {type(error).__name__}")
    if learnt_with != sha256:
        sys.exit(f"--adapter {path} was learnt with the weights of another checkpoint")
    return adapter


def save(content, path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    except (OSError, RuntimeError) as error:  # torch.save raises both
        sys.exit(f"--out: cannot write {path}: {error}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("path", help="a checkpoint of any of the scripts")
    add("--data-dir", default="typed", help="its train/<class>/ holds the images (%(default)s)")
    add("--out", default="adapted.pt", help="a new checkpoint, and a .lora.pt (%(default)s)")
    add("--adapter", help="add what this file has learnt, and do not train")
    add("--rank", type=int, default=8, help="of the change of each matrix (%(default)s)")
    add("--steps", type=int, default=500, help="of 16 images each (%(default)s)")
    add("--make-typed", action="store_true", help="no more than write typed digits into this path")
    args = parser.parse_args(argv)
    if min(args.rank, args.steps) < 1:
        sys.exit("--rank and --steps must be 1 at least")
    if args.make_typed:
        try:
            make_typed(args.path)
        except OSError as error:
            sys.exit(f"--make-typed {args.path}: {error}")
        return

    out = Path(args.out)
    adapter_out = Path(args.out.removesuffix(".pt") + ".lora.pt")
    read = [Path(args.path)]
    written = [out]
    if args.adapter:
        read.append(Path(args.adapter))
    else:
        written.append(adapter_out)
    for path in written:
        # As files, because ./base.pt, a link and base.pt are one.
        if path.exists() and any(path.samefile(other) for other in read if other.exists()):
            sys.exit(f"--out {args.out} would overwrite {path}, which is read: name another")

    script, model, state, alphas_cumprod = load(args.path)
    sha256 = hash_weights(state["ema"])
    if args.adapter:
        adapter = load_adapter(args.adapter, sha256)
    else:
        adapter = {"sha256": sha256, "rank": args.rank}
    torch.manual_seed(0)
    add_lora(model, adapter["rank"])
    if not args.adapter:
        adapter["weights"] = train(script, model, alphas_cumprod, state, args)
        save(adapter, adapter_out)
    problem = model.load_state_dict(adapter["weights"], strict=False)  # in the file's precision
    if problem.unexpected_keys or not all(w.isfinite().all() for w in adapter["weights"].values()):
        sys.exit(f"--adapter {args.adapter} is damaged, or of another network")
    merged = {name: attrgetter(name)(model).detach().cpu() for name in state["ema"]}
    save({"ema": merged, "step": state["step"], "config": state["config"]}, out)


if __name__ == "__main__":
    main()
