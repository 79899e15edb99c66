"""A network learns to draw in few steps: progressive distillation (2202.00512).

    python extras/distill.py checkpoints/ddim_unet_mnist.pt --teacher-steps 4 --steps 1
    python ddim_unet_mnist.py --ckpt fast.pt --sampler ddim --steps 1 --guidance 1

A student learns to reach in one step of DDIM what its teacher reaches in two (Salimans and Ho
2022). Then it is the teacher of the next, and so the steps are halved: 4, 2, 1. The first teacher
is guided, and the student learns that as well (Meng et al. 2022, 2210.03142). So draw with the
command that is printed: other steps, and guidance once more, do not fit the student.

No student is better than its teacher, and each adds a little error: begin with the fewest steps of
DDIM in which the network draws well. (classify.py and prompts.py tell.)
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from tools import DEVICE, compare_classes, load

from common import Progress, batch, load_data


def guided(model, guidance, interval, T):
    """A model(x_t, t, y) like this one, but with guidance (2207.12598) at t / T in the interval."""
    low, high = interval

    def teacher(x_t, t, y):
        told = model(x_t, t, y)
        null = model(x_t, t)  # without the class or the prompt
        inside = (low <= t / T) & (t / T <= high)
        weight = torch.where(inside, guidance, 1.0)[:, None, None, None]
        return null + weight * (told - null)

    return teacher


def find_goal(denoise, x_t, t, t_next, t_end, alpha_bar):
    """The x0 (B, C, H, W) with which one step of DDIM from t lands at t_end where two steps would.

    The two go from x_t at t to t_next and from there to t_end, with x0 from denoise(x_t, t). Times
    are int64 (B,), and alpha_bar (T + 1,) has the clean image's at index -1.

    With z = x_t / sqrt(1 - a) and k = sqrt(a / (1 - a)), a step of DDIM (2010.02502, eq. 12) is
    z_next = z + (k_next - k) x0. So what we look for is a weighted mean of the two x0.
    """
    k = (alpha_bar / (1 - alpha_bar)).sqrt()  # infinite for the clean image
    share = (k[t_next] - k[t]) / (k[t_end] - k[t])
    share = share[:, None, None, None]
    a = alpha_bar[t][:, None, None, None]
    a_next = alpha_bar[t_next][:, None, None, None]
    x0 = denoise(x_t, t)
    eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    x_next = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    return share * x0 + (1 - share) * denoise(x_next, t_next)


def halve(script, student, teacher, steps, alphas_cumprod, train_set, args):
    """The student learns to draw in these steps of DDIM what the teacher draws in twice as many."""
    T = len(alphas_cumprod)
    usual = script.make_parser().parse_args([])
    alpha_bar = torch.cat([alphas_cumprod, alphas_cumprod.new_ones(1)])
    times = [round(T * i / (2 * steps)) - 1 for i in range(2 * steps + 1)]  # as ddim_sample's
    times = torch.tensor(times, device=alphas_cumprod.device)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=usual.dtype == "bfloat16")
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.99))
    progress = Progress(args.updates, f"updates to {steps} steps")
    losses = []
    for update in range(args.updates):
        x0, y, t, noise, u = batch(*train_set, T, args.batch_size, args.seed + steps, update)
        if hasattr(script, "illustrate"):
            x0, y = script.illustrate(x0, y, u)  # colours and captions
        elif script.DATA == "CIFAR10":  # mirrored, as in its training
            x0 = torch.where(u[:, 1, None, None, None] < 0.5, x0.flip(-1), x0)
        i = 2 * (t * steps // T)  # one of the student's steps, from times[i + 2] to times[i]
        t_end, t_next, t = times[i], times[i + 1], times[i + 2]
        a = alphas_cumprod[t][:, None, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        denoise = script.denoiser(teacher, alphas_cumprod, y)
        with autocast, torch.no_grad():
            goal = find_goal(denoise, x_t, t, t_next, t_end, alpha_bar)
        eps = (x_t - a.sqrt() * goal) / (1 - a).sqrt()  # with the goal, it makes the same x_t
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
            print(f"{steps} steps: update {update + 1}  loss {mean:.5f}", flush=True)
            if not math.isfinite(mean):
                sys.exit("loss not finite: try again with a lower --lr")


def train(script, model, alphas_cumprod, train_set, args):
    """A copy of the model that draws in args.steps steps of DDIM, and has learnt the guidance."""
    usual = script.make_parser().parse_args([])
    interval = vars(usual).get("guidance_interval", (0, 1))
    student = copy.deepcopy(model)
    teacher = guided(model, args.guidance, interval, len(alphas_cumprod))
    steps = args.teacher_steps
    while steps > args.steps:
        steps //= 2
        halve(script, student, teacher, steps, alphas_cumprod, train_set, args)
        teacher = copy.deepcopy(student)
    return student


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sys.exit
    add = parser.add_argument
    add("ckpt", help="the teacher: a checkpoint of any script but ddpm_unet_mnist.py")
    add("--data-dir", default="data", help="of the images it was trained on (%(default)s)")
    add("--out", default="fast.pt", help="the student, a checkpoint as well (%(default)s)")
    add("--steps", type=int, default=4, help="of the student (%(default)s)")
    add("--teacher-steps", type=int, default=32, help="of the first teacher (%(default)s)")
    add("--guidance", type=float, default=3.0, help="of the first teacher (%(default)s)")
    add("--updates", type=int, default=600, help="of the weights, in each halving (%(default)s)")
    add("--batch-size", type=int, default=32, help="images in an update (%(default)s)")
    add("--lr", type=float, default=3e-4, help="at first; falls to 0 in each halving (%(default)s)")
    add("--seed", type=int, default=0, help="of images and noise (%(default)s)")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if min(args.steps, args.updates, args.batch_size) < 1:
        sys.exit("--steps, --updates and --batch-size must be 1 at least")
    doubled = [args.steps * 2**k for k in range(1, 10)]
    if args.teacher_steps not in doubled or args.teacher_steps > 1000:
        sys.exit("--teacher-steps must be 2, 4, 8 .. times --steps, and 1000 at most")
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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the training, which is long
    except OSError as error:
        sys.exit(f"--out: cannot write {out}: {error}")
    student = train(script, teacher, alphas_cumprod, train_set, args)
    content = {"ema": student.state_dict(), "step": state["step"], "config": state["config"]}
    torch.save(content, out)  # under the name of an average, from which the scripts draw
    flags = f"--ckpt {out} --sampler ddim --steps {args.steps} --guidance 1"
    print(f"python {script.NAME}.py {flags}")


if __name__ == "__main__":
    main()
