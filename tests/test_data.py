"""Tests of common.py: schedules, progress, data and randomness, on tiny data made here."""

import io
import itertools
import math
import re
import struct
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import random_images, write_folders
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import common

# ---- Schedules


def linear(t, T):
    """A product of 1 - beta, where beta goes in a line from 1e-4 to 0.02."""
    betas = [1e-4 + (0.02 - 1e-4) * s / (T - 1) for s in range(t + 1)]
    return math.prod(1 - beta for beta in betas)


def cosine(t, T):
    """f(t + 1) / f(0); but the last step leaves a thousandth, where f would leave nothing."""

    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    if t == T - 1:
        return f(t) / f(0) * 0.001
    return f(t + 1) / f(0)


def flow(t, T):
    """Signal against signal and noise, on the straight path from image to noise."""
    u = (t + 1) / (T + 1)
    return (1 - u) ** 2 / ((1 - u) ** 2 + u**2)


SCHEDULES = [
    (common.linear_schedule, linear, 1e-7),  # the nearest float32
    (common.cosine_schedule, cosine, 1e-7),
    (common.flow_schedule, flow, 2e-4),  # computed in float32
]


@pytest.mark.parametrize("T", [10, 1000])
@pytest.mark.parametrize(("schedule", "closed_form", "tolerance"), SCHEDULES)
def test_schedules_are_their_closed_forms(schedule, closed_form, tolerance, T):
    exact = [closed_form(t, T) for t in range(T)]
    alphas_cumprod = schedule(T)
    assert alphas_cumprod.dtype == torch.float32
    assert alphas_cumprod.tolist() == pytest.approx(exact, rel=tolerance, abs=0)


@pytest.mark.parametrize("T", [1, 10, 4000])
@pytest.mark.parametrize("schedule", [row[0] for row in SCHEDULES])
def test_schedules_of_any_length_fall(schedule, T):
    alphas_cumprod = schedule(T)
    assert alphas_cumprod.shape == (T,)
    assert alphas_cumprod.max() < 1
    assert alphas_cumprod.min() > 0
    assert (alphas_cumprod.diff() < 0).all()


# ---- Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; a test sets clock.now."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(common.time, "monotonic", lambda: clock.now)
    monkeypatch.delenv("RANK", raising=False)
    return clock


def test_progress_speaks_every_two_seconds(clock, capsys):
    progress = common.Progress(100, "images")
    said = []
    for _ in range(7):
        clock.now += 1
        progress.add(10)
        said.append(capsys.readouterr().out)
    assert said == [
        "",
        "",
        "30 of 100 images, 7 s left\n",
        "",
        "",
        "60 of 100 images, 4 s left\n",
        "",
    ]


@pytest.mark.parametrize(
    ("total", "left"), [(34, "99 s"), (35, "2 min"), (201, "10 min"), (2401, "120 min")]
)
def test_progress_says_long_times_in_minutes(clock, capsys, total, left):
    progress = common.Progress(total, "steps")
    clock.now += 3
    progress.add(1)
    assert capsys.readouterr().out == f"1 of {total} steps, {left} left\n"


def test_progress_counts_parts(clock, capsys):
    progress = common.Progress(8, "images")
    for _ in range(6):
        progress.add(4 / 12)  # a step of a sampler that takes twelve, with four images
    clock.now += 3
    progress.add(0)
    assert capsys.readouterr().out == "2 of 8 images, 9 s left\n"


