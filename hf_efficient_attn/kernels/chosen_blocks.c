/*
 * Queries that each read the block of keys they stand in and blocks of their own choice: ops/tiles.py on a CPU, float32.
 *
 * One call serves a key/value head of a row: `heads` query heads of `length` queries each, which are rows of q, out and
 * grad, D floats wide, and count * size rows of k and v. Query i of a head stands in block own + i / size. The pairs
 * (query, block) are sorted by block: rows[start[J]..start[J + 1] - 1] are those that chose block J. With r_i the
 * log-sum-exp of a query's logits, which `total` holds in the end:
 *
 *     out_i = sum_j exp(scaling q_i k_j - r_i) v_j.
 *
 * Until then out_i and sums_i are relative to a logit top_i, which is replaced where a far larger one comes. Queries are
 * taken 48 at a time, so that every product runs inside the first-level cache.
 */

#include "arithmetic.h"

enum { R = 48 };

#define FAR 20.0f /* exp(FAR) times as many weights as there are keys overflows nothing */

static void copy_row(float *to, const float *from, long n) {
    for (long j = 0; j < n; j += W) *(vec *)(to + j) = *(const vec *)(from + j);
}

static void add_row(float *to, const float *x, long n) {
    for (long j = 0; j < n; j += W) *(vec *)(to + j) += *(const vec *)(x + j);
}

static void multiply(float *x, float factor, long n) {
    for (long j = 0; j < n; j += W) *(vec *)(x + j) *= factor;
}

/* Logits of a row that its query does not see: those from `seen` on, and those of keys that are not used. */
static void hide(float *s, long size, long seen, const unsigned char *used) {
    for (long j = seen; j < size; j++) s[j] = NOTHING;
    if (used)
        for (long j = 0; j < size; j++)
            if (!used[j]) s[j] = NOTHING;
}

/* Logits of a row to weights relative to *top, in place; where that is too low, it is raised and so is what stands on it. */
static void weigh(float *s, long size, float scaling, float *top, float *sum, float *out, long dim) {
    vec high = *(vec *)s, weight = {0};
    for (long j = W; j < size; j += W) high = larger(high, *(vec *)(s + j));
    float highest = greatest(high) * scaling;
    if (highest > *top + FAR) {
        float factor = exponential((vec){0} + (*top - highest))[0];
        *top = highest, *sum *= factor;
        multiply(out, factor, dim);
    }
    for (long j = 0; j < size; j += W) {
        vec *at = (vec *)(s + j);
        *at = exponential(*at * scaling - *top);
        weight += *at;
    }
    *sum += total_of(weight);
}

void blocks_forward(const float *q, const float *k, const float *v, const int *rows, const long *start, long count,
                    long own, long length, long heads, long size, long dim, float scaling, long causal,
                    const unsigned char *used, float *out, float *total, float *sums) {
    static __thread float kt[MOST * MOST], qs[R * MOST], s[R * MOST], o[R * MOST];
    for (long i = 0; i < heads * length; i++) total[i] = -1e30f, sums[i] = 0;
    for (long b = 0; b < length / size; b++) {
        long at = (own + b) * size;
        int there = own + b < count;
        if (there) gather(k + at * dim, dim, size, dim, 1.0f, kt, size);
        for (long h = 0; h < heads; h++)
            for (long begin = 0; begin < size; begin += R) {
                long m = size - begin < R ? size - begin : R, row = h * length + b * size + begin;
                long n = causal ? (begin + m + W - 1) / W * W : size;
                if (there) product(m, n, dim, q + row * dim, dim, 1, kt, size, s, size, 0);
                for (long i = 0; i < m; i++) {
                    if (!there) continue;
                    hide(s + i * size, n, causal ? begin + i + 1 : n, used ? used + at : 0);
                    weigh(s + i * size, n, scaling, total + row + i, sums + row + i, o, 0);
                }
                if (there)
                    product(m, dim, n, s, size, 1, v + at * dim, dim, out + row * dim, dim, 0);
                else
                    for (long i = 0; i < m * dim; i++) out[row * dim + i] = 0;
            }
    }
    for (long b = 0; b < count; b++) {
        long at = b * size;
        if (start[b] < start[b + 1]) gather(k + at * dim, dim, size, dim, 1.0f, kt, size);
        for (long begin = start[b]; begin < start[b + 1]; begin += R) {
            long m = start[b + 1] - begin < R ? start[b + 1] - begin : R;
            const int *chosen = rows + begin;
            for (long i = 0; i < m; i++) copy_row(qs + i * dim, q + chosen[i] * dim, dim);
            product(m, size, dim, qs, dim, 1, kt, size, s, size, 0);
            for (long i = 0; i < m; i++) {
                long row = chosen[i];
                if (used) hide(s + i * size, size, size, used + at);
                weigh(s + i * size, size, scaling, total + row, sums + row, out + row * dim, dim);
            }
            product(m, dim, size, s, size, 1, v + at * dim, dim, o, dim, 0);
            for (long i = 0; i < m; i++) add_row(out + chosen[i] * dim, o + i * dim, dim);
        }
    }
    for (long i = 0; i < heads * length; i++) {
        multiply(out + i * dim, sums[i] > 0 ? 1 / sums[i] : 0, dim);
        total[i] = sums[i] > 0 ? total[i] + __builtin_logf(sums[i]) : 1e30f;
    }
}

