/*
 * Tiles of queries that each read a range of near keys and the ends of a far list: ops/ranges.py on a CPU, float32.
 *
 * tiles: of each, ten numbers: first query, one past the last (at most 64 more), first near key, one past the last, the
 * near key that stands at the first query's position, the number of far keys at the begin of the list, the first
 * further one and one past the last, the near key that the first query's window begins with, and one past the near keys
 * that are seen without regard to a window. Query t of a tile sees, of the near keys before `limit`, those up to the one at
 * its own position and from its window's begin on, which lies t after the first query's. Positions follow one another, or are
 * those of `at` where it is given, in ascending order. With r_i the log-sum-exp of a query's logits and b_j the bias of a far
 * key:
 *
 *     s_ij = scaling q_i k_j (+ b_j),    out_i = sum_j exp(s_ij - r_i) v_j.
 *
 * Vectors hold the queries of a tile, as many as are needed for them (`wide`, a multiple of 16). Everything of a tile is
 * held transposed, with the queries side by side: neither keys nor values need to be turned, and maxima and sums over
 * keys are plain vector operations. Rows of q, k, v, grad are D floats, sq, sk, sv, sg apart.
 */

#include "arithmetic.h"

enum { KEYS = 128, FIELDS = 10 };

typedef struct {
    const float *key, *value, *bias;
    float *dkey, *dvalue, *dbias;
    long ks, vs, begin, end;
    long diagonal, floor, kept; /* query i sees the keys up to diagonal + i, from floor + i on or before `kept` */
    const long *at;             /* or, where given, up to at[i], of `count` queries */
    long count;
} Range;

/* What a tile reads. */
static void find(Range *ranges, const long *tile, const long *at, long listed, long limit, Range near, Range far) {
    ranges[0] = near, ranges[1] = ranges[2] = far;
    if (at) ranges[0].at = at + tile[0], ranges[0].count = tile[1] - tile[0];
    ranges[0].begin = tile[2], ranges[0].end = tile[3] < limit ? tile[3] : limit;
    ranges[0].diagonal = tile[4], ranges[0].floor = tile[8], ranges[0].kept = tile[9];
    ranges[1].end = tile[5], ranges[2].begin = tile[6], ranges[2].end = tile[7] < listed ? tile[7] : listed;
    for (int i = 1; i < 3; i++) ranges[i].diagonal = ranges[i].kept = listed;
}

/* Logits (n, T), of which the first `wide` columns, of keys begin.. of a range. */
static void logits(const Range *r, long begin, long n, long wide, long dim, const float *qt, float *s) {
    product(n, wide, dim, r->key + begin * r->ks, r->ks, 1, qt, T, s, T, 0);
    for (long j = 0, later = 0; j < n; j++) { /* key j comes after the first `later` queries */
        float *row = s + j * T;
        if (r->bias)
            for (long i = 0; i < wide; i += W) *(vec *)(row + i) += r->bias[begin + j];
        if (!r->at) later = begin + j - r->diagonal;
        while (r->at && later < r->count && r->at[later] < begin + j) later++;
        for (long i = 0; i < later && i < wide; i++) row[i] = NOTHING;
        if (begin + j >= r->kept)
            for (long i = begin + j - r->floor + 1 > 0 ? begin + j - r->floor + 1 : 0; i < wide; i++) row[i] = NOTHING;
    }
}

void ranges_forward(const float *q, long sq, const float *k, long sk, const float *v, long sv, const float *fk,
                    const float *fv, const float *bias, long listed, long limit, const long *tiles, long count,
                    const long *at, long dim, float scaling, float *out, float *total) {
    static __thread float qt[MOST * T], ot[MOST * T], s[KEYS * T];
    for (long l = 0; l < count; l++, tiles += FIELDS) {
        long first = tiles[0], m = tiles[1] - first, wide = (m + W - 1) / W * W;
        Range ranges[3];
        find(ranges, tiles, at, listed, limit, (Range){k, v, 0, 0, 0, 0, sk, sv},
             (Range){fk, fv, bias, 0, 0, 0, dim, dim});
        vec top[T / W], sum[T / W];
        gather(q + first * sq, sq, m, dim, scaling, qt, T);
        for (long i = 0; i < dim * T; i++) ot[i] = 0;
        for (int i = 0; i < T / W; i++) top[i] = (vec){0} + NOTHING, sum[i] = (vec){0};
        for (const Range *r = ranges; r < ranges + 3; r++)
            for (long begin = r->begin; begin < r->end; begin += KEYS) {
                long n = r->end - begin < KEYS ? r->end - begin : KEYS;
                logits(r, begin, n, wide, dim, qt, s);
                online_softmax(s, n, wide, dim, top, sum, ot);
                product(dim, wide, n, r->value + begin * r->vs, 1, r->vs, s, T, ot, T, 1);
            }
        for (long i = 0; i < wide / W; i++) {
            vec inverse = 1.0f / larger(sum[i], (vec){0} + 1e-30f);
            for (long p = 0; p < dim; p++) *(vec *)(ot + p * T + i * W) *= inverse;
            for (long u = 0; u < W && i * W + u < m; u++)
                total[first + i * W + u] = sum[i][u] > 0 ? top[i][u] + __builtin_logf(sum[i][u]) : 1e30f;
        }
        scatter(ot, m, dim, out + first * dim);
    }
}

