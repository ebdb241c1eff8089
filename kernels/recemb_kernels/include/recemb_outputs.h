// Memory of large outputs, kept when they are freed. What the system maps anew, and torch's allocator asks for in some
// processes at every step and in others never, comes page by page and filled with zeros: of 4 MB that took as long as
// all else that a look-up does.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace recemb {

class Outputs final : public c10::Allocator {
 public:
  static constexpr size_t SMALLEST = size_t{1} << 20;  // bytes of an output that is had from here
  static constexpr size_t KEPT = 4;                    // at most so many blocks that nobody uses

  // Outlives every tensor.
  static Outputs& shared() {
    static Outputs* const one = new Outputs;
    return *one;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = kept(bytes);
    if (!block) block = fresh(bytes);
    return {block->memory, block, give_back, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  struct Block {
    void* memory;
    size_t size;
  };
  static constexpr size_t HUGE_PAGE = size_t{1} << 21;

  // A child that is forked while another thread holds the mutex has it free, as driver.cpp's.
  Outputs() {
    pthread_atfork([] { shared().mutex_.lock(); }, [] { shared().mutex_.unlock(); }, [] { shared().mutex_.unlock(); });
  }

  // The smallest that is large enough, and not twice as large and more.
  Block* kept(size_t bytes) {
    const std::lock_guard<std::mutex> held(mutex_);
    auto best = free_.end();
    for (auto at = free_.begin(); at != free_.end(); ++at)
      if ((*at)->size >= bytes && (*at)->size / 2 < bytes && (best == free_.end() || (*at)->size < (*best)->size))
        best = at;
    if (best == free_.end()) return nullptr;
    Block* found = *best;
    free_.erase(best);
    return found;
  }

  Block* fresh(size_t bytes) {
    const size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* memory = std::aligned_alloc(HUGE_PAGE, size);
    if (!memory) {
      drop(0);
      memory = std::aligned_alloc(HUGE_PAGE, size);
    }
    TORCH_CHECK(memory, "there is no room for an output of ", bytes, " bytes");
    madvise(memory, size, MADV_HUGEPAGE);
    return new Block{memory, size};
  }

  // Leaves so many, the latest.
  void drop(size_t left) {
    const std::lock_guard<std::mutex> held(mutex_);
    while (free_.size() > left) {
      std::free(free_.front()->memory);
      delete free_.front();
      free_.erase(free_.begin());
    }
  }

  static void give_back(void* block) {
    Outputs& all = shared();
    {
      const std::lock_guard<std::mutex> held(all.mutex_);
      all.free_.push_back(static_cast<Block*>(block));
    }
    all.drop(KEPT);
  }

  std::mutex mutex_;
  std::vector<Block*> free_;  // the one that was given back first comes first
};

// A tensor of floats for the caller.
inline at::Tensor floats(at::IntArrayRef size) {
  if (at::detail::computeStorageNbytesContiguous(size, sizeof(float)) < Outputs::SMALLEST)
    return at::empty(size, at::TensorOptions(at::kCPU).dtype(at::kFloat));
  return at::detail::empty_generic(size, &Outputs::shared(), c10::DispatchKeySet(c10::DispatchKey::CPU), at::kFloat,
                                   std::nullopt);
}

}  // namespace recemb
