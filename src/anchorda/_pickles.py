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
    """Why a file is not one of arrays, as the end of a sentence about it."""


@dataclass
class _Built:
    """What a pickle asks to be built: by which global, from which arguments, with which state."""

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
    """The numbers of a tensor, which lie outside of the pickle. Where they lived is not kept."""

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
    *("torch._utils._rebuild_tensor_v2", "collections.OrderedDict"),
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
    """What a file holds: plain values, and descriptions of which `to_tensor` makes tensors.

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
    """A tensor, on the CPU, from the description of an array or tensor of numbers."""
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
            flat = np.frombuffer(raw, np.dtype(str(order) + code))
            array = flat.reshape(shape, order="F" if is_fortran else "C")
            # A copy in this machine's byte order, and in a dtype that torch has, exact for counts.
            return torch.from_numpy(array.astype(np.float64 if code[0] == "f" else np.int64))
        case _Built(
            "_rebuild_tensor_v2",
            (_Storage(dtype, data), int(offset), tuple(size), tuple(stride), *_),
        ):
            if math.prod(size) > len(data):
                raise UnfitError("it holds a tensor that is larger than its data")
            # Checked by torch to stay within the data.
            return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(size, stride, offset)
    other = "an array of another kind" if isinstance(value, _Built) else type(value).__name__
    raise UnfitError(f"it holds {other} in place of an array of numbers")


def _read_archive(archive: zipfile.ZipFile) -> object:
    """The format of torch since 1.6: a pickle and storages, as files of a folder in an archive."""
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
    """The format of torch before 1.6, after its magic number: pickles, then the storages."""
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