def test_progress_speaks_more_rarely_later(clock, capsys):
    """At two seconds and a bit at first, and then at a hundredth of the time that has passed."""
    progress = common.Progress(9000, "parts of a second")
    for _ in range(9000):
        clock.now += 0.25
        progress.add(1)
    lines = capsys.readouterr().out.splitlines()
    times = [int(line.split()[0]) / 4 for line in lines]
    for before, now in itertools.pairwise(times):
        silence = max(2, now / 100)
        assert silence - 0.25 <= now - before <= silence + 0.5
    assert times[0] == 2.25
    assert times[-1] > 2200


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_speaks(clock, capsys, monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    progress = common.Progress(100, "images")
    clock.now += 3
    progress.add(1)
    assert capsys.readouterr().out.count("\n") == lines


# ---- Data that torchvision finds or fetches


def refusal(name, data_dir, size=28, channels=1):
    """What load_data says when it exits, after the flag: one line."""
    with pytest.raises(SystemExit) as stop:
        common.load_data(name, data_dir, size, channels)
    text = str(stop.value)
    flag = f"--data-dir {data_dir}: "
    assert text.startswith(flag)
    assert "\n" not in text
    return text.removeprefix(flag)


def write_mnist(root, size=28):
    """20 + 20 images as IDX files (magic number, sizes, bytes), as torchvision leaves them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = random_images(20, size, size).numpy().tobytes()
    images = struct.pack(">4i", 2051, 20, size, size) + images
    labels = struct.pack(">2i", 2049, 20) + bytes(i % 10 for i in range(20))
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return raw


def test_mnist_files(tmp_path):
    write_mnist(tmp_path)
    train_set, test_set, classes = common.load_data("MNIST", tmp_path, 28, 1)
    images, labels = train_set
    assert torch.equal(images, random_images(20, 28, 28)[:, None])
    assert torch.equal(test_set[0], images)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [*range(10), *range(10)]
    assert len(classes) == 10


def test_grey_images_have_three_channels_where_they_are_asked_for(tmp_path):
    write_mnist(tmp_path)
    (grey, _), _, _ = common.load_data("MNIST", tmp_path, 28, 1)
    (images, _), _, _ = common.load_data("MNIST", tmp_path, 28, 3)
    assert torch.equal(images, torch.cat([grey, grey, grey], dim=1))


HEADER = struct.pack(">4i", 2051, 20, 28, 28)
DAMAGED = [  # a file, and what is in it instead
    ("train-images-idx3", b""),
    ("train-images-idx3", HEADER[:9]),
    ("t10k-images-idx3", HEADER + bytes(20 * 28 * 28 - 1)),
    ("t10k-labels-idx1", b""),
    ("t10k-labels-idx1", struct.pack(">2i", 2049, 20) + bytes(19)),
    ("train-labels-idx1", struct.pack(">2i", 2049, 19) + bytes(19)),
    ("train-labels-idx1", struct.pack(">2i", 2049, 21) + bytes(21)),
    ("t10k-labels-idx1", struct.pack(">2i", 2049, 20) + bytes(19) + bytes([10])),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_damaged_mnist_files(tmp_path, name, content):
    raw = write_mnist(tmp_path)
    (raw / f"{name}-ubyte").write_bytes(content)
    assert refusal("MNIST", tmp_path).startswith(f"damaged: delete {raw} and run again")


def test_mnist_of_another_size(tmp_path):
    write_mnist(tmp_path, size=27)
    text = refusal("MNIST", tmp_path)
    assert text.startswith("put images of your own into train/<class>/: ")


@pytest.mark.parametrize(("name", "files"), common.FILES.items())
def test_no_network(tmp_path, monkeypatch, name, files):
    def fail(*args, **kwargs):
        raise OSError("unknown host\n" * 50)

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", fail)
    text = refusal(name, tmp_path)
    advice = f"put all files of {name} into {tmp_path / files}, or images into train/<class>/"
    assert text.startswith(f"no network? {advice} (unknown host")


@pytest.fixture
def events(monkeypatch):
    """What happens, in order, to a CIFAR-10 of two images in one of several processes."""
    events = []

    class Fake:
        data = random_images(2, 32, 32, 3)
        targets = [9, 0]
        classes = list("0123456789")
        missing = False

        def __init__(self, root, train=True, download=False):
            events.append("fetch" if download else "read")
            if Fake.missing:
                raise RuntimeError("Dataset not found")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "barrier", lambda: events.append("barrier"))
    return SimpleNamespace(order=events, dataset=Fake)


RANKS = [("0", ["fetch", "barrier"]), ("1", ["barrier"])]


@pytest.mark.parametrize(("rank", "first"), RANKS)
@pytest.mark.parametrize("known", ["MNIST", "cifar-10-batches-py", ".hidden"])
def test_one_process_fetches(tmp_path, monkeypatch, events, rank, first, known):
    """The others wait. Other data sets may lie in the folder."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    (tmp_path / known).mkdir()
    (images, labels), _, _ = common.load_data("CIFAR10", tmp_path, 32, 3)
    assert events.order == [*first, "read", "read"]
    assert torch.equal(images, events.dataset.data.permute(0, 3, 1, 2))
    assert labels.tolist() == [9, 0]


@pytest.mark.parametrize(("rank", "first"), RANKS)
def test_where_fetching_fails_no_process_waits_for_ever(tmp_path, monkeypatch, events, rank, first):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(events.dataset, "missing", True)
    assert refusal("CIFAR10", tmp_path, 32, 3).startswith("no network? put ")
    assert events.order == [*first, "read"]


# ---- Images in folders


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folders(tmp_path, capsys, test):
    write_folders(
        tmp_path,
        "train/.a",  # the first four are hidden
        "train/__MACOSX/a",
        "train/a/.b",
        ".test/b",
        "train/b ö",
        "train/a",
        "train/a/deep",
        f"{test}/b ö",
        f"{test}/a",
    )
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"x")
    train_set, test_set, classes = common.load_data("MNIST", tmp_path, 28, 1)
    assert classes == ["a", "b ö"]
    assert train_set[0][:, 0, 5, 5].tolist() == [5, 6, 4]
    assert train_set[1].tolist() == [0, 0, 1]
    assert test_set[0][:, 0, 5, 5].tolist() == [8, 7]
    assert capsys.readouterr().out == "classes: {0: 'a', 1: 'b \\xf6'}\n"


