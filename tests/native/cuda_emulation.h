// CUDA on the CPU: with this header in place of CUDA's own, a .cu file compiles with the host compiler and its kernels
// run on the host's memory. Blocks run one after another; the threads of a block are fibers on the calling thread or,
// with QLAE_EMULATE_WITH_THREADS, real threads that synchronise exactly where CUDA's do, for ThreadSanitizer. Only what
// the kernels of this project use is here; dynamic shared memory comes from `qlae_dynamic_shared_memory()`.
// Compile with -ffp-contract=off: `__fmul_rn` and `__fadd_rn` are plain operators here.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define QLAE_EMULATION_ADDRESS_SANITIZER
#endif
#if defined(__SANITIZE_THREAD__)
#define QLAE_EMULATION_THREAD_SANITIZER
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QLAE_EMULATION_ADDRESS_SANITIZER
#endif
#if __has_feature(thread_sanitizer)
#define QLAE_EMULATION_THREAD_SANITIZER
#endif
#endif
#if defined(QLAE_EMULATION_THREAD_SANITIZER) && !defined(QLAE_EMULATE_WITH_THREADS)
#error "ThreadSanitizer needs QLAE_EMULATE_WITH_THREADS"
#endif
#if defined(QLAE_EMULATION_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(QLAE_EMULATE_WITH_UCONTEXT)
#define QLAE_EMULATE_WITH_UCONTEXT
#endif
#if defined(QLAE_EMULATE_WITH_UCONTEXT)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline thread_local constinit uint3 threadIdx{}, blockIdx{};
inline thread_local constinit dim3 blockDim{}, gridDim{};

namespace qlae_emulation {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr std::size_t kDefaultSharedBytes = 48 << 10, kReservedSharedBytes = 1 << 10;

// What the emulated device says of itself; tests set it. Not while a kernel runs.
struct Device {
  int multiprocessors = 3;
  int shared_bytes_per_block_optin = 99 << 10;
  int shared_bytes_per_multiprocessor = 100 << 10;
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
  int compute_capability_major = 9;
};
inline Device device;

// Not 0: the order of a launch's blocks, and of a block's fibers, is shuffled by this seed.
inline std::uint64_t order_seed = 0;

// Kernels that ran, for tests that count launches.
inline std::atomic<std::uint64_t> launches = 0;

// Where a thread waits.
struct Place {
  const char* what;
  unsigned mask;
  std::source_location where;

  std::string text() const {
    char lanes[32] = "";
    if (mask) std::snprintf(lanes, sizeof lanes, " (mask 0x%08x)", mask);
    return std::string(what) + lanes + " at " + where.file_name() + ":" + std::to_string(where.line());
  }
};

// What a lane brings to a collective of its warp and what it gets.
struct Slot;
using Combine = void (*)(Slot* slots, unsigned lanes);
struct Slot {
  const Place* place;
  Combine combine;
  std::uint64_t value, result;
  unsigned mask, argument, width;
  bool waiting, done;
};

template <class F>
void for_each_lane(unsigned lanes, F&& visit) {
  for (; lanes; lanes &= lanes - 1) visit(static_cast<unsigned>(std::countr_zero(lanes)));
}

struct Launch {
  dim3 grid, block;
  std::size_t shared_bytes;
  void (*body)(void*);
  void* argument;

