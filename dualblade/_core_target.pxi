# What Device.open() is given, and what it says when that can't be opened; included by _core.pyx.

cdef list _paths(object target):
    """The paths of a device's members, encoded."""
    targets = target if isinstance(target, (list, tuple)) else [target]
    if not 1 <= len(targets) <= DB_MEMBERS_MAX:
        raise ValueError(f"a device has from 1 to {DB_MEMBERS_MAX} members, got {len(targets)}")
    paths = [os.fsencode(each) for each in targets]
    for each, path in zip(targets, paths):
        if b"\0" in path:
            raise ValueError(f"the target {each!r} has a null character in its name")
    return paths


# Why NVMe commands can't be used, where the system's words for the number say something else.
_NVME_REFUSALS = {
    EBUSY: "others use it, and what they have written may not be on it yet",
    ENODEV: "it is no NVMe namespace with a character device (/dev/ngXnY); a partition has none",
    ENOENT: "its character device /dev/ngXnY is not in /dev",
    EMEDIUMTYPE: "its blocks carry metadata; format the namespace without (nvme format --lbaf)",
    ESTALE: "its character device is not of the same namespace",
    EACCES: "this user may not read and write its character device /dev/ngXnY",
    EPERM: "NVMe commands are not allowed to this process: before Linux 6.2 that takes "
           "CAP_SYS_ADMIN, and a container may forbid it",
    EOPNOTSUPP: "this kernel takes no NVMe commands by io_uring (Linux 5.19 does), or its blocks "
                "are larger than 4096 bytes",
    EREMOTEIO: "the drive did not say what it is",
}


cdef str _refusal(str engine, int error):
    words = os.strerror(error)
    return _NVME_REFUSALS.get(error, words) if engine == "nvme" else words


cdef object _sibling(object path, bint is_character):
    """The other node of the NVMe namespace of which this is the character or the block device."""
    cdef char node[64]
    cdef int rc
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not (stat.S_ISCHR if is_character else stat.S_ISBLK)(status.st_mode):
        return None
    rc = db_nvme_sibling(status.st_rdev, is_character, node, sizeof(node))
    if rc == -ENOTBLK:
        return None
    if rc:
        raise device_error(-rc, device=path, operation="find the other node of")
    return node.decode()


def nvme_block_node(path):
    """The block device of the NVMe namespace whose character device (/dev/ngXnY) this is; None if
    it is anything else. Raises DeviceError where that has none here."""
    return _sibling(path, True)


def nvme_character_node(path):
    """The same the other way: the character device of an NVMe namespace's block device."""
    return _sibling(path, False)


cdef object _device_error(int error, unsigned short nvme_status, object device, str operation,
                          object offset=None, object length=None):
    """The exception for a failed operation: of the drive where it gave a status, else of the
    kernel."""
    if nvme_status:
        return nvme_error(nvme_status, device=device, operation=operation, offset=offset,
                          length=length)
    return device_error(error, device=device, operation=operation, offset=offset, length=length)


cdef int _raise_open_error(int error, tuple targets, uint32_t failed, str engine,
                           const db_device_options *options) except -1:
    target = targets[failed] if failed < len(targets) else ", ".join(targets)
    if error == ENOTUNIQ:
        raise ValueError(f"{target} is given twice, or under two names: give each member of a "
                         f"striped device once (got {', '.join(targets)})")
    if error == ENOSYS and engine != "auto":
        raise UnsupportedError(
            f'engine "{engine}" is not available here ({os.strerror(error)}): '
            'use engine="auto"'
        )
    if engine == "nvme" and error in _NVME_REFUSALS and os.access(target, os.R_OK) \
            and error != EBUSY:  # else it says nothing of the character device
        raise UnsupportedError(
            f'engine "nvme" can\'t be used on {target}: {_NVME_REFUSALS[error]}. '
            'Use engine="auto"'
        )
    if options.sqpoll or options.iopoll:
        if error == EOPNOTSUPP and options.iopoll:
            raise UnsupportedError(
                f"completions on {target} can't be polled for: it is not a device whose driver has "
                "polling queues (NVMe: the nvme module's option poll_queues=N); leave iopoll out"
            )
        if error in (EOPNOTSUPP, ENOSYS, EPERM):
            raise UnsupportedError(
                f"sqpoll and iopoll need io_uring, which does not work on {target} here "
                f"({os.strerror(error)}): leave them out"
            )
    if error == EINVAL:
        least = f"smaller than stripe_bytes ({options.stripe_bytes})"
        raise ValueError(
            f"{target} cannot be opened: it is {least if len(targets) > 1 else 'empty'}, or an "
            f"option is out of range "
            f"(queue_depth {options.queue_depth}, request_bytes {options.request_bytes})"
        )
    if error == ENOMEM:
        raise MemoryError(
            f"not enough memory for the queues of {target}; io_uring's rings may have to fit into "
            "what may be locked (ulimit -l), those of the other engines don't"
        )
    raise device_error(error, device=target, operation="open")
