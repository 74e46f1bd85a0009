/*
 * Attention by a window read exactly and learned features of what lies outside (ops/hybrid_scan.py), on a CPU, float32. With
 * y = W x, m = 2 dim features phi(x) = [softmax(y), softmax(-y)], logits a_ij = scaling q_i . k_j, c_i the largest of the near
 * keys' and a gate s of each query head,
 *
 *     out_i = (s sum_near exp(a_ij - c_i) v_j + sum_far phi(q_i) . phi(k_j) v_j) / (the same with 1 for v_j).
 *
 * Near are the w keys up to i's own, `ahead` keys after it and those sinks, the first positions of the text, that lie before
 * them; far are the keys before that are no sinks. An encoder's far keys on the other side are read first, by a call that is
 * given the text backwards and no gate. One call serves a key/value head of a row and its query heads, in pieces of T queries. To
 * query i the key w before it is the last far one, so that pieces of far keys run w keys behind: inside a piece weights are
 * formed, what lies before it is read from the sums S (m, dim) and z (m) of phi(k) v and phi(k). Everything of a piece is held
 * with its queries side by side, T columns of which `wide` are used.
 */

#include "scan.h"

enum { HALF = T / 2 }; /* queries that meet one panel of near keys */

typedef struct {
    const float *k, *v, *sink_k, *sink_v; /* rows sk and sv apart; row `row` holds the position `at` of the first query */
    long sk, sv, row, at, w, ahead, sinks, dim, end; /* end: how many rows there are */
    float scaling;
} Keys;

static long least(long a, long b) { return a < b ? a : b; }

static long most(long a, long b) { return a > b ? a : b; }

static void clear(float *x, long n) {
    for (long i = 0; i < n; i++) x[i] = 0;
}

/* What HALF queries meet: rows from..to-1 of near keys, of which the first stands at `place` in the panel; `cols` are real. */
typedef struct {
    long cols, wide, from, to, place;
} Panel;

static Panel panel_of(const Keys *c, long begin, long half, long n) {
    long cols = least(HALF, n - begin - half), first = c->row + begin + half;
    long low = most(0, c->row + begin - c->w + 1), from = most(0, first - c->w + 1);
    long to = least(c->end, first + cols + c->ahead);
    return (Panel){cols, (cols + W - 1) / W * W, from, to, (c->sinks + from - low) * T + half};
}

/* out (dim, wide) = the sum over a panel's rows, sinks first, of keys or values times what the panel holds. */
static void times_panel(const Keys *c, Panel at, long half, const float *sink, const float *x, long sx, const float *panel,
                        float *out) {
    product(c->dim, at.wide, c->sinks, sink, 1, c->dim, panel + half, T, out + half, T, 0);
    product(c->dim, at.wide, at.to - at.from, x + at.from * sx, 1, sx, panel + at.place, T, out + half, T, 1);
}

/* The panel's rows = the products of keys or values with the columns y (dim, T). */
static void with_panel(const Keys *c, Panel at, long half, const float *sink, const float *x, long sx, const float *y,
                       float *panel) {
    product(c->sinks, at.wide, c->dim, sink, c->dim, 1, y + half, T, panel + half, T, 0);
    product(at.to - at.from, at.wide, c->dim, x + at.from * sx, sx, 1, y + half, T, panel + at.place, T, 0);
}

/* A panel's row times `scaling`, NOTHING outside of its columns first..last; raises each column's largest. */
static void limit(float *row, long wide, long first, long last, float scaling, vec *largest) {
    first = most(0, least(first, wide));
    for (long i = 0; i < first; i++) row[i] = NOTHING;
    for (long i = most(0, last + 1); i < wide; i++) row[i] = NOTHING;
    for (long i = 0; i < wide / W; i++) {
        vec *x = (vec *)(row + i * W);
        *x *= scaling;
        largest[i] = larger(largest[i], *x);
    }
}

static void exponentiate(float *row, long wide, const vec *largest, vec *sum) {
    for (long i = 0; i < wide / W; i++) {
        vec *x = (vec *)(row + i * W);
        *x = exponential(*x - largest[i]);
        sum[i] += *x;
    }
}

