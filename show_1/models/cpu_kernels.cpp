// What cpu_kernels.py compiles: loops over channels and heads that the compiler turns into vector instructions, shared
// among OpenMP's threads. All is computed in float32; T, and U where another type comes back, is float or bfloat16.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;  // the upper half of a float32's
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float load(float value) { return value; }
inline float load(bfloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

inline void store(float &to, float value) { to = value; }
inline void store(bfloat16 &to, float value) {  // to the nearest, in the middle to the even one
    uint32_t bits = to_bits(value);
    to.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// e to the x, its relative error 4e-7 within ±10 and growing with x from there; as at ±87 beyond, and of NaN.
inline float exponential(float x) {
    // Bits are compared, as the compiler makes branches of comparing floats, for what NaN is then.
    uint32_t most = to_bits(87.0f), size = to_bits(x) & 0x7fffffff;
    x = from_bits((to_bits(x) & 0x80000000) | (size < most ? size : most));
    // 2 to the n + f. Beside 1.5·2^23 a float32 has no place for a fraction, and its lowest bits are n.
    float shifted = x * 1.44269504f + 12582912.0f;
    float f = x * 1.44269504f - (shifted - 12582912.0f);
    // A polynomial for 2 to the f in ±1/2, of the least relative error, 9e-8 (fitted).
    float power = 1.32646953e-3f;
    power = power * f + 9.67151e-3f;
    power = power * f + 5.55073404e-2f;
    power = power * f + 2.40222418e-1f;
    power = power * f + 6.93146983e-1f;
    power = power * f + 1.0f;
    return from_bits(to_bits(power) + (to_bits(shifted) << 23));
}

struct Identity {
    static inline float of(float x) { return x; }
};

struct SiLU {
    static inline float of(float x) { return x / (1 + exponential(-x)); }
};

struct GELU {
    // Half of what the error function leaves to 1 is exp(-z·z)·polynomial(1 / (1 + p·z)), a form of Abramowitz and
    // Stegun's (7.1.26) with a polynomial fitted to 1e-7 of it for any z.
    static inline float of(float x) {
        float z = std::fabs(x) * 0.70710678f;
        float t = 1 / (1 + 0.3275911f * z);
        float tail = -0.0709340794f;
        tail = tail * t + 0.249882989f;
        tail = tail * t - 0.205597615f;
        tail = tail * t + 0.229053128f;
        tail = tail * t + 0.0114242194f;
        tail = tail * t + 0.103340245f;
        tail = tail * t + 0.0903003466f;
        tail = tail * t + 0.0925308179f;
        tail *= t * exponential(-z * z);
        return x * (x < 0 ? tail : 1 - tail);
    }
};

// Write each channel's mean and sum of squares around it. Sums are of what differs from the first pixel, so that little
// is lost where values lie far from 0.
template <typename T>
void summarise(const T *__restrict x, int64_t pixels, int64_t channels, float *__restrict means,
               float *__restrict squares) {
    const T *__restrict first = x;
    std::memset(means, 0, channels * sizeof *means);
    std::memset(squares, 0, channels * sizeof *squares);
    for (int64_t p = 0; p < pixels; p++, x += channels)
        for (int64_t c = 0; c < channels; c++) {
            float value = load(x[c]) - load(first[c]);
            means[c] += value;
            squares[c] += value * value;
        }
    for (int64_t c = 0; c < channels; c++) {
        float mean = means[c] / pixels;
        squares[c] -= mean * means[c];
        means[c] = mean + load(first[c]);
    }
}

template <typename T, typename U, typename Activation>
void apply(const T *__restrict x, U *__restrict y, const float *__restrict factors, const float *__restrict offsets,
           int64_t pixels, int64_t channels) {
    for (int64_t p = 0; p < pixels; p++, x += channels, y += channels)
        for (int64_t c = 0; c < channels; c++) store(y[c], Activation::of(load(x[c]) * factors[c] + offsets[c]));
}

// `parts` has room for batch·chunks·2·channels, `lines` for batch·2·channels. The chunks, of `rows` pixels, are the same
// for any number of threads, and so are the numbers.
template <typename T, typename U>
void group_norm(const T *x, U *y, float *parts, float *lines, int64_t batch, int64_t pixels, int64_t channels,
                int64_t groups, int64_t rows, const U *weight, const U *bias, double eps, int64_t activation,
                const U *scale, int64_t scale_stride, const U *shift, int64_t shift_stride, const U *added,
                int64_t added_stride, int threads) {
    const int64_t chunks = (pixels + rows - 1) / rows, width = channels / groups;
    const auto first = [=](int64_t chunk) { return chunk / chunks * pixels + chunk % chunks * rows; };
    const auto size = [=](int64_t chunk) { return chunk % chunks < chunks - 1 ? rows : pixels - (chunks - 1) * rows; };

#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < batch * chunks; i++) {
            float *means = parts + 2 * i * channels;
            summarise(x + first(i) * channels, size(i), channels, means, means + channels);
        }
#pragma omp for
        for (int64_t i = 0; i < batch * groups; i++) {
            const int64_t clip = i / groups, start = i % groups * width, end = start + width;
            const auto more = [=](int64_t c) { return added ? load(added[clip * added_stride + c]) : 0; };
            double mean = 0, square = 0;
            for (int64_t chunk = clip * chunks; chunk < (clip + 1) * chunks; chunk++)
                for (int64_t c = start; c < end; c++)
                    mean += (double(parts[2 * chunk * channels + c]) + more(c)) * size(chunk) / (pixels * width);
            for (int64_t chunk = clip * chunks; chunk < (clip + 1) * chunks; chunk++)
                for (int64_t c = start; c < end; c++) {
                    double apart = parts[2 * chunk * channels + c] + more(c) - mean;
                    square += parts[(2 * chunk + 1) * channels + c] + size(chunk) * apart * apart;
                }
            const double inverse = 1 / std::sqrt((square > 0 ? square : 0) / (pixels * width) + eps);
            float *factors = lines + 2 * clip * channels, *offsets = factors + channels;
            for (int64_t c = start; c < end; c++) {
                double factor = inverse * load(weight[c]), offset = (more(c) - mean) * factor + load(bias[c]);
                if (scale) {
                    double by = 1 + load(scale[clip * scale_stride + c]);
                    factor *= by;
                    offset = offset * by + load(shift[clip * shift_stride + c]);
                }
                factors[c] = float(factor);
                offsets[c] = float(offset);
            }
        }
#pragma omp for
        for (int64_t i = 0; i < batch * chunks; i++) {
            const T *from = x + first(i) * channels;
            U *to = y + first(i) * channels;
            const float *factors = lines + 2 * (i / chunks) * channels, *offsets = factors + channels;
            switch (activation) {
                case 1: apply<T, U, SiLU>(from, to, factors, offsets, size(i), channels); break;
                case 2: apply<T, U, GELU>(from, to, factors, offsets, size(i), channels); break;
                default: apply<T, U, Identity>(from, to, factors, offsets, size(i), channels);
            }
        }
    }
}

