/*
 * A decoder's attention by exponential features of linear maps (ops/exponentials.py), on a CPU, float32. With features
 * f = 1..m, l_q = W q and l_k = W k - half |k|^2, and a reference r_f that divides out,
 *
 *     phi(k) = exp(l_k - r),    phi(q) = exp(l_q + r - max_f (l_q + r)),
 *     out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),    j <= i.
 *
 * One call serves a key/value head of a row and its query heads. Tokens are taken in pieces of at most T: inside a piece
 * weights are formed, what lies before it is read from the sums S (m, dim) and z (m) of phi(k) v and phi(k). A reference
 * stays within REACH / 2 of the running maximum `top` of l_k; where the maximum leaves it, S and z are made relative to
 * another one, and a piece over which the maximum rises by more than REACH is halved, so that each query meets, in the
 * feature that matters most to it, a key whose weight is not lost in rounding. Everything of a piece is held with its
 * tokens side by side, T columns of which `wide` are used.
 */

#include "scan.h"

#define REACH 50.0f

typedef struct {
    long m, dim;
    const float *w; /* (m, dim) */
    float half, *s, *z, *r, *top;
    int begun;
} Scan;

/*
 * Of what both passes compute: as one piece of code, so that the compiler rounds alike in both. Logarithms are large, and features
 * would differ by what is lost in them, where a query's gradient is the small difference of large sums.
 */
#define ALIKE static __attribute__((noinline, noclone))

static float bounded(float x) { return x > -1e30f ? x : 0; }

static float power(float x) { return exponential((vec){0} + x)[0]; }

/* phi(k) (m, T) of n tokens, zero beyond them, and kt (dim, T); 0 where the piece is to be halved first. */
ALIKE int key_features(Scan *c, const float *k, long sk, long n, float *kt, float *phi) {
    float low[FEATURES], high[FEATURES], rise = 0;
    long wide = (n + W - 1) / W * W;
    int leaves = !c->begun;
    vec norm[T / W] = {{0}};
    gather(k, sk, n, c->dim, 1.0f, kt, T);
    product(c->m, wide, c->dim, c->w, c->dim, 1, kt, T, phi, T, 0);
    for (long p = 0; p < c->dim; p++)
        for (long i = 0; i < wide / W; i++) norm[i] += *(vec *)(kt + p * T + i * W) * *(vec *)(kt + p * T + i * W);
    for (long f = 0; f < c->m; f++) {
        float *row = phi + f * T;
        vec most = (vec){0} + NOTHING;
        for (long i = 0; i < wide / W; i++) *(vec *)(row + i * W) -= norm[i] * c->half;
        for (long i = n; i < wide; i++) row[i] = NOTHING;
        for (long i = 0; i < wide; i += W) most = larger(most, *(vec *)(row + i));
        float largest = greatest(most);
        low[f] = c->top[f] > row[0] ? c->top[f] : row[0], high[f] = c->top[f] > largest ? c->top[f] : largest;
        if (high[f] - low[f] > rise) rise = high[f] - low[f];
        leaves |= high[f] > c->r[f] + REACH / 2;
    }
    if (leaves && n > 1 && rise > REACH) return 0;
    for (long f = 0; f < c->m; f++) {
        if (leaves) {
            float r = bounded((low[f] + high[f]) / 2), factor = power(c->r[f] - r);
            for (long p = 0; p < c->dim; p += W) *(vec *)(c->s + f * c->dim + p) *= factor;
            c->z[f] *= factor, c->r[f] = r;
        }
        c->top[f] = high[f];
        for (long i = 0; i < wide; i += W) {
            vec *at = (vec *)(phi + f * T + i);
            *at = exponential(*at - c->r[f]);
        }
    }
    c->begun = 1;
    return 1;
}

