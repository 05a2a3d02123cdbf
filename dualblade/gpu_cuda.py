"""CUDA devices, by CuPy: discovery, memory, and arrays of CuPy's, torch's and DLPack's.

Nothing here waits for the whole device: order comes from events between streams.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from typing import Any

import numpy as np

from dualblade._core import aligned_empty
from dualblade.errors import UnsupportedError
from dualblade.gpu_cuda_streams import Cuda, CudaArena, CudaStream, Mapped, foreign_stream
from dualblade.tensor import dtype_tag, numpy_dtype

_DLPACK_CUDA_DEVICES = frozenset({2, 13})  # kDLCUDA, kDLCUDAManaged
_INSTALL = (
    "install it with `pip install 'dualblade[gpu]'` for a driver of CUDA 12 or later, or "
    "'dualblade[gpu-cuda13]' beside other packages of CUDA 13"
)


def import_cupy(name: str) -> Any:
    """CuPy. Raises UnsupportedError, with what to install."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            raise UnsupportedError(f"device {name!r} needs CuPy; {_INSTALL}") from error
        raise UnsupportedError(f"CuPy can't be imported ({error}); {_INSTALL}") from error
    except ImportError as error:
        raise UnsupportedError(f"CuPy can't be imported ({error}); {_INSTALL}") from error
    if cupy.cuda.runtime.is_hip:
        raise UnsupportedError(f"this CuPy is built for ROCm, and {name!r} is CUDA; {_INSTALL}")
    return cupy


def find_device(cupy: Any, index: int | None) -> int:
    """The number of a GPU that is there; None is CuPy's current one. Raises UnsupportedError."""
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
        found = runtime.getDevice() if index is None else index
    except runtime.CUDARuntimeError as error:
        raise UnsupportedError(
            f"CuPy {cupy.__version__} finds no GPU that it can use: {error}. See whether "
            "`nvidia-smi` shows one, and update NVIDIA's driver if it is older than CuPy's CUDA"
        ) from error
    if found >= count:
        raise UnsupportedError(
            f"there is no cuda:{found}; {count} CUDA device(s) can be seen here (nvidia-smi, "
            "CUDA_VISIBLE_DEVICES)"
        )
    return found


