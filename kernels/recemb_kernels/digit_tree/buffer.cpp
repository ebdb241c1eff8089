#include "recemb_buffer.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace recemb {

namespace {

constexpr int64_t HUGE_PAGE = int64_t{1} << 21;
// Above this glibc maps every block anew, however often one of its size is asked for.
constexpr int64_t ALWAYS_MAPPED = int64_t{1} << 25;

}  // namespace

void ask_for_huge_pages(void* memory, int64_t bytes) {
  if (bytes < ALWAYS_MAPPED) return;
  const auto first = reinterpret_cast<uintptr_t>(memory), begin = (first + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  madvise(reinterpret_cast<void*>(begin), (first + bytes - begin) / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
}

Buffer::~Buffer() { std::free(memory_); }

bool Buffer::poison = false;
int64_t Buffer::failing = 0;

void* Buffer::reserve(int64_t bytes) {
  if (bytes > size_) grow(bytes);
  if (poison && size_) std::memset(memory_, 0xFF, size_);
  return memory_;
}

void Buffer::grow(int64_t bytes) {
  std::free(memory_);
  memory_ = nullptr, size_ = 0;
  // A quarter more than asked, so that batches of varying length settle.
  const int64_t align = huge_ && bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
  const int64_t size = (bytes + bytes / 4 + align - 1) / align * align;
  if (!failing || --failing) memory_ = std::aligned_alloc(align, size);
  if (!memory_) throw NoMemory(size);
  if (align == HUGE_PAGE) madvise(memory_, size, MADV_HUGEPAGE);
  size_ = size;
}

}  // namespace recemb
