// One look-up of tables from tensors to the driver, and what a step of its tables reads of Python.
#pragma once
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/Parallel.h>

#include "recemb_front.h"
#include "recemb_object.h"
#include "recemb_outputs.h"
#include "recemb_tree.h"
#include "recemb_updates.h"
#include "recemb_watch.h"

namespace recemb {

using at::Tensor;

// driver.cpp's.
struct Driver {
  void* (*take)(void* pool);
  void (*give)(void* pool, void* state);
  int64_t (*forward)(Call*, void* state, int64_t threads, int64_t prepared);
  int64_t (*backward)(Call*, void* state, int64_t threads);
};

// What is fixed of a look-up's tables.
struct Fixed {
  Call call;  // without a batch
  Driver driver;
  void* pool;
  std::vector<int64_t> parameters;    // of each table
  std::vector<char> stepped, wanted;  // per parameter
  Watch watch;
  LastMade made;
};

// The Python object. `error` makes what is raised from (what lacks, ids, samples); `steps` gives, per table, what its
// update is made of, as Made has it, or None; `once` guards gradients that no one may differentiate; `group` keeps pool
// and tables, and `seen`, none at first, what is watched.
struct Lookup {
  PyObject_HEAD
  Fixed* fixed;
  PyObject *group, *steps, *error, *once, *seen;
};

// As `Group.error` reads them; else the bytes that there is no room for.
constexpr int64_t NO_TENSOR = 0, NOT_FINITE = -1, CHANGED = -2;

struct Batch {
  Tensor ids, offsets, weights;  // weights undefined where there are none
  int64_t size;
};

[[noreturn]] inline void raise(const Lookup* lookup, int64_t lacks, const Batch& batch) {
  pybind11::gil_scoped_acquire gil;
  const Object error(PyObject_CallFunction(lookup->error, "LLL", lacks, batch.ids.numel(), batch.size));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.at)), error.at);
  python_error raised;
  raised.persist();
  throw std::move(raised);
}

// A tensor for the caller, of rows or of gradients.
template <class Make>
Tensor room(const Lookup* lookup, const Batch& batch, Make make) {
  // Memory is short where torch's allocator throws, which has no other error.
  for (const bool again : {false, true}) {
    try {
      return make();
    } catch (const c10::Error&) {
      if (!again) Outputs::shared().release();
    }
  }
  raise(lookup, NO_TENSOR, batch);
}

// Memory of the driver for one look-up and its backward.
class State {
 public:
  State(const Fixed* fixed, void* at) : fixed_(fixed), at_(at) {}
  State(State&& other) noexcept : fixed_(other.fixed_), at_(std::exchange(other.at_, nullptr)) {}
  ~State() { give(); }
  void* at() const { return at_; }
  void give() {
    if (at_) fixed_->driver.give(fixed_->pool, std::exchange(at_, nullptr));
  }

 private:
  const Fixed* fixed_;
  void* at_;
};

inline std::vector<float*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<float*> found;
  found.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    // Of whatever type; where that is known, torch asks this itself.
    TORCH_CHECK(tensor.unsafeGetTensorImpl()->storage_initialized(), "the memory of a parameter of shape ",
                tensor.sizes(), " has been given away, as sharding modules do between steps; no weight has changed");
    found.push_back(static_cast<float*>(tensor.mutable_data_ptr()));
  }
  return found;
}

inline Call call_of(const Fixed& fixed, const Batch& batch, const std::vector<float*>& parameters) {
  Call call = fixed.call;
  call.param = parameters.data();
  call.batch = batch.size, call.num_ids = batch.ids.numel();
  call.ids = batch.ids.const_data_ptr<int64_t>(), call.offsets = batch.offsets.const_data_ptr<int64_t>();
  call.weights = batch.weights.defined() ? batch.weights.const_data_ptr<float>() : nullptr;
  return call;
}

inline Tensor forward(const Lookup* lookup, const std::vector<Tensor>& stored, const Batch& batch, void* state,
                      bool keep, bool prepared) {
  const Fixed& fixed = *lookup->fixed;
  Tensor out = room(lookup, batch, [&] { return floats({batch.size, fixed.call.columns}); });
  const std::vector<float*> parameters = pointers(stored);
  Call call = call_of(fixed, batch, parameters);
  call.out = out.mutable_data_ptr<float>(), call.keep = keep;
  if (const int64_t lacks = fixed.driver.forward(&call, state, at::get_num_threads(), prepared)) {
    // A smaller batch may have its memory.
    out.reset();
    Outputs::shared().release();
    raise(lookup, lacks, batch);
  }
  return out;
}

}  // namespace recemb
