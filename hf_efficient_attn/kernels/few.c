/*
 * Few queries that each read some ranges of stored keys where they lie (ops/few.py), and the choice of keys (ops/sorted_band.py)
 * and of blocks (ops/tiles.py) for them, on a CPU, float32.
 *
 *     out_i = sum_j exp(scaling q_i k_j - r_i) v_j,    r_i the log-sum-exp; zeros where there is no key.
 *
 * A line is a query head of a row: line b heads + h reads keys and values of head h groups / heads of row b.
 */

#include "arithmetic.h"

void *malloc(unsigned long);
void free(void *);

static float dot(const float *a, const float *b, long dim) {
    vec sum = {0};
    for (long p = 0; p < dim; p += W) sum += *(const vec *)(a + p) * *(const vec *)(b + p);
    return total_of(sum);
}

/*
 * Lines first..last-1 of q, out (lines, n, dim) and lse (lines, n), r_i, or null. k, v: rows, heads and keys kb, kg, ks (vb,
 * vg, vs) floats apart. begin, end (lines, n, count): slots begin..end-1 of each range; rows of `most` slots at most.
 */
void few_forward(const float *q, const float *k, long kb, long kg, long ks, const float *v, long vb, long vg, long vs,
                 const long *begin, const long *end, long first, long last, long heads, long groups, long n, long count,
                 long most, long dim, float scaling, float *out, float *lse) {
    float *weights = malloc(sizeof(float) * (most + W));
    for (long row = first * n; row < last * n; row++) {
        long line = row / n, b = line / heads, g = line % heads * groups / heads, size = 0;
        const float *key = k + b * kb + g * kg, *value = v + b * vb + g * vg, *own = q + row * dim;
        const long *from = begin + row * count, *to = end + row * count;
        vec query[MOST / W], sum[MOST / W], total = {0};
        float largest = NOTHING;
        for (long p = 0; p < dim / W; p++) query[p] = *(const vec *)(own + p * W) * scaling, sum[p] = (vec){0};
        for (long r = 0; r < count; r++)
            for (long j = from[r]; j < to[r]; j++) {
                float x = dot((const float *)query, key + j * ks, dim);
                weights[size++] = x;
                if (x > largest) largest = x;
            }
        for (long i = size; i < size + W; i++) weights[i] = NOTHING;
        for (long i = 0; i < size; i += W) {
            vec *x = (vec *)(weights + i);
            *x = exponential(*x - largest);
            total += *x;
        }
        size = 0;
        for (long r = 0; r < count; r++)
            for (long j = from[r]; j < to[r]; j++) {
                float weight = weights[size++];
                for (long p = 0; p < dim / W; p++) sum[p] += weight * *(const vec *)(value + j * vs + p * W);
            }
        float weight = total_of(total), inverse = size ? 1 / weight : 0;
        if (lse) lse[row] = size ? largest + __builtin_logf(weight) : NOTHING;
        for (long p = 0; p < dim / W; p++) *(vec *)(out + row * dim + p * W) = sum[p] * inverse;
    }
    free(weights);
}

/*
 * chosen (lines, n, picks): of the blocks before own[b n + i] block 0 and those with the largest features . summary, of equal ones
 * the lower, the best first; `none` where there are no more. features (lines, n, width); summaries' rows, heads and blocks
 * are sb, sg, ss floats apart.
 */
void few_choose(const float *features, const float *summaries, long sb, long sg, long ss, const long *own, long lines, long heads,
                long groups, long n, long count, long width, long picks, long none, long *chosen) {
    float *best = malloc(sizeof(float) * picks);
    for (long row = 0; row < lines * n; row++, chosen += picks) {
        long line = row / n, b = line / heads, g = line % heads * groups / heads, held = 0;
        const float *feature = features + row * width, *summary = summaries + b * sb + g * sg;
        long end = own[b * n + row % n] < count ? own[b * n + row % n] : count;
        for (long j = 0; j < end; j++) {
            float score = j ? dot(feature, summary + j * ss, width) : -NOTHING;
            long place = held < picks ? held++ : picks;
            if (place == picks && !(score > best[--place])) continue;
            for (; place > 0 && score > best[place - 1]; place--) best[place] = best[place - 1], chosen[place] = chosen[place - 1];
            best[place] = score, chosen[place] = j;
        }
        for (long i = held; i < picks; i++) chosen[i] = none;
    }
    free(best);
}

/*
 * begin, end (lines, n, rounds window + 2): of a query at position[b n + i] the first `sinks` slots, its own, and for each round r
 * the `window` most recent slots at or before it, its own among them, whose label is asked (lines, n, rounds), without those
 * found before; empty where there are no more. labels: rows, heads and slots lb, lg, ls numbers apart.
 */
void few_recent(const int *asked, const int *labels, long lb, long lg, long ls, const long *position, long lines, long heads,
                long groups, long n, long rounds, long window, long sinks, long *begin, long *end) {
    long width = rounds * window + 2;
    for (long row = 0; row < lines * n; row++, asked += rounds, begin += width, end += width) {
        long line = row / n, b = line / heads, g = line % heads * groups / heads, at = position[b * n + row % n], held = 2;
        const int *label = labels + b * lb + g * lg;
        long oldest[rounds];
        begin[0] = 0, end[0] = sinks <= at ? sinks : at + 1;
        begin[1] = at, end[1] = at + (at >= sinks);
        for (long r = 0; r < rounds; r++) {
            long found = 0;
            oldest[r] = at + 1;
            for (long j = at; j >= sinks && found < window; j--) {
                if (label[j * ls + r] != asked[r]) continue;
                int before = j == at;
                for (long e = 0; e < r; e++) before |= label[j * ls + e] == asked[e] && j >= oldest[e];
                if (!before) begin[held] = j, end[held++] = j + 1;
                oldest[r] = j, found++;
            }
        }
        for (; held < width; held++) begin[held] = end[held] = 0;
    }
}
