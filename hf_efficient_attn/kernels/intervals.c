/*
 * Queries that each read an interval of the keys in one or several orders: ops/sorted_intervals.py on a CPU, float32.
 *
 * One call serves a key/value head of `size` keys, and `rows` queries of one or several heads. Order r lists keys,
 * order[begins[r]..begins[r + 1] - 1], and row i reads those at its ranks low[r rows + i]..high - 1 of it, but none that it
 * has read in an earlier order (of which only the last may list a key twice), nor the `aparts` keys from apart[i aparts] on,
 * of which -1 are none (with orders that list every key); beside them the key own[i], where that is not negative, and the
 * first lead[i] keys. own, apart and lead may be null. With r_i, `total`, the log-sum-exp of a row's logits:
 *
 *     out_i = sum_j exp(scaling q_i k_j - r_i) v_j.
 *
 * Rows are taken in order of their intervals, up to 64 side by side in vectors, and so are their sums; keys are copied, 128
 * at a time, in whatever order they are read. work: 2 rows + the longest order + 2 + orders size ints.
 */

#include "arithmetic.h"

enum { KEYS = 128 };

typedef struct {
    const int *order, *low, *high, *rank; /* of all orders; rank (orders, size): where an order has a key */
    const long *begins;
    const int *apart;
    long rows, size, aparts;
} Orders;

typedef struct {
    const int *rows;
    long m, wide, begin, end, first; /* rows; vectors' lanes; ranks; keys of the lead */
    ivec low[T / W], high[T / W], lead[T / W], own[T / W];
} Tile;

static void copy_row(float *to, const float *from, long n, float factor) {
    for (long j = 0; j < n; j += W) *(vec *)(to + j) = *(const vec *)(from + j) * factor;
}

static void add_row(float *to, const float *x, long n, float factor) {
    for (long j = 0; j < n; j += W) *(vec *)(to + j) += *(const vec *)(x + j) * factor;
}

/* Stable: from (n,) to `to`, by value[from[i]] < values. */
static void sort_by(const int *value, const int *from, long n, long values, int *counts, int *to) {
    for (long c = 0; c <= values; c++) counts[c] = 0;
    for (long i = 0; i < n; i++) counts[value[i] + 1]++;
    for (long c = 0; c < values; c++) counts[c + 1] += counts[c];
    for (long i = 0; i < n; i++) {
        int row = from ? from[i] : i;
        to[counts[value[row]]++] = row;
    }
}

/* Rows in order of their intervals, in `sorted`. */
static void sort_rows(const Orders *of, long r, int *other, int *counts, int *sorted) {
    const int *low = of->low + r * of->rows, *high = of->high + r * of->rows;
    long values = of->begins[r + 1] - of->begins[r] + 1;
    sort_by(high, 0, of->rows, values, counts, other);
    sort_by(low, other, of->rows, values, counts, sorted);
}

static void rank_keys(const Orders *of, long orders, int *rank) {
    for (long r = 0; r < orders - !of->apart; r++)
        for (long j = of->begins[r]; j < of->begins[r + 1]; j++) rank[r * of->size + of->order[j]] = j - of->begins[r];
}

/* The rows that follow `done` and read about the same keys. */
static long next_tile(Tile *t, const Orders *of, long r, const int *sorted, long done, const int *own, const int *lead) {
    const int *low = of->low + r * of->rows, *high = of->high + r * of->rows;
    long m = 1;
    t->rows = sorted + done, t->begin = low[sorted[done]], t->first = 0;
    for (; m < T && done + m < of->rows; m++) {
        int row = sorted[done + m], before = sorted[done + m - 1];
        if (low[row] > low[before] && low[row] >= high[before]) break;
    }
    t->m = m, t->wide = (m + W - 1) / W * W, t->end = high[t->rows[m - 1]];
    for (long i = 0; i < t->wide; i++) {
        int row = i < m ? t->rows[i] : 0, there = i < m;
        t->low[i / W][i % W] = there ? low[row] : 0, t->high[i / W][i % W] = there ? high[row] : 0;
        t->own[i / W][i % W] = there && own ? own[row] : -1, t->lead[i / W][i % W] = there && lead ? lead[row] : 0;
        if (there && lead && lead[row] > t->first) t->first = lead[row];
    }
    return done + m;
}