/* exp(a - c) of near keys (rows, sinks first) and the queries qt (dim, T) from `begin` on, and its sum over keys (T). */
static void weigh(const Keys *c, long begin, long n, const float *qt, float *panel, float *sums) {
    for (long half = 0; half < T && begin + half < n; half += HALF) {
        Panel at = panel_of(c, begin, half, n);
        vec largest[HALF / W], sum[HALF / W] = {{0}};
        long position = c->at + begin + half, row = c->row + begin + half;
        for (long i = 0; i < HALF / W; i++) largest[i] = (vec){0} + NOTHING;
        with_panel(c, at, half, c->sink_k, c->k, c->sk, qt, panel);
        for (long j = 0; j < c->sinks; j++)
            limit(panel + j * T + half, at.wide, j - position + c->w, HALF, c->scaling, largest);
        for (long r = at.from; r < at.to; r++)
            limit(panel + at.place + (r - at.from) * T, at.wide, r - row - c->ahead, r - row + c->w - 1, c->scaling,
                  largest);
        for (long i = 0; i < HALF / W; i++) largest[i] = pick(largest[i] > -1e30f, largest[i], (vec){0});
        for (long j = 0; j < c->sinks; j++) exponentiate(panel + j * T + half, at.wide, largest, sum);
        for (long r = 0; r < at.to - at.from; r++) exponentiate(panel + at.place + r * T, at.wide, largest, sum);
        for (long i = 0; i < at.wide / W; i++) *(vec *)(sums + half + i * W) = sum[i];
    }
}

/* phi (2 dim, T) of `wide` columns xt (dim, T). */
static void features(long dim, long wide, const float *w, const float *xt, float *phi) {
    float *other = phi + dim * T;
    product(dim, wide, dim, w, dim, 1, xt, T, phi, T, 0);
    for (long i = 0; i < wide; i += W) {
        vec high = (vec){0} + NOTHING, low = -high, sum = {0}, rest = {0};
        for (long f = 0; f < dim; f++) {
            vec y = *(vec *)(phi + f * T + i);
            high = larger(high, y), low = pick(low < y, low, y);
        }
        for (long f = 0; f < dim; f++) {
            vec *a = (vec *)(phi + f * T + i), *b = (vec *)(other + f * T + i), y = *a;
            *a = exponential(y - high), *b = exponential(low - y);
            sum += *a, rest += *b;
        }
        sum = 1.0f / sum, rest = 1.0f / rest;
        for (long f = 0; f < dim; f++) *(vec *)(phi + f * T + i) *= sum, *(vec *)(other + f * T + i) *= rest;
    }
}

/* The gradient of W x from that of phi, in place of its first half. */
static void of_features(long dim, long wide, const float *phi, float *of_phi) {
    const float *minus = phi + dim * T;
    float *of_minus = of_phi + dim * T;
    for (long i = 0; i < wide; i += W) {
        vec a = {0}, b = {0};
        for (long f = 0; f < dim; f++) {
            a += *(vec *)(of_phi + f * T + i) * *(const vec *)(phi + f * T + i);
            b += *(vec *)(of_minus + f * T + i) * *(const vec *)(minus + f * T + i);
        }
        for (long f = 0; f < dim; f++) {
            vec *x = (vec *)(of_phi + f * T + i);
            *x = *(const vec *)(phi + f * T + i) * (*x - a);
            *x -= *(const vec *)(minus + f * T + i) * (*(vec *)(of_minus + f * T + i) - b);
        }
    }
}

/*
 * The far keys that the piece of `size` queries from `begin` on adds: keys and values as rows (T, dim) and phi (m, T). Returns
 * for how many queries, the first ones, there is none; zeros stand there, and nothing is written where there is none at all.
 */
static long far_keys(const Keys *c, long begin, long size, const float *w, float *kr, float *vr, float *kt, float *phi) {
    long row = c->row + begin - c->w, skip = most(0, least(size, c->sinks - (c->at + begin - c->w)));
    long wide = (size + W - 1) / W * W;
    if (skip == size) return skip;
    clear(kr, skip * c->dim), clear(vr, skip * c->dim);
    for (long i = skip; i < size; i++) {
        copy(kr + i * c->dim, c->k + (row + i) * c->sk, c->dim);
        copy(vr + i * c->dim, c->v + (row + i) * c->sv, c->dim);
    }
    gather(kr, c->dim, size, c->dim, 1.0f, kt, T);
    features(c->dim, wide, w, kt, phi);
    for (long f = 0; f < 2 * c->dim; f++) {
        for (long i = 0; i < skip; i++) phi[f * T + i] = 0;
        for (long i = size; i < wide; i++) phi[f * T + i] = 0;
    }
    return skip;
}

