// Runs the CPU kernels over every search strategy, layout, element type, index type and instruction set, in heap
// buffers of exact size, and compares them with `nearest_code`. Meant for builds with AddressSanitizer and
// UndefinedBehaviorSanitizer (-DQLAE_SANITIZE=ON); prints the first case that differs and exits with 1.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/buffer_pool.h"
#include "../../csrc/latent_quantize_cpu.h"

namespace {

using namespace qlae;

struct Half {
  uint16_t bits;
};
struct BHalf {
  uint16_t bits;
};

double widen(double value) { return value; }
float widen(float value) { return value; }
float widen(BHalf value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
float widen(Half value) {
  const int exponent = (value.bits >> 10) & 31, mantissa = value.bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), std::max(exponent, 1) - 25);
  if (exponent == 31) {
    magnitude = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  }
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

template <class E>
struct Traits;
template <>
struct Traits<float> {
  using Bits = uint32_t;
  static constexpr Bits kInfinity = 0x7f800000;
  static constexpr ValueType kType = ValueType::kFloat32;
  static constexpr double kEpsilon = 0x1p-23, kSmallest = 0x1p-149, kLargest = 0x1p127;
};
template <>
struct Traits<double> {
  using Bits = uint64_t;
  static constexpr Bits kInfinity = 0x7ff0000000000000;
  static constexpr ValueType kType = ValueType::kFloat64;
  static constexpr double kEpsilon = 0x1p-52, kSmallest = 0x1p-1074, kLargest = 0x1p1023;
};
template <>
struct Traits<Half> {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7c00;
  static constexpr ValueType kType = ValueType::kFloat16;
  static constexpr double kEpsilon = 0x1p-10, kSmallest = 0x1p-24, kLargest = 0x1p15;
};
template <>
struct Traits<BHalf> {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7f80;
  static constexpr ValueType kType = ValueType::kBFloat16;
  static constexpr double kEpsilon = 0x1p-7, kSmallest = 0x1p-133, kLargest = 0x1p127;
};

template <class E>
using Compute = decltype(widen(E{}));

// A heap block that ends where its last element ends; `shift` elements off the alignment of a vector.
template <class E>
class Buffer {
 public:
  Buffer(int64_t count, int64_t shift)
      : base_(static_cast<std::byte*>(::operator new((count + shift) * sizeof(E), std::align_val_t{64}))),
        data_(reinterpret_cast<E*>(base_) + shift) {
    // No result of a call looks like this.
    std::memset(static_cast<void*>(data_), 0xA5, count * sizeof(E));
  }
  ~Buffer() { ::operator delete(base_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  E* data() { return data_; }
  E& operator[](int64_t position) { return data_[position]; }

 private:
  std::byte* base_;
  E* data_;
};

enum class Codes { kEven, kUnsorted, kClustered, kHostile, kUlps, kEqual };
constexpr Codes kAllCodes[] = {Codes::kEven,    Codes::kUnsorted, Codes::kClustered,
                               Codes::kHostile, Codes::kUlps,     Codes::kEqual};

struct Case {
  LatentLayout layout;
  int64_t stride;
  Codes codes;
  bool shared;
  bool ragged;
  bool hostile_z;
  IndexType index_type;
  int64_t shift;
  int threads;
  // Sort the codebook of small inputs too.
  bool sort;
};

std::mt19937_64 generator(20240229);

int64_t below(int64_t limit) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(limit)); }

double uniform() { return static_cast<double>(generator() >> 11) * 0x1p-53; }

// A finite number of E near `value`; E's own rounding is of no interest here.
template <class E>
E element(double value) {
  if constexpr (sizeof(E) > 2) {
    return static_cast<E>(value);
  } else if constexpr (std::is_same_v<E, BHalf>) {
    return {static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16)};
  } else {
    uint16_t bits = 0;
    for (int step = 1 << 14; step; step >>= 1) {
      const uint16_t larger = static_cast<uint16_t>(bits + step);
      if (larger < 0x7c00 && widen(Half{larger}) <= std::abs(value)) bits = larger;
    }
    return {static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0))};
  }
}

template <class E>
E any_bits() {
  return std::bit_cast<E>(static_cast<typename Traits<E>::Bits>(generator()));
}

// `beyond` 0: the largest finite number of E; 1: infinity.
template <class E>
E widest(bool negative, int beyond) {
  using Bits = typename Traits<E>::Bits;
  const Bits sign = negative ? static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1)) : Bits{0};
  return std::bit_cast<E>(static_cast<Bits>(sign | static_cast<Bits>(Traits<E>::kInfinity - 1 + beyond)));
}

