"""An image goes in: fill a hole, scale up, give a photo its colours, take noise out, or vary it.

    python extras/restore.py inpaint photo.png --mask 12 8 30 28 --class ship  # or a mask's file
    python extras/restore.py upscale small.png --class ship
    python extras/restore.py colour grey.png --class ship -n 8
    python extras/restore.py denoise noisy.png --noise 25
    python extras/restore.py vary photo.png --class cat --strength 0.6

It needs no training. The samplers ask denoise(x_t, t) for the clean image, and what is known of it
is written into the answer each time (Wang et al. 2022, 2212.00490). `denoise` starts midway, from
the image, because samplers pass such noisy images; `vary` adds the noise itself, as SDEdit does
(Meng et al. 2021, 2108.01073).
"""

import argparse
import os
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from tools import DEVICE, HOME, as_trained, compare_classes, load

from common import Progress, load_data, noises, read_image
from dit_cifar10 import ddim_sample

SHIPPED = str(HOME / "checkpoints" / "dit_cifar10.pt")

# ---- The method: damage(x) is what is known of an image x; repair(known) is one image that fits it


def inpainting(mask):
    """Known are the pixels where the mask (1, 1, H, W) is 1."""

    def keep(x):
        return mask * x

    return keep, keep


def upscaling(scale):
    """Known is the mean of each square of scale x scale pixels."""

    def damage(x):
        return F.avg_pool2d(x, scale)

    def repair(known):
        return known.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)

    return damage, repair


def colouring():
    """Known is the mean of the channels."""

    def damage(x):
        return x.mean(dim=1, keepdim=True)

    def repair(known):
        return known.expand(-1, 3, -1, -1)

    return damage, repair


def fit(x, known, damage, repair):
    """The image nearest to x (B, C, H, W) of which this is known (2212.00490, eq. 13)."""
    return repair(known) + x - repair(damage(x))


def restore(denoise, x, alphas_cumprod, known, damage, repair, **options):
    """Images (B, C, H, W) in [-1, 1] from noise x, of which this is known.

    denoise(x_t, t) gives x0, as for the samplers; options are those of ddim_sample.
    """

    def fitted(x_t, t):
        return fit(denoise(x_t, t), known, damage, repair)

    images = ddim_sample(fitted, x, alphas_cumprod, **options)
    for _ in range(100):  # in turn, until it is in [-1, 1] and fits what is known
        images = fit(images.clamp(-1, 1), known, damage, repair)
    return images.clamp(-1, 1)


def remove_noise(denoise, images, alphas_cumprod, std, **options):
    """Images (B, C, H, W) with Gaussian noise of this standard deviation -> clean ones.

    x_t / sqrt(a) is an image with noise of sqrt((1 - a) / a). At the t where that is std, sqrt(a)
    times these images is an x_t.
    """
    stds = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    t = int((stds - std).abs().argmin())
    return go_on(denoise, alphas_cumprod[t].sqrt() * images, t, alphas_cumprod, **options)


def vary(denoise, noise, alphas_cumprod, images, strength, **options):
    """Images (B, C, H, W) that begin as these images with noise of time strength * T."""
    t = max(1, round(strength * len(alphas_cumprod))) - 1
    a = alphas_cumprod[t]
    x_t = a.sqrt() * images + (1 - a).sqrt() * noise
    return go_on(denoise, x_t, t, alphas_cumprod, **options)


def go_on(denoise, x_t, t, alphas_cumprod, steps, **options):
    """From x_t (B, C, H, W) to images, in no more steps than there are times left."""
    return ddim_sample(denoise, x_t, alphas_cumprod[: t + 1], min(steps, t + 1), **options)


# ---- The command line


def read(path, size, channels):
    """An image file as (1, channels, size, size) in [-1, 1], on DEVICE."""
    try:
        return read_image(path, size, channels)[None].to(DEVICE) / 127.5 - 1
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def read_mask(words, size):
    """(1, 1, size, size), 0 in the hole: from a file that is white there, or from a box."""
    if len(words) == 1:
        return (read(words[0], size, 1) < 0).float()
    try:
        left, top, right, bottom = [int(word) for word in words]
    except ValueError:
        sys.exit("--mask takes a file, or four numbers: left top right bottom")
    if not 0 <= left < right <= size or not 0 <= top < bottom <= size:
        sys.exit(f"--mask {' '.join(words)}: a hole has left < right and top < bottom in 0..{size}")
    mask = torch.ones(1, 1, size, size, device=DEVICE)
    mask[:, :, top:bottom, left:right] = 0
    return mask