/* What a tile of m queries asks of the n first keys of a block: q, g rows of them, into dq (written) and dk, dv (added). */
INLINE void differentiate(long m, long n, long size, long dim, const float *q, const float *g, const float *k,
                          const float *kt, const float *vt, float *s, float *d, float scaling, const float *total,
                          const float *delta, long seen, const unsigned char *used, float *dq, float *dk, float *dv) {
    product(m, n, dim, q, dim, 1, kt, size, s, size, 0);
    product(m, n, dim, g, dim, 1, vt, size, d, size, 0);
    for (long i = 0; i < m; i++) {
        if (seen || used) hide(s + i * size, n, seen ? seen + i : n, used);
        for (long j = 0; j < n; j += W) {
            vec *weight = (vec *)(s + i * size + j), *slope = (vec *)(d + i * size + j);
            *weight = exponential(*weight * scaling - total[i]);
            *slope = (*slope - delta[i]) * *weight;
        }
    }
    product(n, dim, m, s, 1, size, g, dim, dv, dim, 1);
    product(n, dim, m, d, 1, size, q, dim, dk, dim, 1);
    product(m, dim, n, d, size, 1, k, dim, dq, dim, 0);
}

void blocks_backward(const float *q, const float *k, const float *v, const int *rows, const long *start, long count,
                     long own, long length, long heads, long size, long dim, float scaling, long causal,
                     const unsigned char *used, const float *out, const float *total, const float *grad, float *delta,
                     float *dq, float *dk, float *dv) {
    static __thread float kt[MOST * MOST], vt[MOST * MOST], qs[R * MOST], gs[R * MOST], s[R * MOST], d[R * MOST],
        o[R * MOST];
    for (long i = 0; i < heads * length; i++) {
        vec sum = {0};
        for (long p = 0; p < dim; p += W) sum += *(const vec *)(grad + i * dim + p) * *(const vec *)(out + i * dim + p);
        delta[i] = total_of(sum);
    }
    for (long i = 0; i < count * size * dim; i++) dk[i] = dv[i] = 0;
    for (long b = 0; b < length / size; b++) {
        long at = (own + b) * size;
        int there = own + b < count;
        if (there) gather(k + at * dim, dim, size, dim, 1.0f, kt, size), gather(v + at * dim, dim, size, dim, 1.0f, vt, size);
        for (long h = 0; h < heads; h++)
            for (long begin = 0; begin < size; begin += R) {
                long m = size - begin < R ? size - begin : R, row = h * length + b * size + begin;
                long n = causal ? (begin + m + W - 1) / W * W : size;
                if (there)
                    differentiate(m, n, size, dim, q + row * dim, grad + row * dim, k + at * dim, kt, vt, s, d, scaling,
                                  total + row, delta + row, causal ? begin + 1 : 0, used ? used + at : 0, dq + row * dim,
                                  dk + at * dim, dv + at * dim);
                else
                    for (long i = 0; i < m * dim; i++) dq[row * dim + i] = 0;
            }
    }
    for (long b = 0; b < count; b++) {
        long at = b * size;
        if (start[b] == start[b + 1]) continue;
        gather(k + at * dim, dim, size, dim, 1.0f, kt, size), gather(v + at * dim, dim, size, dim, 1.0f, vt, size);
        for (long begin = start[b]; begin < start[b + 1]; begin += R) {
            long m = start[b + 1] - begin < R ? start[b + 1] - begin : R;
            const int *chosen = rows + begin;
            float totals[R], deltas[R];
            for (long i = 0; i < m; i++) {
                copy_row(qs + i * dim, q + chosen[i] * dim, dim);
                copy_row(gs + i * dim, grad + chosen[i] * dim, dim);
                totals[i] = total[chosen[i]], deltas[i] = delta[chosen[i]];
            }
            differentiate(m, size, size, dim, qs, gs, k + at * dim, kt, vt, s, d, scaling, totals, deltas, 0,
                          used ? used + at : 0, o, dk + at * dim, dv + at * dim);
            for (long i = 0; i < m; i++) add_row(dq + chosen[i] * dim, o + i * dim, dim);
        }
    }
    multiply(dq, scaling, heads * length * dim);
    multiply(dk, scaling, count * size * dim);
}

