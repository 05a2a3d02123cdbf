"""Arrays to bytes and back: every dtype, any layout, nothing routed through a dtype that isn't."""

import array
import ctypes
import gc
import itertools
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dualblade import tensor
from dualblade.errors import UnsupportedError

ML_TYPES = [
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e5m2fnuz,
    ml_dtypes.float8_e4m3b11fnuz,
]
TORCH_NAMES = (
    "bool uint8 int8 int16 int32 int64 float16 float32 float64 bfloat16 complex64 complex128 "
    "uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
).split()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


class OnlyDLPack:
    """An array of some other library: DLPack and nothing else."""

    def __init__(self, tensor, device=(1, 0)):
        self.tensor = tensor
        self.device = device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        from torch.utils.dlpack import to_dlpack

        return to_dlpack(self.tensor)


class HandMadeDLPack:
    """A DLPack struct laid out field by field, as the standard has it."""

    def __init__(self, values, shape, byte_offset=0, type_=(0, 16, 1)):
        self.values = values
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        code, bits, lanes = type_
        self.struct = ctypes.create_string_buffer(
            struct.pack(
                "PiiiBBHPPQ",
                *(values.ctypes.data, 1, 0, len(shape), code, bits, lanes),
                *(ctypes.addressof(self.shape), 0, byte_offset),
            )
        )

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.struct), b"dltensor", None)


class OnlyBuffer:
    """A type of its own over memory, as a C extension would make it."""

    def __new__(cls, size):
        return (ctypes.c_ubyte * size)()


# ---- strategies and oracle ----------------------------------------------------------------------

plain_dtypes = (
    npst.scalar_dtypes()
    | npst.byte_string_dtypes()
    | npst.unicode_string_dtypes()
    | st.integers(1, 20).map(lambda n: np.dtype(f"V{n}"))
    | st.sampled_from([np.dtype(kind) for kind in ML_TYPES])
)
dtypes = plain_dtypes | npst.nested_dtypes(plain_dtypes) | npst.array_dtypes(plain_dtypes)


@st.composite
def arrays(draw, of=plain_dtypes):
    """Arrays of random bytes: any dtype, shape with zeros, order, step, and 0-d."""
    dtype = draw(of)
    base = dtype.base
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    steps = tuple(draw(st.sampled_from([1, 2, -1, -2])) for _ in shape)
    full = tuple(side * abs(step) for side, step in zip(shape, steps, strict=True))
    seed = draw(st.integers(0, 2**32 - 1))
    count = int(np.prod(full, dtype=int))
    raw = np.random.default_rng(seed).integers(0, 256, count * base.itemsize, np.uint8).tobytes()
    x = np.ndarray(full, base, buffer=raw)
    x = x[(..., *(slice(None, None, step) for step in steps))]
    assert x.shape == shape
    return x.transpose(draw(st.permutations(range(x.ndim))))


def element_bytes(x):
    """The bytes of x in C order, gathered one element at a time."""
    places = itertools.product(*map(range, x.shape))
    return b"".join(x[(..., *(slice(i, i + 1) for i in place))].tobytes() for place in places)


# ---- dtype tags ---------------------------------------------------------------------------------


@given(dtypes)
def test_a_tag_turns_back_into_its_dtype(dtype):
    dtype = dtype.base
    tag = tensor.dtype_tag(dtype)
    again = tensor.numpy_dtype(tag)
    assert again == dtype
    assert again.itemsize == dtype.itemsize == tensor.itemsize(tag)
    assert tensor.dtype_tag(again) == tensor.dtype_tag(tag) == tag


@given(dtypes, dtypes)
def test_tags_are_equal_exactly_when_dtypes_are(a, b):
    a, b = a.base, b.base
    assert (tensor.dtype_tag(a) == tensor.dtype_tag(b)) == (a == b)


