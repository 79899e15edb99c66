"""Tests of extras/distill.py: on Gaussian data, where each step is known, and on small networks."""

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import distill
import pytest
import tools
import torch
from conftest import write_folders
from PIL import Image
from test_lora import NAMES, NETWORKS, save
from torch import nn

import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm
import dit_cifar10 as dit
import uvit_cifar10 as uvit
from common import cosine_schedule

MEAN, STD, SHIFT = 0.2, 0.1, 0.3


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "DEVICE", "cpu")
    monkeypatch.setattr(tools, "DEVICE", "cpu")


@pytest.fixture(params=[ddim, dit, uvit], ids=lambda script: script.NAME)
def script(request):
    return request.param


def run(line):
    distill.main(line.split())


def arguments(flags=""):
    return distill.make_parser().parse_args(f"teacher.pt {flags}".split())


def with_ends(alphas_cumprod):
    """alpha-bar at each time, and the clean image's at index -1."""
    return torch.cat([alphas_cumprod, torch.ones(1)])


def ddim_like(script):
    """The script, without an interval of guidance."""
    parser = script.make_parser()
    parser.set_defaults(guidance_interval=(0, 1))
    others = {"loss": script.loss, "denoiser": script.denoiser, "DATA": script.DATA}
    return SimpleNamespace(make_parser=lambda: parser, **others)


def ddim_step(x_t, x0, a, a_next):
    """Song et al. 2020 (2010.02502), eq. 12."""
    eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps


# ---- The goal


@pytest.mark.parametrize("end", [-1, 0, 400])
def test_one_step_lands_where_two_do(end):
    """Whatever the network says, and for an end that is the clean image, too."""
    alpha_bar = with_ends(cosine_schedule())
    t = torch.tensor([402, 450, 700, 998])
    t_next = torch.tensor([401, 420, 699, 500])
    t_end = torch.full_like(t, end)
    x_t = torch.randn(4, 3, 2, 2, generator=torch.manual_seed(0))

    def denoise(x, t):
        return (3 * x).sin() + t[:, None, None, None] / 500

    goal = distill.find_goal(denoise, x_t, t, t_next, t_end, alpha_bar)
    a, a_next, a_end = [alpha_bar[k][:, None, None, None] for k in (t, t_next, t_end)]
    x_next = ddim_step(x_t, denoise(x_t, t), a, a_next)
    landed = ddim_step(x_next, denoise(x_next, t_next), a_next, a_end)
    torch.testing.assert_close(ddim_step(x_t, goal, a, a_end), landed, atol=1e-4, rtol=1e-4)


# ---- The training


class Table(nn.Module):
    """v = weight x_t + bias, tables of the times: on Gaussian data, all that is needed.

    The data of the second of two classes are brighter by SHIFT. Without y, it is told no class.
    """

    def __init__(self, alphas_cumprod):
        super().__init__()
        a = alphas_cumprod
        share = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)  # of x_t - sqrt(a) mean in x0
        by_mean = (share * a.sqrt() - 1) / (1 - a).sqrt()
        self.weight = nn.Parameter((a.sqrt() - share) / (1 - a).sqrt())
        self.bias = nn.Parameter(by_mean * torch.tensor([[MEAN], [MEAN + SHIFT]]))
        self.bias_without = nn.Parameter(by_mean * (MEAN + SHIFT / 2))

    def forward(self, x_t, t, y=None):
        bias = self.bias_without[t] if y is None else self.bias[y, t]
        return self.weight[t].view(-1, 1, 1, 1) * x_t + bias.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("steps", "many"), [(1, 2), (1, 8), (3, 12)])
def test_a_student_on_gaussian_data(steps, many):
    """It draws in few steps of DDIM, from any noise, what its guided teacher draws in many: of both
    classes, which guidance of 1.5 drives apart by a half."""
    alphas_cumprod = cosine_schedule(25)
    teacher = Table(alphas_cumprod)
    labels = torch.arange(500) % 2
    means = MEAN + SHIFT * labels[:, None, None, None]
    draws = means + STD * torch.randn(500, 3, 2, 2, generator=torch.manual_seed(0))
    images = (draws * 127.5 + 127.5).round().clamp(0, 255).byte()
    flags = "--updates 800 --lr 0.03 --batch-size 256 --guidance 1.5"
    args = arguments(f"{flags} --steps {steps} --teacher-steps {many}")
    before = copy.deepcopy(teacher.state_dict())
    student = distill.train(ddim_like(dit), teacher, alphas_cumprod, (images, labels), args)
    assert all(torch.equal(before[name], w) for name, w in teacher.state_dict().items())

    noise = torch.randn(200, 3, 2, 2)
    y = torch.arange(200) % 2
    ways = [(teacher, 1.5, many), (teacher, 1.5, steps), (student, 1, steps)]
    found = []
    with torch.no_grad():
        for model, guidance, n in ways:
            denoise = dit.denoiser(model, alphas_cumprod, y, guidance)
            found.append(dit.ddim_sample(denoise, noise, alphas_cumprod, n))
    goal, in_few, learnt = found
    assert goal[y == 1].mean() - goal[y == 0].mean() > 1.2 * SHIFT
    assert (in_few - goal).square().mean() > 1e-4
    assert (learnt - goal).square().mean() < 1e-5 * (in_few - goal).square().mean()


