# Arguments from Python as numbers and memory, or what is wrong with them; included by _core.pyx.

# Names are put together where a message needs them: doing it for each request of a batch took a
# quarter of the time that Python spent on a small one.
cdef str _named(str name, Py_ssize_t index):
    return name if index < 0 else f"{name} {index}"


cdef int64_t _bytes(object value, str name, Py_ssize_t index=-1) except -1:
    """A number of bytes, from 0 to 2**63 - 1."""
    cdef int overflow = 0
    cdef int64_t number
    try:
        value = PyNumber_Index(value)
    except TypeError:
        raise TypeError(
            f"{_named(name, index)} must be a whole number of bytes, not {type(value).__name__}"
        ) from None
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow > 0:
        raise ValueError(f"{_named(name, index)} of {value} bytes is more than any device has")
    if overflow < 0 or number < 0:
        raise ValueError(f"{_named(name, index)} must not be negative, got {value}")
    return number


cdef int64_t _option(object value, str name, int64_t least, int64_t most) except -1:
    number = _bytes(value, name)
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {number}")
    return number


cdef db_path _path(object path) except *:
    if path == "direct":
        return DB_PATH_DIRECT
    if path == "pagecache":
        return DB_PATH_PAGECACHE
    raise ValueError(f'path must be "direct" or "pagecache", got {path!r}')


cdef uintptr_t _address(object memory) except? 0:
    cdef Py_buffer view
    cdef uintptr_t start
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    start = <uintptr_t>view.buf
    PyBuffer_Release(&view)
    return start


cdef int _export(object memory, Py_buffer *view, int flags, str what,
                 Py_ssize_t index=-1) except -1:
    """PyObject_GetBuffer, with errors that say whose memory it was and what it lacks."""
    try:
        PyObject_GetBuffer(memory, view, flags)
    except TypeError:
        raise TypeError(
            f"{_named(what, index)} must be memory (bytes, an array, anything with the buffer "
            f"protocol), not {type(memory).__name__}"
        ) from None
    except (BufferError, ValueError) as error:
        need = "writable and contiguous" if flags & PyBUF_WRITABLE else "contiguous"
        raise ValueError(f"{_named(what, index)} must be {need} memory: {error}") from None
    return 0
