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

/* Adds n keys, phi (m, T), to the sums s of phi(k) v, rows ss apart, and z of phi(k), sz apart. */
static void enter(long m, long dim, long n, const float *phi, const float *v, long sv, float *s, long ss, float *z, long sz) {
    product(m, dim, n, phi, T, 1, v, sv, s, ss, 1);
    for (long f = 0; f < m; f++) {
        vec sum = {0};
        for (long i = 0; i < n; i += W) sum += *(const vec *)(phi + f * T + i);
        z[f * sz] += total_of(sum);
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
