"""What the programs in this folder share: they load any script's checkpoint, and folders of images.

Importing it puts the scripts on the path, so that `import common` works from here.
"""

import importlib
import re
import sys
from pathlib import Path

import torch
from PIL import Image

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCRIPTS = ["ddpm_unet_mnist", "ddim_unet_mnist", "dit_cifar10", "uvit_cifar10"]


def load(path):
    """(script, model, state, alphas_cumprod) of a checkpoint; the script is an imported module.

    The model and the schedule are on DEVICE. Exits with one line where there is no checkpoint.
    """
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["config"]["script"]
    except Exception as error:  # of a dozen kinds, because a file can be damaged in many ways
        sys.exit(f"{path} is not a checkpoint: {type(error).__name__}")
    if name not in SCRIPTS:
        sys.exit(f"{path} belongs to {name!r}, which is none of {', '.join(SCRIPTS)}")
    script = importlib.import_module(name)
    model, state = script.load(path)
    schedule = [state["config"]["schedule"]] if "schedule" in state["config"] else []
    return script, model.to(DEVICE), state, script.schedule(DEVICE, *schedule)


def compare_classes(state, class_names):
    """Says so where the data have other classes than those that the checkpoint was trained on."""
    known = state["config"]["class_names"]
    if known != class_names:
        print(f"the classes of the data are {class_names}, those of the checkpoint {known}")


def as_trained(script, images, y):
    """uint8 images (N, C, H, W) and classes y (N,), as they are shown to the network of a script.

    That of ddim_unet_mnist sees digits in colours, the same ones each time, and y are captions.
    """
    if not hasattr(script, "illustrate"):
        return images, y
    torch.manual_seed(0)
    u = torch.rand(len(y), 12).clamp(min=0.1)  # so that every caption says something
    x0, y = script.illustrate(images / 127.5 - 1, y, u)
    return x0.mul(127.5).add(127.5).round().byte(), y


def read_folder(folder):
    """The PNG files of a folder, uint8 (N, 3, S, S), and their classes (N,): 3 of 000042-3.png.

    The size S is that of the first file. Where a name has no class, classes are None. Exits with
    one line where there are no such files, or one cannot be read.
    """
    from common import Progress, read_image

    files = sorted(path for path in Path(folder).glob("*.png") if not path.name.startswith("."))
    if not files:
        sys.exit(f"{folder} holds no PNG files")
    images = []
    progress = Progress(len(files), "images read")
    try:
        with Image.open(files[0]) as image:
            size = image.width
        for path in files:
            images.append(read_image(path, size, 3))
            progress.add(1)
    except (OSError, ValueError) as error:
        sys.exit(f"{folder}: {error}")
    images = torch.stack(images)
    found = [re.search(r"-(\d+)$", path.stem) for path in files]
    if not all(found):
        return images, None
    return images, torch.tensor([int(match[1]) for match in found])
