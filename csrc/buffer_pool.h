// Large output buffers that are used again after they are freed. Fresh memory from the system must be zeroed and mapped
// page by page, which costs more than quantizing into it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qlae {

class BufferPool {
 public:
  // Lives as long as the process: tensors may be freed after static destructors have run.
  static BufferPool& instance() {
    static BufferPool* pool = new BufferPool;
    return *pool;
  }

  // A block of at least `bytes`, aligned to huge pages; give it back with its capacity.
  void* acquire(int64_t bytes, int64_t& capacity) {
    capacity = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      std::lock_guard lock(mutex_);
      const auto found = idle_.find(capacity);
      if (found != idle_.end()) {
        void* block = found->second;
        idle_.erase(found);
        idle_bytes_ -= capacity;
        return block;
      }
    }
    void* block = ::operator new(capacity, std::align_val_t{kHugePage});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Advice: a kernel that declines it serves small pages, and nothing else changes.
    (void)madvise(block, capacity, MADV_HUGEPAGE);
#endif
    return block;
  }

  void release(void* block, int64_t capacity) {
    {
      std::lock_guard lock(mutex_);
      if (idle_bytes_ + capacity <= max_idle_bytes_) {
        idle_.emplace(capacity, block);
        idle_bytes_ += capacity;
        return;
      }
    }
    free_block(block);
  }

  // Frees idle blocks until at most `bytes` are kept, now and from now on.
  void set_max_idle_bytes(int64_t bytes) {
    std::lock_guard lock(mutex_);
    max_idle_bytes_ = bytes;
    while (idle_bytes_ > max_idle_bytes_) {
      const auto last = std::prev(idle_.end());
      idle_bytes_ -= last->first;
      free_block(last->second);
      idle_.erase(last);
    }
  }

  int64_t max_idle_bytes() {
    std::lock_guard lock(mutex_);
    return max_idle_bytes_;
  }

  int64_t idle_bytes() {
    std::lock_guard lock(mutex_);
    return idle_bytes_;
  }

 private:
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  static void free_block(void* block) { ::operator delete(block, std::align_val_t{kHugePage}); }

  std::mutex mutex_;
  std::multimap<int64_t, void*> idle_;
  int64_t idle_bytes_ = 0;
  int64_t max_idle_bytes_ = int64_t{1} << 30;
};

}  // namespace qlae
