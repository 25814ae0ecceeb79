// The codes of one latent in ascending order, and where their order alone decides which is nearest.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>

#include "latent_quantize_cpu_kernels.h"

namespace qlae::cpu {

// z in [low, high] belongs to one of the two codes around it; nowhere if low > high.
template <class T>
struct Range {
  T low = 1;
  T high = -1;
};

// The exact range of codes that are finite and each larger than the one before; nothing for others. Between two codes a
// third one can tie only if its gap to the nearer of them is below the spacing of distances there, which are at most
// half the gap between the two; beyond the ends, where the spacing has grown to the outermost gap.
template <class T>
std::optional<Range<T>> exact_range(const T* codes, int64_t count, Order (*order_of)(const T*, int64_t)) {
  constexpr T kLimit = FloatLimits<T>::kMax / 4, kEpsilon = FloatLimits<T>::kEpsilon;
  const T first = codes[0], last = codes[count - 1];
  if (!std::isfinite(first) || !std::isfinite(last)) return std::nullopt;
  const Order order = order_of(codes, count);
  if (order == Order::kNone) return std::nullopt;
  if (order == Order::kUneven || !(std::max(std::abs(first), std::abs(last)) <= kLimit)) return Range<T>{};
  if (count == 1) return Range<T>{-kLimit, kLimit};
  // Half of what the spacing allows, which covers the roundings here.
  const auto reach = [&](T gap) { return std::min(gap * (T(0.5) / kEpsilon), kLimit); };
  return Range<T>{first - reach(codes[1] - first), last + reach(last - codes[count - 2])};
}

// A code as an unsigned number of the same order, and its index.
template <class T>
struct CodeKey {
  typename FloatBits<T>::Unsigned order;
  int32_t index;
};

template <class T>
CodeKey<T> key_of(T code, int64_t index) {
  using Unsigned = typename FloatBits<T>::Unsigned;
  // As an addition to an unsigned number, this puts the negative ones first.
  return {static_cast<Unsigned>(to_ordered(code)) + static_cast<Unsigned>(FloatBits<T>::kSmallest),
          static_cast<int32_t>(index)};
}

// Sorts keys that come with ascending indices by order, equal ones by index; `spare` is room for as many. Returns where
// the result lies.
template <class T>
CodeKey<T>* sort_keys(CodeKey<T>* keys, CodeKey<T>* spare, int64_t count) {
  constexpr int64_t kMinToSortByDigits = 512;
  if (count < kMinToSortByDigits) {
    std::sort(keys, keys + count, [](const CodeKey<T>& a, const CodeKey<T>& b) {
      return a.order != b.order ? a.order < b.order : a.index < b.index;
    });
    return keys;
  }
  constexpr int kBits = 11, kDigits = (8 * sizeof(T) + kBits - 1) / kBits, kValues = 1 << kBits;
  const auto digit_of = [](const CodeKey<T>& key, int digit) { return (key.order >> (digit * kBits)) % kValues; };
  std::array<std::array<int64_t, kValues>, kDigits> places{};
  for (int64_t k = 0; k < count; ++k)
    for (int digit = 0; digit < kDigits; ++digit) ++places[digit][digit_of(keys[k], digit)];
  for (int digit = 0; digit < kDigits; ++digit) {
    int64_t place = 0;
    for (int64_t& first : places[digit]) place += std::exchange(first, place);
    for (int64_t k = 0; k < count; ++k) spare[places[digit][digit_of(keys[k], digit)]++] = keys[k];
    std::swap(keys, spare);
  }
  return keys;
}

// The smallest index that attains the minimum of |z - code|, for a finite z and any finite codes in ascending order:
// the rounded distance does not fall with the distance in order, so all that tie are neighbours. `indices` null means
// that each code stands at its index.
template <class T, class Index>
int64_t nearest_in_order(T z, const T* codes, const Index* indices, int64_t count) {
  const auto distance = [&](T code) { return std::abs(z - code); };
  const T* above = std::upper_bound(codes, codes + count, z);
  const T smallest = std::min(above > codes ? distance(above[-1]) : std::numeric_limits<T>::infinity(),
                              above < codes + count ? distance(*above) : std::numeric_limits<T>::infinity());
  const T* first = std::partition_point(codes, above, [&](T code) { return distance(code) > smallest; });
  if (!indices) return first - codes;
  const T* end = std::partition_point(above, codes + count, [&](T code) { return distance(code) <= smallest; });
  return *std::min_element(indices + (first - codes), indices + (end - codes));
}

}  // namespace qlae::cpu
