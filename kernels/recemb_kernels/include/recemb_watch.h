// Whether what was found out about some tables still holds: as `_now` in backends/native.py asks it, without its lists.
// A yes here is one there. A no may be one too many, and Python has the last word.
#pragma once
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include "recemb_object.h"

namespace recemb {

// A parameter as it was. With optimizers it is known itself, and they hold it; else a table may be lent another one.
struct Seen {
  PyObject *name, *itself;
  at::ScalarType type;
  std::vector<int64_t> shape;
  int64_t unaligned;
  bool contiguous, learns;
  std::vector<std::pair<PyObject*, std::vector<PyObject*>>> optimizers;  // each with copies of its groups of settings
};

struct SeenTable {
  std::vector<Seen> seen;
  std::vector<size_t> rates;  // as Rates has them
};

struct Watch {
  std::vector<SeenTable> tables;
  std::vector<std::pair<PyObject*, PyObject*>> hooks;  // a dict, and a key that stands in it
  int64_t aligned;
  bool training;
};

// The parameter's `_in_backward_optimizers`, or None; `known` is no when that is for Python to say.
inline Object attached(PyObject* parameter, bool* known) {
  static PyObject* const name = PyUnicode_InternFromString("_in_backward_optimizers");
  *known = THPVariable_CheckExact(parameter);
  if (!*known) return Object(Py_NewRef(Py_None));
  const Object attributes(PyObject_GenericGetDict(parameter, nullptr));
  PyObject* found = PyDict_GetItemWithError(attributes.at, name);
  *known = !PyErr_Occurred() && (!found || PyList_CheckExact(found));
  return Object(Py_NewRef(*known && found ? found : Py_None));
}

inline size_t count_of(const Object& list) { return Py_IsNone(list.at) ? 0 : PyList_GET_SIZE(list.at); }

// What is asked below may run code of others (settings that compare, properties, whatever the collector finalizes as
// something is made), which may take out of a list or dict all that it holds: so each entry is owned while it is read,
// and none is taken for there because it was.
inline Object item_of(const Object& list, size_t k) {
  return Object(Py_XNewRef(PyList_GetItem(list.at, static_cast<Py_ssize_t>(k))));
}

// Its list of settings.
inline Object groups_of(PyObject* optimizer) {
  static PyObject* const name = PyUnicode_InternFromString("param_groups");
  return Object(PyObject_GetAttr(optimizer, name));
}

// Settings as they are now, as `settings_of` in optim/state.py copies them: lists are changed in place.
inline Object copy_of(const Object& settings) {
  Object copy(PyDict_Copy(settings.at));
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(copy.at, &at, &key, &value)) {
    const bool parameters = PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "params") == 0;
    if (!PyList_CheckExact(value) || parameters) continue;
    const Object kept(PySequence_List(value));
    if (PyDict_SetItem(copy.at, key, kept.at)) throw python_error();
  }
  return copy;
}

inline PyObject* rate_of(PyObject* settings) {  // borrowed, or null
  static PyObject* const name = PyUnicode_InternFromString("lr");
  return PyDict_CheckExact(settings) ? PyDict_GetItemWithError(settings, name) : nullptr;
}

// Whether settings are as they were but for the learning rate, which a step reads anew.
inline bool same_settings(PyObject* before, PyObject* now) {
  if (!PyDict_CheckExact(now) || PyDict_GET_SIZE(now) != PyDict_GET_SIZE(before)) return false;
  Py_ssize_t at = 0, there = 0;
  PyObject *key, *value, *other, *found;
  while (PyDict_Next(before, &at, &key, &value)) {
    // In the same order, unless somebody has put them in another: to look each up takes longer than to see that.
    if (!PyDict_Next(now, &there, &other, &found) || other != key) found = PyDict_GetItemWithError(now, key);
    if (!found) return false;
    if (found == value || (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "lr") == 0)) continue;
    const Object held(Py_NewRef(found));
    if (PyObject_RichCompareBool(value, found, Py_EQ) != 1) return false;
  }
  return true;
}

// Which of a table's learning rates are equal; all of them have to be numbers.
struct Rates {
  std::vector<Object> rates;
  std::vector<size_t> first;  // per rate, the first one that is equal
  bool numbers = true;
  void add(PyObject* rate) {
    numbers = numbers && rate && (PyFloat_Check(rate) || PyLong_Check(rate));
    if (!numbers) return;
    rates.emplace_back(Py_NewRef(rate));
    size_t k = 0;
    while (rates[k].at != rate && PyObject_RichCompareBool(rates[k].at, rate, Py_EQ) != 1) k++;
    first.push_back(k);
  }
};

