"""extras/figures.py and extras/speed.py, tiny: python -m pytest -q tests/test_figures.py"""

import math
import re
import sys
from functools import partial
from pathlib import Path

import figures
import pytest
import speed
import torch
import torch.nn.functional as F
from conftest import random_images
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common
import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm

LOGS = " ".join(map(str, Path(__file__).resolve().parents[1].glob("assets/*.csv")))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels_of(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def test_forward_and_reverse(monkeypatch, capsys):
    """Above, four digits with ever more noise; below, what the sampler passes, as seed 3 draws."""
    for i in range(4):
        Path(f"train/{i}").mkdir(parents=True)
        Image.new("L", (28, 28), 60 * i).save(f"train/{i}/x.png")

    def predict(x, t):
        return 0.9 * x + 50 * (t == 0)  # so that the drawing is unlike x_t at t = 0

    monkeypatch.setattr(ddpm.UNet, "forward", lambda self, x, t, y: predict(x, t[0]))
    monkeypatch.setattr("common.time.monotonic", iter(range(0, 10**6, 3)).__next__)
    figures.main(["forward-and-reverse", "--data-dir", ".", "--out", "x.png"])
    assert "1 of 1000 steps, 50 min left" in capsys.readouterr().out

    times = [0, 25, 50, 100, 150, 200, 250, 300, 400, 500, 700, 999]
    a = ddpm.schedule(name="cosine")
    torch.manual_seed(3)
    noise, x = torch.randn(2, 4, 1, 28, 28)
    x0 = torch.tensor([0, 60, 120, 180]).view(4, 1, 1, 1) / 127.5 - 1
    passed = {}

    def denoise(x_t, t):
        passed[t] = x_t
        return ((x_t - (1 - a[t]).sqrt() * predict(x_t, t)) / a[t].sqrt()).clamp(-1, 1)

    passed[0] = ddpm.ddpm_sample(denoise, x, a, 1000)
    columns = []
    for t in times:
        columns += [a[t].sqrt() * x0 + (1 - a[t]).sqrt() * noise, passed[t]]
    ddpm.picture(torch.cat(columns), rows=8).save("expected.png")
    difference = pixels_of("x.png").int() - pixels_of("expected.png").int()
    assert difference.shape == (3, 240, 360)
    assert difference.abs().max() <= 1


def find_ink(pixels):
    """The columns and rows where something dark is written, as (first, last) each."""
    dark = (pixels < 128).any(dim=0)
    rows = dark.any(dim=1).nonzero()
    columns = dark.any(dim=0).nonzero()
    return (columns.min().item(), columns.max().item()), (rows.min().item(), rows.max().item())


@pytest.mark.parametrize("prompts", [["thick 7 on red", "thin", ""], ["3"]])
def test_prompts(prompts):
    """Each prompt stands to the left of the digits that the script draws for it."""
    torch.manual_seed(0)
    model = ddim.UNet(16)
    nn.init.normal_(model.head[-1].weight, std=0.1)  # else it draws the same for all prompts
    config = {"script": ddim.NAME, "class_names": ["a"], "meaning": ddim.meaning(), "dim": 16}
    torch.save({"ema": model.state_dict(), "step": 7, "config": config}, "small.pt")
    figures.main(["prompts", *prompts, "--out", "x.png", "--ckpt", "small.pt", "small.pt"])
    table = pixels_of("x.png")
    assert table.shape == (3, 30 * len(prompts), 640)

    args = ddim.make_parser().parse_args([])
    model, _ = ddim.load("small.pt")
    y = [ddim.tokenize(prompts[i % len(prompts)]) for i in range(6 * len(prompts))]
    args.micro_batch = len(y)
    Path("drawn").mkdir()
    ddim.draw(model, ddim.schedule(), args, y, "drawn/")
    files = sorted(Path("drawn").iterdir())
    assert len(files) == len(y)
    white = table[:, :, 262:270]
    assert (white == 255).all()
    for i, file in enumerate(files):
        row, column = i % len(prompts), i // len(prompts)
        for left in (270, 460):
            top, at = 30 * row, left + 30 * column
            cell = table[:, top : top + 30, at : at + 30]
            assert not cell[:, 0].any() and not cell[:, :, 29].any()  # the black frame
            difference = cell[:, 1:29, 1:29].int() - pixels_of(file).int()
            assert difference.abs().float().mean() < 2
    assert (table[:, :, 450:460] == 255).all()
    texts = table.view(3, len(prompts), 30, 640)[..., :262].transpose(0, 1)
    widths = [find_ink(text)[0][1] for text in texts]
    assert widths == sorted(widths, reverse=True)  # the order of their lengths
    assert all(left[0] < 10 for left, _ in map(find_ink, texts))


def test_prompts_of_four_checkpoints(monkeypatch):
    asked = []

    def run(command):
        asked.append(command)
        (out,) = [word.removeprefix("--out=") for word in command if word.startswith("--out=")]
        for i in range(6):
            Image.new("RGB", (28, 28), (40 * len(asked), 40 * i, 0)).save(f"{out}{i:06d}-7.png")
        return figures.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(figures.subprocess, "run", run)
    figures.main(["prompts", "7", "seven", "--out", "x.png", "--ckpt", "a", "b", "c", "d"])
    table = pixels_of("x.png")
    for k, command in enumerate(asked):
        assert command[command.index("--ckpt") + 1] == "abcd"[k]
        assert "-n=6" in command
        for i in range(6):
            row, column = i % 2, i // 2
            pixel = table[:, 30 * row + 15, 270 + 100 * k + 30 * column + 15]
            assert pixel.tolist() == [40 * (k + 1), 40 * i, 0]


def test_folders():
    """A row of images at twice their size, and to the left, ending at one column, the name."""
    images = random_images(5, 8, 8, 3)
    for name, count in (("whole", 5), ("four of eight", 4)):
        Path(name).mkdir()
        for i in range(count):
            Image.fromarray(images[i].numpy()).save(f"{name}/{i:06d}-0.png")
    figures.main(["folders", "whole", "four of eight", "-n", "3", "--out", "x.png"])
    sheet = pixels_of("x.png")
    left = sheet.shape[2] - 3 * 20
    assert sheet.shape[1] == 2 * 20
    assert 60 < left < 140
    for top in (0, 20):
        cells = sheet[:, top : top + 20 : 2, left::2].reshape(3, 10, 3, 10)[:, 1:9, :, 1:9]
        shown = cells.permute(2, 1, 3, 0)
        assert (shown.int() - images[:3].int()).abs().max() <= 1
    ends = [find_ink(sheet[:, top : top + 20, :left])[0] for top in (0, 20)]
    assert abs(ends[0][1] - ends[1][1]) <= 2 and left - 12 < ends[0][1] < left - 4
    assert ends[0][0] > ends[1][0] + 20  # the shorter name begins later
    figures.main(["folders", "four of eight", "whole", "--out", "all.png"])
    sheet = pixels_of("all.png")
    assert sheet.shape == (3, 40, left + 5 * 20)
    assert (sheet[:, :20, -20:] == 255).all()


@pytest.mark.parametrize("size", [28, 32])
def test_neighbours(size, capsys, monkeypatch):
    """Drawings that are training images, mirrored and changed a little, come with these first."""
    channels = {28: 1, 32: 3}[size]
    real = random_images(70, size, size, channels)
    real[:, [0, -1]] = 0  # a digit's paper
    real[:, 5, 5] = 255
    for i, image in enumerate(real.squeeze(-1).numpy()):
        folder = Path("data", "test" if i >= 60 else "train", str(i % 2))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    order = [*range(0, 60, 2), *range(1, 60, 2)]  # as load_data finds them
    drawn = real[order[:8]]
    if channels == 3:
        drawn = drawn.flip(2)
    drawn[:, 9, 9:13] ^= 8
    drawn[6, 9, 9] ^= 8  # one is nearer
    drawn[7, 10] ^= 255  # and one further away
    Path("drawn").mkdir()
    for i, image in enumerate(drawn.squeeze(-1).numpy()):
        Image.fromarray(image).save(f"drawn/{i:06d}.png")
    asked = []

    def load_data(name, *more):
        asked.append(name)
        return common.load_data(name, *more)

    monkeypatch.setattr(figures, "load_data", load_data)
    figures.main(["neighbours", "drawn", "-n", "7", "--out", "x.png"])
    assert asked == [{28: "MNIST", 32: "CIFAR10"}[size]]
    said = capsys.readouterr().out.splitlines()[-2:]
    median, least = (math.sqrt(pixels * 8**2) / size for pixels in (4, 3))
    assert said[0] == f"8 drawings: {median:.1f}, {least:.1f}"
    ways = [real[order]]
    if channels == 3:
        ways.append(real[order].flip(2))
    tests = real[[60, 62, 64, 66, 68, 61, 63, 65]].flatten(1).float()
    usual = torch.cdist(tests, torch.cat(ways).flatten(1).float()).amin(dim=1)
    median, least = (x / math.sqrt(tests.shape[1]) for x in (usual.median(), usual.min()))
    assert said[1] == f"8 test images: {median:.1f}, {least:.1f}"
    frame = size + 2
    cells = pixels_of("x.png")[:, ::2, ::2].reshape(3, 4, frame, 7, frame)[:, :, 1:-1, :, 1:-1]
    shown = cells.permute(1, 3, 2, 4, 0)  # (4, 7, H, W, 3)
    assert (shown[0].int() - drawn[:7].int()).abs().max() <= 1
    expected = real[order[:7]]
    if channels == 3:
        expected = expected.flip(2)
    assert (shown[1].int() - expected.int()).abs().max() <= 1
    gaps = (shown[1:] - shown[0].float()).square().sum(dim=(2, 3, 4))
    assert (gaps.diff(dim=0) > 0).all()  # from above to below, less and less alike


def test_grids():
    """Pictures from left to right, 10 apart on white, and centred above each, its label."""
    sizes = [(60, 40), (100, 70), (80, 70)]
    shades = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    names = ["b.png", "a.png", "c.png"]
    for name, size, shade in zip(names, sizes, shades, strict=True):
        Image.new("RGB", size, shade).save(name)
    labels = ["0", "½ min", "III"]
    figures.main(["grids", *names, "--labels", *labels, "--out", "x.png"])
    sheet = pixels_of("x.png")
    assert sheet.shape == (3, 100, 260)
    left = 0
    widths = []
    for (width, height), shade in zip(sizes, shades, strict=True):
        expected = torch.tensor(shade)[:, None, None].expand(3, height, width)
        assert torch.equal(sheet[:, 30 : 30 + height, left : left + width], expected)
        (first, last), (top, bottom) = find_ink(sheet[:, :30, left : left + width])
        assert abs((first + last + 1) / 2 - width / 2) <= 2
        assert top >= 3 and bottom <= 27 and 10 < bottom - top < 20
        widths.append(last - first)
        left += width + 10
    assert widths[0] < widths[1] > 2 * widths[2]
    for gap in (slice(60, 70), slice(170, 180)):
        assert (sheet[:, :, gap] == 255).all()
    assert (sheet[:, 70:, :60] == 255).all()  # below the one that is lower

    figures.main(["grids", *names, "--labels", "0", "0", "0", "--out", "same.png"])
    same = pixels_of("same.png")
    assert torch.equal(same[:, :, :60], sheet[:, :, :60])
    assert not torch.equal(same[:, :30, 70:170], sheet[:, :30, 70:170])
    zeros = [same[:, :30, middle - 10 : middle + 10] for middle in (30, 120, 220)]
    assert torch.equal(zeros[0], zeros[1]) and torch.equal(zeros[1], zeros[2])


def record(monkeypatch):
    """The curves that are plotted: [(label, x, y), ..], and the names of the axes."""
    axes = pytest.importorskip("matplotlib.axes", reason="pip install matplotlib").Axes
    plotted = []
    plot = axes.plot
    set_names = axes.set

    def watch_plot(self, x, y, label):
        plotted.append((label, list(x), list(y)))
        return plot(self, x, y, label=label)

    def watch_set(self, **names):
        plotted.append(names)
        return set_names(self, **names)

    monkeypatch.setattr(axes, "legend", lambda self: plotted.append("legend"))
    monkeypatch.setattr(axes, "plot", watch_plot)
    monkeypatch.setattr(axes, "set", watch_set)
    return plotted


def test_curves_of_samplers(monkeypatch):
    """A line for each sampler, its points in the order of x."""
    plotted = record(monkeypatch)
    Path("r.csv").write_text("sampler,evaluations,share\ndpm,8,0.9\nddim,50,0.8\ndpm,5,0.7\n")
    figures.main(["curves", "r.csv", "--x", "evaluations", "--y", "share", "--out", "x.png"])
    assert plotted == [
        ("dpm", [5, 8], [0.7, 0.9]),
        ("ddim", [50], [0.8]),
        {"xlabel": "evaluations", "ylabel": "share"},
        "legend",
    ]
    assert pixels_of("x.png").shape == (3, 400, 800)


def test_curves_of_runs(monkeypatch):
    plotted = record(monkeypatch)
    Path("a.csv").write_text("step,images,loss,val_loss\n1,64,0.5,0.6\n2,128,0.3,0.4\n")
    Path("b.csv").write_text("step,images,loss,val_loss\n1,64,0.7,nan\n")
    figures.main(["curves", "a.csv", "b.csv", "--out", "x.svg"])
    assert plotted[:3] == [
        ("a.csv, loss", [64, 128], [0.5, 0.3]),
        ("a.csv, val_loss", [64, 128], [0.6, 0.4]),
        ("b.csv, loss", [64], [0.7]),
    ]
    assert plotted[-2] == {"xlabel": "images", "ylabel": "loss"}
    assert "<svg" in Path("x.svg").read_text()


@pytest.mark.parametrize("more", ["", " --x seconds"])
def test_curves_of_the_logs_that_are_here(more):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    figures.main(f"curves {LOGS}{more} --out x.png".split())
    assert pixels_of("x.png").shape == (3, 400, 800)


ERRORS = [
    ("", "FIGURE"),
    ("folders none", "none holds no PNG files"),
    ("grids x.png", "--labels"),
    ("grids x.png x.png --labels one", "2 files need as many --labels, not 1"),
    ("grids x.png x.csv --labels one two", "x.csv"),
    ("grids none.png --labels one", "none.png"),
    ("grids x.png --labels one --out none/x.png", "--out none/x.png: "),
    ("grids x.png --labels one --out x.txt", "--out x.txt: "),
    ("curves none.csv", "none.csv must be a csv file with images, loss, val_loss"),
    ("curves x.csv", "x.csv must be a csv file with images, loss, val_loss"),
    ("curves good.csv --x hours", "good.csv must be a csv file with hours, loss, val_loss"),
    ("forward-and-reverse --data-dir x.csv", "--data-dir x.csv: "),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line(line, message, capfd):
    Path("x.csv").write_text("images,loss,val_loss\n1,none,1\n")
    Path("good.csv").write_text("images,loss,val_loss\n1,2,1\n")
    Image.new("L", (9, 9)).save("x.png")
    if "curves" in line:
        pytest.importorskip("matplotlib", reason="pip install matplotlib")
    with pytest.raises(SystemExit) as end:
        figures.main(line.split())
    assert message in end.value.code
    assert "\n" not in end.value.code
    assert not capfd.readouterr().err


def test_an_unknown_word_is_told_once(capfd):
    with pytest.raises(SystemExit, match="1"):
        figures.main(["prompts", "dog"])
    (line,) = capfd.readouterr().err.splitlines()
    assert "'dog'" in line
    assert not Path("prompts.png").exists()


def test_curves_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        figures.main(f"curves {LOGS}".split())


def test_restored(tmp_path, monkeypatch):
    """The first test image of each class, a column each: whole, and damaged and restored thrice."""
    images = random_images(20, 32, 32, 3)
    for i, image in enumerate(images):
        for part in ("train", "test"):
            folder = tmp_path / "data" / part / str(i // 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{i % 2}.png")
    asked = []

    def answer(script, model, alphas_cumprod, args, known, y):
        asked.append((args.task, y.tolist()))
        return torch.full((10, 3, 32, 32), len(asked) / 4)

    monkeypatch.setattr("restore.answer", answer)
    figures.main(f"restored --data-dir {tmp_path}/data --out {tmp_path}/x.png".split())
    assert asked == [(task, [*range(10)]) for task in ("inpaint", "upscale", "colour")]
    with Image.open(tmp_path / "x.png") as picture:
        small = picture.resize((340, 7 * 34), Image.Resampling.NEAREST)
    tiles = torch.tensor([*small.convert("RGB").tobytes()]).view(7, 34, 10, 34, 3)[:, 1:33, :, 1:33]
    whole, hole, filled, means, larger, grey, coloured = tiles.permute(0, 2, 1, 3, 4)
    assert torch.equal(whole, images[::2].long())
    assert (hole[:, 8:28, 12:30] == 128).all() and torch.equal(hole[:, :8], whole[:, :8])
    assert (means[:, :4, :4] == means[:, :1, :1]).all()
    assert (grey == grey[..., :1]).all()
    for k, answers in enumerate((filled, larger, coloured)):
        assert (answers == int(127.5 * (k + 1) / 4 + 128)).all()


@pytest.mark.parametrize("what", ["unet", "transformer"])
def test_speed_without_the_others(what, monkeypatch, capsys):
    """What it reports follows from the times, here two seconds for drawing, one for the rest."""

    def seconds(run):
        run()
        return 2 if run.func is speed.draw_step else 1

    for name in ("diffusers", "denoising_diffusion_pytorch", "smalldiffusion"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(speed, "seconds", seconds)
    monkeypatch.setattr(speed, "count_flops", lambda net, x, t: 2 * 2048**3 / 10)
    speed.main(f"--what {what} --batch 3 --rounds 1 --depth 1 --patch 8".split())
    printed = capsys.readouterr().out
    left_out = re.findall(r"^(\w+) is left out, pip install \1 \(", printed, re.MULTILINE)
    lines = [line for line in printed.splitlines() if "float32: training" in line]
    if what == "unet":
        assert left_out == ["diffusers", "denoising_diffusion_pytorch"]
        assert [line.split(",")[0] for line in lines] == ["ddpm_unet_mnist UNet"]
    else:
        assert left_out == ["diffusers", "smalldiffusion"]
        assert [line.split(",")[0] for line in lines] == ["dit_cifar10 DiT", "uvit_cifar10 UViT"]
    for line in lines:
        numbers = line.partition(": ")[2]
        assert numbers == ("training 3.0 images/s, 30% of the matmul rate, evaluation 1.5 images/s")


def test_speed_measures_in_turn(monkeypatch, capsys):
    """The first round warms up; the others alternate, and their median counts."""
    clock = iter([0, 100, 0, 200, 0, 1, 0, 20, 0, 2, 0, 90, 0, 9, 0, 30])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr("common.time.monotonic", iter(range(0, 99, 3)).__next__)
    ran = []
    runs = {name: partial(ran.append, name) for name in "ab"}
    assert speed.measure(runs, 3) == {"a": 2, "b": 30}
    assert "".join(ran) == 4 * "ab"
    assert "1 of 8 measurements, 21 s left" in capsys.readouterr().out


class Probe(nn.Module):
    """A network that says in which mode, precision and grad mode it is called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls = []

    def forward(self, x, t):
        out = self.layer(x)
        self.calls.append((self.training, torch.is_grad_enabled(), out.dtype))
        return out


def test_speed_trains_and_draws(monkeypatch):
    monkeypatch.setattr(speed, "DEVICE", "cpu")
    net = Probe()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    x = torch.ones(1, 2)
    out = net.layer(x).detach()
    before = net.layer.bias.detach().clone()
    speed.train_step(net, optimizer, "float32", x, None)
    torch.testing.assert_close(net.layer.bias.detach(), before - (out[0] - 1))  # 2 (out - x) / 2
    assert net.layer.bias.grad is None
    after = net.layer.bias.detach().clone()
    speed.draw_step(net, "bfloat16", x, None)
    assert torch.equal(net.layer.bias, after)
    speed.train_step(net, optimizer, "bfloat16", x, None)
    training, drawing, again = net.calls
    assert training == (True, True, torch.float32)
    assert drawing == (False, False, torch.bfloat16)
    assert again == (True, True, torch.bfloat16)


def test_speed_asks_each_network_in_its_own_way():
    x, t = torch.ones(2, 3), torch.tensor([14, 99])
    asked = []

    def module_of(package):
        def __call__(self, *inputs, **more):
            asked.append((inputs, more))
            return figures.argparse.Namespace(sample="answer")

        return type("Net", (), {"__call__": __call__, "__module__": f"{package}.models"})()

    assert speed.evaluate(module_of("diffusers"), x, t) == "answer"
    speed.evaluate(module_of("smalldiffusion"), x, t)
    speed.evaluate(module_of("dit_cifar10"), x, t)
    (_, labels), (noise_levels, _), (plain, _) = asked
    assert labels["class_labels"].tolist() == [4, 9]
    torch.testing.assert_close(noise_levels[1], torch.tensor([0.15, 1.0]).view(2, 1, 1, 1))
    assert plain[1] is t


def test_flops():
    """Of a linear layer and an attention, 2 for each multiplication."""

    class Net(nn.Module):
        def forward(self, x, t):
            x = x @ torch.ones(16, 8)
            return F.scaled_dot_product_attention(x, x, x)

    assert speed.count_flops(Net(), torch.ones(1, 4, 16), None) == 2 * (4 * 16 * 8 + 2 * 4 * 4 * 8)


def test_networks_of_one_shape():
    """Depth and patch reach every transformer, under the name that each has for them."""
    ours, _, theirs, small = [options for _, _, options in speed.list_transformers(5, 8)]
    assert [ours["depth"], theirs["num_layers"], small["depth"]] == [5, 5, 5]
    assert [ours["patch"], theirs["patch_size"], small["patch_size"]] == [8, 8, 8]
    assert [ours["heads"], theirs["num_attention_heads"], small["num_heads"]] == [6, 6, 6]
    width = theirs["num_attention_heads"] * theirs["attention_head_dim"]
    assert ours["dim"] == width == 384


def test_speed_leaves_out_a_slow_bfloat16(monkeypatch):
    capabilities = {}
    for fast in (False, True):
        capabilities["avx512_bf16"] = fast
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        assert list(speed.list_matmuls()) == ["float32", "bfloat16"][: 1 + fast]


@pytest.mark.parametrize("flag", ["--batch", "--rounds", "--depth"])
def test_speed_of_nothing(flag):
    with pytest.raises(SystemExit, match="must be 1 at least"):
        speed.main([flag, "0"])


def test_speed_says_what_is_reported(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--help"])
    assert "the median is reported (10)" in capsys.readouterr().out
