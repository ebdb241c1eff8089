// A look-up that trains, as one node of torch's graph: from tensors to the driver and back without a line of Python
// between them, but for what a step reads of its optimizers. What it does is what lookup.py's `_Pool` does.
#define AT_PER_OPERATOR_HEADERS  // else torch's headers declare all its operators, a seventh of the time
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>

#include "recemb_step.h"

using namespace recemb;
namespace autograd = torch::autograd;

namespace {

// Parameters with a fused update are no inputs of it: their change in the backward is not taken for a mistake.
class Pooled : public autograd::Node {
 public:
  Pooled(Lookup* lookup, std::vector<Tensor> stored, Batch batch, State state)
      : lookup_(lookup), stored_(std::move(stored)), batch_(std::move(batch)), state_(std::move(state)) {
    Py_INCREF(lookup_);
  }
  ~Pooled() override {
    state_.give();  // before what it belongs to
    if (!Py_IsInitialized()) return;
    pybind11::gil_scoped_acquire gil;
    Py_DECREF(lookup_);
  }

  std::string name() const override { return "PooledLookup"; }

  void compiled_args(autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "compiled autograd cannot go back through a look-up of recemb that was made outside "
                                "of it; enable it around the forward as well");
  }

  // What was computed, for inputs (weights, then the parameters whose gradients are wanted).
  Tensor run(const Tensor& weights, bool prepared) {
    const Fixed& fixed = *lookup_->fixed;
    autograd::variable_list inputs{weights};
    for (size_t k = 0; k < stored_.size(); k++)
      if (fixed.wanted[k]) inputs.push_back(stored_[k]);
    versions_ = versions(), kinds_ = kinds();
    Tensor out;
    {
      pybind11::gil_scoped_release release;
      out = forward(lookup_, stored_, batch_, state_.at(), true, prepared);
    }
    set_next_edges(autograd::collect_next_edges(inputs));
    // Read again in the backward: autograd then complains when one was changed in place.
    for (const Tensor& tensor : {batch_.ids, batch_.offsets, batch_.weights})
      if (tensor.defined()) saved_.emplace_back(tensor, false);
    for (size_t k = 1; k < inputs.size(); k++) saved_.emplace_back(inputs[k], false);
    return out;
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    autograd::variable_list saved;
    for (const autograd::SavedVariable& tensor : saved_) saved.push_back(tensor.unpack());
    autograd::variable_list made;
    {
      at::NoGradGuard none;
      made = step(grads[0]);
    }
    return at::GradMode::is_enabled() ? once(std::move(made), grads[0], saved) : made;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (autograd::SavedVariable& tensor : saved_) tensor.reset_data();
    state_.give();
    stored_.clear(), batch_ = {};
  }

 private:
  autograd::variable_list step(const Tensor& given) {
    const Fixed& fixed = *lookup_->fixed;
    if (kinds_ != kinds()) raise(lookup_, CHANGED, batch_);
    const Updates updates = with_python(
        [&] { return Updates(fixed.parameters, fixed.stepped, lookup_->steps, &lookup_->fixed->made, stored_); });
    if (!updates.readable) raise(lookup_, CHANGED, batch_);
    if (versions_ != versions())  // A step has been taken since: its products belong to weights that are gone.
      forward(lookup_, stored_, batch_, state_.at(), true, false);
    Tensor grad = given;
    if (!grad.defined())
      grad = room(lookup_, batch_, [&] { return at::zeros({batch_.size, fixed.call.columns}, at::kFloat); });
    if (grad.layout() != at::kStrided) grad = grad.to_dense();
    // torch's engine has seen to that, but nobody where this node is called by itself.
    TORCH_CHECK(grad.is_cpu() && grad.sizes() == at::IntArrayRef({batch_.size, fixed.call.columns}),
                "a look-up of shape [", batch_.size, ", ", fixed.call.columns, "] was given a gradient of shape ",
                grad.sizes(), " on ", grad.device(), "; no weight has changed");
    grad = grad.contiguous().resolve_neg();
    const std::vector<float*> parameters = pointers(stored_);
    Call call = call_of(fixed, batch_, parameters);
    call.keep = 1, call.grad_out = grad.const_data_ptr<float>();
    autograd::variable_list made(1);
    if (should_compute_output(0)) {
      made[0] = room(lookup_, batch_, [&] { return floats({batch_.ids.numel()}); });
      call.grad_weights = made[0].mutable_data_ptr<float>();
    }
    std::vector<float*> written(parameters.size());
    for (size_t k = 0; k < stored_.size(); k++)
      if (fixed.wanted[k]) {
        made.push_back(room(lookup_, batch_, [&] { return at::zeros_like(stored_[k]); }));
        written[k] = made.back().mutable_data_ptr<float>();
      }
    call.rules = updates.rules.data(), call.grad = written.data();
    call.state = updates.state.data(), call.state2 = updates.state2.data(), call.steps = updates.steps.data();
    const int64_t lacks = fixed.driver.backward(&call, state_.at(), at::get_num_threads());
    if (lacks > 0) made.clear(), Outputs::shared().release();
    if (lacks) raise(lookup_, lacks < 0 ? NOT_FINITE : lacks, batch_);
    for (size_t k = 0; k < stored_.size(); k++)
      if (fixed.stepped[k]) stored_[k].unsafeGetTensorImpl()->bump_version();
    return made;
  }

