import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import full_disk
from runs import data, fresh, short, weights_of
from safetensors.torch import load_file, save_file
from torch import nn

import minidiff as md
from minidiff.state import STATE, saved_steps

CPU = torch.device("cpu")


# --- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MLP", "UNet"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(name, stop, tmp_path):
    """To the bit; on a GPU, whose kernels add in changing order, to rounding. The U-Net's weights lie in
    memory otherwise (channels last) than in the file."""

    def fresh(seed: int) -> md.Diffusion:
        torch.manual_seed(seed)
        net: nn.Module = md.MLP(16, 32, 2, condition_dim=4)
        if name == "UNet":
            net = md.UNet(1, 32, (1,), patch=1, attention=(0,), condition_dim=4)
        return md.Diffusion(net, md.Cosine(), "v")

    x = data(7, 8, 16).float().reshape(7, 8, *((16,) if name == "MLP" else (1, 4, 4)))
    c = md.Condition(data(8, 3, 4).float(), torch.ones(8, 3).bool(), data(8, 4).float())
    batches = [(part, c) for part in x]
    settings = {"warmup": 3, "lr": 0.01, "ema_decay": 0.9, "condition_dropout": 0.5}

    def run(model: md.Diffusion, batches: list, resume: Path | None = None) -> Iterator[md.Step]:
        return md.train(model, batches, 7, precision="fp32", resume=resume, **settings)  # type: ignore[arg-type]

    whole = fresh(3)
    *_, last = run(whole, batches)
    for step in run(fresh(3), batches):
        if step.index + 1 == stop:
            step.save(tmp_path)
            break
    assert saved_steps(tmp_path) == stop
    again = fresh(99)  # other first weights: all must come from the file
    resumed = list(run(again, batches[stop:], tmp_path))
    assert [step.index for step in resumed] == list(range(stop, 7))
    rounding = {"rtol": 1e-3, "atol": 1e-4} if torch.cuda.is_available() else {"rtol": 0.0, "atol": 0.0}
    for now, before in ((again, whole), (resumed[-1].ema, last.ema)):
        torch.testing.assert_close(weights_of(now), weights_of(before), **rounding)
    assert resumed[-1].loss == pytest.approx(last.loss, rel=rounding["rtol"], abs=0)
    assert resumed[-1].lr == last.lr


def test_a_failed_save_leaves_the_old_state(tmp_path):
    steps = md.train(fresh(), [data(8, 2).float()], 5, precision="fp32")
    next(steps).save(tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    step = next(steps)
    with full_disk(), pytest.raises(OSError, match="too large"):
        step.save(tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == before
    next(steps).save(tmp_path)
    assert saved_steps(tmp_path) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["training-before.safetensors", STATE]


def flip(file: Path) -> None:
    """One bit of the last byte: a header that still fits, and a weight that is another number."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_state_is_noticed_and_the_one_before_used(damage, tmp_path):
    """To the bit: the run ends as if nothing had happened."""
    batches = [data(8, 2, seed=seed).float() for seed in range(6)]
    for step in md.train(fresh(), batches, 6, precision="fp32"):
        if step.index in (1, 3):
            step.save(tmp_path)
    damage(tmp_path / STATE)
    again = fresh(seed=9)
    with pytest.warns(UserWarning, match="goes on from the state before it, of step 2"):
        steps = list(md.train(again, batches[2:], 6, precision="fp32", resume=tmp_path))
    assert [s.index for s in steps] == [2, 3, 4, 5]
    assert torch.equal(weights_of(steps[-1].ema), weights_of(step.ema))


def test_two_damaged_states_are_named(tmp_path):
    for step in md.train(fresh(), [data(8, 2).float()], 2, precision="fp32"):
        step.save(tmp_path)
    for file in tmp_path.iterdir():
        flip(file)
    with pytest.raises(ValueError, match="safetensors is damaged: its bytes are not those that were"):
        short(fresh(), resume=tmp_path)


def test_a_state_without_a_checksum_is_an_older_one(tmp_path):
    for step in md.train(fresh(), [data(8, 2).float()], 2, precision="fp32"):
        step.save(tmp_path)
    about = json.dumps({"steps": 2, "seed": 0})
    save_file(load_file(tmp_path / STATE), tmp_path / STATE, {"training": about})
    assert short(fresh(), 3, resume=tmp_path)[0].index == 2


def test_nothing_to_resume_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: .*training.safetensors does not exist"):
        short(fresh(), resume=tmp_path)


# --- two processes ---------------------------------------------------------------------------------

WORKER = """
    import os
    import sys
    from pathlib import Path

    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import minidiff as md

    class Mean(torch.nn.Module):  # its gradient tells the mean of the batch, see above
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x, t, condition=None):
            return self.w.expand_as(x)

    def constant(*values):
        return [torch.full((4, 2), float(value)) for value in values]

    def means(batches, steps):
        model = md.Diffusion(Mean(), md.Cosine(), "x0")
        run = md.train(model, batches, steps, lr=1e-12, max_grad_norm=1e9, precision="fp32")
        return [-model.net.w.grad[0].item() for _ in run]

    def weights(model):
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    settings = dict(precision="fp32", warmup=1, lr=0.01)
    batches = [(x, ["a cat", "a dog", "", "a cat"]) for x in constant(1, 2, 3)]

    def fresh():
        text = md.TextEncoder.from_captions(["a cat", "a dog"], dim=32, layers=1)
        return md.Diffusion(md.MLP(2, 32, 1, condition_dim=32), md.Cosine(), "v", text)

    torch.manual_seed(rank)  # the ranks begin with different weights
    model = fresh()
    began = weights(model).clone()
    for step in md.train(model, batches, 4, **settings):
        if step.index == 2:
            step.save(out / "half")
    torch.distributed.barrier()  # the file is written
    other = fresh()
    resumed = [again.index for again in md.train(other, batches, 4, resume=out / "half", **settings)]
    points = torch.arange(16.0)[:, None].expand(16, 2)
    found = {
        "world": torch.distributed.get_world_size(),
        "began": began,
        "weights": weights(model),
        "weights resumed": weights(other),
        "ema": weights(step.ema),
        "loss": step.loss,
        "main": step.is_main_process,
        "resumed": resumed,
        "list": means(constant(0, 10, 20), 3),
        "loader": means(DataLoader(TensorDataset(points), 4), 4),
    }
    torch.save(found, out / f"{rank}.pt")
"""


def test_two_processes_train_one_model(tmp_path):
    """Under torchrun: the gradient is the mean over both shares of the data, the ranks end with the same
    weights and averages, and one of them writes."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    library = str(Path(md.__file__).parents[1])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": library}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert not torch.equal(first["began"], second["began"])
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["ema"], second["ema"])
    assert first["loss"] != second["loss"]  # of its own share, with its own noise
    assert (first["main"], second["main"]) == (True, False)
    assert saved_steps(tmp_path / "half") == 3
    assert first["resumed"] == second["resumed"] == [3]
    assert torch.equal(first["weights resumed"], second["weights resumed"])
    # Batches 0, 10, 20, 0, 10, 20: rank 0 takes 0, 20, 10, rank 1 takes 10, 0, 20; the mean of each pair.
    assert first["list"] == second["list"] == pytest.approx([5, 10, 15])
    # Four batches of the loader, two per step: means 1.5, 5.5 and 9.5, 13.5, then again.
    assert first["loader"] == second["loader"] == pytest.approx([3.5, 11.5, 3.5, 11.5])