/*
 * The pairs sorted by block. chosen, valid (heads / share, choices, picks): what `width` successive queries of `share`
 * heads read; rows gets the queries, start (count + 1) where those of each block begin.
 */
void sort_pairs(const long *chosen, const unsigned char *valid, long heads, long share, long choices, long picks,
                long width, long count, int *rows, long *start) {
    long all = choices * picks;
    for (long b = 0; b <= count; b++) start[b] = 0;
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < all; i++)
            if (valid[h / share * all + i]) start[chosen[h / share * all + i]] += width;
    for (long b = 0, sum = 0; b <= count; b++) {
        long here = start[b];
        start[b] = sum, sum += here;
    }
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < all; i++)
            if (valid[h / share * all + i]) {
                long *at = start + chosen[h / share * all + i];
                for (long u = 0; u < width; u++) rows[(*at)++] = (h * choices + i / picks) * width + u;
            }
    for (long b = count; b > 0; b--) start[b] = start[b - 1]; /* each begin has moved to the next one */
    start[0] = 0;
}

/*
 * For each of `rows` queries the `picks` blocks with the largest features . summary, largest first, of equal ones the lower
 * number; `count` where there are no more. features (rows, width), summaries (count, width). A query that stands in block
 * own reads earlier blocks alone where `last` is negative, else those up to `last`; never its own, and always block 0.
 */
void choose_blocks(const float *features, const float *summaries, long rows, long count, long width, long picks,
                   const long *own, long last, long *chosen) {
    static __thread float ft[2 * MOST * T], s[T * T];
    for (long first = 0; first < rows; first += T, own += T) {
        long m = rows - first < T ? rows - first : T, wide = (m + W - 1) / W * W, end = 0;
        vec top[T / W][MOST];
        ivec number[T / W][MOST], stands[T / W], until[T / W];
        gather(features + first * width, width, m, width, 1.0f, ft, T);
        for (long i = 0; i < wide; i++) {
            long at = own[i < m ? i : 0], limit = last < 0 ? at - 1 : last;
            stands[i / W][i % W] = at, until[i / W][i % W] = limit;
            if (limit >= end) end = limit + 1;
        }
        for (long i = 0; i < wide / W; i++)
            for (long t = 0; t < picks; t++) top[i][t] = (vec){0} + NOTHING, number[i][t] = (ivec){0} + (int)count;
        for (long begin = 0; begin < end && begin < count; begin += T) {
            long n = (end < count ? end : count) - begin;
            if (n > T) n = T;
            product(n, wide, width, summaries + begin * width, width, 1, ft, T, s, T, 0);
            for (long i = 0; i < wide / W; i++)
                for (int j = begin; j < begin + n; j++) {
                    ivec open = (j <= until[i]) & (j != stands[i]), here = (ivec){0} + j;
                    vec value = *(vec *)(s + (j - begin) * T + i * W);
                    if (j == 0) value = (vec){0} - NOTHING;
                    ivec moved = open & (value > top[i][picks - 1]);
                    if (!any(moved)) continue;
                    moved &= 0;
                    for (long t = 0; t < picks; t++) {
                        moved |= open & (value > top[i][t]);
                        vec lower = top[i][t];
                        ivec lower_number = number[i][t];
                        top[i][t] = pick(moved, value, lower);
                        number[i][t] = (moved & here) | (~moved & lower_number);
                        value = pick(moved, lower, value);
                        here = (moved & lower_number) | (~moved & here);
                    }
                }
        }
        for (long i = 0; i < m; i++)
            for (long t = 0; t < picks; t++) chosen[(first + i) * picks + t] = number[i / W][t][i % W];
    }
}