  unsigned threads() const { return block.x * block.y * block.z; }
};

#if !defined(QLAE_EMULATE_WITH_THREADS)

#if defined(QLAE_EMULATE_WITH_UCONTEXT)
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare_context(Context& context, char* stack, std::size_t bytes, void (*enter)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}
#else
// A stack pointer, above which lie the registers that a call preserves. `swapcontext` would make a system call.
using Context = void*;
#if defined(__clang__)
[[gnu::naked, gnu::noinline]]
#else
[[gnu::naked, gnu::noipa]]  // Or the compiler would conclude which registers it leaves alone.
#endif
inline void switch_context(Context& /*rdi*/, Context& /*rsi*/) {
  __asm__ volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tpopq %rcx\n\tjmp *%rcx");
}
inline void prepare_context(Context& context, char* stack, std::size_t bytes, void (*enter)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#endif

// AddressSanitizer's frames are larger.
#if defined(QLAE_EMULATION_ADDRESS_SANITIZER)
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

// A fiber's memory, with a page below it that no thread may touch.
class Stack {
 public:
  Stack() = default;
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() {
    if (memory_) munmap(memory_, guard_bytes() + kStackBytes);
  }
  char* bottom() {
    if (!memory_) {
      void* memory = mmap(nullptr, guard_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, guard_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
    }
    return memory_ + guard_bytes();
  }

 private:
  static std::size_t guard_bytes() {
    static const std::size_t bytes = sysconf(_SC_PAGESIZE);
    return bytes;
  }

  char* memory_ = nullptr;
};

#endif

struct Thread {
  uint3 index;
  unsigned number;
  std::atomic<bool> left;
  std::atomic<const Place*> place;
#if !defined(QLAE_EMULATE_WITH_THREADS)
  Context context;
  Stack stack;
#endif
};

class Block;
inline thread_local constinit Block* current_block = nullptr;
inline thread_local constinit Thread* current_thread = nullptr;

// What both kinds of block share: shared memory, the rules of a collective, and reports.
class BlockBase {
 public:
  unsigned char* shared_memory() const { return shared_.get(); }

  [[noreturn]] void fail(const std::string& message) const {
    // One report of several threads' is enough, and it ends the process.
    static std::atomic_flag reported;
    while (reported.test_and_set()) std::this_thread::sleep_for(std::chrono::seconds(1));
    std::fprintf(stderr, "cuda_emulation: %s\n  block (%u, %u, %u)", message.c_str(), index_.x, index_.y, index_.z);
    if (current_thread) std::fprintf(stderr, ", thread %u", current_thread->number);
    std::fprintf(stderr, "\n");
    std::abort();
  }

 protected:
  void start(const Launch& launch, uint3 index) {
    launch_ = &launch;
    index_ = index;
    count_ = launch.threads();
    // Of exact size, so that AddressSanitizer sees its ends; NaN wherever nothing was written.
    shared_.reset(static_cast<unsigned char*>(::operator new(launch.shared_bytes, std::align_val_t{16})));
    std::memset(shared_.get(), 0xff, launch.shared_bytes);
    for (unsigned number = 0; number < count_; ++number) {
      Thread& thread = threads_[number];
      const unsigned row = number / launch.block.x;
      thread.number = number;
      thread.index = {number % launch.block.x, row % launch.block.y, row / launch.block.y};
      thread.left.store(false, std::memory_order_relaxed);
      thread.place.store(nullptr, std::memory_order_relaxed);
    }
    for (unsigned warp = 0; warp < warps(); ++warp)
      present_[warp].store(~0u >> (kWarp - std::min(kWarp, count_ - warp * kWarp)), std::memory_order_relaxed);
  }

  unsigned warps() const { return (count_ + kWarp - 1) / kWarp; }

  void become(Thread* thread) {
    current_thread = thread;
    threadIdx = thread->index;
  }

  // The slot of a lane that arrives, filled.
  void arrive(Slot& slot, unsigned lane, const Place& place, Combine combine, std::uint64_t value, unsigned argument,
              unsigned width) const {
    if (!(place.mask >> lane & 1)) fail(place.text() + ": the mask lacks the calling lane");
    slot = {&place, combine, value, 0, place.mask, argument, width, true, false};
  }

  // If every present lane of `mask` has arrived, gives each its result and returns them; else 0.
  unsigned complete(Slot* slots, unsigned mask, unsigned present) const {
    const unsigned lanes = mask & present;
    if (!lanes) return 0;
    // From the last lane down: it often arrives last.
    for (unsigned lane = kWarp; lane-- > 0;)
      if ((lanes >> lane & 1) && !(slots[lane].waiting && slots[lane].mask == mask)) return 0;
    const Slot& first = slots[std::countr_zero(lanes)];
    for_each_lane(lanes, [&](unsigned lane) {
      if (slots[lane].combine != first.combine || std::strcmp(slots[lane].place->what, first.place->what) != 0)
        fail("lanes of a warp meet at " + first.place->text() + " and at " + slots[lane].place->text());
    });
    if (first.combine) first.combine(slots, lanes);
    for_each_lane(lanes, [&](unsigned lane) {
      slots[lane].waiting = false;
      slots[lane].done = true;
    });
    return lanes;
  }

  void require_same(const Place& first, const Place& place) const {
    if (first.where.line() != place.where.line() || first.where.column() != place.where.column() ||
        std::strcmp(first.what, place.what) != 0 || std::strcmp(first.where.file_name(), place.where.file_name()) != 0)
      fail("threads of a block meet at " + first.text() + " and at " + place.text());
  }

  [[noreturn]] void deadlock() const {
    std::string message = "deadlock", before;
    for (unsigned number = 0, start = 0; number <= count_; ++number) {
      std::string state;
      if (number < count_) {
        const Place* place = threads_[number].place.load(std::memory_order_acquire);
        state = threads_[number].left.load(std::memory_order_relaxed) ? "left the kernel"
                : place                                               ? "waits at " + place->text()
                                                                      : "runs";
        if (number == 0) before = state;
      }
      if (state == before) continue;
      message += "\n  threads " + std::to_string(start) + "-" + std::to_string(number - 1) + ": " + before;
      start = number;
      before = state;
    }
    fail(message);
  }

  struct FreeShared {
    void operator()(unsigned char* memory) const { ::operator delete(memory, std::align_val_t{16}); }
  };

  const Launch* launch_ = nullptr;
  uint3 index_{};
  unsigned count_ = 0;
  std::unique_ptr<Thread[]> threads_{new Thread[kMaxThreads]};
  std::array<std::atomic<unsigned>, kMaxThreads / kWarp> present_{};
  std::unique_ptr<unsigned char, FreeShared> shared_;
};

#if defined(QLAE_EMULATE_WITH_THREADS)

// Threads for one block after another; ThreadSanitizer takes long to start them. Each begins a block behind a lock of
// its own and they share a lock only at the end, so that within a block nothing of one happens before another's.
class Crew {
 public:
  Crew() = default;
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;
  ~Crew() {
    for (const auto& member : members_) {
      member->begin(nullptr, true);
      member->thread.join();
    }
  }
  void run(Block& block, unsigned count) {
    while (members_.size() < count) {
      members_.push_back(std::make_unique<Member>());
      Member& member = *members_.back();
      const unsigned number = static_cast<unsigned>(members_.size() - 1);
      member.thread = std::thread([this, &member, number] { work(member, number); });
    }
    running_ = count;
    for (unsigned number = 0; number < count; ++number) members_[number]->begin(&block, false);
    std::unique_lock lock(mutex_);
    condition_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  struct Member {
    std::mutex mutex;
    std::condition_variable condition;
    Block* block = nullptr;
    bool ends = false;
    std::thread thread;

    void begin(Block* next, bool last) {
      const std::lock_guard lock(mutex);
      block = next;
      ends = last;
      condition.notify_one();
    }
  };

  inline void work(Member& member, unsigned number);

  std::vector<std::unique_ptr<Member>> members_;
  std::mutex mutex_;
  std::condition_variable condition_;
  unsigned running_ = 0;
};

class Block : public BlockBase {
 public:
  void run(const Launch& launch, uint3 index, std::uint64_t /*seed*/) {
    start(launch, index);
    groups_.reset(new Group[warps() * kWarp]);
    static thread_local Crew crew;
    crew.run(*this, count_);
    shared_.reset();
  }

  void work(unsigned number) {
    current_block = this;
    become(&threads_[number]);
    blockIdx = index_;
    blockDim = launch_->block;
    gridDim = launch_->grid;
    launch_->body(launch_->argument);
    // Relaxed, and seen by those who wait when they next look: leaving is no synchronisation.
    present_[number / kWarp].fetch_and(~(1u << number % kWarp), std::memory_order_relaxed);
    threads_[number].left.store(true, std::memory_order_relaxed);
    idle_.fetch_add(1, std::memory_order_relaxed);
  }

  unsigned barrier(const Place& place, bool predicate) {
    std::unique_lock lock(mutex_);
    if (first_) require_same(*first_, place);
    if (!first_) first_ = &place;
    nonzero_ += predicate;
    idle_.fetch_add(1, std::memory_order_relaxed);
    const unsigned generation = generation_;
    if (++arrived_ == count_) {
      released(count_);
      result_ = nonzero_;
      arrived_ = nonzero_ = 0;
      first_ = nullptr;
      ++generation_;
      condition_.notify_all();
    } else {
      wait(place, lock, condition_, [&] { return generation_ != generation; });
    }
    return result_;
  }

  std::uint64_t collective(const Place& place, Combine combine, std::uint64_t value, unsigned argument,
                           unsigned width) {
    const unsigned warp = current_thread->number / kWarp, lane = current_thread->number % kWarp;
    if (!place.mask) fail(place.text() + ": the mask is empty");
    // One per warp and lowest lane of the mask, so that lanes of disjoint masks never take the same lock.
    Group& group = groups_[warp * kWarp + std::countr_zero(place.mask)];
    std::unique_lock lock(group.mutex);
    Slot& slot = group.slots[lane];
    arrive(slot, lane, place, combine, value, argument, width);
    idle_.fetch_add(1, std::memory_order_relaxed);
    wait(place, lock, group.condition, [&] {
      if (slot.done) return true;
      const unsigned lanes = complete(group.slots, place.mask, present_[warp].load(std::memory_order_relaxed));
      if (!lanes) return false;
      released(std::popcount(lanes));
      group.condition.notify_all();
      return true;
    });
    return slot.result;
  }

  void pause(unsigned nanoseconds) { std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds)); }

 private:
  struct Group {
    std::mutex mutex;
    std::condition_variable condition;
    Slot slots[kWarp]{};
  };

  void released(unsigned threads) {
    idle_.fetch_sub(threads, std::memory_order_relaxed);
    progress_.fetch_add(1, std::memory_order_relaxed);
  }

  template <class Ready>
  void wait(const Place& place, std::unique_lock<std::mutex>& lock, std::condition_variable& condition, Ready ready) {
    using std::chrono::milliseconds;
    current_thread->place.store(&place, std::memory_order_release);
    std::uint64_t seen = progress_.load(std::memory_order_relaxed);
    milliseconds pause{4}, stalled{0};
    while (!ready()) {
      // A time of the system's clock: ThreadSanitizer does not know of waits by the other on every platform.
      if (condition.wait_until(lock, std::chrono::system_clock::now() + pause) != std::cv_status::timeout) continue;
      const std::uint64_t now = progress_.load(std::memory_order_relaxed);
      const bool stands = now == seen && idle_.load(std::memory_order_relaxed) == count_;
      stalled = stands ? stalled + pause : milliseconds{0};
      if (stalled >= milliseconds{1000} && !ready()) deadlock();
      seen = now;
      pause = std::min(pause * 2, milliseconds{64});
    }
    current_thread->place.store(nullptr, std::memory_order_relaxed);
  }

  std::unique_ptr<Group[]> groups_;
  std::mutex mutex_;
  std::condition_variable condition_;
  const Place* first_ = nullptr;
  unsigned arrived_ = 0, nonzero_ = 0, result_ = 0, generation_ = 0;
  // Threads that wait or left; and how often any were released.
  std::atomic<unsigned> idle_ = 0;
  std::atomic<std::uint64_t> progress_ = 0;
};

inline void Crew::work(Member& member, unsigned number) {
  for (;;) {
    std::unique_lock lock(member.mutex);
    member.condition.wait(lock, [&] { return member.block || member.ends; });
    if (member.ends) return;
    Block& block = *std::exchange(member.block, nullptr);
    lock.unlock();
    block.work(number);
    const std::lock_guard end(mutex_);
    if (--running_ == 0) condition_.notify_one();
  }
}

#else

class Block : public BlockBase {
 public:
  void run(const Launch& launch, uint3 index, std::uint64_t seed) {
    start(launch, index);
    blockIdx = index;
    blockDim = launch.block;
    gridDim = launch.grid;
    current_block = this;
    shuffle_ = seed != 0;
    random_.seed(static_cast<std::uint32_t>(seed % 2147483646 + 1));
    first_ = nullptr;
    alive_ = count_;
    arrived_ = nonzero_ = head_ = ready_count_ = pauses_ = 0;
    std::fill_n(slots_.begin(), warps() * kWarp, Slot{});
    for (unsigned number = 0; number < count_; ++number) {
      Thread& thread = threads_[number];
      char* bottom = thread.stack.bottom();
#if defined(QLAE_EMULATION_ADDRESS_SANITIZER)
      __asan_unpoison_memory_region(bottom, kStackBytes);
      outer_bottom_ = nullptr;
#endif
      // Tops at different places of a page, or all would compete for the same lines of the cache.
      prepare_context(thread.context, bottom, kStackBytes - number % 16 * 256, enter);
      push(number);
    }
    switch_to(nullptr, next(), false);
    current_block = nullptr;
    current_thread = nullptr;
    shared_.reset();
  }

  unsigned barrier(const Place& place, bool predicate) {
    if (first_) require_same(*first_, place);
    if (!first_) first_ = &place;
    nonzero_ += predicate;
    if (++arrived_ == count_) {
      result_ = nonzero_;
      arrived_ = nonzero_ = 0;
      first_ = nullptr;
      for (unsigned number = 0; number < count_; ++number)
        if (&threads_[number] != current_thread) push(number);
    } else {
      wait(place);
    }
    return result_;
  }

  std::uint64_t collective(const Place& place, Combine combine, std::uint64_t value, unsigned argument,
                           unsigned width) {
    const unsigned warp = current_thread->number / kWarp, lane = current_thread->number % kWarp;
    Slot& slot = slots_[warp * kWarp + lane];
    arrive(slot, lane, place, combine, value, argument, width);
    if (const unsigned lanes = try_complete(warp, place.mask)) {
      release(warp, lanes & ~(1u << lane));
    } else {
      wait(place);
    }
    return slot.result;
  }

  void pause(unsigned /*nanoseconds*/) {
    if (++pauses_ > 1u << 24) fail("__nanosleep without end: a block waits for another, but they run in turn");
    Thread* self = current_thread;
    push(self->number);
    Thread* thread = next();
    if (thread != self) switch_to(self, thread, false);
  }

 private:
  static void enter() {
    Block& block = *current_block;
#if defined(QLAE_EMULATION_ADDRESS_SANITIZER)
    const void* bottom;
    std::size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    // The first fiber comes from the thread that launched.
    if (!block.outer_bottom_) block.outer_bottom_ = bottom, block.outer_bytes_ = bytes;
#endif
    block.launch_->body(block.launch_->argument);
    block.leave();
  }

  [[noreturn]] void leave() {
    Thread* self = current_thread;
    const unsigned warp = self->number / kWarp, lane = self->number % kWarp;
    self->left.store(true, std::memory_order_relaxed);
    const unsigned present = present_[warp].load(std::memory_order_relaxed) & ~(1u << lane);
    present_[warp].store(present, std::memory_order_relaxed);
    // The others may have waited for this lane only.
    for_each_lane(present, [&](unsigned other) {
      const Slot& slot = slots_[warp * kWarp + other];
      if (slot.waiting && slot.mask >> lane & 1) release(warp, try_complete(warp, slot.mask));
    });
    switch_to(self, --alive_ ? next() : nullptr, true);
    std::abort();
  }

  unsigned try_complete(unsigned warp, unsigned mask) const {
    return complete(const_cast<Slot*>(&slots_[warp * kWarp]), mask, present_[warp].load(std::memory_order_relaxed));
  }

  void release(unsigned warp, unsigned lanes) {
    for_each_lane(lanes, [&](unsigned lane) { push(warp * kWarp + lane); });
  }

  void wait(const Place& place) {
    Thread* self = current_thread;
    self->place.store(&place, std::memory_order_relaxed);
    switch_to(self, next(), false);
    self->place.store(nullptr, std::memory_order_relaxed);
  }

  void push(unsigned number) { ready_[(head_ + ready_count_++) % kMaxThreads] = static_cast<std::uint16_t>(number); }

  // The thread that runs next.
  Thread* next() {
    if (!ready_count_) deadlock();
    if (shuffle_) std::swap(ready_[head_], ready_[(head_ + random_() % ready_count_) % kMaxThreads]);
    Thread* thread = &threads_[ready_[head_]];
    head_ = (head_ + 1) % kMaxThreads;
    --ready_count_;
    return thread;
  }

  // Null: the context of the launch.
  void switch_to(Thread* from, Thread* to, [[maybe_unused]] bool leaves) {
    if (to) become(to);
    Context& here = from ? from->context : outer_;
    Context& there = to ? to->context : outer_;
#if defined(QLAE_EMULATION_ADDRESS_SANITIZER)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(leaves ? nullptr : &fake, to ? to->stack.bottom() : outer_bottom_,
                                   to ? kStackBytes : outer_bytes_);
    switch_context(here, there);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    switch_context(here, there);
#endif
    // Whatever the compiler knew of memory, other threads have run since.
    __asm__ volatile("" ::: "memory");
  }

  std::array<Slot, kMaxThreads> slots_;
  std::array<std::uint16_t, kMaxThreads> ready_;
  unsigned head_ = 0, ready_count_ = 0, alive_ = 0, pauses_ = 0;
  const Place* first_ = nullptr;
  unsigned arrived_ = 0, nonzero_ = 0, result_ = 0;
  bool shuffle_ = false;
  std::minstd_rand random_;
  Context outer_{};
#if defined(QLAE_EMULATION_ADDRESS_SANITIZER)
  const void* outer_bottom_ = nullptr;
  std::size_t outer_bytes_ = 0;
#endif
};

#endif

inline void run(const Launch& launch) {
  const std::uint64_t blocks = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z, seed = order_seed;
  std::vector<std::uint64_t> order;
  std::mt19937_64 random(seed);
  if (seed) {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    std::shuffle(order.begin(), order.end(), random);
  }
#if !defined(QLAE_EMULATE_WITH_THREADS)
  // Kept, with the stacks, for the launches that follow.
  static thread_local const auto kept = std::make_unique<Block>();
  Block& block = *kept;
#endif
  for (std::uint64_t turn = 0; turn < blocks; ++turn) {
    const std::uint64_t number = seed ? order[turn] : turn, row = number / launch.grid.x;
#if defined(QLAE_EMULATE_WITH_THREADS)
    Block block;
#endif
    block.run(launch,
              {static_cast<unsigned>(number % launch.grid.x), static_cast<unsigned>(row % launch.grid.y),
               static_cast<unsigned>(row / launch.grid.y)},
              seed ? random() | 1 : 0);
  }
  launches.fetch_add(1, std::memory_order_relaxed);
}

inline std::uint64_t collective(const char* what, unsigned mask, const std::source_location& where, Combine combine,
                                std::uint64_t value, unsigned argument = 0, unsigned width = kWarp) {
  const Place place{what, mask, where};
  return current_block->collective(place, combine, value, argument, width);
}

inline unsigned barrier(const char* what, const std::source_location& where, bool predicate) {
  const Place place{what, 0, where};
  return current_block->barrier(place, predicate);
}

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);
template <class T>
concept Matched = Shuffled<T> && std::integral<T>;
template <class T>
concept Reduced = std::same_as<T, unsigned> || std::same_as<T, int>;