/* Rows of out and dq are dim apart, of dk and dv too; dbias gets T sums per key. dk, dv, dfk, dfv, dbias are added to. */
void ranges_backward(const float *q, long sq, const float *k, long sk, const float *v, long sv, const float *fk,
                     const float *fv, const float *bias, long listed, long limit, const long *tiles, long count,
                     const long *at, long dim, float scaling, const float *out, const float *total, const float *grad,
                     long sg, float *dq, float *dk, float *dv, float *dfk, float *dfv, float *dbias) {
    static __thread float qt[MOST * T], gt[MOST * T], dqt[MOST * T], qs[MOST * T], s[KEYS * T], d[KEYS * T];
    for (long l = 0; l < count; l++, tiles += FIELDS) {
        long first = tiles[0], m = tiles[1] - first, wide = (m + W - 1) / W * W;
        Range ranges[3];
        find(ranges, tiles, at, listed, limit, (Range){k, v, 0, dk, dv, 0, sk, sv},
             (Range){fk, fv, bias, dfk, dfv, dbias, dim, dim});
        const float *g = grad + first * sg;
        float lse[T], delta[T];
        gather(q + first * sq, sq, m, dim, scaling, qt, T);
        gather(g, sg, m, dim, 1.0f, gt, T);
        for (long i = 0; i < m; i++)
            for (long p = 0; p < dim; p += W)
                *(vec *)(qs + i * dim + p) = *(const vec *)(q + (first + i) * sq + p) * scaling;
        for (long i = 0; i < T; i++) lse[i] = i < m ? total[first + i] : 1e30f, delta[i] = 0;
        for (long i = 0; i < m; i++) {
            vec sum = {0};
            for (long p = 0; p < dim; p += W)
                sum += *(const vec *)(g + i * sg + p) * *(const vec *)(out + (first + i) * dim + p);
            for (int u = 0; u < W; u++) delta[i] += sum[u];
        }
        for (long i = 0; i < dim * T; i++) dqt[i] = 0;
        for (const Range *r = ranges; r < ranges + 3; r++)
            for (long begin = r->begin; begin < r->end; begin += KEYS) {
                long n = r->end - begin < KEYS ? r->end - begin : KEYS;
                logits(r, begin, n, wide, dim, qt, s);
                product(n, wide, dim, r->value + begin * r->vs, r->vs, 1, gt, T, d, T, 0);
                for (long j = 0; j < n; j++) {
                    vec sum = {0};
                    for (long i = 0; i < wide; i += W) {
                        vec *at = (vec *)(s + j * T + i), *slope = (vec *)(d + j * T + i);
                        *at = exponential(*at - *(vec *)(lse + i));
                        *slope = (*slope - *(vec *)(delta + i)) * *at;
                        sum += *slope;
                    }
                    if (r->dbias) *(vec *)(r->dbias + (begin + j) * W) += sum;
                }
                product(n, dim, m, s, T, 1, g, sg, r->dvalue + begin * dim, dim, 1);
                product(n, dim, m, d, T, 1, qs, dim, r->dkey + begin * dim, dim, 1);
                product(dim, wide, n, r->key + begin * r->ks, 1, r->ks, d, T, dqt, T, 1);
            }
        for (long i = 0; i < dim * T; i++) dqt[i] *= scaling;
        scatter(dqt, m, dim, dq + first * dim);
    }
}