def test_guided():
    """Each row as the script's denoiser has it: guided inside of the interval, and not outside."""
    torch.manual_seed(0)
    network, shape, _ = NETWORKS[dit]
    model = network(**shape)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    alphas_cumprod = dit.schedule()
    t = torch.tensor([0, 199, 200, 500, 800, 801, 999])
    x_t = torch.randn(7, 3, 32, 32)
    y = torch.arange(7)
    for interval in ((0.2, 0.8), (0, 1)):
        teacher = distill.guided(model, 2.5, interval, 1000)
        with torch.no_grad():
            found = dit.denoiser(teacher, alphas_cumprod, y)(x_t, t)
            for i, time in enumerate(t.tolist()):
                expected = dit.denoiser(model, alphas_cumprod, y[[i]], 2.5, interval)
                torch.testing.assert_close(found[[i]], expected(x_t[[i]], time), atol=1e-4, rtol=0)


class Watched(nn.Module):
    """A network that remembers what it is shown, with y."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x_t, t, y=None):
        if y is not None and not torch.is_grad_enabled():
            self.seen.append((x_t, t, y))
        return self.scale * x_t

    def __deepcopy__(self, memo):
        return Watched()


def test_it_sees_what_its_script_shows():
    """Photos and their mirror images, with their classes; digits in colours, with captions."""
    almost_clean = torch.linspace(0.9999, 0.99, 1000)
    args = arguments("--updates 2 --batch-size 16")
    photo = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    photo[..., 16:] = 255
    teacher = Watched()
    distill.train(dit, teacher, almost_clean, (photo, torch.tensor([7])), args)
    shown = torch.cat([x_t for x_t, _, _ in teacher.seen])
    is_flipped = shown[:, 0, 0, 0] > 0
    assert 4 < is_flipped.sum() < len(shown) - 4
    assert all((y == 7).all() for _, _, y in teacher.seen)

    digit = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    digit[..., 10:18, 10:18] = 255
    teacher = Watched()
    distill.train(ddim, teacher, almost_clean, (digit, torch.tensor([7])), args)
    x_t, _, y = teacher.seen[0]
    assert x_t.shape[1:] == (3, 28, 28)
    assert y.shape == (16, ddim.LENGTH)
    assert (x_t.std(dim=(0, 2, 3)) > 0.1).all()


# ---- The program


def write_data():
    write_folders(Path("data/train"), *NAMES)
    write_folders(Path("data/test"), *NAMES)


def test_of_each_script(script, capsys, monkeypatch):
    """A checkpoint that the script draws from, by the command that is printed."""
    write_data()
    save(script, "teacher.pt")
    run("teacher.pt --updates 2 --batch-size 4 --steps 3 --teacher-steps 12 --out new/fast.pt")
    out = capsys.readouterr().out
    assert re.findall(r"^(\d+) steps: update (\d+)  loss 0", out, re.M) == [("6", "2"), ("3", "2")]
    (command,) = re.findall(r"^python (.*)$", out, re.M)
    model, state = script.load("new/fast.pt")
    teacher, old = script.load("teacher.pt")
    assert state["config"] == old["config"]
    assert state["step"] == 7
    pairs = list(zip(model.parameters(), teacher.parameters(), strict=True))
    assert any((weight - before).abs().max() > 1e-5 for weight, before in pairs)
    assert all((weight - before).abs().max() < 2e-3 for weight, before in pairs)
    assert "--sampler ddim --steps 3 --guidance 1" in command
    assert command.startswith(f"{script.NAME}.py ")
    monkeypatch.setattr(sys, "argv", [*command.split(), "-n", "2", "--out", "x.png"])
    script.main()
    assert Image.open("x.png").width > 28


@pytest.mark.parametrize(("script", "interval"), [(ddim, (0, 1)), (dit, (0.2, 0.8))])
def test_guidance_is_learnt(script, interval, monkeypatch):
    """The first teacher is guided by --guidance, at the times at which the script guides."""
    write_data()
    save(script, "teacher.pt")
    asked = []

    def guided(model, guidance, interval, T):
        asked.append((guidance, tuple(interval), T))
        return model

    monkeypatch.setattr(distill, "guided", guided)
    run("teacher.pt --updates 1 --batch-size 2 --guidance 1.5")
    assert asked == [(1.5, interval, 1000)]


ERRORS = [
    ("", "arguments are required: ckpt"),
    ("none.pt", "none.pt is not a checkpoint"),
    ("digits.pt", "digits.pt: in few steps, x0 cannot be learnt"),
    ("teacher.pt --steps 0", "must be 1 at least"),
    ("teacher.pt --steps 32", "--teacher-steps must be 2, 4, 8 .. times --steps"),
    ("teacher.pt --steps 8 --teacher-steps 24", "must be 2, 4, 8 .. times --steps"),
    ("teacher.pt --steps 251 --teacher-steps 1004", "times --steps, and 1000 at most"),
    ("teacher.pt --updates 0", "must be 1 at least"),
    ("teacher.pt --out link.pt", "--out link.pt is a folder, or the teacher's file"),
    ("teacher.pt --out two", "--out two is a folder"),
    ("teacher.pt --out fast.pt/x.pt", "--out: cannot write fast.pt/x.pt"),
    (
        "teacher.pt --data-dir data --lr 1e30 --updates 9 --batch-size 2",
        "try again with a lower --lr",
    ),
    ("teacher.pt --data-dir two", "--data-dir two: 2 classes, the teacher has 10"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line(line, message):
    save(dit, "teacher.pt")
    save(ddpm, "digits.pt")
    Path("link.pt").symlink_to("teacher.pt")
    Path("fast.pt").touch()
    write_folders(Path("two/train"), "a", "b")
    write_data()
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(line)
    assert "\n" not in error.value.code
