"""Files of ``torch.save`` and ``pickle.dump`` as plain values and tensors, without running them.

A pickle is a program: loading it calls what it names. Here it is read into a description, of which
tensors are made. Nothing that a file names is ever imported or called, and a file that names
anything but what an array consists of is refused.
"""

import io
import math
import pickle
import zipfile
from dataclasses import dataclass
from typing import IO, final

import numpy as np
import torch
from torch import Tensor


class UnfitError(ValueError):
    """A file that is not one of arrays; the message ends a sentence about the file."""


@dataclass
class _Built:
    """An object that a pickle describes: the global that builds it, its arguments and state."""

    name: str
    arguments: tuple[object, ...]
    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Leave out the items of an ordered dict, which no array has."""


@dataclass
class _Global:
    """A global that a pickle names. A call of it is noted, not made."""

    name: str

    def __call__(self, *arguments: object) -> _Built:
        return _Built(self.name, arguments)


@dataclass
class _Storage:
    """The numbers of a tensor, which are stored outside of the pickle, without their device."""

    dtype: torch.dtype
    data: bytes = b""


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
# None of them is imported; these are the names that arrays and tensors are described with.
_GLOBALS = {
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    "collections.OrderedDict",
    *(f"torch.{storage}" for storage in _STORAGES),
}
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what files of torch before 1.6 begin with


@final
class _Reader(pickle._Unpickler):
    """Reads a pickle into plain values, `_Global`, `_Built` and `_Storage`.

    It builds on the unpickler in Python, as that in C takes registered extensions from a cache
    without asking.
    """

    def __init__(self, pickled: IO[bytes]) -> None:
        super().__init__(pickled)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> _Global:
        if not name:
            raise pickle.UnpicklingError("it ends within a name")
        if f"{module}.{name}" not in _GLOBALS:
            raise UnfitError(
                f"it names {module}.{name}, which no array needs; nothing of it was run"
            )
        return _Global(name)

    def load_bytearray8(self) -> None:
        """Read as bytes what the writer could have changed: no size in the file is allocated."""
        read = self.read  # type: ignore[attr-defined]
        self.append(read(int.from_bytes(read(8), "little")))  # type: ignore[attr-defined]

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}  # type: ignore[assignment]

    def get_extension(self, code: int) -> None:
        raise UnfitError(f"it names the pickle extension {code}; nothing of it was run")

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", _Global(kind), str(key), str(), int()) | (
                "storage",
                _Global(kind),
                str(key),
                str(),
                int(),
                None,  # in files of torch before 1.6: a view of another storage, never in use
            ):
                return self.storages.setdefault(key, _Storage(_STORAGES[kind]))
        raise pickle.UnpicklingError("it refers to what is outside of it")


def read(file: IO[bytes]) -> object:
    """Return the content of a file: plain values, and descriptions for `to_tensor`.

    Raises:
        UnfitError: if it names what no array needs.
        Exception: of any kind, if it is damaged.
    """
    is_archive = file.read(2) == b"PK"
    file.seek(0)
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive)
    content = _Reader(file).load()
    return _read_old(file) if content == _TORCH_MAGIC else content


def to_tensor(value: object) -> Tensor:
    """Return a tensor, on the CPU, from the description of an array or tensor of numbers."""
    match value:
        case _Built(
            "_reconstruct",
            state=(
                _,
                tuple(shape),
                _Built("dtype", (str(code), *_), (_, "<" | ">" | "|" as order, *_)),
                bool(is_fortran),
                bytes() | _Built("encode", (str(), "latin1")) as data,
            ),
        ) if code in _DTYPES:
            raw = data if isinstance(data, bytes) else str(data.arguments[0]).encode("latin1")
            return _from_bytes(raw, order + code, shape, "F" if is_fortran else "C")
        case _Built(
            "_frombuffer",  # of pickle protocol 5
            (
                bytes() as raw,
                _Built("dtype", (str(code), *_), (_, "<" | ">" | "|" as order, *_)),
                tuple(shape),
                "C" | "F" as layout,
            ),
        ) if code in _DTYPES:
            return _from_bytes(raw, order + code, shape, layout)
        case _Built("_rebuild_parameter", (tensor, *_)):
            return to_tensor(tensor)
        case _Built(
            "_rebuild_tensor_v2",
            (_Storage(dtype, data), int(offset), tuple(size), tuple(stride), *_),
        ):
            if math.prod(size) > len(data):
                raise UnfitError("it holds a tensor that is larger than its data")
            # Checked by torch to stay within the data.
            return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(size, stride, offset)
        case _Built("OrderedDict"):
            raise UnfitError(
                "it is the state_dict of a module, which its load_state_dict takes, as in "
                "CategoryAnchors(...).load_state_dict(torch.load(path, weights_only=True))"
            )
    other = "an array of another kind" if isinstance(value, _Built) else type(value).__name__
    raise UnfitError(f"it holds {other} in place of an array of numbers")


def _from_bytes(raw: bytes, dtype: str, shape: tuple[object, ...], layout: str) -> Tensor:
    """Copy an array into this machine's byte order and a dtype that torch has, exact for counts."""
    array = np.frombuffer(raw, np.dtype(dtype)).reshape(shape, order=layout)  # type: ignore[call-overload]
    copied: np.ndarray = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    return torch.from_numpy(copied)