/* (wide, dim), of rows at `x`, times factor -> (dim, T); zeros where there is none. */
static void turn_rows(const float *const *x, long wide, long dim, float factor, float *out) {
    for (long i = 0; i < wide; i += W)
        for (long p = 0; p < dim; p += W) {
            vec square[W];
            for (long u = 0; u < W; u++) {
                square[u] = (vec){0};
                if (x[i + u]) square[u] = *(const vec *)(x[i + u] + p) * factor;
            }
            turn(square);
            for (long u = 0; u < W; u++) *(vec *)(out + (p + u) * T + i) = square[u];
        }
}

/* What turn_rows took, transposed back: rows at `to` are written, or added to. */
static void return_rows(const float *x, float *const *to, long wide, long dim, float factor, int add) {
    for (long i = 0; i < wide; i += W)
        for (long p = 0; p < dim; p += W) {
            vec square[W];
            for (long u = 0; u < W; u++) square[u] = *(const vec *)(x + (p + u) * T + i) * factor;
            turn(square);
            for (long u = 0; u < W; u++) {
                if (!to[i + u]) continue;
                if (add) square[u] += *(const vec *)(to[i + u] + p);
                *(vec *)(to[i + u] + p) = square[u];
            }
        }
}

/* Logits of keys that are not read: of n keys, those at ranks begin.. of order r, or the first ones where r is negative. */
static void hide(const Tile *t, const Orders *of, long r, long begin, long n, const int *slots, float *s) {
    for (long i = 0; i < t->wide / W; i++)
        for (int j = 0, at = begin; j < n; j++, at++) {
            vec *logit = (vec *)(s + j * T + i * W);
            ivec seen = r < 0 ? at < t->lead[i] : (at >= t->low[i]) & (at < t->high[i]);
            *logit = pick(seen, *logit, (vec){0} + NOTHING);
        }
    for (long i = 0; i < t->m && r >= 0; i++)
        for (long a = 0; a < of->aparts; a++) {
            long slot = of->apart[t->rows[i] * of->aparts + a], at = slot < 0 ? -1 : of->rank[r * of->size + slot] - begin;
            if (at >= 0 && at < n) s[at * T + i] = NOTHING;
        }
    for (long e = 0; e < r; e++) {
        const int *rank = of->rank + e * of->size;
        for (long i = 0; i < t->wide / W; i++) {
            ivec low = {0}, high = {0};
            for (long u = 0; u < W && i * W + u < t->m; u++) {
                long row = e * of->rows + t->rows[i * W + u];
                low[u] = of->low[row], high[u] = of->high[row];
            }
            for (long j = 0; j < n; j++) {
                vec *logit = (vec *)(s + j * T + i * W);
                int at = rank[slots[j]];
                *logit = pick((at >= low) & (at < high), (vec){0} + NOTHING, *logit);
            }
        }
    }
}

/* One block of keys, of order r or of the lead (r = -1), brought together: returns how many. */
static long fetch(const Orders *of, long r, long begin, long end, const float *k, const float *v, long dim, int *slots,
                  float *kb, float *vb) {
    long n = end - begin < KEYS ? end - begin : KEYS;
    for (long j = 0; j < n; j++) {
        long at = slots[j] = r < 0 ? begin + j : of->order[of->begins[r] + begin + j];
        copy_row(kb + j * dim, k + at * dim, dim, 1.0f), copy_row(vb + j * dim, v + at * dim, dim, 1.0f);
    }
    return n;
}

/* Whether a row has one more key besides: its logit, and the value, turned, joins what there is. */
static void join(const vec *logit, const float *value, long wide, long dim, vec *top, vec *sum, float *ot) {
    for (long i = 0; i < wide / W; i++) {
        vec high = larger(top[i], logit[i]), reference = larger(high, (vec){0} - 1e30f);
        vec before = exponential(top[i] - reference), weight = exponential(logit[i] - reference);
        top[i] = high, sum[i] = sum[i] * before + weight;
        for (long p = 0; p < dim; p++) {
            vec *at = (vec *)(ot + p * T + i * W);
            *at = *at * before + *(const vec *)(value + p * T + i * W) * weight;
        }
    }
}

