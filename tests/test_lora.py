"""extras/lora.py on small networks of all four scripts: python -m pytest -q tests/test_lora.py"""

import hashlib
import math
import sys
from argparse import Namespace
from pathlib import Path

import lora
import pytest
import tools
import torch
from PIL import Image
from torch import nn

import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm
import dit_cifar10 as dit
import uvit_cifar10 as uvit
from common import batch, load_data

TRANSFORMER = {"dim": 16, "depth": 2, "heads": 2, "patch": 8}
NETWORKS = {
    ddpm: (ddpm.UNet, {"dim": 16}, {"schedule": "flow"}),
    ddim: (ddim.UNet, {"dim": 16}, {}),
    dit: (dit.DiT, TRANSFORMER, {}),
    uvit: (uvit.UViT, TRANSFORMER, {}),
}
NAMES = list("abcdefghij")


@pytest.fixture(params=NETWORKS, ids=lambda script: script.NAME)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder to work in, with typed digits, and a CPU to compute on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lora, "DEVICE", "cpu")
    monkeypatch.setattr(tools, "DEVICE", "cpu")
    lora.make_typed("typed")


def save(script, path, seed=0, half=False):
    """A network of random weights, as a run leaves it, or in half precision, as it is shipped."""
    torch.manual_seed(seed)
    network, shape, more = NETWORKS[script]
    model = network(**shape)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.05)
    if half:
        model.half()
    meaning = script.meaning(*more.values())
    config = {"script": script.NAME, "class_names": NAMES, "meaning": meaning, **shape, **more}
    torch.save({"ema": model.state_dict(), "step": 7, "images": 56, "config": config}, path)


def adapt(*flags):
    lora.main(["base.pt", "--rank", "2", "--steps", "3", "--out", "new.pt", *flags])


def load(script, path):
    """Its network and, as a copy, its weights."""
    model, _ = script.load(path)
    return model, {name: weight.clone() for name, weight in model.state_dict().items()}


@torch.no_grad()
def output(script, model):
    """Of a forward pass for fixed inputs."""
    x = torch.randn(4, script.CHANNELS, script.SIZE, script.SIZE, generator=torch.manual_seed(1))
    y = torch.tensor([0, 1, 2, 10])
    if script is ddim:
        prompts = ["", "a thin 3", "thick red", "7 on blue"]
        y = torch.tensor([script.tokenize(prompt) for prompt in prompts])
    return model(x, torch.tensor([0, 9, 500, 999]), y)


def list_layers(model):
    """The names of the layers that are adapted, in the network's order."""
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, layer in model.named_modules() if isinstance(layer, kinds)]


def test_training_leaves_the_weights_alone(script):
    save(script, "base.pt")
    _, model, state, alphas_cumprod = tools.load("base.pt")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drawn = output(script, model)
    lora.add_lora(model, rank=2)
    same = output(script, model)  # B is 0, though other kernels may add in another order
    torch.testing.assert_close(same, drawn, rtol=0, atol=1e-6)
    args = Namespace(data_dir="typed", steps=3)
    learnt = lora.train(script, model, alphas_cumprod, state, args)
    assert (output(script, model) - drawn).abs().max() > 1e-4
    adapted = model.state_dict()
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        original = f"{layer}.parametrizations.weight.original"
        assert torch.equal(adapted.get(name, adapted.get(original)), weight), name
    assert all(weight.dtype == torch.float16 for weight in learnt.values())
    assert all(weight.any() for weight in learnt.values())
    assert len(before) + len(learnt) == len(adapted)