template <class E>
E code_of(Codes codes, int64_t k, int64_t count) {
  switch (codes) {
    case Codes::kEven: return element<E>(count > 1 ? static_cast<double>(k) / static_cast<double>(count - 1) - 0.5 : 0);
    case Codes::kUnsorted: return element<E>(static_cast<double>(below(2 * count)) / static_cast<double>(count) - 1);
    // All boundaries but one in one cell, and one far away.
    case Codes::kClustered:
      return element<E>(k + 1 < count ? 0.05 * static_cast<double>(k) / static_cast<double>(count) : 60.0);
    case Codes::kHostile: return any_bits<E>();
    case Codes::kUlps: return element<E>(k + 1 < count ? 1 + Traits<E>::kEpsilon * static_cast<double>(k) : 100.0);
    case Codes::kEqual: return element<E>(0.25);
  }
  return {};
}

template <class E>
void fill_z(const Case& c, const std::vector<E>& codes, Buffer<E>& z) {
  const int64_t size = c.layout.size();
  for (int64_t position = 0; position < size; ++position) {
    const E first = codes[below(static_cast<int64_t>(codes.size()))];
    const E second = codes[below(static_cast<int64_t>(codes.size()))];
    const double middle = 0.5 * static_cast<double>(widen(first)) + 0.5 * static_cast<double>(widen(second));
    switch (below(4)) {
      case 0: z[position] = first; break;
      case 1: z[position] = element<E>(std::isfinite(middle) && std::abs(middle) < 1e4 ? middle : 0.0); break;
      default: z[position] = element<E>(1.4 * uniform() - 0.7); break;
    }
    if (!c.hostile_z) continue;
    switch (below(32)) {
      case 0: z[position] = widest<E>(below(2) == 0, 0); break;
      case 1: z[position] = widest<E>(below(2) == 0, 1); break;
      case 2: z[position] = element<E>(below(2) == 0 ? -40.0 : 40.0); break;
      case 3: z[position] = any_bits<E>(); break;
    }
  }
}

int64_t read_index(const void* indices, IndexType type, int64_t position) {
  switch (type) {
    case IndexType::kUInt8: return static_cast<const uint8_t*>(indices)[position];
    case IndexType::kInt16: return static_cast<const int16_t*>(indices)[position];
    case IndexType::kInt32: return static_cast<const int32_t*>(indices)[position];
    case IndexType::kInt64: return static_cast<const int64_t*>(indices)[position];
  }
  return -1;
}

int64_t index_bytes(IndexType type) { return int64_t{1} << static_cast<int>(type); }

[[noreturn]] void fail(const Case& c, ValueType type, const std::string& what, int64_t position) {
  std::printf(
      "FAILED %s: %s at %lld; type %d, layout %lld x %lld x %lld, stride %lld, codes %d, shared %d, ragged %d, "
      "hostile z %d, index type %d, shift %lld, threads %d, sort %d\n",
      active_instruction_set().c_str(), what.c_str(), static_cast<long long>(position), static_cast<int>(type),
      static_cast<long long>(c.layout.outer), static_cast<long long>(c.layout.num_latents),
      static_cast<long long>(c.layout.inner), static_cast<long long>(c.stride), static_cast<int>(c.codes), c.shared,
      c.ragged, c.hostile_z, static_cast<int>(c.index_type), static_cast<long long>(c.shift), c.threads, c.sort);
  std::exit(1);
}

// Whether `got` lies within `bound` of `want`; where `want` is no number of the type, neither may `got` be one.
bool near(double got, double want, double bound, double largest) {
  if (!std::isfinite(want)) return !std::isfinite(got);
  return std::abs(want) > largest || std::abs(got - want) <= bound;
}