  std::vector<int64_t> versions() const {
    std::vector<int64_t> found;
    for (size_t k = 0; k < stored_.size(); k++)
      if (lookup_->fixed->stepped[k]) found.push_back(stored_[k]._version());
    return found;
  }

  // Type, shape and layout of the parameters, which can be changed past autograd.
  std::vector<std::tuple<at::ScalarType, at::DimVector, bool>> kinds() const {
    std::vector<std::tuple<at::ScalarType, at::DimVector, bool>> found;
    for (const Tensor& tensor : stored_)
      found.emplace_back(tensor.scalar_type(), tensor.sizes(), tensor.is_contiguous());
    return found;
  }

  // Gradients that hang on their inputs, and cannot be differentiated.
  autograd::variable_list once(autograd::variable_list made, const Tensor& grad, const autograd::variable_list& saved) {
    const auto list = [](const autograd::variable_list& tensors) {
      Object all(PyList_New(0));
      for (const Tensor& tensor : tensors) {
        const Object wrapped(THPVariable_Wrap(tensor));
        if (PyList_Append(all.at, wrapped.at)) throw python_error();
      }
      return all;
    };
    autograd::variable_list others = saved;
    others.push_back(grad);
    with_python([&] {
      const Object result(PyObject_CallFunctionObjArgs(lookup_->once, list(made).at, list(others).at, nullptr));
      for (size_t k = 0; k < made.size(); k++) {
        const Object guarded(PySequence_GetItem(result.at, static_cast<Py_ssize_t>(k)));
        made[k] = Py_IsNone(guarded.at) ? Tensor() : THPVariable_Unpack(guarded.at);
      }
    });
    return made;
  }

  Lookup* lookup_;
  std::vector<Tensor> stored_;
  Batch batch_;
  State state_;
  std::vector<int64_t> versions_;
  std::vector<std::tuple<at::ScalarType, at::DimVector, bool>> kinds_;
  std::vector<autograd::SavedVariable> saved_;
};

Tensor tensor_of(PyObject* given) { return Py_IsNone(given) ? Tensor() : THPVariable_Unpack(given); }

// Pools a batch in parameters, a list of Python's; `prepared` is a state, or null.
PyObject* pooled(Lookup* lookup, PyObject* list, const Tensor& ids, const Tensor& offsets, const Tensor& weights,
                 int64_t samples, void* prepared) {
  const Fixed& fixed = *lookup->fixed;
  std::vector<Tensor> stored;
  stored.reserve(fixed.wanted.size());
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(list); k++) stored.push_back(tensor_of(PyList_GET_ITEM(list, k)));
  TORCH_CHECK(stored.size() == fixed.wanted.size(), "a look-up of ", fixed.wanted.size(), " parameters was given ",
              stored.size());
  State state(&fixed, prepared ? prepared : fixed.driver.take(fixed.pool));
  Batch batch{ids.contiguous(), offsets.contiguous(),
              weights.defined() ? weights.detach().contiguous().resolve_neg() : weights, samples};
  if (!state.at()) raise(lookup, sizeof(Call), batch);
  // As of torch's own functions in Python that have no jvp.
  bool forward_mode = weights.defined() && weights._fw_grad(0).defined();
  for (size_t k = 0; k < stored.size(); k++) forward_mode = forward_mode || stored[k]._fw_grad(0).defined();
  TORCH_CHECK_NOT_IMPLEMENTED(!forward_mode, "a look-up has no forward-mode derivative");
  bool learns = weights.defined() && weights.requires_grad();
  for (size_t k = 0; k < stored.size(); k++) learns = learns || fixed.wanted[k] || fixed.stepped[k];
  Tensor out;
  if (learns && at::GradMode::is_enabled()) {
    auto node = c10::make_intrusive<Pooled>(lookup, std::move(stored), std::move(batch), std::move(state));
    out = node->run(weights, prepared != nullptr);
    autograd::set_history(out, node);
  } else {
    pybind11::gil_scoped_release release;
    out = forward(lookup, stored, batch, state.at(), false, prepared != nullptr);
  }
  return THPVariable_Wrap(out);
}