/* phi(q) (m, T) of n tokens. */
ALIKE void query_features(const Scan *c, const float *q, long sq, long n, float *qt, float *phi) {
    long wide = (n + W - 1) / W * W;
    vec most[T / W];
    gather(q, sq, n, c->dim, 1.0f, qt, T);
    product(c->m, wide, c->dim, c->w, c->dim, 1, qt, T, phi, T, 0);
    for (long i = 0; i < wide / W; i++) most[i] = (vec){0} + NOTHING;
    for (long f = 0; f < c->m; f++)
        for (long i = 0; i < wide / W; i++) {
            vec *at = (vec *)(phi + f * T + i * W);
            *at += c->r[f];
            most[i] = larger(most[i], *at);
        }
    for (long f = 0; f < c->m; f++)
        for (long i = 0; i < wide / W; i++) {
            vec *at = (vec *)(phi + f * T + i * W);
            *at = exponential(*at - most[i]);
        }
}

/*
 * q, out: `heads` heads, hq and n dim floats apart, of which the first `real` tokens count; normaliser (heads, n). s, z, r, top:
 * the sums before, relative to r, and after. kept: s, z, r, top before every SPAN tokens, or null.
 */
void exponentials_forward(const float *q, long hq, long sq, const float *k, long sk, const float *v, long sv,
                          const float *w, long heads, long n, long real, long m, long dim, float half, float *s,
                          float *z, float *r, float *top, float *kept, float *out, float *normaliser) {
    static __thread float kt[MOST * T], phi_k[FEATURES * T], phi_q[FEATURES * T], a[T * T], ot[MOST * T];
    Scan c = {m, dim, w, half, s, z, r, top, 0};
    Sums sums = {m, dim, dim, 1, s, z};
    for (long begin = 0, size; begin < real; begin += size) {
        if (kept && begin % SPAN == 0) {
            float *at = kept + begin / SPAN * m * (dim + 3);
            copy(at, s, m * dim), copy(at + m * dim, z, m), copy(at + m * (dim + 1), r, m);
            copy(at + m * (dim + 2), top, m);
        }
        size = T - begin % T < real - begin ? T - begin % T : real - begin;
        while (!key_features(&c, k + begin * sk, sk, size, kt, phi_k)) size = (size + 1) / 2;
        for (long h = 0; h < heads; h++) {
            float read[T];
            query_features(&c, q + h * hq + begin * sq, sq, size, kt, phi_q);
            read_sums(sums, size, phi_q, phi_k, v + begin * sv, sv, a, ot, read, 0);
            for (long i = 0; i < size; i += W) *(vec *)(read + i) = larger(*(vec *)(read + i), (vec){0} + FLOOR);
            divide(size, dim, ot, read, out + (h * n + begin) * dim, normaliser + h * n + begin);
        }
        enter(sums, size, phi_k, v + begin * sv, sv);
    }
    for (long h = 0; h < heads; h++)
        for (long i = (h * n + real) * dim; i < (h + 1) * n * dim; i++) out[i] = 0;
}

typedef struct {
    long begin, size;
    float *phi, *s, *z, *r; /* of its keys; before them; the reference */
} Piece;

