# Bracket; included by _core.pyx.

@cython.final
cdef class Bracket:
    """`with Bracket(begin, end) as value`: end() is called for certain once begin() has been.

    Python runs signal handlers between bytecodes, where they may raise: also at the first one of a
    __exit__ or of a function called in `finally`, which then has done nothing. Here is none. What
    end() is cut short in it does again, so it has to be something that can be done twice."""

    cdef object begin
    cdef object end

    def __init__(self, begin, end):
        self.begin = begin
        self.end = end

    def __enter__(self):
        try:
            return self.begin()
        except BaseException:
            self._end()
            raise

    def __exit__(self, *error):
        self._end()

    cdef int _end(self) except -1:
        try:
            self.end()
        except BaseException:
            self.end()
            raise
        return 0