# What files of other formats begin with, and what they are.
_FORMATS = {
    b"\x93NUMPY": "a NumPy .npy file. Pass numpy.load(path) to CategoryAnchors.from_centroids",
    b"version https://git-lfs": "a Git LFS pointer, not the file. Fetch it with git lfs pull",
    b"\x89HDF": "an HDF5 file",
    b"MATLAB": "a MATLAB file",
    b"\x1f\x8b": "compressed by gzip. Unpack it first",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF file",
    b"<": "a page of HTML or XML, as a failed download leaves behind",
    b"{": "text, such as JSON. Pass its numbers to CategoryAnchors.from_centroids as an array",
    b"[": "text, such as JSON. Pass its numbers to CategoryAnchors.from_centroids as an array",
}


def format_of(file: IO[bytes]) -> str | None:
    """Name the format of a file that is not one of ``torch.save`` or ``pickle.dump``, if known."""
    file.seek(0)
    head = file.read(64)
    if not head:
        return "empty"
    if head.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            arrays = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
        if arrays:
            names = ", ".join(repr(name[:40]) for name in arrays[:5])
            return (
                f"a NumPy .npz file of {names}. Pass one of its arrays to "
                f"CategoryAnchors.from_centroids, as numpy.load(path)[{arrays[0][:40]!r}]"
            )
    if head[8:10] == b'{"':
        return "a safetensors file. Pass one of its tensors to CategoryAnchors.from_centroids"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for magic, kind in _FORMATS.items() if start.startswith(magic)), None)


def _read_archive(archive: zipfile.ZipFile) -> object:
    """Read the format of torch since 1.6: an archive of a pickle and storages."""
    folder = archive.namelist()[0].partition("/")[0]

    def member(name: str) -> bytes:
        info = archive.getinfo(f"{folder}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            # Small compressed data may unpack to any size.
            raise pickle.UnpicklingError("it is compressed, which torch never does")
        return archive.read(info)

    reader = _Reader(io.BytesIO(member("data.pkl")))
    content = reader.load()
    for key, storage in reader.storages.items():
        storage.data = member(f"data/{key}")
    return content


def _read_old(file: IO[bytes]) -> object:
    """Read the format of torch before 1.6 after its magic number: pickles, then storages."""
    _Reader(file).load()  # the version of the format
    _Reader(file).load()  # the sizes of the writer's types
    reader = _Reader(file)
    content = reader.load()
    keys = _Reader(file).load()
    # All that is left, so that no size in the file decides how much is read.
    numbers = io.BytesIO(file.read())
    for key in keys:
        storage = reader.storages[key]
        size = int.from_bytes(numbers.read(8), "little") * storage.dtype.itemsize
        storage.data = numbers.read(min(size, len(numbers.getbuffer())))
        if not size or len(storage.data) < size:
            raise pickle.UnpicklingError("it ends within its numbers")
    return content
