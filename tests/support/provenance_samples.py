"""Make what the tests of provenance share: independent readers, a certificate, an input full of personal data."""

import json
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from needs import missing
from PIL import ExifTags, Image

PERSONAL = (
    "PLANTED-MAKER",
    "PLANTED-MODEL",
    "PLANTED-CREATOR",
    "PLANTED-DOCUMENT",
    "planted-folder",
    "PLANTED-COMMENT",
)
LATITUDE = 48.137154
XMP_OF_A_PERSON = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
 xmlns:dcterms="http://purl.org/dc/terms/" xmpMM:DocumentID="PLANTED-DOCUMENT" xmpMM:InstanceID="PLANTED-DOCUMENT"
 dcterms:provenance="http://127.0.0.1:9/PLANTED-DOCUMENT">
 <dc:creator><rdf:Seq><rdf:li>PLANTED-CREATOR</rdf:li></rdf:Seq></dc:creator></rdf:Description></rdf:RDF></x:xmpmeta>"""


def exiftool(path: Path) -> dict[str, Any]:
    """Read a file's metadata with exiftool, by group and name; skip the test where it is not installed."""
    if shutil.which("exiftool") is None:
        missing("exiftool", "it is not installed: apt-get install libimage-exiftool-perl")
    output = subprocess.run(["exiftool", "-json", "-G1", "-struct", str(path)], capture_output=True, check=True).stdout
    return json.loads(output)[0]


def ffprobe(path: Path) -> dict[str, Any]:
    """Read a video's tags with ffprobe; skip the test where it is not installed."""
    if shutil.which("ffprobe") is None:
        missing("ffprobe", "it is not installed: apt-get install ffmpeg")
    command = ["ffprobe", "-v", "error", "-export_xmp", "1", "-of", "json", "-show_format", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["format"]["tags"]


def personal_photograph(path: Path, width: int = 120, height: int = 80) -> Path:
    """Save a photograph as a phone does: position, maker, preview, XMP, lying on its side; its corner is a secret."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (width, height, 3), np.uint8)  # turned by EXIF
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "PLANTED-MAKER", "PLANTED-MODEL"
    exif[ExifTags.Base.Orientation] = 6
    position = exif.get_ifd(ExifTags.IFD.GPSInfo)
    position[ExifTags.GPS.GPSLatitudeRef], position[ExifTags.GPS.GPSLatitude] = "N", (48.0, 8.0, 13.7544)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0PLANTED-COMMENT"
    Image.fromarray(pixels).save(path, exif=exif, xmp=XMP_OF_A_PERSON, comment=b"PLANTED-COMMENT", quality=95)
    return path


def personal_video(path: Path, frames: np.ndarray) -> Path:
    """Save a video as a phone does: place, maker, sound, XMP."""
    import av

    from pusa.media.encoders import append_mp4_xmp

    buffer = BytesIO()
    with av.open(buffer, "w", format="mov", options={"movflags": "use_metadata_tags"}) as output:
        output.metadata.update({"location": "+48.1371+011.5754/", "make": "PLANTED-MAKER", "model": "PLANTED-MODEL"})
        output.metadata["comment"] = "PLANTED-COMMENT"
        stream = output.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    path.write_bytes(buffer.getvalue())
    append_mp4_xmp(path, XMP_OF_A_PERSON)
    return path