template <class T>
std::uint64_t pack(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

enum class Shuffle { kIndex, kXor, kUp, kDown };

// The lane that the instruction reads, by the rules of PTX; what a lane that takes no part "holds" is poison.
template <Shuffle kind>
void shuffle(Slot* slots, unsigned lanes) {
  for_each_lane(lanes, [&](unsigned lane) {
    const unsigned width = slots[lane].width, argument = slots[lane].argument % kWarp;
    const unsigned first = lane & ~(width - 1), last = first | (width - 1);
    unsigned source = first | (argument & (width - 1));
    if (kind == Shuffle::kXor) source = lane ^ argument;
    if (kind == Shuffle::kUp) source = lane < first + argument ? lane : lane - argument;
    if (kind == Shuffle::kDown) source = lane + argument;
    if (source > last) source = lane;
    slots[lane].result = lanes >> source & 1 ? slots[source].value : ~std::uint64_t{0};
  });
}

template <class Result>
void give_all(Slot* slots, unsigned lanes, Result result) {
  for_each_lane(lanes, [&](unsigned lane) { slots[lane].result = pack(result); });
}

inline unsigned lanes_that_hold(const Slot* slots, unsigned lanes, std::uint64_t value) {
  unsigned holders = 0;
  for_each_lane(lanes, [&](unsigned lane) { holders |= (slots[lane].value == value ? 1u : 0u) << lane; });
  return holders;
}

inline void ballot(Slot* slots, unsigned lanes) { give_all(slots, lanes, lanes_that_hold(slots, lanes, 1)); }

inline void match_any(Slot* slots, unsigned lanes) {
  for_each_lane(lanes, [&](unsigned lane) { slots[lane].result = lanes_that_hold(slots, lanes, slots[lane].value); });
}

template <class T, class Operation>
void reduce(Slot* slots, unsigned lanes) {
  T total = unpack<T>(slots[std::countr_zero(lanes)].value);
  for_each_lane(lanes & (lanes - 1), [&](unsigned lane) { total = Operation{}(total, unpack<T>(slots[lane].value)); });
  give_all(slots, lanes, total);
}
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};

