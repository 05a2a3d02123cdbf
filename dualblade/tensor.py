"""Any array as bytes, shape and dtype tag, and back again.

A dtype tag is a string that can be stored, compared with == and turned back into the dtype:

    "float16", "int64", "bool"      little-endian numbers, by numpy's name
    "bfloat16", "float8_e4m3fn"     numbers that numpy alone does not know, by the ml_dtypes name
    ">f4", "<U8", "|S5", "<M8[ns]"  everything else that is one value, by numpy's type string
    {"fields": ...}                 structured dtypes, as JSON

torch is used where it has been imported already and is never imported for its own sake, except by
to_torch().
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dualblade.errors import UnsupportedError

# Numbers of a whole byte or more that ml_dtypes adds to numpy. Narrower ones are packed
# differently by each library, so that their bytes mean nothing without it.
_ML_ITEMSIZE = {
    "bfloat16": 2,
    "complex32": 4,
    "float8_e3m4": 1,
    "float8_e4m3": 1,
    "float8_e4m3b11fnuz": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_TORCH_NAMES = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 bfloat16 "
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu".split()
)
# DLPack's type codes; those without a width carry it in the name.
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_DLPACK_NAMES = {
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
}
_DLPACK_HOST_DEVICES = frozenset({1, 3})  # kDLCPU, and kDLCUDAHost: pinned host memory


class Tensor(NamedTuple):
    """An array as the store sees it."""

    data: memoryview
    """Every byte in C order: format "B", one dimension, contiguous."""
    shape: tuple[int, ...]
    dtype: str
    """A dtype tag."""
    owner: object
    """Has to stay alive as long as `data` is used."""
    copied: bool
    """True if `data` is a copy of the caller's memory, made because it was not contiguous."""


# ---- dtype tags ---------------------------------------------------------------------------------


def dtype_tag(dtype: Any) -> str:
    """The one tag of a dtype.

    Takes a numpy dtype or scalar type, a dtype's name or type string, an ml_dtypes type, a torch
    dtype, or a tag. Raises TypeError if it is no dtype or holds Python objects, UnsupportedError
    for numbers narrower than a byte and types of unknown layout.
    """
    if dtype is None:
        raise TypeError("dtype is None; name one, such as 'float16' or numpy.float16")
    torch = _torch()
    if torch is not None and isinstance(dtype, torch.dtype):
        return _tag_of_torch(dtype)
    if isinstance(dtype, str):
        if dtype in _ML_ITEMSIZE:
            return str.__str__(dtype)  # plain, also of a subclass such as numpy.str_
        if dtype.startswith("{"):
            return _tag_of_numpy(numpy_dtype(dtype))
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise TypeError(
            f"{dtype!r} is not a dtype; use a name such as 'float16', 'bfloat16' or 'int64', or a "
            "numpy, ml_dtypes or torch dtype"
        ) from error
    if found.subdtype is not None:
        base, shape = found.subdtype
        raise TypeError(
            f"{dtype!r} is an array of {shape} inside each element; use dtype {base} and put "
            f"{shape} at the end of the shape"
        )
    return _tag_of_numpy(found)


@functools.lru_cache(maxsize=256)
def numpy_dtype(tag: str) -> np.dtype[Any]:
    """The numpy dtype of a tag, in the tag's byte order.

    Raises ValueError if it is no tag, UnsupportedError if the ml_dtypes installed lacks it.
    """
    if tag in _ML_ITEMSIZE:
        return _ml_dtype(tag)
    try:
        if tag.startswith("{"):
            return _from_json(json.loads(tag))
        found = np.dtype(tag)
        # A name means little-endian wherever it is read.
        return found if tag[:1] in "<>|" or found.isnative is _LITTLE else found.newbyteorder("<")
    except (TypeError, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"{tag!r} is not a dtype tag that this version knows") from error


def itemsize(tag: str) -> int:
    """Bytes of one element."""
    return _ML_ITEMSIZE.get(tag) or numpy_dtype(tag).itemsize


_LITTLE = sys.byteorder == "little"