template <class E>
void run_case(const Case& c) {
  using T = Compute<E>;
  const int64_t size = c.layout.size(), rows = c.shared ? 1 : c.layout.num_latents;
  std::vector<int64_t> levels(rows, c.stride);
  std::vector<E> code_elements(rows * c.stride);
  Buffer<T> codes(rows * c.stride, c.shift);
  for (int64_t row = 0; row < rows; ++row) {
    if (c.ragged) levels[row] = 1 + below(c.stride);
    for (int64_t k = 0; k < c.stride; ++k) {
      const bool padding = k >= levels[row];
      code_elements[row * c.stride + k] = padding ? any_bits<E>() : code_of<E>(c.codes, k, levels[row]);
      codes[row * c.stride + k] = widen(code_elements[row * c.stride + k]);
    }
  }
  Buffer<E> z(size, c.shift), grad_quantized(size, c.shift);
  fill_z(c, code_elements, z);
  std::vector<int64_t> expected(size);
  std::vector<double> residual(size), sums(rows * c.stride), magnitudes(rows * c.stride), counts(rows * c.stride);
  for (int64_t position = 0; position < size; ++position) {
    const int64_t row = c.shared ? 0 : position / c.layout.inner % c.layout.num_latents;
    const T value = widen(z[position]);
    expected[position] = nearest_code(value, codes.data() + row * c.stride, levels[row]);
    const int64_t code = row * c.stride + expected[position];
    residual[position] = std::isfinite(value) ? value - codes[code] : std::numeric_limits<T>::quiet_NaN();
    sums[code] += residual[position];
    magnitudes[code] += std::abs(residual[position]);
    counts[code] += 1;
    grad_quantized[position] = element<E>(uniform() - 0.5);
  }
  set_min_samples_to_sort(c.sort ? 0 : int64_t{512});
  const CodebookView view{codes.data(), rows, c.stride, c.ragged ? levels.data() : nullptr};
  const T grad_loss = 3;
  const double quantization_weight = 0.75, commitment_weight = 0.5, epsilon = std::numeric_limits<T>::epsilon();
  const double scale = 2.0 * static_cast<double>(grad_loss) / static_cast<double>(std::max<int64_t>(1, size));

  for (const std::string& name : instruction_sets()) {
    use_instruction_set(name);
    const ValueType type = Traits<E>::kType;
    Buffer<E> quantized(size, c.shift), grad_z(size, c.shift);
    Buffer<std::byte> indices(size * index_bytes(c.index_type), c.shift * index_bytes(c.index_type));
    Buffer<T> loss(1, 0), grad_codebook(rows * c.stride, c.shift);
    latent_quantize_forward({type, c.layout, view, z.data(), quantized.data(), indices.data(), c.index_type,
                             loss.data(), quantization_weight + commitment_weight, c.threads});
    for (int64_t position = 0; position < size; ++position) {
      if (read_index(indices.data(), c.index_type, position) != expected[position]) fail(c, type, "index", position);
      const int64_t row = c.shared ? 0 : position / c.layout.inner % c.layout.num_latents;
      const E want = code_elements[row * c.stride + expected[position]], got = quantized[position];
      const bool missing = !std::isfinite(widen(z[position])) || std::isnan(widen(want));
      if (missing ? !std::isnan(widen(got)) : std::memcmp(&want, &got, sizeof(E)) != 0)
        fail(c, type, "quantized", position);
    }

    const bool with_grad_quantized = c.threads == 2 || !c.shared;
    latent_quantize_backward({type, c.layout, view, z.data(), with_grad_quantized ? grad_quantized.data() : nullptr,
                              &grad_loss, grad_z.data(), grad_codebook.data(), quantization_weight, commitment_weight,
                              c.threads});
    for (int64_t position = 0; position < size; ++position) {
      const double from_loss = scale * commitment_weight * residual[position];
      const double want = from_loss + (with_grad_quantized ? widen(grad_quantized[position]) : 0.0);
      // Three roundings in the product, one in the sum, one on the way to E, each of half a unit.
      const double bound =
          2 * epsilon * std::abs(from_loss) + (epsilon + Traits<E>::kEpsilon) * std::abs(want) + Traits<E>::kSmallest;
      if (!near(widen(grad_z[position]), want, bound, Traits<E>::kLargest)) fail(c, type, "grad z", position);
    }
    for (int64_t code = 0; code < rows * c.stride; ++code) {
      const double want = -scale * quantization_weight * sums[code];
      const double bound = (counts[code] + 4) * epsilon * scale * quantization_weight * magnitudes[code] +
                           static_cast<double>(std::numeric_limits<T>::denorm_min());
      const bool overflows = magnitudes[code] > static_cast<double>(std::numeric_limits<T>::max());
      if (!overflows && !near(grad_codebook[code], want, bound, std::numeric_limits<T>::max()))
        fail(c, type, "grad codebook", code);
    }
    // Every output may be absent.
    latent_quantize_forward({type, c.layout, view, z.data(), nullptr, nullptr, c.index_type, nullptr, 1.0, c.threads});
    latent_quantize_backward(
        {type, c.layout, view, z.data(), nullptr, &grad_loss, nullptr, grad_codebook.data(), 1.0, 1.0, c.threads});
    latent_quantize_backward(
        {type, c.layout, view, z.data(), nullptr, &grad_loss, grad_z.data(), nullptr, 1.0, 1.0, c.threads});
  }
}

