"""LoRA (Hu et al. 2021, 2106.09685): a few images change what a network draws.
They are your own, in typed/train/<class>/, or typed digits, of `lora.py --make-typed typed`. Then:

    python extras/lora.py checkpoints/ddim_unet_mnist.pt --data-dir typed --out typed.pt
"""

import argparse
import hashlib
import importlib
import sys
from operator import attrgetter
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import batch, load_data

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fail(message):  # for what the user can put right: one line and exit code 2, no traceback
    print(f"lora.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


class LoRA(nn.Sequential):  # of A (rank, n) and B (m, rank): weight (m, ...) -> weight + B A
    def forward(self, weight):
        return weight + (self[1].weight @ self[0].weight).view_as(weight)


def add_lora(model, rank):
    """Freeze a model, and add B A to the weight of each linear and convolutional layer (eq. 3)."""
    model.requires_grad_(False)
    for layer in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
        a = nn.Linear(layer.weight[0].numel(), rank, bias=False)
        b = nn.Linear(rank, len(layer.weight), bias=False)
        nn.init.zeros_(b.weight)  # nothing changes at first
        nn.utils.parametrize.register_parametrization(layer, "weight", LoRA(a, b).to(DEVICE))


def train(script, model, known, args):
    """Train A and B by the script's loss, on a folder of `known` classes: {name: half weight}."""
    if not Path(args.data_dir, "train").is_dir():  # load_data would fetch what the model knows
        fail(f"--data-dir {args.data_dir}: put images into {args.data_dir}/train/<class>/")
    try:
        data, _, names = load_data(script.DATA, args.data_dir, script.SIZE, script.CHANNELS, DEVICE)
    except (OSError, ValueError) as error:
        fail(f"--data-dir {args.data_dir}: {error}")
    if len(names) != known and script.NAME != "ddpm_unet_mnist":  # which is told no class
        fail(f"--data-dir {args.data_dir}: {len(names)} classes, and the model has {known}")
    named = [model.schedule] if hasattr(model, "schedule") else []
    alphas_cumprod = script.schedule(DEVICE, *named)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for step in range(args.steps):
        x0, y, t, noise, u = batch(*data, script.T, 16, 0, step)
        if hasattr(script, "illustrate"):
            x0, y = script.illustrate(x0, y, u)
        elif hasattr(model, "num_classes"):
            y = torch.where(u[:, 0] < 0.1, known, y)  # a tenth without a class, for guidance
        losses.append(script.loss(model, x0, y, t, noise, alphas_cumprod))
        losses[-1].backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) % 50 == 0:
            print(f"step {step + 1}  loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    return {name: w.detach().half() for name, w in model.named_parameters() if w.requires_grad}


def make_typed(folder):
    """Write digits of DejaVu Serif, or Pillow's own face, regular and bold, in five slants."""
    try:
        face = ImageFont.truetype("DejaVuSerif.ttf", 218)  # eight times the size: smooth edges
    except OSError:
        face = ImageFont.load_default(224)
    for i in range(100):
        digit, bold, slant = i // 10, i // 5 % 2, 0.15 * (i % 5 - 2)
        image = Image.new("L", (224, 224))
        ImageDraw.Draw(image).text((112, 192), f"{digit}", 255, face, "ms", stroke_width=5 * bold)
        image = image.transform((224, 224), Image.AFFINE, (1, slant, -112 * slant, 0, 1, 0))
        Path(folder, f"train/{digit}").mkdir(parents=True, exist_ok=True)
        image.resize((28, 28)).save(f"{folder}/train/{digit}/{i % 10}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    add = parser.add_argument
    add("path", help="a checkpoint of any of the scripts")
    add("--data-dir", default="typed", help="its train/<class>/ holds the images (%(default)s)")
    add("--out", default="adapted.pt", help="a new checkpoint, and a .lora.pt (%(default)s)")
    add("--adapter", help="add what this file has learnt, and do not train")
    add("--rank", type=int, default=8, help="of the change of each matrix (%(default)s)")
    add("--steps", type=int, default=500, help="of 16 images each (%(default)s)")
    add("--make-typed", action="store_true", help="no more than write typed digits into this path")
    args = parser.parse_args(argv)
    if min(args.rank, args.steps) < 1 or args.out in (args.path, args.adapter):
        fail("--rank and --steps are above 0, and --out is no file that is read")
    try:
        if args.make_typed:
            sys.exit(make_typed(args.path))
        state = torch.load(args.path, "cpu", weights_only=True)
        script = importlib.import_module(state["config"]["script"])
        model = script.load(args.path)[0].to(DEVICE)
        weights = torch.cat([weight.half().flatten() for weight in state["ema"].values()])
        new = {"sha256": hashlib.sha256(weights.numpy()).hexdigest(), "rank": args.rank}
        adapter = torch.load(args.adapter, "cpu", weights_only=True) if args.adapter else new
    except Exception as error:  # of many kinds, for a file can be damaged in many ways
        fail(f"{args.path} {args.adapter or ''}: {error}")
    if adapter.get("sha256") != new["sha256"]:
        fail(f"--adapter {args.adapter} was learnt with other weights than {args.path}")
    torch.manual_seed(0)
    add_lora(model, adapter["rank"])
    if not args.adapter:
        adapter["weights"] = train(script, model, len(state["config"]["names"]), args)
        with script.replacing(args.out.removesuffix(".pt") + ".lora.pt") as path:
            torch.save(adapter, path)
    model.load_state_dict(adapter["weights"], strict=False)
    state["ema"] = {name: attrgetter(name)(model).detach().cpu() for name in state["ema"]}
    with script.replacing(args.out) as path:
        torch.save({key: state[key] for key in ("ema", "step", "config")}, path)


if __name__ == "__main__":
    main()
