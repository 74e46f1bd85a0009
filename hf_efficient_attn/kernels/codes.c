/*
 * Codes of signs, and their clusters by the Hamming distance: ops/codes.py on a CPU. A code is `words` numbers of 64 bits,
 * the sign of its product with plane p in bit p; those without a plane are 0.
 */

#include "arithmetic.h"

typedef unsigned long word;

enum { BLOCK = 256 }; /* codes whose distances are found together */

/* x (n, dim) -> codes (n, words), by planes (dim, 64 words), zeros where there is none. */
void sign_codes(const float *x, long n, long dim, const float *planes, long words, word *codes) {
    float s[6 * 4 * W];
    for (long first = 0; first < n; first += 6) {
        long m = n - first < 6 ? n - first : 6;
        for (long k = 0; k < words; k++) {
            product(m, 64, dim, x + first * dim, dim, 1, planes + 64 * k, 64 * words, s, 64, 0);
            for (long i = 0; i < m; i++) {
                word code = 0;
                for (int b = 0; b < 64; b++) code |= (word)(s[i * 64 + b] > 0) << b;
                codes[(first + i) * words + k] = code;
            }
        }
    }
}

/* For n codes the nearest of `count` centres, of equally near ones the first; those that are `absent` are never it. */
static void find_nearest(const word *codes, long n, long words, const word *centres, const float *absent, long count,
                         long *labels) {
    for (long first = 0; first < n; first += BLOCK) {
        long m = n - first < BLOCK ? n - first : BLOCK, best[BLOCK];
        for (long i = 0; i < m; i++) best[i] = 1L << 60, labels[first + i] = 0;
        for (long c = 0; c < count; c++) {
            long away[BLOCK], far = absent && absent[c] < -1 ? 1L << 40 : 0;
            for (long i = 0; i < m; i++) away[i] = far;
            for (long k = 0; k < words; k++) {
                word centre = centres[c * words + k];
                for (long i = 0; i < m; i++) away[i] += __builtin_popcountl(codes[(first + i) * words + k] ^ centre);
            }
            for (long i = 0; i < m; i++) {
                long nearer = away[i] < best[i];
                labels[first + i] = nearer ? c : labels[first + i], best[i] = nearer ? away[i] : best[i];
            }
        }
    }
}

/*
 * Lloyd's algorithm on n codes. centres (count, words), which begin as the codes at equal distances, and the label of each
 * code. ones: count * (64 words + 1) ints for use in between.
 */
void cluster_codes(const word *codes, long n, long words, long count, long iterations, int *ones, word *centres,
                   long *labels) {
    int *members = ones + 64 * words * count;
    for (long c = 0; c < count; c++)
        for (long k = 0; k < words; k++) centres[c * words + k] = n ? codes[c * n / count * words + k] : 0;
    for (long t = 0; t < iterations; t++) {
        find_nearest(codes, n, words, centres, 0, count, labels);
        for (long i = 0; i < count * (64 * words + 1); i++) ones[i] = 0;
        for (long i = 0; i < n; i++) {
            members[labels[i]]++;
            for (long k = 0; k < words; k++) {
                int *sum = ones + (labels[i] * words + k) * 64;
                word code = codes[i * words + k];
                for (int b = 0; b < 64; b++) sum[b] += code >> b & 1;
            }
        }
        for (long c = 0; c < count; c++)
            for (long k = 0; k < words && members[c]; k++) {
                word code = 0;
                for (int b = 0; b < 64; b++) code |= (word)(2 * ones[(c * words + k) * 64 + b] >= members[c]) << b;
                centres[c * words + k] = code;
            }
    }
    find_nearest(codes, n, words, centres, 0, count, labels);
}

/* Codes (n, words) -> (n, bits + 1): 1 and -1, and `last`. */
void spread_codes(const word *codes, long n, long words, long bits, const float *last, float *out) {
    for (long i = 0; i < n; i++, out += bits + 1) {
        for (long b = 0; b < bits; b++) out[b] = codes[i * words + b / 64] >> b % 64 & 1 ? 1 : -1;
        out[bits] = last[i];
    }
}

/* centres (parts, count, bits + 1) as spread_codes gives them, of those of part stand[i] the nearest to code i, as its number
 * among all. packed: parts * count * words. */
void nearest_codes(const word *codes, const long *stand, long n, long words, const float *centres, long parts, long count,
                   long bits, word *packed, float *last, long *labels) {
    for (long c = 0; c < parts * count; c++, centres += bits + 1) {
        for (long k = 0; k < words; k++) packed[c * words + k] = 0;
        for (long b = 0; b < bits; b++) packed[c * words + b / 64] |= (word)(centres[b] > 0) << b % 64;
        last[c] = centres[bits];
    }
    for (long first = 0; first < n;) {
        long m = 1, at = stand[first] * count;
        while (first + m < n && stand[first + m] == stand[first]) m++;
        find_nearest(codes + first * words, m, words, packed + at * words, last + at, count, labels + first);
        for (long i = 0; i < m; i++) labels[first + i] += at;
        first += m;
    }
}
