/* Which keys have the largest products with a query: ops/largest.py on a CPU, float32. */

#include "arithmetic.h"

enum { R = 48 };

/* The least of n values, in whole vectors, and where it is: of equal ones that with the largest slot. */
static long least(const float *value, const long *slot, long n, float *low) {
    vec all = *(const vec *)value;
    for (long t = W; t < n; t += W) all = -larger(-all, -*(const vec *)(value + t));
    *low = -greatest(-all);
    long at = -1;
    for (long t = 0; t < n; t++)
        if (value[t] == *low && (at < 0 || slot[t] > slot[at])) at = t;
    return at;
}

/*
 * q (rows, dim), k (.., dim) -> top (rows, picks), ascending: of the keys before ends[i] those with the largest products
 * q_i . k, of equal ones the lower; where there are no more, 0 at the end. value, slot (rows, room), room a multiple of 16,
 * at least picks, and count, low, at (rows,): for use in between.
 */
void largest_products(const float *q, const float *k, const long *ends, long rows, long dim, long picks, long room,
                      float *value, long *slot, long *count, float *low, long *at, long *top) {
    static __thread float kt[MOST * T], s[R * T];
    long last = 0;
    for (long i = 0; i < rows; i++) {
        if (ends[i] > last) last = ends[i];
        count[i] = at[i] = 0, low[i] = 0;
        for (long t = 0; t < room; t++) value[i * room + t] = -NOTHING;
    }
    for (long begin = 0; begin < last; begin += T) {
        long n = last - begin < T ? last - begin : T, wide = (n + W - 1) / W * W;
        gather(k + begin * dim, dim, n, dim, 1.0f, kt, T);
        for (long first = 0; first < rows; first += R) {
            long m = rows - first < R ? rows - first : R, needed = 0;
            for (long i = first; i < first + m; i++) needed |= ends[i] > begin;
            if (!needed) continue;
            product(m, wide, dim, q + first * dim, dim, 1, kt, T, s, T, 0);
            for (long i = first; i < first + m; i++) {
                float *held = value + i * room;
                long *slots = slot + i * room, seen = ends[i] - begin < n ? ends[i] - begin : n;
                for (long j = 0; j < seen; j++) {
                    const float *x = s + (i - first) * T + j;
                    if (count[i] == picks && j % W == 0 && !any(*(const vec *)x > low[i])) {
                        j += W - 1;
                        continue;
                    }
                    if (count[i] == picks && !(*x > low[i])) continue;
                    long place = count[i] < picks ? count[i]++ : at[i];
                    held[place] = *x > -3e38f ? *x : -3e38f, slots[place] = begin + j;
                    if (count[i] == picks) at[i] = least(held, slots, picks, low + i);
                }
            }
        }
    }
    for (long i = 0; i < rows; i++)
        for (long t = 0; t < picks; t++) {
            long key = t < count[i] ? slot[i * room + t] : 0, place = t;
            for (; t < count[i] && place > 0 && top[i * picks + place - 1] > key; place--)
                top[i * picks + place] = top[i * picks + place - 1];
            top[i * picks + place] = key;
        }
}