def find_damage(script, args):
    """The functions damage and repair of the task; those of `denoise` and `vary` change nothing."""
    if args.task == "inpaint":
        return inpainting(read_mask(args.mask, script.SIZE))
    if args.task == "upscale":
        if script.SIZE % args.scale:
            sys.exit(f"--scale {args.scale} must divide {script.SIZE}")
        return upscaling(args.scale)
    if args.task == "colour":
        if script.CHANNELS == 1:
            sys.exit(f"colour: {args.ckpt} draws in grey")
        return colouring()
    return torch.clone, torch.clone


def find_y(script, state, args):
    """What --class or --prompt says, as the network takes it, (1,) or (1, LENGTH), or None."""
    names = state["config"]["class_names"]
    if args.class_name is not None:
        if script.NAME not in ("dit_cifar10", "uvit_cifar10"):
            sys.exit(f"--class: {args.ckpt} knows no classes")
        words = [*names, *map(str, range(len(names)))]
        if args.class_name not in words:
            sys.exit(f"--class {args.class_name}: there are {dict(enumerate(names))}")
        return torch.tensor([words.index(args.class_name) % len(names)], device=DEVICE)
    if args.prompt is not None:
        if script.NAME != "ddim_unet_mnist":
            sys.exit(f"--prompt: {args.ckpt} takes no prompt")
        try:
            return torch.tensor([script.tokenize(args.prompt)], device=DEVICE)
        except ValueError as error:
            sys.exit(f"--prompt: {error}")
    return None


@torch.no_grad()
def answer(script, model, alphas_cumprod, args, known, y):
    """An image (N, C, H, W) for each of known (N, ..), by a network that is told y (N, ..) or None.

    Image i depends on --seed, i, known[i] and y[i] alone.
    """
    damage, repair = find_damage(script, args)
    usual = script.make_parser().parse_args([])
    guidance = {} if y is None else {"guidance": args.guidance}
    if guidance and "guidance_interval" in usual:
        guidance["interval"] = usual.guidance_interval
    progress = Progress(len(known), "images")

    def draw(part):
        denoise = script.denoiser(model, alphas_cumprod, None if y is None else y[part], **guidance)
        shape = (script.CHANNELS, script.SIZE, script.SIZE)
        noise_stream = noises(args.seed, part.tolist(), shape, DEVICE)

        def watched(x_t, t):
            progress.add(len(x_t) / args.steps)
            return denoise(x_t, t)

        def randn(x):
            return next(noise_stream)

        images = known[part]
        noise = next(noise_stream)  # not for denoise: its test images have this noise already
        options = {"steps": args.steps, "eta": args.eta, "randn": randn}
        if args.task == "denoise":
            return remove_noise(watched, images, alphas_cumprod, args.noise / 127.5, **options)
        if args.task == "vary":
            return vary(watched, noise, alphas_cumprod, images, args.strength, **options)
        return restore(watched, noise, alphas_cumprod, images, damage, repair, **options)

    parts = torch.arange(len(known)).split(usual.micro_batch)
    with torch.autocast(DEVICE, torch.bfloat16, usual.dtype == "bfloat16"):
        return torch.cat([draw(part) for part in parts])


