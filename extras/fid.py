"""FID, KID and Inception score of drawn images against the training set, as papers measure them.

    python extras/fid.py samples/ --data-dir data  # a folder of PNG files
    python extras/fid.py checkpoints/dit_cifar10.pt -n 50000 -- --guidance 1 --sampler ddpm

From a checkpoint, its script draws on all GPUs, with the flags that follow --. The features are of
TensorFlow's Inception, by torch-fidelity (pip install torch-fidelity); of digits, it knows little.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
FLAGS = ("sampler", "steps", "eta", "guidance", "guidance_interval", "classes", "prompt", "seed")


def fail(message):
    """For what the user can put right: one line and exit code 2, no traceback."""
    print(f"fid.py: {' '.join(str(message).split())[:300]}", file=sys.stderr)
    sys.exit(2)


def find_inception(path):
    """torch-fidelity, after a look whether its weights are there or can be fetched."""
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        fail(f"pip install torch-fidelity ({error})")
    try:
        if path:  # torch-fidelity would run code that is in it
            torch.load(path, map_location="cpu", weights_only=True)
        else:
            with redirect_stderr(sys.stdout):  # an error is one line
                torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu")
    except Exception as error:  # of many kinds: no network, no file, another kind of file
        fail(f"fetch {URL_INCEPTION_V3} and name it with --weights: {error}")
    return torch_fidelity


def read_folder(folder):
    """uint8 (N, 3, H, W) of the PNG files in a folder."""
    from common import read_image

    files = sorted(Path(folder).glob("*.png"))
    if len(files) < 10:
        fail(f"{folder} holds {len(files)} PNG files, too few")
    try:
        with Image.open(files[0]) as image:
            size = image.width
        return torch.stack([read_image(path, size, 3) for path in files])
    except (OSError, ValueError) as error:
        fail(error)


def read_training_set(name, data_dir, size):
    from common import load_data

    try:
        return load_data(name, data_dir, size, 3)[0][0]
    except (OSError, ValueError) as error:
        fail(f"--data-dir {data_dir}: {error}")


def draw(script, args, flags):
    """args.n images by the script that made the checkpoint, on every GPU."""
    command, gpus = [sys.executable], torch.cuda.device_count()
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command += [script.__file__, "--sample-only", "--ckpt", args.what, "-n", str(args.n), *flags]
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run([*command, "--out", f"{folder}/"]).returncode:
            sys.exit(2)  # the script has said why
        return read_folder(folder)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("what", help="folder of PNG files, or checkpoint [-- flags for its script]")
    parser.add_argument("--data-dir", default="data", help="as for the scripts (%(default)s)")
    parser.add_argument("-n", type=int, default=50000, help="images to draw (%(default)s)")
    parser.add_argument("--weights", help="Inception's, in a file, where they cannot be fetched")
    args = parser.parse_args(argv[:end])
    fidelity = find_inception(args.weights)
    if Path(args.what).is_dir():
        how = ["drawn before: its sampler, steps, guidance and seed are yours to tell"]
        images = read_folder(args.what)
        gray = (images == images[:, :1]).all()
        real = read_training_set("MNIST" if gray else "CIFAR10", args.data_dir, images.shape[-1])
    else:
        try:
            state = torch.load(args.what, map_location="cpu", weights_only=True)
            script = importlib.import_module(state["config"]["script"])
            typed = vars(script.make_parser().parse_args(argv[end + 1 :]))
        except Exception as error:  # of many kinds, for a file can be damaged in many ways
            fail(f"{args.what} is no folder and cannot be loaded as a checkpoint: {error}")
        how = [f"{script.NAME}, step {state['step']}, averaged weights (EMA)"]
        how += [f"{flag} {typed[flag]}" for flag in FLAGS if flag in typed]
        real = read_training_set(script.DATA, args.data_dir, script.SIZE)
        images = draw(script, args, argv[end + 1 :])
    size = min(1000, len(images), len(real))
    metrics = {"fid": True, "isc": True, "kid": True, "kid_subset_size": size}
    machine = {"cuda": torch.cuda.is_available(), "save_cpu_ram": True}  # and no workers
    files = {"feature_extractor_weights_path": args.weights, "cache": False, "verbose": False}
    drawn, real = Subset(images, range(len(images))), Subset(real, range(len(real)))
    scores = fidelity.calculate_metrics(input1=drawn, input2=real, **metrics, **machine, **files)
    print(f"{len(images)} images against {len(real)} for training; {', '.join(how)}")
    if len(images) < 50000:
        print("papers draw 50000: with fewer, FID is higher")
    print(f"frechet_inception_distance {scores['frechet_inception_distance']:.4f}")
    for key in ("kernel_inception_distance", "inception_score"):
        print(f"{key} {scores[key + '_mean']:.5f} ± {scores[key + '_std']:.5f}")
    return scores


if __name__ == "__main__":
    main()