/* The rows' own keys and values, turned, and their logits. */
static void turn_own(const Tile *t, const float *k, const float *v, long dim, const float *qt, float *kt, float *vt,
                     vec *logit) {
    const float *keys[T], *values[T];
    for (long i = 0; i < t->wide; i++) {
        long own = t->own[i / W][i % W];
        keys[i] = own < 0 ? 0 : k + own * dim, values[i] = own < 0 ? 0 : v + own * dim;
    }
    turn_rows(keys, t->wide, dim, 1.0f, kt), turn_rows(values, t->wide, dim, 1.0f, vt);
    for (long i = 0; i < t->wide / W; i++) {
        vec found = {0};
        for (long p = 0; p < dim; p++) found += *(const vec *)(qt + p * T + i * W) * *(const vec *)(kt + p * T + i * W);
        logit[i] = pick(t->own[i] >= 0, found, (vec){0} + NOTHING);
    }
}

void intervals_forward(const float *q, const float *k, const float *v, const int *order, const long *begins, long orders,
                       const int *low, const int *high, const int *own, const int *apart, long aparts,
                       const int *lead, long rows, long size, long dim, float scaling, int *work, float *out,
                       float *total) {
    static __thread float qt[MOST * T], ot[MOST * T], kt[MOST * T], vt[MOST * T], s[KEYS * T], kb[KEYS * MOST],
        vb[KEYS * MOST];
    int *sorted = work, *other = work + rows, *rank = work + 2 * rows, *counts = rank + orders * size;
    Orders of = {order, low, high, rank, begins, apart, rows, size, aparts};
    rank_keys(&of, orders, rank);
    for (long r = 0; r < orders; r++) {
        sort_rows(&of, r, other, counts, sorted);
        for (long done = 0; done < rows;) {
            Tile t;
            done = next_tile(&t, &of, r, sorted, done, r ? 0 : own, r ? 0 : lead);
            const float *from[T];
            float *to[T];
            vec top[T / W], sum[T / W];
            for (long i = 0; i < t.wide; i++) {
                long row = i < t.m ? t.rows[i] : -1;
                from[i] = row < 0 ? 0 : q + row * dim, to[i] = row < 0 ? 0 : out + row * dim;
                top[i / W][i % W] = r && row >= 0 ? total[row] : NOTHING;
            }
            turn_rows(from, t.wide, dim, scaling, qt);
            for (long i = 0; i < t.wide / W; i++) sum[i] = pick(top[i] > NOTHING, (vec){0} + 1, (vec){0});
            if (r)
                turn_rows((const float *const *)to, t.wide, dim, 1.0f, ot);
            else
                for (long i = 0; i < dim * T; i++) ot[i] = 0;
            for (long part = r ? r : -1; part <= r; part++) /* the lead comes before the first order */
                for (long begin = part < 0 ? 0 : t.begin, end = part < 0 ? t.first : t.end; begin < end; begin += KEYS) {
                    int slots[KEYS];
                    long n = fetch(&of, part, begin, end, k, v, dim, slots, kb, vb);
                    product(n, t.wide, dim, kb, dim, 1, qt, T, s, T, 0);
                    hide(&t, &of, part, begin, n, slots, s);
                    online_softmax(s, n, t.wide, dim, top, sum, ot);
                    product(dim, t.wide, n, vb, 1, dim, s, T, ot, T, 1);
                }
            if (own && !r) {
                vec logit[T / W];
                turn_own(&t, k, v, dim, qt, kt, vt, logit);
                join(logit, vt, t.wide, dim, top, sum, ot);
            }
            for (long i = 0; i < t.wide / W; i++) {
                vec inverse = 1.0f / larger(sum[i], (vec){0} + 1e-30f);
                for (long p = 0; p < dim; p++) *(vec *)(ot + p * T + i * W) *= inverse;
                for (long u = 0; u < W && i * W + u < t.m; u++)
                    total[t.rows[i * W + u]] = sum[i][u] > 0 ? top[i][u] + __builtin_logf(sum[i][u]) : NOTHING;
            }
            return_rows(ot, to, t.wide, dim, 1.0f, 0);
        }
    }
}