// A GPU faults on an address that is no multiple of the element's size.
template <class T>
void require_aligned(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T)) current_block->fail("an address is not aligned");
}

template <class T, class F>
T update(T* address, F&& next) {
  require_aligned(address);
  std::atomic_ref<T> value(*address);
  T before = value.load(std::memory_order_relaxed);
  while (!value.compare_exchange_weak(before, next(before), std::memory_order_relaxed)) {
  }
  return before;
}

inline void fence() {
#if defined(QLAE_EMULATION_THREAD_SANITIZER)
  // It knows no fences. They order accesses of several blocks only, and blocks run one after another.
  std::atomic_signal_fence(std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace qlae_emulation

inline unsigned char* qlae_dynamic_shared_memory() { return qlae_emulation::current_block->shared_memory(); }

// Barriers and collectives. The default argument names the line of the kernel in a report.
inline void __syncthreads(std::source_location where = std::source_location::current()) {
  qlae_emulation::barrier("__syncthreads", where, false);
}
inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return qlae_emulation::barrier("__syncthreads_or", where, predicate) != 0;
}
inline int __syncthreads_and(int predicate, std::source_location where = std::source_location::current()) {
  return qlae_emulation::barrier("__syncthreads_and", where, !predicate) == 0;
}
inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return static_cast<int>(qlae_emulation::barrier("__syncthreads_count", where, predicate));
}
inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  qlae_emulation::collective("__syncwarp", mask, where, nullptr, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return static_cast<unsigned>(
      qlae_emulation::collective("__ballot_sync", mask, where, qlae_emulation::ballot, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return qlae_emulation::collective("__any_sync", mask, where, qlae_emulation::ballot, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, std::source_location where = std::source_location::current()) {
  return qlae_emulation::collective("__all_sync", mask, where, qlae_emulation::ballot, predicate == 0) == 0;
}
template <qlae_emulation::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__shfl_sync", mask, where, shuffle<Shuffle::kIndex>, pack(value), source, width));
}
template <qlae_emulation::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__shfl_xor_sync", mask, where, shuffle<Shuffle::kXor>, pack(value), lanes, width));
}
template <qlae_emulation::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__shfl_up_sync", mask, where, shuffle<Shuffle::kUp>, pack(value), delta, width));
}
template <qlae_emulation::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__shfl_down_sync", mask, where, shuffle<Shuffle::kDown>, pack(value), delta, width));
}
template <qlae_emulation::Matched T>
unsigned __match_any_sync(unsigned mask, T value, std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return static_cast<unsigned>(collective("__match_any_sync", mask, where, match_any, pack(value)));
}
template <qlae_emulation::Reduced T>
T __reduce_add_sync(unsigned mask, T value, std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__reduce_add_sync", mask, where, reduce<T, Add>, pack(value)));
}
template <qlae_emulation::Reduced T>
T __reduce_max_sync(unsigned mask, T value, std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__reduce_max_sync", mask, where, reduce<T, Max>, pack(value)));
}
template <qlae_emulation::Reduced T>
T __reduce_min_sync(unsigned mask, T value, std::source_location where = std::source_location::current()) {
  using namespace qlae_emulation;
  return unpack<T>(collective("__reduce_min_sync", mask, where, reduce<T, Min>, pack(value)));
}
inline void __nanosleep(unsigned nanoseconds) { qlae_emulation::current_block->pause(nanoseconds); }
inline void __threadfence() { qlae_emulation::fence(); }
inline void __threadfence_block() { qlae_emulation::fence(); }

