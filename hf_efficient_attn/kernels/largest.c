/* Which keys have the largest products with a query: ops/largest.py on a CPU, float32. */

#include "arithmetic.h"

enum { R = 48, BITS = 11, BINS = 1 << BITS };

/* Numbers in the order of the floats x (n,), in their place; of both zeros one. */
static void order(float *x, long n) {
    for (long j = 0; j < n; j += W) {
        ivec *at = (ivec *)(x + j), bits = (ivec)(*(vec *)(x + j) + 0.0f);
        *at = bits ^ ((bits >> 31) | (int)0x80000000);
    }
}

/*
 * The `picks` largest of n numbers, picks < n, are those whose bits of `mask` exceed `least`, and of those where they equal it
 * the first so many, which is returned. Found by counting the numbers by their leading bits, then those of one count by the
 * next ones; the last step shares a bit with the one before it.
 */
static long find_least(const unsigned *x, long n, long picks, unsigned *mask, unsigned *least) {
    *mask = *least = 0;
    for (int shift = 32 - BITS; *mask != ~0u; shift = shift > BITS ? shift - BITS : 0) {
        int count[BINS] = {0}, bin = BINS - 1;
        for (long j = 0; j < n; j++)
            if ((x[j] & *mask) == *least) count[x[j] >> shift & (BINS - 1)]++;
        while (count[bin] < picks) picks -= count[bin--];
        *least |= (unsigned)bin << shift, *mask |= (BINS - 1u) << shift;
        if (count[bin] == picks) break;
    }
    return picks;
}

/*
 * q (rows, dim), k (.., dim) -> top (rows, picks), ascending: of the keys before ends[i] those with the largest products
 * q_i . k, of equal ones the lower; where there are no more, 0 at the end. scores, for use in between: 48 rows, or fewer where
 * there are, of `room` floats, in whole vectors no fewer than the largest of ends.
 */
void largest_products(const float *q, const float *k, const long *ends, long rows, long dim, long picks, long room,
                      float *scores, long *top) {
    static __thread float kt[MOST * T];
    for (long first = 0; first < rows; first += R) {
        long m = rows - first < R ? rows - first : R, last = 0;
        for (long i = first; i < first + m; i++) last = ends[i] > last ? ends[i] : last;
        for (long begin = 0; begin < last; begin += T) {
            long n = last - begin < T ? last - begin : T;
            gather(k + begin * dim, dim, n, dim, 1.0f, kt, T);
            product(m, (n + W - 1) / W * W, dim, q + first * dim, dim, 1, kt, T, scores + begin, room, 0);
        }
        for (long i = 0; i < m; i++, top += picks) {
            long n = ends[first + i], held = 0, equal = n;
            unsigned mask = 0, least = 0, *x = (unsigned *)(scores + i * room);
            order(scores + i * room, n);
            if (n > picks) equal = find_least(x, n, picks, &mask, &least);
            for (long j = 0; j < n; j++) {
                unsigned at = x[j] & mask;
                if (at > least || (at == least && equal-- > 0)) top[held++] = j;
            }
            for (; held < picks; held++) top[held] = 0;
        }
    }
}