inline bool same(const Seen& seen, const Watch& watch, PyObject* name, PyObject* parameter, Rates* rates) {
  if (name != seen.name && PyUnicode_Compare(name, seen.name) != 0) return false;
  bool known;
  const Object optimizers = attached(parameter, &known);
  const size_t count = count_of(optimizers);
  if (!known || count != seen.optimizers.size() || (seen.itself && seen.itself != parameter)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(parameter);
  if (!tensor.is_cpu() || tensor.scalar_type() != seen.type || tensor.sizes() != at::IntArrayRef(seen.shape) ||
      tensor.is_contiguous() != seen.contiguous || tensor.requires_grad() != seen.learns ||
      reinterpret_cast<int64_t>(tensor.const_data_ptr()) % watch.aligned != seen.unaligned)
    return false;
  for (size_t k = 0; k < count; k++) {
    const auto& [optimizer, settings] = seen.optimizers[k];
    if (item_of(optimizers, k).at != optimizer) return false;
    const Object groups = groups_of(optimizer);
    if (!PyList_CheckExact(groups.at) || PyList_GET_SIZE(groups.at) != static_cast<Py_ssize_t>(settings.size()))
      return false;
    for (size_t g = 0; g < settings.size(); g++)
      if (!same_settings(settings[g], item_of(groups, g).at)) return false;
    rates->add(rate_of(item_of(groups, 0).at));
  }
  return true;
}

// The parameters of tables, given as a list of their dicts, when nothing has changed: a new list; else null.
inline PyObject* unchanged(const Watch& watch, PyObject* tables) {
  const size_t count = PyList_GET_SIZE(tables);
  if (at::GradMode::is_enabled() != watch.training || count != watch.tables.size()) return nullptr;
  for (const auto& [hooks, own] : watch.hooks)
    if (PySequence_Contains(hooks, own) != 1) return nullptr;
  Object stored(PyList_New(0));
  for (size_t t = 0; t < count; t++) {
    const SeenTable& table = watch.tables[t];
    Rates rates;
    Py_ssize_t at = 0;
    size_t k = 0;
    PyObject *name, *parameter;
    while (PyDict_Next(PyList_GET_ITEM(tables, t), &at, &name, &parameter)) {
      if (Py_IsNone(parameter)) continue;
      // Held first: what is asked may run code of others, and another thread may put in another parameter.
      if (k == table.seen.size() || PyList_Append(stored.at, parameter)) return nullptr;
      if (!same(table.seen[k++], watch, name, parameter, &rates)) return nullptr;
    }
    if (k != table.seen.size() || !rates.numbers || rates.first != table.rates) return nullptr;
  }
  return std::exchange(stored.at, nullptr);
}

// Takes note of tables, given as above, and of hooks, pairs of a dict and a key. All that it points to is appended to
// the list `held`: no parameter that no optimizer holds.
// False, or an error of Python's, when only Python can say what has changed of them.
inline bool watch(PyObject* tables, PyObject* hooks, int64_t aligned, PyObject* held, Watch* watch) {
  const auto hold = [&](PyObject* object) {
    if (PyList_Append(held, object)) throw python_error();
    return object;
  };
  *watch = {{}, {}, aligned, at::GradMode::is_enabled()};
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(hooks); k++) {
    PyObject* hook = hold(PyList_GET_ITEM(hooks, k));
    watch->hooks.emplace_back(PyTuple_GET_ITEM(hook, 0), PyTuple_GET_ITEM(hook, 1));
  }
  for (Py_ssize_t t = 0; t < PyList_GET_SIZE(tables); t++) {
    SeenTable table;
    Rates rates;
    Py_ssize_t at = 0;
    PyObject *name, *parameter;
    while (PyDict_Next(PyList_GET_ITEM(tables, t), &at, &name, &parameter)) {
      if (Py_IsNone(parameter)) continue;
      const Object own(Py_NewRef(parameter));
      PyObject* called = hold(name);
      bool known;
      const Object optimizers = attached(parameter, &known);
      if (!known) return false;
      const at::Tensor& tensor = THPVariable_Unpack(parameter);
      if (!tensor.is_cpu()) return false;
      Seen seen{called,
                count_of(optimizers) ? hold(parameter) : nullptr,
                tensor.scalar_type(),
                tensor.sizes().vec(),
                reinterpret_cast<int64_t>(tensor.const_data_ptr()) % aligned,
                tensor.is_contiguous(),
                tensor.requires_grad(),
                {}};
      for (size_t k = 0; k < count_of(optimizers); k++) {
        PyObject* optimizer = hold(item_of(optimizers, k).at);
        const Object groups = groups_of(optimizer);
        if (!PyList_CheckExact(groups.at) || !PyList_GET_SIZE(groups.at)) return false;
        std::vector<PyObject*> settings;
        for (size_t g = 0; g < count_of(groups); g++) {
          const Object group = item_of(groups, g);
          if (!PyDict_CheckExact(group.at)) return false;
          settings.push_back(hold(copy_of(group).at));
        }
        rates.add(rate_of(item_of(groups, 0).at));
        seen.optimizers.emplace_back(optimizer, std::move(settings));
      }
      table.seen.push_back(std::move(seen));
    }
    if (!rates.numbers) return false;
    table.rates = rates.first;
    watch->tables.push_back(std::move(table));
  }
  return true;
}

}  // namespace recemb