@pytest.mark.parametrize(
    ("aliases", "tag"),
    [
        (["float16", "<f2", "f2", np.float16, np.dtype("e"), "half"], "float16"),
        (["int64", "q", "l", int, np.longlong], "int64"),
        (["?", "bool", bool, np.bool_], "bool"),
        (["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)], "bfloat16"),
        (["float8_e5m2", ml_dtypes.float8_e5m2], "float8_e5m2"),
        ([">f4", np.dtype("float32").newbyteorder(">")], ">f4"),
        (["datetime64[ns]", "<M8[ns]"], "<M8[ns]"),
        (["S5", np.dtype("S5"), "|S5"], "|S5"),
    ],
)
def test_all_names_of_a_dtype_have_one_tag(aliases, tag):
    assert {tensor.dtype_tag(alias) for alias in aliases} == {tag}


def test_torch_dtypes_have_the_tag_of_their_numpy_counterpart(torch):
    for name in TORCH_NAMES:
        assert tensor.dtype_tag(getattr(torch, name)) == name
        assert tensor.itemsize(name) == getattr(torch, name).itemsize


def test_fields_of_a_structured_dtype_keep_ml_dtypes_offsets_and_titles():
    dtype = np.dtype(
        {
            "names": ["a", "b", "c"],
            "formats": [ml_dtypes.bfloat16, ("<i4", (2, 3)), [("x", ">f8"), ("y", "S3")]],
            "offsets": [2, 8, 40],
            "titles": ["first", None, None],
            "itemsize": 64,
        }
    )
    again = tensor.numpy_dtype(tensor.dtype_tag(dtype))
    assert again == dtype
    assert again["a"] == ml_dtypes.bfloat16
    assert again.fields["a"][1:] == (2, "first")


@pytest.mark.parametrize("bad", ["float17", "O", object, None, "(2,3)f4", 5, "", "[1,2]"])
def test_what_is_no_dtype_is_a_type_error(bad):
    with pytest.raises(TypeError):
        tensor.dtype_tag(bad)


@pytest.mark.parametrize("bad", ["", "float17", "{", "{}", '{"fields":3,"itemsize":1}', "[]"])
def test_a_damaged_tag_is_a_value_error_that_shows_it(bad):
    with pytest.raises(ValueError, match="is not a dtype tag"):
        tensor.numpy_dtype(bad)


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn", "int2"])
def test_numbers_narrower_than_a_byte_are_refused(name):
    if not hasattr(ml_dtypes, name):
        pytest.skip(f"ml_dtypes {ml_dtypes.__version__} has no {name}")
    with pytest.raises(UnsupportedError, match="view"):
        tensor.describe(np.zeros(3, getattr(ml_dtypes, name)))


# ---- numpy --------------------------------------------------------------------------------------


@given(arrays())
@settings(max_examples=300)
def test_an_array_round_trips_and_its_bytes_are_in_c_order(x):
    found = tensor.describe(x)
    assert bytes(found.data) == np.ascontiguousarray(x).tobytes()
    assert (found.data.format, found.data.ndim, found.data.c_contiguous) == ("B", 1, True)
    assert found.shape == x.shape
    assert found.copied == (not x.flags.c_contiguous)
    again = tensor.from_bytes(found.data, found.shape, found.dtype)
    assert (again.dtype, again.shape) == (x.dtype, x.shape)
    assert again.tobytes() == element_bytes(x)


padded_dtypes = st.lists(plain_dtypes, min_size=1, max_size=4).map(
    lambda fields: np.dtype([(f"f{n}", of) for n, of in enumerate(fields)], align=True)
)


@given(arrays(of=padded_dtypes | npst.nested_dtypes(plain_dtypes)))
def test_structured_arrays_keep_their_padding_bytes(x):
    found = tensor.describe(x)
    again = tensor.from_bytes(found.data, found.shape, found.dtype)
    assert again.dtype == x.dtype
    if not x.flags.c_contiguous:
        x = x.view(f"V{x.itemsize}") if x.itemsize else x
    assert bytes(found.data) == element_bytes(x)


@given(arrays())
def test_contiguous_memory_is_used_in_place(x):
    x = x.copy(order="C")
    found = tensor.describe(x)
    assert not found.copied
    if x.nbytes:
        assert np.frombuffer(found.data, np.uint8).ctypes.data == x.ctypes.data


@pytest.mark.parametrize("scalar", [np.float32(1.5), np.int8(-3), np.str_("ab"), np.bytes_(b"x")])
def test_numpy_scalars_are_zero_dimensional_arrays(scalar):
    found = tensor.describe(scalar)
    assert found.shape == ()
    assert tensor.from_bytes(found.data, (), found.dtype)[()] == scalar


def test_bytes_outlive_the_array():
    found = tensor.describe(np.arange(1000)[::2])
    assert bytes(found.data) == np.arange(0, 1000, 2).tobytes()


@pytest.mark.parametrize(
    "bad",
    [
        [1, 2],
        [[1, 2], [3]],
        (1.5,),
        3,
        2.5,
        True,
        None,
        "text",
        {"a": 1},
        object(),
        np.array([None, 1]),
        np.array([1, "a"], dtype=object),
        np.zeros(2, [("a", "f4"), ("b", "O")]),
        np.ma.array([1, 2], mask=[0, 1]),
    ],
    ids=repr,
)
def test_what_has_no_bytes_of_its_own_is_a_type_error(bad):
    with pytest.raises(TypeError, match=r"numpy\.asarray|convert it|masked"):
        tensor.describe(bad)


@pytest.mark.skipif(np.__version__ < "2", reason="numpy 1 has no such strings")
def test_variable_width_strings_are_refused():
    with pytest.raises(TypeError, match="references"):
        tensor.describe(np.array(["a", "bc"], dtype=np.dtypes.StringDType()))


# ---- buffers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", "bBhHiIlLqQfd")
def test_typed_buffers_bring_their_dtype(code):
    values = array.array(code, [1, 2, 3])
    found = tensor.describe(values)
    assert found.shape == (3,)
    assert tensor.from_bytes(found.data, (3,), found.dtype).tolist() == [1, 2, 3]
    assert found.owner is values


@pytest.mark.parametrize("plain", [b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_plain_bytes_are_uint8(plain):
    assert tensor.describe(plain)[1:3] == ((3,), "uint8")
    assert bytes(tensor.describe(plain).data) == b"abc"


def test_strided_and_shaped_memoryviews():
    grid = memoryview(np.arange(12, dtype=np.int16).reshape(3, 4))
    assert tensor.describe(grid).shape == (3, 4)
    assert bytes(tensor.describe(memoryview(b"abcdef")[::-2]).data) == b"fdb"
    assert tensor.describe(b"").shape == (0,)


def test_a_buffer_of_pointers_is_refused():
    with pytest.raises(TypeError, match="cast"):
        tensor.describe((ctypes.c_void_p * 2)())


# ---- torch --------------------------------------------------------------------------------------


def torch_bytes(x):
    """Bytes of a torch tensor by way of its storage alone."""
    dense = x.clone(memory_format=__import__("torch").contiguous_format)
    return bytes(dense.untyped_storage())


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_tensors_round_trip(torch, name):
    x = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name))
    for each in (x, x.transpose(0, 2), x[:, 1], x[0, 0, 0], x[:0]):
        found = tensor.describe(each)
        assert (found.dtype, found.shape) == (name, tuple(each.shape))
        assert bytes(found.data) == torch_bytes(each)
        mutable = bytearray(found.data)
        back = tensor.to_torch(tensor.from_bytes(mutable, found.shape, found.dtype))
        assert (back.dtype, back.shape) == (each.dtype, each.shape)
        assert torch_bytes(back) == torch_bytes(each)


def test_torch_memory_is_shared_both_ways(torch):
    x = torch.zeros(4, dtype=torch.bfloat16)
    found = tensor.describe(x)
    assert not found.copied
    x[0] = 1
    assert bytes(found.data)[:2] == b"\x80\x3f"
    rows = np.zeros(4, ml_dtypes.bfloat16)
    tensor.to_torch(rows)[1] = 1
    assert rows[1] == 1


def test_torch_lazy_bits_and_gradients_are_resolved(torch):
    z = torch.tensor([1 + 2j, 3 - 4j], requires_grad=True)
    assert np.array_equal(values_of(tensor.describe(z.conj())), [1 - 2j, 3 + 4j])
    assert np.array_equal(values_of(tensor.describe(z.conj().imag)), [-2, 4])
    negated = torch._neg_view(torch.ones(2))
    assert negated.is_neg()
    assert np.array_equal(values_of(tensor.describe(negated)), [-1, -1])
    assert np.array_equal(values_of(tensor.describe(torch.nn.Parameter(torch.ones(2)))), [1, 1])


def values_of(found):
    return tensor.from_bytes(found.data, found.shape, found.dtype)


def test_torch_tensors_without_plain_host_memory_are_refused(torch):
    with pytest.raises(UnsupportedError, match="meta"):
        tensor.describe(torch.zeros(3, device="meta"))
    with pytest.raises(UnsupportedError, match="sparse"):
        tensor.describe(torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedError, match="int4"):
        tensor.dtype_tag(torch.int4)


def test_torch_takes_only_what_it_has(torch):
    for bad in (np.zeros(2, "S3"), np.zeros(2, "f4,i4"), np.zeros(2, ">f4"), np.zeros(2, "g")):
        with pytest.raises(UnsupportedError, match="torch"):
            tensor.to_torch(bad)
    with pytest.raises(ValueError, match="read-only"):
        tensor.to_torch(tensor.from_bytes(b"1234", (1,), "float32"))
    with pytest.raises(ValueError, match="negative"):
        tensor.to_torch(np.arange(3)[::-1])


def test_torch_is_never_imported_for_its_own_sake():
    code = (
        "import sys, numpy as np; from dualblade import tensor;"
        "tensor.describe(np.zeros(3)); tensor.dtype_tag('bfloat16'); tensor.describe(b'x');"
        "sys.exit('torch' in sys.modules)"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], check=False
    )
    assert done.returncode == 0


# ---- DLPack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_dlpack_arrays_round_trip(torch, name):
    x = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name))
    for each in (x, x.transpose(0, 2), x[:, 1:, 2], x[1, 1, 1], x[:0]):
        found = tensor.describe(OnlyDLPack(each))
        assert (found.dtype, found.shape) == (name, tuple(each.shape))
        assert bytes(found.data) == torch_bytes(each)