def test_classes_come_in_the_order_of_numbers(tmp_path):
    """As numbers or as words; others come after them, by the alphabet."""
    names = ["10", "cat", "2", "two", "zero", "07", "bird"]
    write_folders(tmp_path, *[f"train/{name}" for name in names])
    (images, labels), _, classes = common.load_data("MNIST", tmp_path, 28, 1)
    assert classes == ["zero", "2", "two", "07", "10", "bird", "cat"]
    assert [names[k] for k in images[:, 0, 0, 0]] == [classes[k] for k in labels]


def test_many_classes_are_not_listed(tmp_path, capsys):
    write_folders(tmp_path, *[f"train/{k}" for k in range(100)])
    common.load_data("MNIST", tmp_path, 28, 1)
    assert "classes" not in capsys.readouterr().out


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folders(tmp_path, "train/a", "elsewhere", "train/@eaDir/a")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "elsewhere")
    (images, _), _, classes = common.load_data("MNIST", tmp_path, 28, 1)
    assert classes == ["a"]
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 1, 1]


LAYOUT = "put images into train/<class>/*.png (and test/<class>/*.png"
FOLDERS = [  # folders with an image, an empty one, what is said
    (["a"], "b", LAYOUT),
    (["Train/a"], "b", LAYOUT),
    ([], "train", "put images into train/<class>/: "),
    (["train/a"], "train/b", "put images into train/b, "),
    (["train/a", "test/a"], "test/b", "put images into test/b, "),
    (["train/a", "test/a", "test/dog"], "b", "give test the folders of train: one has no dog"),
    (["train/a", "train/dog", "test/a"], "b", "give test the folders of train: one has no dog"),
]


