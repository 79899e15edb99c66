"""Noise schedules, data and randomness: what the four scripts share. Nothing here knows a network.

A schedule is a float32 tensor `alphas_cumprod` of shape (T,): entry t is alpha-bar_t, the share of
the image's variance that is left in x_t. Times are 0 .. T-1.
"""

import io
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# --------------------------------------------------------------------------------------------------
# Schedules


def linear_schedule(T=1000, beta_start=1e-4, beta_end=0.02):
    """alphas_cumprod (T,) of evenly spaced betas (Ho et al. 2020, 2006.11239, section 4)."""
    return cumulate(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


def cosine_schedule(T=1000, s=0.008, max_beta=0.999):
    """alphas_cumprod (T,), a squared cosine (Nichol & Dhariwal 2021, 2102.09672, eq. 17).

    It ends in 2.4e-9: at T - 1 nothing is left of the image. Methods that divide by alpha-bar, or
    take its log SNR for granted, have to start a little earlier.
    """
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    betas = [min(1 - f[t + 1] / f[t], max_beta) for t in range(T)]
    return cumulate(torch.tensor(betas, dtype=torch.float64))


def flow_schedule(T=1000):
    """alphas_cumprod (T,) of rectified flow (Liu et al. 2022, 2209.03003).

    Its straight paths (1 - u) x0 + u noise, at u = 1/(T+1) .. T/(T+1), are scaled to variance 1. On
    it, DDIM is Euler's method.
    """
    u = torch.arange(1, T + 1) / (T + 1)
    return (1 - u) ** 2 / ((1 - u) ** 2 + u**2)


def cumulate(betas):
    """alphas_cumprod (T,), float32, from betas (T,), float64: a product of a thousand factors."""
    return (1 - betas).cumprod(0).float()


# --------------------------------------------------------------------------------------------------
# Progress


class Progress:
    """Says how much of `total` is done, and how long the rest will take: every two seconds, and
    more rarely after some minutes. Of several processes, the first one speaks."""

    def __init__(self, total, what):
        self.total = total
        self.what = what
        self.done = 0
        self.start = time.monotonic()
        self.spoken = self.start

    def add(self, n):
        self.done += n
        now = time.monotonic()
        elapsed = now - self.start
        if os.environ.get("RANK", "0") == "0" and now - self.spoken > max(2, elapsed / 100):
            self.spoken = now
            left = elapsed * max(self.total / self.done - 1, 0)
            left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            print(f"{self.done:.0f} of {self.total} {self.what}, {left} left", flush=True)


# --------------------------------------------------------------------------------------------------
# Data: a data set is a uint8 tensor (N, C, H, W) and int64 labels (N,), both on the training device

FILES = {"MNIST": "MNIST/raw", "CIFAR10": "cifar-10-batches-py"}  # where torchvision keeps them
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
KNOWN = {"MNIST", "cifar-10-batches-py", "cifar-10-python.tar.gz"}  # what it leaves in a data_dir


def load_data(name, data_dir, size, channels, device="cpu"):
    """(images, labels) of the training set, the same of the test set or None, and the class names.

    name is "MNIST" or "CIFAR10"; channels are 1 or 3, which for grey images are alike. If data_dir
    holds train/<class>/, all images in there are read, cropped and scaled to size x size, and those
    in test/<class>/ or val/<class>/ are the test set. Otherwise torchvision finds the set there, or
    downloads it. Exits with one line that says what to do where the data cannot be read.
    """
    try:
        sets, classes = _read(name, Path(data_dir).expanduser(), size, channels)
    except (OSError, ValueError) as error:
        sys.exit(f"--data-dir {data_dir}: {error}")
    sets = [(images.to(device), labels.to(device)) for images, labels in sets]
    test_set = sets[1] if len(sets) == 2 else None
    return sets[0], test_set, classes


def _read(name, root, size, channels):
    content = _visible(root) if root.exists() else []
    if (root / "train").is_dir():
        return _read_folders(root, size, channels)
    if content and KNOWN.isdisjoint(path.name for path in content):
        # Images in another layout are no reason to fetch a data set and train on that.
        layout = "put images into train/<class>/*.png (and test/<class>/*.png, if you like)"
        raise ValueError(f"{layout}, or fetch {name} into a new folder: here is {content[0].name}")
    return _read_torchvision(name, root, size, channels)


def _read_torchvision(name, root, size, channels):
    from torchvision import datasets  # takes a second to import, so only where data are read

    dataset = getattr(datasets, name)
    files = root / FILES[name]
    problem = _fetch(dataset, root)
    sets = []
    for is_train in (True, False):
        try:
            data = dataset(root, train=is_train)
        except Exception as error:  # torn files raise AssertionError, TypeError, EOFError, ..
            if "not found" in str(error):  # torchvision's words for files that are not there
                advice = f"put all files of {name} into {files}, or images into train/<class>/"
                raise OSError(f"no network? {advice} ({problem})") from error
            raise OSError(f"damaged: delete {files} and run again ({_one_line(error)})") from error
        images = torch.as_tensor(data.data)  # (N, H, W) or (N, H, W, C)
        labels = torch.as_tensor(data.targets)
        known = (labels >= 0) & (labels < 10)
        if not len(images) == len(labels) == known.sum():
            found = f"{len(images)} images, {int(known.sum())} labels from 0 to 9"
            raise ValueError(f"damaged: delete {files} and run again ({found})")
        pixels = tuple(images.shape[1:3])
        if pixels != (size, size):
            advice = "put images of your own into train/<class>/"
            raise ValueError(f"{advice}: those in {files} are {pixels}, not {(size, size)}")
        images = images.reshape(len(images), size, size, -1).permute(0, 3, 1, 2)
        sets.append((images.expand(-1, channels, -1, -1).contiguous(), labels))
    return sets, data.classes


def _fetch(dataset, root):
    """One process per node downloads, the others wait. Returns why files may be missing."""
    problem = "the process that fetches them failed"
    if not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            dataset(root, download=True)
        except Exception as error:
            # Raised here, it would leave the others waiting. Reading will show what it means.
            problem = _one_line(error)
    if dist.is_initialized():
        dist.barrier()
    return problem


def _read_folders(root, size, channels):
    listed = [_list_images(root / "train")]
    for test in (root / "test", root / "val"):
        if test.is_dir() and len(listed) == 1:
            listed.append(_list_images(test))
            different = sorted(listed[0].keys() ^ listed[1].keys())
            if different:
                raise ValueError(f"give {test} the folders of train: one has no {different[0]}")
    classes = list(listed[0])
    numbered = ascii(dict(enumerate(classes)))
    if len(numbered) < 180 and os.environ.get("RANK", "0") == "0":
        print(f"classes: {numbered}", flush=True)
    return [_read_images(files, size, channels) for files in listed], classes


def _list_images(folder):
    """{class: [path, ..]} of folder/<class>/**: every file whose ending Pillow can open."""
    from PIL import Image

    formats = Image.registered_extensions()
    endings = {ending for ending in formats if formats[ending] in Image.OPEN}
    files = {}
    others = []
    for path in sorted(_visible(folder), key=_number_or_name):
        if not path.is_dir():
            others.append(path)
            continue
        files[path.name] = []
        for file in _walk(path):
            if file.suffix.lower() in endings:
                files[path.name].append(file)
            else:
                others.append(file)
        if not files[path.name]:
            raise ValueError(f"put images into {path}, or delete it: there is none in it")
    if not files:
        raise ValueError(f"put images into {folder}/<class>/: there is no class in it")
    if others and os.environ.get("RANK", "0") == "0":
        print(f"{folder}: {len(others)} files are no images, such as {others[0].name!a}")
    return files


def _number_or_name(path):
    """Sorts numbers as numbers, 2 or two before 10, and then names."""
    name = path.name
    if name in DIGITS:
        return 0, DIGITS.index(name), name
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _walk(folder, above=()):
    """All files in the folder and in those below. Links are followed, but not in circles."""
    real = folder.resolve()
    if real in above:
        return
    for path in _visible(folder):
        if path.is_dir():
            yield from _walk(path, (*above, real))
        else:
            yield path


def _visible(folder):
    """What is in the folder, by name, less what editors, archivers and network disks hide there."""
    names = sorted(os.listdir(folder))
    return [folder / name for name in names if not name.startswith((".", "__MACOSX", "@eaDir"))]


def _read_images(files, size, channels):
    samples = [(path, label) for label, name in enumerate(files) for path in files[name]]
    images = torch.empty(len(samples), channels, size, size, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in samples])
    progress = Progress(len(samples), "images read")
    for i, (path, _) in enumerate(samples):
        images[i] = read_image(path, size, channels)
        progress.add(1)
    return images, labels


