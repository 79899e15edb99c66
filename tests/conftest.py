"""What the tests in this folder share: the path to the programs, and small images."""

import os
import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "extras"))
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # beside other work, more threads take longer


def random_images(*shape):
    """uint8 noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def write_folders(root, *names):
    """0.png in each folder, 28 x 28 and grey: the k-th one's pixels are all k."""
    for k, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), k).save(folder / "0.png")
