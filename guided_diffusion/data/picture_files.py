"""Opening picture files: what their headers say, which formats change ids, and damage as errors that name the file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from PIL import Image

from .listing import open_stream
from .specs import DataError

_ORIENTATION = 0x0112
_SUBFILE, _NO_PAGE = 254, 5  # tag NewSubfileType of TIFF, and its bits for a smaller copy (1) and a mask (4)
TURNS = {  # what an orientation tag asks a viewer to do with the stored pixels
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**TURNS, 6: TURNS[8], 8: TURNS[6]}  # all others are their own inverse
# What gives a map's ids back as they were stored, by the decoder's word: a file's name may say anything.
_LOSSLESS = ("PNG", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "PCX", "SGI")
_LOSSLESS_TIFF = (
    "raw",
    "packbits",
    "group3",
    "group4",
    "lzma",
    "zstd",
    "tiff_raw",
    "tiff_lzw",
    "tiff_adobe_deflate",
    "tiff_deflate",
    "tiff_ccitt",
)  # fmt: skip  (beginnings of a compression's name)
COLORS = ("RGB", "RGBA", "RGBX")  # modes with three channels of colour at the front
SCALED = ("L;2", "L;4")  # raw modes of grey that Pillow spreads over 0 to 255


@dataclass(frozen=True)
class Header:
    """What a file says of its pixels: (width, height) as stored, Pillow's mode, and the raw mode (`L;4`, `RGB;16B`; the
    mode again where the format has none); of a TIFF also the compression."""

    format: str
    size: tuple[int, int]
    mode: str
    raw_mode: str
    compression: str = ""


def lossy_format(header: Header) -> str | None:
    """The name of the format where it may change ids; None where it gives them back as they were stored."""
    if header.format not in _LOSSLESS:
        return header.format or "an unknown format"
    if header.format == "TIFF" and not header.compression.startswith(_LOSSLESS_TIFF):
        return f"TIFF with compression {header.compression or 'unknown'}"
    return None


def read_header(picture: Image.Image) -> Header:
    """Of a picture that was opened and not decoded: decoding forgets the raw mode."""
    size, raw_mode = picture.size, picture.mode
    if picture.format in ("PNG", "TIFF") and picture.tile:
        arguments = picture.tile[0][3]
        raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    if picture.format == "TIFF":  # newer versions of Pillow give the turned size
        size = picture.tag_v2[256], picture.tag_v2[257]
    compression = str(picture.info.get("compression", "")) if picture.format == "TIFF" else ""
    return Header(picture.format, size, picture.mode, raw_mode, compression)


def read_orientation(picture: Image.Image) -> int:
    """The orientation tag, 1 where there is none. Decoding a TIFF turns it and removes the tag; this decodes a PNG."""
    return picture.getexif().get(_ORIENTATION, 1)


def open_undecoded(path: str, kind: str, max_pixels: int | None = None) -> Image.Image:
    """Pillow's picture of a file whose header is read. Raises DataError where it has more than `max_pixels`, by default
    as many as Pillow opens (twice its `MAX_IMAGE_PIXELS`); and what Pillow raises for other faults."""
    if max_pixels is None and Image.MAX_IMAGE_PIXELS:
        max_pixels = 2 * Image.MAX_IMAGE_PIXELS
    with _any_size():
        image = Image.open(open_stream(path))
    pixels = image.width * image.height
    if max_pixels and pixels > max_pixels:
        raise DataError(
            f"the {kind} {path} is too large to read safely ({round(pixels / 1e6)} megapixels): cut it into tiles with"
            f' scripts/data/tile_dataset.py, or raise "max_pixels" in dataset.json (dataset_mode custom) to {pixels}'
        )
    return image


_limit = threading.RLock()  # Pillow's limit is a variable that all threads share


@contextmanager
def _any_size() -> Iterator[None]:
    """Pillow's own limit is off, with its warning, for reading one file."""
    with _limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def count_pages(picture: Image.Image) -> int:
    """Pictures in one file (pages, frames), without smaller copies and masks of the first as maps in TIFF have them.

    A JPEG of a camera may hold a preview or a depth map behind the photograph (MPO): that counts as one.
    """
    if picture.format not in ("TIFF", "GIF", "PNG", "WEBP") or getattr(picture, "n_frames", 1) == 1:
        return 1
    pages = picture.n_frames
    if picture.format == "TIFF":
        for page in range(1, picture.n_frames):
            picture.seek(page)
            pages -= bool(picture.tag_v2.get(_SUBFILE, 0) & _NO_PAGE)
    picture.seek(0)
    return pages


def open_picture(
    path: str, kind: str, turnable: bool = False, max_pixels: int | None = None
) -> tuple[Image.Image, Header, int]:
    """The decoded picture as stored, its header and orientation tag; errors become DataErrors that name the file.

    The tag is read from TIFFs, which Pillow turns, and where the caller wants to know it (`turnable`), else given as 1:
    a damaged EXIF block does no harm where it is not used.
    """
    try:
        image = open_undecoded(path, kind, max_pixels)
        if (pages := count_pages(image)) > 1:
            raise DataError(
                f"the {kind} {path} holds {pages} pages, of which readers take the first; save the one that is meant as"
                " a file of its own"
            )
        header = read_header(image)
        orientation = read_orientation(image) if turnable or header.format == "TIFF" else 1
        with _any_size() if header.format == "TIFF" else nullcontext():  # where Pillow asks again
            image.load()
        if header.format == "TIFF" and orientation in _BACK and read_orientation(image) == 1:
            image = image.transpose(_BACK[orientation])  # Pillow turned it
        return image, header, orientation
    except FileNotFoundError as error:
        raise DataError(f"the {kind} {path} does not exist, or not any more") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise DataError(
            f"the {kind} {path} cannot be read ({error}); replace it or remove it with its partners"
        ) from error
