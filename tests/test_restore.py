"""Tests of extras/restore.py: what is known of an image is in every answer."""

from pathlib import Path

import pytest
import restore
import torch
from conftest import ROOT, random_images
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import dit_cifar10 as dit
from common import cosine_schedule

COSINE = cosine_schedule()
MASK = torch.ones(1, 1, 32, 32)
MASK[:, :, 8:28, 12:30] = 0
DAMAGES = {
    "inpaint": restore.inpainting(MASK),
    "upscale": restore.upscaling(4),
    "colour": restore.colouring(),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current folder with a photo."""
    monkeypatch.chdir(tmp_path)
    pixels = random_images(1, 32, 32, 3)[0]
    Image.fromarray(pixels.numpy()).save("photo.png")


def run(flags):
    restore.main(f"--steps 2 -n 2 {flags}".split())


def pixels(path):
    """A picture, int64 (3, H, W)."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).long()


@pytest.fixture(params=DAMAGES)
def task(request):
    return request.param


def test_what_is_known_is_enough_to_know_it_again(task):
    damage, repair = DAMAGES[task]
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(damage(repair(damage(x))), damage(x))
    assert (damage(x) - damage(x.flip(-1))).abs().max() > 0.1  # and not nothing


def test_what_was_asked_is_in_the_answer(task):
    """Whatever the network says, and between black and white, where saturated parts are known."""
    whole = random_images(4, 3, 32, 32)
    whole[1, :, :16] = 255
    whole[2, :, :, 8:24] = 0
    whole = whole / 127.5 - 1
    damage, repair = DAMAGES[task]
    known = damage(whole)
    generator = torch.manual_seed(0)

    def denoise(x_t, t):
        return 2 * torch.randn(x_t.shape, generator=generator)

    x = restore.restore(denoise, torch.randn(4, 3, 32, 32), COSINE, known, damage, repair, steps=5)
    assert x.abs().max() <= 1
    levels = x.mul(127.5).add(128).clamp(0, 255).byte()  # as picture() rounds
    again = damage(levels / 127.5 - 1)
    if task == "inpaint":
        assert torch.equal(again, known)
        hole = (1 - MASK).bool().expand_as(x)
        assert x[hole].std() > 0.5  # and the rest is the network's
    elif task == "upscale":
        assert (again - known).abs().max() * 127.5 <= 1
        assert (x - repair(known)).std() > 0.1
    else:
        assert (again - known).abs().max() * 127.5 <= 1
        assert (x - repair(known)).std() > 0.1


def test_of_all_such_images_the_nearest_to_the_network_s(task):
    """What it changes is at right angles to what it keeps."""
    damage, repair = DAMAGES[task]
    x, whole, other = torch.randn(3, 1, 3, 32, 32)
    fitted = restore.fit(x, damage(whole), damage, repair)
    change = fitted - x
    free = other - repair(damage(other))  # changes nothing that is known
    torch.testing.assert_close(damage(free), torch.zeros_like(damage(free)), atol=1e-5, rtol=0)
    assert abs((change * free).sum()) < 1e-2


def test_a_perfect_network_restores_the_image(task):
    whole = torch.rand(1, 3, 32, 32) * 2 - 1
    damage, repair = DAMAGES[task]
    options = {"steps": 3, "eta": 0.85}
    noise = torch.randn_like(whole)
    found = restore.restore(
        lambda x_t, t: whole, noise, COSINE, damage(whole), damage, repair, **options
    )
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strength", "t"), [(1.0, 999), (0.6, 599), (0.001, 0)])
def test_vary_starts_from_the_image_with_noise(strength, t):
    image, noise = torch.randn(2, 1, 3, 4, 4)
    seen = []

    def denoise(x_t, t):
        seen.append((t, x_t))
        return image

    varied = restore.vary(denoise, noise, COSINE, image, strength, steps=10, eta=0.85)
    start, x_t = seen[0]
    assert start == t
    a = COSINE[t]
    torch.testing.assert_close(x_t, a.sqrt() * image + (1 - a).sqrt() * noise)
    torch.testing.assert_close(varied, image)
    assert len(seen) == min(10, t + 1)
    assert [t for t, _ in seen] == sorted({t for t, _ in seen}, reverse=True)


def test_a_noisy_image_is_on_the_way():
    """It is scaled to the x_t that has as much noise, and the sampler goes on from there."""
    t = 300
    std = ((1 - COSINE[t]) / COSINE[t]).sqrt()
    noisy = torch.randn(2, 3, 4, 4)
    seen = []

    def denoise(x_t, t):
        seen.append((t, x_t))
        return 0.5 * noisy

    options = {"steps": 4, "eta": 0.0}
    cleaned = restore.remove_noise(denoise, noisy, COSINE, std.item(), **options)
    assert [t for t, _ in seen] == [300, 225, 149, 74]
    torch.testing.assert_close(seen[0][1], COSINE[t].sqrt() * noisy)
    torch.testing.assert_close(cleaned, 0.5 * noisy)
    seen.clear()
    restore.remove_noise(denoise, noisy, COSINE, 1e-4, **options)
    assert [t for t, _ in seen] == [0]


# ---- From the command line


def test_noise_is_taken_out():
    """Of a photo that is smooth; half of the noise that is there, and more where --noise is."""
    clean = torch.linspace(40, 200, 32).expand(3, 32, 32)
    noisy = clean + 30 * torch.randn(3, 32, 32, generator=torch.manual_seed(0))
    Image.fromarray(noisy.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save("noisy.png")
    rough = []
    for level in (5, 30):
        run(f"denoise noisy.png --noise {level} --steps 8 -n 1 --out x/")
        rough.append((pixels("x/000000.png") - clean).square().mean().sqrt())
    assert rough[0] > 20
    assert rough[1] < 15


def test_answers_beside_what_is_known():
    run("inpaint photo.png --mask 12 8 30 28")
    run("inpaint photo.png --mask 12 8 30 28 -n 3 --out x/")
    framed = pixels("restored.png").view(3, 34, 3, 34)[:, 1:33, :, 1:33]
    shown, first, second = framed.unbind(dim=2)
    known = MASK[0].bool().expand(3, -1, -1)
    photo = pixels("photo.png")
    assert torch.equal(shown[known], photo[known])
    assert (shown[~known] == 128).all()
    for i, image in enumerate((first, second)):
        assert torch.equal(image[known], photo[known])
        assert (image - pixels(f"x/{i:06d}.png")).abs().max() <= 1  # whatever -n is
    assert (first - second).abs().max() > 10
    assert len(list(Path("x").iterdir())) == 3


def test_a_mask_in_a_file_is_white_in_the_hole():
    mask = Image.new("L", (64, 64))
    mask.paste(255, (24, 16, 60, 56))
    mask.save("mask.png")
    run("inpaint photo.png --mask mask.png --out file.png")
    run("inpaint photo.png --mask 12 8 30 28 --out box.png")
    assert torch.equal(pixels("file.png"), pixels("box.png"))


def test_upscale_reads_as_many_pixels_as_it_asks_for():
    small = Image.fromarray(random_images(16, 16, 3).numpy())
    small.save("small.png")
    run("upscale small.png --scale 2")
    blocks = pixels("restored.png").view(3, 34, 3, 34)[:, 1:33, :, 1:33].float()
    means = blocks.reshape(3, 16, 2, 3, 16, 2).mean(dim=(2, 5))
    for answer in means.unbind(dim=2):
        assert (answer - pixels("small.png")).abs().max() <= 1.5


def test_classes_and_prompts_reach_the_network():
    """As a name or as a number, and guidance with them."""
    run("colour photo.png --class ship --out name.png")
    run("colour photo.png --class 8 --out number.png")
    run("colour photo.png --class 8 --guidance 1 --out unguided.png")
    run("colour photo.png --out any.png")
    name, number, unguided, anything = [
        pixels(f"{path}.png") for path in ("name", "number", "unguided", "any")
    ]
    assert torch.equal(name, number)
    assert not torch.equal(name, unguided)
    assert not torch.equal(name, anything)
    digits = f"--ckpt {ROOT}/checkpoints/ddim_unet_mnist.pt"
    restore.main(
        [*f"vary photo.png --steps 2 -n 1 --out seven.png {digits}".split(), "--prompt", "7"]
    )
    run(f"vary photo.png -n 1 --out any.png {digits}")
    assert not torch.equal(pixels("seven.png"), pixels("any.png"))


@pytest.mark.parametrize("name", ["ddpm_unet_mnist", "uvit_cifar10"])
def test_with_every_script(name):
    run(f"upscale photo.png --ckpt {ROOT}/checkpoints/{name}.pt")
    with Image.open("restored.png") as picture:
        side = 30 if "mnist" in name else 34
        assert picture.size == (3 * side, side)


def test_seed_steps_and_eta():
    known = {}
    for flags in ("", "--seed 1", "--steps 3", "--eta 0"):
        run(f"colour photo.png {flags}")
        known[flags] = pixels("restored.png")
    for flags in ("--seed 1", "--steps 3", "--eta 0"):
        assert not torch.equal(known[flags], known[""])


@pytest.fixture
def test_set():
    """data/: three test images of each of ten classes."""
    images = random_images(30, 32, 32, 3)
    for i, image in enumerate(images):
        for part in ("train", "test"):
            folder = Path("data", part, str(i // 3))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{i % 3}.png")
    return images.permute(0, 3, 1, 2)


def test_on_the_first_test_images_of_each_class(test_set, capsys, monkeypatch):
    """PSNR of what is damaged, and of answers that a network gives which is told the class."""
    told = []

    def denoiser(model, alphas_cumprod, y=None, **guidance):
        told.append((y, guidance))
        return lambda x_t, t: torch.full_like(x_t, 0.5)

    monkeypatch.setattr(dit, "meaning", lambda: None)  # which measures the denoiser
    monkeypatch.setattr(dit, "denoiser", denoiser)
    run("upscale -n 20 --guidance 2.5 --out x/")
    run("upscale -n 15 --unconditional --out y/")
    whole = test_set[[3 * k + i for k in range(10) for i in range(2)]] / 127.5 - 1
    known = torch.nn.functional.avg_pool2d(whole, 4)
    damaged = known.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    errors = (damaged - whole).square().mean(dim=(1, 2, 3)) / 4
    psnr = (-10 * errors.log10()).mean()  # the network's 0.5 has no details to add
    lines = [line for line in capsys.readouterr().out.splitlines() if "PSNR" in line]
    assert lines[:2] == [
        f"damaged: PSNR {psnr:.2f} dB, the mean of 20 images",
        f"restored: PSNR {psnr:.2f} dB, the mean of 20 images",
    ]
    assert lines[2].endswith("the mean of 15 images")
    parts = [y.tolist() for y, guidance in told if y is not None]
    assert sum(parts, []) == [k for k in range(10) for _ in range(2)]
    assert told[0][1] == {"guidance": 2.5, "interval": (0.2, 0.8)}
    assert told[-1] == (None, {})
    files = sorted(path.name for path in Path("x/restored").iterdir())
    assert files == [f"{i:06d}-{i // 2}.png" for i in range(20)]
    assert (pixels("x/whole/000003-1.png") - test_set[4]).abs().max() <= 1
    assert (pixels("x/damaged/000003-1.png") - (127.5 * damaged[3] + 127.5)).abs().max() <= 1


@pytest.mark.parametrize("name", ["ddpm_unet_mnist", "ddim_unet_mnist"])
def test_on_test_digits(test_set, capsys, name):
    """Of which one network is told nothing, and one what a caption says."""
    run(f"upscale -n 10 --out x/ --ckpt {ROOT}/checkpoints/{name}.pt")
    assert len(list(Path("x/restored").iterdir())) == 10
    printed = capsys.readouterr().out
    assert "restored: PSNR " in printed
    assert "those of the checkpoint ['0 - zero', " in printed


def test_noise_on_test_images(test_set, capsys, monkeypatch):
    """As much as --noise says, and none of it is used again on the way."""
    used = []

    def remove_noise(denoise, images, alphas_cumprod, std, steps, eta, randn):
        used.append((images, std, randn(None)))
        return images

    monkeypatch.setattr(restore, "remove_noise", remove_noise)
    run("denoise -n 10 --noise 51 --out x/")
    assert "damaged: PSNR 13." in capsys.readouterr().out  # 20 log10(255 / 51) = 13.98
    noisy, std, again = used[0]
    assert std == pytest.approx(0.4)
    noise = (noisy - (test_set[::3] / 127.5 - 1)) / std
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise * again).mean()) < 0.02
    assert abs(again.std() - 1) < 0.02


ERRORS = [
    ("inpaint photo.png", "inpaint wants a --mask"),
    ("colour photo.png --mask 1 2 3 4", "inpaint wants a --mask, and nothing else does"),
    ("inpaint photo.png --mask 1 2 3", "--mask takes a file, or four numbers"),
    ("inpaint photo.png --mask 9 2 3 4", "a hole has left < right and top < bottom in 0..32"),
    ("inpaint photo.png --mask none.png", "none.png"),
    ("colour none.png", "none.png"),
    ("upscale photo.png --scale 5", "--scale 5 must divide 32"),
    ("colour photo.png --class car", "--class car: there are {0: 'airplane', "),
    ("colour photo.png --prompt 7", "takes no prompt"),
    ("colour photo.png --out x.jpg", "--out x.jpg must end in .png or /"),
    ("colour photo.png --steps 0", "must be 1 at least"),
    ("vary photo.png --strength 0", "--strength must be above 0"),
    ("denoise photo.png --noise 0", "--noise above 0"),
    ("denoise large.png", "denoise: large.png is not of 32 x 32 pixels"),
    ("vary --out x/", "without an image, test images are restored"),
    ("colour", "without an image, test images are restored into a folder"),
    (f"colour photo.png --ckpt {ROOT}/checkpoints/ddpm_unet_mnist.pt", "draws in grey"),
    (f"vary photo.png --class 7 --ckpt {ROOT}/checkpoints/ddim_unet_mnist.pt", "knows no classes"),
    (f"vary photo.png --prompt pink --ckpt {ROOT}/checkpoints/ddim_unet_mnist.pt", "'pink' is not"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS)
def test_errors_are_one_line(flags, message):
    Image.new("L", (64, 64)).save("large.png")
    with pytest.raises(SystemExit) as end:
        run(flags)
    assert message in end.value.code
    assert "\n" not in end.value.code
