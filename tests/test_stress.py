"""What takes too long for every run, or needs root: python -m pytest -q -s tests/test_stress.py

Two machines (network namespaces) train and draw together; training is killed a hundred times;
torchrun restarts; disks fill up; memory does not grow. A quarter of an hour.
"""

import gc
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from test_smoke import (
    CPU,
    ROOT,
    SHAPE,
    TINY,
    assert_same,
    dit,
    interrupted,
    load,
    new_folder,  # noqa: F401 (pytest finds this fixture by its name)
    pixels,
    refused,
    run_script,
    start,
    train,
)

KILLS = 100
FLAGS = f"{dit.__file__} {CPU}{TINY}{SHAPE[dit]}"
TORCHRUN = "-m torch.distributed.run "


def run(command, check=True):
    return subprocess.run(shlex.split(command), check=check, capture_output=True)


def steps_in(line):
    """The n of "step n  images ..", what a process prints where it logs; else 0."""
    match = re.match(r"step (\d+)  images ", line)
    return int(match[1]) if match else 0


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ---- Two machines


@pytest.fixture
def machines():
    """Commands that run something on either of two hosts, 10.77.0.1 and 10.77.0.2."""
    names = ["diffusion-one", "diffusion-two"]

    def remove():
        for name in names:
            run(f"ip netns del {name}", check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)

    try:
        remove()  # what a run that was killed may have left
        for name in names:
            run(f"ip netns add {name}")
            Path("/etc/netns", name).mkdir(parents=True)  # what they find in their /etc
            Path("/etc/netns", name, "hosts").write_text("10.77.0.1 one\n10.77.0.2 two\n")
        cable = f"cable1 netns {names[0]} type veth peer name cable2 netns {names[1]}"
        run(f"ip link add {cable}")
        for number, name in enumerate(names, start=1):
            run(f"ip -n {name} addr add 10.77.0.{number}/24 dev cable{number}")
            run(f"ip -n {name} link set cable{number} up")
            run(f"ip -n {name} link set lo up")
        yield [f"ip netns exec {name}" for name in names]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made: {getattr(error, 'stderr', error)}")
    finally:
        remove()


@pytest.fixture
def folders():
    """Where each machine is, so that one sees who writes what."""
    there = [Path("disk1").resolve(), Path("disk2").resolve()]
    for folder in there:
        folder.mkdir()
        (folder / "data").symlink_to(Path("data").resolve())
    return there


