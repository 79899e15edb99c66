"""What takes too long for every run, or needs root: python -m pytest -q -s .ci/test_stress.py (a quarter of an hour)

Two machines (network namespaces) train and draw together; training is killed a hundred times; memory does not grow.
"""

import csv, gc, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_smoke import FETCH, assert_same, checkpoint, cli_of, dit, mnist, pictures, pixels, shell  # noqa: F401

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV = dict(os.environ, PYTHONPATH=str(Path(dit.__file__).parent), OMP_NUM_THREADS="1")

@pytest.fixture
def machines():
    """Commands that run something on either of two hosts, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    ip = lambda words, check=True: subprocess.run(["ip", *words.split()], check=check, capture_output=True)
    names = ["diffusion-one", "diffusion-two"]

    def remove():
        for name in names:
            ip(f"netns del {name}", check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)

    try:
        remove()  # what a run that was killed may have left
        for name in names:
            ip(f"netns add {name}")
            Path("/etc/netns", name).mkdir(parents=True)  # what they find in their /etc
            Path("/etc/netns", name, "hosts").write_text("10.77.0.1 one\n10.77.0.2 two\n")
        ip(f"link add cable1 netns {names[0]} type veth peer name cable2 netns {names[1]}")
        for number, name in enumerate(names, start=1):
            ip(f"-n {name} addr add 10.77.0.{number}/24 dev cable{number}")
            ip(f"-n {name} link set cable{number} up"), ip(f"-n {name} link set lo up")
        yield [["ip", "netns", "exec", name] for name in names]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    finally:
        remove()

def on_both(machines, processes, *command, folders):
    running = []
    for number, (host, folder) in enumerate(zip(machines, folders), start=1):
        rendezvous = f"--nnodes=2 --nproc-per-node={processes} --rdzv-backend=c10d --rdzv-endpoint=one:29500"
        here = [f"--rdzv-conf=is_host={2 - number}", f"--local-addr=10.77.0.{number}"]  # for their host names are equal
        launch = [*host, *TORCHRUN, *rendezvous.split(), *here, *map(str, command)]
        env = dict(ENV, GLOO_SOCKET_IFNAME=f"cable{number}")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(subprocess.Popen(launch, env=env, cwd=folder, **pipes))
    try:
        ended = [process.communicate(timeout=200) for process in running]
    finally:
        [process.kill() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    return [out for out, _ in ended]

@pytest.fixture
def folders(tmp_path):
    """Where each machine is, so that one sees who writes what."""
    there = [tmp_path / "disk1", tmp_path / "disk2"]
    [folder.mkdir() for folder in there]
    return there

def test_two_machines_train_and_draw(machines, folders, cli_of):
    cli, script = cli_of(dit), [dit.__file__, "--device", "cpu"]
    cli.train("one", 6, "--out", "one.png", "--n", 5)
    train = [*cli.flags, "--run-dir", "two", "--max-steps", 6, "--out", "two.png", "-n", 5]
    first, second = on_both(machines, 1, *script, *train, folders=folders)
    written, others = (sorted(p.name for p in folder.rglob("*") if p.is_file()) for folder in folders)
    assert [written, others] in ([["ckpt.pt", "log.csv", "two.png"], []], [[], ["ckpt.pt", "log.csv", "two.png"]])
    writer = folders[0] if written else folders[1]
    assert_same(checkpoint("one"), checkpoint(writer / "two"), tolerance=1e-5)
    assert (pixels("one.png") - pixels(writer / "two.png")).abs().max() <= 1
    assert (first + second).count("M parameters") == 1 == (first + second).count("two.png")  # one of them speaks
    draw = ["--sample-only", "--ckpt", Path("one/ckpt.pt").resolve(), "--steps", 2, "-n", 20, "--out", "drawn/"]
    on_both(machines, 2, *script, *draw, folders=folders)
    drawn = [sorted(p.name for p in (folder / "drawn").iterdir()) for folder in folders]
    assert [len(names) for names in drawn] == [10, 10] and sorted(sum(drawn, [])) == [
        f"{i:06d}-{i % 8}.png" for i in range(20)
    ]

def test_each_machine_fetches_once(machines, folders, tmp_path):
    script = tmp_path / "fetch.py"
    script.write_text(FETCH)
    on_both(machines, 2, script, folders=folders)
    assert sorted((folder / "data").read_text() for folder in folders) == ["0", "2"]

def workers(torchrun):
    """The ids of the processes that torchrun started (Linux)."""
    return [int(pid) for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]

def test_torchrun_restarts(cli_of, monkeypatch):
    """One of two workers is killed, twice; torchrun starts them anew, and the run goes on from its last checkpoint, to
    the weights of an undisturbed one. But a new torchrun over an old run is refused, however often it restarts."""
    cli = cli_of(dit)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else the new workers may call on the dead ones
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split()
    flags = [*cli.flags, "--save-every", 10, "--max-steps", 300]
    process, restarts, starts = shell(dit, *flags, "--run-dir", "killed", launcher=launcher), 0, []
    while line := process.stdout.readline():
        starts += map(int, re.findall(r"from step (\d+)", line))
        reached = int(line.split()[1]) if line.startswith("step ") else 0
        if reached > 80 * (restarts + 1) and restarts < 2:
            os.kill(workers(process)[restarts], signal.SIGKILL)
            restarts += 1
    assert process.wait() == 0 and restarts == 2, process.stderr.read()
    assert len(starts) == 3 and starts[0] == 0 and starts[1] >= 70 and starts[2] >= 150, starts
    shell(dit, *flags, "--run-dir", "whole", launcher=launcher).communicate()
    assert checkpoint("whole")["step"] == 300
    assert_same(checkpoint("killed"), checkpoint("whole"))
    before = Path("whole/ckpt.pt").read_bytes()
    process = shell(dit, *flags, "--run-dir", "whole", "--max-steps", 400, launcher=launcher)
    err = process.communicate()[1]
    assert process.returncode and "--run-dir whole holds a run" in err and Path("whole/ckpt.pt").read_bytes() == before

@pytest.fixture
def disk(tmp_path):
    """A file system of its own, 1 MiB large, and a function that makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = lambda words: subprocess.run(["mount", *words.split(), str(place)], check=True, capture_output=True)
    try:
        mount("-t tmpfs -o size=1m tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {getattr(error, 'stderr', error)}")
    yield place, lambda: (gc.collect(), mount("-o remount,ro"))  # no file may be open for writing
    subprocess.run(["umount", str(place)], check=True)