class CudaDevice:
    """One GPU: CuPy arrays, non-blocking streams, pinned staging memory."""

    kind = "cuda"

    def __init__(self, index: int | None = None, *, unified: bool | None = None) -> None:
        """`index` is CUDA's number of the GPU, by default the current one. `unified` says whether
        results lie in host memory that the GPU works in; by default where the two are one memory.
        Raises UnsupportedError where CuPy or the GPU is missing.
        """
        cupy = import_cupy("cuda" if index is None else f"cuda:{index}")
        self._cuda = Cuda(cupy, find_device(cupy, index))
        self.name = self._cuda.name
        self._sees_host_memory = bool(self._attribute("PageableMemoryAccessUsesHostPageTables"))
        is_one_memory = self._sees_host_memory or bool(self._attribute("Integrated"))
        self.unified = is_one_memory if unified is None else unified
        self._mapped: weakref.WeakValueDictionary[int, Mapped] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<CudaDevice {self.name!r}>"

    def _attribute(self, name: str) -> int:
        runtime = self._cuda.runtime
        number = getattr(runtime, f"cudaDevAttr{name}", None)
        if number is None:  # of a CUDA older than the attribute
            return 0
        with self._cuda.use("asking what it can do"):
            return runtime.deviceGetAttribute(number, self._cuda.index)

    def describe(self) -> dict[str, object]:
        """What it is, for stats()."""
        runtime = self._cuda.runtime
        with self._cuda.use("asking what it is"):
            properties = runtime.getDeviceProperties(self._cuda.index)
            driver = runtime.driverGetVersion()
        model = properties["name"]
        return {
            "name": self.name,
            "kind": self.kind,
            "unified": self.unified,
            "model": model.decode() if isinstance(model, bytes) else model,
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "memory_bytes": properties["totalGlobalMem"],
            "copy_engines": self._attribute("AsyncEngineCount"),
            "cupy": self._cuda.cupy.__version__,
            "cuda": runtime.runtimeGetVersion(),
            "cuda_driver": driver,
        }

    # ---- memory

    def arena(self, size_bytes: int) -> CudaArena:
        """One run of staging memory, pinned by CUDA. Raises ValueError, MemoryError."""
        return CudaArena(self._cuda, size_bytes)

    def empty(
        self, shape: int | tuple[int, ...], dtype: Any, *, stream: CudaStream | None = None
    ) -> Any:
        """A CuPy array; its content is arbitrary.

        It comes from CuPy's pool in the order of `stream` (by default the caller's current one):
        others may use it after an event that was recorded there. It goes back there as well: who
        drops it while another stream still works with it has `stream` wait for that stream first.
        Where `unified`, it is host memory that the GPU works in, with the same order. Raises
        UnsupportedError for a dtype that CuPy lacks, MemoryError.
        """
        of = numpy_dtype(dtype_tag(dtype))
        dimensions = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
        if self.unified and math.prod(dimensions):
            return self._mapped_empty(dimensions, of, stream or self.current_stream())
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._cuda.use("allocating memory"))
            if stream is not None:
                stack.enter_context(stream)
            return self._ndarray(dimensions, of, None)

    def _mapped_empty(self, shape: tuple[int, ...], of: np.dtype[Any], stream: CudaStream) -> Any:
        memory = aligned_empty(math.prod(shape) * of.itemsize, np.uint8)
        mapped = Mapped(self._cuda, memory, stream, is_shared=self._sees_host_memory)
        self._mapped[mapped.ptr] = mapped
        return self._over(mapped.ptr, memory.nbytes, mapped, shape, of)

    def _over(
        self, ptr: int, size_bytes: int, owner: object, shape: tuple[int, ...], of: np.dtype[Any]
    ) -> Any:
        """An array over memory that somebody else owns."""
        cuda = self._cuda.cupy.cuda
        memory = cuda.UnownedMemory(ptr, size_bytes, owner, self._cuda.index)
        return self._ndarray(shape, of, cuda.MemoryPointer(memory, 0))

    def _ndarray(self, shape: tuple[int, ...], of: np.dtype[Any], memory: Any) -> Any:
        cupy = self._cuda.cupy
        try:
            return cupy.ndarray(shape, dtype=of, memptr=memory)
        except (TypeError, ValueError) as error:
            raise UnsupportedError(
                f"CuPy {cupy.__version__} has no dtype for {of} ({error}); CuPy 14 has those of "
                "ml_dtypes, and bytes_of() takes a torch tensor of any dtype"
            ) from error

    # ---- arrays

    def as_array(self, array: Any) -> Any:
        """What a caller has as a CuPy array of this GPU, on the same memory.

        Takes CuPy arrays, torch's CUDA tensors, and what has DLPack; nothing is put into any
        stream for the first two. Raises UnsupportedError for memory elsewhere and for dtypes that
        CuPy lacks, ValueError for an array that is not contiguous, TypeError for what is no array.
        """
        if isinstance(array, self._cuda.cupy.ndarray):
            return self._checked(array)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            return self._of_torch(array, tuple(array.shape), numpy_dtype(dtype_tag(array.dtype)))
        if not hasattr(array, "__dlpack_device__"):
            raise TypeError(
                f"{type(array).__name__} is no array of {self.name}; pass a CuPy array, a torch "
                "CUDA tensor, or an object with DLPack"
            )
        kind, index = array.__dlpack_device__()
        if int(kind) not in _DLPACK_CUDA_DEVICES:
            raise self._elsewhere(type(array).__name__, "in no GPU's memory")
        if int(index) != self._cuda.index and int(kind) == 2:
            raise self._elsewhere(type(array).__name__, f"on cuda:{int(index)}")
        with self._cuda.use("taking an array by DLPack"):
            return self._checked(self._cuda.cupy.from_dlpack(array))

    def bytes_of(self, array: Any) -> Any:
        """The memory of an array of this GPU as uint8 [nbytes]; of torch's tensors, of any dtype.

        Raises what as_array does.
        """
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            size = array.numel() * array.element_size()
            return self._of_torch(array, (size,), np.dtype(np.uint8))
        return self.as_array(array).reshape(-1).view(np.uint8)

    def span_of(self, array: Any) -> tuple[int, int]:
        """The addresses of its memory: the first, and the one after the last."""
        flat = self.bytes_of(array)
        return flat.data.ptr, flat.data.ptr + flat.nbytes

    def array_over(self, memory: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An array of this shape and dtype tag over uint8 [nbytes] of this GPU's memory.

        Raises UnsupportedError for a dtype that CuPy lacks.
        """
        return self._ndarray(shape, numpy_dtype(dtype), memory.data)

    def host_bytes_of(self, array: Any) -> np.ndarray[Any, Any]:
        """The same as a numpy array, that the drive may read into, where `unified`.

        Raises UnsupportedError for an array that does not lie in host memory.
        """
        flat = self.bytes_of(array)
        ptr = flat.data.ptr
        for start, mapped in list(self._mapped.items()):
            if start <= ptr < start + mapped.array.nbytes:
                return mapped.array[ptr - start : ptr - start + flat.nbytes]
        raise UnsupportedError(
            f"this array lies in the memory of {self.name} alone; device.empty() makes one in host "
            "memory where device.unified says so"
        )

    def to_torch(self, array: Any) -> Any:
        """A CuPy array as a torch tensor on the same memory; nothing is put into any stream.

        Raises UnsupportedError if torch is missing or has no such dtype.
        """
        try:
            import torch
        except ImportError as error:
            raise UnsupportedError("this needs torch; install it (pip install torch)") from error
        of = getattr(torch, dtype_tag(array.dtype), None)
        if not isinstance(of, torch.dtype):
            raise UnsupportedError(f"torch {torch.__version__} has no dtype for {array.dtype}")
        # As bytes: DLPack has no bfloat16 of CuPy's. -1: order is the events' business.
        capsule = self.bytes_of(array).__dlpack__(stream=-1)
        return torch.utils.dlpack.from_dlpack(capsule).view(of).reshape(tuple(array.shape))

    def _checked(self, array: Any) -> Any:
        if array.data.device_id != self._cuda.index:
            raise self._elsewhere("a CuPy array", f"on cuda:{array.data.device_id}")
        if not array.flags.c_contiguous:
            raise ValueError(
                "this array is not contiguous in C order; pass a contiguous one, such as "
                "cupy.ascontiguousarray(x)"
            )
        return array

    def _of_torch(self, tensor: Any, shape: tuple[int, ...], of: np.dtype[Any]) -> Any:
        if tensor.device.type != "cuda" or tensor.device.index != self._cuda.index:
            raise self._elsewhere("a torch tensor", f"on {tensor.device}")
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                "this torch tensor is not contiguous in C order (or a lazily conjugated or negated "
                "view); pass tensor.contiguous()"
            )
        size = tensor.numel() * tensor.element_size()
        return self._over(tensor.data_ptr(), size, tensor, shape, of)

    def _elsewhere(self, what: str, where: str) -> UnsupportedError:
        return UnsupportedError(
            f"{what} {where} is not on {self.name}; copy it there first, with cupy.asarray(x) or "
            f"tensor.to({self.name!r})"
        )

    # ---- order

    def stream(self) -> CudaStream:
        """A new stream, which does not wait for the default one. To be closed."""
        with self._cuda.use("opening a stream"):
            made = self._cuda.cupy.cuda.Stream(non_blocking=True)
        return CudaStream(self._cuda, made, owned=True)

    def current_stream(self, array: Any = None) -> CudaStream:
        """The stream in whose order the caller works: CuPy's current one, or torch's where `array`
        is a torch tensor."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            theirs = torch.cuda.current_stream(self._cuda.index)
            return foreign_stream(self._cuda, theirs.cuda_stream, theirs)
        with self._cuda.use("asking for the current stream"):
            current = self._cuda.cupy.cuda.get_current_stream(self._cuda.index)
        return CudaStream(self._cuda, current, owned=False)
