/* One pass over float32 weights before (a) and after (b) a step; see penalty.tally.
   Adds to out: penalized, opposing, flipped, nonfinite, sum|a| opposing, sum|a|. */
#include <float.h>
#include <math.h>
#include <stdint.h>

enum { CHUNK = 4096 };

void wd_probe_tally(const float *a, const float *b, int64_t n, float c, double *out)
{
    const float half = c / 2;
    for (int64_t start = 0; start < n; start += CHUNK) {
        const float *x = a + start, *y = b + start;
        const int m = (int)(n - start < CHUNK ? n - start : CHUNK);
        int penalized = 0, opposing = 0, flipped = 0, bad = 0;
        float opposing_size = 0, total_size = 0;
#pragma omp simd reduction(+ : penalized, opposing, flipped, bad, opposing_size, total_size)
        for (int i = 0; i < m; i++) {
            const float ax = fabsf(x[i]), ay = fabsf(y[i]);
            const int finite = (ax <= FLT_MAX) & (ay <= FLT_MAX);
            const int across = finite & (((x[i] < 0) & (y[i] > 0)) | ((x[i] > 0) & (y[i] < 0)));
            const int opposes = across & (ay > half * ax);
            penalized += finite & (ax > 0);
            opposing += opposes;
            flipped += across & (ay > c * ax);
            bad += !finite;
            opposing_size += opposes ? ax : 0.0f;
            total_size += finite ? ax : 0.0f;
        }
        out[0] += penalized;
        out[1] += opposing;
        out[2] += flipped;
        out[3] += bad;
        out[4] += opposing_size;
        out[5] += total_size;
    }
}