// look_up(stored, ids, offsets, weights, samples, prepared): `prepared` is a state's address, or 0.
PyObject* look_up(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 6 && PyList_CheckExact(arguments[0]), "look_up takes 6 arguments, the first one a list");
  return pooled(reinterpret_cast<Lookup*>(self), arguments[0], tensor_of(arguments[1]), tensor_of(arguments[2]),
                tensor_of(arguments[3]), PyLong_AsLongLong(arguments[4]), PyLong_AsVoidPtr(arguments[5]));
  END_HANDLE_TH_ERRORS
}

// Where Python is to say what is wrong. An interrupt is no one's to catch.
PyObject* for_python() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
  PyErr_Clear();
  Py_RETURN_NONE;
}

// What is asked of Python, or nothing when that is an error.
template <class Ask>
auto asked(Ask ask) -> decltype(ask()) {
  try {
    return ask();
  } catch (python_error&) {
    return {};
  }
}

template <class Function>
PyCFunction method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// What `pool` looks up, from attributes of Bags: false when that is for Python.
bool read_bags(const Front& front, PyObject* bags, Tensor* ids, Tensor* offsets, Tensor* weights) {
  enum { REFUSED, HANDED, AHEAD, SPLIT, IDS, OFFSETS, WEIGHTS, CHECKED, FEATURES };
  static const auto names = [] {
    std::vector<PyObject*> found;
    for (const char* name :
         {"refused", "handed", "ahead", "split", "ids", "offsets", "weights", "checked", "num_features"})
      found.push_back(PyUnicode_InternFromString(name));
    return found;
  }();
  const auto attribute = [&](int k) { return Object(PyObject_GetAttr(bags, names[k])); };
  if (Py_TYPE(bags) != front.bags) return false;
  for (const int k : {REFUSED, HANDED, AHEAD, SPLIT})
    if (!Py_IsNone(attribute(k).at)) return false;
  for (const auto& [k, tensor] : {std::pair<int, Tensor*>(IDS, ids), {OFFSETS, offsets}, {WEIGHTS, weights}}) {
    const Object given = attribute(k);
    if (THPVariable_CheckExact(given.at))
      *tensor = THPVariable_Unpack(given.at);
    else if (k != WEIGHTS || !Py_IsNone(given.at))
      return false;
  }
  const int64_t features = static_cast<int64_t>(front.features.size());
  if (PyLong_AsLongLong(attribute(FEATURES).at) != features) return false;
  return Py_IsTrue(attribute(CHECKED).at) ? !weights->defined() || weights->scalar_type() == at::kFloat
                                          : is_valid(front.check, *ids, *offsets, *weights, features, front.limits);
}

constexpr const char* FRONT = "recemb_step.Front";