def test_dlpack_memory_is_shared_and_kept_alive(torch):
    x = torch.zeros(1000, dtype=torch.int64)
    found = tensor.describe(OnlyDLPack(x))
    x[0] = 7
    assert not found.copied
    assert found.data[0] == 7
    data = found.data
    del found, x
    gc.collect()
    assert np.frombuffer(data, np.int64).tolist() == [7] + [0] * 999


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
def test_dlpack_by_hand_without_strides_and_with_a_byte_offset(shape):
    """What the format allows and torch does not do."""
    values = np.arange(20, dtype=np.int16)
    found = tensor.describe(HandMadeDLPack(values, shape, byte_offset=6))
    expected = values[3 : 3 + int(np.prod(shape, dtype=int))]
    assert values_of(found).tolist() == expected.reshape(shape).tolist()
    assert not found.copied


@pytest.mark.parametrize(("code", "bits", "lanes"), [(2, 16, 4), (3, 64, 1), (0, 4, 1), (17, 4, 2)])
def test_dlpack_of_unknown_layout_is_refused(code, bits, lanes):
    array = HandMadeDLPack(np.arange(20, dtype=np.int16), (2,), type_=(code, bits, lanes))
    with pytest.raises(UnsupportedError, match=f"code {code}, {bits} bits and {lanes} lanes"):
        tensor.describe(array)