def on_both(machines, folders, processes, command):
    """What the command prints on each machine, under torchrun."""
    rendezvous = "--rdzv-backend=c10d --rdzv-endpoint=one:29500"
    running = []
    for number, (host, folder) in enumerate(zip(machines, folders, strict=True), start=1):
        # their host names are equal, so torchrun must be told who they are
        here = f"--rdzv-conf=is_host={2 - number} --local-addr=10.77.0.{number}"
        launch = f"{host} {sys.executable} {TORCHRUN} --nnodes=2 --nproc-per-node={processes}"
        ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            shlex.split(f"{launch} {rendezvous} {here} {command}"),
            env=os.environ | ours | {"GLOO_SOCKET_IFNAME": f"cable{number}"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
    try:
        ended = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ended
    return [out for out, _ in ended]


def test_two_machines_train_and_draw(machines, folders):
    train(dit, "one", 6)
    outputs = on_both(machines, folders, 1, FLAGS + "--run-dir two --max-steps 6")
    written = [names_in(folder / "two") for folder in folders]  # rank 0 may be either of them
    assert ["lock1"] in written
    assert ["ckpt.pt", "lock0", "log.csv", "samples-0000006.png"] in written
    writer = folders[written.index(["lock1"]) - 1]
    one, _ = load("one")
    two, _ = load(writer / "two")
    assert_same(one, two, tolerance=1e-5)
    one = pixels("one/samples-0000006.png")
    two = pixels(writer / "two" / "samples-0000006.png")
    assert (one - two).abs().max() <= 1
    assert "".join(outputs).count("M parameters") == 1  # one of them speaks
    checkpoint = Path("one/ckpt.pt").resolve()
    draw = f"{dit.__file__} {CPU} --ckpt {checkpoint} -n 20 --out drawn/"
    on_both(machines, folders, 2, draw)
    first, second = [names_in(folder / "drawn") for folder in folders]
    assert len(first) == len(second) == 10
    assert sorted(first + second) == [f"{i:06d}-{i % 8}.png" for i in range(20)]


FETCH = """
import os, time, torch, torch.distributed as dist, torchvision, common
class MNIST:
    def __init__(self, root, **options):
        if options.get("download"):
            time.sleep(2)
            open("fetched", "a").write(os.environ["RANK"])
        assert os.path.exists("fetched")
        self.data = torch.zeros(3, 28, 28, dtype=torch.uint8)
        self.targets = torch.zeros(3).long()
        self.classes = []
torchvision.datasets.MNIST = MNIST
dist.init_process_group("gloo")
common.load_data("MNIST", "new", 28, 1)
dist.destroy_process_group()
"""


def test_each_machine_fetches_once(machines, folders):
    script = Path("fetch.py").resolve()
    script.write_text(FETCH)
    on_both(machines, folders, 2, script)
    assert sorted((folder / "fetched").read_text() for folder in folders) == ["0", "2"]


def test_one_process_fetches_and_the_other_waits():
    Path("fetch.py").write_text(FETCH)
    process = start(TORCHRUN + "--standalone --nproc_per_node=2 fetch.py")
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert Path("fetched").read_text() == "0"


# ---- Kills


def workers(torchrun):
    """The ids of the processes that torchrun started (Linux)."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def test_torchrun_restarts(monkeypatch):
    """One of two workers is killed, twice. torchrun starts both anew, and with --resume they go on
    from the last checkpoint, to the weights of an undisturbed run."""
    # else the new workers may call on the dead ones
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with interrupted(dit, 10):
        train(dit, "killed", 300, "--save-every 10")
    shutil.copytree("killed", "whole")
    command = TORCHRUN + f"--standalone --nproc_per_node=2 --max-restarts=3 {dit.__file__} --resume"
    process = start(command + " --run-dir killed")
    restarts = 0
    starts = []
    while line := process.stdout.readline():
        starts += re.findall(r"from step (\d+)", line)
        if steps_in(line) > 80 * (restarts + 1) and restarts < 2:
            os.kill(workers(process)[restarts], signal.SIGKILL)
            restarts += 1
    assert process.wait() == 0, process.stderr.read()
    assert restarts == 2
    first, second, third = map(int, starts)
    assert first == 10
    assert second >= 70
    assert third >= 150
    output = start(command + " --run-dir whole").communicate()
    killed, _ = load("killed")
    whole, _ = load("whole")
    assert whole["step"] == 300, output
    assert_same(killed, whole)


def test_torchrun_goes_on_with_no_run_unasked():
    """Neither at first nor when it restarts the workers."""
    train(dit, "run", 2)
    flags = FLAGS + "--run-dir run --max-steps 4"
    launcher = TORCHRUN + "--standalone --nproc_per_node=2 --max-restarts=1 "
    output = start(launcher + flags).communicate()
    assert "run holds a run: add --resume" in output[1]
    assert load("run")[0]["step"] == 2


def test_a_hundred_kills():
    """SIGKILL, a third of them within a save. No file is torn, no step lost beyond --save-every,
    and in the end the weights are, bit for bit, those of a run that was left in peace."""
    every = 5
    flags = FLAGS + f"--run-dir killed --save-every {every} --max-steps 1000000 "
    temporary = Path("killed/ckpt.tmp")
    saved = 0  # the step of the checkpoint
    torn = 0
    for kill in range(KILLS):
        process = start(flags + ("--resume" if kill > 0 else ""))
        reached = 0
        while reached <= saved + every:  # so that there is progress: one save is done
            line = process.stdout.readline()
            assert line, process.communicate()
            reached = max(reached, steps_in(line))
        if kill % 3 == 0:
            while not temporary.exists():
                assert process.poll() is None, process.communicate()
        else:
            time.sleep(random.random())
        process.kill()
        for line in process.communicate()[0].splitlines():
            reached = max(reached, steps_in(line))
        torn += temporary.exists()
        step = torch.load("killed/ckpt.pt", weights_only=True)["step"]
        assert step % every == 0
        assert step >= max(reached - every, saved)
        saved = step
    with interrupted(dit, saved):
        train(dit, "whole", 1000000, f"--save-every {every}")
    killed, _ = load("killed")
    whole, _ = load("whole")
    assert_same(killed, whole)
    steps = [row["step"] for row in killed["log"]]
    assert steps == [row["step"] for row in whole["log"]]
    assert torn >= 0.3 * KILLS
    print(f"\n{KILLS} kills in {saved} steps, {torn} of them within a save: the same weights")


# ---- Disks and memory


@pytest.fixture
def disk():
    """A file system of its own, 1 MiB large, and a function that makes it read-only."""
    place = Path("disk").resolve()
    place.mkdir()
    try:
        run(f"mount -t tmpfs -o size=1m tmpfs {place}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {getattr(error, 'stderr', error)}")

    def seal():
        gc.collect()  # no file may be open for writing
        run(f"mount -o remount,ro {place}")

    yield place, seal
    gc.collect()
    run(f"umount {place}")


def test_full_and_read_only_disks(disk):
    """Neither harms the last checkpoint."""
    place, seal = disk
    train(dit, f"{place}/run", 2)
    checkpoint = place / "run" / "ckpt.pt"
    before = checkpoint.read_bytes()
    resume = f"--run-dir {place}/run --resume --max-steps 4 --save-every 1"
    draw = f"--run-dir {place}/run --sample-only --steps 1 "

    with pytest.raises(OSError), (place / "rubbish").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for flags in (resume, draw + f"-n 1000 --out {place}/x.png"):
        with pytest.raises((OSError, RuntimeError)):  # torch.save raises the second
            run_script(dit, flags)
        assert checkpoint.read_bytes() == before
    (place / "rubbish").unlink()
    seal()
    for flags in (resume, draw + f"--out {place}/folder/"):
        assert str(place) in refused(dit, flags)
        assert checkpoint.read_bytes() == before


def watch(process, pattern):
    """{n: (resident bytes, seconds)}, when it prints a line that begins with the pattern (Linux).

    n is what the pattern holds in parentheses.
    """
    seen = {}
    begin = time.perf_counter()
    for line in process.stdout:
        match = re.match(pattern, line)
        if match:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            if pages:  # none when it is ending already
                seconds = time.perf_counter() - begin
                seen[int(match[1])] = (pages * os.sysconf("SC_PAGE_SIZE"), seconds)
    assert process.wait() == 0, process.stderr.read()
    return seen


def test_memory_and_pace_hold_in_training():
    flags = "--run-dir long --max-steps 2200 --log-every 100 --save-every 100"
    seen = watch(start(FLAGS + flags), r"step (\d+)  images ")
    after = [seen[step][0] / seen[200][0] for step in seen if 200 <= step <= 2100]
    print(f"\nmemory against step 200: {min(after):.3f} to {max(after):.3f}")
    assert max(after) < 1.05
    early = seen[1100][1] - seen[200][1]
    late = seen[2100][1] - seen[1200][1]
    assert late < 1.5 * early


def test_memory_holds_in_drawing():
    train(dit, "run", 1)
    # in small parts, so that what a part takes for a while is little
    flags = "--ckpt run/ckpt.pt --steps 1 --guidance 1 -n 20000 --out many/ --micro-batch 20"
    seen = watch(start(f"{dit.__file__} {CPU} {flags}"), r"(\d+) of \d+ images")
    first, *later = [memory for n, (memory, _) in seen.items() if n >= 2000]
    after = [memory / first for memory in later]
    print(f"\nmemory, after some 2,000 images being 1: {min(after):.3f} to {max(after):.3f}")
    assert len(list(Path("many").iterdir())) == 20000
    assert max(after) < 1.05
