// A whole look-up of an engine in one call: what `Engine` in engine.py and `pooled_native` in backends/native.py do
// with a batch that nothing is to be said about. Whatever is not as it was, or not for these kernels, is for Python.
#pragma once
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/Parallel.h>

#include <limits>

#include "recemb_watch.h"

namespace recemb {

using at::Tensor;

// check.cpp's.
using Check = int64_t (*)(const int64_t*, const int64_t*, const float*, int64_t, int64_t, int64_t, const int64_t*,
                          int64_t);

// Where the tables of an engine are found, and what its batches are. Whoever has it keeps the objects.
struct Front {
  PyTypeObject *tables, *bags;  // dict or nn.ModuleDict; Bags
  std::vector<std::pair<PyObject*, PyObject*>> features;  // of each its table's name, and a weak reference to it
  std::vector<PyObject*> owners;                          // weak references to the owner of each storage
  Check check;
  const int64_t* limits;
};

// The arguments of recemb_tree_check, as far as a batch can be read here.
inline bool is_valid(Check check, const Tensor& ids, const Tensor& offsets, const Tensor& weights, int64_t features,
                     const int64_t* limits) {
  const auto reads = [](const Tensor& given, at::ScalarType type) {
    return given.is_cpu() && given.scalar_type() == type && given.dim() == 1 && given.is_contiguous();
  };
  if (!reads(ids, at::kLong) || !reads(offsets, at::kLong)) return false;
  const int64_t count = ids.numel(), bags = offsets.numel() - 1;
  if (!features || bags < 0 || bags % features || std::max(count, bags + 1) > std::numeric_limits<int32_t>::max())
    return false;
  if (weights.defined() && !(reads(weights, at::kFloat) && weights.numel() == count)) return false;
  pybind11::gil_scoped_release release;
  return !check(ids.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(),
                weights.defined() ? weights.const_data_ptr<float>() : nullptr, count, features, bags / features, limits,
                at::get_num_threads());
}

// An entry of the dict of a module's attributes, borrowed; null when there is none.
inline PyObject* entry_of(PyObject* module, PyObject* name) {
  const Object attributes(PyObject_GenericGetDict(module, nullptr));
  return PyDict_GetItemWithError(attributes.at, name);
}

// The parameters of the tables, in a new list, when they are those of before and nothing has changed of them.
inline PyObject* served(const Front& front, const Watch& watch, PyObject* tables) {
  static PyObject *const modules = PyUnicode_InternFromString("_modules"),
                  *const parameters = PyUnicode_InternFromString("_parameters");
  if (Py_TYPE(tables) != front.tables) return nullptr;
  PyObject* named = PyDict_CheckExact(tables) ? tables : entry_of(tables, modules);
  if (!named || !PyDict_CheckExact(named)) return nullptr;
  for (const auto& [name, table] : front.features) {
    PyObject* found = PyDict_GetItemWithError(named, name);
    // None is what a table that is gone would be taken for.
    if (!found || Py_IsNone(found) || found != PyWeakref_GET_OBJECT(table)) return nullptr;
  }
  const Object owned(PyList_New(0));
  for (PyObject* owner : front.owners) {
    const Object module(Py_NewRef(PyWeakref_GET_OBJECT(owner)));
    PyObject* own = Py_IsNone(module.at) ? nullptr : entry_of(module.at, parameters);
    if (!own || !PyDict_CheckExact(own) || PyList_Append(owned.at, own)) return nullptr;
  }
  return unchanged(watch, owned.at);
}

// Whether backwards are compiled: `_autograd_is_compiled` in lookup.py.
inline bool autograd_is_compiled() {
  static PyObject* const name = PyUnicode_InternFromString("torch._dynamo.compiled_autograd");
  PyObject* module = PyDict_GetItemWithError(PyImport_GetModuleDict(), name);
  if (!module) return false;
  const Object enabled(PyObject_GetAttrString(module, "compiled_autograd_enabled"));
  return PyObject_IsTrue(enabled.at) != 0;
}

}  // namespace recemb
