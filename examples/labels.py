"""Digits by their labels: a class-conditional model, guided, saved and loaded. `pip install scikit-learn`

python examples/labels.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits

import minidiff as md


def main(steps: int = 1500) -> float:
    """Train, draw twenty of each digit, and return the share that a classifier reads as their label."""
    torch.manual_seed(0)
    digits = load_digits()  # 1,797 pictures of 8x8, values 0 to 16
    x0 = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (N, 1, 8, 8)
    labels = torch.tensor(digits.target)

    encoder = md.LabelEncoder(num_classes=10, dim=64)
    net = md.UNet(channels=1, width=64, multipliers=(1, 2), patch=1, attention=(1,), condition_dim=64)
    model = md.Diffusion(net, md.Cosine(), target="v", encoder=encoder, shape=(1, 8, 8))
    data = torch.utils.data.TensorDataset(x0, labels)
    loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True, drop_last=True)
    for step in md.train(model, loader, steps):
        if step.index % 100 == 0:
            print(f"step {step.index:5}  loss {step.loss:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        step.ema.save_pretrained(folder)
        model = md.Diffusion.from_pretrained(folder)
    wanted = torch.arange(10).repeat_interleave(20)  # 200 labels
    denoise = md.clamp(md.guide(model.denoise, model.encode(wanted), scale=2.0))
    levels = model.schedule.levels(20)
    start = md.noise((200, 1, 8, 8), levels[0], generator=md.generators(0, 200))
    x = md.sample(md.dpmpp_2m(denoise, start, levels)).float()
    md.pixels.save_grid(x, "digits.png", ncols=20, scale=4)

    nearest = torch.cdist(x.flatten(1), x0.flatten(1)).topk(5, largest=False).indices
    read = labels[nearest].mode(dim=1).values  # of the five nearest neighbours
    share = (read == wanted).float().mean().item()
    print(f"read as their label: {md.metrics.proportion(round(200 * share), 200)}  (digits.png)")
    return share


if __name__ == "__main__":
    main()