def test_learns_as_by_hand(script):
    """The whole method again, without parametrizations: what is drawn by chance, and each step."""
    save(script, "base.pt")
    adapt()
    adapter = torch.load("new.lora.pt", weights_only=True)
    model, before = load(script, "base.pt")
    torch.manual_seed(0)
    learnt = {}
    for layer in list_layers(model):
        weight = before[f"{layer}.weight"]
        a = nn.Linear(weight[0].numel(), 2, bias=False).weight
        b = nn.Linear(2, len(weight), bias=False).weight
        nn.init.zeros_(b)
        learnt[layer] = (a, b)

    def adapted(x, t, y):
        weights = dict(before)
        for layer, (a, b) in learnt.items():
            weight = before[f"{layer}.weight"]
            weights[f"{layer}.weight"] = weight + 8 / 2 * (b @ a).view_as(weight)
        return torch.func.functional_call(model, weights, (x, t, y))

    train_set, _, _ = load_data(script.DATA, "typed", script.SIZE, script.CHANNELS)
    optimizer = torch.optim.Adam([weight for pair in learnt.values() for weight in pair])
    _, _, more = NETWORKS[script]
    for step, lr in enumerate([5e-3, 5e-3 * 2 / 3, 5e-3 / 3]):
        x0, y, t, noise, u = batch(*train_set, 1000, 16, 0, step)
        if script is ddim:
            x0, y = ddim.illustrate(x0, y, u)
        elif script is not ddpm:
            y = torch.where(u[:, 0] < 0.1, 10, y)
        optimizer.zero_grad()
        script.loss(adapted, x0, y, t, noise, script.schedule("cpu", *more.values())).backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    different = 0
    for layer, pair in learnt.items():
        for i, weight in enumerate(pair):
            found = adapter["weights"].pop(f"{layer}.parametrizations.weight.0.{i}.weight")
            different += ((weight - found).abs() > 1e-4).sum().item()
    assert not adapter["weights"]
    size = sum(weight.numel() for pair in learnt.values() for weight in pair)
    assert different < 0.01 * size  # where a gradient is nearly 0, its sign may be another


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
    assert new["step"] == old["step"]
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


def test_the_form_of_an_adapter(script):
    """Adapters that people have kept merge for ever: the names and the hash are written out."""
    save(script, "base.pt")
    model, before = load(script, "base.pt")
    halves = b"".join(weight.half().numpy().tobytes() for weight in before.values())
    adapter = {"sha256": hashlib.sha256(halves).hexdigest(), "rank": 3, "weights": {}}
    expected = dict(before)
    for layer in list_layers(model):
        weight = before[f"{layer}.weight"]
        a = torch.randn(3, weight[0].numel()).half()
        b = torch.randn(len(weight), 3).half()
        adapter["weights"][f"{layer}.parametrizations.weight.0.0.weight"] = a
        adapter["weights"][f"{layer}.parametrizations.weight.0.1.weight"] = b
        expected[f"{layer}.weight"] = weight + 8 / 3 * (b.float() @ a.float()).view_as(weight)
    torch.save(adapter, "old.lora.pt")
    adapt("--adapter", "old.lora.pt")
    _, after = load(script, "new.pt")
    torch.testing.assert_close(after, expected)


def test_another_number_of_classes(script):
    save(script, "base.pt")
    for path in Path("typed/train/9").iterdir():
        path.unlink()
    Path("typed/train/9").rmdir()
    if script is ddpm:  # it is told no class
        adapt()
    else:
        refused([], "--data-dir typed: 9 classes, and the model has 10")
        assert not Path("new.pt").exists()


def refused(flags, message):
    with pytest.raises(SystemExit) as end:
        adapt(*flags)
    assert message in end.value.code
    assert "\n" not in end.value.code


ERRORS = [
    ("--adapter other.lora.pt", "was learnt with the weights of another checkpoint"),
    ("--adapter other.pt", "other.pt is not an adapter"),
    ("--adapter none.pt", "none.pt is not an adapter"),
    ("--adapter nan.pt", "nan.pt is damaged, or of another network"),
    ("--adapter key.pt", "key.pt is damaged, or of another network"),
    ("--adapter text.pt", "text.pt is not an adapter"),
    ("--data-dir none", "--data-dir none: put images into none/train/<class>/"),
    ("--data-dir typed/train", "put images into typed/train/train/<class>/"),
    ("--data-dir empty", "--data-dir empty: put images into "),
    ("--rank 0", "--rank"),
    ("--rank x", "--rank"),
    ("--steps 0", "--steps"),
    ("--make-typed", "--make-typed base.pt: "),
    ("--steps 1 --out text.pt/x.pt", "cannot write text.pt/x"),
    ("--steps 1 --out typed", "cannot write typed: "),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS)
