"""extras/prompts.py on strokes painted by hand: python -m pytest -q tests/test_prompts.py"""

import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import prompts
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import ddim_unet_mnist as ddim
from common import noises

DIT = ROOT / "checkpoints/dit_cifar10.pt"
ROWS = ["ink", "paper", "ink and paper", "thickness", "lean"]
PAIRS = itertools.permutations(range(8), 2)
LOOKS = itertools.product(PAIRS, (0, 1), (0, 1))
ASKED = torch.tensor([[7, *pair, thick, right] for pair, thick, right in LOOKS])  # (224, 5)


def paint(asked):
    """A soft, leaning stroke for each of asked (B, 5), (B, 1, 28, 28), and the same in colour."""
    digit, ink, paper, thick, right = asked.T[:, :, None, None, None]
    up = 13.5 - torch.arange(28)[:, None]
    across = torch.arange(28) - 13.5 - up * (right - 0.5)
    grey = (1.3 + 1.4 * thick - across.abs()).clamp(0, 1)
    grey = grey * (up.abs() < 9)
    ink, paper = ink.flatten(), paper.flatten()
    return 2 * grey - 1, torch.lerp(ddim.PALETTE[paper], ddim.PALETTE[ink], grey)


def obey(model, alphas_cumprod, tokens, guidance):
    """A denoiser that paints what the tokens (B, LENGTH) of a prompt say, of any digit."""
    asked = []
    for row in tokens.tolist():
        _, thickness, ink, _, _, side, _, paper = [ddim.WORDS[token] for token in row]
        look = [ddim.COLOURS.index(ink), ddim.COLOURS.index(paper)]
        asked.append([7, *look, thickness == "thick", side == "right"])
    images = paint(torch.tensor(asked))[1].to(prompts.DEVICE)
    return lambda x_t, t: images


def pretend(monkeypatch, denoiser):
    """Let the program take this for the script's denoiser, after it has loaded a network."""
    network = ddim.UNet(16)
    monkeypatch.setattr(ddim, "load", lambda path: (network, {}))
    monkeypatch.setattr(ddim, "denoiser", denoiser)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where a test runs: with a checkpoint of a tiny network, untrained."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = {"script": "ddim_unet_mnist", "dim": 16, "class_names": ddim.DIGITS}
    config["meaning"] = ddim.meaning()
    torch.save({"ema": ddim.UNet(16).state_dict(), "step": 0, "config": config}, "tiny.pt")


@pytest.fixture
def progress(monkeypatch):
    """What the program has said of its progress: the total, and what was done of it."""
    said = SimpleNamespace(total=0, done=0.0)

    class Recorder:
        def __init__(self, total, what):
            said.total += total

        def add(self, n):
            said.done += n

    monkeypatch.setattr(prompts, "Progress", Recorder)
    return said


# ---- The measure


def test_strokes_in_all_colours_are_right():
    grey, images = paint(ASKED)
    digits, found = prompts.judge(images, ASKED)
    torch.testing.assert_close(digits, grey, atol=1e-5, rtol=0)
    for row in ROWS:
        assert found[row].all(), row
    assert found["width of thick ones"].min() > 2.6
    assert found["width of thin ones"].max() < 2.1
    noisy = images + 0.1 * torch.randn(images.shape)
    ink, paper = prompts.colours(noisy)
    assert ink.equal(ASKED[:, 1])
    assert paper.equal(ASKED[:, 2])
    digits = prompts.undo(noisy, ink, paper)
    assert digits.min() == -1
    assert digits.max() == 1


def test_paper_is_what_is_at_the_edge():
    ink, paper = ASKED[:, 1], ASKED[:, 2]
    images = ddim.PALETTE[paper].repeat(1, 1, 28, 28)
    images[:, :, 3:25, 3:25] = ddim.PALETTE[ink]  # more than half of the image
    found_ink, found_paper = prompts.colours(images)
    assert found_ink.equal(ink)
    assert found_paper.equal(paper)


WRONG = {1: ["ink", "ink and paper"], 2: ["paper", "ink and paper"], 3: ["thickness"], 4: ["lean"]}


