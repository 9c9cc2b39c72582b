/* The probe's passes over float32 weights: remembering them, whole or in half as many bytes, and
   counting (penalty.tally) against what was remembered, or against what the optimizer's state tells
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

static inline int32_t bits(float value)
{
    int32_t integer;
    memcpy(&integer, &value, sizeof integer);
    return integer;
}

/* One chunk in which every number is finite; returns the largest exponent pattern met, so that the
   caller can tell whether that was true. */
static int32_t tally_finite(const float *x, const float *y, int n, float c, double *out)
{
    const float half = c / 2;
    int penalized = 0, opposing = 0, flipped = 0;
    int32_t top = 0;
    float opposing_size = 0, total_size = 0;
#pragma omp simd reduction(+ : penalized, opposing, flipped, opposing_size, total_size) \
    reduction(max : top)
    for (int i = 0; i < n; i++) {
        const float ax = fabsf(x[i]), ay = fabsf(y[i]);
        const int32_t ix = bits(ax), iy = bits(ay);
        const int opposes = (ax != 0) & ((bits(x[i]) ^ bits(y[i])) < 0) & (ay > half * ax);
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

/* Adds the counts of one chunk. */
static void tally_chunk(const float *a, const float *b, int size, float c, double *out)
{
    double found[FIELDS];
    if (tally_finite(a, b, size, c, found) >= INFINITE) {
        float x[CHUNK], y[CHUNK];
        int bad = 0;
        for (int i = 0; i < size; i++) {
            const int finite = isfinite(a[i]) && isfinite(b[i]);
            x[i] = finite ? a[i] : 0;
            y[i] = finite ? b[i] : 0;
            bad += !finite;
        }
        tally_finite(x, y, size, c, found);
        found[3] = bad;
    }
    for (int k = 0; k < FIELDS; k++)
        out[k] += found[k];
}

static inline int chunk(int64_t n, int64_t start)
{
    return (int)(n - start < CHUNK ? n - start : CHUNK);
}

/* For each block of weights before (a) and after (b) a step that took c*a off, adds to its row of
   out: penalized, opposing, flipped, nonfinite, sum|a| opposing, sum|a|. */
void wd_probe_tally(int64_t blocks, const float *const *a, const float *const *b,
                    const int64_t *sizes, int threads, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        for (int64_t i = 0; i < sizes[k]; i += CHUNK)
            tally_chunk(a[k] + i, b[k] + i, chunk(sizes[k], i), c[k], out + FIELDS * k);
}

/* The same, with the weights before as wd_probe_halve left them: read as the middle of what each
   may have been. */
void wd_probe_tally_half(int64_t blocks, const uint16_t *const *a, const float *const *b,
                         const int64_t *sizes, int threads, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        for (int64_t i = 0; i < sizes[k]; i += CHUNK) {
            const int n = chunk(sizes[k], i);
            const uint16_t *half = a[k] + i;
            float x[CHUNK];
            uint32_t *whole = (uint32_t *)x;
#pragma omp simd
            for (int j = 0; j < n; j++)
                whole[j] = ((uint32_t)half[j] << 16) | (half[j] & 0x7fff ? 0x8000u : 0);
            tally_chunk(x, b[k] + i, n, c[k], out + FIELDS * k);
        }
}

/* A weight before its step; what rounding alone may have left of a zero is one. */
static inline float back_again(float after, float moved, float up)
{
    const float before = (after + moved) * up;
    const int still = (fabsf(before) <= 1e-6f * fabsf(moved)) & (fabsf(moved) <= FLT_MAX);
    return still ? 0 : before;
}

/* The same, with the weights before had again from the weights after (b) and the optimizer's
   state: (b + rate * m / (sqrt(v) * root + eps)) * up, and where v is null (b + rate * m) * up. */
void wd_probe_tally_state(int64_t blocks, const float *const *m, const float *const *b,
                          const int64_t *sizes, int threads, const float *const *v,
                          const float *rate, const float *root, const float *eps,
                          const float *up, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        for (int64_t i = 0; i < sizes[k]; i += CHUNK) {
            const int n = chunk(sizes[k], i);
            const float *first = m[k] + i, *after = b[k] + i;
            const float e = rate[k], r = root[k], small = eps[k];
            float x[CHUNK];
            if (v[k]) {
                const float *second = v[k] + i;
#pragma omp simd
                for (int j = 0; j < n; j++)
                    x[j] = back_again(after[j], e * first[j] / (sqrtf(second[j]) * r + small), up[k]);
            } else {
#pragma omp simd
                for (int j = 0; j < n; j++)
                    x[j] = back_again(after[j], e * first[j], up[k]);
            }
            tally_chunk(x, after, n, c[k], out + FIELDS * k);
        }
}