template <typename T>
void gated_gelu(const T *x, T *y, int64_t rows, int64_t features, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T *__restrict values = x + 2 * row * features, *__restrict gates = values + features;
        T *__restrict to = y + row * features;
        for (int64_t i = 0; i < features; i++) store(to[i], load(values[i]) * GELU::of(load(gates[i])));
    }
}

// Strides are those of sequences and frames; the heads' features lie side by side. A sequence is turned about to
// (frames, features, heads) first, so that all heads are computed at once.
template <typename T>
void short_attention(const T *q, int64_t q_sequence, int64_t q_frame, const T *k, int64_t k_sequence, int64_t k_frame,
                     const T *v, int64_t v_sequence, int64_t v_frame, T *y, int64_t sequences, int64_t frames,
                     int64_t heads, int64_t features, int threads) {
    const int64_t channels = heads * features;
    const float root = 1 / std::sqrt(float(features));
    const auto turn = [=](const T *from, int64_t stride, float *__restrict to) {
        for (int64_t i = 0; i < frames; i++)
            for (int64_t e = 0; e < features; e++)
                for (int64_t h = 0; h < heads; h++)
                    to[i * channels + e * heads + h] = load(from[i * stride + h * features + e]);
    };

#pragma omp parallel num_threads(threads)
    {
        std::vector<float> space(3 * frames * channels + channels + (frames + 2) * heads);
        float *queries = space.data(), *keys = queries + frames * channels, *values = keys + frames * channels;
        float *__restrict change = values + frames * channels, *__restrict weights = change + channels;
        float *__restrict most = weights + frames * heads, *__restrict total = most + heads;
#pragma omp for
        for (int64_t s = 0; s < sequences; s++) {
            turn(q + s * q_sequence, q_frame, queries);
            turn(k + s * k_sequence, k_frame, keys);
            turn(v + s * v_sequence, v_frame, values);
            for (int64_t i = 0; i < frames; i++) {
                const float *__restrict query = queries + i * channels;
                std::memset(weights, 0, frames * heads * sizeof *weights);
                std::memset(change, 0, channels * sizeof *change);
                std::memset(total, 0, heads * sizeof *total);
                for (int64_t j = 0; j < frames; j++) {
                    for (int64_t e = 0; e < features; e++)
                        for (int64_t h = 0; h < heads; h++)
                            weights[j * heads + h] += query[e * heads + h] * keys[j * channels + e * heads + h];
                    for (int64_t h = 0; h < heads; h++)
                        most[h] = j && weights[j * heads + h] < most[h] ? most[h] : weights[j * heads + h];
                }
                for (int64_t j = 0; j < frames; j++)
                    for (int64_t h = 0; h < heads; h++) {
                        float less = root * (weights[j * heads + h] - most[h]);
                        weights[j * heads + h] = exponential(less) + 0 * less;  // NaN stays NaN
                        total[h] += weights[j * heads + h];
                    }
                for (int64_t j = 0; j < frames; j++)
                    for (int64_t e = 0; e < features; e++)
                        for (int64_t h = 0; h < heads; h++)
                            change[e * heads + h] += weights[j * heads + h] * values[j * channels + e * heads + h];
                for (int64_t h = 0; h < heads; h++)
                    for (int64_t e = 0; e < features; e++)
                        store(y[(s * frames + i) * channels + h * features + e], change[e * heads + h] / total[h]);
            }
        }
    }
}

}  // namespace

