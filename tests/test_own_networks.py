"""Networks, encoders and batches of the reader's own: trained, resumed, saved, loaded, compiled, exported."""

import json

import pytest
import torch
from networks import NETWORKS, batch, condition, perturbed
from runs import data
from torch import Tensor, nn

import minidiff as md
from minidiff.training import unpack


class Own(nn.Module):
    """A network as the book describes one: net(x, t, condition), with a condition that may be None."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 1 + 8, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, condition: md.Condition | None) -> Tensor:
        about = x.new_zeros(len(x), 8) if condition is None else condition.pooled
        return self.layers(torch.cat([x, t[:, None], about], dim=1))


class Scaled(nn.Module):
    """An encoder of numbers with a unit: one token, a learned direction times the number."""

    dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(8))

    def ids(self, values):
        return torch.tensor([round(100 * value) for value in values])

    def forward(self, ids):
        vectors = ids[:, None] / 100 * self.direction
        return md.Condition(vectors[:, None], torch.ones(len(ids), 1, dtype=torch.bool), vectors)


def own(seed: int = 0) -> md.Diffusion:
    torch.manual_seed(seed)
    return md.Diffusion(Own(), md.Cosine(), "v", Scaled(), shape=(2,))


def pairs(n: int = 32) -> tuple[Tensor, list[float]]:
    """Points whose place is told by the number beside them."""
    sides = [(-1.0, 1.0)[i % 2] for i in range(n)]
    return 0.1 * data(n, 2).float() + torch.tensor(sides)[:, None], sides


def test_an_own_network_and_encoder_learn_and_are_guided():
    model = own()
    before = model.encoder.direction.detach().clone()
    for step in md.train(model, [pairs()], 400, lr=1e-2, ema_decay=0.98):
        pass
    assert not torch.equal(model.encoder.direction.cpu(), before)
    denoise = md.guide(step.ema.denoise, step.ema.encode([1.0]), 1.5)
    levels = model.schedule.levels(20)
    x = md.noise((64, 2), levels[0], generator=md.generators(0, 64))
    assert (md.sample(md.ddim(denoise, x, levels)) > 0).float().mean() > 0.95


def test_it_resumes_where_it_stopped(tmp_path):
    settings = {"precision": "fp32", "lr": 0.01}
    whole = [step.loss for step in md.train(own(), [pairs()], 6, **settings)]
    for step in md.train(own(), [pairs()], 6, **settings):
        if step.index == 2:
            step.save(tmp_path)
            break
    rest = [step.loss for step in md.train(own(1), [pairs()], 6, resume=tmp_path, **settings)]
    # Kernels on a GPU add in changing order.
    assert rest == pytest.approx(whole[3:], rel=1e-3 if torch.cuda.is_available() else 0, abs=0)


def test_it_is_saved_and_loaded_into_one_of_its_kind(tmp_path):
    model = own()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["net"] == {"name": "test_own_networks.Own"}
    again = md.Diffusion.from_pretrained(tmp_path, net=Own(), encoder=Scaled())
    x_t, level = data(3, 2).float(), md.Cosine()(0.3)
    for values in ([0.5], [-1.0]):
        mine, theirs = (m.denoise(x_t, level, m.encode(values)).x0 for m in (model, again))
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"network of your own, .*Own: give .*net=Own\(\.\.\.\)"):
        md.Diffusion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder of your own, .*Scaled: give .*encoder=Scaled"):
        md.Diffusion.from_pretrained(tmp_path, net=Own())
    with pytest.raises(ValueError, match="holds other weights than this network has") as error:
        md.Diffusion.from_pretrained(tmp_path, net=Own(64), encoder=Scaled())
    assert "\n" not in str(error.value)


def test_a_compiled_network_keeps_its_name(tmp_path):
    """torch.compile wraps a module; the folder does not tell."""
    plain = md.Diffusion(perturbed(NETWORKS["MLP"]()).float(), md.Cosine(), "v")
    wrapped = md.Diffusion(torch.compile(plain.net, backend="eager"), md.Cosine(), "v")
    folders = tmp_path / "plain", tmp_path / "wrapped"
    for model, folder in zip((plain, wrapped), folders, strict=True):
        model.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    step = next(md.train(wrapped, [data(8, 3).float()], 2, precision="fp32"))
    step.save(tmp_path)
    again = md.Diffusion(NETWORKS["MLP"](), md.Cosine(), "v")  # not compiled
    rest = [s.index for s in md.train(again, [data(8, 3).float()], 2, resume=tmp_path)]
    assert rest == [1]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_exported_to_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = perturbed(NETWORKS[name]()).float()
    x, t = (part.float() for part in batch(name))
    c = md.Condition(*(p.float() if p.is_floating_point() else p for p in condition()))
    file = tmp_path / "net.onnx"
    torch.onnx.export(net, (x, t, c), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    feed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), (x, t, *c), strict=True)}
    (out,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(out), net(x, t, c).detach(), rtol=1e-4, atol=1e-4)


# --- the hub ---------------------------------------------------------------------------------------


def test_it_is_pushed_to_the_hub_as_it_is_saved(monkeypatch):
    calls: dict[str, dict] = {}

    class Hub:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = {"repo_id": repo_id, **options}
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **options):
            from pathlib import Path

            files = sorted(file.name for file in Path(folder_path).iterdir())
            calls["upload"] = {**options, "files": files}
            return "the commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = md.Diffusion(NETWORKS["MLP"](), md.Cosine(), "v")
    assert model.push_to_hub("me/mine", private=True, token="secret", revision="dev") == "the commit"
    assert calls["token"] == "secret"
    assert calls["create"] == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert calls["upload"]["files"] == ["config.json", "model.safetensors"]
    assert calls["upload"]["repo_id"] == "me/mine"
    assert calls["upload"]["revision"] == "dev"


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x, c: (x, c),
        lambda x, c: [x, c],
        lambda x, c: {"image": x, "label": c},
        lambda x, c: {"pixel_values": x, "text": c},
        lambda x, c: {"x0": x, "condition": c},
    ],
)
def test_every_form_of_a_batch_says_the_same(form):
    x, values = pairs(4)
    x0, about = unpack(form(x, values))
    assert x0 is x
    assert about is values


@pytest.mark.parametrize(
    "batch,message",
    [
        ({"pixels": torch.zeros(2, 2)}, "a batch with 'pixels': give one of x0, pixel_values"),
        ({"image": torch.zeros(2, 2), "label": [0, 1], "text": ["", ""]}, "at most one of"),
        ((torch.zeros(2, 2), [0, 1], [0, 1]), "a batch of 3 parts"),
        (["a.png", "b.png"], r"samples are 'a.png': give a tensor"),
        ({"image": ["a.png"]}, r"samples are \['a.png'\]: give a tensor"),
        (torch.zeros(2, 2, dtype=torch.uint8), "holds torch.uint8, not floats"),
    ],
)
def test_a_batch_of_another_form_is_refused_in_one_line(batch, message):
    with pytest.raises(ValueError, match=message) as error:
        next(md.train(own(), [batch], 1))
    assert "\n" not in str(error.value)


def test_labels_without_an_encoder_are_refused():
    model = md.Diffusion(NETWORKS["MLP"](None), md.Cosine())
    with pytest.raises(ValueError, match=r"no encoder, so it cannot follow \[0, 1\]: give Diffusion"):
        next(md.train(model, [(torch.zeros(2, 3), [0, 1])], 1))
    with pytest.raises(ValueError, match=r"no encoder, so it cannot follow \['a cat'\]"):
        model.encode(["a cat"])
    with pytest.raises(ValueError, match=r"condition = \['a cat'\] is not encoded: give model.encode"):
        model.denoise(torch.zeros(1, 3), md.Cosine()(0.5), ["a cat"])
    with pytest.raises(ValueError, match=r"encoder = dict: give a torch module with ids"):
        md.Diffusion(NETWORKS["MLP"](), md.Cosine(), "v", {})
