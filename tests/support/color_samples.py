"""Make a chart of twelve colours, and videos of it in any colour space, by the formulas of the standards."""

import io
from typing import Any

import av
import numpy as np
from PIL import ImageCms

CHART = np.array(
    [
        [(255, 255, 255), (192, 192, 192), (128, 128, 128), (64, 64, 64)],
        [(0, 0, 0), (200, 30, 30), (30, 160, 30), (30, 30, 200)],
        [(220, 180, 140), (240, 200, 20), (20, 180, 200), (180, 40, 170)],
    ],
    np.float64,
)
# From linear sRGB, as IEC 61966-2-1 and BT.2087 print them.
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])


def linear(colors: np.ndarray) -> np.ndarray:
    """Compute linear light, 0..1, of sRGB colours 0..255."""
    coded = colors / 255
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def srgb(light: np.ndarray) -> np.ndarray:
    """Encode linear light as sRGB, 0..1."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pq(nits: np.ndarray) -> np.ndarray:
    """Encode light in nits as PQ, 0..1 (BT.2100)."""
    powered = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375


def hlg(nits: np.ndarray) -> np.ndarray:
    """Encode light in nits on a display of 1000 nits as HLG, 0..1 (BT.2100)."""
    displayed = nits / 1000
    luminance = (displayed @ np.array([0.2627, 0.6780, 0.0593])).clip(1e-9)
    scene = displayed * luminance[..., None] ** (1 / 1.2 - 1)
    logarithm = 0.17883277 * np.log((12 * scene - 0.28466892).clip(1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)


def chart_pixels(coded: np.ndarray, width: int, height: int, depth: int = 16) -> np.ndarray:
    """Draw coded colours [3, 4, 3], 0..1, as patches of a picture [height, width, 3] of unsigned integers."""
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    dtype = np.uint16 if depth == 16 else np.uint8
    return (coded[rows][:, columns].clip(0, 1) * (2**depth - 1)).round().astype(dtype)


def chart_video(
    coded: np.ndarray = CHART / 255,
    *,
    size: tuple[int, int] = (320, 240),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    container: str = "mp4",
    matrix: int = 5,
    **tags: int,
) -> bytes:
    """Encode coded colours with a YUV matrix (number of swscale) and tags of the stream (numbers of H.273)."""
    buffer = io.BytesIO()
    width, height = size
    picture = av.VideoFrame.from_ndarray(chart_pixels(coded, width, height), format="rgb48le")
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=24, options={"crf": "8", "x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        frame = picture.reformat(
            format=pixels, dst_colorspace=matrix, dst_color_range=tags.get("color_range", 1), interpolation="BICUBIC"
        )
        for name, value in {"colorspace": 2, **tags}.items():
            setattr(frame, name, value)
        for index in range(3):
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def patches(image: np.ndarray) -> np.ndarray:
    """Return the middle colours of the chart's patches in a picture [H, W, 3]: [3, 4, 3]."""
    height, width = image.shape[:2]
    rows, columns = [height * (2 * r + 1) // 6 for r in range(3)], [width * (2 * c + 1) // 8 for c in range(4)]
    return image[rows][:, columns].astype(np.float64)


def profile_of(primaries: str) -> bytes:
    """An ICC profile of primaries that Pillow cannot make: sRGB's with other colours of red, green and blue."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    to_d50 = np.array([[1.0478, 0.0229, -0.0501], [0.0295, 0.9905, -0.0171], [-0.0092, 0.0150, 0.7521]])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    matrix = to_d50 @ to_xyz @ np.linalg.inv({"P3": TO_P3, "BT.2020": TO_BT2020}[primaries])
    for number in range(int.from_bytes(content[128:132], "big")):
        entry = content[132 + 12 * number : 144 + 12 * number]
        if (column := (b"rXYZ", b"gXYZ", b"bXYZ").index(entry[:4]) if entry[1:4] == b"XYZ" else -1) >= 0:
            at = int.from_bytes(entry[4:8], "big") + 8
            values = (matrix[:, column] * 65536).round().astype(int).tolist()
            content[at : at + 12] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    return bytes(content)
