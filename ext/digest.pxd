"""SHA-256 and HMAC-SHA256 (FIPS 180-4, RFC 2104) with the two keyed states computed once, for the hot path; inline C.

A token's payload is shorter than a block, so one token costs two compressions: about 0.1 us with the SHA instructions of
the CPU (chosen at run time), 0.6 us without.
"""

cdef extern from *:
    """
    #ifndef SLUICE_DIGEST
    #define SLUICE_DIGEST
    #include <stdint.h>
    #include <string.h>

    typedef struct { uint32_t inner[8], outer[8]; int plain; } sluice_hmac;

    static const uint32_t sluice_k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2 };

    static const uint32_t sluice_start[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                              0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };

    static inline uint32_t sluice_ror(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

    static void sluice_block_plain(uint32_t *h, const unsigned char *p) {
        uint32_t w[64], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], k = h[7], t, u;
        int i;
        for (i = 0; i < 16; i++)
            w[i] = (uint32_t)p[4*i] << 24 | (uint32_t)p[4*i+1] << 16 | (uint32_t)p[4*i+2] << 8 | p[4*i+3];
        for (; i < 64; i++)
            w[i] = w[i-16] + w[i-7] + (sluice_ror(w[i-15], 7) ^ sluice_ror(w[i-15], 18) ^ (w[i-15] >> 3))
                 + (sluice_ror(w[i-2], 17) ^ sluice_ror(w[i-2], 19) ^ (w[i-2] >> 10));
        for (i = 0; i < 64; i++) {
            t = k + (sluice_ror(e, 6) ^ sluice_ror(e, 11) ^ sluice_ror(e, 25)) + ((e & f) ^ (~e & g)) + sluice_k[i] + w[i];
            u = (sluice_ror(a, 2) ^ sluice_ror(a, 13) ^ sluice_ror(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            k = g; g = f; f = e; e = d + t; d = c; c = b; b = a; a = t + u;
        }
        h[0] += a; h[1] += b; h[2] += c; h[3] += d; h[4] += e; h[5] += f; h[6] += g; h[7] += k;
    }

    #if defined(__x86_64__) && defined(__GNUC__)
    #include <immintrin.h>
    #include <cpuid.h>
    #define SLUICE_SHA __attribute__((unused, target("sha,sse4.1,ssse3")))
    typedef struct { __m128i s0, s1, m[4]; } sluice_lane;   /* ABEF, CDGH, the sixteen words in use */

    SLUICE_SHA static inline void sluice_lane_begin(sluice_lane *l, const uint32_t *h) {
        __m128i t = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)h), 0xB1);           /* CDAB */
        __m128i u = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)(h + 4)), 0x1B);     /* EFGH */
        l->s0 = _mm_alignr_epi8(t, u, 8);
        l->s1 = _mm_blend_epi16(u, t, 0xF0);
    }
    SLUICE_SHA static inline void sluice_lane_words(sluice_lane *l, const unsigned char *p) {
        const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
        int i;
        for (i = 0; i < 4; i++)
            l->m[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(p + 16*i)), swap);
    }
    SLUICE_SHA static inline void sluice_lane_rounds(sluice_lane *l, int i) {   /* four of them, i of sixteen times */
        __m128i *m = l->m, x = _mm_add_epi32(m[i & 3], _mm_loadu_si128((const __m128i*)(sluice_k + 4*i)));
        l->s1 = _mm_sha256rnds2_epu32(l->s1, l->s0, x);
        l->s0 = _mm_sha256rnds2_epu32(l->s0, l->s1, _mm_shuffle_epi32(x, 0x0E));
        if (i < 12)   /* the words of round i + 4 take the place of those of round i */
            m[i & 3] = _mm_sha256msg2_epu32(
                _mm_add_epi32(_mm_sha256msg1_epu32(m[i & 3], m[(i + 1) & 3]), _mm_alignr_epi8(m[(i + 3) & 3], m[(i + 2) & 3], 4)),
                m[(i + 3) & 3]);
    }
    SLUICE_SHA static inline void sluice_lane_end(const sluice_lane *l, uint32_t *h) {
        __m128i t = _mm_shuffle_epi32(l->s0, 0x1B), u = _mm_shuffle_epi32(l->s1, 0xB1);    /* FEBA, DCHG */
        _mm_storeu_si128((__m128i*)h, _mm_blend_epi16(t, u, 0xF0));                        /* DCBA */
        _mm_storeu_si128((__m128i*)(h + 4), _mm_alignr_epi8(u, t, 8));                     /* HGFE */
    }
    SLUICE_SHA static void sluice_blocks_sha(uint32_t *h, const unsigned char *p, size_t blocks) {
        sluice_lane l, before;
        int i;
        for (sluice_lane_begin(&l, h); blocks; blocks--, p += 64) {
            before = l;
            sluice_lane_words(&l, p);
            _Pragma("GCC unroll 16")
            for (i = 0; i < 16; i++) sluice_lane_rounds(&l, i);
            l.s0 = _mm_add_epi32(l.s0, before.s0); l.s1 = _mm_add_epi32(l.s1, before.s1);
        }
        sluice_lane_end(&l, h);
    }
    /* Two texts side by side: a round waits for the one before it, so one text leaves half of the unit idle */
    SLUICE_SHA static void sluice_pairs_sha(uint32_t *h, const unsigned char *p, uint32_t *g, const unsigned char *q, size_t blocks) {
        sluice_lane l, r, left, right;
        int i;
        sluice_lane_begin(&l, h); sluice_lane_begin(&r, g);
        for (; blocks; blocks--, p += 64, q += 64) {
            left = l; right = r;
            sluice_lane_words(&l, p); sluice_lane_words(&r, q);
            _Pragma("GCC unroll 16")
            for (i = 0; i < 16; i++) { sluice_lane_rounds(&l, i); sluice_lane_rounds(&r, i); }
            l.s0 = _mm_add_epi32(l.s0, left.s0); l.s1 = _mm_add_epi32(l.s1, left.s1);
            r.s0 = _mm_add_epi32(r.s0, right.s0); r.s1 = _mm_add_epi32(r.s1, right.s1);
        }
        sluice_lane_end(&l, h); sluice_lane_end(&r, g);
    }
    static int sluice_has_sha(void) {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 19)) || !(c & (1u << 9))) return 0;   /* SSE4.1, SSSE3 */
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
    }
    #else
    static void sluice_blocks_sha(uint32_t *h, const unsigned char *p, size_t blocks) { (void)h; (void)p; (void)blocks; }
    static void sluice_pairs_sha(uint32_t *h, const unsigned char *p, uint32_t *g, const unsigned char *q, size_t blocks) {
        (void)h; (void)p; (void)g; (void)q; (void)blocks;
    }
    static int sluice_has_sha(void) { return 0; }
    #endif

    static int sluice_sha = -1;
    static inline int sluice_fast(int plain) {
        if (sluice_sha < 0) sluice_sha = sluice_has_sha();
        return sluice_sha && !plain;
    }
    static inline void sluice_blocks(uint32_t *h, const unsigned char *p, size_t blocks, int plain) {
        if (sluice_fast(plain)) sluice_blocks_sha(h, p, blocks);
        else for (; blocks; blocks--, p += 64) sluice_block_plain(h, p);
    }
    static inline void sluice_block(uint32_t *h, const unsigned char *p, int plain) { sluice_blocks(h, p, 1, plain); }

    static inline void sluice_hmac_key(sluice_hmac *s, const unsigned char *key, size_t n, int plain) {   /* n <= 64 */
        unsigned char pad[64];
        size_t i;
        s->plain = plain;
        for (i = 0; i < 64; i++) pad[i] = (i < n ? key[i] : 0) ^ 0x36;
        memcpy(s->inner, sluice_start, 32); sluice_block(s->inner, pad, plain);
        for (i = 0; i < 64; i++) pad[i] ^= 0x36 ^ 0x5c;
        memcpy(s->outer, sluice_start, 32); sluice_block(s->outer, pad, plain);
    }

    /* h: the state behind the last whole block of n octets (before of them lie in front of the text), whose rest is at text */
    static inline void sluice_end(uint32_t *h, const unsigned char *text, size_t n, size_t before, int plain) {
        unsigned char last[128];
        size_t i, rest = n & 63, size = rest < 56 ? 64 : 128;
        memset(last, 0, 128);
        memcpy(last, text, rest);
        last[rest] = 0x80;
        for (i = 0; i < 8; i++) last[size - 1 - i] = (unsigned char)((uint64_t)(n + before) * 8 >> 8*i);
        sluice_blocks(h, last, size / 64, plain);
    }

    static inline void sluice_words(const uint32_t *h, unsigned char *out) {   /* 32 octets, most significant first */
        int i;
        for (i = 0; i < 8; i++) {
            out[4*i] = h[i] >> 24; out[4*i+1] = h[i] >> 16; out[4*i+2] = h[i] >> 8; out[4*i+3] = h[i];
        }
    }

    /* The hash of what follows n octets at text whose first blocks h has seen already */
    static inline void sluice_sha256_rest(uint32_t *h, const unsigned char *text, size_t n, size_t blocks, unsigned char *out) {
        sluice_blocks(h, text + 64 * blocks, n / 64 - blocks, 0);
        sluice_end(h, text + (n & ~(size_t)63), n, 0, 0);
        sluice_words(h, out);
    }
    static inline void sluice_sha256(const unsigned char *text, size_t n, unsigned char *out) {
        uint32_t h[8];
        memcpy(h, sluice_start, 32);
        sluice_sha256_rest(h, text, n, 0, out);
    }
    static inline void sluice_sha256_pair(
        const unsigned char *first, size_t n, unsigned char *out, const unsigned char *second, size_t k, unsigned char *other
    ) {
        uint32_t h[8], g[8];
        size_t both = sluice_fast(0) ? (n < k ? n : k) / 64 : 0;
        memcpy(h, sluice_start, 32); memcpy(g, sluice_start, 32);
        if (both) sluice_pairs_sha(h, first, g, second, both);
        sluice_sha256_rest(h, first, n, both, out);
        sluice_sha256_rest(g, second, k, both, other);
    }

    static inline void sluice_hmac_text(const sluice_hmac *s, const unsigned char *text, size_t n, unsigned char *out) {
        uint32_t h[8];
        unsigned char block[64];
        memcpy(h, s->inner, 32);
        if (n <= 55) {   /* nearly every token: one block, without the length of any text */
            memset(block + n, 0, 64 - n);
            memcpy(block, text, n);
            block[n] = 0x80;
            block[62] = (unsigned char)((64 + n) * 8 >> 8); block[63] = (unsigned char)((64 + n) * 8);
            sluice_block(h, block, s->plain);
        } else {
            sluice_blocks(h, text, n / 64, s->plain);
            sluice_end(h, text + (n & ~(size_t)63), n, 64, s->plain);
        }
        memset(block + 32, 0, 32);
        sluice_words(h, block);
        block[32] = 0x80;
        block[62] = 3;   /* 96 octets are 768 bits */
        memcpy(h, s->outer, 32);
        sluice_block(h, block, s->plain);
        sluice_words(h, out);
    }
    #endif
    """
    ctypedef struct HmacKey "sluice_hmac":
        pass
    void hmac_key "sluice_hmac_key"(HmacKey* state, const unsigned char* key, size_t length, int plain) noexcept
    void hmac_text "sluice_hmac_text"(const HmacKey* state, const unsigned char* text, size_t length, unsigned char* out) noexcept
    void sha256 "sluice_sha256"(const unsigned char* text, size_t length, unsigned char* out) noexcept nogil
    void sha256_pair "sluice_sha256_pair"(
        const unsigned char* first, size_t length, unsigned char* out,
        const unsigned char* second, size_t other_length, unsigned char* other_out) noexcept nogil
