"""Make videos with pusa's own client, also by what the `openai` package lacks (progress, previews, keyframes).

pusa serve
python examples/pusa_client.py --image fox.png
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from pusa.client import AsyncPusaClient, JobFailedError, Keyframe, PusaClient, PusaError, Video


def show(video: Video) -> None:
    print(f"  {video.id[:12]} {video.status} {video.progress} % {video.stage}")


def run(client: PusaClient, image: Path, folder: Path, quick: dict[str, Any]) -> None:
    state = client.wait_until_ready(on_progress=lambda s: print(f"  {s.stage} {s.percent:.0f} %"))
    print("ready:", state.message, "| models:", ", ".join(model["id"] for model in client.models()))

    print("text to video")
    first = client.create_and_wait("a rabbit bounces at the beach", seed=7, on_progress=show, **quick)
    for variant, name in (("video", "first.mp4"), ("thumbnail", "first.webp"), ("spritesheet", "first-sheet.webp")):
        print("  wrote", client.download(first.id, variant, to=folder / name))

    print("image to video, followed by its events")
    job = client.create("a rabbit bounces", image=image, noise_multiplier=0.2, **quick)
    for event in client.events(job.id):
        if event.preview:
            (folder / "preview.webp").write_bytes(event.preview)
        if event.video:
            print(f"  {event.name} {event.video.stage} {event.video.step}/{event.video.steps}")

    print("keyframes")
    keys = [Keyframe(image, 0, noise=0.0), Keyframe(image, "last", noise=0.5)]
    show(client.create_and_wait("a rabbit moves", keyframes=keys, **quick))

    print("a file on the server: one frame of a clip, and a piece of it")
    kept = client.upload_file(folder / "first.mp4")
    still = {"file_id": kept.id, "frame": -1, "crop": [0.25, 0.25, 0.5, 0.5]}
    show(client.create_and_wait("a rabbit bounces", image=still, **quick))
    piece = {"file_id": kept.id, "start": 0, "end": kept.seconds / 2}
    show(client.wait(client.extend(piece, "it bounces on", seconds=1, **quick).id))
    client.delete_file(kept.id)

    print("a remix, an extension by id and by file, a transition")
    show(client.wait(client.remix(first.id, "a cat bounces at the beach").id))
    longer = client.wait(client.extend(first.id, "it bounces on", seconds=1, **quick).id)
    show(longer)
    show(client.wait(client.extend(folder / "first.mp4", "it bounces on", seconds=1, **quick).id))
    show(client.wait(client.edit([first.id, longer.id], "one after the other", num_inference_steps=1).id))

    print("a draft and its final")
    draft = client.create_and_wait("a rabbit bounces at the beach", draft=True)
    show(client.wait(client.final(draft.id, noise_multiplier=0.7).id))

    print("a video that is watched while it is made")
    job = client.create("a rabbit bounces at the beach", schedule="wave", **quick)
    with (folder / "growing.mp4").open("wb") as file:
        for piece in client.stream(job.id):
            file.write(piece)
    show(client.wait(job.id))

    print("an edit, stopped")
    job = client.edit(first.id, "a cat bounces", **quick)
    client.cancel(job.id)
    try:
        client.wait(job.id)
    except JobFailedError as error:
        print("  ", error.code)

    print("all of them, oldest first")
    for video in client.list(order="asc", page_size=3):
        show(video)
    client.delete(job.id)
    try:
        client.retrieve(job.id)
    except PusaError as error:
        print("  deleted:", error.code)


async def run_async(client: AsyncPusaClient, quick: dict[str, Any]) -> None:
    print("two at once")
    jobs = [client.create_and_wait(f"a {thing} bounces", **quick) for thing in ("cat", "fox")]
    for video in await asyncio.gather(*jobs):
        show(video)


async def main_async(args: argparse.Namespace, quick: dict[str, Any]) -> None:
    async with AsyncPusaClient(args.url, args.key) as client:
        await run_async(client, quick)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--key", help="API key, where the server wants one")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(), help="where downloads go")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=17)
    args = parser.parse_args()
    quick = {"num_inference_steps": args.steps, "num_frames": args.frames}
    with PusaClient(args.url, args.key) as client:
        run(client, args.image, args.folder, quick)
    asyncio.run(main_async(args, quick))


if __name__ == "__main__":
    main()