def read_image(path, size, channels):
    """uint8 (channels, size, size) of any image file, its middle square scaled with bicubic.

    An image of that size is read exactly. Transparent pixels are laid on white.
    Raises ValueError for a file that is not an image, is damaged, or has no known range of values.
    """
    from PIL import Image, ImageOps, PngImagePlugin
    from torchvision.transforms.functional import pil_to_tensor

    Image.MAX_IMAGE_PIXELS = None  # large images and long comments are no attack: they are yours
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
    try:
        with Image.open(path) as image:
            image = _to_rgb(image)
    except PermissionError:
        raise
    except Exception as error:
        # Out of 15,600 damaged files 38 made Pillow raise other things than OSError, SyntaxError
        # and ValueError. Whatever it is, the user needs the name of the file.
        raise ValueError(
            f"replace or delete {path}: cannot read it ({_one_line(error)})"
        ) from error
    if channels == 1:
        image = image.convert("L")
    return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def _to_rgb(image):
    """An image in any of Pillow's modes as RGB of 8 bits."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    # Pillow has mode I for numbers of 32 bits, but also for the 16 bits of some PNG and PGM files.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"mode {image.mode} has no known range, save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)  # cameras store pictures sideways, and say so in EXIF
    if image.mode.startswith("I"):
        values = pil_to_tensor(image.convert("I"))  # int32 (1, H, W), for any byte order
        brightest = int(values.max())
        if 0 < brightest < 4096:  # numbers of 8, 10 or 12 bits, which would all be black
            raise ValueError(
                f"no value above {brightest}, scale it to 65535 or save it with 8 bits"
            )
        grey = values // 256
        grey[values == image.info.get("transparency", -1)] = 255
        image = to_pil_image(grey.to(torch.uint8))
    image = _to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_srgb(image):
    """An image with a colour profile, such as the Display P3 of telephones, in sRGB."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        mode = image.mode.replace("CMYK", "RGB")
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), 0, mode)
    except (OSError, ImageCms.PyCMSError):  # it is damaged, or one of another kind of image
        return image


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------
# Randomness: a generator is made from two numbers for each draw, so no random state is ever saved


