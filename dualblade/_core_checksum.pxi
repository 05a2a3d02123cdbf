# Checksums, signatures and counters; included by _core.pyx.

def checksum(data):
    """XXH3, 64 bits, of contiguous memory."""
    cdef Py_buffer view
    cdef uint64_t result
    _export(data, &view, PyBUF_SIMPLE, "data")
    if view.len > NOGIL_BYTES:
        with nogil:
            result = db_checksum(view.buf, view.len)
    else:
        result = db_checksum(view.buf, view.len)
    PyBuffer_Release(&view)
    return result


def checksum_chunks(data, chunk_bytes):
    """An array of uint64: one checksum for each chunk_bytes of data."""
    cdef uint32_t chunk = _option(chunk_bytes, "chunk_bytes", 1, 1 << 31)
    cdef Py_buffer view
    cdef uint64_t *result_at
    _export(data, &view, PyBUF_SIMPLE, "data")
    try:
        result = np.empty(-(-view.len // chunk), np.uint64)
        result_at = <uint64_t *><uintptr_t>result.ctypes.data
        with nogil:
            db_checksum_chunks(view.buf, view.len, chunk, result_at)
    finally:
        PyBuffer_Release(&view)
    return result


def find_signature(path):
    """What libblkid finds at the start of a device or file, such as "ext4" or "gpt"; "" when it
    finds nothing. Raises UnsupportedError without libblkid, DeviceError if it can't be read."""
    cdef bytes encoded = os.fsencode(path)
    cdef const char *c_path = encoded
    cdef char name[64]
    cdef int rc
    with nogil:
        rc = db_find_signature(c_path, name, sizeof(name))
    if rc == -ENOSYS:
        raise UnsupportedError("libblkid is not on this system, so it cannot be seen whether "
                               f"{os.fsdecode(encoded)} holds a filesystem: install libblkid1")
    if rc:
        raise device_error(-rc, device=os.fsdecode(encoded), operation="signature check")
    return (<bytes>name).decode()


def counters():
    """Objects of the C core alive in this process; all zero when everything is closed."""
    cdef db_counters_t found
    db_counters(&found)
    return found
