// The selective scan on a CPU, each operand read or written once; `native.py` compiles and calls it.
//
// W tokens stand in the lanes of a vector. Each step of the scan inside a vector doubles how far a state reaches,
// (decay, h) <- (decay decay', h + decay h') with the pair 1, 2, 4, ... lanes before; then the state that entered the vector is
// added. Vectors are GCC's and clang's own type: the compiler finds the machine's instructions for them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
using Lanes = std::make_integer_sequence<int, W>;
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

// Vectors worked on at once. Steps and states in loops of their own keep the chain of dependent instructions short enough
// that several tokens are under way: one loop for both takes 1.7 times as long.
constexpr int64_t TILE = 32;
constexpr float LOG2E = 1.44269504f;

V all(float x) { return V{} + x; }

// `fill` in the first K lanes, then x.
template <int K, int... i>
V later(V x, V fill, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(fill, x, (W - K + i)...);
}

template <int... i>
V last(V x, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, (W - 1 + 0 * i)...);
}

template <int... i>
V turned(V x, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, (W - 1 - i)...);
}

// Tokens t to t + W of a row, in the order of the scan. WHOLE: all are there; else zeros stand beyond the end.
template <bool REVERSE, bool WHOLE>
V load(const float* row, int64_t t, int64_t length) {
    V x{};
    if constexpr (WHOLE) {
        std::memcpy(&x, REVERSE ? row + length - t - W : row + t, sizeof x);
        return REVERSE ? turned(x, Lanes{}) : x;
    }
    for (int i = 0; t + i < length; i++) x[i] = row[REVERSE ? length - 1 - t - i : t + i];
    return x;
}

template <bool REVERSE, bool WHOLE>
void store(float* row, int64_t t, int64_t length, V x) {
    if constexpr (WHOLE) {
        if (REVERSE) x = turned(x, Lanes{});
        std::memcpy(REVERSE ? row + length - t - W : row + t, &x, sizeof x);
    } else {
        for (int i = 0; t + i < length; i++) row[REVERSE ? length - 1 - t - i : t + i] = x[i];
    }
}

// 2^x: 0 below 2^-126, infinity from 2^128, NaN of NaN.
V exp2(V x) {
    x = x < -127.0f ? all(-127.0f) : x;
    x = x > 128.0f ? all(128.0f) : x;
    // Adding 1.5 * 2^23 rounds to an integer, and leaves that in the low bits.
    V shifted = x + 12582912.0f;
    V f = x - (shifted - 12582912.0f);
    // Taylor's series of 2^f, |f| <= 1/2: coefficients log(2)^k / k!; pairs, because a chain of seven would wait for each.
    V f2 = f * f;
    V high = (f * 1.52527338e-5f + 1.54035304e-4f) * f2 + (f * 1.33335581e-3f + 9.61812911e-3f);
    V low = (f * 5.55041087e-2f + 2.40226507e-1f) * f2 + (f * 6.93147181e-1f + 1.0f);
    I power = ((I)shifted + 127) << 23;
    return (high * (f2 * f2) + low) * (V)power;
}

// log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; log(1 + y) = 2 artanh(z) by its series, z = y / (2 + y) <= 1/3.
V softplus(V x) {
    V y = exp2((x < 0.0f ? x : -x) * LOG2E);
    V z = y / (y + 2.0f), z2 = z * z, z4 = z2 * z2;
    V high = (z2 * (2.0f / 13) + 2.0f / 11) * z4 + (z2 * (2.0f / 9) + 2.0f / 7);
    V low = (z2 * (2.0f / 5) + 2.0f / 3) * z2 + 2.0f;
    return (x < 0.0f ? V{} : x) + z * (high * (z4 * z2) + low);
}

template <int K>
void scan(V& decay, V& h) {
    if constexpr (K < W) {
        h += decay * later<K>(h, V{}, Lanes{});
        decay *= later<K>(decay, all(1.0f), Lanes{});
        scan<2 * K>(decay, h);
    }
}

// One channel: rows of tokens, its N exponents and states, B and C of its group. Without C the states go to `out`.
struct Channel {
    const float *u, *delta, *A, *B, *C;
    float D, bias;
    bool soft;
    int64_t N, length;
    float *h, *out;
};

template <bool REVERSE, bool WHOLE>
void tile(const Channel& c, int64_t first, int64_t count) {
    V step[TILE], entering[TILE], y[TILE];
    for (int64_t i = 0; i < count; i++) {
        V u = load<REVERSE, WHOLE>(c.u, first + i * W, c.length);
        step[i] = load<REVERSE, WHOLE>(c.delta, first + i * W, c.length) + c.bias;
        if (c.soft) step[i] = softplus(step[i]);
        entering[i] = step[i] * u;
        y[i] = u * c.D;
    }
    for (int64_t n = 0; n < c.N; n++) {
        V carry = all(c.h[n]);
        float exponent = c.A[n] * LOG2E;
        for (int64_t i = 0; i < count; i++) {
            V decay = exp2(step[i] * exponent);
            V h = entering[i] * load<REVERSE, WHOLE>(c.B + n * c.length, first + i * W, c.length);
            scan<1>(decay, h);
            h += decay * carry;
            carry = last(h, Lanes{});
            if (c.C)
                y[i] += h * load<REVERSE, WHOLE>(c.C + n * c.length, first + i * W, c.length);
            else
                store<REVERSE, WHOLE>(c.out + n * c.length, first + i * W, c.length, h);
        }
        c.h[n] = carry[0];
    }
    for (int64_t i = 0; c.C && i < count; i++) store<REVERSE, WHOLE>(c.out, first + i * W, c.length, y[i]);
}

template <bool REVERSE>
void channel(const Channel& c) {
    int64_t whole = c.length / W;
    std::fill(c.h, c.h + c.N, 0.0f);
    for (int64_t i = 0; i < whole; i += TILE) tile<REVERSE, true>(c, i * W, std::min(TILE, whole - i));
    if (whole * W < c.length) tile<REVERSE, false>(c, whole * W, 1);
}

}  // namespace

// Contiguous float32: u, delta (batch, channels, length); A (channels, N); B, C (batch, groups, N, length); D, bias (channels);
// reverse: a byte a group; h: room for (batch, channels, N). C, D and bias may be null.
extern "C" void selective_scan(const float* u, const float* delta, const float* A, const float* B, const float* C,
                               const float* D, const float* bias, const uint8_t* reverse, float* h, float* out,
                               int64_t threads, int64_t soft, int64_t batch, int64_t channels, int64_t groups, int64_t N,
                               int64_t length) {
#pragma omp parallel num_threads(threads)
    {
#if defined(__SSE__)
        // States that decay below 2^-126 become 0: Intel takes a hundred cycles for each such number.
        unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8040);
#endif
#pragma omp for
        for (int64_t row = 0; row < batch * channels; row++) {
            int64_t b = row / channels, c = row % channels, g = c / (channels / groups), shared = (b * groups + g) * N * length;
            Channel one{u + row * length,
                        delta + row * length,
                        A + c * N,
                        B + shared,
                        C ? C + shared : nullptr,
                        D ? D[c] : 0.0f,
                        bias ? bias[c] : 0.0f,
                        soft != 0,
                        N,
                        length,
                        h + row * N,
                        out + row * length * (C ? 1 : N)};
            (reverse[g] ? channel<true> : channel<false>)(one);
        }
#if defined(__SSE__)
        _mm_setcsr(mode);
#endif
    }
}
