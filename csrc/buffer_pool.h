// Large output buffers that are used again after they are freed. Fresh memory from the system must be zeroed and mapped
// page by page, which costs more than quantizing into it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <list>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qlae {

class BufferPool {
 public:
  struct Block {
    void* memory;
    int64_t capacity;
  };

  // Lives as long as the process: tensors may be freed after static destructors have run.
  static BufferPool& instance() {
    static BufferPool* pool = new BufferPool;
    return *pool;
  }

  // A page-aligned block of at least `bytes`; large ones are aligned to huge pages.
  Block acquire(int64_t bytes) {
    const int64_t granule = granule_of(bytes);
    const int64_t capacity = (bytes + granule - 1) / granule * granule;
    {
      std::lock_guard lock(mutex_);
      // The block freed last is the likeliest to fit, and to be in the cache.
      const auto found =
          std::find_if(idle_.rbegin(), idle_.rend(), [&](const Block& block) { return block.capacity == capacity; });
      if (found != idle_.rend()) {
        const Block block = *found;
        idle_.erase(std::next(found).base());
        idle_bytes_ -= capacity;
        return block;
      }
    }
    const Block block{::operator new(capacity, std::align_val_t(granule_of(capacity))), capacity};
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Advice: a kernel that declines it serves small pages, and nothing else changes.
    if (granule == kHugePage) (void)madvise(block.memory, capacity, MADV_HUGEPAGE);
#endif
    return block;
  }

  // Keeps the block for reuse; the blocks that have been idle longest make room.
  void release(Block block) {
    std::lock_guard lock(mutex_);
    idle_.push_back(block);
    idle_bytes_ += block.capacity;
    shrink_to(max_idle_bytes_);
  }

  // Frees idle blocks until at most `bytes` are kept, now and from now on.
  void set_max_idle_bytes(int64_t bytes) {
    std::lock_guard lock(mutex_);
    max_idle_bytes_ = bytes;
    shrink_to(bytes);
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
  static constexpr int64_t kPage = 4096;
  static constexpr int64_t kHugePage = int64_t{2} << 20;

  static int64_t granule_of(int64_t bytes) { return bytes >= kHugePage ? kHugePage : kPage; }

  void shrink_to(int64_t bytes) {
    while (idle_bytes_ > bytes) {
      const Block block = idle_.front();
      idle_.pop_front();
      idle_bytes_ -= block.capacity;
      ::operator delete(block.memory, std::align_val_t(granule_of(block.capacity)));
    }
  }

  std::mutex mutex_;
  // The block freed last stands last.
  std::list<Block> idle_;
  int64_t idle_bytes_ = 0;
  int64_t max_idle_bytes_ = int64_t{1} << 30;
};

}  // namespace qlae