@pytest.mark.parametrize(("names", "empty", "text"), FOLDERS)
def test_folders_that_are_refused(tmp_path, monkeypatch, names, empty, text):
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path, *names)
    (tmp_path / empty).mkdir()
    assert refusal("CIFAR10", ".", 32, 3).startswith(text)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_is_passed_over_is_counted(tmp_path, monkeypatch, rank):
    """All endings that Pillow opens are read. A console that lacks a letter ends no run."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for ending in (".JPE", ".jfif", ".gif", ".PNM", ".dib", ".apng", ".tga", ".TIFF"):
        Image.new("RGB", (9, 9)).save(folder / f"1{ending}")
    (folder / "\udcff.heic").touch()
    (tmp_path / "train" / "notes.txt").touch()
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setenv("RANK", rank)
    (images, _), test_set, _ = common.load_data("MNIST", tmp_path, 28, 1)
    console.flush()
    assert images.shape == (8, 1, 28, 28)
    assert test_set is None
    lines = console.buffer.getvalue().decode().splitlines()
    passed_over = f"{tmp_path / 'train'}: 2 files are no images, such as '\\udcff.heic'"
    assert lines == ([passed_over, "classes: {0: 'a'}"] if rank == "0" else [])


def test_reading_shows_its_progress(tmp_path, monkeypatch, capsys):
    write_folders(tmp_path, "train/a", "train/b", "train/c")
    clock = itertools.count(0, 3)
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    common.load_data("MNIST", tmp_path, 28, 1)
    assert capsys.readouterr().out.splitlines() == [
        "classes: {0: 'a', 1: 'b', 2: 'c'}",
        "1 of 3 images read, 6 s left",
        "2 of 3 images read, 3 s left",
        "3 of 3 images read, 0 s left",
    ]


# ---- A single image

PIXELS = [  # mode, pixel, how it is saved, what is read
    ("1", 1, "x.png", {}, 255),
    ("L", 200, "x.png", {}, 200),
    ("P", 7, "x.png", {}, 7),
    ("RGB", (200, 200, 200), "x.jp2", {}, 200),
    ("CMYK", (0, 0, 0, 55), "x.tif", {}, 200),
    ("YCbCr", (200, 128, 128), "x.jpg", {}, 200),
    ("LAB", (203, 128, 128), "x.tif", {}, 197),
    ("RGBA", (0, 0, 0, 0), "x.png", {}, 255),
    ("RGBA", (0, 0, 0, 127), "x.webp", {"lossless": True}, 128),
    ("LA", (0, 0), "x.png", {}, 255),
    ("L", 9, "x.png", {"transparency": 9}, 255),
    ("P", 9, "x.gif", {"transparency": 9}, 255),
    ("RGB", (0, 9, 0), "x.png", {"transparency": (0, 9, 0)}, 255),
    ("I;16", 40001, "x.png", {"transparency": 40001}, 255),
    ("I;16", 40001, "x.png", {"transparency": 40000}, 156),
    ("I;16", 65279, "x.tif", {}, 254),
    ("I;16", 65280, "x.pgm", {}, 255),
    ("I;16", 4096, "x.png", {}, 16),
    ("I;16B", 40000, "x.tif", {}, 156),
    ("I;16", 0, "x.png", {}, 0),
]


@pytest.mark.parametrize(("mode", "pixel", "name", "options", "expected"), PIXELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode(tmp_path, mode, pixel, name, options, expected, channels):
    image = Image.new(mode, (4, 4), pixel)
    if mode == "P":
        image.putpalette(bytes(i for i in range(256) for _ in range(3)))
    image.save(tmp_path / name, **options)
    values = common.read_image(tmp_path / name, 4, channels)
    assert values.dtype == torch.uint8
    assert values.shape == (channels, 4, 4)
    tolerance = 1 if mode == "LAB" else 0  # its conversion rounds
    assert (values.int() - expected).abs().max() <= tolerance


NO_RANGE = [  # mode, pixel, name, what is said
    ("I;16", 255, "x.png", "no value above 255"),
    ("I;16B", 4095, "x.tif", "no value above 4095"),
    ("I", 70000, "x.tif", "mode I has no known range"),
    ("F", 0.5, "x.tif", "mode F has no known range"),
]


@pytest.mark.parametrize(("mode", "pixel", "name", "text"), NO_RANGE)
def test_values_without_a_known_range_are_refused(tmp_path, mode, pixel, name, text):
    Image.new(mode, (4, 4), pixel).save(tmp_path / name)
    with pytest.raises(ValueError, match=text):
        common.read_image(tmp_path / name, 4, 1)


def test_an_image_of_the_size_is_read_exactly_and_upright(tmp_path):
    pixels = random_images(32, 32, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the file is the right side of the picture
    Image.fromarray(pixels.numpy()).save(tmp_path / "x.png", exif=exif)
    upright = pixels.permute(2, 0, 1).rot90(-1, dims=(1, 2))
    assert torch.equal(common.read_image(tmp_path / "x.png", 32, 3), upright)


def test_the_middle_square_is_read(tmp_path):
    pixels = random_images(8, 20, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(0, 1).numpy()).save(tmp_path / "tall.png")
    middle = pixels[:, 6:14].permute(2, 0, 1)
    assert torch.equal(common.read_image(tmp_path / "wide.png", 8, 3), middle)
    assert torch.equal(common.read_image(tmp_path / "tall.png", 8, 3), middle.mT)


def test_scaling_is_bicubic(tmp_path):
    """At twice the size, an edge of 128 is -3, -9, 26 of it, by the kernel of Keys with a = -1/2.

    To take the nearest pixel would leave it as it is, and linear weights do not overshoot.
    """
    image = Image.new("L", (8, 8), 64)
    image.paste(192, (4, 0, 8, 8))
    image.save(tmp_path / "x.png")
    (rows,) = common.read_image(tmp_path / "x.png", 16, 1).tolist()
    dark = [64, 64, 64, 64, 64, 64 - 3, 64 - 9, 64 + 26]
    bright = [192 - 26, 192 + 9, 192 + 3, 192, 192, 192, 192, 192]
    assert rows == [dark + bright] * 16


def test_scaling_down_takes_the_mean_of_what_it_covers(tmp_path):
    """Fine stripes turn grey; the nearest pixel would make them all black, or all white."""
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64, 32)
    Image.fromarray(stripes.numpy()).save(tmp_path / "x.png")
    values = common.read_image(tmp_path / "x.png", 8, 1).int()
    assert (values - 127).abs().max() < 10


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "ppm", "tga", "webp"])
def test_a_truncated_image_is_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(random_images(64, 64, 3).numpy()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(f"replace or delete {path}: ")):
        common.read_image(path, 64, 3)


def test_large_images_and_long_comments_are_read(tmp_path):
    Image.new("1", (14000, 13000)).save(tmp_path / "large.png")  # Pillow's own limit is 179 million
    text = PngInfo()
    text.add_text("workflow", "x" * 10**8, zip=True)
    Image.new("L", (9, 9)).save(tmp_path / "long.png", pnginfo=text)
    for path in tmp_path.iterdir():
        assert not common.read_image(path, 8, 1).any()


def display_p3():
    """A colour profile of telephones: sRGB's curve, but wider primaries."""
    primaries = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.0666, 0.7841)]
    xyz = [struct.pack(">4s4x3i", b"XYZ ", *[round(v * 65536) for v in p]) for p in primaries]
    white = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)
    curve = struct.pack(">4s4xI", b"curv", 1) + struct.pack(">H2x", round(2.2 * 256))
    text = struct.pack(">4s4xI", b"desc", 3) + b"P3\0" + bytes(79)
    content = {b"wtpt": white, b"desc": text, b"cprt": struct.pack(">4s4x", b"text") + b"x\0\0\0"}
    for colour, value in zip("rgb", xyz, strict=True):
        content[f"{colour}XYZ".encode()] = value
        content[f"{colour}TRC".encode()] = curve
    table, data = b"", b""
    for tag, value in content.items():
        start = 132 + 12 * len(content) + len(data)
        table += struct.pack(">4sII", tag, start, len(value))
        data += value + bytes(-len(value) % 4)
    body = struct.pack(">I", len(content)) + table + data
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3i48x",
        128 + len(body),
        0x02100000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        b"acsp",
        63190,
        65536,
        54061,
    )
    return header + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_a_profile_become_srgb(tmp_path, mode):
    colour = (200, 100, 50, 255)[: len(mode)]
    Image.new(mode, (8, 8), colour).save(tmp_path / "p3.png", icc_profile=display_p3())
    Image.new(mode, (8, 8), colour).save(tmp_path / "bad.png", icc_profile=b"no profile")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new(mode, (8, 8), colour).save(tmp_path / "srgb.png", icc_profile=srgb)
    read = {p.stem: common.read_image(p, 8, 3)[:, 0, 0].tolist() for p in tmp_path.iterdir()}
    assert read["bad"] == read["srgb"] == [200, 100, 50]
    red, green, blue = read["p3"]  # the same numbers are a stronger orange in Display P3
    assert red > 205 and green < 99 and blue < 40


