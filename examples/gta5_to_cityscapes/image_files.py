"""Single image files: what a file holds, judged by its content, and its pixels.

Pillow reads PNG, JPEG, BMP and TIFF; no other decoder is tried. Its limit on pixels holds before
anything is decoded. Suffixes are not trusted.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
RGB_16 = "RGB;16B"  # what Pillow calls the content of a 16-bit RGB PNG, which it opens as "RGB"

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_GRAY_16 = ("I;16", "I;16B", "I;16L")
_SIDEWAYS = (5, 6, 7, 8)  # Exif orientations that exchange width and height
_SCALED_GRAY = {"L;2": 85, "L;4": 17}  # Pillow stretches gray of 2 and 4 bits to 0-255
# Content that is often found where an image should be.
_STRANGERS = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"<": "a web page or other text",
    b"PK\x03\x04": "a zip archive",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a damaged PNG",
    b"\xff\xd8": "a damaged JPEG",
}


class DatasetError(Exception):
    """A data set on disk is not what its reader expects; the message names the file."""


class Header(NamedTuple):
    """Properties of an image file that are known without decoding its pixels."""

    format: str
    """PNG, JPEG, BMP or TIFF."""
    mode: str
    """Pillow's mode, or `RGB_16`."""
    size: tuple[int, int]
    """Width and height of the upright image, after its Exif orientation."""


def read_header(path: Path) -> Header:
    """Return the header of an image file that is complete.

    The end of a PNG or JPEG is read, and where it is not the end of the image, all of the file.

    Raises:
        DatasetError: If the file is no image, is cut off, or has too many pixels.
    """
    with _opened(path) as image:
        is_rgb_16 = image.format == "PNG" and any(tile.args == RGB_16 for tile in image.tile)
        mode, size = RGB_16 if is_rgb_16 else image.mode, image.size
        if _orientation(image) in _SIDEWAYS:
            size = size[::-1]
        header = Header(str(image.format), mode, size)
        if not _ends_well(path, header.format):
            if header.format == "PNG":
                image.verify()  # reads the chunks and their checksums, to the last
            else:
                image.load()
        return header


def read_rgb(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Gray of 16 bits is reduced to its high byte, as Pillow does with color of 16 bits.

    Raises:
        DatasetError: If the file is not readable, or holds numbers that are no colors.
    """
    with _opened(path) as image:
        image.load()
        if image.mode in _GRAY_16 or (image.mode == "I" and image.format == "PNG"):
            high = np.asarray(image).astype(np.uint16) >> 8
            return Image.fromarray(high.astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise DatasetError(
                f"{path}: expected 8 or 16 bits a channel, but got mode {image.mode}, which has "
                "no range of brightness. Convert it to 8 bits."
            )
        if _orientation(image) > 1:
            return ImageOps.exif_transpose(image).convert("RGB")
        return image.convert("RGB")


def read_gray_ids(path: Path) -> NDArray[np.integer]:
    """Read the numbers (H, W) that an image of one channel stores, or of three equal ones.

    Raises:
        DatasetError: If the file is not readable, or in color.
    """
    with _opened(path) as image:
        args = image.tile[0].args if image.tile else None
        raw_mode = args[0] if isinstance(args, tuple) else args
        image.load()
        ids = np.asarray(image)
        if ids.ndim == 3:
            if not (ids == ids[..., :1]).all():
                raise DatasetError(
                    f"{path}: expected one channel of ids, but got colors. Save the class id of "
                    "each pixel, in a PNG of one channel."
                )
            ids = ids[..., 0]
        if ids.dtype == np.bool_:
            return ids.astype(np.uint8)
        return ids // np.uint8(_SCALED_GRAY[raw_mode]) if raw_mode in _SCALED_GRAY else ids


def read_first_channel(path: Path) -> NDArray[np.uint16]:
    """Read the first channel (H, W) of a 16-bit RGB PNG, without loss.

    Raises:
        DatasetError: If the file is not readable.
    """
    # Pillow keeps the high byte of a 16-bit sample, which is 0 in every class id. If told that the
    # samples are little-endian, it keeps the low byte. Together they are the sample.
    high, low = (_first_channel_as(path, raw_mode) for raw_mode in ("RGB;16B", "RGB;16L"))
    return np.asarray(high.astype(np.uint16) << 8 | low, np.uint16)


def _first_channel_as(path: Path, raw_mode: str) -> NDArray[np.uint8]:
    with _opened(path) as image:
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        image.load()
        return np.asarray(image)[..., 0]


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image file, and name it in whatever goes wrong until it is closed."""
    try:
        if not path.is_file():  # a folder, or a pipe that would be waited for without end
            raise OSError("no such file" if not path.exists() else "not a regular file")
        if path.stat().st_size == 0:
            raise OSError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)
        with image:
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(
            f"{path} has too many pixels to be read safely ({error}) Cut it into tiles."
        ) from error
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        raise DatasetError(
            f"{path} is not a readable image (expected PNG, JPEG, BMP or TIFF, but it looks like "
            f"{_guess(path)}). Convert it, or unpack or download it again."
        ) from error
    except Exception as error:  # Decoding what is damaged may raise any.
        raise DatasetError(
            f"{path} is not a readable image ({error}). Unpack or download it again."
        ) from error


def _ends_well(path: Path, image_format: str) -> bool:
    """Return True if the file ends with the marker that ends an image of its format."""
    end = _ENDS.get(image_format)
    if end is None:
        return False
    with path.open("rb") as file:
        file.seek(-min(len(end), path.stat().st_size), 2)
        return file.read() == end


def _orientation(image: Image.Image) -> int:
    # Asking a PNG decodes it. Cameras write JPEG.
    if image.format != "JPEG":
        return 1
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _guess(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(32)
    found = [kind for magic, kind in _STRANGERS.items() if start.lstrip().startswith(magic)]
    return found[0] if found else f"bytes {start[:8]!r}"
