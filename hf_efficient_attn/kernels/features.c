/*
 * A decoder's attention by given features phi (ops/feature_scan.py), on a CPU, float32:
 *
 *     out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),    j <= i,
 *
 * the divisor, of either sign, kept `floor` away from 0. One call serves a span of tokens of a key/value head of a row and its
 * query heads, in pieces of T: inside a piece weights are formed, what lies before it is read from the sums S (m, dim + 1) of
 * phi(k) [v, 1]. Features stand in rows, token beside token.
 */

#include "scan.h"

/* Of features x (m, n), rows `stride` apart, those of `size` tokens, zeros up to the next whole vector: (m, T). */
static void features_of(const float *x, long stride, long m, long size, float *phi) {
    long wide = (size + W - 1) / W * W;
    for (long f = 0; f < m; f++) {
        copy(phi + f * T, x + f * stride, size);
        for (long i = size; i < wide; i++) phi[f * T + i] = 0;
    }
}

/*
 * pq: `heads` heads hp apart, with rows sp apart; pk likewise, and v with rows sv apart; out and normaliser: heads ho and hn
 * apart. s: the sums before the span and, afterwards, behind it.
 */
void features_forward(const float *pq, long hp, long sp, const float *pk, long sk, const float *v, long sv, long heads, long n,
                      long m, long dim, float floor, float *s, float *out, long ho, float *normaliser, long hn) {
    static __thread float phi_q[FEATURES * T], phi_k[FEATURES * T], a[T * T], ot[MOST * T];
    Sums sums = {m, dim, dim + 1, dim + 1, s, s + dim};
    for (long begin = 0; begin < n; begin += T) {
        long size = n - begin < T ? n - begin : T;
        features_of(pk + begin, sk, m, size, phi_k);
        for (long h = 0; h < heads; h++) {
            float read[T];
            features_of(pq + h * hp + begin, sp, m, size, phi_q);
            read_sums(sums, size, phi_q, phi_k, v + begin * sv, sv, a, ot, read, 0);
            for (long i = 0; i < size; i += W) {
                vec *sum = (vec *)(read + i), bound = (vec){0} + floor;
                *sum = pick(*sum < 0, -larger(-*sum, bound), larger(*sum, bound));
            }
            divide(size, dim, ot, read, out + h * ho + begin * dim, normaliser + h * hn + begin);
        }
        enter(sums, size, phi_k, v + begin * sv, sv);
    }
}

/*
 * Gradients of the above from g like out. s: the sums before the span, overwritten; later (m, dim + 1): what the queries behind the
 * span ask of the sums, and afterwards those of the span too. of_pq, of_pk: (m, n) for each head, of_v: rows dim apart.
 */
void features_backward(const float *pq, long hp, long sp, const float *pk, long sk, const float *v, long sv, long heads, long n,
                       long m, long dim, float floor, float *s, float *later, const float *out, long ho,
                       const float *normaliser, long hn, const float *g, long hg, long sg, float *of_pq, float *of_pk,
                       float *of_v) {
    static __thread float phi_q[FEATURES * T], phi_k[FEATURES * T], of_q[FEATURES * T], of_k[FEATURES * T], a[T * T], d[T * T],
        turned[T * T], gs[T * MOST], gt[MOST * T], vt[MOST * T], of_vt[MOST * T];
    long ss = dim + 1, pieces = (n + T - 1) / T;
    Sums sums = {m, dim, ss, ss, s, s + dim}, behind = {m, dim, ss, ss, later, later + dim};
    float *held = malloc(sizeof(float) * pieces * m * ss);
    for (long begin = 0; begin < n; begin += T) {
        long size = n - begin < T ? n - begin : T;
        copy(held + begin / T * m * ss, s, m * ss);
        features_of(pk + begin, sk, m, size, phi_k);
        enter(sums, size, phi_k, v + begin * sv, sv);
    }
    for (long piece = pieces - 1; piece >= 0; piece--) {
        long begin = piece * T, size = n - begin < T ? n - begin : T, wide = (size + W - 1) / W * W;
        float *held_here = held + piece * m * ss;
        Sums before = {m, dim, ss, ss, held_here, held_here + dim};
        features_of(pk + begin, sk, m, size, phi_k);
        gather(v + begin * sv, sv, size, dim, 1.0f, vt, T);
        of_keys(behind, size, vt, of_k);
        product(dim, wide, m, later, 1, ss, phi_k, T, of_vt, T, 0);
        for (long h = 0; h < heads; h++) {
            float slope[T];
            const float *o = out + h * ho + begin * dim, *divisor = normaliser + h * hn + begin;
            of_quotient(size, dim, g + h * hg + begin * sg, sg, o, divisor, floor, gs, slope);
            gather(gs, dim, size, dim, 1.0f, gt, T);
            features_of(pq + h * hp + begin, sp, m, size, phi_q);
            past(size, m, phi_k, 1, T, phi_q, a);
            hide(size, a);
            of_queries(before, size, phi_k, v + begin * sv, sv, gt, slope, d, of_q);
            for (long f = 0; f < m; f++) copy(of_pq + (h * m + f) * n + begin, of_q + f * T, size);
            gather(d, T, size, wide, 1.0f, turned, T);
            add_later(m, size, phi_q, T, 1, turned, of_k);
            gather(a, T, size, wide, 1.0f, turned, T);
            add_later(dim, size, gs, 1, dim, turned, of_vt);
            leave(behind, size, phi_q, gs, slope);
        }
        for (long f = 0; f < m; f++) copy(of_pk + f * n + begin, of_k + f * T, size);
        scatter(of_vt, size, dim, of_v + begin * dim);
    }
    free(held);
}
