"""Runs that are killed again and again, a disk that fills up, thousands of pictures.

It takes too long for ``make test``. ``make soak`` runs it and writes ``tests/soak.json``, which the page
*What you can rely on* quotes.

* kills, and kills2 with two processes: a small training run is stopped at random moments, by SIGKILL and by
  SIGTERM, and resumed each time. At its end it must be what a run is that nobody disturbed, to the bit, and
  no folder may be unreadable on the way.
* disk: a training run into a file system that is too small for its second save.
* pictures: one process draws thousands; the slope of its memory.
* workers: spawned processes draw the same pictures as this one.

    python tests/soak.py [PART ...] [--kills 40] [--terms 10] [--pictures 2000] [-o tests/soak.json]
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scipy import stats

import minidiff as md
from minidiff.files import SAVING, write_whole
from minidiff.state import BEFORE, STATE, recover, saved_steps

COLORS = ("red", "green", "blue", "yellow", "black", "white")
SAVE_EVERY = 5
"""Steps between saves: so few that a random moment is often in the middle of one."""
PARTS = ("kills", "kills2", "disk", "pictures", "workers")
LEFT = 10**6
"""Bytes that the leftovers of all kills together may take at the end."""


class Failed(Exception):
    """A promise was not kept."""


# --- kills -----------------------------------------------------------------------------------------


def pictures_of_colors(folder: Path) -> Path:
    """A captioned folder of small pictures."""
    folder.mkdir()
    for color in COLORS:
        Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
    lines = [json.dumps({"file_name": f"{color}.png", "text": f"a {color} square"}) for color in COLORS]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def command(data: Path, output: Path, steps: int, processes: int, resume: bool) -> list[str]:
    """The command that trains, in one process or several."""
    start = [str(Path(sys.executable).with_name("minidiff"))]
    if processes > 1:
        alone = ["--standalone", "--nproc-per-node", str(processes)]
        start = [sys.executable, "-m", "torch.distributed.run", *alone, *start]
    options = {"--size": 16, "--width": 32, "--batch-size": 4, "--steps": steps, "--save-every": SAVE_EVERY}
    spelled = [word for option in options.items() for word in map(str, option)]
    return [*start, "train", str(data), "-o", str(output), *spelled, *["--resume"] * resume]


def begin(call: list[str]) -> subprocess.Popen[str]:
    """Start it in a process group of its own."""
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, env=quiet, start_new_session=True)


def kill_all(pid: int) -> None:
    """SIGKILL for a process and all that it has started: the workers of torchrun live in sessions of their
    own."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    for member in found:
        os.kill(member, signal.SIGKILL)
    while any(alive(member) for member in found[1:]):
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs: one that is dead may still be listed, as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def finish(call: list[str]) -> float:
    """Run it to its end; the seconds it took."""
    started = time.monotonic()
    process = begin(call)
    _, error = process.communicate()
    if process.returncode != 0:
        raise Failed(f"exit {process.returncode}: {error[-500:]}")
    return time.monotonic() - started


def log_of(run: Path) -> list[list[str]]:
    """What ``loss.csv`` says, but for the speed."""
    return [line.split(",")[:3] for line in (run / "loss.csv").read_text().splitlines()]


def check_readable(run: Path) -> int:
    """The step that a stopped run would go on from; both its state and its model can be read."""
    if not (run / STATE).exists() and not (run / BEFORE).exists():
        return 0
    recover(run)
    if (run / "config.json").exists():
        md.TextToImage.from_pretrained(run)
    return saved_steps(run)


def kills(place: Path, kill: int, term: int, steps: int, processes: int) -> dict[str, Any]:
    """Disturb one run and compare it with another that is left alone."""
    data = pictures_of_colors(place / "data")
    seconds = finish(command(data, place / "calm", steps, processes, False))
    random.seed(processes)
    stops = [signal.SIGKILL] * kill + [signal.SIGTERM] * term
    random.shuffle(stops)
    run, saved, progress, codes = place / "run", 0, [], set()
    in_a_save = 0
    for number in stops:
        process = begin(command(data, run, steps, processes, saved > 0))
        # Most of the moments lie in the training itself, where saves are; some while it is still starting.
        log, before = run / "loss.csv", len(log_of(run)) if (run / "loss.csv").exists() else 0
        if random.random() < 0.8:
            while process.poll() is None and not (log.exists() and len(log_of(run)) > before):
                time.sleep(0.02)
        time.sleep(random.uniform(0, 2.0))
        if process.poll() is not None:
            raise Failed(f"it ended before it was stopped: {process.communicate()[1][-500:]}")
        if number == signal.SIGKILL:
            kill_all(process.pid)
        else:
            process.send_signal(number)
        _, error = process.communicate()
        in_a_save += any(run.rglob(f"{SAVING}*")) if run.exists() else 0
        if number == signal.SIGTERM:
            codes.add(process.returncode)
            if processes == 1 and "Traceback" in error:
                raise Failed(error[-500:])
        saved = check_readable(run)
        progress.append(saved)
        print(f"{number.name} after step {saved}", flush=True)
    finish(command(data, run, steps, processes, saved > 0))
    same = {
        name: (run / name).read_bytes() == (place / "calm" / name).read_bytes()
        for name in (STATE, "model.safetensors", "tokenizer.json", "config.json")
    }
    left = sum(f.stat().st_size for s in run.rglob(f"{SAVING}*") for f in s.rglob("*") if f.is_file())
    found = {
        "processes": processes, "steps": steps, "SIGKILL": kill, "SIGTERM": term,
        "in the middle of a save": in_a_save, "codes of SIGTERM": sorted(codes), "same": same,
        "same log": log_of(run) == log_of(place / "calm"), "bytes left over": left,
        "seconds undisturbed": round(seconds, 1), "saved after": progress,
    }  # fmt: skip
    if not all(same.values()) or not found["same log"] or left > LEFT:
        raise Failed(json.dumps(found))
    return found


