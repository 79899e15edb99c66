"""Tests of what one script alone has: colours (ddim_unet_mnist.py), schedules (ddpm)."""

import itertools

import pytest
import torch
from conftest import write_folders

import common
import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm

# ---- Colours


def nearest_colours(pixels):
    """Numbers of the colours of the palette that pixels (B, 3) have; they have to be exact."""
    palette = ddim.PALETTE[:, :, 0, 0]
    distance, number = torch.cdist(pixels, palette).min(dim=1)
    assert distance.max() < 1e-3
    return number.tolist()


@pytest.fixture(scope="module")
def illustrated():
    """9999 bars in colour with captions that name both colours: (inks, papers, tokens, digits)."""
    x0 = torch.full((9999, 1, 28, 28), -1.0)
    x0[:, :, 4:24, 12:16] = 1
    y = torch.arange(9999) % 10
    torch.manual_seed(0)
    u = torch.rand(9999, 12).clamp(min=0.1)
    u[:, 9:11] = 0  # both colours are mentioned
    coloured, tokens = ddim.illustrate(x0, y, u)
    inks = nearest_colours(coloured[:, :, 13, 13])
    papers = nearest_colours(coloured[:, :, 0, 0])
    return inks, papers, tokens.tolist(), y.tolist()


def test_captions_name_the_colours_that_are_painted(illustrated):
    inks, papers, tokens, _ = illustrated
    for ink, paper, row in zip(inks, papers, tokens, strict=True):
        words = [ddim.WORDS[token] for token in row]
        colours = [word for word in words if word in ddim.COLOURS]
        assert colours == [ddim.COLOURS[ink], ddim.COLOURS[paper]]
        assert words[words.index("on") + 1] == ddim.COLOURS[paper]


def test_all_pairs_of_colours_are_painted(illustrated):
    inks, papers, _, _ = illustrated
    pairs = set(itertools.permutations(range(8), 2))
    assert set(zip(inks, papers, strict=True)) == pairs


def test_pairs_that_are_held_out_are_not_painted(illustrated):
    inks, _, _, digits = illustrated
    pairs = set(itertools.product(range(10), range(8)))
    held_out = {(digit, ink) for digit, ink in pairs if ddim.held_out(digit, ink)}
    assert len(held_out) == 12
    assert set(zip(digits, inks, strict=True)) == pairs - held_out


def test_colour_images_are_painted_as_their_greys_are():
    torch.manual_seed(0)
    colour = torch.rand(4, 3, 28, 28) * 2 - 1
    grey = colour.mean(dim=1, keepdim=True)
    y = torch.arange(4)
    u = torch.rand(4, 12)
    one, tokens = ddim.illustrate(colour, y, u)
    other, same = ddim.illustrate(grey, y, u)
    torch.testing.assert_close(one, other)
    assert torch.equal(tokens, same)


# ---- Schedules

SCHEDULES = [
    ("linear", common.linear_schedule),
    ("cosine", common.cosine_schedule),
    ("flow", common.flow_schedule),
]


@pytest.mark.parametrize(("name", "expected"), SCHEDULES)
def test_schedules_by_name(name, expected):
    alphas_cumprod = ddpm.schedule(name=name)
    assert torch.equal(alphas_cumprod, expected(1000))
    assert ddpm.make_parser().parse_args(["--schedule", name]).schedule == name


def test_ddim_on_the_flow_schedule_is_euler_on_straight_paths():
    alphas_cumprod = ddpm.schedule(name="flow")
    torch.manual_seed(0)
    weight = torch.randn(16, 16) / 4
    noise = torch.randn(4, 1, 4, 4)

    def denoise(x_t, t):
        return torch.tanh(x_t.flatten(1) @ weight).view_as(x_t)

    drawn = ddpm.ddim_sample(denoise, noise, alphas_cumprod, 50)
    u = torch.arange(1, 1001).double() / 1001
    length = ((1 - u) ** 2 + u**2).sqrt()
    z = noise * length[-1]  # at u, z is (1 - u) x0 + u noise, and moves with noise - x0
    for t, t_next in ddpm.timestep_pairs(1000, 50):
        x0 = denoise((z / length[t]).float(), t)
        u_next = u[t_next] if t_next >= 0 else 0
        z = z + (u_next - u[t]) * (z - x0) / u[t]
    assert (z - drawn).abs().max() < 1e-5


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that calls main() of ddpm_unet_mnist.py in a folder with a little data."""
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "data", "train/a", "train/b", "test/a", "test/b")

    def run(flags):
        flags = f"--device cpu --dtype float32 -n 1 --steps 2 {flags}"
        monkeypatch.setattr("sys.argv", ["ddpm_unet_mnist.py", *flags.split()])
        ddpm.main()

    return run


def test_a_run_keeps_its_flags_but_what_is_typed_with_resume_wins(run):
    run("--run-dir run --dim 16 --batch-size 4 --max-steps 1 --schedule flow --lr 0.5 --seed 7")
    run("--run-dir run --resume --max-steps 3 --lr 0.25 --batch-size 6")
    _, state = ddpm.load("run/ckpt.pt")
    config = state["config"]
    assert [config["schedule"], config["dim"], config["seed"]] == ["flow", 16, 7]
    assert [config["max_steps"], config["lr"], config["batch_size"]] == [3, 0.25, 6]
    assert [state["step"], state["images"]] == [3, 4 + 6 + 6]


def test_training_and_drawing_take_the_schedule_of_the_run(run, monkeypatch):
    trained = []
    drawn = []
    loss = ddpm.loss

    def spy_on_loss(model, x0, y, t, noise, alphas_cumprod):
        trained.append(alphas_cumprod)
        return loss(model, x0, y, t, noise, alphas_cumprod)

    def spy_on_sampler(denoise, x, alphas_cumprod, steps, randn):
        drawn.append(alphas_cumprod)
        return x

    run("--run-dir run --dim 16 --batch-size 4 --max-steps 1 --schedule flow")
    monkeypatch.setattr(ddpm, "loss", spy_on_loss)
    monkeypatch.setitem(ddpm.SAMPLERS, "ddim", spy_on_sampler)
    run("--run-dir run --resume --max-steps 2 --sampler ddim")
    run("--ckpt run/ckpt.pt --sampler ddim")
    assert len(drawn) == 2  # where training ended, and from the checkpoint
    flow = common.flow_schedule(1000)
    assert len(trained) > 2  # a step, its validation, and what the numbers mean
    for alphas_cumprod in trained + drawn:
        assert torch.equal(alphas_cumprod, flow)


def test_a_run_keeps_its_schedule(run):
    run("--run-dir run --dim 16 --batch-size 4 --max-steps 1 --schedule flow")
    with pytest.raises(SystemExit, match="the schedule was flow, and a run keeps it"):
        run("--run-dir run --resume --max-steps 2 --schedule cosine")
    run("--run-dir run --resume --max-steps 2 --schedule flow")
