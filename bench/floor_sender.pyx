# cython: language_level=3
"""The floor: how little a sender of constant octets can cost on this machine. C level, epoll, one process, nothing composed.

It does what the engine does on the wire and nothing else: with DATA the content of one message and the envelope of the next leave in one
write (one write and one read per message), with BDAT a window of whole messages does. Replies are counted, and each has to begin
with 2 or 3. Bench only: no time-outs, no error handling beyond ending with an exception.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, clock_gettime, timespec
from posix.unistd cimport close, read

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int EPOLLIN
    int EPOLL_CTL_ADD
    int EPOLL_CLOEXEC
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_NOSIGNAL
    ssize_t send(int fd, const void *data, size_t length, int flags)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLOUT
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef enum:
    READ = 65536
    EVENTS = 256

ctypedef struct Link:
    long left       # messages still to be sent on it
    int owed        # reply lines not read yet
    bint line_begins


cdef double _clock(int which) noexcept nogil:
    cdef timespec t
    clock_gettime(<int> which, &t)
    return <double> t.tv_sec + <double> t.tv_nsec * 1e-9


cdef int _write(int fd, const char *data, size_t length) noexcept nogil:
    # The whole of it; where the socket is full it waits, for this is a bench of senders that are not held up.
    cdef ssize_t n
    cdef pollfd waiting
    while length:
        n = send(fd, data, length, MSG_NOSIGNAL)
        if n >= 0:
            data += n
            length -= <size_t> n
        elif errno == EAGAIN:
            waiting.fd, waiting.events = fd, <short> POLLOUT
            poll(&waiting, 1, 1000)
        elif errno != EINTR:
            return -1
    return 0


cdef int _count(Link *link, const char *data, ssize_t length) noexcept nogil:
    # Takes the lines off what is owed; -1 for a reply that is no success.
    cdef ssize_t i
    for i in range(length):
        if link.line_begins and data[i] != c"2" and data[i] != c"3":
            return -1
        link.line_begins = data[i] == c"\n"
        link.owed -= link.line_begins
    return 0


def run(list descriptors not None, bytes envelope not None, bytes content not None, long messages, int window) -> tuple:
    """Send `messages` over connections past EHLO; returns (CPU seconds, wall seconds, messages sent).

    `envelope` is MAIL and RCPT; `content` a message in which no line starts with a dot. `window` 0: DATA, else so many BDAT messages
    per write. The connections are blocking ones that epoll says are readable. Raises ConnectionError when one ends or refuses.
    """
    cdef int count = len(descriptors), open_links = 0, i, fd, ready, failed = 0, epoll = epoll_create1(EPOLL_CLOEXEC)
    cdef int top = max(descriptors) + 1
    cdef long each = messages // count // max(window, 1) * max(window, 1), done = 0
    cdef bytes first = envelope + b"DATA\r\n"
    cdef bytes middle = content + b".\r\n" + first
    cdef bytes last = content + b".\r\n"
    cdef bytes group = (envelope + b"BDAT %d LAST\r\n" % len(content) + content) * window
    cdef const char *p_middle = middle
    cdef const char *p_last = last
    cdef const char *p_group = group
    cdef size_t n_middle = len(middle), n_last = len(last), n_group = len(group)
    cdef Link *links = <Link *> calloc(top, sizeof(Link))
    cdef epoll_event event
    cdef epoll_event[EVENTS] events
    cdef char[READ] buffer
    cdef ssize_t n
    cdef double cpu, wall
    if links == NULL or epoll < 0 or each < 1:
        free(links)
        raise ValueError("at least one message (one window) for every connection is needed")
    cpu, wall = _clock(CLOCK_PROCESS_CPUTIME_ID), _clock(CLOCK_MONOTONIC)
    for fd in descriptors:
        event.events, event.data.fd = EPOLLIN, fd
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)
        links[fd].left, links[fd].line_begins = each, True
        links[fd].owed = 3 if window == 0 else 3 * window
        if _write(fd, <const char *> first if window == 0 else p_group, len(first) if window == 0 else n_group) < 0:
            failed = fd
        open_links += 1
    with nogil:
        while open_links and not failed:
            ready = epoll_wait(epoll, events, EVENTS, -1)
            for i in range(ready):
                fd = events[i].data.fd
                n = read(fd, buffer, READ)
                if n <= 0 or _count(&links[fd], buffer, n) < 0:
                    failed = fd
                    break
                if links[fd].owed > 0:
                    continue
                if window:
                    links[fd].left -= window
                    done += window
                    if links[fd].left == 0:
                        open_links -= 1
                        continue
                    links[fd].owed = 3 * window
                    if _write(fd, p_group, n_group) < 0:
                        failed = fd
                    continue
                if links[fd].left == 0:
                    done += 1
                    open_links -= 1
                elif links[fd].left == 1:
                    done += links[fd].left < each
                    links[fd].left = 0
                    links[fd].owed = 1
                    if _write(fd, p_last, n_last) < 0:
                        failed = fd
                else:
                    done += links[fd].left < each
                    links[fd].left -= 1
                    links[fd].owed = 4
                    if _write(fd, p_middle, n_middle) < 0:
                        failed = fd
    cpu, wall = _clock(CLOCK_PROCESS_CPUTIME_ID) - cpu, _clock(CLOCK_MONOTONIC) - wall
    close(epoll)
    free(links)
    if failed:
        raise ConnectionError(f"a connection ended or was refused after {done} messages")
    return cpu, wall, done
