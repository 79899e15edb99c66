"""extras/prompts.py on strokes painted by hand: python -m pytest -q .ci/test_prompts.py"""

import itertools
from pathlib import Path

import prompts
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import ddim_unet_mnist as ddim

DIT = Path(ddim.__file__).with_name("checkpoints") / "dit_cifar10.pt"
ROWS = ["ink", "paper", "ink and paper", "thickness", "lean"]
LOOKS = itertools.product(itertools.permutations(range(8), 2), (0, 1), (0, 1))
ASKED = torch.tensor([[7, *colours, thick, right] for colours, thick, right in LOOKS])  # (224, 5)


def paint(asked):
    """A soft, leaning stroke for each of asked (B, 5), (B, 1, 28, 28), and the same in colour."""
    _, ink, paper, thick, right = asked.T
    up = 13.5 - torch.arange(28)[:, None]
    across = torch.arange(28) - 13.5 - up * (right[:, None, None, None] - 0.5)
    grey = (1.3 + 1.4 * thick[:, None, None, None] - across.abs()).clamp(0, 1) * (up.abs() < 9)
    return 2 * grey - 1, torch.lerp(ddim.PALETTE[paper], ddim.PALETTE[ink], grey)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where a test runs: with a checkpoint of a tiny network, untrained."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = {"dim": 16, "meaning": ddim.MEANING, "names": ddim.DIGITS}
    torch.save({"ema": ddim.UNet(16).state_dict(), "step": 0, "config": config}, "tiny.pt")


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


WRONG = {1: ["ink", "ink and paper"], 2: ["paper", "ink and paper"], 3: ["thickness"], 4: ["lean"]}


@pytest.mark.parametrize("column", WRONG)
def test_another_look_than_asked_for_is_wrong(column):
    drawn = ASKED.clone()
    drawn[:, column] = (drawn[:, column] + 1) % (8 if column <= 2 else 2)
    visible = drawn[:, 1] != drawn[:, 2]
    found = prompts.judge(paint(drawn)[1][visible], ASKED[visible])[1]
    assert not any(found[row].any() for row in WRONG[column])
    colours_or_all = ROWS[:2] if column <= 2 else ROWS
    assert all(found[row].all() for row in colours_or_all if row not in WRONG[column])


def test_no_digit_is_wrong():
    blank = ddim.PALETTE[ASKED[:, 2]].expand(-1, -1, 28, 28)
    found = prompts.judge(blank, ASKED)[1]
    assert {row for row in ROWS if found[row].any()} == {"paper"}
    assert not len(found["width of thin ones"])


@pytest.mark.parametrize("held", [False, True])
def test_prompts_say_what_is_asked(held):
    said, asked = prompts.ask(1000, held, seed=3)
    for prompt, (digit, ink, paper, thick, right) in zip(said, asked.tolist(), strict=True):
        a, thickness, colour, noun, leaning, side, on, ground = prompt.split()
        assert (a, leaning, on) == ("a", "leaning", "on")
        assert noun in (str(digit), ddim.DIGITS[digit])
        assert (colour, ground) == (ddim.COLOURS[ink], ddim.COLOURS[paper])
        assert (thickness, side) == (("thin", "thick")[thick], ("left", "right")[right])
        assert ddim.held_out(digit, ink) == held
    pairs = {(digit, ink) for digit, ink in asked[:, :2].tolist()}
    assert len(pairs) == (12 if held else 68)
    assert prompts.ask(1000, held, seed=3)[0] == said
    assert prompts.ask(1000, held, seed=4)[0] != said


def test_the_whole_program_on_an_untrained_network(capsys):
    prompts.main(["tiny.pt", "-n", "6", "--steps", "1", "--guidance", "1", "--out", "x/"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "tiny.pt, guidance 1, 1 steps, 6 each"
    assert [line[:20].strip() for line in table[2:7]] == ROWS
    assert all(line.count(" ± ") == 2 for line in table[2:])
    for name in ("seen", "held_out"):
        files = sorted(Path("x", name).iterdir())
        asked = prompts.ask(6, name == "held_out", 0)[1]
        assert [path.name for path in files] == [f"{i:06d}-{asked[i, 0]}.png" for i in range(6)]


def test_the_whole_program_on_one_that_obeys(monkeypatch, capsys):
    def draw(model, args, tokens, index):
        asked = []
        for i in index:
            _, thickness, ink, _, _, side, _, paper = [ddim.WORDS[number] for number in tokens[i]]
            ink, paper = ddim.COLOURS.index(ink), ddim.COLOURS.index(paper)
            asked.append([7, ink, paper, thickness == "thick", side == "right"])
        return paint(torch.tensor(asked))[1][None]

    monkeypatch.setattr(ddim, "draw", draw)
    prompts.main(["tiny.pt", "-n", "150"])
    table = capsys.readouterr().out.splitlines()
    assert all(line.count("100.0% ± 0.0%") == 2 for line in table[2:7])
    pixels = pil_to_tensor(Image.open(next(Path("prompts/seen").iterdir())))
    assert pixels[:, 0].max() == 0  # black
    assert pixels.max() == 255


ERRORS = [  # arguments, part of the line
    ("text.pt", "text.pt is not a checkpoint"),
    (f"{DIT}", "is not a checkpoint of ddim_unet_mnist.py"),
    ("tiny.pt -n 1", "1 is not from 2"),
    ("tiny.pt --guidance nan", "nan is not from 0"),
    ("tiny.pt --steps 1001", "1001 is not from 1"),
    ("tiny.pt --out text.pt", "--out text.pt"),
    ("tiny.pt --out full", "exists"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line(line, message, capsys):
    Path("text.pt").write_text("no tensors")
    Path("full/seen").mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        prompts.main(line.split())
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert sorted(Path().rglob("*")) == before