// pool(tables, bags): a whole look-up, or None where it is not to be had, or not right, without Python. Of a tuple
// (capsule of a Front, Lookup, what the front points to).
PyObject* pool(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2, "pool takes tables and bags");
  const Front& front = *static_cast<Front*>(PyCapsule_GetPointer(PyTuple_GET_ITEM(self, 0), FRONT));
  Lookup* lookup = reinterpret_cast<Lookup*>(PyTuple_GET_ITEM(self, 1));
  PyObject* found = asked([&]() -> PyObject* {
    return lookup->seen && !autograd_is_compiled() ? served(front, lookup->fixed->watch, arguments[0]) : nullptr;
  });
  if (!found) return for_python();
  const Object stored(found);
  Tensor ids, offsets, weights;
  if (!asked([&] { return read_bags(front, arguments[1], &ids, &offsets, &weights); })) return for_python();
  const int64_t bags = (offsets.numel() - 1) / static_cast<int64_t>(front.features.size());
  return pooled(lookup, stored.at, ids, offsets, weights, bags, nullptr);
  END_HANDLE_TH_ERRORS
}

PyMethodDef pool_method = {"pool", method(pool), METH_FASTCALL, nullptr};

// serve((type of tables, type of bags), features, owners, check, (address, limits)): makes a `pool`. `features` are
// pairs of a table's name and a weak reference to it, `owners` are weak references.
PyObject* serve(PyObject* self, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject *tables, *bags, *features, *owners, *held;
  unsigned long long check, limits;
  if (!PyArg_ParseTuple(arguments, "(O!O!)O!O!K(KO)", &PyType_Type, &tables, &PyType_Type, &bags, &PyList_Type,
                        &features, &PyList_Type, &owners, &check, &limits, &held))
    return nullptr;
  auto front = std::make_unique<Front>(
      Front{reinterpret_cast<PyTypeObject*>(tables), reinterpret_cast<PyTypeObject*>(bags), {}, {},
            reinterpret_cast<Check>(check), reinterpret_cast<const int64_t*>(limits)});
  for (Py_ssize_t f = 0; f < PyList_GET_SIZE(features); f++) {
    PyObject* feature = PyList_GET_ITEM(features, f);
    front->features.emplace_back(PyTuple_GET_ITEM(feature, 0), PyTuple_GET_ITEM(feature, 1));
  }
  for (Py_ssize_t t = 0; t < PyList_GET_SIZE(owners); t++) front->owners.push_back(PyList_GET_ITEM(owners, t));
  const Object capsule(PyCapsule_New(front.get(), FRONT, [](PyObject* dropped) {
    delete static_cast<Front*>(PyCapsule_GetPointer(dropped, FRONT));
  }));
  front.release();
  // Nothing of it changes: other engines of these tables, in other threads too, have others.
  const Object behind(PyTuple_Pack(3, capsule.at, self, arguments));
  return PyCFunction_New(&pool_method, behind.at);
  END_HANDLE_TH_ERRORS
}

// watch(tables, hooks, aligned): notes how the parameters of tables, each a dict, and their optimizers' hooks are.
PyObject* watch_tables(PyObject* self, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Lookup* lookup = reinterpret_cast<Lookup*>(self);
  // Another thread may be reading what it points to.
  TORCH_CHECK(!lookup->seen, "a look-up's tables are noted once");
  Object held(PyList_New(0));
  if (watch(arguments[0], arguments[1], PyLong_AsLongLong(arguments[2]), held.at, &lookup->fixed->watch))
    lookup->seen = std::exchange(held.at, nullptr);
  if (PyErr_Occurred()) throw python_error();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// unchanged(tables): their parameters, in a list, when all is as it was at `watch`; else None.
PyObject* unchanged_tables(PyObject* self, PyObject* tables) {
  HANDLE_TH_ERRORS
  const Lookup* lookup = reinterpret_cast<Lookup*>(self);
  PyObject* stored = asked([&] { return lookup->seen ? unchanged(lookup->fixed->watch, tables) : nullptr; });
  return stored ? stored : for_python();
  END_HANDLE_TH_ERRORS
}

// bags_are_valid(check, ids, offsets, weights, features, limits): recemb_kernels/check.py's, of what can be read here.
PyObject* bags_are_valid(PyObject*, PyObject* const* arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const auto check = reinterpret_cast<Check>(PyLong_AsVoidPtr(arguments[0]));
  const int64_t features = PyLong_AsLongLong(arguments[4]);
  const auto limits = static_cast<const int64_t*>(PyLong_AsVoidPtr(arguments[5]));
  for (const int k : {1, 2, 3})
    if (!THPVariable_CheckExact(arguments[k]) && !(k == 3 && Py_IsNone(arguments[k]))) Py_RETURN_FALSE;
  return PyBool_FromLong(is_valid(check, tensor_of(arguments[1]), tensor_of(arguments[2]), tensor_of(arguments[3]),
                                  features, limits));
  END_HANDLE_TH_ERRORS
}

std::vector<char> flags_of(PyObject* list) {
  std::vector<char> found;
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(list); k++) found.push_back(PyObject_IsTrue(PyList_GET_ITEM(list, k)) > 0);
  return found;
}

