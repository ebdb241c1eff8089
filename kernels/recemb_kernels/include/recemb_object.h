// A reference to an object of Python's that is owned: to be made, and dropped, with the GIL.
#pragma once
#include <Python.h>
#include <torch/csrc/Exceptions.h>

#include <utility>

namespace recemb {

struct Object {
  PyObject* at;
  explicit Object(PyObject* made) : at(made) {
    if (!at) throw python_error();  // Python has set it
  }
  Object(Object&& other) noexcept : at(std::exchange(other.at, nullptr)) {}
  ~Object() { Py_XDECREF(at); }
};

// Calls Python from a thread of torch's engine, where an error outlives the GIL.
template <class Work>
auto with_python(Work work) {
  pybind11::gil_scoped_acquire gil;
  try {
    return work();
  } catch (python_error& error) {
    error.persist();
    throw;
  }
}

}  // namespace recemb
