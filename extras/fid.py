"""FID, KID and Inception score of drawn images against the training set, as papers measure them.

    python extras/fid.py samples/ --data-dir data  # a folder of PNG files
    python extras/fid.py checkpoints/dit_cifar10.pt -n 50000 -- --guidance 1 --sampler ddpm

From a checkpoint, its script draws on all GPUs, with the flags that follow --. The features are of
TensorFlow's Inception, by torch-fidelity (pip install torch-fidelity); of digits, it knows little.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from tools import as_trained, compare_classes, load, read_folder
from torch.utils.data import Dataset

import ddim_unet_mnist
from common import Progress, load_data

FLAGS = ("sampler", "steps", "guidance", "guidance_interval", "classes", "prompt", "seed")


def find_inception(path):
    """torch-fidelity, after a look whether its weights are there or can be fetched."""
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        sys.exit(f"pip install torch-fidelity ({error})")
    try:
        if path:  # torch-fidelity would run code that is in it
            torch.load(path, map_location="cpu", weights_only=True)
        else:
            with redirect_stderr(sys.stdout):  # so that the error is one line
                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu")
    except Exception as error:  # of many kinds: no network, no file, another kind of file
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"fetch {URL_INCEPTION_V3} and name it with --weights: {reason}")
    return torch_fidelity


def read(folder):
    images, _ = read_folder(folder)
    if len(images) < 10:
        sys.exit(f"{folder} holds {len(images)} PNG files, too few")
    return images


def draw(script, args, flags):
    """args.n images, uint8 (n, 3, S, S), by the script of the checkpoint, on every GPU."""
    command = [sys.executable]
    gpus = torch.cuda.device_count()
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command += [script.__file__, "--sample-only", "--ckpt", args.what, "-n", str(args.n), *flags]
    with tempfile.TemporaryDirectory() as folder:
        drawing = subprocess.run([*command, "--out", f"{folder}/"])
        if drawing.returncode != 0:
            sys.exit(1)  # the script has said why
        return read(folder)


class Images(Dataset):
    """The images (N, 3, S, S) as torch-fidelity takes them, one after the other."""

    def __init__(self, images, progress):
        self.images = images
        self.progress = progress
        self.taken = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.progress.add(i + 1 - self.taken)  # it takes the first one twice
        self.taken = i + 1
        return self.images[i]


def score(fidelity, images, real, weights):
    """torch-fidelity's dict of scores of images against the real ones, both uint8 (N, 3, S, S)."""
    progress = Progress(len(images) + len(real), "images seen by Inception")
    return fidelity.calculate_metrics(
        input1=Images(images, progress),
        input2=Images(real, progress),
        fid=True,
        isc=True,
        kid=True,
        kid_subset_size=min(1000, len(images), len(real)),
        cuda=torch.cuda.is_available(),
        save_cpu_ram=True,  # no workers
        feature_extractor_weights_path=weights,
        cache=False,
        verbose=False,
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    flags = argv[end + 1 :]  # those of the script
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("what", help="folder of PNG files, or checkpoint [-- flags for its script]")
    add("--data-dir", default="data", help="as for the scripts (%(default)s)")
    add("-n", type=int, default=50000, help="images to draw (%(default)s)")
    add("--weights", help="Inception's, in a file, where they cannot be fetched")
    args = parser.parse_args(argv[:end])
    fidelity = find_inception(args.weights)
    if Path(args.what).is_dir():
        source = "drawn before: its sampler, steps, guidance and seed are yours to tell"
        images = read(args.what)
        is_grey = (images == images[:, :1]).all()
        size = images.shape[-1]
        name = "MNIST" if is_grey or size == 28 else "CIFAR10"
        train_set, _, _ = load_data(name, args.data_dir, size, 3)
        if size == 28 and not is_grey:
            train_set = as_trained(ddim_unet_mnist, *train_set)
    else:
        script, _, state, _ = load(args.what)
        typed = vars(script.make_parser().parse_args(flags))
        source = f"{script.NAME}, step {state['step']}, averaged weights (EMA)"
        for flag in FLAGS:
            if flag in typed:
                source += f", {flag} {typed[flag]}"
        # Before the drawing, which may take hours, because the data may not be there.
        train_set, _, class_names = load_data(script.DATA, args.data_dir, script.SIZE, 3)
        compare_classes(state, class_names)
        train_set = as_trained(script, *train_set)
        images = draw(script, args, flags)
    real, _ = train_set
    scores = score(fidelity, images, real, args.weights)
    print(f"{len(images)} images against {len(real)} for training; {source}")
    if len(images) < 50000:
        print("papers draw 50000: with fewer, FID is higher")
    print(f"frechet_inception_distance {scores['frechet_inception_distance']:.4f}")
    for name in ("kernel_inception_distance", "inception_score"):
        print(f"{name} {scores[name + '_mean']:.5f} ± {scores[name + '_std']:.5f}")
    return scores


if __name__ == "__main__":
    main()