template <class E>
void run_type() {
  // Few and many samples per latent; short, long and partial periods; runs shorter and longer than a unit.
  const LatentLayout layouts[] = {{1, 1, 1},    {0, 3, 1},    {3, 5, 1},   {37, 12, 1},   {130, 1, 1},
                                  {601, 12, 1}, {130, 7, 5},  {9, 130, 1}, {513, 129, 1}, {3, 2, 401},
                                  {1, 3, 701},  {2, 3, 4099}, {1, 33, 63}, {1, 300, 65}};
  const int64_t strides[] = {1, 2, 3, 8, 16, 40, 64, 100, 257};
  int number = 0;
  for (const LatentLayout& layout : layouts) {
    for (const int64_t stride : strides) {
      const int repeats = layout.size() < 10000 ? 2 : stride <= 40 || stride == 100 ? 1 : 0;
      for (int repeat = 0; repeat < repeats; ++repeat, ++number) {
        const int first_type = stride > 256 ? 1 : 0;
        run_case<E>({layout, stride, kAllCodes[number % std::size(kAllCodes)], number % 5 == 1, number % 3 == 1,
                     number % 2 == 0, static_cast<IndexType>(std::max(first_type, number / 2 % 4)), number / 3 % 2,
                     1 + number % 2, number % 4 != 3});
      }
    }
  }
  // Tables that leave the small workspace, so that a read beyond one of them shows.
  for (const Codes codes : {Codes::kUnsorted, Codes::kClustered, Codes::kHostile})
    run_case<E>({{520, 32, 1}, 600, codes, false, codes == Codes::kUnsorted, true, IndexType::kInt16, 0, 1, true});
  // Latents in groups: of columns, of columns of several elements of a latent, and of runs.
  for (const Codes codes : {Codes::kUnsorted, Codes::kEven, Codes::kUlps}) {
    run_case<E>({{100, 160, 1}, 1000, codes, false, codes == Codes::kEven, true, IndexType::kInt16, 0, 2, true});
    run_case<E>({{40, 70, 3}, 1000, codes, false, false, true, IndexType::kInt32, 0, 1, true});
    run_case<E>({{2, 60, 67}, 1000, codes, false, false, true, IndexType::kInt64, 1, 2, true});
  }
  run_case<E>({{30, 1030, 1}, 16, Codes::kUnsorted, false, true, true, IndexType::kInt16, 0, 2, true});
  run_case<E>({{600, 1030, 1}, 12, Codes::kUnsorted, false, false, true, IndexType::kInt16, 0, 2, true});
  // Groups with so many samples that threads divide these, not the groups.
  run_case<E>({{6000, 72, 1}, 600, Codes::kUnsorted, false, false, true, IndexType::kInt16, 0, 2, true});
  // Outputs large enough for non-temporal stores, with and without whole vectors.
  const int64_t large = (int64_t{4} << 20) / static_cast<int64_t>(sizeof(E)) + 640;
  run_case<E>({{large / 32, 32, 1}, 3, Codes::kUnsorted, false, false, false, IndexType::kUInt8, 0, 2, true});
  run_case<E>({{1, 2, large / 2}, 3, Codes::kUnsorted, false, true, true, IndexType::kInt64, 0, 2, true});
}

// Blocks are writable to the end, come back to the next request of their size, and are freed as they were allocated.
void run_pool() {
  BufferPool& pool = BufferPool::instance();
  // The kernels' own tables are kept there too.
  pool.set_max_idle_bytes(0);
  pool.set_max_idle_bytes(1 << 30);
  for (const int64_t bytes :
       {int64_t{1}, int64_t{300} << 10, (int64_t{2} << 20) - 1, int64_t{2} << 20, int64_t{3} << 20}) {
    const BufferPool::Block block = pool.acquire(bytes);
    std::memset(block.memory, 1, block.capacity);
    pool.release(block);
    const BufferPool::Block again = pool.acquire(bytes);
    if (block.capacity < bytes || again.memory != block.memory || pool.idle_bytes() != 0) {
      std::printf("FAILED pool: %lld bytes\n", static_cast<long long>(bytes));
      std::exit(1);
    }
    pool.release(again);
    pool.set_max_idle_bytes(0);
    pool.set_max_idle_bytes(1 << 30);
  }
}

}  // namespace

int main() {
  // Sorting searches with little data.
  set_min_samples_to_sort(64);
  run_type<float>();
  run_type<double>();
  run_type<Half>();
  run_type<BHalf>();
  run_pool();
  std::string names;
  for (const std::string& name : instruction_sets()) names += " " + name;
  std::printf("passed:%s\n", names.c_str());
}
