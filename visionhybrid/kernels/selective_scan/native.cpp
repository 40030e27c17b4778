// The selective scan on a CPU, forward and backward, each operand read or written once; `native.py` compiles and calls it.
//
// W tokens stand in the lanes of a vector. Each step of the scan inside a vector doubles how far a state reaches,
// (decay, h) <- (decay decay', h + decay h') with the pair 1, 2, 4, ... lanes before; then the state that entered the vector is
// added. Vectors are GCC's and clang's own type: the compiler finds the machine's instructions for them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__SSE__)
#include <immintrin.h>
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

// Vectors worked on at once. Steps, decays and states in loops of their own keep the chains of dependent instructions short
// enough that several tokens are under way: with one loop for steps and decays, all takes 1.2 times as long.
constexpr int64_t TILE = 32;
constexpr float LOG2E = 1.44269504f;

V all(float x) { return V{} + x; }

// x moved K lanes towards the last one, or BACK towards the first, and `fill` in the lanes left empty.
template <int K, bool BACK, int... i>
V moved(V x, V fill, std::integer_sequence<int, i...>) {
    if constexpr (BACK) return __builtin_shufflevector(x, fill, (K + i)...);
    return __builtin_shufflevector(fill, x, (W - K + i)...);
}

// Lane K of x in all lanes.
template <int K, int... i>
V lane(V x, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(x, x, (K + 0 * i)...);
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

// 2^x: 0 below 2^-126, infinity from 2^128, NaN of NaN. Of 2^n 2^f, n whole and |f| <= 1/2, the second is a polynomial within
// 2e-9 (all fits here are minimax, of relative error), and 1 at 0, so that states which hardly decay keep their sums.
V exp2(V x) {
#if defined(__AVX512F__)
    V n = (V)_mm512_roundscale_ps((__m512)x, 8);
#else
    x = x < -127.0f ? all(-127.0f) : x;
    x = x > 128.0f ? all(128.0f) : x;
    // Adding 1.5 * 2^23 rounds to an integer, and leaves that in the low bits.
    V shifted = x + 12582912.0f, n = shifted - 12582912.0f;
#endif
    V f = x - n;
    V p = f * 1.53533619e-4f + 1.33988744e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033247e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147203e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (V)((I)p + ((I)shifted << 23));
#endif
}

// e^-|x|
V exp_minus_abs(V x) { return exp2((V)((I)x & 0x7fffffff) * -LOG2E); }

// log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; log(1 + y) = 2 artanh(z), z = y / (2 + y) <= 1/3, within 4e-9.
V softplus(V x) {
    V y = exp_minus_abs(x);
    V z = y / (y + 2.0f), z2 = z * z;
    V p = z2 * 2.8178335e-1f + 2.79606027e-1f;
    p = p * z2 + 4.00249103e-1f;
    p = p * z2 + 6.66663147e-1f;
    p = p * z2 + 2.0f;
    return p * z + (x < 0.0f ? V{} : x);
}

// The derivative of softplus.
V sigmoid(V x) {
    V y = exp_minus_abs(x);
    return (x < 0.0f ? y : all(1.0f)) / (y + 1.0f);
}

float sum(V x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

template <bool BACK, int K = 1>
void scan(V& decay, V& h) {
    if constexpr (K < W) {
        h += decay * moved<K, BACK>(h, V{}, Lanes{});
        decay *= moved<K, BACK>(decay, all(1.0f), Lanes{});
        scan<BACK, 2 * K>(decay, h);
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
    V step[TILE], decay[TILE], y[TILE];
    auto at = [&](const float* row, int64_t i) { return load<REVERSE, WHOLE>(row, first + i * W, c.length); };
    for (int64_t i = 0; i < count; i++) {
        V x = at(c.delta, i) + c.bias;
        step[i] = c.soft ? softplus(x) : x;
    }
    for (int64_t i = 0; c.C && i < count; i++) y[i] = at(c.u, i) * c.D;
    for (int64_t n = 0; n < c.N; n++) {
        for (int64_t i = 0; i < count; i++) decay[i] = exp2(step[i] * (c.A[n] * LOG2E));
        V carry = all(c.h[n]);
        auto states = [&](int64_t i) {
            V d = decay[i], h = step[i] * at(c.u, i) * at(c.B + n * c.length, i);
            scan<false>(d, h);
            h += d * carry;
            carry = lane<W - 1>(h, Lanes{});
            return h;
        };
        if (c.C)
            for (int64_t i = 0; i < count; i++) y[i] += states(i) * at(c.C + n * c.length, i);
        else
            for (int64_t i = 0; i < count; i++) store<REVERSE, WHOLE>(c.out + n * c.length, first + i * W, c.length, states(i));
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

template <bool REVERSE>
V load(const float* row, int64_t t, int64_t length) {
    return t + W <= length ? load<REVERSE, true>(row, t, length) : load<REVERSE, false>(row, t, length);
}

template <bool REVERSE>
void store(float* row, int64_t t, int64_t length, V x) {
    if (t + W <= length)
        store<REVERSE, true>(row, t, length, x);
    else
        store<REVERSE, false>(row, t, length, x);
}

template <bool REVERSE>
void add(float* row, int64_t t, int64_t length, V x) {
    store<REVERSE>(row, t, length, load<REVERSE>(row, t, length) + x);
}

// What the gradient of one channel reads beside `Channel`, and where it goes: rows dB and dC are added to.
struct Gradient {
    const float* grad;
    float *du, *ddelta, *dA, *dB, *dC, *dD, *dbias;
};

// Rows of one channel in the order of the scan, filled up with steps and inputs of 0 to whole vectors.
struct Rows {
    std::vector<V> u, dy, step, dstep, dentering, decay, h;
    explicit Rows(int64_t n) : u(n), dy(n), step(n), dstep(n), dentering(n), decay(n + 1), h(n + 1) {}
};

// With l_t the gradient of state t, l_t = g_t + decay_{t+1} l_{t+1}: the same scan from the other end.
template <bool REVERSE>
void channel_backward(const Channel& c, const Gradient& to, Rows& rows) {
    int64_t n = (c.length + W - 1) / W;
    for (int64_t i = 0; i < n; i++) {
        rows.u[i] = load<REVERSE>(c.u, i * W, c.length);
        if (c.C) rows.dy[i] = load<REVERSE>(to.grad, i * W, c.length);
        V step = load<REVERSE>(c.delta, i * W, c.length) + c.bias;
        if (c.soft) step = softplus(step);
        for (int64_t j = c.length - i * W; j < W; j++) step[j] = 0;
        rows.step[i] = step;
        rows.dstep[i] = rows.dentering[i] = V{};
    }
    for (int64_t s = 0; s < c.N; s++) {
        const float *B = c.B + s * c.length, *C = c.C ? c.C + s * c.length : nullptr;
        V carry{}, dA{};
        // h stands one vector later than decay: zeros before its first state, and after the last decay.
        rows.h[0] = rows.decay[n] = V{};
        for (int64_t i = 0; i < n; i++) rows.decay[i] = exp2(rows.step[i] * (c.A[s] * LOG2E));
        for (int64_t i = 0; i < n; i++) {
            V decay = rows.decay[i];
            V h = rows.step[i] * rows.u[i] * load<REVERSE>(B, i * W, c.length);
            scan<false>(decay, h);
            h += decay * carry;
            carry = lane<W - 1>(h, Lanes{});
            rows.h[i + 1] = h;
            if (C) add<REVERSE>(to.dC + s * c.length, i * W, c.length, rows.dy[i] * h);
        }
        carry = V{};
        for (int64_t i = n - 1; i >= 0; i--) {
            V after, before, b = load<REVERSE>(B, i * W, c.length);
            std::memcpy(&after, (const float*)(rows.decay.data() + i) + 1, sizeof after);
            std::memcpy(&before, (const float*)(rows.h.data() + i + 1) - 1, sizeof before);
            V l = C ? rows.dy[i] * load<REVERSE>(C, i * W, c.length)
                    : load<REVERSE>(to.grad + s * c.length, i * W, c.length);
            scan<true>(after, l);
            l += after * carry;
            carry = lane<0>(l, Lanes{});
            V carried = l * rows.decay[i] * before;
            dA += carried * rows.step[i];
            add<REVERSE>(to.dB + s * c.length, i * W, c.length, l * rows.step[i] * rows.u[i]);
            rows.dstep[i] += carried * c.A[s];
            rows.dentering[i] += l * b;
        }
        to.dA[s] = sum(dA);
    }
    V dD{}, dbias{};
    for (int64_t i = 0; i < n; i++) {
        V ddelta = rows.dstep[i] + rows.dentering[i] * rows.u[i];
        if (c.soft) ddelta *= sigmoid(load<REVERSE>(c.delta, i * W, c.length) + c.bias);
        V du = rows.dentering[i] * rows.step[i];
        if (c.C) du += rows.dy[i] * c.D, dD += rows.dy[i] * rows.u[i];
        dbias += ddelta;
        store<REVERSE>(to.du, i * W, c.length, du);
        store<REVERSE>(to.ddelta, i * W, c.length, ddelta);
    }
    *to.dD = sum(dD);
    *to.dbias = sum(dbias);
}

// While it lives, numbers below 2^-126 are 0: Intel takes a hundred cycles for each, and states decay through them.
struct Flush {
#if defined(__SSE__)
    unsigned mode = _mm_getcsr();
    Flush() { _mm_setcsr(mode | 0x8040); }
    ~Flush() { _mm_setcsr(mode); }
#endif
};

// Contiguous float32: u, delta (batch, channels, length); A (channels, N); B, C (batch, groups, N, length); D, bias (channels);
// reverse: a byte a group. C, D and bias may be null.
struct Scans {
    const float *u, *delta, *A, *B, *C, *D, *bias;
    const uint8_t* reverse;
    int64_t soft, batch, channels, groups, N, length;

    int64_t group(int64_t row) const { return row % channels / (channels / groups); }

    Channel channel(int64_t row, float* h, float* out) const {
        int64_t c = row % channels, shared = (row / channels * groups + group(row)) * N * length;
        return {u + row * length,
                delta + row * length,
                A + c * N,
                B + shared,
                C ? C + shared : nullptr,
                D ? D[c] : 0.0f,
                bias ? bias[c] : 0.0f,
                soft != 0,
                N,
                length,
                h,
                out};
    }
};

}  // namespace

// h: room for (batch, channels, N).
extern "C" void selective_scan(const Scans* scans, int64_t threads, float* h, float* out) {
    const Scans& s = *scans;
#pragma omp parallel num_threads(threads)
    {
        Flush flush;
#pragma omp for
        for (int64_t row = 0; row < s.batch * s.channels; row++) {
            Channel c = s.channel(row, h + row * s.N, out + row * s.length * (s.C ? 1 : s.N));
            (s.reverse[s.group(row)] ? channel<true> : channel<false>)(c);
        }
    }
}

// dA (batch, channels, N); dD, dbias (batch, channels); dB, dC (batch, groups, parts, N, length), zeros: the channels of a group
// are split into `parts`, each of which adds into rows of its own, in the same order whatever the number of threads.
extern "C" void selective_scan_backward(const Scans* scans, int64_t threads, int64_t parts, const float* grad, float* du,
                                        float* ddelta, float* dA, float* dB, float* dC, float* dD, float* dbias) {
    const Scans& s = *scans;
    int64_t per_group = s.channels / s.groups, shared = s.N * s.length;
#pragma omp parallel num_threads(threads)
    {
        Flush flush;
        Rows rows((s.length + W - 1) / W);
#pragma omp for
        for (int64_t item = 0; item < s.batch * s.groups * parts; item++) {
            int64_t first = item / parts * per_group, part = item % parts;
            for (int64_t i = per_group * part / parts; i < per_group * (part + 1) / parts; i++) {
                int64_t row = first + i;
                Gradient to{grad + row * s.length * (s.C ? 1 : s.N),
                            du + row * s.length,
                            ddelta + row * s.length,
                            dA + row * s.N,
                            dB + item * shared,
                            s.C ? dC + item * shared : nullptr,
                            dD + row,
                            dbias + row};
                Channel c = s.channel(row, nullptr, nullptr);
                (s.reverse[s.group(row)] ? channel_backward<true> : channel_backward<false>)(c, to, rows);
            }
        }
    }
}