def test_dlpack_on_a_gpu_is_refused():
    with pytest.raises(UnsupportedError, match=r"device type 2.*copy it first"):
        tensor.describe(OnlyDLPack(None, device=(2, 0)))


# ---- out= ---------------------------------------------------------------------------------------


@given(arrays())
def test_out_shares_memory_with_a_numpy_array(x):
    out = np.empty(x.shape, x.dtype)
    memory, owner = tensor.writable_bytes(out, x.shape, tensor.dtype_tag(x.dtype))
    memory[:] = tensor.describe(x).data
    assert owner is out
    assert out.tobytes() == element_bytes(x)


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_out_shares_memory_with_a_torch_tensor(torch, name):
    x = torch.arange(6).reshape(2, 3).to(getattr(torch, name))
    out = torch.zeros_like(x)
    memory, _ = tensor.writable_bytes(out, (2, 3), name)
    memory[:] = tensor.describe(x).data
    assert torch_bytes(out) == torch_bytes(x)


@pytest.mark.parametrize(
    "out", [bytearray(12), OnlyBuffer(12), array.array("f", [0] * 3), memoryview(bytearray(12))]
)
def test_out_is_any_writable_buffer_of_the_size(out):
    memory, owner = tensor.writable_bytes(out, (3,), "float32")
    memory[:] = np.array([1, 2, 3], "<f4").tobytes()
    assert owner is out
    assert np.frombuffer(out, "<f4").tolist() == [1, 2, 3]


