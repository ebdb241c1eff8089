// The table-independent part of a look-up: plans the batch, opens one parallel region for all tables,
// and hands each to the kernel compiled for it, on all threads or within its owner's own region.
#include <omp.h>
#include <pthread.h>
#include <strings.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "recemb_bags.h"
#include "recemb_owners.h"
#include "recemb_parts.h"
#include "recemb_plan.h"
#include "recemb_share.h"
#include "recemb_tree.h"

using namespace recemb;

namespace {

// Below this many ids a second thread costs more than it saves, unless each has so many multiply-adds of products: the
// most that it costs where cores are far apart is a tenth then, it saves a fifth where they are near.
constexpr int64_t SERIAL = 512;
constexpr double PRODUCTS = 1 << 16;

// Everything a call holds from its forward to its backward; kept for the next call of the same tables.
struct State {
  PlanRoom plan;
  Owners owners;
  Buffer bags, shares, slots, kept{true}, spare{true}, own;
  Buffer tables, features, gradient;  // of the group
  bool known = false, means = false, reserved = false, one_hot = false;
  bool complete = false;  // the backward's plans are there too
  Alone alone;
  State* next = nullptr;  // at rest
};

// States at rest, for the next look-up of the same tables, on whatever thread. Lives until its owner and all that have
// taken a state are done: Python may finalize them in any order.
struct Pool {
  State* first = nullptr;
  int64_t users = 1;
};

// Of all pools, and free in a child that is forked while another thread holds it.
std::mutex pools;
const int forks = pthread_atfork([] { pools.lock(); }, [] { pools.unlock(); }, [] { pools.unlock(); });

// Gives a state back, when there is one, and leaves the pool.
void leave(Pool* pool, State* state) {
  {
    const std::lock_guard<std::mutex> held(pools);
    if (state) state->next = pool->first, pool->first = state;
    if (--pool->users) return;
  }
  while ((state = pool->first)) pool->first = state->next, delete state;
  delete pool;
}

// Whether threads that wait are put to sleep: to wake them takes longer than such products.
bool threads_sleep() {
  const char* policy = std::getenv("OMP_WAIT_POLICY");
  return policy && strcasecmp(policy, "passive") == 0;
}

int threads_for(const Call* call, int64_t threads) {
  static const bool sleep = threads_sleep();
  if (call->num_ids >= SERIAL) return static_cast<int>(threads);
  double products = 0;
  for (int64_t f = 0; f < call->num_features && !sleep; f++) {
    const double* cost = call->codes[call->features[f].table].product_cost[0];
    const int64_t *offsets = call->offsets + f * call->batch, ids = offsets[call->batch] - offsets[0];
    products += static_cast<double>(ids) * *std::max_element(cost, cost + MAX_ORDER);
  }
  return static_cast<int>(products < PRODUCTS * static_cast<double>(threads) ? 1 : threads);
}

// What a state keeps of its group.
void know(const Call* call, State* state) {
  Table* tables = state->tables.room<Table>(call->num_tables);
  int64_t* feature = state->features.room<int64_t>(call->num_features);
  state->gradient.room<Gradient>(call->num_features);
  state->owners.know(call->num_tables);
  for (int64_t t = 0; t < call->num_tables; t++) {
    tables[t] = {};
    tables[t].parts = 1;
    tables[t].features = feature;
    for (int64_t f = 0; f < call->num_features; f++)
      if (call->features[f].table == t) *feature++ = f;
    tables[t].num_features = feature - tables[t].features;
    for (int64_t k = 0; k < tables[t].num_features; k++)
      tables[t].adds = tables[t].adds || call->features[tables[t].features[k]].adds;
  }
  for (int64_t f = 0; f < call->num_features; f++) state->means = state->means || call->features[f].mean;
  state->known = true;
}

// Points the call and its tables at the state and at this call's parameters.
void attach(Call* call, State* state, int threads) {
  call->tables = state->tables.at<Table>(), call->gradient = state->gradient.at<Gradient>();
  call->bag = state->one_hot ? nullptr : state->bags.at<int32_t>();
  call->slot = state->one_hot ? nullptr : state->slots.at<int32_t>();
  call->share = state->one_hot || !state->means ? nullptr : state->shares.at<float>();
  call->own_stride = 0;
  int64_t at = 0;
  for (int64_t t = 0; t < call->num_tables; t++) {
    Table& table = call->tables[t];
    table.code = call->codes + t, table.order = table.code->order;
    call->own_stride = std::max({call->own_stride, table.code->kernel.own, table.code->mirror.own});
    table.param = call->param + at;
    table.optimizer = GRADIENT, table.left = 0;
    if (call->rules) {
      table.grad = call->grad + at, table.state = call->state + at, table.state2 = call->state2 + at;
      table.optimizer = call->rules[t].optimizer, table.left = call->rules[t].left;
    }
    for (int64_t k = 0; k < table.code->parameters && table.optimizer != GRADIENT; k++) {
      const Rule& rule = call->rules[t];
      const double step = call->steps[at + k] ? *call->steps[at + k] + 1 : 1;
      table.hyper[k] = hyper_at(rule.optimizer, step, rule.lr, rule.eps, rule.beta1, rule.beta2, rule.lr_decay);
    }
    at += table.code->parameters;
  }
  call->own = state->own.room<float>(threads * call->own_stride);
}

// One step more for every parameter that has been stepped, as torch's optimizers count.
void count_steps(const Call* call) {
  int64_t at = 0;
  for (int64_t t = 0; t < call->num_tables; at += call->codes[t++].parameters)
    for (int64_t k = at; k < at + call->codes[t].parameters && call->rules[t].optimizer != GRADIENT; k++)
      if (call->steps[k]) ++*call->steps[k];
}

// Each thread reads what it has read in check.cpp.
bool holds_one_id_a_bag(const Call* call, int threads) {
  const int64_t bags = call->num_features * call->batch;
  if (call->num_ids != bags) return false;
  int64_t wrong = call->offsets[bags] ^ bags;
#pragma omp parallel for num_threads(bags < 32 * SERIAL ? 1 : threads) schedule(static) reduction(| : wrong)
  for (int64_t i = 0; i < bags; i++) wrong |= call->offsets[i] ^ i;
  for (int64_t f = 0; f < call->num_features; f++) wrong |= call->features[f].other >= 0;
  return wrong == 0;
}

void fill_bags(const Call* call, const State* state) {
  int32_t* const bags = state->bags.at<int32_t>();
#pragma omp for schedule(static) nowait
  for (int64_t bag = 0; bag < call->num_features * call->batch; bag++)
    for (int64_t i = call->offsets[bag]; i < call->offsets[bag + 1]; i++) bags[i] = static_cast<int32_t>(bag);
  if (!state->means) return;
  for (int64_t f = 0; f < call->num_features; f++) {
    if (!call->features[f].mean) continue;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < call->batch; b++) state->shares.at<float>()[f * call->batch + b] = count_share(call, f, b);
  }
}

