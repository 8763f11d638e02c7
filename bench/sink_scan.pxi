# How the sink looks at octets: the end of content, faults in it, hashes, paths. Included by sink_protocol.pyx.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #include <time.h>
    #if defined(__SSE2__)
    #include <emmintrin.h>
    #endif

    /* Index of CRLF.CRLF at or after `from`, or -1. Content that starts with .CRLF is empty: -2. */
    static Py_ssize_t sink_find_end(const char *p, Py_ssize_t n, Py_ssize_t from) {
        Py_ssize_t i = from;
        if (from == 0 && n >= 3 && p[0] == '.' && p[1] == '\\r' && p[2] == '\\n') return -2;
    #if defined(__SSE2__)
        const __m128i newline = _mm_set1_epi8('\\n'), dot = _mm_set1_epi8('.');
        for (; i + 17 <= n; i += 16) {
            __m128i a = _mm_loadu_si128((const __m128i *)(p + i));
            __m128i b = _mm_loadu_si128((const __m128i *)(p + i + 1));
            unsigned mask = (unsigned)_mm_movemask_epi8(_mm_and_si128(_mm_cmpeq_epi8(a, newline), _mm_cmpeq_epi8(b, dot)));
            while (mask) {
                Py_ssize_t k = i + __builtin_ctz(mask);
                if (k >= 1 && k + 3 < n && p[k - 1] == '\\r' && p[k + 2] == '\\r' && p[k + 3] == '\\n') return k - 1;
                mask &= mask - 1;
            }
        }
    #endif
        for (; i + 3 < n; i++)
            if (p[i] == '\\n' && p[i + 1] == '.' && i >= 1 && p[i - 1] == '\\r' && p[i + 2] == '\\r' && p[i + 3] == '\\n') return i - 1;
        return -1;
    }

    enum { SINK_BARE = 1, SINK_LONG = 2, SINK_DOTTED = 4, SINK_NUL = 8, SINK_EIGHT = 16 };

    /* What is to be said about content: bare CR or LF, a line over 998 octets, a line that starts with a dot, NUL, 8-bit octets. */
    static int sink_look(const char *p, Py_ssize_t n) {
        int found = 0;
        Py_ssize_t i = 0, start = 0;
        char before = '\\n';
    #if defined(__SSE2__)
        if (n >= 17) {
            /* Each octet beside the one before it, sixteen at a time: what was seen is gathered and looked at once, at the end. */
            const __m128i newline = _mm_set1_epi8('\\n'), ret = _mm_set1_epi8('\\r'), dot = _mm_set1_epi8('.');
            __m128i bare = _mm_setzero_si128(), dotted = bare, eight = bare, least = _mm_set1_epi8((char)0xff);
            if (p[0] == '\\n') found |= SINK_BARE;
            if (p[0] == '.') found |= SINK_DOTTED;
            if (p[0] == 0) found |= SINK_NUL;
            if (p[0] & 0x80) found |= SINK_EIGHT;
            for (i = 1; i + 16 <= n; i += 16) {
                __m128i v = _mm_loadu_si128((const __m128i *)(p + i)), u = _mm_loadu_si128((const __m128i *)(p + i - 1));
                __m128i l = _mm_cmpeq_epi8(v, newline);
                unsigned ends = (unsigned)_mm_movemask_epi8(l);
                bare = _mm_or_si128(bare, _mm_xor_si128(l, _mm_cmpeq_epi8(u, ret)));
                dotted = _mm_or_si128(dotted, _mm_and_si128(_mm_cmpeq_epi8(v, dot), _mm_cmpeq_epi8(u, newline)));
                eight = _mm_or_si128(eight, v);
                least = _mm_min_epu8(least, v);
                if (ends) {
                    if (i + __builtin_ctz(ends) - start > 999) found |= SINK_LONG;
                    start = i + 32 - __builtin_clz(ends);
                }
            }
            if (_mm_movemask_epi8(bare)) found |= SINK_BARE;
            if (_mm_movemask_epi8(dotted)) found |= SINK_DOTTED;
            if (_mm_movemask_epi8(eight)) found |= SINK_EIGHT;
            if (_mm_movemask_epi8(_mm_cmpeq_epi8(least, _mm_setzero_si128()))) found |= SINK_NUL;
            before = p[i - 1];
        }
    #endif
        for (; i < n; i++) {
            char c = p[i];
            if ((c == '\\n') != (before == '\\r')) found |= SINK_BARE;
            if (c == '.' && before == '\\n') found |= SINK_DOTTED;
            if (c == 0) found |= SINK_NUL;
            if (c & 0x80) found |= SINK_EIGHT;
            if (c == '\\n') {
                if (i - start > 999) found |= SINK_LONG;
                start = i + 1;
            }
            before = c;
        }
        if (before == '\\r') found |= SINK_BARE;
        if (n - start > 998) found |= SINK_LONG;
        return found;
    }

    static uint64_t sink_mix(uint64_t h, const char *p, Py_ssize_t n) {
        uint64_t w;
        h ^= (uint64_t)n * 0x9E3779B97F4A7C15ull;
        for (; n >= 8; p += 8, n -= 8) {
            memcpy(&w, p, 8);
            h = (h ^ w) * 0xFF51AFD7ED558CCDull;
            h ^= h >> 32;
        }
        w = 0;
        memcpy(&w, p, (size_t)n);
        h = (h ^ w) * 0xC4CEB9FE1A85EC53ull;
        return h ^ (h >> 29);
    }
    """
    Py_ssize_t sink_find_end(const char *p, Py_ssize_t n, Py_ssize_t start) nogil
    int sink_look(const char *p, Py_ssize_t n) nogil
    uint64_t sink_mix(uint64_t h, const char *p, Py_ssize_t n) nogil
    int SINK_BARE, SINK_LONG, SINK_DOTTED, SINK_NUL, SINK_EIGHT


cdef inline uint32_t key3(const char *p) noexcept nogil:
    cdef uint32_t a = <unsigned char>p[0], b = <unsigned char>p[1], c = <unsigned char>p[2]
    # Fold case of letters only: 0x20 on A-Z; the digits and '-' already carry that bit.
    return ((a | 0x20) << 16) | ((b | 0x20) << 8) | (c | 0x20)


cdef inline char *put(char *to, const char *p, Py_ssize_t n) noexcept nogil:
    memcpy(to, p, n)
    return to + n


cdef bint plain(const char *p, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef unsigned char c
    for i in range(n):
        c = <unsigned char>p[i]
        if c < 32 or c > 126 or c == c'"' or c == c"\\":
            return False
    return True


cdef int find_message_id(const char *p, Py_ssize_t n, const char **found, Py_ssize_t *length) noexcept nogil:
    """The trimmed value of the first Message-ID field of the header block (RFC 5322 §3.6.4), folded or not."""
    cdef Py_ssize_t i = 0, j
    cdef const char *line
    cdef const char *end
    while i < n:
        line = p + i
        end = <const char *>memchr(line, c"\n", n - i)
        if end == NULL:
            end = p + n
        if end - line <= 1:
            return 0
        if (line[0] | 0x20) == c"m" and end - line > 11 and (line[8] | 0x20) == c"i" and same(line, b"message-id:", 11):
            line += 11
            if end < p + n - 1 and (end[1] == c" " or end[1] == c"\t"):
                # A folded Message-ID stands alone on its second line; take that line when the first holds nothing.
                j = 0
                while line + j < end and (line[j] == c" " or line[j] == c"\t" or line[j] == c"\r"):
                    j += 1
                if line + j == end:
                    line = end + 1
                    end = <const char *>memchr(line, c"\n", p + n - line)
                    if end == NULL:
                        end = p + n
            while line < end and (line[0] == c" " or line[0] == c"\t"):
                line += 1
            while end > line and ((end - 1)[0] == c" " or (end - 1)[0] == c"\t" or (end - 1)[0] == c"\r"):
                end -= 1
            found[0] = line
            length[0] = end - line
            return 1
        i = end - p + 1
    return 0


cdef bint same(const char *p, const char *low, int n) noexcept nogil:
    """Does `p` begin with the lower-case ASCII text `low`, in any case?"""
    cdef int i
    cdef char c
    for i in range(n):
        c = p[i]
        if c"A" <= c <= c"Z":
            c = c | 0x20
        if c != low[i]:
            return False
    return True


cdef int queued(char *to, uint64_t number) noexcept nogil:
    cdef char digits[24]
    cdef int n = 0, i
    memcpy(to, b"250 2.0.0 Ok: queued as ", 24)
    while True:
        digits[n] = <char>(48 + number % 10)
        n += 1
        number //= 10
        if number == 0:
            break
    for i in range(n):
        to[24 + i] = digits[n - 1 - i]
    to[24 + n] = c"\r"
    to[25 + n] = c"\n"
    return 26 + n


cdef bint clean(const char *p, Py_ssize_t n) noexcept nogil:
    return memchr(p, c"\r", n) == NULL and memchr(p, 0, n) == NULL


cdef bint parse_path(const char *p, const char *end, const char **address, Py_ssize_t *length, Py_ssize_t *at, bint *eight, const char **rest) noexcept nogil:
    """Read `<address>` (RFC 5321 §4.1.2), quoted local parts included. `at` is the index of the @ that splits it, or -1."""
    cdef bint quoted = False
    cdef unsigned char c
    cdef const char *q
    while p < end and p[0] == c" ":
        p += 1
    if p >= end or p[0] != c"<":
        return False
    p += 1
    if p < end and p[0] == c"@":
        # A source route is to be ignored (RFC 5321 §4.1.1.3).
        while p < end and p[0] != c":" and p[0] != c">":
            p += 1
        if p >= end or p[0] != c":":
            return False
        p += 1
    q = p
    while q < end:
        c = <unsigned char>q[0]
        if quoted:
            if c == c"\\":
                q += 1
            elif c == c'"':
                quoted = False
        elif c == c">":
            address[0] = p
            length[0] = q - p
            rest[0] = q + 1
            return q - p <= 512 and (q + 1 == end or q[1] == c" ")
        elif c == c'"' and q == p:
            quoted = True
        elif c == c"@":
            if at[0] >= 0:
                return False
            at[0] = q - p
        elif c <= 32 or c == 127 or c == c"<":
            return False
        if c >= 128:
            eight[0] = True
        q += 1
    return False


cdef inline uint32_t verb(char a, char b, char c, char d) noexcept nogil:
    return (<uint32_t>(a & 0xDF)) | (<uint32_t>(b & 0xDF)) << 8 | (<uint32_t>(c & 0xDF)) << 16 | (<uint32_t>(d & 0xDF)) << 24


cdef uint32_t MAIL = verb(c"M", c"A", c"I", c"L"), RCPT = verb(c"R", c"C", c"P", c"T"), V_DATA = verb(c"D", c"A", c"T", c"A")
cdef uint32_t BDAT = verb(c"B", c"D", c"A", c"T"), EHLO = verb(c"E", c"H", c"L", c"O"), HELO = verb(c"H", c"E", c"L", c"O")
cdef uint32_t RSET = verb(c"R", c"S", c"E", c"T"), NOOP = verb(c"N", c"O", c"O", c"P"), QUIT = verb(c"Q", c"U", c"I", c"T")
cdef uint32_t VRFY = verb(c"V", c"R", c"F", c"Y"), EXPN = verb(c"E", c"X", c"P", c"N"), HELP = verb(c"H", c"E", c"L", c"P")
cdef uint32_t STAR = verb(c"S", c"T", c"A", c"R"), AUTH = verb(c"A", c"U", c"T", c"H")
