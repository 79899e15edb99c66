"""extras/lora.py on small networks of all four scripts: python -m pytest -q .ci/test_lora.py"""

import re
import sys
from argparse import Namespace
from pathlib import Path

import lora
import pytest
import torch
from PIL import Image

import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm
import dit_cifar10 as dit
import uvit_cifar10 as uvit
from common import load_data

NETWORKS = {ddpm: (ddpm.UNet, 16, "flow"), ddim: (ddim.UNet, 16)}
NETWORKS |= {dit: (dit.DiT, 16, 2, 2, 8), uvit: (uvit.UViT, 16, 2, 2, 8)}
PROMPTS = ["", "a thin 3", "thick red", "7 on blue"]
NAMES = list("abcdefghij")


@pytest.fixture(params=NETWORKS, ids=lambda script: script.NAME)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lora, "DEVICE", "cpu")
    lora.make_typed("typed")


def save(script, path, seed=0, half=False):
    """A network of random weights, as a run leaves it, or in half precision, as it is shipped."""
    torch.manual_seed(seed)
    network, *shape = NETWORKS[script]
    model = network(*shape)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    config = dict(zip(script.SHAPE, shape, strict=True))
    config |= {"script": script.NAME, "names": NAMES, "meaning": script.MEANING}
    ema = (model.half() if half else model).state_dict()
    torch.save({"ema": ema, "step": 7, "images": 56, "config": config}, path)


def adapt(*flags):
    lora.main(["base.pt", "--rank", "2", "--steps", "3", "--out", "new.pt", *flags])


def load(script, path):
    """Its network and, as a copy, its weights."""
    model = script.load(path)[0]
    return model, {name: weight.clone() for name, weight in model.state_dict().items()}


@torch.no_grad()
def output(script, model):
    """Of a forward pass for fixed inputs."""
    x = torch.randn(4, script.CHANNELS, script.SIZE, script.SIZE, generator=torch.manual_seed(1))
    y = torch.tensor([0, 1, 2, 10])
    if script is ddim:
        y = torch.tensor([script.tokenize(prompt) for prompt in PROMPTS])
    return model(x, torch.tensor([0, 9, 500, 999]), y)


def test_training_leaves_the_weights_alone(script):
    save(script, "base.pt")
    model, before = load(script, "base.pt")
    drawn = output(script, model)
    lora.add_lora(model, rank=2)
    same = output(script, model)  # for B is 0, though other kernels may add in another order
    torch.testing.assert_close(same, drawn, rtol=0, atol=1e-6)
    learnt = lora.train(script, model, len(NAMES), Namespace(data_dir="typed", steps=3))
    assert (output(script, model) - drawn).abs().max() > 1e-4
    adapted = model.state_dict()
    original = ".parametrizations.weight.original"
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        assert torch.equal(adapted.get(name, adapted.get(layer + original)), weight), name
    assert all(weight.dtype == torch.float16 for weight in learnt.values())
    assert all(weight.any() for weight in learnt.values())
    assert len(before) + len(learnt) == len(adapted)


def test_merged(script, monkeypatch):
    """The new checkpoint draws as W + B A, is like the old one in form, and the script takes it."""
    save(script, "base.pt")
    adapt()
    model, before = load(script, "base.pt")
    adapter = torch.load("new.lora.pt", weights_only=True)
    lora.add_lora(model, rank=2)
    model.load_state_dict(adapter["weights"], strict=False)
    merged, after = load(script, "new.pt")
    torch.testing.assert_close(output(script, merged), output(script, model), rtol=0, atol=1e-6)
    assert list(after) == list(before)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    old, new = [torch.load(path, weights_only=True) for path in ("base.pt", "new.pt")]
    assert list(new) == ["ema", "step", "config"]
    assert new["config"] == old["config"]
    drawing = "--ckpt new.pt -n 2 --steps 1 --device cpu --dtype float32"
    monkeypatch.setattr(sys, "argv", [script.__file__, *drawing.split()])
    script.main()
    assert Path("samples.png").exists()


def test_again(script):
    """The adapter gives the same checkpoint again, from shipped weights as from those of a run."""
    save(script, "base.pt")
    adapt()
    adapt("--adapter", "new.lora.pt", "--out", "again.pt")
    save(script, "base.pt", half=True)
    adapt("--adapter", "new.lora.pt", "--out", "half.pt")
    first, again, half = [load(script, path)[1] for path in ("new.pt", "again.pt", "half.pt")]
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        torch.testing.assert_close(weight, half[name], rtol=0, atol=1e-3)
    assert not Path("again.lora.pt").exists()


def test_another_number_of_classes(script, capsys):
    save(script, "base.pt")
    for path in Path("typed/train/9").iterdir():
        path.unlink()
    Path("typed/train/9").rmdir()
    if script is ddpm:  # it is told no class
        adapt()
    else:
        refused([], "--data-dir typed: 9 classes, and the model has 10", capsys)
        assert not Path("new.pt").exists()


def refused(flags, message, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        adapt(*flags)
    assert re.fullmatch(f"lora.py: .*{re.escape(message)}.*\n", capsys.readouterr().err)


ERRORS = [
    ("--adapter other.lora.pt", "was learnt with other weights than base.pt"),
    ("--adapter other.pt", "was learnt with other weights"),
    ("--adapter none.pt", "none.pt"),
    ("--adapter text.pt", "text.pt"),
    ("--data-dir none", "--data-dir none: put images into none/train/<class>/"),
    ("--data-dir typed/train", "put images into typed/train/train/<class>/"),
    ("--data-dir empty", "--data-dir empty: put images into "),
    ("--rank 0", "--rank"),
    ("--rank x", "--rank"),
    ("--steps 0", "--steps"),
    ("--out base.pt", "--out"),
    ("--make-typed", "base.pt"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS)
def test_errors_are_one_line(flags, message, capsys):
    save(ddim, "other.pt", seed=1)
    lora.main(["other.pt", "--rank=2", "--steps=1", "--out=other.pt.new"])
    Path("other.pt.new.lora.pt").rename("other.lora.pt")
    save(ddim, "base.pt")
    before = Path("base.pt").read_bytes()
    Path("text.pt").write_text("no tensors")
    Path("empty/train/a").mkdir(parents=True)
    refused(flags.split(), message, capsys)
    assert Path("base.pt").read_bytes() == before
    assert not Path("new.pt").exists()


def test_typed():
    """Ten digits, ten of each, white on black; half are thick, and both lean from left to right."""
    with pytest.raises(SystemExit) as end:
        lora.main(["--make-typed", "more"])
    assert end.value.code is None
    (images, labels), test_set, names = load_data("MNIST", "more", 28, 1)
    assert names == list("0123456789")
    assert labels.bincount().tolist() == [10] * 10
    assert test_set is None
    with Image.open("more/train/0/0.png") as image:
        assert image.size == (28, 28)
    height = (images.amax(dim=3) > 127).sum(dim=2)
    assert (height >= 19).all() and (height <= 23).all()
    assert not images[:, :, [0, -1]].any() and not images[:, :, :, [0, -1]].any()
    width, slant = ddim.measure(images / 127.5 - 1)
    assert ((width > 2.6) == torch.arange(100).div(5, rounding_mode="floor").remainder(2)).all()
    slant = slant.view(20, 5)
    assert (slant.diff(dim=1) > 0.1).all()
    assert (slant[:, 0] < -0.1).all() and (slant[:, 4] > 0.1).all()