@pytest.mark.parametrize("column", WRONG)
def test_another_look_than_asked_for_is_wrong(column):
    drawn = ASKED.clone()
    drawn[:, column] = (drawn[:, column] + 1) % (8 if column <= 2 else 2)
    visible = drawn[:, 1] != drawn[:, 2]
    images, asked = paint(drawn)[1][visible], ASKED[visible]
    digits, found = prompts.judge(images, asked)
    assert torch.equal(digits, prompts.undo(images, asked[:, 1], asked[:, 2]))
    assert not any(found[row].any() for row in WRONG[column])
    colours_or_all = ROWS[:2] if column <= 2 else ROWS
    assert all(found[row].all() for row in colours_or_all if row not in WRONG[column])


def test_no_digit_is_wrong():
    blank = ddim.PALETTE[ASKED[:, 2]].expand(-1, -1, 28, 28)
    found = prompts.judge(blank, ASKED)[1]
    assert {row for row in ROWS if found[row].any()} == {"paper"}
    assert not len(found["width of thin ones"])
    assert not len(found["width of thick ones"])


def test_averages():
    assert prompts.average(torch.tensor([True, True, True, False])) == "75.0% ± 21.7%"
    assert prompts.average(torch.tensor([1.0, 3.0, 1.0, 3.0])) == "2.00 ± 0.50"


@pytest.mark.parametrize("held", [False, True])
def test_prompts_say_what_is_asked(held):
    said, asked = prompts.ask(1000, held, seed=3)
    for prompt, (digit, ink, paper, thick, right) in zip(said, asked.tolist(), strict=True):
        a, thickness, colour, noun, leaning, side, on, ground = prompt.split()
        assert (a, leaning, on) == ("a", "leaning", "on")
        assert noun in (str(digit), ddim.DIGITS[digit])
        assert colour == ddim.COLOURS[ink]
        assert ground == ddim.COLOURS[paper]
        assert thickness == ["thin", "thick"][thick]
        assert side == ["left", "right"][right]
        assert ddim.held_out(digit, ink) == held
    pairs = {(digit, ink) for digit, ink in asked[:, :2].tolist()}
    assert len(pairs) == (12 if held else 68)
    assert len({prompt.split()[3] for prompt in said}) == 20  # all digits, in both ways to say them
    assert set(asked[:, 2].tolist()) == set(range(8))
    assert (asked[:, 1] != asked[:, 2]).all()
    for column in (3, 4):
        assert 0.4 < asked[:, column].double().mean() < 0.6
    assert prompts.ask(1000, held, seed=3)[0] == said
    assert prompts.ask(1000, held, seed=4)[0] != said


# ---- The program


