// Memory that is kept between calls. All that a call needs and cannot have on the stack comes from here, before the
// call changes anything: so that a batch too large for the machine is an error, and not the end of the process.
#pragma once
#include <cstdint>
#include <new>

namespace recemb {

// There is no room for `bytes` more. May not leave a parallel region, nor a function that Python calls.
struct NoMemory : std::bad_alloc {
  explicit NoMemory(int64_t asked) : bytes(asked) {}
  const int64_t bytes;
};

// Memory that only grows and keeps its address between calls of one shape. With `huge`, large blocks ask for huge
// pages: rows and products are read in no order, and pages of 4 kB cost a miss in the TLB each.
class Buffer {
 public:
  explicit Buffer(bool huge = false) : huge_(huge) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  void* reserve(int64_t bytes);  // throws NoMemory, and is empty then
  template <class T>
  T* at() const {
    return static_cast<T*>(memory_);
  }
  template <class T>
  T* room(int64_t count) {
    return static_cast<T*>(reserve(count * static_cast<int64_t>(sizeof(T))));
  }

  int64_t size() const { return size_; }  // bytes

  static bool poison;       // fill with NaN what is handed out: tests that nothing is read before it is written
  static int64_t failing;   // tests: so many growths from now on, one finds no memory; 0: none does

 private:
  void grow(int64_t bytes);
  const bool huge_;
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Asks for huge pages in a caller's new block, if it is so large that its pages are new as well (but for those of
// recemb_outputs.h): pages of 4 kB took as long to come as the rows that are written to them.
void ask_for_huge_pages(void* memory, int64_t bytes);

// 0 once `act` is done, or the bytes that it has found no room for.
template <class Act>
int64_t lacking(Act act) {
  try {
    act();
    return 0;
  } catch (const NoMemory& error) {
    return error.bytes;
  }
}

}  // namespace recemb
