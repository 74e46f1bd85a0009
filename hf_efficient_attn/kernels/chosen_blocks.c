/*
 * Queries that each read key blocks of their own choice: the arithmetic of ops/tiles.py on a CPU, float32.
 *
 * The pairs (query, block) are sorted by block; `rows` lists the queries, those of line l at start[l]..start[l + 1] - 1, and
 * all of them read block[l]. A row of q, out and grad is D floats. With r_i = reference[i]:
 *
 *     w_ij = exp(scaling q_i k_j - r_i),    out_i += sum_j w_ij v_j,    sums_i += sum_j w_ij.
 *
 * Queries are copied 48 at a time, so that every product runs inside the first-level cache. Lines that are given to
 * different threads must share neither queries nor blocks.
 */

#include "arithmetic.h"

enum { R = 48 };

static void transpose(const float *x, long m, long n, float *out) {
    for (long i = 0; i < m; i++)
        for (long j = 0; j < n; j++) out[j * m + i] = x[i * n + j];
}

static void copy_row(float *to, const float *from, long n) {
    for (long j = 0; j < n; j += W) *(vec *)(to + j) = *(const vec *)(from + j);
}

static void add_row(float *to, const float *x, long n) {
    for (long j = 0; j < n; j += W) *(vec *)(to + j) += *(const vec *)(x + j);
}

/* (m, size): logits to weights, in place; keys that are not used weigh nothing. */
static void weigh(float *s, long m, long size, const long *rows, float scaling, const float *reference,
                  const unsigned char *used) {
    for (long i = 0; i < m; i++) {
        float r = reference[rows[i]];
        for (long j = 0; j < size; j += W) {
            vec *at = (vec *)(s + i * size + j);
            *at = exponential(*at * scaling - r);
        }
        if (used)
            for (long j = 0; j < size; j++)
                if (!used[j]) s[i * size + j] = 0;
    }
}

void chosen_blocks_forward(const float *q, const float *k, const float *v, const long *rows, const long *start,
                           const long *block, long first, long last, long size, long dim, float scaling,
                           const float *reference, const unsigned char *used, float *out, float *sums) {
    static __thread float kt[MOST * MOST], qs[R * MOST], s[R * MOST], o[R * MOST];
    for (long l = first; l < last; l++) {
        long at = block[l] * size;
        transpose(k + at * dim, size, dim, kt);
        for (long begin = start[l]; begin < start[l + 1]; begin += R) {
            long m = start[l + 1] - begin < R ? start[l + 1] - begin : R;
            const long *own = rows + begin;
            for (long i = 0; i < m; i++) copy_row(qs + i * dim, q + own[i] * dim, dim);
            product(m, size, dim, qs, dim, 1, kt, size, s, size, 0);
            weigh(s, m, size, own, scaling, reference, used ? used + at : 0);
            product(m, dim, size, s, size, 1, v + at * dim, dim, o, dim, 0);
            for (long i = 0; i < m; i++) {
                vec total = {0};
                for (long j = 0; j < size; j += W) total += *(vec *)(s + i * size + j);
                float sum = 0;
                for (int j = 0; j < W; j++) sum += total[j];
                sums[own[i]] += sum;
                add_row(out + own[i] * dim, o + i * dim, dim);
            }
        }
    }
}

/* delta_i = sum of grad_i out_i; dq is to be multiplied by scaling afterwards, and so is dk. */
void chosen_blocks_backward(const float *q, const float *k, const float *v, const float *grad, const long *rows,
                            const long *start, const long *block, long first, long last, long size, long dim,
                            float scaling, const float *reference, const float *delta, const unsigned char *used,
                            float *dq, float *dk, float *dv) {
    static __thread float kt[MOST * MOST], vt[MOST * MOST], qs[R * MOST], gs[R * MOST], s[R * MOST], d[R * MOST],
        o[R * MOST];
    for (long l = first; l < last; l++) {
        long at = block[l] * size;
        transpose(k + at * dim, size, dim, kt);
        transpose(v + at * dim, size, dim, vt);
        for (long begin = start[l]; begin < start[l + 1]; begin += R) {
            long m = start[l + 1] - begin < R ? start[l + 1] - begin : R;
            const long *own = rows + begin;
            for (long i = 0; i < m; i++) {
                copy_row(qs + i * dim, q + own[i] * dim, dim);
                copy_row(gs + i * dim, grad + own[i] * dim, dim);
            }
            product(m, size, dim, qs, dim, 1, kt, size, s, size, 0);
            weigh(s, m, size, own, scaling, reference, used ? used + at : 0);
            product(m, size, dim, gs, dim, 1, vt, size, d, size, 0);
            product(size, dim, m, s, 1, size, gs, dim, dv + at * dim, dim, 1);
            for (long i = 0; i < m; i++)
                for (long j = 0; j < size; j += W) {
                    vec *x = (vec *)(d + i * size + j);
                    *x = (*x - delta[own[i]]) * *(vec *)(s + i * size + j);
                }
            product(size, dim, m, d, 1, size, qs, dim, dk + at * dim, dim, 1);
            product(m, dim, size, d, size, 1, k + at * dim, dim, o, dim, 0);
            for (long i = 0; i < m; i++) add_row(dq + own[i] * dim, o + i * dim, dim);
        }
    }
}

/* The `picks` largest of each row of x (rows, count), largest first; of equal ones the lower index. picks <= count. */
void largest(const float *x, long rows, long count, long picks, long *out) {
    float top[MOST];
    for (long i = 0; i < rows; i++, x += count, out += picks) {
        long held = 0;
        for (long j = 0; j < count; j++) {
            float value = x[j];
            if (held == picks && !(value > top[held - 1])) continue;
            long at = held < picks ? held++ : held - 1;
            for (; at > 0 && value > top[at - 1]; at--) {
                top[at] = top[at - 1];
                out[at] = out[at - 1];
            }
            top[at] = value;
            out[at] = j;
        }
    }
}
