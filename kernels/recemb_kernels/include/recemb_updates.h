// The updates of one backward. What a table's step is made of is looked at without Python: its rates and states are
// asked for again only where one of them is another object than it was.
#pragma once
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <vector>

#include "recemb_object.h"
#include "recemb_tree.h"
#include "recemb_watch.h"

namespace recemb {

// A table's update as Python has made it, and the settings and states that it was made of. Does not change: a thread
// may make another one while this one is read.
class Made {
 public:
  // `step` is (make, sources): what makes the update, and of each parameter that is stepped its optimizer and itself.
  explicit Made(PyObject* step) {
    PyObject* sources = PyTuple_GET_ITEM(step, 1);
    lasts_ = PyTuple_GET_SIZE(sources) > 0;
    // Before they are read: a thread may change them meanwhile.
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(sources) && lasts_; k++) note_settings(PyTuple_GET_ITEM(sources, k));
    const Object update(PyObject_CallNoArgs(PyTuple_GET_ITEM(step, 0)));
    rule_.optimizer = static_cast<int64_t>(number(update, "kind"));
    rule_.lr = number(update, "lr"), rule_.eps = number(update, "eps"), rule_.lr_decay = number(update, "lr_decay");
    rule_.beta1 = number(update, "beta1"), rule_.beta2 = number(update, "beta2");
    for (const char* name : {"state", "state2", "steps"}) {
      const Object given(PyObject_GetAttrString(update.at, name));
      tensors_.emplace_back(PySequence_Tuple(given.at));
    }
    // Once they are there, which that sees to.
    for (Source& source : sources_) {
      const std::optional<Object> state = state_of(source.optimizer.at, source.parameter.at);
      if (state) source.state.emplace(state->at);
      lasts_ = lasts_ && state;
    }
    if (!lasts_) sources_.clear();
  }

  const Rule& rule() const { return rule_; }
  // Its first states, second ones, and numbers of steps: each a tuple of tensors or None.
  PyObject* tensors(int which) const { return tensors_[which].at; }

  // Whether Python would make the same again. Sizes and places of states are not looked at.
  bool holds() const {
    if (!lasts_) return false;
    for (const Source& source : sources_) {
      const std::optional<Object> group = group_of(source.optimizer.at);
      if (!group || !source.settings.same(group->at)) return false;
      const std::optional<Object> state = state_of(source.optimizer.at, source.parameter.at);
      if (!state || !source.state->same(state->at)) return false;
    }
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    for (const Object& tuple : tensors_) Py_VISIT(tuple.at);
    for (const Source& source : sources_) {
      Py_VISIT(source.optimizer.at);
      Py_VISIT(source.parameter.at);
      for (const Entries* entries : {&source.settings, source.state ? &*source.state : nullptr}) {
        if (!entries) continue;
        Py_VISIT(entries->dict.at);
        for (const auto& [key, value] : entries->each) {
          Py_VISIT(key.at);
          Py_VISIT(value.at);
        }
      }
    }
    return 0;
  }

 private:
  // A dict, and what is in it. No other object can have the address of one that is held.
  struct Entries {
    Object dict;
    std::vector<std::pair<Object, Object>> each;
    explicit Entries(PyObject* of) : dict(Py_NewRef(of)) {
      Py_ssize_t at = 0;
      PyObject *key, *value;
      while (PyDict_Next(of, &at, &key, &value)) each.emplace_back(Py_NewRef(key), Py_NewRef(value));
    }
    bool same(PyObject* now) const {
      if (now != dict.at || PyDict_GET_SIZE(now) != static_cast<Py_ssize_t>(each.size())) return false;
      Py_ssize_t at = 0;
      PyObject *key, *value;
      for (size_t k = 0; PyDict_Next(now, &at, &key, &value); k++)
        if (key != each[k].first.at || value != each[k].second.at) return false;
      return true;
    }
  };
  struct Source {
    Object optimizer, parameter;
    Entries settings;
    std::optional<Entries> state;  // none before the update is made
  };

  static double number(const Object& of, const char* name) {
    const Object attribute(PyObject_GetAttrString(of.at, name));
    const double found = PyFloat_AsDouble(attribute.at);
    if (PyErr_Occurred()) throw python_error();
    return found;
  }

  // An optimizer's one group of settings.
  static std::optional<Object> group_of(PyObject* optimizer) {
    const Object groups = groups_of(optimizer);
    if (!PyList_CheckExact(groups.at) || PyList_GET_SIZE(groups.at) != 1) return {};
    Object group = item_of(groups, 0);
    if (!PyDict_CheckExact(group.at)) return {};
    return group;
  }

