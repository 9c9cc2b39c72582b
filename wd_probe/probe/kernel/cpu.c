/* The probe's passes over float32 weights: remembering them, whole or in half as many bytes, and
   counting (formulas.tally) against what was remembered, or against what the optimizer's state tells
   of them. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

enum { CHUNK = 4096, FIELDS = 6, INFINITE = 0x7f800000 };

/* Streaming stores: the copy is not read again before the step has emptied the caches, and
   writing it through them would first read what it overwrites. */
static void copy_block(const float *from, float *to, int64_t n)
{
#ifdef __AVX__
    int64_t i = 0;
    for (; i < n && ((uintptr_t)(to + i) & 31); i++)
        to[i] = from[i];
    for (; i + 8 <= n; i += 8)
        _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    for (; i < n; i++)
        to[i] = from[i];
    _mm_sfence();
#else
    memcpy(to, from, (size_t)n * sizeof(float));
#endif
}

void wd_probe_copy(int64_t blocks, const float *const *from, float *const *to, const int64_t *sizes,
                   int threads)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        copy_block(from[k], to[k], sizes[k]);
}

/* The upper half of every number: sign, exponent and seven bits, as bfloat16 has them. */
static void halve_block(const uint32_t *from, uint16_t *to, int64_t n)
{
    int64_t i = 0;
#ifdef __AVX2__
    for (; i < n && ((uintptr_t)(to + i) & 31); i++)
        to[i] = (uint16_t)(from[i] >> 16);
    for (; i + 16 <= n; i += 16) {
        const __m256i a = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)(from + i)), 16);
        const __m256i b = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)(from + i + 8)), 16);
        const __m256i lanes = _mm256_packus_epi32(a, b);
        _mm256_stream_si256((__m256i *)(to + i), _mm256_permute4x64_epi64(lanes, 0xd8));
    }
    _mm_sfence();
#endif
    for (; i < n; i++)
        to[i] = (uint16_t)(from[i] >> 16);
}

void wd_probe_halve(int64_t blocks, const float *const *from, uint16_t *const *to,
                    const int64_t *sizes, int threads)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        halve_block((const uint32_t *)from[k], to[k], sizes[k]);
}

/* What is known of the weights before a step: themselves, their upper halves, or how far the step
   moved them by the optimizer's state, with a second moment or without. */
enum known { WHOLE, HALF, FIRST, SECOND };

typedef struct {
    const void *a;   /* the weights before, their upper halves, or the first moment */
    const float *v;  /* the second moment */
    const float *b;  /* the weights after */
    float rate, root, eps, up;
} source;

static inline int32_t bits(float value)
{
    int32_t integer;
    memcpy(&integer, &value, sizeof integer);
    return integer;
}

static inline float number(int32_t integer)
{
    float value;
    memcpy(&value, &integer, sizeof value);
    return value;
}

/* Weight i before its step. Of a half it is the middle of what it may have been. Had again from the
   state it is (b + rate * m / (sqrt(v) * root + eps)) * up, where what rounding alone may have left
   of a zero is one. */
static inline __attribute__((always_inline)) float before(enum known known, const source *s, int i)
{
    if (known == WHOLE)
        return ((const float *)s->a)[i];
    if (known == HALF) {
        const uint32_t upper = ((const uint16_t *)s->a)[i];
        return number((int32_t)((upper << 16) | (upper & 0x7fff ? 0x8000u : 0)));
    }
    float moved = s->rate * ((const float *)s->a)[i];
    if (known == SECOND)
        moved /= sqrtf(s->v[i]) * s->root + s->eps;
    const float value = (s->b[i] + moved) * s->up;
    const int still = (fabsf(value) <= 1e-6f * fabsf(moved)) & (fabsf(moved) <= FLT_MAX);
    return number(bits(value) & (still - 1)); /* a branch would keep the loop from SIMD */
}

/* Counts one chunk in which every number is finite, and so is their sum; returns the largest exponent
   pattern met, so that the caller can tell whether that was true. */
