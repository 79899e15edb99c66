"""CLIP score: how near, to CLIP's eye, are drawn images to what they were asked to be?

    python dit_cifar10.py --sample-only -n 1000 --out samples/
    python extras/clip_score.py samples/ --data-dir data

100 x the cosine of image and caption (Hessel et al. 2021, 2104.08718, without their factor 2.5 and
their cut at 0), by open_clip (pip install open_clip_torch). At 32 x 32 pixels it says little: look
at the gap to the captions of other classes, at how many images are nearest to their own, and at the
same for real images.
"""

import argparse
import logging
import sys

import torch
from tools import DEVICE, as_trained, read_folder
from torchvision.transforms.functional import to_pil_image

import ddim_unet_mnist
from common import Progress, load_data


def load_clip(name, weights):
    """A CLIP of open_clip's: (model, tokenizer, preprocess)."""
    try:
        import open_clip
    except ImportError as error:
        sys.exit(f"pip install open_clip_torch ({error})")
    logging.disable(logging.ERROR)  # its own lines, before the error that is shown below
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, weights)
        return model, open_clip.get_tokenizer(name), preprocess
    except Exception as error:  # of many kinds: no network, no such model, another kind of file
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"bring the weights of {name} in a file and say --weights FILE: {reason}")


@torch.no_grad()
def clip_scores(clip, images, labels, captions):
    """Of uint8 images (N, 3, H, W) and their classes (N,): how near they are to captions.

    Three numbers: 100 x cosine with their own caption, the same with the captions of other classes,
    and the share of images that are nearest to their own.
    """
    model, tokenizer, preprocess = clip
    text = model.encode_text(tokenizer(captions).to(DEVICE))
    text = text / text.norm(dim=1, keepdim=True)
    progress = Progress(len(images), "images seen by CLIP")
    cosines = []
    for part in images.split(64):
        pixels = torch.stack([preprocess(to_pil_image(image)) for image in part])
        seen = model.encode_image(pixels.to(DEVICE))
        seen = seen / seen.norm(dim=1, keepdim=True)
        cosines.append(seen @ text.T)
        progress.add(len(part))
    scores = 100 * torch.cat(cosines).cpu()  # (N, captions)
    own = scores.gather(1, labels[:, None])[:, 0]
    others = (scores.sum(dim=1) - own) / (len(captions) - 1)
    nearest = scores.argmax(dim=1) == labels
    return own.mean().item(), others.mean().item(), nearest.float().mean().item()


def main(argv=None, clip=None):
    """clip=(model, tokenizer, preprocess) takes the place of what --model names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("folder", help="of PNG files whose names end in their class: 000042-3.png")
    add("--data-dir", default="data", help="as for the scripts (%(default)s)")
    add("--caption", default="a photo of a {}", help="with {} for the class (%(default)s)")
    add("--model", default="ViT-B-32-quickgelu", help="of open_clip's (%(default)s)")
    add("--weights", default="openai", help="open_clip's name for them, or a file (%(default)s)")
    args = parser.parse_args(argv)

    images, labels = read_folder(args.folder)
    if labels is None:
        sys.exit(f"{args.folder}: the class is missing in a name, as 3 in 000042-3.png")
    size = images.shape[-1]
    name = "MNIST" if size <= 28 else "CIFAR10"
    train_set, test_set, class_names = load_data(name, args.data_dir, size, 3)
    if labels.max() >= len(class_names):
        known = f"{args.data_dir} has {len(class_names)} classes"
        sys.exit(f"{args.folder} has class {labels.max()}, and {known}")
    model, tokenizer, preprocess = clip or load_clip(args.model, args.weights)
    clip = (model.to(DEVICE).eval(), tokenizer, preprocess)
    words = [name.split(" - ")[-1] for name in class_names]  # MNIST's are "7 - seven"
    captions = [args.caption.replace("{}", word) for word in words]
    if len(tokenizer(captions).unique(dim=0)) < len(captions):
        sys.exit(f"--caption {args.caption!r} is the same for two classes: put {{}} for the class")
    real_images, real_labels = test_set or train_set
    if size == 28 and (images != images[:, :1]).any():
        real_images, _ = as_trained(ddim_unet_mnist, real_images, real_labels)
    torch.manual_seed(0)
    chosen = torch.randperm(len(real_images))[: len(images)]
    real = clip_scores(clip, real_images[chosen], real_labels[chosen], captions)
    drawn = clip_scores(clip, images, labels, captions)
    print(f"{len(images)} images, {args.model} {args.weights}, captions like {captions[0]!r}")
    for name, (own, others, nearest) in (("drawn", drawn), ("real", real)):
        print(f"{name}: {own:.2f} own caption, {others:.2f} others, {nearest:.1%} nearest to own")
    return drawn, real


if __name__ == "__main__":
    main()