def test_full_and_read_only_disks(cli_of, disk, capsys):
    cli, (place, seal) = cli_of(dit), disk
    cli.train(place / "run", 2)
    before = Path(place, "run/ckpt.pt").read_bytes()

    def refused(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli("--run-dir", place / "run", "--resume", "--max-steps", 4, "--save-every", 1, *flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and str(place) in err, err
        assert Path(place, "run/ckpt.pt").read_bytes() == before

    full = place / "rubbish"
    with pytest.raises(OSError), full.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    refused()
    refused("--sample-only", "--n", 1000, "--steps", 1, "--out", f"{place}/x.png")
    full.unlink()
    seal()
    refused()
    refused("--sample-only", "--n", 4, "--steps", 1, "--out", f"{place}/folder/")

def test_a_hundred_kills(cli_of):
    """SIGKILL, a third of them within a save. No file is torn, no step lost beyond --save-every, and the weights at the
    end are, bit for bit, those of a run that was left in peace."""
    cli, every, torn, before = cli_of(dit), 5, 0, 0
    flags = [*cli.flags, "--run-dir", "killed", "--resume", "--save-every", every, "--max-steps", 1000000]
    path, tmp = Path("killed/ckpt.pt"), Path("killed/ckpt.pt.tmp")
    for kill in range(100):
        process, reached = shell(dit, *flags), 0
        while reached < before + every:  # so that there is progress
            line = process.stdout.readline()
            assert line, process.communicate()
            reached = int(line.split()[1]) if line.startswith("step ") else 0
        if kill % 3 == 0:
            tmp.unlink(missing_ok=True)
            while not tmp.exists():
                assert process.poll() is None, process.communicate()
        else:
            time.sleep(random.random())
        process.kill()
        lines = process.communicate()[0].splitlines()
        reached = max([reached, *(int(line.split()[1]) for line in lines if line.startswith("step "))])
        torn += tmp.exists()
        state = torch.load(path, weights_only=True)
        assert reached - every <= state["step"] and state["step"] % every == 0 and state["step"] >= before
        before = state["step"]
    cli("--run-dir", "killed", "--resume", "--save-every", every, "--max-steps", before + 1, "--steps", 2)
    cli.train("whole", before + 1, "--save-every", 1000)
    assert_same(checkpoint("killed"), checkpoint("whole"))
    rows = [int(row["step"]) for row in csv.DictReader(open("killed/log.csv"))]
    assert rows == sorted(set(rows))
    assert torn >= 30
    print(f"\n100 kills in {before} steps, {torn} of them within a save: the same weights")

def watch(process):
    """{steps or images so far: (resident bytes, seconds)}, as its lines of progress are printed (Linux)."""
    seen, start = {}, time.perf_counter()
    for line in process.stdout:
        if match := re.match(r"step (\d+) |(\d+) of \d+ images", line):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            seen[int(match[1] or match[2])] = pages * os.sysconf("SC_PAGE_SIZE"), time.perf_counter() - start
    assert process.wait() == 0, process.stderr.read()
    return {number: at for number, at in seen.items() if at[0]}  # none when it was ending already

def test_memory_and_pace_hold_in_training(cli_of):
    cli = cli_of(dit)
    process = shell(dit, *cli.flags, "--run-dir", "long", "--max-steps", 2200, "--log-every", 100, "--save-every", 100)
    seen = watch(process)
    after = {step: seen[step][0] / seen[200][0] for step in seen if step >= 200 and step <= 2100}
    early, late = (seen[b][1] - seen[a][1] for a, b in ((200, 1100), (1200, 2100)))
    print(f"\nmemory against step 200: {min(after.values()):.3f} to {max(after.values()):.3f}, pace {early / late:.2f}")
    assert max(after.values()) < 1.05 and late < 1.5 * early

def test_memory_holds_in_drawing(cli_of):
    cli = cli_of(dit)
    cli.train("run", 1)
    draw = ["--sample-only", "--run-dir", "run", "--steps", 1, "--guidance", 1, "--n", 20000, "--out", "many/"]
    seen = watch(shell(dit, *draw, "--batch-size", 200))
    after = {n: seen[n][0] / seen[2000][0] for n in seen if n >= 2000 and n < 20000}
    print(f"\nmemory, 2,000 images being 1: {min(after.values()):.3f} to {max(after.values()):.3f}")
    assert len(list(Path("many").iterdir())) == 20000 and max(after.values()) < 1.05