  static std::optional<Object> state_of(PyObject* optimizer, PyObject* parameter) {
    static PyObject* const name = PyUnicode_InternFromString("state");
    const Object states(PyObject_GetAttr(optimizer, name));
    if (!PyDict_Check(states.at)) return {};
    Py_ssize_t at = 0;
    PyObject *first, *found;
    // An optimizer in the backward mostly has one parameter, and to look a tensor up is to call Python.
    if (!PyDict_Next(states.at, &at, &first, &found) || first != parameter)
      found = PyDict_GetItemWithError(states.at, parameter);
    if (PyErr_Occurred()) throw python_error();
    if (!found || !PyDict_CheckExact(found)) return {};
    return Object(Py_NewRef(found));
  }

  // Whether a setting cannot change without being another object.
  static bool is_fixed(PyObject* value) {
    if (PyTuple_CheckExact(value)) {
      for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(value); k++)
        if (!is_fixed(PyTuple_GET_ITEM(value, k))) return false;
      return true;
    }
    return Py_IsNone(value) || PyBool_Check(value) || PyFloat_CheckExact(value) || PyLong_CheckExact(value) ||
           PyUnicode_CheckExact(value);
  }

  void note_settings(PyObject* source) {
    PyObject *const optimizer = PyTuple_GET_ITEM(source, 0), *const parameter = PyTuple_GET_ITEM(source, 1);
    const std::optional<Object> group = group_of(optimizer);
    lasts_ = group.has_value();
    if (!lasts_) return;
    sources_.push_back({Object(Py_NewRef(optimizer)), Object(Py_NewRef(parameter)), Entries(group->at), {}});
    for (const auto& [key, value] : sources_.back().settings.each) {
      const bool parameters = PyUnicode_Check(key.at) && PyUnicode_CompareWithASCIIString(key.at, "params") == 0;
      lasts_ = lasts_ && (parameters || is_fixed(value.at));
    }
  }

  Rule rule_{};
  std::vector<Object> tensors_;
  std::vector<Source> sources_;
  bool lasts_ = false;
};

// Per table what was made last, or null. Read and written with the GIL.
using LastMade = std::vector<std::shared_ptr<const Made>>;

// Rules, and pointers to the states of every parameter. Their objects are held, as the kernels write to the tensors in
// them.
struct Updates {
  std::vector<Rule> rules;
  std::vector<float*> state, state2, steps;
  LastMade held;
  bool readable = true;  // all of them

  Updates(Updates&&) = default;
  ~Updates() {
    pybind11::gil_scoped_acquire gil;
    held.clear();
  }

  // With the GIL. `counts` are the tables' numbers of parameters, `given` a tuple of their steps, or None.
  Updates(const std::vector<int64_t>& counts, const std::vector<char>& stepped, PyObject* given, LastMade* last,
          const std::vector<at::Tensor>& stored) {
    rules.resize(counts.size()), state.resize(stored.size()), state2.resize(stored.size()), steps.resize(stored.size());
    size_t at = 0;
    for (size_t t = 0; t < rules.size(); at += counts[t++]) {
      PyObject* step = PyTuple_GET_ITEM(given, t);
      if (Py_IsNone(step)) continue;
      std::shared_ptr<const Made> made = (*last)[t];
      if (!made || !made->holds()) {
        made = std::make_shared<const Made>(step);
        const std::shared_ptr<const Made> before = std::exchange((*last)[t], made);  // goes when that is done
      }
      rules[t] = made->rule();
      for (int64_t k = 0; k < counts[t]; k++)
        if (!stepped[at + k]) rules[t].left |= int64_t{1} << k;
      const at::Tensor* own = &stored[at];
      const bool row_wise = rules[t].optimizer == ROWWISE_ADAGRAD;
      const auto numbers = [&](Py_ssize_t k) { return row_wise ? own[k].size(0) : own[k].numel(); };
      place(made->tensors(0), &state[at], numbers), place(made->tensors(1), &state2[at], numbers);
      place(made->tensors(2), &steps[at], [](Py_ssize_t) { return 1; });
      held.push_back(std::move(made));
    }
  }

 private:
  // Their sizes too: whoever made the update has looked at these very tensors before, but not at what is in them now.
  template <class Numbers>
  void place(PyObject* tensors, float** to, Numbers numbers) {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tensors); k++) {
      PyObject* tensor = PyTuple_GET_ITEM(tensors, k);
      if (Py_IsNone(tensor)) continue;
      const at::Tensor& found = THPVariable_Unpack(tensor);
      readable = readable && found.scalar_type() == at::kFloat && found.is_contiguous() && found.numel() == numbers(k);
      if (readable) to[k] = found.mutable_data_ptr<float>();
    }
  }
};

}  // namespace recemb