bool plans(const Call* call, Plan pass) {
  return std::any_of(call->codes, call->codes + call->num_tables, [&](const TableCode& c) { return c.plan == pass; });
}

// Makes room for the plans of a batch.
void reserve_plan(const Call* call, State* state, int threads) {
  if (!state->reserved) state->plan.reserve(call);
  state->reserved = true;
  // The backward may meet more threads than the forward did.
  state->plan.reserve_threads(threads);
}

// Plans the tables whose kernels ask for it in this pass; every thread of the region calls it.
void plan_tables(const Call* call, State* state, Plan pass) {
  const auto planned_now = [&](int64_t t) { return call->codes[t].plan == pass; };
  const auto base = [&](int64_t t) {
    int64_t ids = 0;
    for (int64_t before = 0; before < t; before++) ids += call->tables[before].ids;
    return ids;
  };
  if (state->owners.whole()) {
    state->owners.each_own(PLANNED, planned_now, [&](int64_t t) {
      plan_table(call, t, base(t), state->plan, omp_get_thread_num());
      for (int64_t level = 1; level < call->tables[t].order; level++) plan_level(call, t, base(t), level, state->plan);
    });
#pragma omp barrier
    return;
  }
  // Tables larger than a thread's share are planned by all threads together, the others by one thread each.
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  int64_t all = 0, few = 0;
  for (int64_t t = 0; t < call->num_tables; t++) all += planned_now(t) ? call->tables[t].ids : 0;
  const auto together = [&](int64_t t) {
    return threads > 1 && call->tables[t].ids >= TOGETHER && call->tables[t].ids * threads > all;
  };
  for (int64_t t = 0; t < call->num_tables; t++)
    if (planned_now(t) && together(t))
      plan_together(call, t, base(t), state->plan);
    else
      few += planned_now(t);
  if (few == 0) return;
  const auto now = [&](int64_t t) { return planned_now(t) && !together(t); };
  // Round after round over the tables, each of which takes part in `rounds` of them: ids that go before a task.
  const auto ids_before = [&](int64_t task, auto rounds) {
    int64_t ids = 0;
    for (int64_t t = 0; t < call->num_tables; t++)
      ids += call->tables[t].ids * std::min<int64_t>(rounds(t), task / call->num_tables + (t < task % call->num_tables));
    return ids;
  };
  share_tasks(0, call->num_tables, [&](int64_t t) { return ids_before(t, now); }, [&](int64_t t) {
    if (now(t)) plan_table(call, t, base(t), state->plan, thread);
  });
#pragma omp barrier
  // The last levels are the largest: first. The first one needs nothing.
  const auto levels = [&](int64_t t) { return now(t) ? call->tables[t].order - 1 : 0; };
  int64_t most = 0;
  for (int64_t t = 0; t < call->num_tables; t++) most = std::max(most, levels(t));
  const auto cost = [&](int64_t task) { return ids_before(task, levels); };
  share_tasks(0, call->num_tables * most, cost, [&](int64_t task) {
    const int64_t t = task % call->num_tables, level = levels(t) - task / call->num_tables;
    if (level > 0) plan_level(call, t, base(t), level, state->plan);
  });
#pragma omp barrier
}

