// Runs the CUDA kernels of float32 on the CPU over every kind of plan, search and bins, in heap buffers of exact size,
// and compares them with `nearest_code` and plain sums. Meant for builds with a sanitizer: ThreadSanitizer shows a
// missing barrier, AddressSanitizer an access out of bounds. Prints the first case that differs and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/latent_quantize_cuda_kernels.h"

namespace qlae::cuda {

// The launcher refers to every value type; this program has the kernels of one.
const Kernels kFloat64Kernels = kFloat32Kernels;
const Kernels kFloat16Kernels = kFloat32Kernels;
const Kernels kBFloat16Kernels = kFloat32Kernels;

namespace {

constexpr double kQuantizationWeight = 0.75, kCommitmentWeight = 0.25;
constexpr float kGradLoss = 3;

struct Case {
  LatentLayout layout;
  int64_t num_codes;
  bool shared;
  bool ragged;
  int64_t shift;  // elements off the alignment of a vector
  SearchChoice search;
  BinsChoice bins;
};

// A heap block that ends where its last element ends.
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, int64_t shift, T value)
      : base_(static_cast<T*>(std::aligned_alloc(16, (count + shift) * sizeof(T) + padding(count + shift)))),
        data_(base_ + shift) {
    std::fill_n(data_, count, value);
  }
  ~Buffer() { std::free(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t position) { return data_[position]; }

 private:
  // aligned_alloc wants a multiple of the alignment.
  static int64_t padding(int64_t count) { return (16 - count * static_cast<int64_t>(sizeof(T)) % 16) % 16; }

  T* base_;
  T* data_;
};

std::mt19937_64 generator(20240301);

float uniform() { return static_cast<float>(generator() >> 40) * 0x1p-23f - 1; }

[[noreturn]] void fail(const Case& c, const char* what, int64_t position) {
  std::printf(
      "%s differs at %lld: %lld x %lld x %lld, %lld codes, shared %d, ragged %d, shift %lld, search %d, bins %d\n",
      what, static_cast<long long>(position), static_cast<long long>(c.layout.outer),
      static_cast<long long>(c.layout.num_latents), static_cast<long long>(c.layout.inner),
      static_cast<long long>(c.num_codes), c.shared, c.ragged, static_cast<long long>(c.shift),
      static_cast<int>(c.search), static_cast<int>(c.bins));
  std::exit(1);
}

void run(const Case& c) {
  const int64_t size = c.layout.size(), rows = c.shared ? 1 : c.layout.num_latents;
  std::vector<int64_t> levels(rows, c.num_codes);
  for (int64_t row = 0; c.ragged && row < rows; ++row) levels[row] = 1 + (row * 7 + 2) % c.num_codes;
  Buffer<float> codebook(rows * c.num_codes, 0, 0), z(size, c.shift, 0), grad(size, c.shift, 0);
  for (int64_t entry = 0; entry < rows * c.num_codes; ++entry) codebook[entry] = uniform();
  for (int64_t position = 0; position < size; ++position) z[position] = uniform(), grad[position] = uniform();

  set_choices(c.search, c.bins);
  const Launcher launcher({.value_type = ValueType::kFloat32,
                           .index_type = IndexType::kInt32,
                           .layout = c.layout,
                           .codebook = {nullptr, rows, c.num_codes, c.ragged ? levels.data() : nullptr},
                           .max_codes = *std::max_element(levels.begin(), levels.end()),
                           .quantization_weight = kQuantizationWeight,
                           .commitment_weight = kCommitmentWeight,
                           .device = 0});
  Buffer<float> quantized(size, c.shift, NAN), grad_z(size, c.shift, NAN), loss(1, 0, NAN), grad_loss(1, 0, kGradLoss);
  Buffer<float> grad_codebook(rows * c.num_codes, 0, NAN);
  Buffer<int32_t> indices(size, c.shift, -1);
  const int64_t bytes = std::max(launcher.forward_workspace_bytes(), launcher.backward_workspace_bytes());
  Buffer<unsigned char> workspace(bytes, 0, 0xA5);
  const int64_t num_counters = std::max(launcher.forward_counters(), launcher.backward_counters());
  Buffer<uint32_t> counters(num_counters, 0, 0);
  launcher.forward(
      {codebook.data(), z.data(), quantized.data(), indices.data(), loss.data(), workspace.data(), counters.data()},
      nullptr);
  launcher.backward({codebook.data(), z.data(), grad.data(), grad_loss.data(), grad_z.data(), grad_codebook.data(),
                     workspace.data(), counters.data()},
                    nullptr);

  const double scale = 2.0 * kGradLoss / static_cast<double>(size);
  double squares = 0;
  std::vector<double> sums(rows * c.num_codes, 0);
  for (int64_t position = 0; position < size; ++position) {
    const int64_t row = c.shared ? 0 : position / c.layout.inner % c.layout.num_latents;
    const float* codes = codebook.data() + row * c.num_codes;
    const int64_t index = nearest_code(z[position], codes, levels[row]);
    const double residual = static_cast<double>(z[position]) - codes[index];
    if (indices[position] != index || quantized[position] != codes[index]) fail(c, "an index", position);
    const double want = grad[position] + scale * kCommitmentWeight * residual;
    if (!(std::abs(grad_z[position] - want) < 1e-6)) fail(c, "the gradient of z", position);
    squares += residual * residual;
    sums[row * c.num_codes + index] -= scale * kQuantizationWeight * residual;
  }
  const double want = squares / static_cast<double>(size);
  if (!(std::abs(loss[0] - want) < 1e-5 * (want + 1))) fail(c, "the loss", 0);
  for (int64_t entry = 0; entry < rows * c.num_codes; ++entry) {
    if (!(std::abs(grad_codebook[entry] - sums[entry]) < 1e-5)) fail(c, "the codebook's gradient", entry);
  }
  for (int64_t counter = 0; counter < num_counters; ++counter) {
    if (counters[counter]) fail(c, "a counter", counter);
  }
}

}  // namespace
}  // namespace qlae::cuda

int main() {
  using namespace qlae::cuda;
  // One block and several, windows, runs, many latents, and codes for every search.
  const Case cases[] = {
      {{1, 1, 1}, 3, false, false, 0, {}, {}},       {{128, 12, 1}, 10, false, false, 0, {}, {}},
      {{300, 12, 1}, 10, false, false, 1, {}, {}},   {{20, 130, 1}, 4, false, false, 0, {}, {}},
      {{4, 3, 11 * 13}, 10, false, true, 0, {}, {}}, {{3, 2, 500}, 30, false, false, 0, {}, {}},
      {{37, 6, 5}, 7, false, false, 3, {}, {}},      {{2000, 1, 1}, 10, true, false, 0, {}, {}},
      {{200, 5, 1}, 100, true, false, 0, {}, {}},    {{3, 400, 1}, 3, false, false, 0, {}, {}},
      {{100, 4, 1}, 1000, false, true, 0, {}, {}},   {{100, 2, 1}, 4096, false, false, 0, {}, {}},
  };
  const std::pair<SearchChoice, BinsChoice> choices[] = {
      {SearchChoice::kAuto, BinsChoice::kAuto},     {SearchChoice::kDirect, BinsChoice::kThread},
      {SearchChoice::kSorted, BinsChoice::kThread}, {SearchChoice::kSorted, BinsChoice::kWarp},
      {SearchChoice::kGlobal, BinsChoice::kAuto},
  };
  for (Case c : cases) {
    for (const auto& [search, bins] : choices) {
      c.search = search;
      c.bins = bins;
      run(c);
    }
  }
  std::puts("passed");
}
