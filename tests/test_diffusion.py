import json
import pickle

import pytest
import torch
from helpers import SCHEDULES, full_disk
from networks import NETWORKS, SHAPES, all_networks, condition, randn, trained
from safetensors.torch import load_file
from torch import Tensor, nn

import minidiff as md

# --- Diffusion -------------------------------------------------------------------------------------


class Spy(nn.Module):
    """Records what the network is asked, and answers with a function of it."""

    def __init__(self, answer=lambda x, t: torch.zeros_like(x)):
        super().__init__()
        self.anchor, self.answer = nn.Parameter(torch.zeros((), dtype=torch.float64)), answer

    def forward(self, x: Tensor, t: Tensor, condition: md.Condition | None = None) -> Tensor:
        self.x, self.t, self.condition = x, t, condition
        return self.answer(x, t) + self.anchor


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_network_sees_inputs_of_unit_variance(name):
    """For data of variance 1; a schedule that preserves variance is left alone."""
    spy, schedule = Spy(), SCHEDULES[name]
    x_t, t = randn(3, 2), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    level = schedule(t)
    md.Diffusion(spy, schedule, "v").denoise(x_t, level)
    spread = (level.alpha**2 + level.sigma**2).sqrt()[:, None]
    torch.testing.assert_close(spy.x, x_t / spread)
    torch.testing.assert_close(spy.t, t.float())
    md.Diffusion(spy, schedule, "v").denoise(x_t, schedule(0.25))  # one level for all
    assert spy.t.tolist() == [0.25] * 3


def test_dropped_conditions_reach_the_network():
    spy = Spy()
    dropped = condition().drop(torch.tensor([True, False, False]))
    md.Diffusion(spy, md.Flow())(randn(3, 2), md.Flow()(0.5), dropped)
    assert spy.condition.mask.sum(1).tolist() == [0, 5, 1]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_denoise_undoes_the_target(name, target):
    """A network that outputs the true target makes a denoiser that finds x0 and eps."""
    schedule = SCHEDULES[name]
    x0, eps = randn(4, 2), randn(4, 2, seed=1)
    level = schedule(torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64))
    x_t = md.diffuse(x0, eps, level)
    spy = Spy(lambda x, t: md.to_target(x0, eps, level, target))
    found = md.Diffusion(spy, schedule, target).denoise(x_t, level)
    torch.testing.assert_close(found.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, eps, rtol=1e-9, atol=1e-9)


def test_denoise_answers_in_the_dtype_of_the_question():
    """Samplers work in float64, networks in float32: the conversion happens here."""
    model = md.Diffusion(NETWORKS["MLP"](), md.Cosine(), "v")
    for dtype in (torch.float32, torch.float64):
        x0, eps = model.denoise(torch.zeros(2, 3, dtype=dtype), md.Cosine()(0.5))
        assert x0.dtype == eps.dtype == dtype


# --- save and load ---------------------------------------------------------------------------------


@all_networks
@pytest.mark.parametrize(
    "schedule,target",
    [(md.Cosine(0.02), "v"), (md.Linear(steps=77), "eps"), (md.Karras(0.01), "x0"), (md.Flow(), "flow")],
    ids=["cosine", "linear", "karras", "flow"],
)  # fmt: skip
def test_save_and_load_is_bitwise(name, schedule, target, tmp_path):
    model = trained(name, schedule, target)
    model.save_pretrained(tmp_path / "model")
    again = md.Diffusion.from_pretrained(tmp_path / "model")
    assert again.schedule == schedule
    assert again.target == target
    assert again.shape == SHAPES[name]
    assert type(again.net) is type(model.net)
    assert again.net.config == model.net.config
    weights = again.state_dict()
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    x = torch.randn(3, *SHAPES[name])
    c, level = condition().to(x), schedule(0.6)
    assert torch.equal(again.denoise(x, level, c).x0, model.denoise(x, level, c).x0)
    again.save_pretrained(tmp_path / "copy")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_a_loaded_model_is_ready_to_sample(tmp_path):
    trained("UNet").train().save_pretrained(tmp_path)
    model = md.Diffusion.from_pretrained(tmp_path)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_half_precision_files(tmp_path):
    model = trained("UNet")
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    again = md.Diffusion.from_pretrained(tmp_path / "half").state_dict()
    for key, value in model.state_dict().items():
        assert again[key].dtype == torch.float32
        assert torch.equal(again[key], value.half().float())


def test_nothing_is_pickled(tmp_path, monkeypatch):
    trained("MLP").save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "minidiff-2"
    assert load_file(tmp_path / "model.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    md.Diffusion.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_model(tmp_path):
    trained("MLP").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(), pytest.raises(OSError, match="too large"):
        trained("MLP", md.Flow(), "flow").save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    trained("MLP", md.Flow(), "flow").save_pretrained(tmp_path)  # replaces the model, keeps other files
    assert md.Diffusion.from_pretrained(tmp_path).target == "flow"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(before)


def test_others_may_read_a_saved_model(tmp_path):
    """With the rights that any new file gets, not with those of a temporary one."""
    trained("MLP").save_pretrained(tmp_path / "model")
    (tmp_path / "plain").write_text("")
    for file in (tmp_path / "model").iterdir():
        assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model 'crittters': not a folder, not shipped") as error:
        md.Diffusion.from_pretrained("crittters")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="holds no model: config.json and model.safetensors"):
        md.Diffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda config: "{not json",
        lambda config: json.dumps({"architectures": ["UNet2DModel"]}),
        lambda config: json.dumps(config | {"net": {"name": "VNet"}}),
        lambda config: json.dumps(config | {"net": config["net"] | {"dims": 3}}),
        lambda config: json.dumps(config | {"schedule": {"name": "Quadratic"}}),
        lambda config: json.dumps({k: v for k, v in config.items() if k != "target"}),
        lambda config: json.dumps({k: v for k, v in config.items() if k != "encoder"}),
    ],
    ids=["not json", "foreign", "net", "net argument", "schedule", "no target", "no encoder"],
)
def test_a_config_of_another_kind_is_refused_in_one_line(break_it, tmp_path):
    trained("MLP").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(break_it(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=r".") as error:
        md.Diffusion.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value) or "unknown schedule" in str(error.value)


def test_a_hub_id_is_fetched_and_failures_are_one_line(tmp_path, monkeypatch):
    trained("MLP").save_pretrained(tmp_path)
    asked = []

    def hub(name, allow_patterns, revision, token):
        asked.append((name, revision, token))
        assert not any("bin" in pattern or "pt" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert md.Diffusion.from_pretrained("someone/model").target == "v"
    md.Diffusion.from_pretrained("someone/model", revision="v2", token="secret")
    assert asked == [("someone/model", None, None), ("someone/model", "v2", "secret")]

    def offline(name, **options):
        raise ConnectionError("no route to host\nand a long traceback")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"someone/model.*\(no route to host\)") as error:
        md.Diffusion.from_pretrained("someone/model")
    assert "\n" not in str(error.value)
