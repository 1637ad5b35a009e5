// Elementary functions on vectors. The coefficients are minimax fits with float32 coefficients.
#pragma once

#include "vec.h"

namespace stepfuse {

// c[0] + c[1] x + ... + c[N-1] x^(N-1)
template <int N>
STEPFUSE_INLINE F polynomial(const float (&c)[N], F x) {
  F p = broadcast(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = fma(p, x, broadcast(c[i]));
  return p;
}

// 2^t for -126 <= t <= 127: within 1e-7 relative, or 8e-5 where `coarse`.
template <bool coarse>
STEPFUSE_INLINE F exp2(F t) {
  if constexpr (coarse && kFloorReduction) {
    constexpr float c[] = {0.999925196f, 0.695833743f, 0.226066723f, 0.0780247822f};
    return scale_by_power(polynomial(c, fraction(t)), t);
  } else if constexpr (coarse) {
    constexpr float c[] = {0.999928057f, 0.693260968f, 0.242611215f, 0.0551717654f};
    return scale_by_power(polynomial(c, fraction(t)), t);
  } else if constexpr (kFloorReduction) {
    constexpr float c[] = {0.99999994f,   0.693152726f,   0.240155727f,
                           0.0558212101f, 0.00899467524f, 0.00187556923f};
    return scale_by_power(polynomial(c, fraction(t)), t);
  } else {
    constexpr float c[] = {1.0f,          0.693147004f,   0.240222469f,
                           0.0555071123f, 0.00967129413f, 0.0013269406f};
    return scale_by_power(polynomial(c, fraction(t)), t);
  }
}

// e^x; 0 or infinity beyond the range of float32, NaN for NaN.
STEPFUSE_INLINE F exp(F x) {
  const F t = min(broadcast(128.0f), x * 1.44269504f);
  const F in_range = max(broadcast(-126.0f), min(broadcast(127.0f), t));
  const F e = exp2<false>(in_range);
  const F large = t >= 128.0f ? broadcast(__builtin_inff()) : e;
  return t < -126.0f ? F{} : large;
}

#if defined(STEPFUSE_AVX512)

// 2^(i / 32)
alignas(64) constexpr float kRoots[32] = {
    1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f,
    1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f,
    1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f,
    1.57598085f, 1.61049033f, 1.64575548f, 1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f,
    1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};

// 2^t within 2e-7 relative, 0 or infinity beyond the range; t finite or NaN. Two table registers
// leave a polynomial of degree 2 on |f| <= 1/64: fewer instructions than exp2 of degree 5.
STEPFUSE_INLINE F exp2_by_table(F t) {
  // the last bit of 1.5 2^18 is worth 1/32: the sum holds round(32 t) in its low bits
  const F shifted = t + 0x1.8p18f, steps = shifted - 0x1.8p18f, f = t - steps;
  const F root =
      _mm512_permutex2var_ps(load(kRoots, Full{}), (__m512i)shifted, load(kRoots + W, Full{}));
  const F slope = fma(f, broadcast(0.240228832f), broadcast(0.693157315f));
  return scale_by_power(fma(root * f, slope, root), steps);
}

#endif

// y sigmoid(y) = y / (1 + 2^t) with t = -y log2(e); for |t| > 126 the quotient is as good as 0 or
// y.
template <bool coarse>
STEPFUSE_INLINE F silu(F y) {
  F t = y * -1.44269504f;
#if defined(STEPFUSE_AVX512)
  if constexpr (!coarse) return y / (exp2_by_table(t) + 1.0f);
#else
  t = max(broadcast(-126.0f), min(broadcast(126.0f), t));
#endif
  return y / (exp2<coarse>(t) + 1.0f);
}

// sigmoid(y) within 2e-7.
STEPFUSE_INLINE F sigmoid(F y) {
  const F t = max(broadcast(-126.0f), min(broadcast(126.0f), y * -1.44269504f));
  return 1.0f / (exp2<false>(t) + 1.0f);
}

// -2 ln u for u in (0, 1], of full relative accuracy up to u = 1.
//   u = 2^e (1 + f), 3/4 <= 1 + f < 3/2;   ln(1 + f) = f - f^2/2 + f^3 P(f)
STEPFUSE_INLINE F minus_two_log(F u) {
  constexpr float p[] = {0.333334506f, -0.250001043f, 0.199908212f, -0.166469872f,
                         0.144782528f, -0.131639972f, 0.104697376f, -0.0451212041f};
  constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // e ln2_high is exact
  const I exponent = ((I)u - 0x3f400000) >> 23;
  const F f = (F)((I)u - (exponent << 23)) - 1.0f;
  const F e = from_int(exponent), square = f * f;
  F tail = fma(polynomial(p, f), f * square, e * ln2_low);
  tail = fma(square, broadcast(-0.5f), tail);
  return fma(e, broadcast(ln2_high), f + tail) * -2.0f;
}

struct SinCos {
  F sin, cos;
};

// sin(pi v) and cos(pi v) for -1 <= v <= 1.
//   v = q/2 + r, |r| <= 1/4;   q turns by quarters: swap where odd, signs from its second bit
STEPFUSE_INLINE SinCos sincospi(F v) {
  constexpr float s[] = {-8.74227801e-8f, -5.16770887f, 2.54979467f, -0.589276493f};
  constexpr float c[] = {-4.93480206f, 4.05869675f, -1.33475816f, 0.228988484f};
  const F quarter = round_even(v + v);
  const I q = to_int(quarter);
  const F r = fma(quarter, broadcast(-0.5f), v), square = r * r;
  const F sine = fma(r, broadcast(3.14159274f), r * polynomial(s, square));
  const F cosine = fma(square, polynomial(c, square), broadcast(1.0f));
  const I odd = (q & 1) != 0;
  const U sine_sign = ((U)q & 2u) << 30, cosine_sign = ((U)(q + 1) & 2u) << 30;
  return {(F)((U)(odd ? cosine : sine) ^ sine_sign), (F)((U)(odd ? sine : cosine) ^ cosine_sign)};
}

}  // namespace stepfuse