static inline __attribute__((always_inline)) int32_t
tally_finite(enum known known, source s, int n, float c, double *out)
{
    const float half = c / 2;
    int penalized = 0, opposing = 0, flipped = 0;
    int32_t top = 0;
    float opposing_size = 0, total_size = 0;
#pragma omp simd reduction(+ : penalized, opposing, flipped, opposing_size, total_size) \
    reduction(max : top)
    for (int i = 0; i < n; i++) {
        const float x = before(known, &s, i), y = s.b[i];
        const float ax = fabsf(x), ay = fabsf(y);
        const int32_t ix = bits(ax), iy = bits(ay);
        const int opposes = (ax != 0) & ((bits(x) ^ bits(y)) < 0) & (ay > half * ax);
        top = ix > top ? ix : top;
        top = iy > top ? iy : top;
        penalized += ax != 0;
        opposing += opposes;
        flipped += opposes & (ay > c * ax);
        opposing_size += opposes ? ax : 0.0f;
        total_size += ax;
    }
    out[0] = penalized;
    out[1] = opposing;
    out[2] = flipped;
    out[3] = 0;
    out[4] = opposing_size;
    out[5] = total_size;
    return top;
}

/* The same for any numbers. */
static void tally_any(enum known known, source s, int n, float c, double *out)
{
    float x[CHUNK], y[CHUNK];
    int bad = 0;
    for (int i = 0; i < n; i++) {
        x[i] = before(known, &s, i);
        y[i] = s.b[i];
        if (!(isfinite(x[i]) && isfinite(y[i]))) {
            x[i] = y[i] = 0;
            bad++;
        }
    }
    tally_finite(WHOLE, (source){.a = x, .b = y}, n, c, out);
    if (out[5] > FLT_MAX) {
        out[4] = out[5] = 0;
        for (int i = 0; i < n; i++) {
            double one[FIELDS];
            tally_finite(WHOLE, (source){.a = x + i, .b = y + i}, 1, c, one);
            out[4] += one[4];
            out[5] += one[5];
        }
    }
    out[3] = bad;
}

/* Adds the counts of one block. */
static inline __attribute__((always_inline)) void
tally_block(enum known known, source s, int64_t size, float c, double *out)
{
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int n = (int)(size - start < CHUNK ? size - start : CHUNK);
        double found[FIELDS];
        if (tally_finite(known, s, n, c, found) >= INFINITE || found[5] > FLT_MAX)
            tally_any(known, s, n, c, found);
        for (int k = 0; k < FIELDS; k++)
            out[k] += found[k];
        s.a = (const char *)s.a + n * (known == HALF ? sizeof(uint16_t) : sizeof(float));
        s.v += known == SECOND ? n : 0;
        s.b += n;
    }
}

/* For each block of weights before (a) and after (b) a step that took c*a off, adds to its row of
   out: penalized, opposing, flipped, nonfinite, sum|a| opposing, sum|a|. */
void wd_probe_tally(int64_t blocks, const float *const *a, const float *const *b,
                    const int64_t *sizes, int threads, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        tally_block(WHOLE, (source){.a = a[k], .b = b[k]}, sizes[k], c[k], out + FIELDS * k);
}

/* The same, with the weights before as wd_probe_halve left them. */
void wd_probe_tally_half(int64_t blocks, const uint16_t *const *a, const float *const *b,
                         const int64_t *sizes, int threads, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        tally_block(HALF, (source){.a = a[k], .b = b[k]}, sizes[k], c[k], out + FIELDS * k);
}

/* The same, with the weights before recovered from those after and the optimizer's state; v is null
   where there is no second moment. */
void wd_probe_tally_state(int64_t blocks, const float *const *m, const float *const *b,
                          const int64_t *sizes, int threads, const float *const *v,
                          const float *rate, const float *root, const float *eps,
                          const float *up, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++) {
        const source s = {m[k], v[k], b[k], rate[k], root[k], eps[k], up[k]};
        if (v[k])
            tally_block(SECOND, s, sizes[k], c[k], out + FIELDS * k);
        else
            tally_block(FIRST, s, sizes[k], c[k], out + FIELDS * k);
    }
}
