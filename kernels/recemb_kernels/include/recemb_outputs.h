// Memory of large outputs, kept when they are freed. What the system maps anew, and torch's allocator asks for in some
// processes at every step and in others never, comes page by page and filled with zeros: of 4 MB that took as long as
// all else that a look-up does.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>

namespace recemb {

// With what outputs take now, no more is kept than twice what they have lately taken at once: blocks of one size are
// never more than that was, and those of others, one after the other, find each their own.
class Outputs final : public c10::Allocator {
 public:
  static constexpr size_t SMALLEST = size_t{1} << 20;  // bytes of an output that is had from here

  // Outlives every tensor.
  static Outputs& shared() {
    static Outputs* const one = new Outputs;
    return *one;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (std::max<size_t>(bytes, 1) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    Block* block = kept(size);
    if (!block) block = mapped(size);
    if (!block) {
      release();
      block = mapped(size);
    }
    TORCH_CHECK(block, "there is no room for an output of ", bytes, " bytes");
    c10::profiledCPUMemoryReporter().New(block->memory, bytes);
    return {block->memory, block, give_back, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Gives back to the system what nobody uses.
  void release() {
    Block* idle;
    {
      const std::lock_guard<std::mutex> held(mutex_);
      idle = std::exchange(idle_, nullptr);
    }
    unmap(idle);
  }

 private:
  struct Block {
    void* memory;
    size_t size;
    Block* next;  // of those that nobody uses
  };
  static constexpr size_t HUGE_PAGE = size_t{1} << 21;
  static constexpr int64_t LATELY = 64;  // outputs since a first one, and as many before it

  // A child that is forked while another thread holds the mutex has it free, as driver.cpp's.
  Outputs() {
    pthread_atfork([] { shared().mutex_.lock(); }, [] { shared().mutex_.unlock(); }, [] { shared().mutex_.unlock(); });
  }

  void lend(size_t size) {
    used_ += size;
    if (++count_ % LATELY == 0) before_ = std::exchange(most_, 0);
    most_ = std::max(most_, used_);
  }

  // The smallest that is large enough, and not twice as large and more; of equal ones that which caches may hold yet.
  Block* kept(size_t size) {
    const std::lock_guard<std::mutex> held(mutex_);
    Block** best = nullptr;
    for (Block** at = &idle_; *at; at = &(*at)->next)
      if ((*at)->size >= size && (*at)->size < 2 * size && (!best || (*at)->size < (*best)->size)) best = at;
    if (!best) return nullptr;
    Block* found = std::exchange(*best, (*best)->next);
    lend(found->size);
    return found;
  }

  // By itself: malloc's memory would go on to others as huge pages. Null when there is none.
  Block* mapped(size_t size) {
    Block* block = new (std::nothrow) Block{nullptr, size, nullptr};
    if (!block) return nullptr;
    const size_t all = size + HUGE_PAGE;
    void* const room = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) {
      delete block;
      return nullptr;
    }
    char* const first = static_cast<char*>(room);
    const size_t before = -reinterpret_cast<uintptr_t>(first) % HUGE_PAGE;
    block->memory = first + before;
    if (before) munmap(first, before);
    munmap(first + before + size, HUGE_PAGE - before);
    madvise(block->memory, size, MADV_HUGEPAGE);
    const std::lock_guard<std::mutex> held(mutex_);
    lend(size);
    return block;
  }

  static void unmap(Block* blocks) {
    while (blocks) {
      munmap(blocks->memory, blocks->size);
      delete std::exchange(blocks, blocks->next);
    }
  }

  // Of a tensor that is gone: throws nothing. The latest is the first one to be used again, the last one to go.
  static void give_back(void* gone) {
    Outputs& all = shared();
    Block *const block = static_cast<Block*>(gone), *surplus = nullptr;
    c10::profiledCPUMemoryReporter().Delete(block->memory);
    {
      const std::lock_guard<std::mutex> held(all.mutex_);
      all.used_ -= block->size;
      block->next = std::exchange(all.idle_, block);
      size_t fits = 2 * std::max(all.most_, all.before_) - all.used_;
      Block** at = &all.idle_;
      for (; *at && (*at)->size <= fits; at = &(*at)->next) fits -= (*at)->size;
      surplus = std::exchange(*at, nullptr);
    }
    unmap(surplus);
  }

  std::mutex mutex_;
  Block* idle_ = nullptr;
  size_t used_ = 0, most_ = 0, before_ = 0;  // bytes, and the most of them at once lately
  int64_t count_ = 0;
};

// A tensor of floats for the caller: torch's own where a mode of it or a transform wants to see that it is made.
inline at::Tensor floats(at::IntArrayRef size) {
  const auto looks = [](c10::DispatchKey key) { return c10::impl::tls_is_dispatch_key_included(key); };
  if (at::detail::computeStorageNbytesContiguous(size, sizeof(float)) < Outputs::SMALLEST ||
      looks(c10::DispatchKey::Python) || looks(c10::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return at::empty(size, at::TensorOptions(at::kCPU).dtype(at::kFloat));
  return at::detail::empty_generic(size, &Outputs::shared(), c10::DispatchKeySet(c10::DispatchKey::CPU), at::kFloat,
                                   std::nullopt);
}

}  // namespace recemb