// Looks at a new batch, and makes room for what is known of its bags.
void begin(Call* call, State* state, int threads) {
  if (!state->known) know(call, state);
  state->reserved = state->complete = false;
  state->one_hot = holds_one_id_a_bag(call, threads);
  if (!state->one_hot) {
    // At least one: null means one id a bag.
    state->bags.room<int32_t>(call->num_ids + 1), state->slots.room<int32_t>(call->num_ids + 1);
    if (state->means) state->shares.room<float>(call->num_features * call->batch);
  }
  attach(call, state, threads);
  count_ids(call);
  state->owners.share_out(call, threads);
}

const Functions& kernel_of(const Table& table) { return table.mirrored ? table.code->mirror : table.code->kernel; }

// Gives every table its workspaces: one of its own for what the backward needs again, and one that all take in turn,
// or all of a thread.
void place(const Call* call, State* state, bool forward) {
  int64_t kept = 0, spare = 0;
  const bool whole = state->owners.whole(), shared = !whole && (forward || state->alone.now());
  const int64_t cut = std::count_if(call->tables, call->tables + call->num_tables,
                                    [](const Table& table) { return table.slices > 1; });
  for (int64_t t = 0; t < call->num_tables; t++) {
    Table& table = call->tables[t];
    table.workers = shared ? workers(table, omp_get_num_threads()) : 1;
    table.share_rows = call->slice_rows / std::max<int64_t>(cut, 1);
    table.spare_size = kernel_of(table).spare(&table, call);
    spare = std::max(spare, table.spare_size);
    kept += kernel_of(table).kept(&table, call);
  }
  float* at = forward ? state->kept.room<float>(kept) : state->kept.at<float>();
  spare = (spare + LINE - 1) / LINE * LINE;
  float* room = state->spare.room<float>(whole ? spare * omp_get_num_threads() : spare);
  for (int64_t t = 0; t < call->num_tables; t++) {
    Table& table = call->tables[t];
    table.spare = whole ? room + spare * state->owners.of(t) : room, table.kept = at;
    at += kernel_of(table).kept(&table, call);
  }
}

// Hands every table to its kernel: whole tables to their owners' alone, else one after the other to all threads, those
// that add to the others' columns last.
void run_kernels(const Call* call, State* state, Stage stage) {
  const auto run = [&](const Table& table, const Call* own) {
    const Functions& kernel = kernel_of(table);
    (stage == POOLED ? kernel.forward : kernel.backward)(&table, own);
  };
  if (state->owners.whole()) {
    state->owners.each_own(stage, [](int64_t) { return true; }, [&](int64_t t) {
      const Table& table = call->tables[t];
      if (Buffer::poison) std::fill_n(table.spare, table.spare_size, NAN);
      Call own = *call;
      own.own += omp_get_thread_num() * call->own_stride;
#pragma omp parallel num_threads(1)  // a region of this thread, for what kernels share out and wait for
      run(table, &own);
    });
    return;
  }
  bool taken = false, adding = false;
  for (const bool adds : {false, true})
    for (int64_t t = 0; t < call->num_tables; t++) {
      const Table& table = call->tables[t];
      if (adds != (table.adds != 0)) continue;
      if ((table.spare_size && taken) || adds != adding) {
#pragma omp barrier
      }
      taken = taken || table.spare_size, adding = adds;
      if (Buffer::poison) {
#pragma omp single
        std::fill_n(table.spare, table.spare_size, NAN);
      }
      run(table, call);
    }
}

bool finite(const float* values, int64_t count, int64_t threads) {
  uint32_t bad = 0;
#pragma omp parallel for num_threads(count < 64 * SERIAL ? 1 : threads) reduction(| : bad)
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, 4);
    bad |= (bits & 0x7F800000u) == 0x7F800000u;
  }
  return bad == 0;
}

}  // namespace