static float *room_for_panel(const Keys *c, long n) {
    return malloc(sizeof(float) * (c->sinks + least(c->w + c->ahead, c->row + n) + T) * T);
}

/*
 * q, out: `heads` heads, hq and n dim floats apart, of which the first `real` tokens count; query i is row `row` + i of the
 * keys, and the first one stands at position `at`. wq (heads, dim, dim), wk (dim, dim), with the root of the scaling in them;
 * gate (heads); normaliser (heads, n). s, z: the sums before and after. kept: s, z before every SPAN tokens, or null. Without a
 * gate far keys alone are read, and numerators are written as they are; other (heads, n, dim) and other_z (heads, n), or null,
 * are what such a call gave for keys on the other side.
 */
void hybrid_forward(const float *q, long hq, long sq, const float *k, long sk, const float *v, long sv, const float *sink_k,
                    const float *sink_v, const float *wq, const float *wk, const float *gate, long heads, long n, long real,
                    long dim, long row, long at, long w, long ahead, long sinks, float scaling, float *s, float *z,
                    float *kept, const float *other, const float *other_z, float *out, float *normaliser) {
    static __thread float kt[MOST * T], kr[MOST * T], vr[MOST * T], qt[MOST * T], ot[MOST * T], xt[MOST * T],
        a[T * T], phi_k[FEATURES * T], phi_q[FEATURES * T];
    Keys c = {k, v, sink_k, sink_v, sk, sv, row, at, w, ahead, sinks, dim, row + real, scaling};
    float *panel = room_for_panel(&c, n);
    long m = 2 * dim;
    Sums past_sums = {m, dim, dim, 1, s, z};
    for (long begin = 0, size; begin < real; begin += size) {
        if (kept && begin % SPAN == 0) {
            float *to = kept + begin / SPAN * m * (dim + 1);
            copy(to, s, m * dim), copy(to + m * dim, z, m);
        }
        size = least(T, real - begin);
        long wide = (size + W - 1) / W * W, skip = far_keys(&c, begin, size, wk, kr, vr, kt, phi_k);
        for (long h = 0; h < heads; h++) {
            float sums[T];
            long done = h * n + begin;
            gather(q + h * hq + begin * sq, sq, size, dim, 1.0f, qt, T);
            if (gate) {
                weigh(&c, begin, real, qt, panel, sums);
                for (long half = 0; half < size; half += HALF)
                    times_panel(&c, panel_of(&c, begin, half, real), half, sink_v, v, sv, panel, ot);
                for (long i = 0; i < wide; i += W) {
                    *(vec *)(sums + i) *= gate[h];
                    for (long p = 0; p < dim; p++) *(vec *)(ot + p * T + i) *= gate[h];
                }
            } else {
                clear(sums, T), clear(ot, dim * T);
            }
            if (other) {
                gather(other + done * dim, dim, size, dim, 1.0f, xt, T);
                for (long i = 0; i < dim * T; i += W) *(vec *)(ot + i) += *(vec *)(xt + i);
                for (long i = 0; i < size; i++) sums[i] += other_z[done + i];
            }
            if (skip < size) {
                features(dim, wide, wq + h * dim * dim, qt, phi_q);
                read_sums(past_sums, size, phi_q, phi_k, vr, dim, a, ot, sums, 1);
            }
            if (gate) {
                for (long i = 0; i < wide; i += W) *(vec *)(sums + i) = larger(*(vec *)(sums + i), (vec){0} + FLOOR);
                divide(size, dim, ot, sums, out + done * dim, normaliser + done);
            } else {
                copy(normaliser + done, sums, size);
                scatter(ot, size, dim, out + done * dim);
            }
        }
        if (skip < size) enter(past_sums, size, phi_k, vr, dim);
    }
    for (long h = 0; h < heads; h++) clear(out + (h * n + real) * dim, (n - real) * dim);
    free(panel);
}

