"""Tests of common.py: data, schedules and randomness, on tiny data made here."""

import io
import itertools
import math
import struct
import sys

import pytest
import torch
from PIL import Image

import common


def random_images(n, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)


def write_mnist(root, size=28):
    """20 + 20 images as IDX files (magic number, sizes, bytes), as torchvision leaves them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = random_images(20, size, size).numpy().tobytes()
    labels = bytes(i % 10 for i in range(20))
    for split in ("train", "t10k"):
        header = struct.pack(">4i", 2051, 20, size, size)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + labels)
    return raw


def write_folders(root, *names):
    """0.png in each folder: the k-th one's pixels are all k."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), k).save(root / name / "0.png")


def refusal(function, *args):
    """The text of the OSError or ValueError that the call raises: one line."""
    with pytest.raises((OSError, ValueError)) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mnist_files(tmp_path):
    write_mnist(tmp_path)
    (images, labels), (test_images, _), classes = common.load_data("MNIST", tmp_path, 28, 1)
    assert torch.equal(images, random_images(20, 28, 28)[:, None])
    assert torch.equal(test_images, images)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [*range(10), *range(10)]
    assert len(classes) == 10


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


@pytest.mark.parametrize("name, content", DAMAGED)
def test_damaged_mnist_files(tmp_path, name, content):
    raw = write_mnist(tmp_path)
    (raw / f"{name}-ubyte").write_bytes(content)
    text = refusal(common.load_data, "MNIST", tmp_path, 28, 1)
    assert text.startswith(f"damaged: delete {raw} and run again")


def test_mnist_of_another_size(tmp_path):
    write_mnist(tmp_path, size=27)
    text = refusal(common.load_data, "MNIST", tmp_path, 28, 1)
    assert text.startswith("put images of your own into train/<class>/: ")


@pytest.mark.parametrize("name, files", common.FILES.items())
def test_no_network(tmp_path, monkeypatch, name, files):
    def fail(*args, **kwargs):
        raise OSError("unknown host\n" * 50)

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", fail)
    text = refusal(common.load_data, name, tmp_path, 28, 1)
    assert text.startswith(
        f"no network? put the files of {name} into {tmp_path / files}, or images"
    )


@pytest.mark.parametrize("known", ["MNIST", "cifar-10-batches-py", ".hidden"])
@pytest.mark.parametrize("rank, first", [("0", ["fetch", "barrier"]), ("1", ["barrier"])])
@pytest.mark.parametrize("fails", [False, True])
def test_one_process_fetches(tmp_path, monkeypatch, known, rank, first, fails):
    """The others wait, but not for ever; other data sets may lie in the folder."""
    events = []

    class Fake:
        data, targets, classes = random_images(2, 32, 32, 3), [9, 0], list("0123456789")

        def __init__(self, root, train=True, download=False):
            events.append("fetch" if download else "read")
            if fails:
                raise RuntimeError("Dataset not found")

    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(common.dist, "barrier", lambda: events.append("barrier"))
    (tmp_path / known).mkdir()
    if fails:
        assert refusal(common.load_data, "CIFAR10", tmp_path, 32, 3).startswith("no network? put ")
        assert events == [*first, "read"]
    else:
        (images, labels), _, _ = common.load_data("CIFAR10", tmp_path, 32, 3)
        assert events == [*first, "read", "read"]
        assert torch.equal(images, Fake.data.permute(0, 3, 1, 2))
        assert labels.tolist() == [9, 0]


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folders(tmp_path, capsys, test):
    hidden = ["train/.a", "train/__MACOSX/a", "train/a/.b", ".test/b"]
    write_folders(
        tmp_path, *hidden, "train/b ö", "train/a", "train/a/deep", f"{test}/b ö", f"{test}/a"
    )
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"x")
    (images, labels), (test_images, _), classes = common.load_data("MNIST", tmp_path, 28, 1)
    assert classes == ["a", "b ö"]
    assert images[:, 0, 5, 5].tolist() == [5, 6, 4]
    assert labels.tolist() == [0, 0, 1]
    assert test_images[:, 0, 5, 5].tolist() == [8, 7]
    assert capsys.readouterr().out == ""


PUT = "put images into "
FOLDERS = [  # folders with an image, an empty one, what is said
    (["a"], "b", PUT + "train/<class>/*.png (and test/<class>/*.png"),
    (["Train/a"], "b", PUT + "train/<class>/*.png (and test/<class>/*.png"),
    ([], "train", PUT + "train/<class>/: "),
    (["train/a"], "train/b", PUT + "train/b, "),
    (["train/a", "test/a"], "test/b", PUT + "test/b, "),
    (["train/a", "test/a", "test/dog"], "b", "give test the folders of train: one has no dog"),
    (["train/a", "train/dog", "test/a"], "b", "give test the folders of train: one has no dog"),
]


@pytest.mark.parametrize("names, empty, text", FOLDERS)
def test_folders_that_are_refused(tmp_path, monkeypatch, names, empty, text):
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path, *names)
    (tmp_path / empty).mkdir()
    assert refusal(common.load_data, "CIFAR10", ".", 32, 3).startswith(text)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_is_passed_over_is_counted(tmp_path, monkeypatch, rank):
    """All endings that Pillow opens are read. A console that lacks a letter ends no run."""
    write_folders(tmp_path, "train/a")
    for ending in (".JPE", ".jfif", ".gif", ".PNM", ".dib", ".apng", ".tga", ".TIFF"):
        Image.new("RGB", (9, 9)).save(tmp_path / "train" / "a" / f"1{ending}")
    for name in ("a/\udcff.heic", "notes.txt"):
        (tmp_path / "train" / name).touch()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setenv("RANK", rank)
    (images, _), test_set, _ = common.load_data("MNIST", tmp_path, 28, 1)
    assert images.shape == (9, 1, 28, 28)
    assert test_set is None
    lines = sys.stdout.buffer.getvalue().decode()
    expected = f"{tmp_path / 'train'}: 2 files are no images, such as \\udcff.heic\n"
    assert lines == (expected if rank == "0" else "")