def generator(seed, n, device="cpu"):
    """The torch.Generator of the n-th draw under `seed`."""
    # A CPU's Mersenne Twister reads 32 bits of its seed, and the golden ratio puts ours far apart.
    return torch.Generator(device).manual_seed((seed * 2654435769 + n) % 2**32)


def batch(images, labels, T, batch_size, seed, step, rank=0, world=1):
    """All the randomness of a training step, a function of (seed, step) and of nothing else.

    Returns x0 (B, C, H, W) in [-1, 1], y (B,), t (B,) in 0 .. T-1, noise like x0, and u (B, 12):
    for each image twelve uniform numbers in [0, 1), for what a script leaves to chance, such as
    dropping a label.

    All is drawn for the whole global batch, then sliced: process `rank` of `world` gets its
    B = batch_size / world rows of what a single process would get.
    """
    device = images.device
    g = generator(seed, step, device)
    index = torch.randint(len(images), (batch_size,), generator=g, device=device)
    t = torch.randint(T, (batch_size,), generator=g, device=device)
    noise = torch.randn(batch_size, *images.shape[1:], generator=g, device=device)
    u = torch.rand(12, batch_size, generator=g, device=device).T

    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    x0 = images[index[mine]].float() / 127.5 - 1
    return x0, labels[index[mine]], t[mine], noise[mine], u[mine]


def noises(seed, index, shape, device="cpu"):
    """Yields noise (len(index), *shape), indefinitely. Row k is a function of (seed, index[k])."""
    generators = [generator(seed, i, device) for i in index]
    while True:
        # Eight at a time: on a GPU, a call per image and step would outlast the network.
        draws = [torch.randn(8, *shape, generator=g, device=device) for g in generators]
        yield from torch.stack(draws, dim=1)