/* Gradients of the above, where nothing came before; g like q, hg and sg apart; dq like out, dk and dv (n, dim). */
void exponentials_backward(const float *q, long hq, long sq, const float *k, long sk, const float *v, long sv,
                           const float *w, long heads, long n, long real, long m, long dim, float half,
                           const float *kept, const float *out, const float *normaliser, const float *g, long hg,
                           long sg, float *dq, float *dk, float *dv) {
    static __thread float kt[MOST * T], qt[MOST * T], gt[MOST * T], vt[MOST * T], ot[MOST * T], gs[T * MOST],
        phi_q[FEATURES * T], of_q[FEATURES * T], of_k[FEATURES * T], a[T * T], d[T * T], turned[T * T], of_v[MOST * T];
    long sums = m * (dim + 3), room = m * (T + dim + 2);
    float *state = malloc(sizeof(float) * sums), *later = malloc(sizeof(float) * m * (dim + 2));
    float *gz = later + m * dim, *gr = gz + m;
    Sums behind = {m, dim, dim, 1, later, gz};
    float *held[SPAN] = {0};
    for (long i = 0; i < m * (dim + 2); i++) later[i] = 0;
    int any_later = 0;
    for (long span = real ? (real - 1) / SPAN : -1; span >= 0; span--) {
        Scan c = {m, dim, w, half, state, state + m * dim, state + m * (dim + 1), state + m * (dim + 2), span > 0};
        Piece pieces[SPAN];
        long count = 0, end = (span + 1) * SPAN < real ? (span + 1) * SPAN : real;
        copy(state, kept + span * sums, sums);
        for (long begin = span * SPAN, size; begin < end; begin += size, count++) {
            if (!held[count]) held[count] = malloc(sizeof(float) * room);
            float *at = held[count];
            size = T - begin % T < end - begin ? T - begin % T : end - begin;
            while (!key_features(&c, k + begin * sk, sk, size, kt, at)) size = (size + 1) / 2;
            pieces[count] = (Piece){begin, size, at, at + m * T, at + m * (T + dim), at + m * (T + dim + 1)};
            copy(pieces[count].s, c.s, m * dim), copy(pieces[count].z, c.z, m), copy(pieces[count].r, c.r, m);
            if (begin + size < end) enter((Sums){m, dim, dim, 1, c.s, c.z}, size, at, v + begin * sv, sv);
        }
        while (count--) {
            Piece *piece = pieces + count;
            long begin = piece->begin, size = piece->size, wide = (size + W - 1) / W * W;
            const float *phi_k = piece->phi;
            Scan now = {m, dim, w, half, piece->s, piece->z, piece->r, 0, 1};
            for (long f = 0; any_later && f < m; f++) {
                float factor = piece->r[f] == gr[f] ? 1 : power(piece->r[f] - gr[f]);
                if (factor == 1) continue;
                for (long p = 0; p < dim; p += W) *(vec *)(later + f * dim + p) *= factor;
                gz[f] *= factor;
            }
            copy(gr, piece->r, m), any_later = 1;
            gather(k + begin * sk, sk, size, dim, 1.0f, kt, T);
            gather(v + begin * sv, sv, size, dim, 1.0f, vt, T);
            of_keys(behind, size, vt, of_k);
            product(dim, wide, m, later, 1, dim, phi_k, T, of_v, T, 0);
            for (long h = 0; h < heads; h++) {
                float slope[T];
                long done = h * n + begin;
                of_quotient(size, dim, g + h * hg + begin * sg, sg, out + done * dim, normaliser + done, FLOOR, gs, slope);
                gather(gs, dim, size, dim, 1.0f, gt, T);
                query_features(&now, q + h * hq + begin * sq, sq, size, qt, phi_q);
                past(size, m, phi_k, 1, T, phi_q, a);
                hide(size, a);
                of_queries((Sums){m, dim, dim, 1, piece->s, piece->z}, size, phi_k, v + begin * sv, sv, gt, slope, d, of_q);
                for (long f = 0; f < m; f++)
                    for (long i = 0; i < wide; i += W) *(vec *)(of_q + f * T + i) *= *(vec *)(phi_q + f * T + i);
                product(dim, wide, m, w, 1, dim, of_q, T, ot, T, 0);
                scatter(ot, size, dim, dq + (h * n + begin) * dim);
                gather(d, T, size, wide, 1.0f, turned, T);
                add_later(m, size, phi_q, T, 1, turned, of_k);
                gather(a, T, size, wide, 1.0f, turned, T);
                add_later(dim, size, gs, 1, dim, turned, of_v);
                leave(behind, size, phi_q, gs, slope);
            }
            vec sum[T / W] = {{0}};
            for (long f = 0; f < m; f++)
                for (long i = 0; i < wide / W; i++) {
                    vec *at = (vec *)(of_k + f * T + i * W);
                    *at *= *(const vec *)(phi_k + f * T + i * W);
                    sum[i] += *at;
                }
            product(dim, wide, m, w, 1, dim, of_k, T, ot, T, 0);
            for (long p = 0; p < dim; p++)
                for (long i = 0; i < wide / W; i++)
                    *(vec *)(ot + p * T + i * W) -= 2 * half * *(vec *)(kt + p * T + i * W) * sum[i];
            scatter(ot, size, dim, dk + begin * dim);
            scatter(of_v, size, dim, dv + begin * dim);
        }
    }
    for (long i = 0; i < SPAN; i++) free(held[i]);
    free(state), free(later);
    for (long h = 0; h < heads; h++)
        for (long i = (h * n + real) * dim; i < (h + 1) * n * dim; i++) dq[i] = 0;
    for (long i = real * dim; i < n * dim; i++) dk[i] = dv[i] = 0;
}