def test_a_file_that_may_not_be_read_is_not_to_be_deleted(tmp_path, monkeypatch):
    write_folders(tmp_path, "train/a")
    monkeypatch.setattr(
        Image, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    )
    text = refusal("MNIST", tmp_path)
    assert text == "[Errno 13] Permission denied"


@pytest.mark.parametrize("error", [IndexError(), struct.error("x"), OSError("a\nb")])
def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    write_folders(tmp_path, "train/a")
    monkeypatch.setattr(Image, "open", fail)
    text = refusal("MNIST", tmp_path)
    file = tmp_path / "train" / "a" / "0.png"
    assert text.startswith(f"replace or delete {file}: ")
    assert "()" not in text


# ---- Randomness

IMAGES = random_images(64, 1, 8, 8)


def step_of(seed, step, **options):
    """x0, y, t, noise and u of a training step with 64 images."""
    return common.batch(IMAGES, torch.arange(64), 10, 64, seed, step, **options)


def test_a_batch_is_a_function_of_seed_and_step():
    whole = step_of(3, 5)
    again = step_of(3, 5)
    shares = [step_of(3, 5, rank=rank, world=4) for rank in range(4)]
    others = [step_of(3, 6), step_of(4, 5), step_of(5, 3)]
    for i, part in enumerate(whole):
        assert torch.equal(part, again[i])
        assert torch.equal(part, torch.cat([share[i] for share in shares]))
        for other in others:
            assert not torch.equal(part, other[i])