/*
 * Gradients of the near part from those of the numerators, gt (dim, T) and gs (T, dim), and of the normalisers, slope: adds those
 * of keys and values, writes that of the queries, ot (dim, T), and returns the gate's.
 */
static float near_gradients(const Keys *c, long begin, long n, float gate, const float *q, long sq, const float *qt,
                            const float *gt, const float *gs, const float *slope, float *panel, float *of_panel,
                            float *ot, float *dk, float *dv, float *of_sink_k, float *of_sink_v) {
    float sums[T], of_gate = 0;
    long dim = c->dim;
    weigh(c, begin, n, qt, panel, sums);
    for (long half = 0; half < T && begin + half < n; half += HALF) {
        Panel at = panel_of(c, begin, half, n);
        vec total[HALF / W] = {{0}};
        ivec open[HALF / W];
        long rows = c->sinks + at.to - at.from;
        with_panel(c, at, half, c->sink_v, c->v, c->sv, gt, of_panel);
        for (long j = 0; j < rows; j++) {
            long place = j < c->sinks ? j * T + half : at.place + (j - c->sinks) * T;
            for (long i = 0; i < at.wide / W; i++) {
                vec *x = (vec *)(of_panel + place + i * W), weight = *(vec *)(panel + place + i * W);
                *x = weight * (*x + *(const vec *)(slope + half + i * W));
                total[i] += *x;
            }
        }
        for (long i = 0; i < at.wide / W; i++) of_gate += total_of(total[i]), open[i] = (ivec){0} - 1;
        for (long j = 0; j < rows; j++) {
            long place = j < c->sinks ? j * T + half : at.place + (j - c->sinks) * T;
            for (long i = 0; i < at.wide / W; i++) {
                vec *x = (vec *)(of_panel + place + i * W), *weight = (vec *)(panel + place + i * W);
                ivec largest = open[i] & (*weight == 1.0f); /* c, subtracted everywhere */
                *x = (*x - pick(largest, total[i], (vec){0})) * (gate * c->scaling);
                *weight *= gate;
                open[i] &= ~largest;
            }
        }
        times_panel(c, at, half, c->sink_k, c->k, c->sk, of_panel, ot);
        const float *queries = q + (begin + half) * sq, *slopes = gs + half * dim;
        product(c->sinks, dim, at.cols, of_panel + half, T, 1, queries, sq, of_sink_k, dim, 1);
        product(c->sinks, dim, at.cols, panel + half, T, 1, slopes, dim, of_sink_v, dim, 1);
        product(at.to - at.from, dim, at.cols, of_panel + at.place, T, 1, queries, sq, dk + at.from * dim, dim, 1);
        product(at.to - at.from, dim, at.cols, panel + at.place, T, 1, slopes, dim, dv + at.from * dim, dim, 1);
    }
    return of_gate;
}

typedef struct {
    long begin, size, skip;
    float *phi, *kr, *vr, *s, *z; /* of its far keys; the sums before them */
} Piece;

/*
 * Gradients of the above, where nothing came before, from the outputs and their normalisers and g like q, hg and sg apart; dq
 * like out. Those of keys, values (rows, dim), sinks, maps and gate are added.
 */