def test_an_untrained_network(capsys, progress):
    prompts.main(["tiny.pt", "-n", "6", "--steps", "1", "--guidance", "1", "--out", "x/"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "tiny.pt, guidance 1, 1 steps, 6 each"
    assert table[1].split() == ["seen", "held", "out"]
    assert [line[:20].strip() for line in table[2:7]] == ROWS
    assert all(line.count(" ± ") == 2 for line in table[2:])
    assert progress.total == 12
    assert progress.done == pytest.approx(12)
    for name in ("seen", "held_out"):
        files = sorted(Path("x", name).iterdir())
        asked = prompts.ask(6, name == "held_out", 0)[1]
        assert [path.name for path in files] == [f"{i:06d}-{asked[i, 0]}.png" for i in range(6)]


def test_one_that_obeys(monkeypatch, capsys):
    pretend(monkeypatch, obey)
    prompts.main(["tiny.pt", "-n", "150"])
    table = capsys.readouterr().out.splitlines()
    assert all(line.count("100.0% ± 0.0%") == 2 for line in table[2:7])
    for name in ("seen", "held_out"):
        asked = prompts.ask(150, name == "held_out", 0)[1]
        files = sorted(Path("prompts", name).iterdir())
        strokes = paint(asked)[0] * 127.5 + 127.5
        for path, stroke in zip(files, strokes, strict=True):
            pixels = pil_to_tensor(Image.open(path))
            assert (pixels - stroke).abs().max() < 1  # white on black, whatever the colours


def test_columns_are_those_of_pairs_seen_and_held_out(monkeypatch, capsys):
    said, asked = prompts.ask(20, True, 5)

    def draw(model, these, args, progress):
        tokens = torch.tensor([ddim.tokenize(prompt) for prompt in these])
        images = obey(model, None, tokens, None)(None, 0)
        if these != said:
            return images.cpu()
        return paint(asked[:, [0, 2, 1, 3, 4]])[1]  # ink as paper, and paper as ink

    monkeypatch.setattr(prompts, "draw", draw)
    prompts.main(["tiny.pt", "-n", "20", "--seed", "5"])
    table = capsys.readouterr().out.splitlines()
    for line, row in zip(table[2:5], ROWS[:3], strict=True):
        assert re.split("  +", line) == [row, "100.0% ± 0.0%", "0.0% ± 0.0%"]


@pytest.mark.filterwarnings("ignore:std")  # because nothing is drawn, there are no widths
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flags_say_how_to_draw(dtype, monkeypatch, progress):
    """Noise is a function of --seed and of an image's number, whatever --micro-batch says."""
    device = prompts.DEVICE
    calls = []

    def denoiser(model, alphas_cumprod, tokens, guidance):
        assert guidance == 1.5
        assert torch.equal(alphas_cumprod.cpu(), ddim.schedule())

        def denoise(x_t, t):
            assert torch.is_autocast_enabled(device) == (dtype == "bfloat16")
            calls.append((x_t, t, tokens))
            return 0 * x_t

        return denoise

    pretend(monkeypatch, denoiser)
    flags = f"tiny.pt -n 5 --steps 2 --seed 9 --guidance 1.5 --dtype {dtype} --micro-batch 3"
    prompts.main(flags.split())
    assert [t for _, t, _ in calls] == [999, 499] * 4
    assert [len(x_t) for x_t, _, _ in calls] == [3, 3, 2, 2] * 2
    noise = next(noises(9, range(5), (3, 28, 28), device))
    for held, first in ((False, 0), (True, 4)):
        part, later, rest, _ = calls[first : first + 4]
        assert torch.equal(torch.cat([part[0], rest[0]]), noise)
        a_next, a = ddim.schedule()[[499, 999]]
        shrunk = part[0] * ((1 - a_next) / (1 - a)).sqrt()  # by DDIM, which adds no noise
        torch.testing.assert_close(later[0], shrunk)
        tokens = [ddim.tokenize(prompt) for prompt in prompts.ask(5, held, 9)[0]]
        assert torch.cat([part[2], rest[2]]).tolist() == [list(row) for row in tokens]
    assert progress.done == pytest.approx(10)


def test_by_default_it_draws_the_shipped_weights_as_the_script_does(monkeypatch):
    usual = ddim.make_parser().parse_args([])

    def draw(model, said, args, progress):
        shipped = torch.load(ROOT / "checkpoints/ddim_unet_mnist.pt", weights_only=True)["ema"]
        weight = model.state_dict()["stem.weight"].cpu()
        assert torch.equal(weight, shipped["stem.weight"].float())
        assert len(said) == 1000
        for flag in ("guidance", "steps", "seed", "dtype", "micro_batch"):
            assert vars(args)[flag] == vars(usual)[flag]
        sys.exit("enough")

    monkeypatch.setattr(prompts, "draw", draw)
    with pytest.raises(SystemExit, match="enough"):
        prompts.main([])


def test_empty_folders_are_new_enough():
    Path("x/seen").mkdir(parents=True)
    Path("x/notes.txt").write_text("of mine")
    prompts.main(["tiny.pt", "-n", "6", "--steps", "1", "--out", "x"])
    assert len(list(Path("x/seen").iterdir())) == 6


ERRORS = [  # arguments, part of the line
    ("text.pt", "text.pt is not a checkpoint"),
    (f"{DIT}", "is not a checkpoint of ddim_unet_mnist.py"),
    ("tiny.pt -n 0", "must be 1 at least"),
    ("tiny.pt --steps 0", "must be 1 at least"),
    ("tiny.pt -n 1 --micro-batch 0", "must be 1 at least"),
    ("tiny.pt -n 1 --steps 1001", "--steps 1000 at most"),
    ("tiny.pt --guidance much", "invalid float value: 'much'"),
    ("tiny.pt --dtype float16", "invalid choice: 'float16'"),
    ("tiny.pt --out text.pt", "--out: "),
    ("tiny.pt --out full", "--out: full/seen is not empty"),
    ("tiny.pt --out half", "--out: half/held_out is not empty"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line(line, message):
    Path("text.pt").write_text("no tensors")
    for folder in ("full/seen", "half/seen", "half/held_out"):
        Path(folder).mkdir(parents=True)
    Path("full/seen/000000-1.png").touch()
    Path("half/held_out/000000-1.png").touch()
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        prompts.main(line.split())
    assert "\n" not in error.value.code
    assert sorted(Path().rglob("*")) == before
