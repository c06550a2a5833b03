"""Points in the plane: a network learns a ring of eight Gaussians, and the exact answer says how well.

python examples/points.py
"""

import torch

import minidiff as md
from minidiff.data.points import ring_of_gaussians


def main(steps: int = 3000, n: int = 2000) -> float:
    """Train, sample, and return the p-value of "samples and data come from one distribution"."""
    torch.manual_seed(0)
    ring = ring_of_gaussians()  # its denoiser and its score are known in closed form
    schedule = md.Cosine()
    model = md.Diffusion(md.MLP(dim=2, width=256), schedule, target="v")

    def batches():
        while True:
            yield ring.sample(1024)

    for step in md.train(model, batches(), steps, lr=3e-3):
        if step.index % 500 == 0:
            print(f"step {step.index:5}  loss {step.loss:.3f}")

    # How far from the best possible answer, at three levels of noise?
    x0 = ring.sample(n)
    for t in (0.2, 0.5, 0.8):
        level = schedule(t)
        x_t = md.diffuse(x0, torch.randn_like(x0), level)
        error, best = ((m.denoise(x_t, level).x0 - x0).square().mean() for m in (step.ema, ring))
        print(f"t = {t}: squared error of x0 {error:.4f}, the exact denoiser's {best:.4f}")

    levels = schedule.levels(50)
    start = md.noise((n, 2), levels[0], generator=torch.Generator().manual_seed(0))
    for name, denoise in (("network", step.ema.denoise), ("exact", ring.denoise)):
        x = md.sample(md.heun(denoise, start, levels)).float()
        p = md.metrics.energy_test(x, x0)
        print(f"samples of the {name} denoiser: p = {p:.3f}")
        if name == "network":
            ours = p
    return ours


if __name__ == "__main__":
    main()