void hybrid_backward(const float *q, long hq, long sq, const float *k, long sk, const float *v, long sv, const float *sink_k,
                     const float *sink_v, const float *wq, const float *wk, const float *gate, long heads, long n, long real,
                     long dim, long row, long at, long w, long ahead, long sinks, float scaling, const float *kept,
                     const float *out, const float *normaliser, const float *g, long hg, long sg, float *dq, float *dk,
                     float *dv, float *of_sink_k, float *of_sink_v, float *of_wq, float *of_wk, float *of_gate) {
    static __thread float kt[MOST * T], vt[MOST * T], qt[MOST * T], gt[MOST * T], ot[MOST * T], gs[T * MOST], a[T * T],
        d[T * T], turned[T * T], phi_q[FEATURES * T], of_q[FEATURES * T], of_k[FEATURES * T];
    Keys c = {k, v, sink_k, sink_v, sk, sv, row, at, w, ahead, sinks, dim, row + real, scaling};
    long m = 2 * dim, sums = m * (dim + 1), room = m * T + 2 * T * dim + sums;
    float *panel = room_for_panel(&c, n), *of_panel = room_for_panel(&c, n);
    float *state = malloc(sizeof(float) * sums), *later = malloc(sizeof(float) * sums), *gz = later + m * dim;
    float *held = malloc(sizeof(float) * room * (SPAN / T));
    Sums before = {m, dim, dim, 1, state, state + m * dim}, behind = {m, dim, dim, 1, later, gz};
    clear(later, sums);
    for (long span = real ? (real - 1) / SPAN : -1; span >= 0; span--) {
        Piece pieces[SPAN / T];
        long count = 0, end = least((span + 1) * SPAN, real);
        copy(state, kept + span * sums, sums);
        for (long begin = span * SPAN; begin < end; begin += T, count++) {
            float *to = held + count * room;
            Piece x = {begin, least(T, end - begin), 0, to, to + m * T, to + m * T + T * dim, to + m * T + 2 * T * dim, 0};
            x.z = x.s + m * dim;
            copy(x.s, state, sums);
            x.skip = far_keys(&c, begin, x.size, wk, x.kr, x.vr, kt, x.phi);
            if (x.skip < x.size) enter(before, x.size, x.phi, x.vr, dim);
            pieces[count] = x;
        }
        while (count--) {
            Piece *x = pieces + count;
            long begin = x->begin, size = x->size, skip = x->skip, wide = (size + W - 1) / W * W;
            long first = row + begin - w + skip; /* of its far keys */
            int far = skip < size;
            if (far) {
                gather(x->vr, dim, size, dim, 1.0f, vt, T);
                of_keys(behind, size, vt, of_k);
                product(size - skip, dim, m, x->phi + skip, 1, T, later, dim, dv + first * dim, dim, 1);
            }
            for (long h = 0; h < heads; h++) {
                float slope[T];
                const float *own = q + h * hq, *queries = own + begin * sq;
                long done = h * n + begin;
                of_quotient(size, dim, g + h * hg + begin * sg, sg, out + done * dim, normaliser + done, FLOOR, gs, slope);
                gather(queries, sq, size, dim, 1.0f, qt, T);
                gather(gs, dim, size, dim, 1.0f, gt, T);
                if (gate)
                    of_gate[h] += near_gradients(&c, begin, real, gate[h], own, sq, qt, gt, gs, slope, panel, of_panel,
                                                 ot, dk, dv, of_sink_k, of_sink_v);
                else
                    clear(ot, dim * T);
                if (far) {
                    features(dim, wide, wq + h * dim * dim, qt, phi_q);
                    past(size, m, x->phi, 1, T, phi_q, a);
                    hide(size, a);
                    of_queries((Sums){m, dim, dim, 1, x->s, x->z}, size, x->phi, x->vr, dim, gt, slope, d, of_q);
                    of_features(dim, wide, phi_q, of_q);
                    product(dim, wide, dim, wq + h * dim * dim, 1, dim, of_q, T, ot, T, 1);
                    product(dim, dim, size, of_q, T, 1, queries, sq, of_wq + h * dim * dim, dim, 1);
                    gather(d, T, size, wide, 1.0f, turned, T);
                    add_later(m, size, phi_q, T, 1, turned, of_k);
                    product(size - skip, dim, size, a + skip * T, T, 1, gs, dim, dv + first * dim, dim, 1);
                    leave(behind, size, phi_q, gs, slope);
                }
                scatter(ot, size, dim, dq + done * dim);
            }
            if (far) {
                of_features(dim, wide, x->phi, of_k);
                product(size - skip, dim, dim, of_k + skip, 1, T, wk, dim, dk + first * dim, dim, 1);
                product(dim, dim, size, of_k, T, 1, x->kr, dim, of_wk, dim, 1);
            }
        }
    }
    free(panel), free(of_panel), free(state), free(later), free(held);
    for (long h = 0; h < heads; h++) clear(dq + (h * n + real) * dim, (n - real) * dim);
}