// Relaxed, as CUDA's are: they order no other access.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  qlae_emulation::require_aligned(address);
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return qlae_emulation::update(address, [&](T before) { return std::max(before, value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return qlae_emulation::update(address, [&](T before) { return std::min(before, value); });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return qlae_emulation::update(address, [&](unsigned before) { return before >= last ? 0 : before + 1; });
}

template <class T>
T __ldg(const T* address) {
  qlae_emulation::require_aligned(address);
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return __ldg(address);
}
template <class T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  qlae_emulation::require_aligned(address);
  *address = value;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  __stcg(address, value);
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline int __ffs(int bits) { return bits ? std::countr_zero(static_cast<unsigned>(bits)) + 1 : 0; }
inline int __ffsll(long long bits) { return bits ? std::countr_zero(static_cast<unsigned long long>(bits)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>((static_cast<Wide>(a) * b) >> 64);
}
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  // Subnormals are multiples of 2**-24.
  if (magnitude < 0x400)
    return std::bit_cast<float>(std::bit_cast<unsigned>(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  const unsigned exponent = magnitude >= 0x7c00 ? 255 - 31 : 127 - 15;
  return std::bit_cast<float>(sign | ((magnitude << 13) + (exponent << 23)));
}
inline __half __float2half_rn(float value) {
  const unsigned bits = std::bit_cast<unsigned>(value), magnitude = bits & 0x7fffffff;
  unsigned half;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x47800000) {
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {
    // A carry out of the mantissa is the next exponent, or infinity.
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else if (magnitude < 0x33000000) {
    half = 0;
  } else {
    const unsigned mantissa = (magnitude & 0x7fffff) | 0x800000, shift = 126 - (magnitude >> 23);
    half = (mantissa + (1u << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
  }
  return {static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000))};
}
inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(unsigned{value.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = std::bit_cast<unsigned>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// The runtime.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace qlae_emulation {

inline thread_local constinit cudaError_t last_error = cudaSuccess;

inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The dynamic shared memory that each kernel was allowed.
class SharedLimits {
 public:
  void set(const void* kernel, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_[kernel] = bytes;
  }
  std::size_t get(const void* kernel) {
    const std::lock_guard lock(mutex_);
    const auto found = bytes_.find(kernel);
    return found == bytes_.end() ? kDefaultSharedBytes : found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, std::size_t> bytes_;
};
inline SharedLimits shared_limits;

inline cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*), void* argument) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (current_block) current_block->fail("a kernel launches another");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || !block.x ||
      !block.y || !block.z || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 ||
      std::uint64_t{block.x} * block.y * block.z > kMaxThreads)
    return report(cudaErrorInvalidConfiguration);
  // The device may have become smaller since the kernel's limit was set.
  const std::size_t optin = std::max<std::size_t>(device.shared_bytes_per_block_optin, 0);
  if (config.dynamicSmemBytes > std::min(shared_limits.get(kernel), optin)) return report(cudaErrorInvalidValue);
  run({grid, block, config.dynamicSmemBytes, body, argument});
  return cudaSuccess;
}

}  // namespace qlae_emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // Converted to the kernel's parameters once; each thread gets its own copy.
  return [&](Parameters... values) {
    auto body = [&] { kernel(values...); };
    return qlae_emulation::launch(
        reinterpret_cast<const void*>(kernel), *config, [](void* self) { (*static_cast<decltype(body)*>(self))(); },
        &body);
  }(std::forward<Arguments>(arguments)...);
}

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute /*attribute*/, int value) {
  if (value < 0 || value > qlae_emulation::device.shared_bytes_per_block_optin)
    return qlae_emulation::report(cudaErrorInvalidValue);
  qlae_emulation::shared_limits.set(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T* kernel, int threads,
                                                          std::size_t shared_bytes) {
  using namespace qlae_emulation;
  if (!blocks || threads <= 0) return report(cudaErrorInvalidValue);
  const auto warps = (static_cast<unsigned>(threads) + kWarp - 1) / kWarp;
  const std::size_t whole = device.shared_bytes_per_multiprocessor;
  const std::size_t limit = shared_limits.get(reinterpret_cast<const void*>(kernel));
  *blocks =
      std::min({device.blocks_per_multiprocessor, device.threads_per_multiprocessor / static_cast<int>(warps * kWarp),
                static_cast<int>(whole / (shared_bytes + kReservedSharedBytes))});
  if (static_cast<unsigned>(threads) > kMaxThreads || shared_bytes > limit) *blocks = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using qlae_emulation::report;
  if (device != 0) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = qlae_emulation::kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = qlae_emulation::kDefaultSharedBytes; break;
    case cudaDevAttrWarpSize: *value = qlae_emulation::kWarp; break;
    case cudaDevAttrMultiProcessorCount: *value = qlae_emulation::device.multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = qlae_emulation::device.threads_per_multiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = qlae_emulation::device.compute_capability_major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = qlae_emulation::device.shared_bytes_per_multiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = qlae_emulation::device.shared_bytes_per_block_optin; break;
    default: return report(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : qlae_emulation::report(cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetLastError() { return std::exchange(qlae_emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unrecognized error code";
}
