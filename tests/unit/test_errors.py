"""Errors: each is what a caller catches, names errno, device and remedy, and survives pickling."""

import copy
import errno
import pickle

import pytest

from dualblade import errors
from dualblade.errors import device_error, nvme_error

BUILTINS = {
    errors.DeviceError: OSError,
    errors.NvmeError: OSError,
    errors.NoSpaceError: OSError,
    errors.DeviceRefusedError: PermissionError,
    errors.CorruptionError: Exception,
    errors.KeyNotFoundError: KeyError,
    errors.LiveViewError: BufferError,
    errors.ClosedError: ValueError,
    errors.AlignmentError: ValueError,
    errors.UnsupportedError: NotImplementedError,
}
MEANT_FOR_DEVICES = (
    "EIO ENOSPC EINVAL ENODATA ENODEV ENXIO EROFS EBADF ETIMEDOUT ENOMEM EACCES EPERM EBUSY "
    "EWOULDBLOCK EREMOTEIO EILSEQ EOPNOTSUPP ENOSYS ECHILD ENOENT EISDIR ENOTBLK"
).split()


@pytest.mark.parametrize("kind", BUILTINS, ids=lambda kind: kind.__name__)
def test_each_error_is_a_dualblade_error_and_the_builtin(kind):
    error = kind("what happened")
    assert isinstance(error, errors.DualbladeError)
    assert isinstance(error, BUILTINS[kind])
    assert str(error) == "what happened"


@pytest.mark.parametrize("kind", BUILTINS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("clone", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_each_error_survives_pickling(kind, clone):
    error = kind("what happened")
    error.add_to = "context"
    again = clone(error)
    assert type(again) is kind
    assert (str(again), again.args, again.add_to) == (str(error), error.args, "context")


def test_nvme_status_is_not_an_errno():
    error = errors.NvmeError("unrecovered read error", sct=2, sc=0x81, device="/dev/ng0n1")
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again):
        assert (each.sct, each.sc, each.errno, each.device) == (2, 0x81, None, "/dev/ng0n1")


@pytest.mark.parametrize(
    ("status", "sct", "sc", "dnr", "name"),
    [
        (0x281, 2, 0x81, False, "Unrecovered Read Error"),
        (0x4080, 0, 0x80, True, "LBA Out of Range"),
        (0x4281 | 0x1800, 2, 0x81, True, "Unrecovered Read Error"),  # with a delay to retry after
        (0x2FE, 2, 0xFE, False, "media and data integrity error"),
        (0x7C0, 7, 0xC0, False, "vendor specific status"),
        (0x6C0, 6, 0xC0, False, "reserved status"),
    ],
)
def test_nvme_error_says_what_the_drive_answered_and_what_to_do(status, sct, sc, dnr, name):
    error = nvme_error(status, device="/dev/ng0n1", operation="read", offset=8192, length=4096)
    assert (error.sct, error.sc, error.dnr, error.name, error.errno) == (sct, sc, dnr, name, None)
    assert (error.device, error.operation) == ("/dev/ng0n1", "read")
    assert (error.offset, error.length) == (8192, 4096)
    text = str(error)
    assert text.startswith("read of 4096 bytes at offset 8192 on /dev/ng0n1 failed: the drive")
    assert f"{name!r} (NVMe status type {sct:#x}, code {sc:#04x}" in text
    assert ("do not retry" in text) == dnr
    assert text.endswith(".")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (text, error.__dict__)


def test_no_space_has_its_errno_whatever_it_was_made_from():
    assert errors.NoSpaceError("the store is full").errno == errno.ENOSPC
    assert pickle.loads(pickle.dumps(errors.NoSpaceError("full"))).errno == errno.ENOSPC


@pytest.mark.parametrize("name", MEANT_FOR_DEVICES)
def test_device_error_says_what_to_what_where_and_what_to_do(name):
    number = getattr(errno, name)
    error = device_error(number, device="/x/kv.img", operation="read", offset=8192, length=4096)
    assert type(error) is (errors.NoSpaceError if name == "ENOSPC" else errors.DeviceError)
    assert (error.errno, error.filename) == (number, "/x/kv.img")
    assert (error.device, error.operation) == ("/x/kv.img", "read")
    assert (error.offset, error.length) == (8192, 4096)
    text = str(error)
    happened, advice = text.split(f"({errno.errorcode[number]}). ")
    assert happened.startswith("read of 4096 bytes at offset 8192 on /x/kv.img failed: ")
    assert advice.endswith(".")
    assert error.strerror == text
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.errno, again.__dict__) == (text, number, error.__dict__)


@pytest.mark.parametrize("number", [errno.EXDEV, 133, 9999])
def test_an_errno_that_is_not_expected_is_loud(number):
    text = str(device_error(number, device="kv.img", operation="flush"))
    assert text.startswith("flush on kv.img failed with an error not expected here")
    assert f"errno {number})" in text
    assert errno.errorcode.get(number, "errno") in text


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EWOULDBLOCK])
def test_opening_what_another_uses_is_a_refusal(number):
    error = device_error(number, device="kv.img", operation="open")
    assert type(error) is errors.DeviceRefusedError
    assert (error.errno, error.filename) == (number, "kv.img")
    assert "kv.img" in str(error)
    assert "fuser" in str(error)


def test_an_unknown_key_reads_as_a_sentence():
    assert str(errors.KeyNotFoundError("no tensor has the key 'a'")) == "no tensor has the key 'a'"


def test_warnings_are_user_warnings():
    with pytest.warns(UserWarning, match="slower"):
        import warnings

        warnings.warn("a slower way", errors.DualbladeWarning, stacklevel=1)
