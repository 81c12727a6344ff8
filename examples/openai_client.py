"""Make videos with the official `openai` package (2.2 or newer), unmodified.

    pusa serve
    python examples/openai_client.py --url http://127.0.0.1:7860/v1 --image fox.png

The package marks `client.videos` as deprecated, since the service that it was written for closes; the calls go on to
work with servers that speak the same API.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import openai

warnings.filterwarnings(
    "ignore", message="The Sora API is scheduled to permanently shut down", category=DeprecationWarning
)


def show(what: str, video: Any) -> None:
    print(f"{what:<20} {video.id} {video.status} {video.progress} % {video.size} {video.seconds} s")


def finished(client: openai.OpenAI, what: str, video: Any) -> Any:
    """The video when it is there. `poll` asks as often as the server says."""
    video = client.videos.poll(video.id)
    if video.status != "completed":
        raise SystemExit(f"{what}: {video.error.code}: {video.error.message}")
    show(what, video)
    return video


def run(client: openai.OpenAI, image: Path, folder: Path, quick: dict[str, Any]) -> None:
    """Every call. `quick` are fields that the package does not know (steps, frames...): they go in `extra_body`."""
    first = client.videos.create(prompt="a rabbit bounces at the beach", size="96x64", extra_body=quick)
    show("accepted", first)
    first = finished(client, "text to video", first)

    with image.open("rb") as picture:
        moved = client.videos.create_and_poll(
            prompt="a rabbit bounces", input_reference=picture, extra_body={**quick, "noise_multiplier": 0.2}
        )
    show("image to video", moved)

    # Keyframes: one JSON string; `file` counts the files of input_reference.
    places = [{"latent": 0, "file": 0, "noise": 0.0}, {"time": "last", "file": 1, "noise": 0.5}]
    between = client.videos.create(
        prompt="a rabbit moves",
        input_reference=[("start.png", image.read_bytes()), ("end.png", image.read_bytes())],
        extra_body={**quick, "keyframes": json.dumps(places)},
    )
    finished(client, "keyframes", between)

    for variant, name in (("video", "rabbit.mp4"), ("thumbnail", "rabbit.webp"), ("spritesheet", "rabbit-sheet.webp")):
        client.videos.download_content(first.id, variant=variant).write_to_file(folder / name)
        print(f"{'downloaded':<20} {folder / name} ({(folder / name).stat().st_size} bytes)")

    finished(client, "remix", client.videos.remix(first.id, prompt="a cat bounces at the beach"))

    if hasattr(client.videos, "extend"):  # the first releases with videos have neither extend nor edit
        # A finished video goes by its id. The package cannot send that beside its own fields: it goes in extra_body.
        by_id = {**quick, "video": {"id": first.id}}
        longer = client.videos.extend(prompt="it bounces on", seconds="1", video=openai.omit, extra_body=by_id)
        finished(client, "extended", longer)
        with (folder / "rabbit.mp4").open("rb") as mp4:  # or as a file
            finished(client, "edited", client.videos.edit(prompt="a cat bounces", video=mp4, extra_body=quick))

    stopped = client.videos.create(prompt="a fish", extra_body=quick)
    client.post(f"/videos/{stopped.id}/cancel", cast_to=object)
    stopped = client.videos.retrieve(stopped.id)
    show("cancelled", stopped)

    for video in client.videos.list(limit=2, order="asc"):
        show("listed", video)
    for video in (stopped, between):
        print(f"{'deleted':<20} {video.id} {client.videos.delete(video.id).deleted}")
    try:
        client.videos.retrieve(stopped.id)
    except openai.NotFoundError as error:
        print(f"{'and gone':<20} {error.code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:7860/v1")
    parser.add_argument("--key", default="none", help="API key, where the server wants one")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(), help="where downloads go")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=17)
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url, api_key=args.key)
    print(f"openai {openai.__version__}")
    run(client, args.image, args.folder, {"num_inference_steps": args.steps, "num_frames": args.frames})


if __name__ == "__main__":
    main()
