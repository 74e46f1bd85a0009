/* Vectors of 16 floats, and products small enough for the first-level cache. */

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(64), aligned(4), may_alias));

enum { W = 16, MOST = 256, T = 64 }; /* floats of a vector; most of a head; queries side by side */

#define NOTHING (-__builtin_inff())
#define INLINE static inline __attribute__((always_inline))

/* c (m, 16 nv) = or += a (m, depth) b (depth, 16 nv), with m and nv constants of the caller. */
INLINE void tile(int m, int nv, long depth, const float *a, long ar, long ak, const float *b, long ldb, float *c,
                 long ldc, int add) {
    vec sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) sum[i][j] = add ? *(const vec *)(c + i * ldc + j * W) : (vec){0};
    for (long p = 0; p < depth; p++) {
        vec row[4];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) row[j] = *(const vec *)(b + p * ldb + j * W);
#pragma GCC unroll 6
        for (int i = 0; i < m; i++)
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) sum[i][j] += a[i * ar + p * ak] * row[j];
    }
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) *(vec *)(c + i * ldc + j * W) = sum[i][j];
}

/* The same for any m; nv is a constant of the caller. */
INLINE void strip(long m, int nv, long depth, const float *a, long ar, long ak, const float *b, long ldb, float *c,
                  long ldc, int add) {
    long i = 0;
    for (; m - i >= 6; i += 6) tile(6, nv, depth, a + i * ar, ar, ak, b, ldb, c + i * ldc, ldc, add);
    if (m - i >= 4) tile(4, nv, depth, a + i * ar, ar, ak, b, ldb, c + i * ldc, ldc, add), i += 4;
    if (m - i >= 2) tile(2, nv, depth, a + i * ar, ar, ak, b, ldb, c + i * ldc, ldc, add), i += 2;
    if (m - i >= 1) tile(1, nv, depth, a + i * ar, ar, ak, b, ldb, c + i * ldc, ldc, add);
}

/* c (m, n) = or += a (m, depth) b (depth, n); n is a multiple of 16, a is read at i ar + p ak. */
static void product(long m, long n, long depth, const float *a, long ar, long ak, const float *b, long ldb, float *c,
                    long ldc, int add) {
    for (; n >= 4 * W; n -= 4 * W, b += 4 * W, c += 4 * W) strip(m, 4, depth, a, ar, ak, b, ldb, c, ldc, add);
    if (n >= 2 * W) strip(m, 2, depth, a, ar, ak, b, ldb, c, ldc, add), n -= 2 * W, b += 2 * W, c += 2 * W;
    if (n >= W) strip(m, 1, depth, a, ar, ak, b, ldb, c, ldc, add);
}

/* exp(x), relative error below 2e-7; 0 below -87. */
INLINE vec exponential(vec x) {
    ivec low = x < 88.0f, live = x > -87.0f;
    x = (vec)((low & (ivec)x) | (~low & (ivec)((vec){0} + 88.0f)));
    vec t = x * 1.44269504f, big = {0};
    big += 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (t + big) - big;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = {0};
    p += 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & live);
}

/* a where `first`, else b. */
INLINE vec pick(ivec first, vec a, vec b) { return (vec)((first & (ivec)a) | (~first & (ivec)b)); }

INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* Whether any of the lanes is set. */
INLINE int any(ivec x) {
    x |= __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x |= __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x |= __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] | x[1];
}

/* The largest of a vector's floats. */
INLINE float greatest(vec x) {
    x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return x[0] > x[1] ? x[0] : x[1];
}

/* The sum of a vector's floats. */
INLINE float total_of(vec x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

/* A square of 16 x 16 floats, transposed: rows are interleaved with those half, a quarter, ... of them away. */
INLINE void turn(vec *x) {
    vec y[W];
    for (int round = 0; round < 4; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) {
            vec a = x[i], b = x[i + W / 2];
            y[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}

/* (m, dim), rows `stride` apart, times factor -> (dim, m), rows ldo apart, zeros up to the next multiple of 16. */
static void gather(const float *x, long stride, long m, long dim, float factor, float *out, long ldo) {
    for (long i = 0; i < m; i += W)
        for (long p = 0; p < dim; p += W) {
            vec square[W];
            for (long u = 0; u < W; u++) {
                square[u] = (vec){0};
                if (i + u < m) square[u] = *(const vec *)(x + (i + u) * stride + p) * factor;
            }
            turn(square);
            for (long u = 0; u < W; u++) *(vec *)(out + (p + u) * ldo + i) = square[u];
        }
}

/* Inverse of `gather`, into rows dim apart. */
static void scatter(const float *x, long m, long dim, float *out) {
    for (long i = 0; i < m; i += W)
        for (long p = 0; p < dim; p += W) {
            vec square[W];
            for (long u = 0; u < W; u++) square[u] = *(const vec *)(x + (p + u) * T + i);
            turn(square);
            for (long u = 0; u < W && i + u < m; u++) *(vec *)(out + (i + u) * dim + p) = square[u];
        }
}

/*
 * Logits s (n, T) of `wide` queries side by side, -inf where one sees nothing, to weights relative to their largest so far, `top`,
 * in place; what there is, sum and ot (dim, T), is brought to it, and sum gets theirs.
 */
INLINE void online_softmax(float *s, long n, long wide, long dim, vec *top, vec *sum, float *ot) {
    for (long i = 0; i < wide / W; i++) {
        vec high = top[i], weight = {0};
        for (long j = 0; j < n; j++) high = larger(high, *(vec *)(s + j * T + i * W));
        vec reference = larger(high, (vec){0} - 1e30f); /* finite where nothing is seen */
        vec factor = exponential(top[i] - reference);
        for (long j = 0; j < n; j++) {
            vec *at = (vec *)(s + j * T + i * W);
            *at = exponential(*at - reference);
            weight += *at;
        }
        sum[i] = sum[i] * factor + weight;
        top[i] = high;
        for (long p = 0; p < dim; p++) *(vec *)(ot + p * T + i * W) *= factor;
    }
}