#define GROUP_NORM(name, T, U)                                                                                         \
    extern "C" void name(const T *x, U *y, float *parts, float *lines, int64_t batch, int64_t pixels,                  \
                         int64_t channels, int64_t groups, int64_t rows, const U *weight, const U *bias, double eps,   \
                         int64_t activation, const U *scale, int64_t scale_stride, const U *shift,                     \
                         int64_t shift_stride, const U *added, int64_t added_stride, int threads) {                    \
        group_norm(x, y, parts, lines, batch, pixels, channels, groups, rows, weight, bias, eps, activation, scale,    \
                   scale_stride, shift, shift_stride, added, added_stride, threads);                                   \
    }
#define GATED_GELU(name, T)                                                                                            \
    extern "C" void name(const T *x, T *y, int64_t rows, int64_t features, int threads) {                              \
        gated_gelu(x, y, rows, features, threads);                                                                     \
    }
#define SHORT_ATTENTION(name, T)                                                                                       \
    extern "C" void name(const T *q, int64_t q_sequence, int64_t q_frame, const T *k, int64_t k_sequence,              \
                         int64_t k_frame, const T *v, int64_t v_sequence, int64_t v_frame, T *y, int64_t sequences,    \
                         int64_t frames, int64_t heads, int64_t features, int threads) {                               \
        short_attention(q, q_sequence, q_frame, k, k_sequence, k_frame, v, v_sequence, v_frame, y, sequences, frames,  \
                        heads, features, threads);                                                                     \
    }

GROUP_NORM(group_norm_float32_float32, float, float)
GROUP_NORM(group_norm_float32_bfloat16, float, bfloat16)
GROUP_NORM(group_norm_bfloat16_bfloat16, bfloat16, bfloat16)
GATED_GELU(gated_gelu_float32, float)
GATED_GELU(gated_gelu_bfloat16, bfloat16)
SHORT_ATTENTION(short_attention_float32, float)
SHORT_ATTENTION(short_attention_bfloat16, bfloat16)
