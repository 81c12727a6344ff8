"""List published Physics-IQ scores."""

from typing import NamedTuple


class Published(NamedTuple):
    """Hold one row of the benchmark's own table.

    Attributes:
        conditioning: "image", or "video" for a model that sees several frames.
        physics_iq: percent.
        source: arXiv number of the paper that reports it, or a GitHub repository.
    """

    model: str
    conditioning: str
    physics_iq: float
    source: str


TABLE = "https://github.com/google-deepmind/physics-IQ-benchmark, README.md at e457754"

PUBLISHED = (
    Published("Magi-1 + WMReward, best of N", "video", 62.6, "2601.10553"),
    Published("Magi-1", "video", 56.0, "2505.13211"),
    Published("Sora2 + WMReward, best of N", "image", 46.4, "2601.10553"),
    Published("Wan2.2 + WMReward, best of N", "image", 44.4, "2601.10553"),
    Published("Sora2", "image", 42.3, "2601.10553"),
    Published("Wan2.2", "image", 38.3, "2601.10553"),
    Published("Magi-1 + WMReward, best of N", "image", 36.9, "2601.10553"),
    Published("Video-GPT", "video", 35.0, "2505.12489"),
    Published("CogVideoX-5b", "image", 32.3, "ved015/CogVideoX-5b-Physics_iq_benchmarking"),
    Published("Magi-1", "image", 30.2, "2505.13211"),
    Published("VideoPoet", "video", 29.5, "2501.09038"),
    Published("Lumiere", "video", 23.0, "2501.09038"),
    Published("Runway Gen 3", "image", 22.8, "2501.09038"),
    Published("VideoPoet", "image", 20.3, "2501.09038"),
    Published("Lumiere", "image", 19.0, "2501.09038"),
    Published("Stable Video Diffusion", "image", 14.8, "2501.09038"),
    Published("Pika", "image", 13.0, "2501.09038"),
    Published("Sora", "image", 10.0, "2501.09038"),
)
