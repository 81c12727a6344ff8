"""Draw the picture of docs/method.md: the sigma tables of six tasks, from the scheduler itself.

    python benchmarks/method_picture.py docs/method.svg

Needs matplotlib (the extra `train`).
"""

import argparse
from pathlib import Path

import torch

from pusa import PusaFlowMatchEulerScheduler
from pusa.scheduler import wave_sigmas
from pusa.training.reports.charts import load_figure_class

STEPS, FRAMES = 10, 21
TABLES = {
    "text to video": {},
    "image to video": {0: 0.2},
    "start and end": {0: 0.2, 20: 0.5},
    "extension": {0: 0.0, 1: 0.3, 2: 0.4, 3: 0.5},
    "keyframes, kept": {0: 0.0, 10: 0.0, 20: 0.0},
    "wave": None,
}


def sigma_table(multipliers: dict[int, float] | None) -> torch.Tensor:
    """Return the table ``[steps + 1, frames]`` of a task: latent frame -> noise multiplier, or None for a wave."""
    if multipliers is None:
        return wave_sigmas(FRAMES, STEPS)
    columns = torch.ones(FRAMES)
    for frame, multiplier in multipliers.items():
        columns[frame] = multiplier
    scheduler = PusaFlowMatchEulerScheduler()
    scheduler.set_timesteps(STEPS, noise_multipliers=columns)
    return scheduler.frame_sigmas[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the sigma tables of six tasks.")
    parser.add_argument("picture", type=Path, help="the file to write: .svg or .png")
    picture = parser.parse_args().picture
    figure_class = load_figure_class()  # says which extra matplotlib is in
    import matplotlib

    figure = figure_class(figsize=(9.6, 5.2), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, (title, multipliers) in zip(axes.flat, TABLES.items(), strict=True):
        table = sigma_table(multipliers)
        shown = ax.imshow(table.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("latent frame", fontsize=9)
        ax.set_ylabel("step", fontsize=9)
        ax.set_xticks([0, 10, 20])
        ax.set_yticks([0, len(table) - 1])
    figure.colorbar(shown, ax=axes, label="sigma: 1 is noise, 0 is clean", shrink=0.8)
    with matplotlib.rc_context({"svg.hashsalt": "pusa", "svg.fonttype": "none"}):  # the same file every time
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    print(picture)


if __name__ == "__main__":
    main()