def test_what_is_in_a_batch():
    steps = [step_of(0, step) for step in range(20)]
    x0, y, t, noise, _ = [torch.cat(parts) for parts in zip(*steps, strict=True)]
    assert torch.equal(x0, IMAGES[y] / 127.5 - 1)
    assert noise.shape == x0.shape
    assert y.unique().tolist() == list(range(64))
    assert t.unique().tolist() == list(range(10))
    assert t.bincount().min() > 80  # 128 on average


def test_the_twelve_numbers_are_independent():
    *_, u = common.batch(IMAGES, torch.arange(64), 10, 10000, 0, 0)
    assert u.shape == (10000, 12)
    assert u.min() >= 0
    assert u.max() < 1
    assert (u.T.corrcoef() - torch.eye(12)).abs().max() < 0.05


def test_noises_depend_on_seed_and_index_alone():
    several = common.noises(3, [7, 0, 5], (1, 4, 4))
    alone = common.noises(3, [0], (1, 4, 4))
    other = common.noises(4, [0], (1, 4, 4))
    draws = []
    for _ in range(20):
        draw = next(several)
        draws.append(draw)
        assert torch.equal(draw[1:2], next(alone))
        assert not torch.equal(draw[1:2], next(other))
    assert torch.stack(draws).view(60, 16).unique(dim=0).shape == (60, 16)