def test_progress(tmp_path, monkeypatch, capsys):
    write_folders(tmp_path, "train/a", "train/b", "train/c", "train/d")
    clock = itertools.count(0, 3)
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    common.load_data("MNIST", tmp_path, 28, 1)
    assert capsys.readouterr().out.splitlines() == ["2 of 4 images read", "4 of 4 images read"]


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
    ("I;16B", 40000, "x.tif", {}, 156),
    ("I;16", 0, "x.png", {}, 0),
    ("I;16", 255, "x.png", {}, "no value above 255"),
    ("I;16B", 4095, "x.tif", {}, "no value above 4095"),
    ("I", 70000, "x.tif", {}, "mode I has no known range"),
    ("F", 0.5, "x.tif", {}, "mode F has no known range"),
]


@pytest.mark.parametrize("mode, pixel, name, options, expected", PIXELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode(tmp_path, mode, pixel, name, options, expected, channels):
    image = Image.new(mode, (4, 4), pixel)
    if mode == "P":
        image.putpalette(bytes(i for i in range(256) for _ in range(3)))
    image.save(tmp_path / name, **options)
    if isinstance(expected, str):
        assert expected in refusal(common.read_image, tmp_path / name, 4, channels)
        return
    values = common.read_image(tmp_path / name, 4, channels)
    assert values.shape == (channels, 4, 4)
    assert (values.int() - expected).abs().max() <= (mode == "LAB")  # which has no exact way


def test_an_image_of_the_size_is_read_exactly_and_upright(tmp_path):
    pixels = random_images(1, 32, 32, 3)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the file is the right side of the picture
    Image.fromarray(pixels.numpy()).save(tmp_path / "x.png", exif=exif)
    upright = pixels.permute(2, 0, 1).rot90(-1, dims=(1, 2))
    assert torch.equal(common.read_image(tmp_path / "x.png", 32, 3), upright)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "ppm", "tga", "webp"])
def test_a_truncated_image_is_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(random_images(1, 64, 64, 3)[0].numpy()).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(common.read_image, path, 64, 3).startswith(f"replace or delete {path}: ")


@pytest.mark.parametrize("error", [IndexError(), struct.error("x"), OSError("a\nb")])
def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    write_folders(tmp_path, "train/a")
    monkeypatch.setattr(Image, "open", fail)
    text = refusal(common.load_data, "MNIST", tmp_path, 28, 1)
    assert text.startswith(f"replace or delete {tmp_path / 'train' / 'a' / '0.png'}: ")
    assert "()" not in text


def test_schedules():
    linear = common.alpha_bar(common.linear_betas())
    exact = [1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000)]
    assert linear.dtype == torch.float32
    assert linear[0].item() == pytest.approx(exact[0], rel=1e-7)
    assert linear[-1] == torch.tensor(math.prod(exact))  # the float32 nearest to it
    cosine = common.alpha_bar(common.cosine_betas())
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
    assert cosine[0].item() == pytest.approx(f[1] / f[0], rel=1e-7)
    assert cosine[-1].item() == pytest.approx(f[999] / f[0] * 0.001, rel=1e-6)


@pytest.mark.parametrize("T", [1, 10, 4000])
@pytest.mark.parametrize("schedule", [common.linear_betas, common.cosine_betas])
def test_schedules_of_any_length(schedule, T):
    a = common.alpha_bar(schedule(T))
    assert a.shape == (T,)
    assert 0 < a.min() <= a.max() < 1
    assert (a.diff() < 0).all()


IMAGES = random_images(64, 1, 8, 8)


def step_of(seed, step, **options):
    """x0, y, t, noise and u of a training step with 64 images."""
    return common.batch(IMAGES, torch.arange(64), 10, 64, seed, step, **options)


def test_a_batch_is_a_function_of_seed_and_step():
    whole = step_of(3, 5)
    again = step_of(3, 5)
    shares = [step_of(3, 5, rank=rank, world=4) for rank in range(4)]
    for i, part in enumerate(whole):
        assert torch.equal(part, again[i])
        assert torch.equal(part, torch.cat([share[i] for share in shares]))
        for other in (step_of(3, 6), step_of(4, 5), step_of(5, 3)):
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
    assert 0 <= u.min() <= u.max() < 1
    assert (u.T.corrcoef() - torch.eye(12)).abs().max() < 0.05


def test_noises_depend_on_seed_and_index_alone():
    several = common.noises(3, [7, 0, 5], (1, 4, 4))
    alone = common.noises(3, [0], (1, 4, 4))
    other = common.noises(4, [0], (1, 4, 4))
    draws = []
    for _ in range(20):
        draws.append(next(several))
        assert torch.equal(draws[-1][1:2], next(alone))
        assert not torch.equal(draws[-1][1:2], next(other))
    assert torch.stack(draws).view(60, 16).unique(dim=0).shape == (60, 16)
