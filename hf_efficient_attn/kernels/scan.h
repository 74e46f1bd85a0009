/* What kernels share that go through a decoder's tokens in pieces of T, with the sums of features before each piece. */

#include "arithmetic.h"

void *malloc(unsigned long);
void free(void *);

#define FLOOR 1e-30f /* of a normaliser */

enum { FEATURES = 512, SPAN = 256 }; /* most of m; tokens for which the sums are kept once */

static void copy(float *to, const float *from, long n) {
    for (long i = 0; i < n; i++) to[i] = from[i];
}

/* a (keys, T) = x y for keys (n, depth) at x[j xr + p xk] and queries y (depth, T); zero where a key comes later. */
static void past(long n, long depth, const float *x, long xr, long xk, const float *y, float *a) {
    long wide = (n + W - 1) / W * W;
    for (long j = 0; j < wide; j += W) {
        long rows = n - j < W ? n - j : W;
        product(rows, wide - j, depth, x + j * xr, xr, xk, y + j, T, a + j * T + j, T, 0);
    }
}

static void hide(long n, float *a) {
    long wide = (n + W - 1) / W * W;
    for (long j = 0; j < n; j++)
        for (long i = 0; i < j; i++) a[j * T + i] = 0;
    for (long j = 0; j < n; j++)
        for (long i = n; i < wide; i++) a[j * T + i] = 0;
}

/* c (m, T) += x (m, n) a, for a of the form that `past` gives: later halves of keys meet later halves of queries alone. */
static void add_past(long m, long n, const float *x, long xr, long xk, const float *a, float *c) {
    long wide = (n + W - 1) / W * W, first = n < T / 2 ? n : T / 2;
    product(m, wide, first, x, xr, xk, a, T, c, T, 1);
    if (n > first)
        product(m, wide - first, n - first, x + first * xk, xr, xk, a + first * T + first, T, c + first, T, 1);
}

/* The same for the transpose of such an a. */
static void add_later(long m, long n, const float *x, long xr, long xk, const float *a, float *c) {
    long wide = (n + W - 1) / W * W, first = n < T / 2 ? wide : T / 2;
    product(m, first, n, x, xr, xk, a, T, c, T, 1);
    if (wide > first)
        product(m, wide - first, n - first, x + first * xk, xr, xk, a + first * T + first, T, c + first, T, 1);
}

/* The sums of phi(k) v (m, dim), rows ss apart, and of phi(k) (m), sz apart; or what later queries ask of them. */
typedef struct {
    long m, dim, ss, sz;
    float *s, *z;
} Sums;

/* Adds n keys, phi (m, T) and values (n, dim). */
static void enter(Sums c, long n, const float *phi, const float *v, long sv) {
    product(c.m, c.dim, n, phi, T, 1, v, sv, c.s, c.ss, 1);
    for (long f = 0; f < c.m; f++) {
        vec sum = {0};
        for (long i = 0; i < n; i += W) sum += *(const vec *)(phi + f * T + i);
        c.z[f * c.sz] += total_of(sum);
    }
}

/*
 * What n queries read of the sums and of one another: numerators ot (dim, T) and normalisers (T), in their place or added to
 * them, and a, the weights (keys, T) inside the piece.
 */
static void read_sums(Sums c, long n, const float *phi_q, const float *phi_k, const float *v, long sv, float *a, float *ot,
                      float *sums, int add) {
    long wide = (n + W - 1) / W * W;
    past(n, c.m, phi_k, 1, T, phi_q, a);
    hide(n, a);
    product(c.dim, wide, c.m, c.s, 1, c.ss, phi_q, T, ot, T, add);
    add_past(c.dim, n, v, 1, sv, a, ot);
    for (long i = 0; i < wide; i += W) {
        vec sum = {0};
        if (add) sum = *(vec *)(sums + i);
        for (long f = 0; f < c.m; f++) sum += *(const vec *)(phi_q + f * T + i) * c.z[f * c.sz];
        for (long j = 0; j < n; j++) sum += *(vec *)(a + j * T + i);
        *(vec *)(sums + i) = sum;
    }
}

/* Of n outputs: ot (dim, T) over the normalisers (T), which are kept, to rows of out. */
static void divide(long n, long dim, float *ot, const float *sums, float *out, float *normaliser) {
    for (long i = 0; i < n; i += W) {
        vec inverse = 1.0f / *(const vec *)(sums + i);
        for (long p = 0; p < dim; p++) *(vec *)(ot + p * T + i) *= inverse;
    }
    copy(normaliser, sums, n);
    scatter(ot, n, dim, out);
}

/* The gradient of phi_k (m, T) from what later queries ask, of n keys with values vt (dim, T). */
static void of_keys(Sums later, long n, const float *vt, float *of_k) {
    long wide = (n + W - 1) / W * W;
    product(later.m, wide, later.dim, later.s, later.ss, 1, vt, T, of_k, T, 0);
    for (long f = 0; f < later.m; f++)
        for (long i = 0; i < wide; i += W) *(vec *)(of_k + f * T + i) += later.z[f * later.sz];
}

/*
 * The gradient of phi_q (m, T) from those of n numerators, gt (dim, T), and normalisers, slope (T), and d, that of the weights
 * inside the piece.
 */
static void of_queries(Sums before, long n, const float *phi_k, const float *v, long sv, const float *gt, const float *slope,
                       float *d, float *of_q) {
    long wide = (n + W - 1) / W * W;
    past(n, before.dim, v, sv, 1, gt, d);
    for (long j = 0; j < n; j++)
        for (long i = 0; i < wide; i += W) *(vec *)(d + j * T + i) += *(const vec *)(slope + i);
    hide(n, d);
    product(before.m, wide, before.dim, before.s, before.ss, 1, gt, T, of_q, T, 0);
    add_past(before.m, n, phi_k, T, 1, d, of_q);
    for (long f = 0; f < before.m; f++)
        for (long i = 0; i < wide; i += W)
            *(vec *)(of_q + f * T + i) += *(const vec *)(slope + i) * before.z[f * before.sz];
}

/* Adds what n queries ask of the keys before them; gs (n, dim) are the gradients of their numerators. */
static void leave(Sums later, long n, const float *phi_q, const float *gs, const float *slope) {
    product(later.m, later.dim, n, phi_q, T, 1, gs, later.dim, later.s, later.ss, 1);
    for (long f = 0; f < later.m; f++) {
        vec sum = {0};
        for (long i = 0; i < n; i += W) sum += *(const vec *)(phi_q + f * T + i) * *(const vec *)(slope + i);
        later.z[f * later.sz] += total_of(sum);
    }
}

/*
 * From gradients g of n outputs, numerator / normaliser, those of the numerators, gs (n, dim), and of the normalisers, slope,
 * zeros up to T and where a normaliser was kept `floor` away from 0.
 */
static void of_quotient(long n, long dim, const float *g, long sg, const float *out, const float *normaliser, float floor,
                        float *gs, float *slope) {
    for (long i = 0; i < n; i++) {
        float inverse = 1 / normaliser[i];
        vec sum = {0};
        for (long p = 0; p < dim; p += W) {
            vec x = *(const vec *)(g + i * sg + p) * inverse;
            sum += x * *(const vec *)(out + i * dim + p);
            *(vec *)(gs + i * dim + p) = x;
        }
        slope[i] = normaliser[i] > floor || normaliser[i] < -floor ? -total_of(sum) : 0;
    }
    for (long i = n; i < T; i++) slope[i] = 0;
}