def test_errors_are_one_line(flags, message):
    save(ddim, "other.pt", seed=1)
    if "other" in flags:
        lora.main(["other.pt", "--rank=2", "--steps=1", "--out=other.new"])
        Path("other.new.lora.pt").rename("other.lora.pt")
    save(ddim, "base.pt")
    if "nan.pt" in flags or "key.pt" in flags:
        adapt("--steps", "1", "--out", "good.pt")
        adapter = torch.load("good.lora.pt", weights_only=True)
        (name, weight), *_ = adapter["weights"].items()
        torch.save({**adapter, "weights": {name + "s": weight}}, "key.pt")
        weight[0, 0] = math.nan
        torch.save(adapter, "nan.pt")
    before = Path("base.pt").read_bytes()
    Path("text.pt").write_text("no tensors")
    Path("empty/train/a").mkdir(parents=True)
    refused(flags.split(), message)
    assert Path("base.pt").read_bytes() == before
    assert not Path("new.pt").exists()


def test_out_into_new_folders():
    save(ddim, "base.pt")
    adapt("--out", "a/b/new.pt")
    assert sorted(path.name for path in Path("a/b").iterdir()) == ["new.lora.pt", "new.pt"]


OVERWRITES = [  # a checkpoint, and flags that name it, or the adapter, as a file to write
    "base.pt --out base.pt",
    "base.pt --out ./base.pt",
    "base.pt --out a/../base.pt",
    "base.pt --out link.pt",
    "base.pt --out hard.pt",
    "link.pt --out base.pt",
    "base.lora.pt --out base.pt",
    "base.lora.pt --out ./base",
    "base.pt --adapter typed.lora.pt --out ./typed.lora.pt",
    "base.pt --adapter a/../typed.lora.pt --out typed.lora.pt",
]


@pytest.mark.parametrize("line", OVERWRITES)
def test_nothing_that_is_read_is_overwritten(line):
    """It is refused before anything is read, so that these need not be checkpoints."""
    Path("a").mkdir()
    for name in ("base.pt", "base.lora.pt", "typed.lora.pt"):
        Path(name).write_text(name)
    Path("hard.pt").hardlink_to("base.pt")
    Path("link.pt").symlink_to("base.pt")
    with pytest.raises(SystemExit, match="would overwrite"):
        lora.main(line.split())


def test_beside_what_is_read():
    """With an adapter, none is written: its own name, less the .lora, is free."""
    save(ddim, "base.pt")
    adapt()
    Path("new.pt").unlink()
    adapter = Path("new.lora.pt").read_bytes()
    adapt("--adapter", "new.lora.pt", "--out", "new.pt")
    assert Path("new.pt").exists()
    assert Path("new.lora.pt").read_bytes() == adapter


@pytest.mark.parametrize("last", [1, 2])
def test_progress_and_loss(monkeypatch, capsys, last):
    """The last loss is that of the first step's images: 1 before the training."""
    numbers = iter([*range(1, 101), last])

    def loss(model, *_):
        return 0 * model.weight.sum() + next(numbers)

    script = Namespace(NAME="any", DATA="MNIST", SIZE=28, CHANNELS=1, T=1000, loss=loss)
    monkeypatch.setattr("common.time.monotonic", iter(range(0, 10**6, 3)).__next__)
    state = {"config": {"class_names": NAMES}}
    args = Namespace(data_dir="typed", steps=100)
    if last == 1:
        lora.train(script, nn.Linear(1, 1), None, state, args)
    else:
        with pytest.raises(SystemExit, match="nothing was learnt"):
            lora.train(script, nn.Linear(1, 1), None, state, args)
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 100 steps, 5 min left" in lines
    losses = [line for line in lines if " loss " in line]
    assert losses == ["step 50  loss 25.5000", "step 100  loss 75.5000"]


def test_typed():
    """Ten digits, ten of each, white on black; half are thick, and both lean from left to right."""
    lora.main(["--make-typed", "more"])
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
    is_bold = torch.arange(100) % 10 >= 5
    assert ((width > 2.6) == is_bold).all()
    slant = slant.view(20, 5)
    assert (slant.diff(dim=1) > 0.1).all()
    assert (slant[:, 0] < -0.1).all() and (slant[:, 4] > 0.1).all()