def _ml_dtype(name: str) -> np.dtype[Any]:
    if not hasattr(ml_dtypes, name):
        raise UnsupportedError(
            f"ml_dtypes {ml_dtypes.__version__} has no {name}: pip install --upgrade ml_dtypes"
        )
    return np.dtype(getattr(ml_dtypes, name))


@functools.lru_cache(maxsize=256)
def _tag_of_numpy(dtype: np.dtype[Any]) -> str:
    described = _to_json(dtype)
    if isinstance(described, str):
        return described
    return json.dumps(described, separators=(",", ":"))


def _to_json(dtype: np.dtype[Any]) -> Any:
    if dtype.hasobject:
        raise TypeError(
            f"an array of dtype {dtype} holds references to Python objects, which cannot be stored "
            "as bytes; convert it to numbers or fixed-width strings first, such as "
            "array.astype('float32') or array.astype('U32')"
        )
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _to_json(base), "shape": list(shape)}
    if dtype.fields is not None:
        assert dtype.names is not None
        fields = []
        for name in dtype.names:
            of, offset, *title = dtype.fields[name]
            fields.append([name, _to_json(of), offset, *title])
        return {"fields": fields, "itemsize": dtype.itemsize}
    if dtype.isbuiltin == 2 and dtype.name in _ML_ITEMSIZE:
        return dtype.name
    if dtype.kind not in "biufcSUVmM" or dtype.isbuiltin == 2:
        raise UnsupportedError(
            f"dtype {dtype} is not one that dualblade knows the layout of; store the bytes "
            "instead, such as array.view('uint8')"
        )
    if dtype.kind in "biufc" and dtype.str[0] in "<|":
        return dtype.name
    return dtype.str


def _from_json(described: Any) -> np.dtype[Any]:
    if isinstance(described, str):
        return numpy_dtype(described)
    if "base" in described:
        return np.dtype((_from_json(described["base"]), tuple(described["shape"])))
    fields = described["fields"]
    layout: dict[str, Any] = {
        "names": [field[0] for field in fields],
        "formats": [_from_json(field[1]) for field in fields],
        "offsets": [field[2] for field in fields],
        "itemsize": described["itemsize"],
    }
    if any(len(field) > 3 for field in fields):
        layout["titles"] = [field[3] if len(field) > 3 else None for field in fields]
    return np.dtype(layout)


