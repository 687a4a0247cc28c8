/* Multiply-adds per second on one core: twelve independent chains of vectors, nothing loaded or stored. The compiler
 * contracts a*b+c to one instruction where the machine has it (-O3 -march=native -ffp-contract=fast). */
#include <time.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
typedef float vector __attribute__((vector_size(BYTES)));

/* What the compiler cannot know: a chain whose values it knew it would leave out. */
volatile float localattn_bench_half = 0.5f, localattn_bench_sink;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* FLOP per second over that many rounds. The sums converge to 2: no value overflows or becomes subnormal. */
double localattn_bench_peak(long rounds) {
    const vector half = (vector){0} + localattn_bench_half, one = (vector){0} + 1.0f;
#define BEGIN(i) vector sum##i = one + (float)i;
#define STEP(i) sum##i = sum##i * half + one;
#define USE(i) total += sum##i;
    EACH(BEGIN)
    const double began = now();
    for (long round = 0; round < rounds; ++round) {
        EACH(STEP)
    }
    vector total = one;
    EACH(USE)
    localattn_bench_sink = total[0];
    return 2.0 * CHAINS * (BYTES / sizeof(float)) * (double)rounds / (now() - began);
}