def read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("out", "error", "match"),
    [
        (np.empty((3, 2), "f4"), ValueError, r"shape \(3, 2\), the tensor has \(2, 3\)"),
        (np.empty(6, "f4"), ValueError, "shape"),
        (np.empty((2, 3), "f8"), TypeError, "dtype float64, the tensor has float32"),
        (np.empty((2, 3), ">f4"), TypeError, "dtype >f4"),
        (np.empty((2, 3), "u4"), TypeError, "dtype uint32"),
        (read_only(np.empty((2, 3), "f4")), ValueError, "read-only"),
        (np.empty((3, 2), "f4").T, ValueError, "contiguous"),
        (np.ma.empty((2, 3), "f4"), TypeError, "masked"),
        (b"x" * 24, ValueError, "read-only"),
        (bytearray(23), ValueError, "23 bytes.* 24"),
        (memoryview(bytearray(48))[::2], ValueError, "contiguous"),
        (array.array("d", [0] * 6), TypeError, "float64"),
        (array.array("f", [0] * 6), ValueError, "shape"),
        ([0.0] * 6, TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_out_that_does_not_fit_is_refused(out, error, match):
    with pytest.raises(error, match=match):
        tensor.writable_bytes(out, (2, 3), "float32")


def test_out_that_does_not_fit_is_refused_from_torch_too(torch):
    for out, error in [
        (torch.empty(3, 2), ValueError),
        (torch.empty(2, 3, dtype=torch.float64), TypeError),
        (torch.empty(3, 2).T, ValueError),
        (torch.empty(1, 3).expand(2, 3), ValueError),
        (torch.empty(2, 3, device="meta"), UnsupportedError),
    ]:
        with pytest.raises(error):
            tensor.writable_bytes(out, (2, 3), "float32")
    with pytest.raises(ValueError, match="conjugated"):
        tensor.writable_bytes(torch.empty(2, dtype=torch.complex64).conj(), (2,), "complex64")


@pytest.mark.parametrize("out", [bytearray(), np.empty((0, 3), "f4"), array.array("b")])
def test_out_may_be_empty(out):
    memory, _ = tensor.writable_bytes(out, (0, 3), "float32")
    assert memory.nbytes == 0


@pytest.mark.parametrize("size", [0, 11, 13])
def test_an_array_over_a_buffer_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"{size} bytes"):
        tensor.from_bytes(bytes(size), (3,), "float32")


# ---- rows ---------------------------------------------------------------------------------------


def test_rows_that_fit_are_described():
    x = np.arange(24, dtype="f2").reshape(4, 2, 3)
    found = tensor.as_rows(x, (2, 3), "float16")
    assert found.shape == (4, 2, 3)
    assert bytes(found.data) == x.tobytes()
    assert tensor.as_rows(x[:0], (2, 3), "float16").shape == (0, 2, 3)
    assert tensor.as_rows(np.zeros(5, "f2"), (), "float16").shape == (5,)


def test_rows_that_do_not_fit_say_why():
    with pytest.raises(ValueError, match=r"\[rows, 2, 3\] is wanted$"):
        tensor.as_rows(np.zeros((4, 3, 2), "f2"), (2, 3), "float16")
    with pytest.raises(ValueError, match=r"array\[None\]"):
        tensor.as_rows(np.zeros((2, 3), "f2"), (2, 3), "float16")
    with pytest.raises(ValueError, match=r"\[rows\]"):
        tensor.as_rows(np.float16(0), (), "float16")
    with pytest.raises(TypeError, match="float32"):
        tensor.as_rows(np.zeros((4, 2, 3), "f4"), (2, 3), "float16")