/* dtotal, which may be null, is the gradient of `total`. dq, dk, dv are added to. */
void intervals_backward(const float *q, const float *k, const float *v, const int *order, const long *begins, long orders,
                        const int *low, const int *high, const int *own, const int *apart, long aparts,
                        const int *lead, long rows, long size, long dim, float scaling, int *work, const float *out,
                        const float *total, const float *grad, const float *dtotal, float *dq, float *dk, float *dv) {
    static __thread float qt[MOST * T], gt[MOST * T], dqt[MOST * T], kt[MOST * T], vt[MOST * T], s[KEYS * T],
        d[KEYS * T], kb[KEYS * MOST], vb[KEYS * MOST], qs[T * MOST], gs[T * MOST];
    int *sorted = work, *other = work + rows, *rank = work + 2 * rows, *counts = rank + orders * size;
    Orders of = {order, low, high, rank, begins, apart, rows, size, aparts};
    rank_keys(&of, orders, rank);
    for (long r = 0; r < orders; r++) {
        sort_rows(&of, r, other, counts, sorted);
        for (long done = 0; done < rows;) {
            Tile t;
            done = next_tile(&t, &of, r, sorted, done, r ? 0 : own, r ? 0 : lead);
            const float *asked[T], *given[T];
            float *to[T];
            vec lse[T / W], delta[T / W];
            for (long i = 0; i < t.wide; i++) {
                long row = i < t.m ? t.rows[i] : -1;
                asked[i] = given[i] = 0, to[i] = 0, lse[i / W][i % W] = 1e30f, delta[i / W][i % W] = 0;
                if (row < 0) continue;
                asked[i] = q + row * dim, to[i] = dq + row * dim;
                given[i] = grad + row * dim;
                copy_row(qs + i * dim, asked[i], dim, scaling), copy_row(gs + i * dim, given[i], dim, 1.0f);
                vec sum = {0};
                for (long p = 0; p < dim; p += W) sum += *(const vec *)(gs + i * dim + p) * *(const vec *)(out + row * dim + p);
                delta[i / W][i % W] = total_of(sum) - (dtotal ? dtotal[row] : 0);
                if (total[row] > NOTHING) lse[i / W][i % W] = total[row];
            }
            turn_rows(asked, t.wide, dim, scaling, qt), turn_rows(given, t.wide, dim, 1.0f, gt);
            for (long i = 0; i < dim * T; i++) dqt[i] = 0;
            for (long part = r ? r : -1; part <= r; part++)
                for (long begin = part < 0 ? 0 : t.begin, end = part < 0 ? t.first : t.end; begin < end; begin += KEYS) {
                    int slots[KEYS];
                    long n = fetch(&of, part, begin, end, k, v, dim, slots, kb, vb);
                    product(n, t.wide, dim, kb, dim, 1, qt, T, s, T, 0);
                    hide(&t, &of, part, begin, n, slots, s);
                    product(n, t.wide, dim, vb, dim, 1, gt, T, d, T, 0);
                    for (long j = 0; j < n; j++)
                        for (long i = 0; i < t.wide / W; i++) {
                            vec *at = (vec *)(s + j * T + i * W), *slope = (vec *)(d + j * T + i * W);
                            *at = exponential(*at - lse[i]);
                            *slope = (*slope - delta[i]) * *at;
                        }
                    product(dim, t.wide, n, kb, 1, dim, d, T, dqt, T, 1);
                    product(n, dim, t.m, s, T, 1, gs, dim, vb, dim, 0); /* keys and values have served */
                    product(n, dim, t.m, d, T, 1, qs, dim, kb, dim, 0);
                    for (long j = 0; j < n; j++) {
                        add_row(dk + slots[j] * dim, kb + j * dim, dim, 1.0f);
                        add_row(dv + slots[j] * dim, vb + j * dim, dim, 1.0f);
                    }
                }
            if (own && !r) {
                vec logit[T / W];
                turn_own(&t, k, v, dim, qt, kt, vt, logit);
                for (long i = 0; i < t.wide / W; i++) {
                    vec weight = exponential(logit[i] - lse[i]), slope = {0};
                    for (long p = 0; p < dim; p++)
                        slope += *(const vec *)(gt + p * T + i * W) * *(const vec *)(vt + p * T + i * W);
                    slope = (slope - delta[i]) * weight;
                    for (long p = 0; p < dim; p++)
                        *(vec *)(dqt + p * T + i * W) += slope * *(const vec *)(kt + p * T + i * W);
                    for (long u = 0; u < W; u++)
                        if (t.own[i][u] >= 0) {
                            add_row(dk + t.own[i][u] * dim, qs + (i * W + u) * dim, dim, slope[u]);
                            add_row(dv + t.own[i][u] * dim, gs + (i * W + u) * dim, dim, weight[u]);
                        }
                }
            }
            return_rows(dqt, to, t.wide, dim, scaling, 1);
        }
    }
}
