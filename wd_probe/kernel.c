/* The probe's two passes over float32 weights: remembering them, and counting (penalty.tally). */
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

static void tally_block(const float *a, const float *b, int64_t n, float c, double *out)
{
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int size = (int)(n - start < CHUNK ? n - start : CHUNK);
        double found[FIELDS];
        if (tally_finite(a + start, b + start, size, c, found) >= INFINITE) {
            float x[CHUNK], y[CHUNK];
            int bad = 0;
            for (int i = 0; i < size; i++) {
                const int finite = isfinite(a[start + i]) && isfinite(b[start + i]);
                x[i] = finite ? a[start + i] : 0;
                y[i] = finite ? b[start + i] : 0;
                bad += !finite;
            }
            tally_finite(x, y, size, c, found);
            found[3] = bad;
        }
        for (int k = 0; k < FIELDS; k++)
            out[k] += found[k];
    }
}

/* For each block of weights before (a) and after (b) a step that took c*a off, adds to its row of
   out: penalized, opposing, flipped, nonfinite, sum|a| opposing, sum|a|. */
void wd_probe_tally(int64_t blocks, const float *const *a, const float *const *b,
                    const int64_t *sizes, int threads, const float *c, double *out)
{
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < blocks; k++)
        tally_block(a[k], b[k], sizes[k], c[k], out + FIELDS * k);
}