def _tag_of_torch(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _TORCH_NAMES:
        raise UnsupportedError(
            f"{dtype} has no layout that dualblade knows (quantized or narrower than a byte); "
            "store its bytes instead, such as tensor.view(torch.uint8)"
        )
    return name


# ---- arrays to bytes ----------------------------------------------------------------------------


def describe(array: Any) -> Tensor:
    """The bytes of an array, copied only if they do not lie in C order.

    Takes numpy arrays and scalars, torch tensors in host memory, and whatever has DLPack or the
    buffer protocol (bytes are uint8). Raises TypeError for lists, plain numbers and arrays of
    objects, UnsupportedError for memory that the CPU cannot read and for sparse or quantized
    tensors.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return _describe_numpy(array)
    torch = _torch()
    if torch is not None and isinstance(array, torch.Tensor):
        return _describe_torch(torch, array)
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _describe_dlpack(array)
    try:
        view = memoryview(array)
    except (TypeError, BufferError, ValueError) as error:
        # Of a list or a number the dtype would be a guess, and the guess would be stored for good.
        raise TypeError(
            f"{_type_name(array)} is not an array, it says neither dtype nor shape; pass "
            "numpy.asarray(x, dtype=...), a torch tensor, or an object with DLPack or the buffer "
            "protocol"
        ) from error
    try:
        found = np.asarray(view)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"the elements of this {_type_name(array)} (buffer format {view.format!r}) are of no "
            "kind that numpy knows; pass memoryview(x).cast('B') to store its bytes"
        ) from error
    return _describe_numpy(found)._replace(owner=array)


def memory_of(array: Any) -> tuple[Any, tuple[int, ...], str]:
    """The memory of an array with every byte in C order, its shape, and its dtype tag.

    What `describe` says, without its objects for the arrays that most are: numpy's own, in C order.
    """
    if type(array) is np.ndarray and array.flags.c_contiguous:
        return array, array.shape, _tag_of_numpy(array.dtype)
    found = describe(array)
    return found.data, found.shape, found.dtype


def as_rows(array: Any, row_shape: tuple[int, ...], dtype: str) -> Tensor:
    """The bytes of rows to be appended to a tensor whose rows have row_shape and this dtype tag.

    Raises ValueError if the array is not [rows, *row_shape], TypeError if its dtype differs.
    """
    if fits(array, row_shape, dtype):
        data = memoryview(array.reshape(-1).view(np.uint8))
        return Tensor(data, array.shape, dtype, array, copied=False)
    rows = describe(array)
    if len(rows.shape) != len(row_shape) + 1 or rows.shape[1:] != tuple(row_shape):
        wanted = ", ".join(["rows", *map(str, row_shape)])
        hint = "; for a single row pass array[None]" if rows.shape == tuple(row_shape) else ""
        raise ValueError(f"rows of shape {rows.shape} do not fit: [{wanted}] is wanted{hint}")
    if rows.dtype != dtype:
        raise TypeError(
            f"rows of dtype {rows.dtype} do not fit a tensor of dtype {dtype}; convert them first"
        )
    return rows


def fits(array: Any, row_shape: tuple[int, ...], dtype: str) -> bool:
    """Whether this is what most rows are, numpy's own array in C order of just this shape and dtype
    tag: there is nothing to convert, nor to say about it."""
    return (
        type(array) is np.ndarray
        and array.shape[1:] == row_shape
        and array.size > 0
        and array.flags.c_contiguous
        and _tag_of_numpy(array.dtype) == dtype
    )


def _describe_numpy(array: Any) -> Tensor:
    if _is_masked(array):
        raise TypeError(
            "a masked array would lose its mask; store array.filled(value), or array.data and "
            "array.mask as two tensors"
        )
    plain = np.asarray(array)
    tag = _tag_of_numpy(plain.dtype)
    flat, copied = _flat_bytes(plain)
    return Tensor(memoryview(flat), plain.shape, tag, array, copied)


def _is_masked(array: Any) -> bool:
    # Only who has imported numpy.ma has any, and that takes ten milliseconds.
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(array, masked.MaskedArray)


def _flat_bytes(array: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], bool]:
    """The bytes of an array in C order as uint8 [nbytes], and whether they were copied."""
    if array.nbytes == 0:
        return np.empty(0, np.uint8), False
    copied = not array.flags.c_contiguous
    if copied:
        # As void, a copy takes the padding between fields along instead of leaving stale memory.
        array = array.view(f"V{array.itemsize}").copy(order="C")
    return array.reshape(-1).view(np.uint8), copied


def _describe_torch(torch: Any, array: Any) -> Tensor:
    tag = _tag_of_torch(array.dtype)
    _refuse_torch_off_host(torch, array)
    try:
        plain = array.detach().resolve_conj().resolve_neg().contiguous()
        flat = plain.reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"this {_type_name(array)} gives no access to its memory ({error}); pass a plain torch "
            "tensor with the same values"
        ) from error
    copied = plain.data_ptr() != array.data_ptr()
    return Tensor(memoryview(flat), tuple(array.shape), tag, plain, copied)


def _refuse_torch_off_host(torch: Any, array: Any) -> None:
    if array.device.type != "cpu":
        raise UnsupportedError(
            f"this torch tensor is on device {array.device}, not in host memory; copy it first "
            "with tensor.cpu()"
        )
    if array.layout != torch.strided or array.is_nested:
        raise UnsupportedError(
            "this torch tensor is sparse or nested; store its parts, or its dense form "
            "(to_dense(), to_padded_tensor())"
        )


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _torch() -> Any:
    """torch if the program has imported it (and is not in the middle of doing so)."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "Tensor") and hasattr(torch, "dtype") else None


# ---- DLPack -------------------------------------------------------------------------------------
# numpy.from_dlpack() refuses bfloat16 and float8, and pinned memory of a GPU library; the struct
# says all that is needed.


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer.restype = ctypes.c_void_p


class _Memory:
    """Memory at an address as numpy takes it; keeps its owner alive."""

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def _describe_dlpack(array: Any) -> Tensor:
    device_type = int(array.__dlpack_device__()[0])
    if device_type not in _DLPACK_HOST_DEVICES:
        raise UnsupportedError(
            f"this {_type_name(array)} is on a device (DLPack device type {device_type}), not in "
            "host memory; copy it first, with array.get(), .cpu() or what its library calls it"
        )
    # The capsule is left unconsumed: when it goes, its destructor gives the memory back.
    capsule = array.__dlpack__()
    struct = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    tag = _tag_of_dlpack(struct.code, struct.bits, struct.lanes)
    size = itemsize(tag)
    shape = tuple(struct.shape[i] for i in range(struct.ndim))
    if math.prod(shape) == 0:
        return Tensor(memoryview(b""), shape, tag, array, False)
    strides = None
    if struct.strides:
        strides = tuple(struct.strides[i] * size for i in range(struct.ndim))
    interface = {
        "version": 3,
        "typestr": f"|V{size}",
        "shape": shape,
        "strides": strides,
        "data": (struct.data + struct.byte_offset, True),
    }
    owner = _Memory(interface, (capsule, array))
    flat, copied = _flat_bytes(np.asarray(owner))
    return Tensor(memoryview(flat), shape, tag, owner, copied)


def _tag_of_dlpack(code: int, bits: int, lanes: int) -> str:
    name = _DLPACK_NAMES.get(code)
    if name is None and code in _DLPACK_KINDS:
        kind = _DLPACK_KINDS[code]
        name = kind if kind == "bool" else f"{kind}{bits}"
    try:
        tag = dtype_tag(name)
        known = lanes == 1 and itemsize(tag) * 8 == bits
    except (TypeError, UnsupportedError):
        known = False
    if not known:
        raise UnsupportedError(
            f"a DLPack array of type code {code}, {bits} bits and {lanes} lanes is of no layout "
            "that dualblade knows"
        )
    return tag


# ---- bytes to arrays ----------------------------------------------------------------------------


def takes_bytes(out: Any, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether out= is an array of numpy's own whose memory can be filled in as it is.

    What it does not take, `writable_bytes` may, or says why not.
    """
    return (
        type(out) is np.ndarray
        and out.shape == shape
        and out.flags.carray
        and _tag_of_numpy(out.dtype) == dtype
    )


def writable_bytes(out: Any, shape: tuple[int, ...], dtype: str) -> tuple[memoryview, object]:
    """The memory of out= as bytes to be filled in, and the object that keeps it alive.

    Takes a numpy array or torch tensor of exactly this shape and dtype tag, or any writable buffer
    (one of plain bytes, such as a bytearray, need only have the size). Raises ValueError if the
    shape or size differs or the memory is read-only or not contiguous, TypeError if the dtype
    differs or it has no memory to write to.
    """
    shape = tuple(shape)
    if isinstance(out, np.ndarray):
        return _writable_numpy(out, shape, dtype), out
    torch = _torch()
    if torch is not None and isinstance(out, torch.Tensor):
        return _writable_torch(torch, out, shape, dtype), out
    try:
        view = memoryview(out)
    except (TypeError, BufferError, ValueError) as error:
        raise TypeError(
            f"out= is a {_type_name(out)}, which has no memory that can be written to; pass a "
            "numpy array, a torch tensor in host memory, or a writable buffer such as a bytearray"
        ) from error
    if view.readonly:
        raise ValueError(f"out= is read-only ({_type_name(out)}); pass writable memory")
    if not view.c_contiguous:
        raise ValueError("out= is not contiguous in C order; pass a contiguous buffer")
    if view.format.lstrip("@=<>!") in ("B", "b", "c") and view.ndim == 1:
        size = math.prod(shape) * itemsize(dtype)
        if view.nbytes != size:
            raise ValueError(
                f"out= has {view.nbytes} bytes; a tensor of shape {shape} and dtype {dtype} has "
                f"{size}"
            )
        if size == 0:  # an empty view cannot be cast
            return memoryview(bytearray()), out
        return view.cast("B"), out
    described = describe(view)
    _check_out(described.shape, described.dtype, shape, dtype)
    return described.data, out


def from_bytes(buffer: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """An array over a contiguous buffer, without a copy; read-only if the buffer is.

    Raises ValueError if the buffer's size is not that of the shape and dtype tag.
    """
    of = numpy_dtype(dtype)
    view = memoryview(buffer)
    size = math.prod(shape) * of.itemsize
    if view.nbytes != size:
        raise ValueError(
            f"a buffer of {view.nbytes} bytes is not an array of shape {tuple(shape)} and dtype "
            f"{dtype}, which has {size}"
        )
    return np.ndarray(tuple(shape), of, buffer=view)


def to_torch(array: np.ndarray[Any, Any]) -> Any:
    """The same memory as a torch tensor, of the same shape and dtype.

    Raises UnsupportedError if torch has no such dtype, ValueError if the memory is read-only or
    has negative strides.
    """
    import torch

    tag = _tag_of_numpy(array.dtype)
    wanted = getattr(torch, tag, None) if tag in _TORCH_NAMES else None
    if wanted is None:
        raise UnsupportedError(
            f"torch {torch.__version__} has no dtype for {array.dtype}; keep it as a numpy array, "
            "or convert it with astype() first"
        )
    if not array.flags.writeable:
        raise ValueError("torch has no read-only tensors; pass array.copy()")
    if any(stride < 0 for stride in array.strides):
        raise ValueError("torch has no negative strides; pass array.copy()")
    # Of the dtypes that torch can take from numpy, this set is in every release.
    if tag in ("bfloat16", "uint16"):
        carrier = array.view(np.int16)
    elif tag in ("uint32", "complex32"):
        carrier = array.view(np.int32)
    elif tag == "uint64":
        carrier = array.view(np.int64)
    elif tag in _ML_ITEMSIZE:
        carrier = array.view(np.uint8)
    else:
        return torch.from_numpy(array)
    return torch.from_numpy(carrier).view(wanted)


def _check_out(
    found_shape: tuple[int, ...], found_dtype: str, shape: tuple[int, ...], dtype: str
) -> None:
    if found_dtype != dtype:
        raise TypeError(
            f"out= has dtype {found_dtype}, the tensor has {dtype}; pass an array of that dtype"
        )
    if found_shape != shape:
        raise ValueError(
            f"out= has shape {found_shape}, the tensor has {shape}; pass an array of that shape"
        )


def _writable_numpy(out: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: str) -> memoryview:
    if _is_masked(out):
        raise TypeError("out= is a masked array; pass out.data, and its mask stays as it is")
    _check_out(out.shape, _tag_of_numpy(out.dtype), shape, dtype)
    if not out.flags.writeable:
        raise ValueError("out= is a read-only array; pass one that can be written to")
    if not out.flags.c_contiguous:
        raise ValueError(
            "out= is not contiguous in C order; pass a contiguous array, such as "
            "numpy.empty(shape, dtype), and copy from it"
        )
    return memoryview(_flat_bytes(np.asarray(out))[0])


def _writable_torch(torch: Any, out: Any, shape: tuple[int, ...], dtype: str) -> memoryview:
    _refuse_torch_off_host(torch, out)
    _check_out(tuple(out.shape), _tag_of_torch(out.dtype), shape, dtype)
    # A tensor that is only marked as conjugated or negated would show other values than written.
    if not out.is_contiguous() or out.is_conj() or out.is_neg():
        raise ValueError(
            "out= is not contiguous in C order (or a lazily conjugated or negated view); pass a "
            "contiguous tensor, such as torch.empty(shape, dtype=dtype), and copy from it"
        )
    return memoryview(out.detach().reshape(-1).view(torch.uint8).numpy())
