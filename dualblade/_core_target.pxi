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
