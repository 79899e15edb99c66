"""A network learns to draw in few steps (Heek et al. 2024, 2403.06807).

    python extras/distill.py checkpoints/ddim_unet_mnist.pt --data-dir data --steps 2 --out fast.pt
    python ddim_unet_mnist.py --ckpt fast.pt --sampler ddim --steps 2 --guidance 1

With --steps 2, the times are cut into two parts. From any time, the student learns to reach the end
of its part in one step of DDIM. A small step of the teacher, and then a step of the student to the
end, show where that is: consistency distillation (Song et al. 2023, 2303.01469) in each part. The
teacher is guided, and the student learns that as well (Meng et al. 2022, 2210.03142). So draw with
the command that is printed: other steps, and guidance once more, do not fit the student.
"""

import argparse
import copy
import math
import os
import sys
from pathlib import Path

import torch
from tools import DEVICE, compare_classes, load

from common import Progress, batch, load_data


def guided(model, guidance, interval, T):
    """A model(x_t, t, y) like this one, but with guidance (2207.12598) at t / T in the interval."""

    def teacher(x_t, t, y):
        told = model(x_t, t, y)
        null = model(x_t, t)  # without the class or the prompt
        inside = (min(interval) <= t / T) & (t / T <= max(interval))
        weight = torch.where(inside, guidance, 1.0)[:, None, None, None]
        return null + weight * (told - null)

    return teacher


def find_goal(walk, leap, x_t, t, t_next, t_end, alpha_bar):
    """The x0 (B, C, H, W) with which one step of DDIM from t to t_end lands where two steps would.

    Of the two, one goes to t_next with x0 from walk(x_t, t), and one to t_end with x0 from
    leap(x_t, t). Times are int64 (B,), and alpha_bar (T + 1,) has the clean image's at index -1.

    With z = x_t / sqrt(1 - a) and k = sqrt(a / (1 - a)), a step of DDIM (2010.02502, eq. 12) is
    z_next = z + (k_next - k) x0. So what we look for is a weighted mean of the two x0.
    """
    k = (alpha_bar / (1 - alpha_bar)).sqrt().clamp(max=1e12)  # infinite for the clean image
    share = (k[t_next] - k[t]) / (k[t_end] - k[t])
    share = share[:, None, None, None]
    a = alpha_bar[t][:, None, None, None]
    a_next = alpha_bar[t_next][:, None, None, None]
    x0 = walk(x_t, t)
    eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    x_next = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    x0_next = leap(x_next, t_next.clamp(min=0))  # not used where t_next is -1
    return share * x0 + (1 - share) * x0_next


def train(script, teacher, alphas_cumprod, train_set, args):
    """A network that draws in args.steps steps of DDIM what the guided teacher draws in many."""
    T = len(alphas_cumprod)
    usual = script.make_parser().parse_args([])
    student = copy.deepcopy(teacher).train()
    interval = vars(usual).get("guidance_interval", (0, 1))
    teacher = guided(teacher, args.guidance, interval, T)
    alpha_bar = torch.cat([alphas_cumprod, alphas_cumprod.new_ones(1)])
    ends = [round(T * i / args.steps) - 1 for i in range(args.steps + 1)]  # as ddim_sample has them
    ends = torch.tensor(ends, device=alphas_cumprod.device)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=usual.dtype == "bfloat16")
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.99))
    progress = Progress(args.updates, "updates")
    losses = []
    for update in range(args.updates):
        x0, y, t, noise, u = batch(*train_set, T, args.batch_size, args.seed, update)
        if hasattr(script, "illustrate"):
            x0, y = script.illustrate(x0, y, u)  # colours and captions
        elif script.DATA == "CIFAR10":  # mirrored, as in its training
            x0 = torch.where(u[:, 1, None, None, None] < 0.5, x0.flip(-1), x0)
        # the teacher takes 8 steps to a part; after a third of the updates 16, and later 32
        stride = T // args.steps // 2 ** (3 + 3 * update // args.updates)
        t_end = ends[torch.bucketize(t, ends) - 1]  # the last of them that is below t
        t_next = (t - max(stride, 1)).maximum(t_end)
        a = alphas_cumprod[t][:, None, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        walk = script.denoiser(teacher, alphas_cumprod, y)
        leap = script.denoiser(student, alphas_cumprod, y)
        with autocast, torch.no_grad():
            goal = find_goal(walk, leap, x_t, t, t_next, t_end, alpha_bar)
        eps = (x_t - a.sqrt() * goal) / (1 - a).sqrt()  # makes this x_t of the goal
        with autocast:
            loss = script.loss(student, goal, y, t, eps, alphas_cumprod)
        loss.backward()
        optimizer.param_groups[0]["lr"] = args.lr * (1 - update / args.updates)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        progress.add(1)
        if (update + 1) % 50 == 0 or update + 1 == args.updates:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            print(f"update {update + 1}  loss {mean:.5f}", flush=True)
            if not math.isfinite(mean):
                sys.exit("loss not finite: try again with a lower --lr")
    return student


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("ckpt", help="the teacher: a checkpoint of any script but ddpm_unet_mnist.py")
    add("--data-dir", default="data", help="of the images it was trained on (%(default)s)")
    add("--out", default="fast.pt", help="the student, a checkpoint as well (%(default)s)")
    add("--steps", type=int, default=4, help="in which the student is to draw (%(default)s)")
    add("--guidance", type=float, default=3.0, help="of the teacher (%(default)s)")
    add("--updates", type=int, default=1000, help="of the student's weights (%(default)s)")
    add("--batch-size", type=int, default=32, help="images in an update (%(default)s)")
    add("--lr", type=float, default=3e-4, help="at first, then it falls to 0 (%(default)s)")
    add("--seed", type=int, default=0, help="of images and noise (%(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if min(args.steps, args.updates, args.batch_size) < 1 or args.steps > 500:
        sys.exit("--steps, --updates and --batch-size must be 1 at least, and --steps 500 at most")
    script, teacher, state, alphas_cumprod = load(args.ckpt)
    if script.NAME == "ddpm_unet_mnist":  # at T - 1, x0 has 20,000 times the error of the noise
        sys.exit(f"{args.ckpt}: in few steps, x0 cannot be learnt by a network that predicts noise")
    out = Path(args.out)
    if out.is_dir() or (out.exists() and out.samefile(args.ckpt)):
        sys.exit(f"--out {out} is a folder, or the teacher's file: name another")
    shape = (script.SIZE, script.CHANNELS)
    train_set, _, class_names = load_data(script.DATA, args.data_dir, *shape, DEVICE)
    compare_classes(state, class_names)
    known = len(state["config"]["class_names"])
    if len(class_names) != known:
        sys.exit(f"--data-dir {args.data_dir}: {len(class_names)} classes, the teacher has {known}")
    os.makedirs(out.parent, exist_ok=True)  # before the training, which is long
    student = train(script, teacher, alphas_cumprod, train_set, args)
    weights = student.state_dict()
    torch.save({"ema": weights, "step": state["step"], "config": state["config"]}, out)
    flags = f"--ckpt {out} --sampler ddim --steps {args.steps} --guidance 1"
    print(f"python {script.NAME}.py {flags}")


if __name__ == "__main__":
    main()