extern "C" {

int64_t recemb_tree_call_size() { return sizeof(Call); }
int64_t recemb_tree_code_size() { return sizeof(TableCode); }

void* recemb_tree_pool_new() { return new (std::nothrow) Pool; }
void recemb_tree_pool_free(void* pool) { leave(static_cast<Pool*>(pool), nullptr); }

// A state for one look-up, to be given back; null when there is no memory.
void* recemb_tree_take(void* holder) {
  Pool* pool = static_cast<Pool*>(holder);
  const std::lock_guard<std::mutex> held(pools);
  State* state = pool->first ? pool->first : new (std::nothrow) State;
  if (!state) return nullptr;
  pool->first = state->next, state->next = nullptr, pool->users++;
  return state;
}

void recemb_tree_give(void* pool, void* state) { leave(static_cast<Pool*>(pool), static_cast<State*>(state)); }

// How many states rest, and their bytes of products and of rows, which `micro_batch_rows` bounds; not those of plans.
int64_t recemb_tree_at_rest(void* holder, int64_t* bytes) {
  Pool* pool = static_cast<Pool*>(holder);
  const std::lock_guard<std::mutex> held(pools);
  int64_t states = *bytes = 0;
  for (State* state = pool->first; state; state = state->next, states++)
    *bytes += state->kept.size() + state->spare.size();
  return states;
}

// For tests: the threads that a batch is looked up by, of so many.
int64_t recemb_tree_threads(const Call* call, int64_t threads) { return threads_for(call, threads); }
void recemb_tree_alone(int64_t always) { Alone::always = always; }
void recemb_tree_poison(int64_t on) { Buffer::poison = on != 0; }
void recemb_tree_fail(int64_t at) { Buffer::failing = at; }

// The three below return 0, or how many bytes there is no room for: nothing of the caller's has been written then, and
// the state serves the next batch, or the same call again.

// Plans a batch for both passes, ahead of its forward. Parameters are not read.
int64_t recemb_tree_prepare(Call* call, void* holder, int64_t threads) {
  State* state = static_cast<State*>(holder);
  const int team = threads_for(call, threads);
  const bool plan = plans(call, FORWARD) || plans(call, BACKWARD);
  const int64_t lacks = lacking([&] {
    begin(call, state, team);
    if (plan) reserve_plan(call, state, team);
  });
  if (lacks) return lacks;
#pragma omp parallel num_threads(team)
  {
    if (!state->one_hot) fill_bags(call, state);
    for (const Plan pass : {FORWARD, BACKWARD})
      if (plans(call, pass)) plan_tables(call, state, pass);
  }
  state->complete = true;
  return 0;
}

// `prepared`: recemb_tree_prepare has been called with this batch and state.
int64_t recemb_tree_forward(Call* call, void* holder, int64_t threads, int64_t prepared) {
  State* state = static_cast<State*>(holder);
  const bool plan = plans(call, FORWARD) && !prepared;
  const int team = threads_for(call, threads);
  int64_t lacks = lacking([&] {
    if (prepared)
      attach(call, state, team), state->owners.share_out(call, team);
    else
      begin(call, state, team);
    if (plan) reserve_plan(call, state, team);
  });
  if (lacks) return lacks;
  ask_for_huge_pages(call->out, call->batch * call->columns * static_cast<int64_t>(sizeof(float)));
#pragma omp parallel num_threads(team)
  {
    if (plan) {
      if (!state->one_hot) fill_bags(call, state);
      plan_tables(call, state, FORWARD);
    }
#pragma omp single
    lacks = lacking([&] { place(call, state, true); });
    if (!lacks) run_kernels(call, state, POOLED);
  }
  return lacks;
}

// -1 when the gradient is not finite: nothing has been written then either.
int64_t recemb_tree_backward(Call* call, void* holder, int64_t threads) {
  State* state = static_cast<State*>(holder);
  bool updates = false;
  for (int64_t t = 0; t < call->num_tables; t++) updates = updates || call->rules[t].optimizer != GRADIENT;
  if (updates && !finite(call->grad_out, call->batch * call->columns, threads)) return -1;
  // Kernels without a plan look bags up as well.
  const bool bags = plans(call, BACKWARD) || plans(call, NEVER), plan = plans(call, BACKWARD) && !state->complete;
  const int team = threads_for(call, threads);
  int64_t lacks = lacking([&] {
    attach(call, state, team);
    if (plan) reserve_plan(call, state, team);
  });
  if (lacks) return lacks;
  for (int64_t f = 0; f < call->num_features; f++)
    call->gradient[f] = {call->grad_out + call->features[f].column, call->columns};
  state->alone.choose(call, team);
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(team)
  {
    if (bags && !state->one_hot) {
      fill_bags(call, state);
#pragma omp barrier
    }
    if (plan) plan_tables(call, state, BACKWARD);
#pragma omp single
    lacks = lacking([&] { place(call, state, false); });
    if (!lacks) run_kernels(call, state, STEPPED);
  }
  if (lacks) return lacks;
  state->alone.note(call, omp_get_wtime() - start);
  count_steps(call);
  state->complete = true;  // for another backward of the same look-up
  return 0;
}
}