// Lookup((call, pool, take, give, forward, backward), parameters, stepped, wanted, group, steps, error, once):
// addresses of the driver's, and per table, or per parameter, what is fixed.
PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  unsigned long long at[6];
  PyObject *parameters, *stepped, *wanted, *group, *steps, *error, *once;
  if (!PyArg_ParseTuple(arguments, "(KKKKKK)O!O!O!OO!OO", at, at + 1, at + 2, at + 3, at + 4, at + 5, &PyList_Type,
                        &parameters, &PyList_Type, &stepped, &PyList_Type, &wanted, &group, &PyTuple_Type, &steps,
                        &error, &once))
    return nullptr;
  auto fixed = std::make_unique<Fixed>();
  fixed->call = *reinterpret_cast<const Call*>(at[0]);
  fixed->pool = reinterpret_cast<void*>(at[1]);
  fixed->driver = {reinterpret_cast<decltype(Driver::take)>(at[2]), reinterpret_cast<decltype(Driver::give)>(at[3]),
                   reinterpret_cast<decltype(Driver::forward)>(at[4]),
                   reinterpret_cast<decltype(Driver::backward)>(at[5])};
  for (Py_ssize_t t = 0; t < PyList_GET_SIZE(parameters); t++)
    fixed->parameters.push_back(PyLong_AsLongLong(PyList_GET_ITEM(parameters, t)));
  fixed->stepped = flags_of(stepped), fixed->wanted = flags_of(wanted);
  fixed->made.resize(fixed->parameters.size());
  Lookup* lookup = reinterpret_cast<Lookup*>(type->tp_alloc(type, 0));
  if (!lookup) return nullptr;
  lookup->fixed = fixed.release();
  lookup->group = Py_NewRef(group), lookup->steps = Py_NewRef(steps);
  lookup->error = Py_NewRef(error), lookup->once = Py_NewRef(once);
  return reinterpret_cast<PyObject*>(lookup);
  END_HANDLE_TH_ERRORS
}

std::array<PyObject*, 5> held_by(const Lookup* lookup) {
  return {lookup->group, lookup->steps, lookup->error, lookup->once, lookup->seen};
}

// No tp_clear: what it holds is fixed, or dicts that can be cleared: in any circle there is something else to clear.
int traverse(PyObject* self, visitproc visit, void* arg) {
  Lookup* lookup = reinterpret_cast<Lookup*>(self);
  Py_VISIT(Py_TYPE(self));
  for (PyObject* held : held_by(lookup)) Py_VISIT(held);
  for (const auto& made : lookup->fixed->made)
    if (const int stop = made ? made->visit(visit, arg) : 0) return stop;
  return 0;
}

void dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  PyTypeObject* type = Py_TYPE(self);
  const Lookup* lookup = reinterpret_cast<Lookup*>(self);
  for (PyObject* held : held_by(lookup)) Py_XDECREF(held);
  delete lookup->fixed;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {{"look_up", method(look_up), METH_FASTCALL, nullptr},
                         {"watch", method(watch_tables), METH_FASTCALL, nullptr},
                         {"unchanged", unchanged_tables, METH_O, nullptr},
                         {"serve", serve, METH_VARARGS, nullptr},
                         {}};
PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                       {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
                       {Py_tp_methods, methods},
                       {}};
PyType_Spec spec = {"recemb_step.Lookup", sizeof(Lookup), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};
PyMethodDef functions[] = {{"bags_are_valid", method(bags_are_valid), METH_FASTCALL, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "recemb_step", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" PyObject* recemb_step_module() {
  PyObject* made = PyModule_Create(&module);
  PyObject* type = made ? PyType_FromSpec(&spec) : nullptr;
  if (type && PyModule_AddObject(made, "Lookup", type) == 0) return made;
  Py_XDECREF(type);
  Py_XDECREF(made);
  return nullptr;
}