def try_on_test_set(script, model, state, alphas_cumprod, args):
    """Damage the first test images of each class, restore them, compare, and write all three."""
    if args.task == "vary" or not args.out.endswith("/"):
        sys.exit("without an image, test images are restored into a folder, --out x/")
    shape = (script.SIZE, script.CHANNELS)
    _, test_set, class_names = load_data(script.DATA, args.data_dir, *shape)
    compare_classes(state, class_names)
    if not test_set:
        sys.exit(f"--data-dir {args.data_dir}: there is no test set")
    images, labels = test_set
    each = -(-args.n // len(class_names))
    chosen = [torch.where(labels == k)[0][:each] for k in range(len(class_names))]
    chosen = torch.cat(chosen)[: args.n]
    labels = labels[chosen]
    images, y = as_trained(script, images[chosen], labels)
    whole = images.to(DEVICE) / 127.5 - 1
    damage, repair = find_damage(script, args)
    known = damage(whole)
    if args.task == "denoise":  # with the noise that answer() leaves out
        noise = next(noises(args.seed, range(len(whole)), whole.shape[1:], DEVICE))
        known = whole + args.noise / 127.5 * noise
    is_told = script.NAME != "ddpm_unet_mnist" and not args.unconditional
    told = y.to(DEVICE) if is_told else None
    restored = answer(script, model, alphas_cumprod, args, known, told)
    for name, found in (("whole", whole), ("damaged", repair(known)), ("restored", restored)):
        errors = (found - whole).square().mean(dim=(1, 2, 3)) / 4  # of a range of 1
        psnr = -10 * errors.clamp(min=1e-10).log10()
        if name != "whole":
            print(f"{name}: PSNR {psnr.mean():.2f} dB, the mean of {len(psnr)} images")
        os.makedirs(f"{args.out}{name}", exist_ok=True)
        for i, image in enumerate(found):
            script.picture(image[None]).save(f"{args.out}{name}/{i:06d}-{labels[i]}.png")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("task", choices=["inpaint", "upscale", "colour", "denoise", "vary"])
    add("image", nargs="?", help="a file (for denoise, of the network's size); else n test images")
    add("--mask", nargs="+", help="a file, white in the hole, or left top right bottom, in pixels")
    add("--scale", type=int, default=4, help="upscale by so much (%(default)s)")
    add("--noise", type=float, default=25.0, help="its standard deviation, of 255 (%(default)s)")
    add("--strength", type=float, default=0.6, help="vary from this t / T (%(default)s)")
    add("--ckpt", default=SHIPPED, help="of any of the scripts (%(default)s)")
    add("--class", dest="class_name", help="what it shows, by name or number")
    add("--prompt", help="what it shows, for ddim_unet_mnist.py")
    add("-n", type=int, default=4, help="different answers (%(default)s)")
    add("--steps", type=int, default=40, help="of DDIM (%(default)s)")
    add("--eta", type=float, default=0.85, help="of DDIM: 1 adds most noise, 0 none (%(default)s)")
    add("--guidance", type=float, default=2.0, help="1 is none (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--out", default="restored.png", help="x.png: what is known, and answers; x/: a file each")
    add("--data-dir", default="data", help="of the test images (%(default)s)")
    add("--unconditional", action="store_true", help="do not tell what test images show")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if (args.task == "inpaint") != (args.mask is not None):
        sys.exit("inpaint wants a --mask, and nothing else does")
    if not args.out.endswith((".png", "/")):
        sys.exit(f"--out {args.out} must end in .png or /")
    if min(args.n, args.steps, args.scale) < 1 or args.steps > 1000:
        sys.exit("-n, --steps and --scale must be 1 at least, and --steps 1000 at most")
    if not 0 < args.strength <= 1 or not 0 <= args.eta <= 1 or not args.noise > 0:
        sys.exit("--strength must be above 0 and 1 at most, --eta from 0 to 1, --noise above 0")
    script, model, state, alphas_cumprod = load(args.ckpt)
    y = find_y(script, state, args)
    if args.image is None:
        try_on_test_set(script, model, state, alphas_cumprod, args)
        return

    damage, repair = find_damage(script, args)
    if args.task == "upscale":
        known = read(args.image, script.SIZE // args.scale, script.CHANNELS)
    else:
        known = damage(read(args.image, script.SIZE, script.CHANNELS))
    if args.task == "denoise":
        with Image.open(args.image) as image:
            size = image.size
        if size != (script.SIZE, script.SIZE):  # scaling an image takes noise out of it
            sys.exit(f"denoise: {args.image} is not of {script.SIZE} x {script.SIZE} pixels")
    copies = [0] * args.n
    y = None if y is None else y[copies]
    images = answer(script, model, alphas_cumprod, args, known[copies], y)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.out.endswith("/"):
        for i, image in enumerate(images):
            script.picture(image[None]).save(f"{args.out}{i:06d}.png")
    else:
        script.picture(torch.cat([repair(known), images])).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