# --- a full disk -----------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path | None]:
    """A file system of that size, or None where this user may not make one."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def disk(place: Path, megabytes: int) -> dict[str, Any]:
    """Train until nothing more can be saved; the save before must load and go on elsewhere."""
    data = pictures_of_colors(place / "data")
    with small_disk(place / "small", megabytes) as small:
        if small is None:
            return {"not measured": "this user may not mount a file system"}
        run = small / "run"
        process = begin(command(data, run, 10**6, 1, False))
        while process.poll() is None and not (run / STATE).exists():
            time.sleep(0.02)
        with suppress(OSError), (small / "other").open("wb", buffering=0) as other:
            while shutil.disk_usage(small).free > 10**6:  # the run may fill it first
                other.write(bytes(10**5))
        _, error = process.communicate()
        last = error.strip().splitlines()[-1]
        if process.returncode == 0 or "Traceback" in error or "No space left" not in last:
            raise Failed(f"exit {process.returncode}: {error[-500:]}")
        (small / "other").unlink()
        saved = check_readable(run)
        finish(command(data, run, saved + 1, 1, True))
    says = last.replace(str(small), "DISK")
    return {"megabytes": megabytes, "exit": process.returncode, "says": says, "saved after": saved}


# --- pictures --------------------------------------------------------------------------------------


def small_pipeline() -> md.TextToImage:
    """An untrained model of small pictures."""
    torch.manual_seed(0)
    text = md.TextEncoder.from_captions([f"a {color} square" for color in COLORS])
    net = md.UNet(width=32, patch=2, condition_dim=text.dim)
    return md.TextToImage(md.Diffusion(net, md.Cosine(), "v", text, shape=(3, 16, 16)))


def pictures(number: int) -> dict[str, Any]:
    """Draw one after another; resident memory after each hundredth of them."""
    pipe, every, memory = small_pipeline(), max(1, number // 100), []
    for i in range(number):
        pipe(f"a {COLORS[i % 6]} square", steps=4, seed=i)
        if i % every == every - 1:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    settled = memory[len(memory) // 5 :]  # the first ones fill the caches
    line = stats.linregress([every * i for i in range(len(settled))], settled)
    margin = stats.t.ppf(0.975, len(settled) - 2) * line.stderr
    found = {
        "pictures": number, "megabytes at first": settled[0], "megabytes at the end": settled[-1],
        "megabytes per 1,000 pictures": [
            round(1000 * (line.slope + s * margin), 3) + 0.0 for s in (-1, 0, 1)
        ],
    }  # fmt: skip
    if 1000 * (line.slope - margin) > 1:
        raise Failed(json.dumps(found))
    return found


def drawn(seed: int) -> torch.Tensor:
    """Two pictures, for a worker."""
    torch.set_num_threads(1)
    return small_pipeline()(["a red square", "a blue square"], steps=4, seed=seed).tensors


def workers(number: int) -> dict[str, Any]:
    """Do spawned processes draw what this one draws?"""
    with multiprocessing.get_context("spawn").Pool(number) as pool:
        theirs = pool.map(drawn, range(number), chunksize=1)
    same = [torch.equal(drawn(seed), picture) for seed, picture in enumerate(theirs)]
    if not all(same):
        raise Failed(f"workers draw other pictures: {same}")
    return {"workers": number, "same": all(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *PARTS], help="; ".join(PARTS))
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs of each run")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs of each run")
    parser.add_argument("--steps", type=int, default=4000, help="steps of each run")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    file: Path = arguments.output
    found = json.loads(file.read_text()) if file.exists() else {}
    found["machine"] = {"system": platform.system(), "torch": torch.__version__}
    how_often = arguments.kills, arguments.terms, arguments.steps
    for part in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as place:
            match part:
                case "kills":
                    found["kills, one process"] = kills(Path(place), *how_often, 1)
                case "kills2":
                    found["kills, two processes"] = kills(Path(place), *how_often, 2)
                case "disk":
                    found["disk"] = disk(Path(place), 120)
                case "pictures":
                    found["pictures"] = pictures(arguments.pictures)
                case "workers":
                    found["workers"] = workers(4)
        with write_whole(file) as unfinished:  # after each part: what comes may take long
            unfinished.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
