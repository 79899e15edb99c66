"""Tests of what one script alone has: colours (ddim_unet_mnist.py), schedules (ddpm)."""

import pytest
import torch

import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm


def nearest_colours(pixels):
    """(B, 3) -> numbers of the nearest colours of the palette and how far they are, (B,) each."""
    distance, number = (pixels[:, None] - ddim.PALETTE[:, :, 0, 0]).norm(dim=2).min(dim=1)
    assert distance.max() < 1e-5
    return number.tolist()


def test_colours_are_as_said_and_never_those_that_are_held_out():
    x0 = -torch.ones(9999, 1, 28, 28)
    x0[:, :, 4:24, 12:16] = 1
    y = torch.arange(9999) % 10
    u = torch.rand(9999, 12).clamp(min=0.1)
    u[:, 9:11] = 0  # both colours are mentioned
    coloured, tokens = ddim.illustrate(x0, y, u)
    inks = nearest_colours(coloured[:, :, 13, 13])
    papers = nearest_colours(coloured[:, :, 0, 0])
    for row, ink, paper in zip(tokens.tolist(), inks, papers, strict=True):
        words = [ddim.WORDS[token] for token in row if ddim.WORDS[token] in ddim.COLOURS]
        assert words == [ddim.COLOURS[ink], ddim.COLOURS[paper]]
    pairs = {(ink, paper) for ink in range(8) for paper in range(8) if ink != paper}
    assert set(zip(inks, papers, strict=True)) == pairs
    seen = {(digit, ink) for digit in range(10) for ink in range(8) if (digit + ink) % 7}
    assert len(seen) == 68
    assert set(zip(y.tolist(), inks, strict=True)) == seen


def test_colour_images_are_painted_as_grey_ones_are():
    grey = torch.rand(4, 1, 28, 28) * 2 - 1
    y, u = torch.arange(4), torch.rand(4, 12)
    one, captions = ddim.illustrate(grey, y, u)
    other, same = ddim.illustrate(grey.expand(-1, 3, -1, -1), y, u)
    torch.testing.assert_close(one, other)
    assert torch.equal(captions, same)


@pytest.mark.parametrize(
    ("name", "last"), [("linear", 4.04e-5), ("cosine", 2.43e-9), ("flow", 1e-6)]
)
def test_schedules_fall_from_one_to_nothing(name, last):
    a = ddpm.schedule(name=name)
    assert a.shape == (1000,)
    assert a.dtype == torch.float32
    assert a[0] > 0.999
    assert (a.diff() < 0).all()
    assert a[-1].item() == pytest.approx(last, rel=0.01)


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


def test_the_schedule_of_a_run_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for k in range(2):
            path = tmp_path / "data" / part / str(k) / "x.png"
            path.parent.mkdir(parents=True)
            ddpm.picture(torch.rand(1, 1, 28, 28)).save(path)

    def run(flags):
        flags = f"--device cpu --dim 16 --batch-size 4 -n 1 --steps 2 {flags}"
        monkeypatch.setattr("sys.argv", ["ddpm_unet_mnist.py", *flags.split()])
        ddpm.main()

    run("--max-steps 1 --schedule flow --run-dir run")
    model, state = ddpm.load("run/ckpt.pt")
    assert model.schedule == state["config"]["schedule"] == "flow"
    run("--max-steps 2 --run-dir run --resume")
    assert ddpm.load("run/ckpt.pt")[0].schedule == "flow"
    with pytest.raises(SystemExit, match="2"):
        run("--max-steps 3 --schedule cosine --run-dir run --resume")
    assert "schedule was flow" in capsys.readouterr().err
    used = []
    monkeypatch.setitem(
        ddpm.SAMPLERS, "ddim", lambda *args, **options: used.append(args[2]) or args[1]
    )
    run("--ckpt run/ckpt.pt --sampler ddim")
    assert torch.equal(used[0], ddpm.schedule(name="flow"))
